"""The inbox: single events, submitted by many, cut into batches, each of which is the entry of a workflow of its own.

An event that was accepted is in one batch for ever, and whoever is handed the batch gets the same events. Nothing of it is deleted: the
key of an event is known again for as long as there is the database, which has, as the snapshots have, what the records say.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, NamedTuple

import sqlalchemy as sa
from pydantic import BaseModel
from pydantic_core import PydanticSerializationError, from_json, to_json
from sqlalchemy.dialects import postgresql, sqlite

from dagster_mao.agent import MicroBatch
from dagster_mao.boundary import Outcome, run_agent
from dagster_mao.choreography import _batches
from dagster_mao.choreography._batches import Batch, BatchTakenError, Hold
from dagster_mao.choreography._deliveries import MOST_DEATHS, take_turn
from dagster_mao.choreography._run import Delivered
from dagster_mao.choreography._tables import BATCHES, INBOX, SUBSCRIBERS, insert_if_absent, parts, shared
from dagster_mao.contract import Contract
from dagster_mao.errors import EventsRefusedError, StaleStateError, WiringError
from dagster_mao.gateway._shared import SharedStore
from dagster_mao.pipeline import Pipeline
from dagster_mao.state import Attempt, Seal, StateStore

_SHOWN = 5  # refused events in an error
_CORRECT = "what came in is corrected by resubmission, `mao.resubmit`, or as a new event under a key of its own"


@dataclass(frozen=True)
class Submitted:
    """What became of events: how many were `accepted`, and how many `duplicates` had been before, word for word."""

    accepted: int
    duplicates: int


def submit(store: StateStore, pipeline: Pipeline, records: Any) -> Submitted:
    """Puts events into the inbox of a pipeline: a record (a dict or a model), or several. Once it returns they survive power loss.

    An event is known by its key: what comes again with the same content is no second event, so that whoever does not know whether an
    earlier call succeeded submits again. What a record says is judged later, at the entry, and what is bad goes into its quarantine.

    All of them are accepted, or none: raises `EventsRefusedError` when one has no key, cannot be written as JSON, or came in before under
    its key with another content. Raises `WiringError` for a pipeline without an inbox, `StoreError`. Any number of threads and processes
    may submit at once; threads that do are committed together.
    """
    _declared(pipeline)
    given = [records] if isinstance(records, (Mapping, BaseModel)) else list(records)
    slip = _Slip(pipeline.name)
    for place, record in enumerate(given):
        slip.add(place, record, pipeline.entry.output)
    if not slip.refused and slip.events:
        _desk(shared(store)).take(slip)
    if slip.refused:
        raise _refused(slip.refused, len(given), pipeline)
    return Submitted(len(slip.new), len(given) - len(slip.new))


def cut(store: StateStore, pipeline: Pipeline, *, every: float | None = None) -> list[Batch]:
    """What the sensor of an inbox does each time: cuts batches of what waits, as `Pipeline(inbox=)` says; returns what is to be launched.

    As with `tick`, a batch is returned until a run has taken it, and again when that run dies: launch one run per `run_key`, which calls
    `run_inbox`. `every` is in how many seconds the next look is meant to come. Raises `WiringError`, `StoreError`.
    """
    return cut_into(store, pipeline, _declared(pipeline), every=every)


def cut_into(store: StateStore, pipeline: Pipeline, declared: MicroBatch, *, every: float | None = None) -> list[Batch]:
    """As `cut`, with what was declared of its batches."""
    database, name, entry = shared(store), pipeline.name, pipeline.entry_name
    with database.transaction(durable=False) as connection:
        now = database.now(connection)
        insert_if_absent(connection, SUBSCRIBERS, [{"pipeline": name, "agent": entry, "cursor": "", "beat": now, "every": every}])
        take_turn(connection, name, entry)
        mine = (SUBSCRIBERS.c.pipeline == name) & (SUBSCRIBERS.c.agent == entry)
        connection.execute(sa.update(SUBSCRIBERS).where(mine).values(beat=now, every=every))
        _put_back(connection, now, name, entry)
        while _cut(connection, now, name, entry, declared):
            pass
        _batches.forget(connection, now, pipeline=name, agent=entry)
        return _batches.to_launch(connection, now, pipeline=name, agent=entry, deaths=MOST_DEATHS)


def intake_workflow(run_key: str) -> str:
    """The key of the workflow that a batch of events becomes, whichever generation of runs has it."""
    return f"events-{_batches.named(run_key)}"


def take(store: StateStore, pipeline: Pipeline, run_key: str, *, run_id: str) -> Intake:
    """A batch of events for one who seals the entry of its workflow by himself; to be entered. Raises `WiringError`."""
    _declared(pipeline)
    return Intake(store, pipeline, run_key, run_id)


def run_inbox(
    store: StateStore,
    pipeline: Pipeline,
    run_key: str,
    *,
    run_id: str,
    resources: Mapping[str, Any] | None = None,
    config_digest: str = "",
    policies: Mapping[str, Mapping[str, Any]] | None = None,
    fresh: bool = False,
    log: logging.Logger | None = None,
) -> Delivered:
    """A run of the entry: seals the events of a batch as the first version of their workflow. Its agents start by themselves.

    Killed at any point, or together with another that has the same batch, the events are in one sealed entry, or are handed out again:
    then it is a "duplicate". Raises `BatchTakenError` when there is nothing to do, and what `boundary.run_agent` raises.
    """
    options = {"resources": resources, "config_digest": config_digest, "policies": policies, "fresh": fresh, "log": log}
    said = {name: value for name, value in options.items() if value}
    with take(store, pipeline, run_key, run_id=run_id) as intake:
        told = Delivered(intake.workflow_id, "duplicate")
        if intake.sealed is None:
            try:
                told = Delivered(intake.workflow_id, "done", _entered(store, pipeline, intake, run_id, said))
            except StaleStateError:
                if intake.look() is None:
                    raise
        intake.finish()
    return told


def _entered(store: StateStore, pipeline: Pipeline, intake: Intake, run_id: str, said: Mapping[str, Any]) -> Outcome:
    entry = pipeline.entry
    plan = (entry.name,) if pipeline.mode == "choreography" else pipeline.plan
    attempt = store.open_attempt(
        pipeline=pipeline.name, attempt=run_id, run_id=run_id, plan=plan, entry=entry.name, workflow_key=intake.workflow_key
    )
    intake.require_unsealed(attempt)
    return run_agent(store, entry, attempt, records=intake.records, partition_key=intake.workflow_key, **said)


class Intake:
    """A batch of events that a run has, while it is in the `with` block. `workflow_key` and `workflow_id`: what it becomes.

    Raises `BatchTakenError` on entering when another run has it or it is done, `StoreError`.
    """

    def __init__(self, store: StateStore, pipeline: Pipeline, run_key: str, run_id: str) -> None:
        self._store, self._pipeline, self._shared = store, pipeline, shared(store)
        self._hold = Hold(self._shared, run_key, run_id)
        self.workflow_key = intake_workflow(run_key)
        self.workflow_id = f"{pipeline.name}/{self.workflow_key}"
        self._events = -1
        self._sealed: Seal | None = None

    def __enter__(self) -> Intake:
        self._hold.__enter__()
        try:
            if (self._hold.pipeline, self._hold.agent) != (self._pipeline.name, self._pipeline.entry_name):
                raise BatchTakenError(f"Batch {self._hold.run_key}: it is not of this inbox", fix="launch it where it was cut")
            self.look()
        except BaseException:
            self._hold.__exit__(None, None, None)
            raise
        return self

    def look(self) -> Seal | None:
        """What `sealed` is now."""
        self._sealed = next((seal for seal in self._store.seals(self.workflow_id) if seal.kind == "entry"), None)
        return self._sealed

    @property
    def sealed(self) -> Seal | None:
        """The entry of this workflow where another run has sealed it, as of the last look: then only `finish` is left to do."""
        return self._sealed

    @property
    def records(self) -> list[Any]:
        """The events, the same and in the same order whoever is handed the batch: what can be is a model, and what is bad a dict."""
        wanted = sa.select(INBOX.c.payload).where(self._mine).order_by(INBOX.c.id)
        with self._shared.reading() as connection:
            payloads = connection.scalars(wanted).all()
        contract = self._pipeline.entry.output
        parsed = ((payload, contract.parsed(payload)) for payload in payloads)
        return [from_json(payload) if model is None else model for payload, model in parsed]

    def require_unsealed(self, attempt: Attempt) -> None:
        """To be called between joining the attempt and sealing. Raises `StaleStateError` when another run was faster: look again."""
        if attempt.sealed(self._pipeline.entry_name) is not None:
            raise StaleStateError(
                "Another run sealed these events meanwhile",
                agent=self._pipeline.entry_name,
                workflow=self.workflow_id,
                fix="nothing is to be done: the batch is handed out once more, and found to be done",
            )

    def finish(self) -> None:
        """The entry is sealed: the batch is handed out no more. Raises `BatchTakenError` when this run was taken for dead."""
        with self._shared.transaction(durable=False) as connection:
            self._hold.require(connection)
            connection.execute(sa.update(INBOX).where(self._mine).values(is_open=False))
            self._hold.close(connection)

    @property
    def _mine(self) -> sa.ColumnElement[bool]:
        is_open = INBOX.c.is_open.is_(True)
        return (INBOX.c.pipeline == self._pipeline.name) & (INBOX.c.batch == self._hold.id) & is_open

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._hold.__exit__(kind, error, trace)


# -- accepting -----------------------------------------------------------------------------------------------------------------------


class _Event(NamedTuple):
    place: int
    key: str
    digest: str
    payload: str


@dataclass
class _Slip:
    """What one call submits. `new`: the keys that were not there before. `error`: why nobody could say."""

    pipeline: str
    events: dict[str, _Event] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)
    new: set[str] = field(default_factory=set)
    error: BaseException | None = None
    is_done: bool = False

    def add(self, place: int, record: Any, contract: Contract[Any]) -> None:
        event = _event(place, record, contract)
        if isinstance(event, str):
            self.refused[place] = event
        elif self.events.setdefault(event.key, event).digest != event.digest:
            self.refused[place] = "another one, submitted with it, has its key"

    def judge(self, before: Mapping[str, str]) -> None:
        """By the digests of what was there before under these keys."""
        for key, event in self.events.items():
            if before.get(key, event.digest) != event.digest:
                self.refused[event.place] = "another one came in under its key before"


def _event(place: int, record: Any, contract: Contract[Any]) -> _Event | str:
    """A record as an event, or why it can be none."""
    if isinstance(record, BaseModel):
        record = record.model_dump()
    if not isinstance(record, Mapping):
        return f"it is no record but {type(record).__name__}"
    try:
        payload = to_json(record, inf_nan_mode="constants")
        key = contract.key_of(from_json(payload))
        if key is None:
            return f"it has no key, {contract.key!r}"
        return _Event(place, _hashed(to_json(key)), _digest(payload, contract), payload.decode())
    except (PydanticSerializationError, ValueError, RecursionError):
        return "it cannot be written as JSON"


def _digest(payload: bytes, contract: Contract[Any]) -> str:
    """Of what a record says as its contract reads it, so that 100 and 100.0 are no two contents; of what it leaves to defaults, nothing."""
    model = contract.parsed(payload)
    told = payload if model is None else to_json(model.model_dump(exclude_unset=True), inf_nan_mode="constants")
    return _hashed(json.dumps(from_json(told), sort_keys=True).encode())


def _hashed(told: bytes) -> str:
    return hashlib.sha256(told).hexdigest()


class _Desk:
    """Where the threads of a process submit: whoever comes to commit takes along all that wait (group commit)."""

    def __init__(self, database: SharedStore) -> None:
        self._database = weakref.ref(database)
        self._state, self._commits = threading.Lock(), threading.Lock()
        self._waiting: list[_Slip] = []

    def take(self, slip: _Slip) -> None:
        """Returns once the slip is committed, or refused as a whole. Raises `StoreError`."""
        with self._state:
            self._waiting.append(slip)
        with self._commits:
            if not slip.is_done:
                with self._state:
                    together, self._waiting = self._waiting, []
                self._commit(together)
        if slip.error is not None:
            raise slip.error

    def _commit(self, together: Sequence[_Slip]) -> None:
        database = self._database()
        assert database is not None
        try:
            with database.transaction() as connection:
                now = database.now(connection)
                for slip in together:
                    with connection.begin_nested() as savepoint:
                        _accept(connection, now, slip)
                        if slip.refused:
                            slip.new.clear()
                            savepoint.rollback()
        except BaseException as error:
            for slip in together:
                slip.error = error
        finally:
            for slip in together:
                slip.is_done = True


def _accept(connection: sa.Connection, now: float, slip: _Slip) -> None:
    make = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    # In one order, whoever comes: two that submit the same would else wait for each other with PostgreSQL.
    events = sorted(slip.events.values(), key=lambda event: event.key if make is postgresql.insert else event.place)
    told = {"pipeline": slip.pipeline, "at": now, "batch": None, "is_open": True}
    for some in parts(events):
        rows = [{**told, "key": event.key, "digest": event.digest, "payload": event.payload} for event in some]
        statement = make(INBOX).on_conflict_do_nothing().returning(INBOX.c.key)
        slip.new |= set(connection.scalars(statement, rows))
    before = [key for key in slip.events if key not in slip.new]
    for some in parts(before):
        known = sa.select(INBOX.c.key, INBOX.c.digest).where(INBOX.c.pipeline == slip.pipeline, INBOX.c.key.in_(some))
        slip.judge({row.key: row.digest for row in connection.execute(known)})


_desks: weakref.WeakKeyDictionary[SharedStore, _Desk] = weakref.WeakKeyDictionary()
_opening = threading.Lock()


def _desk(database: SharedStore) -> _Desk:
    with _opening:
        return _desks.setdefault(database, _Desk(database))


def _after_fork() -> None:
    # Whoever was committing is not in the child.
    global _opening  # noqa: PLW0603
    _opening = threading.Lock()
    _desks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _refused(places: dict[int, str], given: int, pipeline: Pipeline) -> EventsRefusedError:
    shown = "; ".join(f"event {place}: {why}" for place, why in sorted(places.items())[:_SHOWN])
    more = f"; and {len(places) - _SHOWN} more" if len(places) > _SHOWN else ""
    what = f"{len(places)} of {given} events were refused, and none was accepted: {shown}{more}"
    error = EventsRefusedError(what, agent=pipeline.entry_name, field=pipeline.entry.output.key, fix=f"submit the others; {_CORRECT}")
    error.places = dict(sorted(places.items()))
    return error


# -- cutting -------------------------------------------------------------------------------------------------------------------------


def _declared(pipeline: Pipeline) -> MicroBatch:
    if pipeline.inbox is None:
        what, fix = f"Pipeline {pipeline.name!r} has no inbox", "declare inbox=mao.MicroBatch() on it"
        raise WiringError(what, agent=pipeline.entry_name or None, field="inbox", fix=fix)
    return pipeline.inbox


def _of(pipeline: str) -> sa.ColumnElement[bool]:
    return (INBOX.c.pipeline == pipeline) & INBOX.c.is_open.is_(True)


def _cut(connection: sa.Connection, now: float, pipeline: str, entry: str, declared: MicroBatch) -> bool:
    """Cuts one batch of what waits, the oldest first; False when there is none to be made yet."""
    wanted = sa.select(INBOX.c.id, INBOX.c.at).where(_of(pipeline), INBOX.c.batch.is_(None)).order_by(INBOX.c.id).limit(declared.size)
    rows = connection.execute(wanted).all()
    if not rows or (len(rows) < declared.size and now - rows[0].at < declared.wait):
        return False
    batch = _batches.make(connection, now, pipeline=pipeline, agent=entry, size=len(rows))
    for some in parts([row.id for row in rows]):
        connection.execute(sa.update(INBOX).where(INBOX.c.id.in_(some)).values(batch=batch))
    return True


def _put_back(connection: sa.Connection, now: float, pipeline: str, entry: str) -> None:
    """A batch that is lost, of which there still are events, is there again, under its name: it may have been sealed."""
    lost = ~sa.exists().where(BATCHES.c.id == INBOX.c.batch)
    held = sa.select(INBOX.c.batch, sa.func.count()).where(_of(pipeline), INBOX.c.batch.is_not(None), lost)
    for batch, size in connection.execute(held.group_by(INBOX.c.batch)).all():
        _batches.make(connection, now, pipeline=pipeline, agent=entry, size=size, name=batch)
