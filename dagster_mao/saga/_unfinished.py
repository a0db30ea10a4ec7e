"""What is still to be compensated, from the journal and the state log and nothing else."""

from __future__ import annotations

import datetime as dt
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

from dagster_mao.correlation import WorkflowLog, about
from dagster_mao.errors import MaoError, StoreError
from dagster_mao.gateway import shared_store
from dagster_mao.saga._order import OPEN, Superseded, has_sealed
from dagster_mao.saga._saga import Left, UndoneState, sagas_of
from dagster_mao.state import StateStore, is_completed, is_replaced

if TYPE_CHECKING:
    from dagster_mao.journal._sagas import SagaRow, Sagas, StepRow

Kind = Literal["attempt", "late", "superseded"]
_LOG = WorkflowLog(logging.getLogger(__name__))


@dataclass(frozen=True)
class Unfinished:
    """Something that is not compensated, or not yet: an attempt that did not complete, or what a later one superseded of it.

    `kind` "late": it was compensated, and an effect came afterwards. `state`: None where nobody asked for it, else "requested", "running"
    or "incomplete" (which another try alone need not mend). An attempt that goes on is here too: `ended`: all its steps told how
    they ended; where not, ask whoever runs them about `runs`. `completed`: the attempt has, and nobody told how a step of it ended. `last`
    is when it last wrote to the journal, `lease_until` until when a compensator holds it (UTC, by the database's clock).
    """

    workflow_id: str
    attempt: str
    kind: Kind
    state: str | None
    superseded_by: str
    runs: tuple[str, ...]
    agents: tuple[str, ...]
    ended: bool
    completed: bool
    replaced: bool
    last: dt.datetime
    lease_until: dt.datetime | None
    tries: int
    why: str | None


@dataclass(frozen=True)
class UndoState:
    """How the undo of one agent stands."""

    agent: str
    state: UndoneState
    effects: int
    tries: int
    error: str | None


@dataclass(frozen=True)
class SagaState:
    """How a saga stands: requested, running, compensated, incomplete, or void (the attempt had completed)."""

    workflow_id: str
    attempt: str
    kind: Kind
    superseded_by: str
    state: str
    why: str | None
    requested_by: str | None
    owner: str | None
    tries: int
    undos: tuple[UndoState, ...]
    left: tuple[Left, ...]
    asked: dt.datetime
    concluded: dt.datetime | None


def unfinished(
    store: StateStore, pipeline: str, *, going_on: Callable[[Collection[str]], Collection[str]] | None = None
) -> list[Unfinished]:
    """All that is not compensated of a pipeline. What is settled is marked, and not looked at again.

    `going_on`: is given all attempts that nobody asked to compensate, and that neither completed nor were replaced, and says which of them
    go on. These are left out; there may be ten thousand, of which nothing else is read then.
    """
    if not _is_there(store):
        return []
    journal, found = sagas_of(store), list[Unfinished]()
    held = set[tuple[str, str]]()
    for row in journal.unfinished(pipeline):
        if row.state == "requested" and is_completed(store.seals(row.workflow_id), row.attempt):
            with about(row.workflow_id, attempt=row.attempt):
                _noted(partial(journal.withdraw, row))
            continue
        held.add((row.workflow_id, row.attempt))
        found.append(_of_saga(row, journal.steps(row.workflow_id, row.attempt), journal))
    at_work = {key: is_late for key, is_late in journal.open_attempts(pipeline).items() if key not in held}
    # In hybrid mode all that is at work is here: so it is asked about once, and not one by one.
    ended = store.completed(pipeline, {workflow_id for workflow_id, _ in at_work})
    open_ = {key for key, is_late in at_work.items() if key not in ended and not is_late}
    replaced = _replaced(store, open_, {workflow_id for workflow_id, _ in ended})
    asked = open_ - replaced
    still = set(going_on({attempt for _, attempt in asked}) if going_on else ())
    looked_at = at_work.keys() - {key for key in asked if key[1] in still}
    groups: dict[tuple[str, str], list[StepRow]] = {}
    completed: dict[str, list[StepRow]] = {}
    for step in journal.open_steps(pipeline, {attempt for _, attempt in looked_at}):
        if (key := (step.workflow_id, step.attempt)) in looked_at:
            groups.setdefault(key, []).append(step)
    written = journal.last_written([step.id for steps in groups.values() for step in steps])
    for (workflow_id, attempt), steps in groups.items():
        if any(step.late for step in steps):
            saga = journal.find(workflow_id, attempt)
            found.append(_unfinished(steps, written, "late", None if saga is None else saga.tries, saga))
        elif (workflow_id, attempt) in ended:
            completed.setdefault(workflow_id, []).extend(steps)
        else:
            is_over = (workflow_id, attempt) in replaced
            found.append(_unfinished(steps, written, "attempt", 0, None, replaced=is_over))
    for workflow_id, steps in completed.items():
        found += _superseded(store, journal, workflow_id, steps)
    return found


def _replaced(store: StateStore, open_: Collection[tuple[str, str]], completed: Collection[str]) -> set[tuple[str, str]]:
    """Which of these attempts are replaced; they may be where some other has completed."""
    seals = store.seals_of({workflow_id for workflow_id, _ in open_} & set(completed))
    return {(workflow, attempt) for workflow, attempt in open_ if workflow in seals and is_replaced(seals[workflow], attempt)}


