"""The boundary: how one agent is run under the laws. Pin, check the inputs, execute, check the output, seal.

Knows agents, contracts and state; knows nothing of Dagster, which calls it once per step.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from typing import Any, Literal

import polars as pl
from pydantic import BaseModel

from dagster_mao.agent import Agent, AgentContext, Input, Shape
from dagster_mao.contract import Contract, RuleFailure, Verdict, compare
from dagster_mao.errors import (
    AgentFailedError,
    BatchRefusedError,
    FencedError,
    IncompatibleContractError,
    InvalidRecordsError,
    MaoError,
    PinError,
    StaleStateError,
    TamperedError,
)
from dagster_mao.state import Attempt, Provenance, Seal, StateStore, staged

PINNED_BASE, OUTPUT = "pinned_base", "output"
_CHUNK_RECORDS = 10_000  # models alive at a time in a record-wise agent
_SAMPLES = 5
_LIBRARY_VERSION = version("dagster-mao")


@dataclass(frozen=True)
class Check:
    """The verdict of one boundary check. `metadata` is JSON: what was compared, and, where it failed, `reasons` with masked samples.

    One that failed with `severity` "warn" did not stop the batch.
    """

    name: str
    passed: bool
    description: str
    metadata: dict[str, Any] = field(default_factory=dict)
    severity: Literal["error", "warn"] = "error"


@dataclass(frozen=True)
class Outcome:
    """What became of a step. `reused`: the same output had been sealed by this attempt before, so no version was added."""

    seal: Seal
    checks: tuple[Check, ...]
    reused: bool


def input_check(upstream: str) -> str:
    """Name of the check of one upstream's records against the consumer's contract."""
    return f"input_{upstream}"


def check_names(agent: Agent) -> list[str]:
    """The checks that every step of this agent evaluates, in order."""
    return [PINNED_BASE, *(input_check(i.upstream) for i in agent.inputs), OUTPUT]


def run_agent(
    store: StateStore,
    agent: Agent,
    attempt: Attempt,
    *,
    resources: Mapping[str, Any] | None = None,
    config_digest: str = "",
    partition_key: str | None = None,
    records: Any = None,
    log: logging.Logger | None = None,
) -> Outcome:
    """Runs one agent of an attempt up to its seal.

    `records` takes the place of `execute` for an entry: models, dicts, or a polars frame. Whatever goes wrong is raised as an error of this
    library whose `checks` hold all verdicts reached until then, the failed one included: `BatchRefusedError` for records that broke a
    contract, `PinError`, `StaleStateError`, `FencedError` and `TamperedError` for the state, `AgentFailedError` for what `execute` raised.
    Nothing of a failed step is visible to anybody.
    """
    step = _Step(store, agent.name, agent.output, attempt)
    with step.reporting():
        pinned = step.pin(agent.inputs)
        frames = step.read(agent.inputs, pinned)
        context = AgentContext(
            workflow_id=attempt.workflow_id,
            agent=agent.name,
            attempt=attempt.id,
            run_id=attempt.run_id,
            now=attempt.now,
            seed=attempt.seed(agent.name),
            partition_key=partition_key,
            log=log or logging.getLogger(f"dagster_mao.agent.{agent.name}"),
        )
        started = time.perf_counter()
        call = _Call(agent, context, dict(resources or {}))
        result = call.run(frames) if records is None else records
        frame = step.as_frame(result)
        driver = _driver(agent, frames)
        return step.seal(
            frame,
            pinned,
            driver,
            agent_version=agent.agent_version,
            config=config_digest,
            model=agent.model,
            seed=context.seed,
            started=started,
        )


class _Step:
    """One agent's way from its pins to its seal, and the checks met on it."""

    def __init__(self, store: StateStore, agent: str, output: Contract[Any], attempt: Attempt) -> None:
        self._store, self._agent, self._output, self._attempt = store, agent, output, attempt
        self._checks: dict[str, Check] = {}

    @contextmanager
    def reporting(self) -> Iterator[None]:
        try:
            yield
        except MaoError as error:
            if isinstance(error, (PinError, StaleStateError, FencedError, TamperedError)):
                self._checks[PINNED_BASE] = Check(PINNED_BASE, False, str(error), self._pins_metadata([]))
            error.agent, error.workflow = error.agent or self._agent, error.workflow or self._attempt.workflow_id
            error.checks = tuple(self._checks.values())
            raise

    # -- what it may read ------------------------------------------------------------------------------------------------------------

    def pin(self, inputs: Sequence[Input]) -> list[Seal]:
        pinned = [self._attempt.pin(i.upstream) for i in inputs]
        self._attempt.require_one_entry(self._agent, pinned)
        told = ", ".join(f"{seal.agent}@{seal.version}" for seal in pinned) or "nothing: it is the entry"
        self._checks[PINNED_BASE] = Check(PINNED_BASE, True, f"Reads {told}", self._pins_metadata(pinned))
        return pinned

    def _pins_metadata(self, pinned: Sequence[Seal]) -> dict[str, Any]:
        attempt = self._attempt
        return {
            "workflow": attempt.workflow_id,
            "attempt": attempt.id,
            "base": attempt.base,
            "parents": [seal.as_parent.model_dump() for seal in pinned],
        }

    def read(self, inputs: Sequence[Input], pinned: Sequence[Seal]) -> dict[str, pl.LazyFrame]:
        """By upstream, the pinned rows, each held to the consumer's contract, and all to the same keys."""
        frames, failures = {}, {}
        for wanted, seal in zip(inputs, pinned, strict=True):
            self._require_compatible(wanted, seal)
            frames[wanted.upstream] = wanted.contract.select(self._store.read(seal))
            # The producer's check of the very same contract on the very same bytes is in the seal.
            proven = seal.contract_hash == wanted.contract.hash
            verdict = Verdict(wanted.contract.name, seal.row_count, 0, ()) if proven else wanted.contract.check(frames[wanted.upstream])
            failures[wanted.upstream] = [*verdict.failures, *_one_record(wanted.contract, verdict.rows)]
            self._judge(
                input_check(wanted.upstream), wanted.contract, verdict, failures[wanted.upstream], reads=seal.reference, proven=proven
            )
        if not any(failures.values()):
            self._align(inputs, frames)
        self._refuse_if_failed()
        return frames

    def _require_compatible(self, wanted: Input, seal: Seal) -> None:
        found = [d for d in compare(json.loads(seal.contract_schema), wanted.contract.describe()) if d.kind == "contradiction"]
        if not found:
            return
        what = f"{seal.reference} was sealed under {seal.contract}, which {wanted.contract.name} contradicts: {found[0].detail}"
        check = input_check(wanted.upstream)
        self._checks[check] = Check(check, False, what, {"contract": wanted.contract.name, "reads": seal.reference})
        raise IncompatibleContractError(
            what, field=found[0].field, fix=f"materialise {seal.agent} again under the new contract, or mend {wanted.contract.name}"
        )

    def _align(self, inputs: Sequence[Input], frames: Mapping[str, pl.LazyFrame]) -> None:
        """Every keyed upstream must have the same records; one that may lack some (`| None`) must still know no others."""
        keyed = [i for i in inputs if i.contract.key]
        if len(keyed) < 2:
            return
        keys = {i.upstream: _keys(frames[i.upstream], i.contract) for i in keyed}
        for wanted in keyed:
            if not wanted.required:
                continue
            for other in keyed:
                absent = _absent(keys[other.upstream], keys[wanted.upstream])
                if len(absent):
                    rule = f"record in {other.upstream}, missing here"
                    self._add_failure(input_check(wanted.upstream), wanted.contract, _key_failure(rule, wanted.contract, absent))

    # -- what it made ----------------------------------------------------------------------------------------------------------------

    def as_frame(self, result: Any) -> pl.LazyFrame:
        """What an agent returned, as a frame of the output contract's columns. Its values are judged later, its columns and dtypes here."""
        if isinstance(result, (pl.LazyFrame, pl.DataFrame)):
            frame = result.lazy()
        elif isinstance(result, BaseModel):
            frame = self._to_frame([result])
        elif isinstance(result, Iterable) and not isinstance(result, (str, bytes, Mapping)):
            frame = self._to_frame(result)
        else:
            what = f"It returned {type(result).__name__}, neither records nor a polars frame"
            raise AgentFailedError(what, agent=self._agent, fix=f"return {self._output.name} records or a frame of them")
        try:
            schema = frame.collect_schema()
        except pl.exceptions.PolarsError as error:
            raise _failed(self._agent, error) from error
        failures = self._output.check(pl.DataFrame(schema=schema), exact=True).failures
        if failures:
            self._judge(OUTPUT, self._output, Verdict(self._output.name, 0, 0, failures), failures)
            self._refuse_if_failed()
        nulls = [pl.col(name).cast(self._output.schema[name]) for name, dtype in schema.items() if dtype == pl.Null]
        return frame.with_columns(nulls).select(list(self._output.schema))

    def _to_frame(self, records: Iterable[Any]) -> pl.LazyFrame:
        frames, chunks = [self._output.to_frame([])], _chunks(records)
        for chunk in chunks:
            try:
                frames.append(self._output.to_frame(chunk))
            except InvalidRecordsError:
                verdict = self._output.check_records(chain(chunk, chain.from_iterable(chunks)))
                self._judge(OUTPUT, self._output, verdict, verdict.failures)
                self._refuse_if_failed()
        return pl.concat(frames).lazy()

    def seal(
        self, frame: pl.LazyFrame, pinned: Sequence[Seal], driver: tuple[str, pl.LazyFrame] | None, *, started: float, **provenance: Any
    ) -> Outcome:
        contract = self._output
        with _sunk(self._store, self._agent, frame) as batch:
            verdict = contract.check(batch.scan(), exact=True)
            failures = [*verdict.failures, *_one_record(contract, verdict.rows)]
            if driver and driver[0] == contract.key and not failures:
                failures += _not_conserved(driver[1], _keys(batch.scan(), contract), contract)
            self._judge(OUTPUT, contract, verdict, failures)
            self._refuse_if_failed()
            sealed, reused = self._attempt.seal(
                self._agent,
                batch,
                row_count=verdict.rows,
                schema=contract.schema,
                parents=[seal.as_parent for seal in pinned],
                provenance=Provenance(
                    contract=contract.name,
                    contract_version=contract.version,
                    contract_hash=contract.hash,
                    contract_schema=json.dumps(contract.describe(), sort_keys=True),
                    key=contract.key,
                    latency_seconds=round(time.perf_counter() - started, 6),
                    library_version=_LIBRARY_VERSION,
                    **provenance,
                ),
            )
        return Outcome(sealed, tuple(self._checks.values()), reused)

    # -- verdicts --------------------------------------------------------------------------------------------------------------------

    def _judge(self, name: str, contract: Contract[Any], verdict: Verdict, failures: Sequence[RuleFailure], **facts: Any) -> None:
        told = f"{verdict.rows} records keep {contract.name}" if not failures else f"{contract.name} broken: {failures[0].rule}"
        more = f" and {len(failures) - 1} more rules" if len(failures) > 1 else ""
        self._checks[name] = Check(
            name,
            not failures,
            told + more,
            {
                "contract": contract.name,
                "contract_version": contract.version,
                "contract_hash": contract.hash,
                "rows": verdict.rows,
                "failed_rows": verdict.failed_rows,
                "reasons": [_reason(failure) for failure in failures],
                **facts,
            },
        )

    def _add_failure(self, name: str, contract: Contract[Any], failure: RuleFailure) -> None:
        check = self._checks[name]
        facts = {**check.metadata, "reasons": [*check.metadata["reasons"], _reason(failure)]}
        self._checks[name] = Check(name, False, f"{contract.name} broken: {failure.rule}", facts)

    def _refuse_if_failed(self) -> None:
        failed = [check for check in self._checks.values() if not check.passed and check.severity == "error"]
        if failed:
            reasons = failed[0].metadata["reasons"]
            broken = reasons[0]["count"]
            count = f" ({broken:,} record{'s' if broken > 1 else ''})" if broken else ""
            raise BatchRefusedError(
                f"The batch was refused at {failed[0].name!r}: {failed[0].description}{count}",
                agent=self._agent,
                workflow=self._attempt.workflow_id,
                field=reasons[0]["field"],
                fix="mend the records or the contract and run again; nothing was sealed",
            )


