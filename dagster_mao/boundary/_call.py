"""The calls of a step: what they have in common, those of records one by one, and that of a whole batch."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from functools import cached_property
from operator import sub
from typing import TYPE_CHECKING, Any, Protocol

import polars as pl
from pydantic import BaseModel, ValidationError

from dagster_mao.agent import Agent, AgentContext, Input, Shape
from dagster_mao.boundary._asking import Asking, Outcome
from dagster_mao.boundary._digest import digest
from dagster_mao.boundary._failure import cause, failed
from dagster_mao.boundary._inputs import Chunk, chunks
from dagster_mao.boundary._log import CallLog
from dagster_mao.boundary._one import Answered, Deferred, Failed, One, WrongAnswerError
from dagster_mao.boundary._rehearsal import AnswersThen, NoAnswers, Rehearsal, answers_then
from dagster_mao.boundary._scratch import Scratch
from dagster_mao.boundary._step import Step, sunk
from dagster_mao.boundary._traces import Traced, is_traced, trace_step
from dagster_mao.boundary._ways import Loop, as_tasks, in_place, in_threads
from dagster_mao.correlation import WorkflowLog
from dagster_mao.errors import AnswerNotFrozenError, BreakerOpenError, InvalidRecordsError, MaoError, StoreError
from dagster_mao.gateway import CallKeys, CallRecord, Gateway, Meter, Policy, enforces_nothing, shared_store
from dagster_mao.state import Attempt, CallSummary, KeptFile, KeptFrames, Seal, Staged, StateStore

if TYPE_CHECKING:
    import datetime as dt

    from dagster_mao.gateway import Answer, Answers
    from dagster_mao.journal import Chunk as AnnouncedCalls
    from dagster_mao.journal import Step as JournaledStep

_SHORTEST_KEPT = 3600.0  # seconds: the file of an answer outlives it, however short that is
ASYNC_CALLS = 16  # of a record-wise async agent, in flight by default

logger = WorkflowLog(logging.getLogger("dagster_mao.boundary"))


class Calls:
    """What all calls of a step have in common. A context manager: at its end, sealed or failed, what the calls told is logged.

    Raises `WiringError` where the policy needs a database that the store does not have.
    """

    def __init__(
        self,
        store: StateStore,
        agent: Agent,
        attempt: Attempt,
        policy: Policy,
        context: AgentContext,
        resources: Mapping[str, Any],
        scratch: Scratch,
        read: Mapping[str, pl.LazyFrame],
        *,
        config: str,
        fresh: bool,
        effects: JournaledStep | None = None,
        rehearsal: Rehearsal | None = None,
    ) -> None:
        self.effects, self.rehearsal = effects, rehearsal
        self.frozen = rehearsal is not None and rehearsal.kept_in is not None
        self.sealed: Seal | None = None
        self._read, self._began = read, time.time()
        self.store, self.agent, self.policy, self.attempt, self.scratch = store, agent, policy, attempt, scratch
        self.context, self._resources = context, resources
        self.keys = CallKeys(attempt.workflow_id, attempt.epoch, agent.name)
        self.is_personal = any(i.contract.key in i.contract.personal for i in agent.inputs if i.contract.key)
        self._ends = ExitStack()
        self._gateway = Gateway(policy, f"{attempt.pipeline}.{agent.name}", store.database)
        about = {"epoch": attempt.epoch, "agent_version": agent.agent_version}
        whose = {"workflow_id": attempt.workflow_id, "agent": agent.name, "attempt": attempt.id, "run_id": attempt.run_id}
        self.log = CallLog(store, attempt.pipeline, agent.name, scratch, {**whose, **about})
        self.answers: Answers | AnswersThen | NoAnswers | None = None
        fingerprint = json.dumps([agent.agent_version, config, agent.model, agent.output.hash])
        if rehearsal is not None:
            if rehearsal.kept_in is not None:
                told = {"pipeline": attempt.pipeline, **whose, "fingerprint": hashlib.sha256(fingerprint.encode()).hexdigest()}
                folder = scratch.folder()
                self.answers = self._ends.enter_context(answers_then(rehearsal.kept_in, folder, **told))
        elif policy.keep_answers > 0:
            from dagster_mao.gateway import Answers  # SQLAlchemy is imported by steps that need it

            self.answers = Answers(
                shared_store(str(store.database)),  # without one there is no gateway
                pipeline=attempt.pipeline,
                **whose,
                fingerprint=hashlib.sha256(fingerprint.encode()).hexdigest(),
                keep=policy.keep_answers,
                fresh=fresh,
                about=about,
            )
        instead = agent.fallback if policy.fallback is not None else None
        self._instead = None if instead is None else Gateway(own(instead.agent), f"{attempt.pipeline}.{instead.agent.name}", store.database)
        self.asking = Asking(
            agent,
            policy,
            context,
            resources,
            self._gateway,
            None if instead is None or self._instead is None else (instead, self._instead),
            self.log,
            self.loop,
        )
        self._loop: Loop | None = None

    @cached_property
    def bound(self) -> Callable[[AgentContext, Mapping[str, Any]], Any]:
        """The agent with its resources, for calls one after the other."""
        return self.agent.bound(self._resources)

    @property
    def answered_instead(self) -> bool:
        """Whether the fallback answered anything."""
        return self.asking.answered_instead

    @property
    def opened(self) -> BreakerOpenError | None:
        """The refusal of an open breaker that the policy had an answer to; None where none was."""
        return self.asking.opened

    def closed_since(self) -> dt.datetime | None:
        """When the breaker that had refused calls closed again; None while it is not closed."""
        if self.opened is not None:
            with self.telling("it is not known whether the breaker closed again"):
                return self._gateway.closed_since()
        return None

    def not_kept(self, missing: int, of: int) -> AnswerNotFrozenError:
        """Of a rehearsal that asks nobody: answers that were not kept, or were given to other code."""
        what = f"{missing:,} of {of:,} answers are not kept: they were forgotten, or were given to other code, configuration or contract"
        fix = "ask anew, live: --live, or live=True"
        return AnswerNotFrozenError(what, agent=self.agent.name, workflow=self.attempt.workflow_id, fix=fix)

    def loop(self) -> Loop:
        """The step's event loop. Below a sync agent it is asked for by the fallback, from whichever thread."""
        if self._loop is None:
            self._loop = self._ends.enter_context(Loop(apart=not self.agent.is_async))
        return self._loop

    def summary(self) -> CallSummary:
        """What the calls came to, those included that a killed step did not log. From here on, the rows are written."""
        self._ends.close()
        if self.answers is not None:
            with self.telling("calls of a step that was killed were not logged"):
                self.log.adopt(self.answers.unlogged())
        summary = self.log.summary()
        self.log.begin()
        return summary

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None:
            self._end(None)
            return
        with suppress(MaoError):  # what went wrong first is told
            summary = self.summary()
            if isinstance(error, MaoError):
                error.calls = summary
        self._end(type(error).__name__)

    def _end(self, error: str | None) -> None:
        """Nothing of this fails a step that is sealed."""
        self._ends.close()
        is_logged = self.log.end()
        if self.rehearsal is None and is_traced():
            trace_step(self.store, Traced(self.agent, self.attempt, self.sealed, self.log.rows(), self._read, self._began, error))
        if self.answers is not None:
            with self.telling("calls will be logged twice"):
                if is_logged:
                    self.answers.logged()
            with self.telling("answers may not survive a loss of power"):
                self.answers.close()
        for gateway in (self._gateway, self._instead):
            with self.telling("other processes are not told that the last calls went well"):
                if gateway is not None:
                    gateway.flush()

    @contextmanager
    def telling(self, what: str) -> Iterator[None]:
        try:
            yield
        except StoreError as error:
            logger.warning("%s: %s", what, error)


