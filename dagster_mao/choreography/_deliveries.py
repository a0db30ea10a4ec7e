"""Deliveries: what of the log each subscriber has been handed, and what became of it.

The log is the truth and the table a note of it: one row per subscriber, workflow and parents, whoever looks and however often. It is
written together with the cursor, so that both are lost together, and read from the log again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import sqlalchemy as sa

from dagster_mao.agent import MicroBatch
from dagster_mao.choreography import _batches
from dagster_mao.choreography._batches import Batch, Hold
from dagster_mao.choreography._due import Standing, Subscriber, history, standings
from dagster_mao.choreography._tables import BATCHES, DELIVERIES, JOINS, SUBSCRIBERS, insert_if_absent, parts, shared
from dagster_mao.gateway._shared import SharedStore
from dagster_mao.pipeline import Pipeline
from dagster_mao.state import StateStore

MOST_DEATHS = 3  # of runs, with the same workflow at work: then it counts as failed
DIED = "RunDied"


def tick(store: StateStore, pipeline: Pipeline, agent: str, *, every: float | None = None, rebuild: bool = False) -> list[Batch]:
    """What a subscriber's sensor does each time: looks into the log, notes what is due, cuts batches of it; returns what is to be launched.

    A batch is returned by every tick until a run has taken it: launch one run per `run_key`, which calls `run_batch`. However many look at
    once, and wherever one is killed, each due version is in one batch. `every` is in how many seconds the next tick is meant to come. With
    `rebuild` the whole log is read again, as it is when the database was lost.

    Raises `WiringError`, `StoreError`.
    """
    subscriber = Subscriber.of(pipeline, agent)
    return handed_out(store, subscriber, pipeline.node(agent).micro_batch or pipeline.micro_batch, every=every, rebuild=rebuild)


def handed_out(
    store: StateStore, subscriber: Subscriber, declared: MicroBatch, *, every: float | None = None, rebuild: bool = False
) -> list[Batch]:
    """As `tick`, of a subscriber, with what was declared of its batches."""
    look(store, subscriber, every=every, rebuild=rebuild)
    with shared(store).transaction(durable=False) as connection:
        now = shared(store).now(connection)
        take_turn(connection, subscriber.pipeline, subscriber.agent)
        _put_back(connection, now, subscriber)
        _forget(connection, now, subscriber)
        while _cut(connection, now, subscriber, declared):
            pass
        return _batches.to_launch(connection, now, pipeline=subscriber.pipeline, agent=subscriber.agent)


def look(store: StateStore, subscriber: Subscriber, *, every: float | None = None, rebuild: bool = False) -> None:
    """Notes what became due and what was sealed since the last look, and where the next one begins."""
    database = shared(store)
    cursor = "" if rebuild else _cursor(database, subscriber)
    rows, now_at = store.sealed_since(cursor, subscriber.pipeline)
    stood = standings(history(store, subscriber, rows, whole=not cursor), subscriber)
    with database.transaction(durable=False) as connection:
        now = database.now(connection)
        row = {"pipeline": subscriber.pipeline, "agent": subscriber.agent, "cursor": "", "beat": now, "every": every}
        insert_if_absent(connection, SUBSCRIBERS, [row])
        take_turn(connection, subscriber.pipeline, subscriber.agent)
        _note(connection, now, subscriber, stood, rebuild=not cursor)
        # Another look may have come further meanwhile: then the next one reads some rows again.
        connection.execute(sa.update(SUBSCRIBERS).where(_is(SUBSCRIBERS, subscriber)).values(cursor=now_at, beat=now, every=every))


def _cursor(database: SharedStore, subscriber: Subscriber) -> str:
    if not database.holds(SUBSCRIBERS):
        return ""
    with database.reading() as connection:
        return connection.scalar(sa.select(SUBSCRIBERS.c.cursor).where(_is(SUBSCRIBERS, subscriber))) or ""


def take_turn(connection: sa.Connection, pipeline: str, agent: str) -> None:
    """Whoever writes about a subscriber's deliveries does so alone: with PostgreSQL too, where else two might wait for each other."""
    mine = (SUBSCRIBERS.c.pipeline == pipeline) & (SUBSCRIBERS.c.agent == agent)
    connection.execute(sa.select(SUBSCRIBERS.c.agent).where(mine).with_for_update())


def _put_back(connection: sa.Connection, now: float, subscriber: Subscriber) -> None:
    """What is claimed by a batch that is not there waits again."""
    is_open = sa.select(BATCHES.c.id).where(_is(BATCHES, subscriber), BATCHES.c.is_open.is_(True))
    lost = _is(DELIVERIES, subscriber) & (DELIVERIES.c.state == "claimed") & DELIVERIES.c.batch.not_in(is_open)
    connection.execute(sa.update(DELIVERIES).where(lost).values(state="waiting", batch=None, at=now))


