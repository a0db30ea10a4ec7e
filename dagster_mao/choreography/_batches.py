"""Batches: what one run takes. Each is launched under a key of its own, taken by one run at a time, and not lost with it.

A batch is launched under its `run_key` until a run has taken it, so whoever dies between making and launching it loses nothing, as long as
a launcher starts one run per key. A run that has it says so every few seconds. When it falls silent, the batch is launched under the key of
the next generation, and what the silent run may still say about it counts no more.
"""

from __future__ import annotations

import datetime as dt
import logging
import threading
import uuid
from types import TracebackType
from typing import Any, NamedTuple

import sqlalchemy as sa

from dagster_mao.choreography._tables import BATCHES
from dagster_mao.correlation import WorkflowLog
from dagster_mao.errors import MaoError, StoreError
from dagster_mao.gateway._shared import SharedStore

LEASE = 60.0  # seconds for which a silent run is believed to be alive
KEPT = 7 * 86400.0
"""Seconds for which it is noted what became of a batch. After that the log alone says it, which said it all the time."""

_BEATS = 4  # in that time
_FORGOTTEN = 5  # batches at a time: a sensor's turn is short
_FIRST_REST, _LONGEST_REST = 30.0, 600.0  # seconds for which a batch that is the death of its runs rests, twice as long each time

logger = WorkflowLog(logging.getLogger("dagster_mao.choreography"))


class Batch(NamedTuple):
    """What is to be launched: `size` workflows for an agent, or events for an entry, in one run under the key `run_key`."""

    run_key: str
    pipeline: str
    agent: str
    size: int


class BatchTakenError(MaoError):
    """Another run has this batch, or it is done: there is nothing to do for this one."""


def make(connection: sa.Connection, now: float, *, pipeline: str, agent: str, size: int, name: str | None = None) -> str:
    """A new batch; returns its id, which sorts by the second of its making. `name`: of one that was lost."""
    name = name or f"{_second(now)}-{uuid.uuid4().hex[:12]}"
    row = {"id": name, "pipeline": pipeline, "agent": agent, "size": size, "generation": 0, "made": now, "is_open": True}
    connection.execute(sa.insert(BATCHES).values(row))
    return name


def to_launch(connection: sa.Connection, now: float, *, pipeline: str, agent: str, deaths: int | None = None) -> list[Batch]:
    """The batches that no living run has, oldest first. After so many `deaths` of its runs one rests before each next, ever longer."""
    mine = (BATCHES.c.pipeline == pipeline) & (BATCHES.c.agent == agent) & BATCHES.c.is_open.is_(True)
    silent = mine & BATCHES.c.run_id.is_not(None) & (BATCHES.c.lease < now)
    connection.execute(sa.update(BATCHES).where(silent).values(generation=BATCHES.c.generation + 1, run_id=None, lease=now))
    waiting = connection.execute(sa.select(BATCHES).where(mine, BATCHES.c.run_id.is_(None)).order_by(BATCHES.c.id))
    awake = [row for row in waiting if deaths is None or now >= (row.lease or 0.0) + _rest(row.generation - deaths)]
    return [Batch(_key(row.id, row.generation), row.pipeline, row.agent, row.size) for row in awake]


def _rest(times: int) -> float:
    """For how many seconds a batch rests that has to for so many times and once more."""
    return 0.0 if times < 0 else min(_FIRST_REST * 2.0 ** min(times, 20), _LONGEST_REST)


def forget(connection: sa.Connection, now: float, *, pipeline: str, agent: str) -> list[str]:
    """Deletes some batches that were done with long ago, the oldest first; returns their ids."""
    mine = (BATCHES.c.pipeline == pipeline) & (BATCHES.c.agent == agent) & BATCHES.c.is_open.is_(False)
    old = sa.select(BATCHES.c.id).where(BATCHES.c.id < _second(now - KEPT), mine).order_by(BATCHES.c.id).limit(_FORGOTTEN)
    names = list(connection.scalars(old))
    if names:
        connection.execute(sa.delete(BATCHES).where(BATCHES.c.id.in_(names)))
    return names


