"""Who undoes what: sagas and their undos in the journal, each write of a compensator under its generation."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from dagster_mao.errors import FencedError
from dagster_mao.journal._journal import Journal, pages
from dagster_mao.journal._pages import Page, Told
from dagster_mao.journal._tables import COMPENSATORS, PAGES, SAGAS, STEPS, UNDOS

_NAMES = 5000  # in one statement
_OPEN = sa.or_(STEPS.c.settled.is_(False), STEPS.c.late.is_(True))


class StepRow(NamedTuple):
    """A step as the journal has it. Times in seconds since the epoch, by the database's clock."""

    id: int
    pipeline: str
    workflow_id: str
    epoch: int
    attempt: str
    run_id: str
    agent: str
    parents: tuple[Mapping[str, Any], ...]
    personal: bool
    seconds: float | None
    state: str
    error: str | None
    version: int | None
    started: float
    ended: float | None
    fenced: bool
    undone_to: int
    late: bool
    settled: bool


class SagaRow(NamedTuple):
    """A saga as the journal has it."""

    id: int
    pipeline: str
    workflow_id: str
    attempt: str
    superseded_by: str
    state: str
    why: str | None
    requested_by: str | None
    owner: str | None
    generation: int
    lease_until: float | None
    tries: int
    asked: float
    fenced: float | None
    ended_epoch: int | None
    fence: int | None
    concluded: float | None


class UndoRow(NamedTuple):
    """The undo of one agent in a saga."""

    saga: int
    agent: str
    place: int
    state: str
    effects: int
    error: str | None
    tries: int


