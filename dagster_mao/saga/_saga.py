"""The compensation of one attempt: claim it, fence it, undo agent by agent, conclude. Killed at any point, it goes on where it was.

The order of things is what makes it right. The claim stops new effects at once; the fence in the state log stops seals, and moves the
epoch on; only then is read what is to be undone. Nothing is noted as undone before it was, and all writes are under the claim's
generation: whoever was stopped for longer than his lease may write no more. An undo may so be called twice, and none is left out.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import logging
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import dataclass, replace
from functools import partial
from time import sleep
from typing import TYPE_CHECKING, Any, Literal

import polars as pl

from dagster_mao.agent import Agent, Undo, call_compensate, is_async_undo
from dagster_mao.correlation import WorkflowLog, about
from dagster_mao.errors import FencedError, StoreError, WiringError
from dagster_mao.gateway import Gateway, Policy
from dagster_mao.journal import Effect, hidden, journal_of
from dagster_mao.pipeline import Pipeline
from dagster_mao.saga._order import Needed, Superseded, has_sealed, in_order, made_from
from dagster_mao.state import Seal, StateStore, is_completed

if TYPE_CHECKING:
    from dagster_mao.journal._pages import Outstanding, Page, Told
    from dagster_mao.journal._sagas import SagaRow, Sagas, StepRow, UndoRow

LEASE = 15.0  # seconds after which another compensator takes over from one that is silent
ABSENT_SECONDS = 600.0
"""Seconds for which an undo waits for a code location that has its agent."""

NOBODY_HAS_IT = "NobodyHasIt"
"""In place of the class of an error: no code location with this agent showed up."""

UndoneState = Literal["pending", "running", "done", "failed", "kept"]
_FINISHED = ("done", "failed", "kept")
_LOG = WorkflowLog(logging.getLogger(__name__))


@dataclass(frozen=True)
class PlannedUndo:
    """What would be undone of one agent: effects that happened, and such as may have. `kept`: it cannot be undone, which was accepted.

    `where`: "here", at once; "later", here, when what was made from it is undone elsewhere; "elsewhere", in another code location.
    """

    agent: str
    state: UndoneState
    done: int
    unknown: int
    kept: bool
    where: Literal["here", "later", "elsewhere"] = "here"


@dataclass(frozen=True)
class Plan:
    """What is to be undone, in this order. `state` is that of the saga: None before it was asked for; "void": the attempt has completed."""

    workflow_id: str
    attempt: str
    state: str | None
    steps: tuple[PlannedUndo, ...]

    @property
    def agents(self) -> tuple[str, ...]:
        return tuple(step.agent for step in self.steps)

    @property
    def here(self) -> tuple[str, ...]:
        """What is this code location's to undo now."""
        return tuple(step.agent for step in self.steps if step.where == "here")


@dataclass(frozen=True)
class Turn:
    """Whose turn it is where several code locations undo an attempt.

    `here`: what this one can undo now. `before`: agents elsewhere that come before anything else that is left. `absent`: those of them that
    nobody has, as far as is known, and that were waited for long enough. `fenced`: whether the attempt is ended.
    """

    here: tuple[str, ...]
    before: tuple[str, ...]
    absent: tuple[str, ...]
    fenced: bool


@dataclass(frozen=True)
class Undone:
    """What became of one agent's undo. `error` is the class of the last error, `effects` how many were undone."""

    agent: str
    state: UndoneState
    effects: int
    tries: int
    error: str | None


@dataclass(frozen=True)
class Left:
    """What is left to be undone of one agent, and the class of the error that kept it from being."""

    agent: str
    state: UndoneState
    error: str | None


@dataclass(frozen=True)
class Concluded:
    """How a compensation ended. `version` is the reference of the version that says so; None where nothing was added to the log.

    "handed_over": what is left, other code locations undo, or this one after them.
    """

    state: Literal["compensated", "compensation_incomplete", "handed_over", "void"]
    left: tuple[Left, ...] = ()
    kept: tuple[str, ...] = ()
    version: str | None = None