def _superseded(store: StateStore, journal: Sagas, workflow_id: str, steps: list[StepRow]) -> list[Unfinished]:
    """What completed attempts superseded of each other. They are settled where that is nothing."""
    every = journal.steps(workflow_id)
    superseded = Superseded(every, store.seals(workflow_id))
    told, waits = superseded.found(journal.told(superseded.steps)) if superseded.steps else ({}, False)
    found = []
    for (earlier, later), of_steps in told.items():
        own = [step for step in every if step.id in of_steps]
        written = journal.last_written(of_steps)
        found.append(_unfinished(own, written, "superseded", 0, None, superseded_by=later, attempt=earlier))
    # Where one was re-executed after it had completed, that goes on, or died.
    seals = store.seals(workflow_id)
    for attempt in dict.fromkeys(step.attempt for step in steps if step.state in OPEN and not has_sealed(step, seals)):
        waits = True
        own = [step for step in steps if step.attempt == attempt]
        found.append(replace(_unfinished(own, journal.last_written([step.id for step in own]), "attempt", 0, None), completed=True))
    if not found and not waits:
        with about(workflow_id):
            _noted(partial(journal.settle, workflow_id, [step.id for step in steps]))
    return found


def _noted(write: Callable[[], None]) -> None:
    """Notes what need not be looked at again. Where the database takes no writes now, it is looked at again."""
    try:
        write()
    except StoreError as error:
        _LOG.debug("what is settled could not be marked: %s", error)


def request(store: StateStore, pipeline: str, workflow_id: str | None, attempt: str, *, run_id: str | None, why: str) -> int:
    """Asks for the compensation of an attempt; of how many workflows.

    For hooks, which run while other steps do: nothing is undone or fenced now, and should the attempt complete after all, nothing will be.
    Without a workflow, in all where the attempt has steps. Nothing for what has completed, or has no effects. `why`: the class of an
    error. Never raises what the store raises: that is logged.
    """
    try:
        if not _is_there(store):
            return 0
        journal, asked = sagas_of(store), 0
        steps = journal.open_steps(pipeline, [attempt])
        for one in sorted({step.workflow_id for step in steps if workflow_id in (None, step.workflow_id)}):
            if not is_completed(store.seals(one), attempt):
                asked += journal.request(pipeline=pipeline, workflow_id=one, attempt=attempt, why=why, requested_by=run_id)
        return asked
    except MaoError as error:
        _LOG.warning("the compensation of attempt %s could not be requested, and will be found missing: %s", attempt, error)
        return 0


def show_up(store: StateStore, pipeline: str, agents: Collection[str], *, every: float) -> None:
    """Notes that a code location is there that can undo what these agents did, unless that was noted less than `every` seconds ago.

    An undo waits for it then. Where the database takes no writes now, a later call notes it.
    """
    journal = sagas_of(store)
    seen, now = journal.seen(pipeline), journal.now()
    if any(now - seen.get(agent, 0.0) > every for agent in agents):
        _noted(partial(journal.show_up, pipeline, agents))


def sagas(store: StateStore, pipeline: str, workflow_id: str | None = None) -> list[SagaState]:
    """How the sagas of a pipeline stand, or of one workflow, oldest first."""
    if not _is_there(store):
        return []
    journal = sagas_of(store)
    rows = journal.of_pipeline(pipeline) if workflow_id is None else journal.of_workflow(workflow_id)
    return [_state(row, journal) for row in rows]


def _is_there(store: StateStore) -> bool:
    if store.database is None:
        return False
    from dagster_mao.journal._tables import SAGAS

    return shared_store(store.database).holds(SAGAS)


def _state(row: SagaRow, journal: Sagas) -> SagaState:
    undos = tuple(UndoState(u.agent, u.state, u.effects, u.tries, u.error) for u in journal.undos(row.id))  # type: ignore[arg-type]
    return SagaState(
        workflow_id=row.workflow_id,
        attempt=row.attempt,
        kind="superseded" if row.superseded_by else "attempt",
        superseded_by=row.superseded_by,
        state=row.state,
        why=row.why,
        requested_by=row.requested_by,
        owner=row.owner,
        tries=row.tries,
        undos=undos,
        left=tuple(Left(undo.agent, undo.state, undo.error) for undo in undos if undo.state not in ("done", "kept")),
        asked=_utc(row.asked),
        concluded=None if row.concluded is None else _utc(row.concluded),
    )


def _of_saga(row: SagaRow, steps: list[StepRow], journal: Sagas) -> Unfinished:
    kind: Kind = "superseded" if row.superseded_by else "attempt"
    written = journal.last_written([step.id for step in steps])
    return _unfinished(steps, written, kind, row.tries, row, superseded_by=row.superseded_by, attempt=row.attempt)


def _unfinished(
    steps: list[StepRow],
    written: Mapping[int, float],
    kind: Kind,
    tries: int | None,
    saga: SagaRow | None,
    *,
    superseded_by: str = "",
    attempt: str | None = None,
    replaced: bool = False,
) -> Unfinished:
    told = (written[step.id] for step in steps if step.id in written)
    times = [*(step.ended or step.started for step in steps), *told, *([saga.asked] if saga else [])]
    return Unfinished(
        workflow_id=saga.workflow_id if saga else steps[0].workflow_id,
        attempt=attempt or steps[0].attempt,
        kind=kind,
        state=None if saga is None or kind == "late" else saga.state,
        superseded_by=superseded_by,
        runs=tuple(dict.fromkeys(step.run_id for step in steps)),
        agents=tuple(dict.fromkeys(step.agent for step in steps)),
        ended=all(step.state in ("sealed", "failed") for step in steps),
        completed=False,
        replaced=replaced,
        last=_utc(max(times)),
        lease_until=None if saga is None or saga.lease_until is None else _utc(saga.lease_until),
        tries=tries or 0,
        why=None if saga is None else saga.why,
    )


def _utc(seconds: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(seconds, dt.timezone.utc)