class Sagas:
    """The journal as compensators have it. All of it may be called again after a crash."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    # -- looking ---------------------------------------------------------------------------------------------------------------------

    def now(self) -> float:
        return self._journal.now()

    def steps(self, workflow_id: str, attempt: str | None = None) -> list[StepRow]:
        """The steps of a workflow, or of one attempt at it, oldest first."""
        query = sa.select(STEPS).where(STEPS.c.workflow_id == workflow_id).order_by(STEPS.c.id)
        with self._journal.reading() as connection:
            return _steps(connection, query if attempt is None else query.where(STEPS.c.attempt == attempt))

    def open_attempts(self, pipeline: str) -> dict[tuple[str, str], bool]:
        """By workflow and attempt, those with steps as `open_steps` has them, oldest first: whether one had effects after it was undone."""
        late = sa.func.max(sa.cast(STEPS.c.late, sa.Integer))
        query = sa.select(STEPS.c.workflow_id, STEPS.c.attempt, late).where(STEPS.c.pipeline == pipeline, _OPEN)
        query = query.group_by(STEPS.c.workflow_id, STEPS.c.attempt).order_by(sa.func.min(STEPS.c.id))
        with self._journal.reading() as connection:
            return {(workflow_id, attempt): bool(is_late) for workflow_id, attempt, is_late in connection.execute(query)}

    def open_steps(self, pipeline: str, attempts: Collection[str]) -> list[StepRow]:
        """The steps of these attempts that are not settled, and those that had effects after they were undone, oldest first."""
        found, wanted = list[StepRow](), sorted(attempts)
        query = sa.select(STEPS).where(STEPS.c.pipeline == pipeline, _OPEN)
        with self._journal.reading() as connection:
            for start in range(0, len(wanted), _NAMES):
                found += _steps(connection, query.where(STEPS.c.attempt.in_(wanted[start : start + _NAMES])))
        return sorted(found, key=lambda step: step.id)

    def last_written(self, steps: Collection[int]) -> dict[int, float]:
        """When each of these steps last wrote a page."""
        found, wanted = dict[int, float](), sorted(steps)
        query = sa.select(PAGES.c.step, sa.func.max(PAGES.c.at)).group_by(PAGES.c.step)
        with self._journal.reading() as connection:
            for start in range(0, len(wanted), _NAMES):
                some = query.where(PAGES.c.step.in_(wanted[start : start + _NAMES]))
                found |= {row[0]: row[1] for row in connection.execute(some)}
        return found

    def told(self, steps: Collection[int]) -> dict[int, Told]:
        """What the pages of these steps tell."""
        with self._journal.reading() as connection:
            return _told(connection, steps)

    def find(self, workflow_id: str, attempt: str, superseded_by: str = "") -> SagaRow | None:
        with self._journal.reading() as connection:
            return _found(connection, workflow_id, attempt, superseded_by)

    def unfinished(self, pipeline: str) -> list[SagaRow]:
        """The sagas of a pipeline that were not concluded, or not completely."""
        states = SAGAS.c.state.in_(("requested", "running", "incomplete"))
        with self._journal.reading() as connection:
            rows = connection.execute(sa.select(SAGAS).where(SAGAS.c.pipeline == pipeline, states).order_by(SAGAS.c.id))
            return [SagaRow(*row) for row in rows]

    def of_workflow(self, workflow_id: str) -> list[SagaRow]:
        """All sagas of a workflow, oldest first."""
        with self._journal.reading() as connection:
            rows = connection.execute(sa.select(SAGAS).where(SAGAS.c.workflow_id == workflow_id).order_by(SAGAS.c.id))
            return [SagaRow(*row) for row in rows]

    def of_pipeline(self, pipeline: str) -> list[SagaRow]:
        """All sagas of a pipeline, oldest first."""
        with self._journal.reading() as connection:
            rows = connection.execute(sa.select(SAGAS).where(SAGAS.c.pipeline == pipeline).order_by(SAGAS.c.id))
            return [SagaRow(*row) for row in rows]

    def undos(self, saga: int) -> list[UndoRow]:
        """The undos of a saga, in their order."""
        with self._journal.reading() as connection:
            rows = connection.execute(sa.select(UNDOS).where(UNDOS.c.saga == saga).order_by(UNDOS.c.place, UNDOS.c.agent))
            return [UndoRow(*row) for row in rows]

    def seen(self, pipeline: str) -> dict[str, float]:
        """By agent, when a code location that has it looked last, as far as it was noted."""
        with self._journal.reading() as connection:
            rows = connection.execute(sa.select(COMPENSATORS.c.agent, COMPENSATORS.c.seen).where(COMPENSATORS.c.pipeline == pipeline))
            return {row.agent: row.seen for row in rows}

    def show_up(self, pipeline: str, agents: Iterable[str]) -> None:
        """Notes that a code location is there that can undo what these agents did."""
        with self._journal.writing(pipeline, durable=False) as (connection, now):
            make = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
            for agent in sorted(agents):
                row = make(COMPENSATORS).values(pipeline=pipeline, agent=agent, seen=now)
                connection.execute(row.on_conflict_do_update(index_elements=["pipeline", "agent"], set_={"seen": now}))

    # -- beginning -------------------------------------------------------------------------------------------------------------------

    def request(self, *, pipeline: str, workflow_id: str, attempt: str, why: str, requested_by: str | None) -> bool:
        """Asks for the compensation of an attempt, which may go on meanwhile, and may even complete. False when that was asked before."""
        with self._journal.writing(workflow_id) as (connection, now):
            if _found(connection, workflow_id, attempt, "") is not None:
                return False
            _insert(connection, now, pipeline, workflow_id, attempt, "", state="requested", why=why, requested_by=requested_by)
            return True

    def claim(
        self,
        *,
        pipeline: str,
        workflow_id: str,
        attempt: str,
        superseded_by: str = "",
        owner: str,
        lease: float,
        why: str | None = None,
    ) -> SagaRow:
        """Makes `owner` the compensator, for `lease` seconds: from now on only this claim may write about the saga.

        A saga that is concluded, with nothing late, comes back as it is. Raises `FencedError` while the lease of another owner lasts.
        """
        with self._journal.writing(workflow_id) as (connection, now):
            row = _found(connection, workflow_id, attempt, superseded_by)
            if row is None:
                _insert(connection, now, pipeline, workflow_id, attempt, superseded_by, state="requested", why=why, requested_by=owner)
                row = _found(connection, workflow_id, attempt, superseded_by)
                assert row is not None
            own = (STEPS.c.workflow_id == workflow_id) & (STEPS.c.attempt == attempt)
            late = sa.select(STEPS.c.agent).where(own, STEPS.c.late.is_(True))
            is_late = not superseded_by and connection.scalar(late.limit(1)) is not None
            if row.state == "void" or (row.state == "compensated" and not is_late):
                return row
            if row.state == "running" and row.owner != owner and (row.lease_until or 0.0) > now:
                left = (row.lease_until or 0.0) - now
                held = FencedError(
                    f"{row.owner} compensates this attempt, for another {left:.0f} s at least",
                    workflow=workflow_id,
                    fix="let it; should it be dead, try again when this time is over",
                )
                held.retry_after = left
                raise held
            changes: dict[str, Any] = {"state": "running", "owner": owner, "generation": row.generation + 1, "lease_until": now + lease}
            changes["tries"] = row.tries + (row.owner != owner)
            if row.fenced is None and not superseded_by:
                changes["fenced"] = now
                connection.execute(sa.update(STEPS).where(own).values(fenced=True, settled=True))
            connection.execute(sa.update(SAGAS).where(SAGAS.c.id == row.id).values(**changes))
            # Handed over, it goes on as it is. What failed before is tried again by who takes over from the dead, or is asked to.
            handed_over = row.state == "running" and row.owner is None
            again = ("running",) if handed_over or row.owner == owner else ("running", "failed")
            undos = sa.update(UNDOS).where(UNDOS.c.saga == row.id)
            connection.execute(undos.where(UNDOS.c.state.in_(again)).values(state="pending"))
            if is_late:
                connection.execute(undos.where(UNDOS.c.state == "done", UNDOS.c.agent.in_(late)).values(state="pending"))
            return row._replace(**changes)

    def fenced(self, saga: SagaRow, *, fence: int, ended_epoch: int) -> SagaRow:
        """Notes the fence in the state log. What pinned before it can seal no more, so it may begin no effect, whatever its attempt."""
        with self._held(saga) as (connection, _):
            of_epoch = (STEPS.c.workflow_id == saga.workflow_id) & (STEPS.c.epoch <= ended_epoch) & (STEPS.c.state == "running")
            connection.execute(sa.update(STEPS).where(of_epoch).values(fenced=True))
            changes: dict[str, Any] = {"fence": fence, "ended_epoch": ended_epoch}
            connection.execute(sa.update(SAGAS).where(SAGAS.c.id == saga.id).values(**changes))
            return saga._replace(**changes)

    def void(self, saga: SagaRow) -> None:
        """The attempt had completed before it could be fenced: nothing of it is undone."""
        with self._held(saga) as (connection, now):
            connection.execute(sa.update(SAGAS).where(SAGAS.c.id == saga.id).values(state="void", concluded=now, lease_until=None))
            own = (STEPS.c.workflow_id == saga.workflow_id) & (STEPS.c.attempt == saga.attempt)
            connection.execute(sa.update(STEPS).where(own).values(fenced=False, settled=False))

    def withdraw(self, saga: SagaRow) -> None:
        """What was asked for is not to be done: the attempt went on, and completed."""
        own = (SAGAS.c.id == saga.id) & (SAGAS.c.state == "requested")
        with self._journal.writing(saga.workflow_id) as (connection, now):
            connection.execute(sa.update(SAGAS).where(own).values(state="void", concluded=now))

    def abandon(self, workflow_id: str, attempt: str, *, other_than: Collection[int] = ()) -> None:
        """What still runs of a completed attempt, a re-execution, is over: its effects are left to be superseded.

        `other_than`: the steps that have sealed, whatever they told.
        """
        own = (STEPS.c.workflow_id == workflow_id) & (STEPS.c.attempt == attempt) & STEPS.c.state.in_(("running", "sealing"))
        own &= STEPS.c.id.not_in(other_than)
        with self._journal.writing(workflow_id) as (connection, now):
            connection.execute(sa.update(STEPS).where(own).values(state="failed", ended=now, fenced=True))

    def supersede(self, saga: SagaRow, steps: Collection[int], choose: Callable[[Mapping[int, Told]], Mapping[int, Page]]) -> None:
        """Marks effects as this saga's to undo. `choose` gets what the steps tell, and returns, by step, the page that marks them.

        No step announces anything meanwhile: one that needs such an effect has said so before, or finds that it is gone.
        """
        with self._held(saga) as (connection, now):
            if saga.fenced is not None:  # it was done before
                return
            for step, page in choose(_told(connection, steps)).items():
                keys, body = page.encode()
                connection.execute(sa.insert(PAGES).values(step=step, keys=keys, body=body, at=now))
            connection.execute(sa.update(SAGAS).where(SAGAS.c.id == saga.id).values(fenced=now))

    def renew(self, saga: SagaRow, lease: float) -> None:
        """Keeps the claim for another `lease` seconds. Raises `FencedError` when it was lost."""
        with self._held(saga, durable=False) as (connection, now):
            connection.execute(sa.update(SAGAS).where(SAGAS.c.id == saga.id).values(lease_until=now + lease))

    # -- undoing ---------------------------------------------------------------------------------------------------------------------

    def plan(self, saga: SagaRow, agents: Sequence[str]) -> list[UndoRow]:
        """Notes what is to be undone in which order, where it is not noted yet."""
        with self._held(saga) as (connection, _):
            there = {row.agent: row for row in connection.execute(sa.select(UNDOS).where(UNDOS.c.saga == saga.id))}
            for place, agent in enumerate(agents):
                if agent not in there:
                    new = {"saga": saga.id, "agent": agent, "place": place, "state": "pending", "effects": 0, "tries": 0}
                    connection.execute(sa.insert(UNDOS).values(**new))
                elif there[agent].place != place:
                    connection.execute(sa.update(UNDOS).where(UNDOS.c.saga == saga.id, UNDOS.c.agent == agent).values(place=place))
        return self.undos(saga.id)

    def begin_undo(self, saga: SagaRow, agent: str) -> None:
        with self._held(saga, durable=False) as (connection, _):
            own = (UNDOS.c.saga == saga.id) & (UNDOS.c.agent == agent)
            connection.execute(sa.update(UNDOS).where(own).values(state="running", tries=UNDOS.c.tries + 1))

    def end_undo(
        self,
        saga: SagaRow,
        agent: str,
        state: str,
        *,
        effects: int = 0,
        error: str | None = None,
        undone_to: Mapping[int, int] | None = None,
        adopted: Iterable[tuple[int, Page]] = (),
    ) -> None:
        """Notes how the undo of an agent ended, in one commit with what it did: the page of each step up to which all is undone now,

        and, by step, what other attempts need of it and have taken over.
        """
        with self._held(saga) as (connection, now):
            for step, page in (undone_to or {}).items():
                later = sa.select(sa.func.count()).where(PAGES.c.step == step, PAGES.c.id > page)
                is_late = bool(connection.scalar(later))
                connection.execute(sa.update(STEPS).where(STEPS.c.id == step).values(undone_to=page, late=is_late))
            for step, told in adopted:
                keys, body = told.encode()
                connection.execute(sa.insert(PAGES).values(step=step, keys=keys, body=body, at=now))
            own = (UNDOS.c.saga == saga.id) & (UNDOS.c.agent == agent)
            changes = {"state": state, "error": error, "effects": UNDOS.c.effects + effects}
            connection.execute(sa.update(UNDOS).where(own).values(**changes))

    def conclude(self, saga: SagaRow, state: str) -> str:
        """Ends the claim: "compensated", or "incomplete", which it also is when something was late meanwhile."""
        with self._held(saga) as (connection, now):
            own = (STEPS.c.workflow_id == saga.workflow_id) & (STEPS.c.attempt == saga.attempt)
            if not saga.superseded_by and connection.scalar(sa.select(STEPS.c.id).where(own, STEPS.c.late.is_(True)).limit(1)):
                state = "incomplete"
            changes = {"state": state, "concluded": now, "lease_until": None, "owner": None}
            connection.execute(sa.update(SAGAS).where(SAGAS.c.id == saga.id).values(**changes))
            return state

    def hand_over(self, saga: SagaRow) -> None:
        """Ends the claim without ending the saga: what is left is for others to undo. What this one might still write is refused."""
        with self._held(saga) as (connection, _):
            changes: dict[str, Any] = {"owner": None, "lease_until": None, "generation": saga.generation + 1}
            connection.execute(sa.update(SAGAS).where(SAGAS.c.id == saga.id).values(**changes))

    def settle(self, workflow_id: str, steps: Collection[int]) -> None:
        """Notes that nothing is left to be undone of these steps, so that nobody looks at them again."""
        with self._journal.writing(workflow_id, durable=False) as (connection, _):
            connection.execute(sa.update(STEPS).where(STEPS.c.id.in_(steps)).values(settled=True))

    @contextmanager
    def _held(self, saga: SagaRow, *, durable: bool = True) -> Iterator[tuple[sa.Connection, float]]:
        """A transaction of the compensator that holds the saga. Raises `FencedError` when another has claimed it since."""
        with self._journal.writing(saga.workflow_id, durable=durable) as (connection, now):
            if connection.scalar(sa.select(SAGAS.c.generation).where(SAGAS.c.id == saga.id)) != saga.generation:
                raise FencedError(
                    "Another compensator has taken over this attempt",
                    workflow=saga.workflow_id,
                    fix="let it; what this one was about to write was not written",
                )
            yield connection, now


def _insert(
    connection: sa.Connection, now: float, pipeline: str, workflow_id: str, attempt: str, superseded_by: str, **values: Any
) -> None:
    row: dict[str, Any] = {"pipeline": pipeline, "workflow_id": workflow_id, "attempt": attempt, "superseded_by": superseded_by}
    row |= {"generation": 0, "tries": 0, "asked": now, **values}
    connection.execute(sa.insert(SAGAS).values(**row))


def _found(connection: sa.Connection, workflow_id: str, attempt: str, superseded_by: str) -> SagaRow | None:
    own = (SAGAS.c.workflow_id == workflow_id) & (SAGAS.c.attempt == attempt) & (SAGAS.c.superseded_by == superseded_by)
    row = connection.execute(sa.select(SAGAS).where(own)).one_or_none()
    return None if row is None else SagaRow(*row)


def _steps(connection: sa.Connection, query: Any) -> list[StepRow]:
    rows = (StepRow(*row) for row in connection.execute(query))
    return [row._replace(parents=tuple(json.loads(str(row.parents)))) for row in rows]


def _told(connection: sa.Connection, steps: Collection[int]) -> dict[int, Told]:
    told = {step: Told() for step in steps}
    for number, step, page in pages(connection, steps):
        told[step].add(number, page)
    return told