class Saga:
    """The compensation of an attempt at a workflow, or, with `superseded_by`, of what a later completed attempt made obsolete of it.

    `resources` are those that the agents' `compensate` take, by name. `owner` names whoever compensates: processes of one owner take over
    from each other at once, another one only when the lease of 15 seconds is over, which is renewed while work is done. `log` is what the
    agents are handed.

    In hybrid mode agents that the pipeline does not have are undone where they are: this one undoes its own as far as nothing that was made
    from them is left, and hands over. An agent that nobody has shown up for, `absent_seconds` after the fence, counts as failed.

    Raises `WiringError` where the store has no database, `FencedError` when another owner compensates, or took over.
    """

    def __init__(
        self,
        store: StateStore,
        pipeline: Pipeline,
        workflow_id: str,
        attempt: str,
        *,
        superseded_by: str = "",
        resources: Mapping[str, Any] | None = None,
        owner: str | None = None,
        why: str | None = None,
        absent_seconds: float = ABSENT_SECONDS,
        log: logging.Logger | None = None,
    ) -> None:
        self._store, self._pipeline, self.workflow_id, self.attempt = store, pipeline, workflow_id, attempt
        self._absent_seconds = absent_seconds
        self._superseded_by, self._resources, self._why, self._log = superseded_by, dict(resources or {}), why, log
        self._owner = owner or f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
        self._sagas = sagas_of(store)
        self._row: SagaRow | None = None
        self._order: list[UndoRow] = []

    # -- what is to be done ----------------------------------------------------------------------------------------------------------

    def plan(self) -> Plan:
        """What would be undone now, in which order. Changes nothing."""
        row = self._sagas.find(self.workflow_id, self.attempt, self._superseded_by)
        seals = self._store.seals(self.workflow_id)
        if not self._superseded_by and is_completed(seals, self.attempt):
            return Plan(self.workflow_id, self.attempt, "void", ())
        states = {undo.agent: undo.state for undo in self._sagas.undos(row.id)} if row else {}
        return self._described(row.state if row else None, seals, states)

    def begin(self) -> Plan:
        """Claims the attempt and fences it, in the journal and in the state log; then says what is to be undone.

        An attempt that has completed is left alone: the plan's state is "void" then.
        """
        row = self._claimed()
        self._give_up_absent(row)
        return self._described(row.state, self._store.seals(self.workflow_id), {undo.agent: undo.state for undo in self._order})

    def turn(self) -> Turn:
        """Whose turn it is. Changes nothing."""
        row = self._sagas.find(self.workflow_id, self.attempt, self._superseded_by)
        steps, seals = self._steps(), self._store.seals(self.workflow_id)
        noted = {undo.agent: undo for undo in self._sagas.undos(row.id)} if row else {}
        late = {step.agent for step in steps if step.late}
        open_ = [
            agent
            for agent in in_order(self._pipeline, steps, seals)
            if agent in late or agent not in noted or noted[agent].state not in _FINISHED
        ]
        waits = self._waits(open_, steps, seals)
        before = tuple(agent for agent in open_ if self._is_elsewhere(agent))
        return Turn(
            here=tuple(agent for agent in open_ if not self._is_elsewhere(agent) and agent not in waits),
            before=before,
            absent=tuple(self._absent(row, before)) if row else (),
            fenced=row is not None and row.fenced is not None,
        )

    def run(self) -> Concluded:
        """All of it, or all that is this code location's now; once more for what came late meanwhile."""
        for _ in range(2):
            row = self._claimed()
            if row.state == "running":
                self._give_up_absent(row)
                for undo in self._order:
                    self.undo(undo.agent)
            concluded = self.conclude()
            if not any(left.state == "pending" for left in concluded.left):
                break
        return concluded

    def _described(self, state: str | None, seals: Sequence[Seal], states: Mapping[str, str]) -> Plan:
        steps = self._steps()
        found, order = [], in_order(self._pipeline, steps, seals)
        waits = self._waits([agent for agent in order if states.get(agent) not in _FINISHED], steps, seals)
        for agent in order:
            effects, *_ = self._found(agent, steps, seals)
            known = sum(_is_done(effect) for effect in effects)
            how: Any = states.get(agent, "pending")
            where: Any = "elsewhere" if self._is_elsewhere(agent) else "later" if agent in waits else "here"
            found.append(PlannedUndo(agent, how, known, len(effects) - known, self._kind(agent) == "irreversible", where))
        return Plan(self.workflow_id, self.attempt, state, tuple(found))

    # -- other code locations --------------------------------------------------------------------------------------------------------

    def _is_elsewhere(self, agent: str) -> bool:
        """Whether another code location has it: not in orchestration, where there is none."""
        return self._pipeline.mode == "hybrid" and agent not in self._pipeline.agents

    def _waits(self, open_: Sequence[str], steps: Sequence[StepRow], seals: Sequence[Seal]) -> set[str]:
        """What others have to undo something before."""
        if not (elsewhere := [agent for agent in open_ if self._is_elsewhere(agent)]):
            return set()
        above = made_from(self._pipeline, steps, seals)
        return set().union(*(above[agent] for agent in elsewhere))

    def _absent(self, row: SagaRow, agents: Sequence[str]) -> list[str]:
        """Those of these that no code location has shown up for, for long enough."""
        if not agents or row.fenced is None:
            return []
        seen, now = self._sagas.seen(self._pipeline.name), self._sagas.now()
        return [agent for agent in agents if now - max(row.fenced, seen.get(agent, 0.0)) > self._absent_seconds]

    def _give_up_absent(self, row: SagaRow) -> None:
        """Notes as failed what nobody has shown up for, so that the others go on."""
        if row.state != "running":
            return
        absent = self._absent(row, [undo.agent for undo in self._order if undo.state == "pending" and self._is_elsewhere(undo.agent)])
        for agent in absent:
            with about(self.workflow_id, agent, self.attempt):
                _LOG.warning("no code location with this agent has shown up: what it did is not undone")
            self._sagas.end_undo(row, agent, "failed", error=NOBODY_HAS_IT)
        self._order = self._sagas.undos(row.id) if absent else self._order

    # -- claiming --------------------------------------------------------------------------------------------------------------------

    def _claimed(self) -> SagaRow:
        if self._row is not None:
            return self._row
        seals = self._store.seals(self.workflow_id)
        told = self._sagas.find(self.workflow_id, self.attempt, self._superseded_by)
        if told is None and not self._superseded_by and is_completed(seals, self.attempt):
            sealed = [step.id for step in self._sagas.steps(self.workflow_id, self.attempt) if has_sealed(step, seals)]
            self._sagas.abandon(self.workflow_id, self.attempt, other_than=sealed)
            return _void(self._pipeline.name, self.workflow_id, self.attempt)
        row = self._sagas.claim(
            pipeline=self._pipeline.name,
            workflow_id=self.workflow_id,
            attempt=self.attempt,
            superseded_by=self._superseded_by,
            owner=self._owner,
            lease=LEASE,
            why=self._why,
        )
        if row.state == "running":
            row = self._marked(row, seals) if self._superseded_by else self._fenced(row)
        if row.state == "running":
            seals = self._store.seals(self.workflow_id)
            self._row = row
            self._order = self._sagas.plan(row, in_order(self._pipeline, self._steps(), seals))
        return row

    def _fenced(self, row: SagaRow) -> SagaRow:
        fence = self._store.fence_incomplete(
            self.workflow_id, pipeline=self._pipeline.name, attempt=self.attempt, run_id=f"compensation-{row.id}"
        )
        if fence is None:
            self._sagas.void(row)
            return row._replace(state="void")
        return self._sagas.fenced(row, fence=fence.version, ended_epoch=fence.epoch - 1)

    def _marked(self, row: SagaRow, seals: Sequence[Seal]) -> SagaRow:
        """Takes hold of what is superseded: nobody else will ask for it from now on and find it done."""
        from dagster_mao.journal._pages import DONE, GONE_DONE, GONE_UNKNOWN, Page

        superseded = Superseded(self._sagas.steps(self.workflow_id), seals)

        def choose(told: Mapping[int, Told]) -> Mapping[int, Page]:
            found, _ = superseded.found(told)
            pages = {}
            for step, effects in found.get((self.attempt, self._superseded_by), {}).items():
                gone = [e.entry._replace(state=GONE_DONE if e.entry.state == DONE else GONE_UNKNOWN) for e in reversed(effects)]
                pages[step] = Page(entries=gone, saga=row.id)
            return pages

        self._sagas.supersede(row, superseded.steps, choose)
        return row

    # -- undoing ---------------------------------------------------------------------------------------------------------------------

    def undo(self, agent: str) -> Undone:
        """Undoes an agent, after those that come before it. What goes wrong is noted, and told by the answer.

        An agent that was tried before by this owner is not tried again: a new owner does.
        """
        row = self._claimed()
        if row.state != "running":
            return Undone(agent, "done", 0, 0, None)
        if agent not in {undo.agent for undo in self._order}:
            return Undone(agent, "done", 0, 0, None)  # it did nothing
        for place, planned in enumerate(self._order):
            if planned.state in ("pending", "running") and not self._is_held(planned.agent):
                self._order[place] = self._undone(row, planned)
            if planned.agent == agent:
                break
        became = self._order[place]
        return Undone(became.agent, became.state, became.effects, became.tries, became.error)  # type: ignore[arg-type]

    def _is_held(self, agent: str) -> bool:
        """Whether it is not to be undone here, or not yet."""
        if self._is_elsewhere(agent):
            return True
        open_ = [undo.agent for undo in self._order if undo.state not in _FINISHED]
        if not any(self._is_elsewhere(one) for one in open_):
            return False
        return agent in self._waits(open_, self._steps(), self._store.seals(self.workflow_id))

    def _undone(self, row: SagaRow, undo: UndoRow) -> UndoRow:
        with about(self.workflow_id, undo.agent, self.attempt), self._keeping(row):
            self._sagas.begin_undo(row, undo.agent)
            undo = undo._replace(tries=undo.tries + 1)
            if self._kind(undo.agent) == "irreversible":
                self._sagas.end_undo(row, undo.agent, "kept")
                return undo._replace(state="kept", error=None)
            try:
                seals = self._store.seals(self.workflow_id)
                effects, upto, adopted, steps = self._found(undo.agent, self._steps(), seals)
                if effects:
                    self._wait(row, effects, steps)
                    self._compensate(row, undo.agent, effects, steps, seals)
            except FencedError:
                raise
            except Exception as error:
                # The text of an error may hold values: it goes to the log of the process only, as far as the agent's own errors do.
                name = type(error).__name__
                _LOG.warning("the undo failed: %s", name, exc_info=error)
                self._sagas.end_undo(row, undo.agent, "failed", error=name)
                return undo._replace(state="failed", error=name)
            self._sagas.end_undo(row, undo.agent, "done", effects=len(effects), undone_to=upto, adopted=adopted)
            return undo._replace(state="done", error=None, effects=undo.effects + len(effects))

    def _found(
        self, agent: str, steps: Sequence[StepRow], seals: Sequence[Seal]
    ) -> tuple[list[Outstanding], dict[int, int], list[tuple[int, Page]], dict[int, StepRow]]:
        """The effects of an agent that are to be undone, newest first; up to which page of each step; and what others take over."""
        own = {step.id: step for step in steps if step.agent == agent}
        told = self._sagas.told(own)
        newest = sorted(own, reverse=True)
        if self._superseded_by:
            saga = self._sagas.find(self.workflow_id, self.attempt, self._superseded_by)
            if saga is None or saga.fenced is None:  # nobody took hold of them yet
                marked = self._superseding()[0].get((self.attempt, self._superseded_by), {})
                return [effect for step in newest for effect in marked.get(step, ())], {}, [], own
            return [effect for step in newest for effect in told[step].superseded(saga.id)], {}, [], own
        effects = [effect for step in newest for effect in told[step].outstanding(own[step].undone_to)]
        left, adopted = self._needed(own, seals).adopt(effects)
        return left, {step: told[step].last for step in own}, adopted, own

    def _needed(self, own: Mapping[int, StepRow], seals: Sequence[Seal]) -> Needed:
        """What attempts that are not fenced have sealed by: they found it done, and count on it."""
        agents, epochs = {step.agent for step in own.values()}, {step.epoch for step in own.values()}
        fenced = {seal.attempt for seal in seals if seal.kind == "fence"}
        others = [
            step.id
            for step in self._sagas.steps(self.workflow_id)
            if step.agent in agents and step.epoch in epochs and step.attempt not in {self.attempt, *fenced} and has_sealed(step, seals)
        ]
        return Needed(self._sagas.told(others) if others else {})

    def _wait(self, row: SagaRow, effects: Sequence[Outstanding], steps: Mapping[int, StepRow]) -> None:
        """Until no effect that may still come can come any more, as far as its call has a timeout and its target does not refuse it."""
        until = max((deadline for effect in effects if (deadline := self._deadline(row, effect, steps)) is not None), default=0.0)
        while (left := until - self._sagas.now()) > 0:
            sleep(min(left, 0.5))

    def _deadline(self, row: SagaRow, effect: Outstanding, steps: Mapping[int, StepRow]) -> float | None:
        from dagster_mao.journal._step import FENCE_SECONDS, SLACK_SECONDS

        if _is_done(effect) or effect.entry.slot.compares:
            return None
        if effect.known:
            return effect.entry.deadline
        # It was announced: it may have begun as long as its step did not know of the fence.
        seconds = next(iter(steps.values())).seconds
        return None if seconds is None or row.fenced is None else row.fenced + FENCE_SECONDS + seconds + SLACK_SECONDS

    def _compensate(
        self, row: SagaRow, agent: str, effects: Sequence[Outstanding], steps: Mapping[int, StepRow], seals: Sequence[Seal]
    ) -> None:
        declared = self._pipeline.agents.get(agent)
        if declared is None:
            raise WiringError(f"The pipeline has no agent {agent!r} any more", agent=agent, fix="deploy it again to undo what it did")
        newest = max(steps.values(), key=lambda step: step.id)
        sealed = [seal for seal in seals if seal.agent == agent and seal.attempt == self.attempt and seal.path]
        inputs = self._inputs(declared, newest)
        records = self._records(declared, newest, inputs)
        undo = Undo(
            pipeline=self._pipeline.name,
            workflow_id=self.workflow_id,
            attempt=self.attempt,
            agent=agent,
            epoch=sum(seal.kind == "fence" for seal in seals),
            now=dt.datetime.fromtimestamp(row.fenced or row.asked, dt.timezone.utc),
            effects=[self._effect(row, effect, steps, records) for effect in effects],
            read_output=partial(self._store.read, sealed[-1]) if sealed else lambda: None,
            read_inputs=inputs,
            log=self._log,
        )
        policy = replace(declared.undo_policy or Policy(), keep_answers=0)
        gateway = Gateway(policy, f"{self._pipeline.name}.{agent}.undo", self._store.database)
        try:
            if is_async_undo(declared):
                _finished(partial(gateway.acall, call_compensate, declared, undo, self._resources))
            else:
                gateway.call(call_compensate, declared, undo, self._resources)
        finally:
            gateway.flush()

    def _effect(self, row: SagaRow, effect: Outstanding, steps: Mapping[int, StepRow], records: Mapping[str, str]) -> Effect:
        deadline = self._deadline(row, effect, steps)
        return Effect(
            key=effect.key.hex(),
            epoch=next(iter(steps.values())).epoch,
            name=effect.entry.slot.name,
            record=records.get(effect.record or "", effect.record),
            state="done" if _is_done(effect) else "unknown",
            result=None if effect.entry.result is None else json.loads(effect.entry.result),
            deadline=None if deadline is None else dt.datetime.fromtimestamp(deadline, dt.timezone.utc),
        )

    def _inputs(self, agent: Agent, step: StepRow) -> dict[str, Callable[[], pl.LazyFrame]]:
        """Each upstream's rows as pinned, under the contract that the agent has now."""

        def read(parent: Mapping[str, Any], contract: Any) -> pl.LazyFrame:
            seal = self._store.seal_at(parent["workflow_id"], parent["version"])
            rows = self._store.read(seal)
            upgraded: pl.LazyFrame = contract.upgrade(rows, json.loads(seal.contract_schema)) if contract else rows
            return upgraded

        contracts = {read_.upstream: read_.contract for read_ in agent.inputs}
        return {str(parent["agent"]): partial(read, parent, contracts.get(parent["agent"])) for parent in step.parents}

    def _records(self, agent: Agent, step: StepRow, inputs: Mapping[str, Callable[[], pl.LazyFrame]]) -> dict[str, str]:
        """The records that stand as hashes in the journal, because their keys are personal, by hash."""
        found: dict[str, str] = {}
        if step.personal:
            for read in agent.inputs:
                if read.contract.key and read.upstream in inputs:
                    keys = inputs[read.upstream]().select(pl.col(read.contract.key).cast(pl.String)).collect().to_series()
                    found |= {hidden(self.workflow_id, key): key for key in keys}
        return found

    # -- concluding ------------------------------------------------------------------------------------------------------------------

    def conclude(self) -> Concluded:
        """Ends it: as compensated, with a version in the state log that says so, or incomplete, with what is left."""
        row = self._claimed()
        if row.state == "void":
            return Concluded("void")
        undos = self._sagas.undos(row.id)
        kept = tuple(undo.agent for undo in undos if undo.state == "kept")
        left = tuple(Left(undo.agent, undo.state, undo.error) for undo in undos if undo.state not in ("done", "kept"))  # type: ignore[arg-type]
        if row.state != "running":
            return Concluded("compensated", (), kept, self._version(row))
        if any(undo.state == "pending" and self._is_elsewhere(undo.agent) for undo in undos):
            self._sagas.hand_over(row)
            self._row = None
            return Concluded("handed_over", left, kept)
        version = None
        if not left and not self._superseded_by:
            fence = self._store.seal_at(self.workflow_id, int(row.fence or 0))
            version = self._store.compensated(self.workflow_id, fence=fence).reference
        state = self._sagas.conclude(row, "incomplete" if left else "compensated")
        self._row = None
        if state == "compensated":
            return Concluded("compensated", (), kept, version)
        late = {step.agent for step in self._steps() if step.late}
        left += tuple(Left(agent, "pending", None) for agent in sorted(late - {one.agent for one in left}))
        return Concluded("compensation_incomplete", left, kept, version)

    def _version(self, row: SagaRow) -> str | None:
        told = [seal for seal in self._store.seals(self.workflow_id) if seal.kind == "compensated" and seal.attempt == self.attempt]
        return told[-1].reference if told and not self._superseded_by else None

    # --------------------------------------------------------------------------------------------------------------------------------

    def _steps(self) -> list[StepRow]:
        """The steps that have something to undo: of a superseded attempt, those marked."""
        steps = self._sagas.steps(self.workflow_id, self.attempt)
        if not self._superseded_by:
            return steps
        saga = self._sagas.find(self.workflow_id, self.attempt, self._superseded_by)
        if saga is None or saga.fenced is None:
            found, _ = self._superseding()
            marked = found.get((self.attempt, self._superseded_by), {})
            return [step for step in steps if step.id in marked]
        told = self._sagas.told([step.id for step in steps])
        return [step for step in steps if any(True for _ in told[step.id].superseded(saga.id))]

    def _superseding(self) -> tuple[dict[tuple[str, str], dict[int, list[Outstanding]]], bool]:
        superseded = Superseded(self._sagas.steps(self.workflow_id), self._store.seals(self.workflow_id))
        return superseded.found(self._sagas.told(superseded.steps))

    def _kind(self, agent: str) -> str:
        declared = self._pipeline.agents.get(agent)
        return "reversible" if declared is None else declared.effects

    @contextmanager
    def _keeping(self, row: SagaRow) -> Iterator[None]:
        """Renews the lease while something is done. What is done when it was lost all the same is done twice, and written once."""
        over = threading.Event()

        def renew() -> None:
            while not over.wait(LEASE / 5):
                try:
                    self._sagas.renew(row, LEASE)
                except FencedError:
                    return
                except StoreError as error:
                    _LOG.warning("the lease of a compensation could not be renewed: %s", error)

        thread = threading.Thread(target=copy_context().run, args=(renew,), name="dagster-mao-lease", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def sagas_of(store: StateStore) -> Sagas:
    """The journal of a store, as compensators have it. Raises `WiringError` where there is no database."""
    from dagster_mao.journal import Sagas

    return Sagas(journal_of(store.database))


def _is_done(effect: Outstanding) -> bool:
    from dagster_mao.journal._pages import DONE, GONE_DONE

    return effect.entry.state in (DONE, GONE_DONE)


def _void(pipeline: str, workflow_id: str, attempt: str) -> SagaRow:
    from dagster_mao.journal._sagas import SagaRow

    nothing = dict.fromkeys(SagaRow._fields)
    known = {"pipeline": pipeline, "workflow_id": workflow_id, "attempt": attempt, "superseded_by": "", "state": "void", "id": 0}
    return SagaRow(**{**nothing, **known})  # type: ignore[arg-type]


def _finished(call: Callable[[], Any]) -> Any:
    """Awaits to the end, also where a loop is running already (a notebook)."""

    async def main() -> Any:
        return await call()

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main())
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(copy_context().run, asyncio.run, main()).result()