def own(agent: Agent) -> Policy:
    """The policy of an agent that answers for another one: its own, but for its answers, which nobody keeps."""
    return replace(agent.policy or Policy(), keep_answers=0)


class Unanswered(Protocol):
    """Where the records go that were not answered: a step, or whatever else makes calls."""

    aside: Any
    deferrals: Any

    def may_set_aside(self, more: int) -> bool: ...
    def refuse_share(self) -> None: ...


# -- records, one by one ---------------------------------------------------------------------------------------------------------------


class RecordCalls:
    """A record-wise agent's calls, a chunk of records after the other: models of one chunk are alive at a time."""

    def __init__(self, calls: Calls, step: Unanswered) -> None:
        self._calls, self._step, self._agent = calls, step, calls.agent
        self._model, self._contract = calls.agent.output.model, calls.agent.output
        self._asking, self._answers, self._tell = calls.asking, calls.answers, calls.log.tell
        self._mark = calls.agent.output.from_fallback
        self._results: list[Any] = []
        self._failing = itertools.count(1)
        self._unkept: str | None = None
        in_turn = not calls.agent.is_async and calls.agent.concurrency in (None, 1)
        # An `execute` that somebody put in the place of the agent's own, as tests do, is called by its name.
        is_plain = in_turn and enforces_nothing(calls.policy) and "execute" not in vars(calls.agent) and calls.effects is None
        self._is_plain = is_plain and calls.rehearsal is None

    def run(self, frames: Mapping[str, pl.LazyFrame]) -> Iterator[list[BaseModel]]:
        """The outputs, in the order of the first keyed upstream, chunk by chunk."""
        for chunk in chunks(self._agent.inputs, frames, self._calls.scratch):
            try:
                self._call(chunk)
            except _TooManyError:
                for _ in self._settled(chunk):
                    pass
                self._step.refuse_share()
                raise
            yield list(self._settled(chunk))
            self._results = []
            self._calls.log.settle()
        if self._unkept is not None:
            logger.warning("answers were not kept, for they cannot be read back: %s", self._unkept)

    def _call(self, chunk: Chunk) -> None:
        keys = list(map(self._calls.keys, chunk.records, chunk.inputs))
        self._results = [None] * len(keys)
        reused = self._reuse(keys, chunk.records)
        wanted = [place for place in range(len(keys)) if place not in reused] if reused else range(len(keys))
        if wanted and self._calls.frozen:
            raise self._calls.not_kept(len(wanted), len(keys))
        announced = None
        if self._calls.effects is not None:
            from dagster_mao.journal import Chunk as AnnouncedCalls

            announced = AnnouncedCalls(self._calls.effects, list(zip(chunk.records, keys, strict=True)))
            for place in reused:
                announced.skip(place)
        if not wanted:
            if announced is not None:
                announced.close()
            return
        shown: Sequence[str | None] = [None] * len(keys) if self._calls.is_personal else chunk.records
        self._chunk = chunk
        if self._is_plain:
            self._plainly(chunk, keys, shown)
            return
        values = chunk.values(wanted if reused else None)
        ones: Iterator[One] = (
            One(place, chunk.records[place], shown[place], keys[place], given, self._tell)
            for place, given in zip(wanted, values, strict=True)
        )
        if announced is not None:
            ones = _announcing(announced, ones)
        limit = self._agent.concurrency
        if self._agent.is_async:
            self._calls.loop().run(as_tasks(ones, self._awork, limit or ASYNC_CALLS))
        elif limit is not None and limit > 1:
            in_threads(ones, self._work, min(limit, len(wanted)))
        else:
            in_place(ones, self._work)
        if announced is not None:
            announced.close()

    def _reuse(self, keys: Sequence[str], records: Sequence[str | None]) -> set[int]:
        """Puts what was answered before in its place; the places."""
        known = self._answers.known(keys) if self._answers is not None else {}
        found: set[int] = set()
        for place, key in enumerate(keys) if known else ():
            if (answer := known.get(key)) is not None and (model := self._loaded(answer)) is not None:
                self._results[place] = model
                found.add(place)
                self._tell((key, None if self._calls.is_personal else records[place], _reused(answer)))
        return found

    def _loaded(self, answer: Answer) -> Any:
        try:
            return self._marked(self._contract.load(answer.value), from_fallback=False)
        except InvalidRecordsError:  # damaged, or the contract's validators judge otherwise now: it is asked again
            return None

    def _plainly(self, chunk: Chunk, keys: Sequence[str], shown: Sequence[str | None]) -> None:
        """Calls on which nothing is enforced, in place: most agents' calls, and the agent's own work should be most of what they cost."""
        call, of_call, records, clock = self._calls.bound, self._calls.context.of_call, chunk.records, time.perf_counter
        places, begins, ends = list[int](), list[float](), list[float]()
        with Meter() as meter:
            try:
                for place, values in enumerate(chunk.values()):
                    begun = clock()
                    try:
                        value = call(of_call(records[place], keys[place]), values)
                    except Exception as error:
                        self._tell((keys[place], shown[place], meter.told(begun, clock(), error)))
                        self._unanswered(place, error)
                        continue
                    ended = clock()
                    if meter.used:
                        self._tell((keys[place], shown[place], meter.told(begun, ended)))
                    else:
                        places.append(place)
                        begins.append(begun)
                        ends.append(ended)
                    if isinstance(value, self._model):
                        self._results[place] = value if self._mark is None else self._marked(value, from_fallback=False)
                    else:
                        self._unanswered(place, WrongAnswerError(type(value).__name__, self._contract.name))
            finally:
                started, seconds = map(meter.started_at, begins), map(sub, ends, begins)
                self._calls.log.answered([keys[p] for p in places], [shown[p] for p in places], list(started), list(seconds))

    def _unanswered(self, place: int, error: Exception) -> None:
        one = One(place, None, None, "", {}, self._tell)  # there is no fallback that would be given anything
        self._put(one, self._calls.asking.unanswered(one, error, self._is_answer, self._contract.name))

    def _work(self, one: One) -> None:
        if one.effects is None:
            outcome = self._asking.ask(one, self._is_answer, self._contract.name)
        else:
            with one.effects:
                outcome = self._asking.ask(one, self._is_answer, self._contract.name)
        if self._put(one, outcome) and (value := self._dumped(one)) is not None:
            self._answers.keep(one.key, one.shown, value, one.last)  # type: ignore[union-attr, arg-type]

    async def _awork(self, one: One) -> None:
        if one.effects is None:
            outcome = await self._asking.aask(one, self._is_answer, self._contract.name)
        else:
            with one.effects:
                outcome = await self._asking.aask(one, self._is_answer, self._contract.name)
        if self._put(one, outcome) and (value := self._dumped(one)) is not None:
            await self._answers.akeep(one.key, one.shown, value, one.last)  # type: ignore[union-attr, arg-type]

    def _is_answer(self, value: Any) -> bool:
        return isinstance(value, self._model)

    def _put(self, one: One, outcome: Outcome) -> bool:
        """Puts a record's outcome in its place; whether it is an answer to be kept. Raises what ends the step."""
        if type(outcome) is Answered:
            self._results[one.place] = self._marked(outcome.value, from_fallback=outcome.told is None)
            return self._answers is not None and outcome.told is not None
        self._results[one.place] = outcome
        if type(outcome) is Failed:
            if self._step.aside is None:
                error = outcome.instead or outcome.error
                name = self._name(self._chunk.keys[one.place])
                raise failed(self._agent, outcome.error, name, outcome.instead) from cause(self._agent, error)
            if not self._step.may_set_aside(next(self._failing)):
                raise _TooManyError
        return False

    def _marked(self, model: Any, *, from_fallback: bool) -> Any:
        if self._mark is None or getattr(model, self._mark, None) is from_fallback:
            return model
        return model.model_copy(update={self._mark: from_fallback})

    def _dumped(self, one: One) -> bytes | None:
        try:
            return self._contract.dump(self._results[one.place])
        except (TypeError, ValueError) as error:
            # It can be no row either: it is set aside, or the batch is refused, and it would be asked again.
            self._unkept = type(error).__name__
            return None

    def _settled(self, chunk: Chunk) -> Iterator[BaseModel]:
        """The models among the outcomes; the others go where they belong, in the order of the records, whatever order calls ended in."""
        for place, outcome in enumerate(self._results):
            if type(outcome) is Failed:
                self._set_aside(chunk, place, outcome)
            elif type(outcome) is Deferred:
                self._step.deferrals.add(str(chunk.records[place]), outcome.why)
            elif outcome is not None:
                yield outcome

    def _set_aside(self, chunk: Chunk, place: int, outcome: Failed) -> None:
        aside, error = self._step.aside, outcome.error
        assert aside is not None
        if isinstance(error, ValidationError) and outcome.instead is None and error.title == _title(self._model):
            aside.add_unmade(self._contract, chunk.keys[place], error)
        else:
            rule = f"execute: {_told(error)}"
            aside.add_failed(chunk.keys[place], rule, [i for i in self._agent.inputs if i.contract.key], chunk.row(place))

    def _name(self, key: Any) -> str:
        """The record's key for an error text; nothing where the key is personal."""
        return "" if self._calls.is_personal or key is None else f" on record {key!r}"