def _forget(connection: sa.Connection, now: float, subscriber: Subscriber) -> None:
    """Deletes what is sealed, or void, since long ago: the log says so. What failed stays, and what is counted as refused."""
    names = _batches.forget(connection, now, pipeline=subscriber.pipeline, agent=subscriber.agent)
    over = DELIVERIES.c.batch.in_(names) & DELIVERIES.c.state.in_(["done", "void"]) & (DELIVERIES.c.refused == 0)
    if names:
        connection.execute(sa.delete(DELIVERIES).where(over))


def _note(connection: sa.Connection, now: float, subscriber: Subscriber, stood: Mapping[str, Standing], *, rebuild: bool) -> None:
    told = {"pipeline": subscriber.pipeline, "agent": subscriber.agent, "state": "waiting", "not_before": 0.0, "tries": 0, "refused": 0}
    new = [
        {**told, "workflow_id": one.workflow_id, "parents": one.digest, "attempt": one.attempt, "since": one.since.timestamp(), "at": now}
        for one in (standing.due for standing in stood.values())
        if one is not None
    ]
    changed: dict[str, list[int]] = {"done": [], "void": [], "waiting": []}
    for row in _of_workflows(connection, subscriber, stood):
        state = _should_be(row, stood[row.workflow_id], rebuild=rebuild)
        if state != row.state:
            changed[state].append(row.id)
    for state, ids in changed.items():
        for part in parts(ids):
            connection.execute(sa.update(DELIVERIES).where(DELIVERIES.c.id.in_(part)).values(state=state, at=now))
    for rows in parts(new):
        insert_if_absent(connection, DELIVERIES, rows)
    _note_joins(connection, subscriber, stood, rebuild=rebuild)


def _note_joins(connection: sa.Connection, subscriber: Subscriber, stood: Mapping[str, Standing], *, rebuild: bool) -> None:
    """What it waits for, so that whoever asks how it stands need not read the whole log."""
    if rebuild:
        connection.execute(sa.delete(JOINS).where(_is(JOINS, subscriber)))
    for part in [] if rebuild else parts(sorted(stood)):
        connection.execute(sa.delete(JOINS).where(_is(JOINS, subscriber), JOINS.c.workflow_id.in_(part)))
    told = {"pipeline": subscriber.pipeline, "agent": subscriber.agent}
    joining = [
        {**told, "workflow_id": name, "missing": json.dumps(one.missing), "since": one.since.timestamp()}
        for name, one in stood.items()
        if one.missing and one.since is not None
    ]
    for rows in parts(joining):
        connection.execute(sa.insert(JOINS), list(rows))


def _should_be(row: Any, standing: Standing, *, rebuild: bool) -> str:
    """A delivery's state, by what the log says about it."""
    if row.parents in standing.done:
        return "done"
    if standing.due is not None and row.parents == standing.due.digest:
        # What is noted as done and is not in the log was sealed a moment ago, unless the log was restored to an earlier time.
        return "waiting" if row.state == "void" or (row.state == "done" and rebuild) else str(row.state)
    # Superseded, or fenced. What a run has is judged by the run.
    return str(row.state) if row.state in ("claimed", "done") else "void"


def _of_workflows(connection: sa.Connection, subscriber: Subscriber, workflows: Iterable[str]) -> Iterator[Any]:
    wanted = sa.select(DELIVERIES.c.id, DELIVERIES.c.workflow_id, DELIVERIES.c.parents, DELIVERIES.c.state)
    for part in parts(sorted(workflows)):
        yield from connection.execute(wanted.where(_is(DELIVERIES, subscriber), DELIVERIES.c.workflow_id.in_(part))).all()


def _cut(connection: sa.Connection, now: float, subscriber: Subscriber, declared: MicroBatch) -> bool:
    """Claims one batch of what waits, the oldest first; False when there is none to be made yet."""
    ready = (DELIVERIES.c.state == "waiting") & (DELIVERIES.c.not_before <= now)
    wanted = sa.select(DELIVERIES.c.id, DELIVERIES.c.at).where(_is(DELIVERIES, subscriber), ready).order_by(DELIVERIES.c.id)
    rows = connection.execute(wanted.limit(declared.size).with_for_update(skip_locked=True)).all()
    if not rows or (len(rows) < declared.size and now - rows[0].at < declared.wait):
        return False
    batch = _batches.make(connection, now, pipeline=subscriber.pipeline, agent=subscriber.agent, size=len(rows))
    for part in parts([row.id for row in rows]):
        claimed = sa.update(DELIVERIES).where(DELIVERIES.c.id.in_(part)).values(state="claimed", batch=batch, at=now)
        connection.execute(claimed)
    return True