def abandon(shared: SharedStore, run_key: str) -> bool:
    """Notes that the run launched under this key is dead, for those who know; False where the batch has gone on since.

    Without it the batch is launched again once the run has been silent for `LEASE` seconds, and never where it died before it took it.
    """
    name, generation = _parsed(run_key)
    mine = (BATCHES.c.id == name) & (BATCHES.c.generation == generation) & BATCHES.c.is_open.is_(True)
    with shared.transaction(durable=False) as connection:
        now = shared.now(connection)
        changed = connection.execute(sa.update(BATCHES).where(mine).values(generation=generation + 1, run_id=None, lease=now))
    return bool(changed.rowcount)


class Hold:
    """A run's hold on a batch: taken when entered, renewed by a thread of its own, given up when left.

    Raises `BatchTakenError` on entering when another run has it or it is done, `StoreError`.
    """

    def __init__(self, shared: SharedStore, run_key: str, run_id: str) -> None:
        self._shared, self.run_key, self.run_id = shared, run_key, run_id
        self.id, self.generation = _parsed(run_key)
        self._left = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Hold:
        with self._shared.transaction(durable=False) as connection:
            now = self._shared.now(connection)
            row = connection.execute(sa.select(BATCHES).where(BATCHES.c.id == self.id).with_for_update()).one_or_none()
            why = self._refused(row, now)
            if why:
                raise BatchTakenError(f"Batch {self.run_key}: {why}", fix="nothing is to be done: end this run")
            connection.execute(sa.update(BATCHES).where(BATCHES.c.id == self.id).values(run_id=self.run_id, lease=now + LEASE))
            assert row is not None
            self.pipeline, self.agent = str(row.pipeline), str(row.agent)
        self._thread = threading.Thread(target=self._renew, name="mao-batch", daemon=True)
        self._thread.start()
        return self

    def _refused(self, row: Any, now: float) -> str | None:
        if row is None:
            return "there is none of this name"
        if not row.is_open:
            return "it is done"
        if row.generation != self.generation:
            return "its run was taken for dead, and another has it"
        if row.run_id not in (None, self.run_id) and row.lease >= now:
            return f"run {row.run_id} has it"
        return None

    @property
    def mine(self) -> sa.ColumnElement[bool]:
        """The batch, while this run has it."""
        return (BATCHES.c.id == self.id) & (BATCHES.c.generation == self.generation) & (BATCHES.c.run_id == self.run_id)

    def require(self, connection: sa.Connection) -> None:
        """Raises `BatchTakenError` when this run was taken for dead; nobody else takes the batch before the transaction ends."""
        if connection.execute(sa.select(BATCHES.c.id).where(self.mine).with_for_update()).one_or_none() is None:
            raise BatchTakenError(f"Batch {self.run_key}: this run was silent, and another has it", fix="end this run")

    def close(self, connection: sa.Connection) -> None:
        """The batch is done with, whatever became of what was in it."""
        connection.execute(sa.update(BATCHES).where(self.mine).values(is_open=False))

    def _renew(self) -> None:
        while not self._left.wait(LEASE / _BEATS):
            try:
                with self._shared.transaction(durable=False) as connection:
                    lease = self._shared.now(connection) + LEASE
                    connection.execute(sa.update(BATCHES).where(self.mine).values(lease=lease))
            except StoreError as error:
                logger.warning("batch %s: its lease was not renewed: %s", self.run_key, error.what)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._left.set()
        if self._thread is not None:
            self._thread.join()


def named(run_key: str) -> str:
    """The id of the batch that a run key is of."""
    return _parsed(run_key)[0]


def _second(at: float) -> str:
    return f"{dt.datetime.fromtimestamp(at, dt.timezone.utc):%Y%m%dT%H%M%S}"


def _key(name: str, generation: int) -> str:
    return f"{name}.{generation}" if generation else name


def _parsed(run_key: str) -> tuple[str, int]:
    name, _, generation = run_key.partition(".")
    return name, int(generation) if generation.isdigit() else 0
