"""Calling an agent: on a batch at once, or record by record, concurrently where it is async."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from typing import Any

import polars as pl
from pydantic import BaseModel, ValidationError

from dagster_mao.agent import Agent, AgentContext, Input, Shape
from dagster_mao.boundary._aside import Aside
from dagster_mao.contract import has_personal
from dagster_mao.errors import AgentFailedError, CallProcessError, CallTimeoutError, MaoError
from dagster_mao.gateway import Gateway

CHUNK_RECORDS = 10_000  # models alive at a time in a record-wise agent
_OF_THE_CALL = (CallProcessError, CallTimeoutError)  # what the gateway raises in place of what the agent would have


@dataclass(frozen=True)
class _Unmade:
    key: Any
    error: ValidationError


class Call:
    """The call of `execute`: once with frames, or once per record.

    Each call goes through `gateway` if there is one. With `aside`, a record whose output the agent's code cannot make (pydantic refuses the
    model) goes there, and the others go on.
    """

    def __init__(
        self, agent: Agent, context: AgentContext, resources: dict[str, Any], aside: Aside | None, gateway: Gateway | None
    ) -> None:
        self._agent, self._context, self._resources, self._aside, self._gateway = agent, context, resources, aside, gateway

    def run(self, frames: Mapping[str, pl.LazyFrame]) -> Any:
        agent = self._agent
        if agent.is_entry or agent.output_shape is not Shape.RECORD:
            values = {i.parameter: frames[i.upstream] if i.shape is Shape.LAZYFRAME else frames[i.upstream].collect() for i in agent.inputs}
            result = self._whole(values)
            if agent.output_shape is Shape.RECORD:
                return self._drawn(self._expect(result, Iterable))
            return self._expect(result, (pl.LazyFrame, pl.DataFrame))
        return self._records(frames)

    def _drawn(self, records: Iterable[Any]) -> Iterator[Any]:
        """An entry's records; a generator's own errors come while it is read."""
        try:
            yield from records
        except MaoError:
            raise
        except Exception as error:
            raise failed(self._agent, error) from cause(self._agent, error)

    def _whole(self, values: Mapping[str, Any]) -> Any:
        try:
            return _finished(self._acall(values)) if self._agent.is_async else self._call(values)
        except Exception as error:
            if isinstance(error, MaoError) and not isinstance(error, _OF_THE_CALL):
                raise
            raise failed(self._agent, error) from cause(self._agent, error)

    def _one(self, values: Mapping[str, Any]) -> Any:
        try:
            return self._call(values)
        except Exception as error:
            return self._unmade(error, values)

    def _call(self, values: Mapping[str, Any]) -> Any:
        if self._gateway is None:
            return self._agent.call(self._context, values, self._resources)
        return self._gateway.call(self._agent.call, self._context, values, self._resources)

    async def _acall(self, values: Mapping[str, Any]) -> Any:
        if self._gateway is None:
            return await self._agent.call(self._context, values, self._resources)
        return await self._gateway.acall(self._agent.call, self._context, values, self._resources)

    def _unmade(self, error: Exception, values: Mapping[str, Any]) -> _Unmade:
        """What keeps the record's output from being made, to be set aside: it broke the contract, and that is wanted. Else raises."""
        if isinstance(error, MaoError) and not isinstance(error, _OF_THE_CALL):
            raise error
        if self._aside is not None and isinstance(error, ValidationError) and error.title == _title(self._agent.output.model):
            return _Unmade(self._key(values), error)
        raise failed(self._agent, error, self._name(values)) from cause(self._agent, error)

    def _expect(self, result: Any, kind: Any) -> Any:
        if not isinstance(result, kind):
            name = self._agent.output.name
            raise AgentFailedError(
                f"It returned {type(result).__name__}, not {name}", agent=self._agent.name, fix=f"return what it declares: {name}"
            )
        return result

    def _records(self, frames: Mapping[str, pl.LazyFrame]) -> Iterator[BaseModel]:
        """The outputs, in the order of the first keyed upstream, chunk by chunk: models of one chunk are alive at a time."""
        for chunk in _joined(self._agent.inputs, frames):
            outputs = _finished(self._concurrently(chunk)) if self._agent.is_async else [self._one(values) for values in chunk]
            for output in outputs:
                if isinstance(output, _Unmade) and self._aside is not None:
                    # Only here, in the order of the records: the calls end in any order, and the same quarantine has the same bytes.
                    self._aside.add_unmade(self._agent.output, output.key, output.error)
                else:
                    yield self._expect(output, self._agent.output.model)

    async def _concurrently(self, chunk: Sequence[Mapping[str, Any]]) -> list[Any]:
        room = asyncio.Semaphore(self._agent.concurrency or 16)

        async def one(values: Mapping[str, Any]) -> Any:
            async with room:
                try:
                    return await self._acall(values)
                except Exception as error:
                    return self._unmade(error, values)

        tasks = [asyncio.ensure_future(one(values)) for values in chunk]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _key(self, values: Mapping[str, Any]) -> Any:
        keys = (
            getattr(values[i.parameter], i.contract.key) for i in self._agent.inputs if i.contract.key and values[i.parameter] is not None
        )
        return next(keys, None)

    def _name(self, values: Mapping[str, Any]) -> str:
        """The record's key for an error text; nothing where the key is personal."""
        personal = any(i.contract.key in i.contract.personal for i in self._agent.inputs)
        key = self._key(values)
        return "" if personal or key is None else f" on record {key!r}"