def _announcing(announced: AnnouncedCalls, ones: Iterator[One]) -> Iterator[One]:
    """Each call when its intent is on disk."""
    for one in ones:
        announced.announce(one.place)
        one.effects = announced.call(one.place)
        yield one


class _TooManyError(Exception):
    """More records failed than may be set aside."""


def _told(error: Exception) -> str:
    return f"returned {error.args[0]}" if isinstance(error, WrongAnswerError) else type(error).__name__


def _title(model: type[BaseModel]) -> str:
    return model.model_config.get("title") or model.__name__


def _reused(answer: Answer) -> CallRecord:
    return CallRecord(0, time.time(), 0.0, "reused", model=answer.told.model)


# -- a whole batch -------------------------------------------------------------------------------------------------------------------


class WholeCall:
    """The one call of an agent that takes frames, or brings the batch in."""

    def __init__(self, calls: Calls, step: Step) -> None:
        self._calls, self._step, self._agent = calls, step, calls.agent
        kept_in = calls.rehearsal.kept_in if calls.rehearsal else None
        self._kept = KeptFrames((kept_in or calls.store).objects, calls.attempt.pipeline, calls.agent.name)

    def run(self, frames: Mapping[str, pl.LazyFrame], pinned: Sequence[Seal], files: ExitStack) -> pl.LazyFrame | Staged:
        """What it answered, now or before, as a frame of the output contract's columns."""
        calls = self._calls
        key = calls.keys(None, self._digest(pinned))
        reused = self._reuse(calls.answers, key) if calls.answers is not None else None
        if reused is None and calls.frozen:
            raise calls.not_kept(1, 1)
        if calls.effects is None:
            return self._run(key, reused, frames, files, None)
        from dagster_mao.journal import Chunk as AnnouncedCalls

        announced = AnnouncedCalls(calls.effects, [(None, key)])
        if reused is not None:
            announced.skip(0)
            announced.close()
            return self._run(key, reused, frames, files, None)
        announced.announce(0)
        with announced.call(0) as effects:
            return self._run(key, None, frames, files, effects)

    def _run(
        self, key: str, reused: pl.LazyFrame | None, frames: Mapping[str, pl.LazyFrame], files: ExitStack, effects: Any
    ) -> pl.LazyFrame | Staged:
        calls, agent = self._calls, self._agent
        if reused is not None:
            return self._step.as_frame(reused, from_fallback=False)
        values = {i.parameter: frames[i.upstream] if i.shape is Shape.LAZYFRAME else frames[i.upstream].collect() for i in agent.inputs}
        one = One(0, None, None, key, values, calls.log.tell)
        one.effects = effects
        expects: Any = Iterable if agent.output_shape is Shape.RECORD else (pl.LazyFrame, pl.DataFrame)
        outcome = self._asked(one, lambda value: isinstance(value, expects))
        if not isinstance(outcome, Answered):
            assert isinstance(outcome, Failed)
            error = outcome.instead or outcome.error
            raise failed(agent, outcome.error, "", outcome.instead) from cause(agent, error)
        answer, from_fallback = outcome.value, outcome.told is None
        if outcome.told is None or calls.answers is None or isinstance(calls.answers, (AnswersThen, NoAnswers)):
            return self._step.as_frame(self._drawn(answer), from_fallback=from_fallback)
        kept = self._keep(answer, one, calls.answers, files)
        if not isinstance(kept, Staged):
            return self._step.as_frame(kept, from_fallback=False)
        written = kept.scan()
        made = self._step.as_frame(written, from_fallback=False)
        return kept if made is written else made

    def _asked(self, one: One, is_answer: Callable[[Any], bool]) -> Outcome:
        asking, name = self._calls.asking, self._agent.output.name
        if self._agent.is_async:
            outcome: Outcome = self._calls.loop().run(asking.aask(one, is_answer, name))
            return outcome
        return asking.ask(one, is_answer, name)

    def _drawn(self, answer: Any) -> Any:
        """An entry's records; a generator's own errors come while it is read."""
        return answer if isinstance(answer, (pl.LazyFrame, pl.DataFrame)) else self._reading(answer)

    def _reading(self, records: Iterable[Any]) -> Iterator[Any]:
        try:
            yield from records
        except MaoError:
            raise
        except Exception as error:
            raise failed(self._agent, error) from cause(self._agent, error)

    def _keep(self, answer: Any, one: One, answers: Answers, files: ExitStack) -> Any:
        """The answer, kept: as it is, before anybody judges it. Records that can be no rows are no answer that could be kept."""
        frame = answer
        if not isinstance(answer, (pl.LazyFrame, pl.DataFrame)):
            records = list(self._drawn(answer))
            rows = self._step.rows_of(records)
            if rows is None:
                return records
            frame = rows
        batch = files.enter_context(sunk(self._calls.store, self._agent, frame.lazy()))
        assert one.last is not None
        kept = self._kept.keep(f"{one.key}-{hashlib.sha256(self._calls.attempt.run_id.encode()).hexdigest()[:16]}", batch)
        answers.keep(one.key, None, kept.model_dump_json().encode(), one.last)
        self._forget()
        return batch

    def _reuse(self, answers: Answers | AnswersThen | NoAnswers, key: str) -> pl.LazyFrame | None:
        answer = answers.known([key]).get(key)
        if answer is None:
            return None
        try:
            frame = self._kept.read(KeptFile.model_validate_json(answer.value))
        except (ValidationError, StoreError, pl.exceptions.PolarsError):
            return None
        if frame is not None:
            self._calls.log.tell((key, None, _reused(answer)))
        return frame

    def _forget(self) -> None:
        """Removes what was kept too long ago."""
        with self._calls.telling("old answers could not be removed"):
            self._kept.forget(max(self._calls.policy.keep_answers, _SHORTEST_KEPT))

    def _digest(self, pinned: Sequence[Seal]) -> str:
        """Of the inputs: the sealed bytes, and what of them the agent is given. An entry has none: what it brings in is of its attempt."""
        if self._agent.is_entry:
            return digest(json.dumps(["entry", self._calls.attempt.id]))
        told = [_told_of(i, seal) for i, seal in zip(self._agent.inputs, pinned, strict=True)]
        return digest(json.dumps(["frames", told, self._step.left_out()], sort_keys=True))


def _told_of(wanted: Input, seal: Seal) -> list[Any]:
    """What says which rows one upstream gives: the sealed bytes, and, where they are read under another contract, both."""
    contract = wanted.contract
    if seal.contract_hash == contract.hash:
        return [wanted.upstream, seal.digest, contract.hash]
    return [wanted.upstream, seal.digest, json.loads(seal.contract_schema), contract.describe()]