class Delivery(NamedTuple):
    """A claimed row: what a run is to do about one workflow. `tries` counts those that were begun before."""

    id: int
    workflow_id: str
    parents: str
    tries: int


class Claims:
    """The deliveries of a batch that a run has, and what it says of them. What it says counts for as long as it has the batch."""

    def __init__(self, shared: SharedStore, hold: Hold, declared: MicroBatch) -> None:
        self._shared, self._hold, self._declared = shared, hold, declared
        self._said: list[tuple[int, dict[str, Any]]] = []

    def open(self) -> list[Delivery]:
        """What is left to do, the oldest first."""
        columns = DELIVERIES.c.id, DELIVERIES.c.workflow_id, DELIVERIES.c.parents, DELIVERIES.c.tries
        wanted = sa.select(*columns).where(DELIVERIES.c.batch == self._hold.id, DELIVERIES.c.state == "claimed").order_by(DELIVERIES.c.id)
        with self._shared.reading() as connection:
            return [Delivery(*row) for row in connection.execute(wanted)]

    def begin(self, delivery: Delivery) -> bool:
        """Notes that the work on it begins, before it does; False where it has been the death of so many runs that it is given up.

        Raises `BatchTakenError` when another run has the batch: then nothing may be begun.
        """
        hopeless = delivery.tries >= MOST_DEATHS + self._declared.redeliveries
        if hopeless:
            self.say(delivery, "failed", error=DIED)
        else:
            self.say(delivery, "claimed", tries=delivery.tries + 1, run_id=self._hold.run_id)
        self.tell()
        return not hopeless

    def failed(self, delivery: Delivery, error: str) -> bool:
        """It failed. While its declared redeliveries last it is delivered again, a little later each time; else True."""
        tries = delivery.tries + 1
        if tries <= self._declared.redeliveries:
            self.again(delivery, error, after=min(2.0**tries, 300.0))
            return False
        self.say(delivery, "failed", error=error)
        return True

    def again(self, delivery: Delivery, error: str, *, after: float, **values: Any) -> None:
        """It is delivered again, in another batch, after so many seconds."""
        self.say(delivery, "waiting", error=error, batch=None, not_before=after, **values)

    def refused(self, delivery: Delivery) -> None:
        """It had been done before it came."""
        self.say(delivery, "done", refused=DELIVERIES.c.refused + 1)

    def say(self, delivery: Delivery, state: str, **values: Any) -> None:
        """Notes a state, to be written with the next `begin` or `tell`: the log has what was sealed already."""
        self._said.append((delivery.id, {"state": state, **values}))

    def tell(self, *, last: bool = False) -> None:
        """Writes what was said; with `last`, the batch is done with. Raises `BatchTakenError`."""
        with self._shared.transaction(durable=False) as connection:
            take_turn(connection, self._hold.pipeline, self._hold.agent)
            self._hold.require(connection)
            now = self._shared.now(connection)
            for delivery, said in self._said:
                values = {**said, "at": now, **({"not_before": now + said["not_before"]} if "not_before" in said else {})}
                mine = (DELIVERIES.c.id == delivery) & (DELIVERIES.c.batch == self._hold.id)
                connection.execute(sa.update(DELIVERIES).where(mine).values(**values))
            if last:
                self._hold.close(connection)
        self._said.clear()


def redeliver(store: StateStore, pipeline: Pipeline, agent: str, workflows: Iterable[str] | None = None) -> int:
    """Lets failed deliveries be tried again, all or those of some workflows; returns how many. They begin with no tries counted."""
    subscriber, database, count = Subscriber.of(pipeline, agent), shared(store), 0
    failed = _is(DELIVERIES, subscriber) & (DELIVERIES.c.state == "failed")
    wanted: Sequence[sa.ColumnElement[bool]] = [failed]
    if workflows is not None:
        wanted = [failed & DELIVERIES.c.workflow_id.in_(part) for part in parts(sorted(workflows))]
    with database.transaction(durable=False) as connection:
        now = database.now(connection)
        take_turn(connection, subscriber.pipeline, subscriber.agent)
        for some in wanted:
            values = {"state": "waiting", "batch": None, "tries": 0, "not_before": 0.0, "at": now}
            count += connection.execute(sa.update(DELIVERIES).where(some).values(**values)).rowcount
    return count


def _is(table: sa.Table, subscriber: Subscriber) -> sa.ColumnElement[bool]:
    return sa.and_(table.c.pipeline == subscriber.pipeline, table.c.agent == subscriber.agent)