class _Call:
    """The call of `execute`: once with frames, or once per record."""

    def __init__(self, agent: Agent, context: AgentContext, resources: dict[str, Any]) -> None:
        self._agent, self._context, self._resources = agent, context, resources

    def run(self, frames: Mapping[str, pl.LazyFrame]) -> Any:
        agent = self._agent
        if agent.is_entry or agent.output_shape is not Shape.RECORD:
            values = {i.parameter: frames[i.upstream] if i.shape is Shape.LAZYFRAME else frames[i.upstream].collect() for i in agent.inputs}
            result = self._one(values)
            result = _finished(result) if agent.is_async else result
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
            raise _failed(self._agent.name, error) from error

    def _one(self, values: Mapping[str, Any], record: str = "") -> Any:
        try:
            return self._agent.call(self._context, values, self._resources)
        except MaoError:
            raise
        except Exception as error:
            raise _failed(self._agent.name, error, record) from error

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
            outputs = _finished(self._concurrently(chunk)) if self._agent.is_async else [self._one(v, self._name(v)) for v in chunk]
            for output in outputs:
                yield self._expect(output, self._agent.output.model)

    async def _concurrently(self, chunk: Sequence[Mapping[str, Any]]) -> list[Any]:
        room = asyncio.Semaphore(self._agent.concurrency)

        async def one(values: Mapping[str, Any]) -> Any:
            async with room:
                try:
                    return await self._one(values, self._name(values))
                except MaoError:
                    raise
                except Exception as error:
                    raise _failed(self._agent.name, error, self._name(values)) from error

        tasks = [asyncio.ensure_future(one(values)) for values in chunk]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _name(self, values: Mapping[str, Any]) -> str:
        """The record's key for an error text; nothing where the key is personal."""
        for wanted in self._agent.inputs:
            key = wanted.contract.key
            if key and values[wanted.parameter] is not None:
                return "" if key in wanted.contract.personal else f" on record {getattr(values[wanted.parameter], key)!r}"
        return ""