def _title(model: type[BaseModel]) -> str:
    return model.model_config.get("title") or model.__name__


def failed(agent: Agent, error: BaseException, record: str = "") -> AgentFailedError:
    """What becomes of an error of the agent's own: `raise failed(agent, error) from cause(agent, error)`."""
    return AgentFailedError(
        f"execute raised {type(error).__name__}{record}", agent=agent.name, fix="see the cause in the step's log; the batch was not sealed"
    )


def cause(agent: Agent, error: BaseException) -> BaseException:
    """The error as it may be chained.

    Its text may hold the values at hand. So where a contract of the agent has personal fields, only types and tracebacks are kept, and
    which rules pydantic found broken.
    """
    contracts = [agent.output, *(i.contract for i in agent.inputs)]
    return _withheld(error) if any(has_personal(contract.describe()) for contract in contracts) else error


def _withheld(error: BaseException) -> BaseException:
    told = _rules(error) if isinstance(error, ValidationError) else "its text is withheld: the agent handles personal data"
    made = RuntimeError(f"{type(error).__name__}: {told}").with_traceback(error.__traceback__)
    inner = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    made.__cause__ = None if inner is None else _withheld(inner)
    return made


def _rules(error: ValidationError) -> str:
    # The first step only: further down, a location may be the key of a mapping, which came with the data.
    broken = dict.fromkeys(f"{e['loc'][0] if e['loc'] else 'record'}: {e['type']}" for e in error.errors(include_input=False))
    return f"{error.error_count()} validation errors for {error.title}: {'; '.join(broken)}"


def _finished(awaitable: Any) -> Any:
    """Awaits to the end, also where a loop is running already (a notebook)."""

    async def main() -> Any:
        return await awaitable

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(copy_context().run, asyncio.run, main()).result()


def _joined(inputs: Sequence[Input], frames: Mapping[str, pl.LazyFrame]) -> Iterator[list[dict[str, Any]]]:
    """Chunks of `execute`'s arguments by parameter: one per key, or a single one when no upstream has a key."""
    single = {i.parameter: next(i.contract.from_frame(frames[i.upstream].collect())) for i in inputs if not i.contract.key}
    keyed = sorted((i for i in inputs if i.contract.key), key=lambda i: not i.required)
    if not keyed:
        yield [single]
        return
    first = keyed[0]
    table = frames[first.upstream].select(pl.col(str(first.contract.key)).alias("key"), pl.struct(pl.all()).alias(first.parameter))
    for other in keyed[1:]:
        side = frames[other.upstream].select(pl.col(str(other.contract.key)).alias("key"), pl.struct(pl.all()).alias(other.parameter))
        table = table.join(side, on="key", how="left", maintain_order="left")
    for chunk in table.collect().iter_slices(CHUNK_RECORDS):
        models = {i.parameter: _models(i, chunk[i.parameter]) for i in keyed}
        yield [{**single, **dict(zip(models, values, strict=True))} for values in zip(*models.values(), strict=True)]


def _models(wanted: Input, rows: pl.Series) -> list[Any]:
    there = rows.is_not_null()
    found = wanted.contract.from_frame(rows.filter(there).struct.unnest())
    return [next(found) if is_there else None for is_there in there]
