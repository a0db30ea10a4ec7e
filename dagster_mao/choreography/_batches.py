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
_BEATS = 4  # in that time

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
    name = name or f"{dt.datetime.fromtimestamp(now, dt.timezone.utc):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:12]}"
    row = {"id": name, "pipeline": pipeline, "agent": agent, "size": size, "generation": 0, "made": now, "is_open": True}
    connection.execute(sa.insert(BATCHES).values(row))
    return name


def to_launch(connection: sa.Connection, now: float, *, pipeline: str, agent: str) -> list[Batch]:
    """The batches that no living run has, oldest first."""
    mine = (BATCHES.c.pipeline == pipeline) & (BATCHES.c.agent == agent) & BATCHES.c.is_open.is_(True)
    silent = mine & BATCHES.c.run_id.is_not(None) & (BATCHES.c.lease < now)
    connection.execute(sa.update(BATCHES).where(silent).values(generation=BATCHES.c.generation + 1, run_id=None, lease=None))
    waiting = sa.select(BATCHES).where(mine, BATCHES.c.run_id.is_(None)).order_by(BATCHES.c.id)
    return [Batch(_key(row.id, row.generation), row.pipeline, row.agent, row.size) for row in connection.execute(waiting)]


def abandon(shared: SharedStore, run_key: str) -> bool:
    """Notes that the run launched under this key is dead, for those who know; False where the batch has gone on since.

    Without it the batch is launched again once the run has been silent for `LEASE` seconds, and never where it died before it took it.
    """
    name, generation = _parsed(run_key)
    mine = (BATCHES.c.id == name) & (BATCHES.c.generation == generation) & BATCHES.c.is_open.is_(True)
    with shared.transaction(durable=False) as connection:
        changed = connection.execute(sa.update(BATCHES).where(mine).values(generation=generation + 1, run_id=None, lease=None))
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


def _key(name: str, generation: int) -> str:
    return f"{name}.{generation}" if generation else name


def _parsed(run_key: str) -> tuple[str, int]:
    name, _, generation = run_key.partition(".")
    return name, int(generation) if generation.isdigit() else 0