def _failed(agent: str, error: BaseException, record: str = "") -> AgentFailedError:
    # The text of the error is the agent's own and may hold personal data: it stays in the chained cause.
    return AgentFailedError(
        f"execute raised {type(error).__name__}{record}", agent=agent, fix="see the cause in the step's log; the batch was not sealed"
    )


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
    for chunk in table.collect().iter_slices(_CHUNK_RECORDS):
        models = {i.parameter: _models(i, chunk[i.parameter]) for i in keyed}
        yield [{**single, **dict(zip(models, values, strict=True))} for values in zip(*models.values(), strict=True)]


def _models(wanted: Input, rows: pl.Series) -> list[Any]:
    there = rows.is_not_null()
    found = wanted.contract.from_frame(rows.filter(there).struct.unnest())
    return [next(found) if is_there else None for is_there in there]


def _chunks(records: Iterable[Any]) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for record in records:
        chunk.append(record)
        if len(chunk) == _CHUNK_RECORDS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@contextmanager
def _sunk(store: StateStore, agent: str, frame: pl.LazyFrame) -> Iterator[Any]:
    # Only what evaluating the agent's own expressions raises is the agent's failure; the disk's comes as a StoreError.
    context = staged(store.objects, frame)
    try:
        batch = context.__enter__()
    except MaoError:
        raise
    except Exception as error:
        raise _failed(agent, error) from error
    try:
        yield batch
    finally:
        context.__exit__(None, None, None)


def _keys(frame: pl.LazyFrame, contract: Contract[Any]) -> pl.LazyFrame:
    """The keys of a batch, as the column `key`; lazy, because a batch may be larger than memory."""
    return frame.select(pl.col(str(contract.key)).alias("key"))


def _driver(agent: Agent, frames: Mapping[str, pl.LazyFrame]) -> tuple[str, pl.LazyFrame] | None:
    """Name of the key, and the keys, of the upstream whose records the agent must account for."""
    for wanted in agent.inputs:
        if wanted.contract.key and wanted.required:
            return wanted.contract.key, _keys(frames[wanted.upstream], wanted.contract)
    return None


def _absent(keys: pl.LazyFrame, among: pl.LazyFrame) -> pl.Series:
    """The keys that are not among the others. Equal columns, the usual case, are compared streaming, and nothing is held."""
    counts = [side.select(pl.len()).collect(engine="streaming").item() for side in (keys, among)]
    side_by_side = pl.concat([keys.select(one="key"), among.select(other="key")], how="horizontal")
    if counts[0] == counts[1] and side_by_side.select(pl.col("one").eq_missing(pl.col("other")).all()).collect(engine="streaming").item():
        return pl.Series("key", [])
    return keys.join(among, on="key", how="anti").collect(engine="streaming").to_series()


def _not_conserved(given: pl.LazyFrame, made: pl.LazyFrame, contract: Contract[Any]) -> list[RuleFailure]:
    rules = {"record read, but not returned": _absent(given, made), "record returned, but never read": _absent(made, given)}
    return [_key_failure(rule, contract, keys) for rule, keys in rules.items() if len(keys)]


def _key_failure(rule: str, contract: Contract[Any], keys: pl.Series) -> RuleFailure:
    key = str(contract.key)
    shown = ["***"] * min(len(keys), _SAMPLES) if key in contract.personal else keys.head(_SAMPLES).to_list()
    return RuleFailure(rule, key, len(keys), tuple({key: value} for value in shown))


def _one_record(contract: Contract[Any], rows: int) -> list[RuleFailure]:
    if contract.key or rows == 1:
        return []
    return [RuleFailure("exactly one record, as the contract has no key", None, rows, ())]


def _reason(failure: RuleFailure) -> dict[str, Any]:
    return {"rule": failure.rule, "field": failure.field, "count": failure.count, "samples": [dict(sample) for sample in failure.samples]}
