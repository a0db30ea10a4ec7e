"""Answers of calls, kept until their step has sealed: what was paid for is not asked again after a crash.

An answer is committed before its call is over for the agent's step, together with others that wait at the same moment (group commit).
Killing the process loses none that was kept; power loss at most those of the last second. docs/adr/0014 says what survives what, and why.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sqlite3
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from types import TracebackType
from typing import Any, NamedTuple

import sqlalchemy as sa
from pydantic_core import PydanticSerializationError, from_json, to_json

from dagster_mao.correlation import WorkflowLog
from dagster_mao.errors import StoreError
from dagster_mao.gateway._record import CallRecord
from dagster_mao.gateway._shared import METADATA, SharedStore

SYNC_EVERY = 1.0  # seconds after which what was kept survives power loss too
_LOOKED_UP = 500  # keys per statement
_PAGE = 10_000  # answers that are read or forgotten at a time, without holding up those who write
_BITE = 1_000
_ALIVE = 60.0  # seconds for which a step that kept something is let alone, however short its answers are to be kept
_NUMBERS = 2**32  # answers that a step may keep
_LOG = WorkflowLog(logging.getLogger(__name__))

_STEPS = sa.Table(
    "mao_answer_steps",
    METADATA,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("pipeline", sa.Text, nullable=False),
    sa.Column("agent", sa.Text, nullable=False),
    sa.Column("workflow_id", sa.Text, nullable=False),
    sa.Column("fingerprint", sa.Text, nullable=False),
    sa.Column("attempt", sa.Text, nullable=False),
    sa.Column("run_id", sa.Text, nullable=False),
    sa.Column("about", sa.Text, nullable=False),  # what else the call log says of the step's calls, as JSON
    sa.Column("logged", sa.BigInteger, nullable=False),  # its answers up to this number are in the calls table
    sa.Column("last", sa.Double, nullable=False),  # when it last kept something, to the second
    sa.Column("until", sa.Double, nullable=False),  # when anybody may forget it: its agent may be gone
    sa.Index("mao_answer_steps_of", "pipeline", "agent", "workflow_id"),
    sqlite_autoincrement=True,  # an id is never given twice: a late step must not write into another's
)
_ANSWERS = sa.Table(
    "mao_answers",
    METADATA,
    # Of the step, times 2**32, plus the number in the step. So a step's answers lie together, in their order. That is the only index: one
    # by key would write a page of its own for each answer, and cost more than all the rest.
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True, autoincrement=False),
    sa.Column("key", sa.LargeBinary, nullable=False),
    sa.Column("record", sa.LargeBinary),  # as bytes: a key may be any text
    sa.Column("told", sa.Text, nullable=False),  # the `CallRecord`, as JSON, so that it may grow
    sa.Column("value", sa.LargeBinary, nullable=False),  # the last one: whoever looks for keys does not read it
)
_COLUMNS = "id, key, record, told, value"
_SCOPE = ("pipeline", "agent", "workflow_id")


class Answer(NamedTuple):
    """What a call answered, in bytes, what the gateway told of it, and whose call it was."""

    value: bytes
    told: CallRecord
    attempt: str
    run_id: str


class Unlogged(NamedTuple):
    """An answered call that is not in the calls table: its step was killed. `about`: as that step was given it."""

    key: str
    record: str | None
    told: CallRecord
    attempt: str
    run_id: str
    about: dict[str, Any]


class Answers:
    """The kept answers of one agent in one workflow, as one step sees and adds to them.

    `fingerprint` stands for all that makes an answer another one with the same inputs: the agent's version, configuration, model, contract.
    An answer is known again for `keep` seconds, under the same key and fingerprint. With `fresh` only those are known that this attempt
    itself was given: a fresh run that crashes does not pay twice either. `about` is kept once, for whoever logs the calls of this step if
    it is killed: JSON-able values.

    To be used by one step: by its threads, and by the tasks of its event loop. A forked child that uses it counts as another step. Any
    method may raise `StoreError`.
    """

    TABLES = (_STEPS.name, _ANSWERS.name)

    def __init__(
        self,
        shared: SharedStore,
        *,
        pipeline: str,
        workflow_id: str,
        agent: str,
        fingerprint: str,
        attempt: str,
        run_id: str,
        keep: float,
        fresh: bool = False,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        self._shared, self._keep = shared, keep
        self._mine = {
            "pipeline": pipeline,
            "agent": agent,
            "workflow_id": workflow_id,
            "fingerprint": fingerprint,
            "attempt": attempt,
            "run_id": run_id,
            "about": json.dumps(dict(about or {})),
        }
        self._answering = ("fingerprint", "attempt") if fresh else ("fingerprint",)
        self._begin()
        with _fork_turn:
            _ALL.add(self)

    def _begin(self) -> None:
        self._state = threading.Lock()  # of what waits to be committed; held for an instant
        self._wake = threading.Condition(self._state)
        self._commits = threading.Lock()  # held by whoever commits; taken before the store's own
        self._waiting = _Batch()
        self._numbers = 0
        self._step: int | None = None
        self._line: _Line | None = None
        self._synced = 0.0  # by the monotonic clock
        self._dirty = False  # something is committed that a power loss may take
        self._thread: threading.Thread | None = None
        self._closed = False
        self._looking = threading.Lock()
        self._index: _Index | None = None
        self._handed_out: dict[int, int] = {}  # the last number, by step

    # -- what is known ---------------------------------------------------------------------------------------------------------------

    def known(self, keys: Sequence[str]) -> dict[str, Answer]:
        """The answers that other steps kept under these keys. Of several, that of the step which began last."""
        if not keys:
            return {}
        with self._looking:
            with self._shared.reading() as connection:
                rows = connection.execute(self._steps(*self._answering)).all()
                oldest = self._shared.now(connection) - self._keep
            steps = {row.id: (row.attempt, row.run_id) for row in rows if row.id != self._step}
            if not steps:
                return {}
            self._index = self._index or _Index(self._shared)
            self._index.read(steps)
            asked = {bytes.fromhex(key) for key in keys}
            places = self._index.find(asked)
        found: dict[str, Answer] = {}
        for place, key, told, value in self._at(places):
            step, record = steps.get(place // _NUMBERS), _record(told)
            if step is not None and record.started >= oldest and key in asked:
                found[key.hex()] = Answer(bytes(value), record, *step)
        return found

    def _at(self, places: Sequence[int]) -> Iterator[Any]:
        columns = _ANSWERS.c.id, _ANSWERS.c.key, _ANSWERS.c.told, _ANSWERS.c.value
        for part in _parts(places):
            with self._shared.reading() as connection:
                rows = connection.execute(sa.select(*columns).where(_ANSWERS.c.id.in_(part))).all()
            yield from rows

    def _steps(self, *of: str) -> sa.Select[Any]:
        """The steps of this agent and workflow, and with the same `of` besides."""
        return sa.select(_STEPS).where(*(_STEPS.c[name] == self._mine[name] for name in (*_SCOPE, *of))).order_by(_STEPS.c.id)

    # -- keeping ---------------------------------------------------------------------------------------------------------------------

    def keep(self, key: str, record: str | None, value: bytes, told: CallRecord) -> None:
        """Keeps an answer. When it returns, the answer survives SIGKILL of this process. For threads."""
        batch = self._add(_row(key, record, value, told))
        while not batch.settled:
            # Whoever gets here first commits for all who came meanwhile.
            with self._commits:
                if not batch.settled:
                    self._commit()
        batch.raise_error()

    async def akeep(self, key: str, record: str | None, value: bytes, told: CallRecord) -> None:
        """As `keep`, without holding up the event loop."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[None] = loop.create_future()
        batch = self._add(_row(key, record, value, told), (loop, future))
        if len(batch.waiters) == 1:
            loop.call_soon(self._rouse)  # once all tasks that can run now have come as far as this
        await future

    def _add(self, row: _Row, waiter: _Waiter | None = None) -> _Batch:
        with self._state:
            if self._closed:
                raise RuntimeError("these answers are closed")
            self._numbers += 1
            batch = self._waiting
            batch.rows.append((self._numbers, row))
            if waiter is not None:
                batch.waiters.append(waiter)
        return batch

    def _rouse(self) -> None:
        """The thread that commits for tasks, and that makes a pause durable, shall look."""
        with self._state:
            if self._closed:
                return
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="mao-answers", daemon=True)
                self._thread.start()
            self._wake.notify()

    def _work(self) -> None:
        while True:
            with self._state:
                while not self._closed and not self._waiting.waiters:
                    pause = self._synced + SYNC_EVERY - time.monotonic() if self._dirty else None
                    if pause is not None and pause <= 0:
                        break
                    self._wake.wait(pause)
                if self._closed:
                    return
            with self._commits:
                batch = self._commit()
            if batch.error is not None:
                with self._state:
                    self._wake.wait(SYNC_EVERY)  # a store that is down is not asked without a pause

    def _commit(self, *, durable: bool = False) -> _Batch:
        """Under `_commits`: commits what waits; once in `SYNC_EVERY`, and where it is asked for, durably. The batch has what went wrong."""
        with self._state:
            batch, self._waiting = self._waiting, _Batch()
        batch.error = _Told("Keeping answers was interrupted")
        try:
            if durable or self._step is None or time.monotonic() - self._synced >= SYNC_EVERY:
                if batch.rows or self._dirty:
                    self._write_durably(batch.rows)
            elif batch.rows:
                self._write(batch.rows)
            batch.error = None
        except StoreError as error:
            batch.error = _Told(error.what, error.fix)
        except Exception as error:
            batch.error = _Told(f"Answers could not be kept: {type(error).__name__}")
        finally:
            batch.settle()
        return batch

    def _write(self, rows: list[_Numbered]) -> None:
        """One statement or two, on a connection that does nothing else: SQLAlchemy's costs are those of ten answers."""
        try:
            if self._line is None:
                self._line = _Line(self._shared)
            with self._line.turn:
                self._line.insert(self._placed(rows, self._step))
        except _BROKEN:
            # The connection may be gone, with or without its last commit.
            self._drop_line()
            self._write_durably(rows)
            return
        except BaseException:
            self._drop_line()
            raise
        if not self._dirty:
            self._dirty = True
            self._rouse()

    def _write_durably(self, rows: list[_Numbered]) -> None:
        with self._shared.transaction() as connection:
            now = self._shared.now(connection)
            until = now + max(self._keep, _ALIVE)
            step = self._step
            if step is not None:
                touched = connection.execute(sa.update(_STEPS).where(_STEPS.c.id == step).values(last=now, until=until))
                step = step if touched.rowcount else None  # it was silent for so long that it is forgotten
            if step is None:
                step = connection.scalar(sa.insert(_STEPS).values(**self._mine, logged=0, last=now, until=until).returning(_STEPS.c.id))
            if rows:
                mark = "?" if connection.dialect.name == "sqlite" else "%s"
                insert = f"INSERT INTO mao_answers ({_COLUMNS}) VALUES ({', '.join([mark] * 5)}) ON CONFLICT DO NOTHING"  # noqa: S608
                connection.exec_driver_sql(insert, self._placed(rows, step))
        self._step, self._dirty, self._synced = step, False, time.monotonic()

    def _placed(self, rows: list[_Numbered], step: int | None) -> list[_Placed]:
        first = (step or 0) * _NUMBERS
        return [(first + number, *row) for number, row in rows]

    def _drop_line(self) -> None:
        line, self._line = self._line, None
        if line is not None:
            line.close()

    # -- the call log ----------------------------------------------------------------------------------------------------------------

    def unlogged(self) -> Iterator[Unlogged]:
        """The answered calls that other steps of this agent and workflow kept and did not log, whatever their fingerprint, step by step.

        A step that is still alive cannot be told from a killed one: then both log the same rows.
        """
        with self._shared.reading() as connection:
            steps = connection.execute(self._steps()).all()
        for step in steps:
            if step.id == self._step:
                continue
            last, about = step.logged, json.loads(step.about)
            while True:
                page = (
                    sa.select(_ANSWERS.c.id, _ANSWERS.c.key, _ANSWERS.c.record, _ANSWERS.c.told)
                    .where(_ANSWERS.c.id > step.id * _NUMBERS + last, _ANSWERS.c.id < (step.id + 1) * _NUMBERS)
                    .order_by(_ANSWERS.c.id)
                    .limit(_PAGE)
                )
                with self._shared.reading() as connection:
                    rows = connection.execute(page).all()
                if not rows:
                    break
                for row in rows:
                    record = None if row.record is None else bytes(row.record).decode("utf-8", "surrogatepass")
                    yield Unlogged(row.key.hex(), record, _record(row.told), step.attempt, step.run_id, about)
                last = rows[-1].id % _NUMBERS
                self._handed_out[step.id] = last

    def logged(self) -> None:
        """Notes that the calls table has all answers kept until now, and all that `unlogged` handed out (to its end)."""
        with self._commits:
            self._commit(durable=True).raise_error()
        done = dict(self._handed_out)
        if self._step is not None:
            done[self._step] = self._numbers
        if not done:
            return
        with self._shared.transaction() as connection:
            for step, number in done.items():
                connection.execute(sa.update(_STEPS).where(_STEPS.c.id == step, _STEPS.c.logged < number).values(logged=number))
        self._handed_out.clear()

    # -- the end ---------------------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Everything that was kept survives power loss, the thread has ended, and answers older than `keep` seconds are forgotten."""
        with self._state:
            if self._closed:
                return
            self._closed = True
            thread = self._thread
            self._wake.notify()
        with _fork_turn:
            _ALL.discard(self)
        if thread is not None:
            thread.join()
        with self._commits:
            batch = self._commit(durable=True)
            self._drop_line()
        batch.raise_error()
        try:
            self._forget()
        except StoreError as error:
            _LOG.warning("agent %r: old answers could not be forgotten: %s", self._mine["agent"], error)

    def _forget(self) -> None:
        """What is too old: of this agent by its `keep`, of others by their own. In bites between which others write, twice what it kept."""
        left = max(10 * _BITE, 2 * self._numbers)
        agent = (_STEPS.c.pipeline == self._mine["pipeline"]) & (_STEPS.c.agent == self._mine["agent"])
        with self._shared.reading() as connection:
            now = self._shared.now(connection)
            old = (_STEPS.c.until < now) | (agent & (_STEPS.c.last < now - max(self._keep, _ALIVE)))
            steps = list(connection.scalars(sa.select(_STEPS.c.id).where(old).order_by(_STEPS.c.last).limit(1000)))
        for step in steps:
            within = _ANSWERS.c.id.between(step * _NUMBERS, (step + 1) * _NUMBERS - 1)
            bite = sa.delete(_ANSWERS).where(_ANSWERS.c.id.in_(sa.select(_ANSWERS.c.id).where(within).limit(_BITE)))
            while left > 0:
                begun = time.monotonic()
                with self._shared.transaction(durable=False) as connection:
                    forgotten = connection.execute(bite).rowcount
                    if forgotten < _BITE:
                        # Unless it has come back to life meanwhile.
                        connection.execute(sa.delete(_STEPS).where(_STEPS.c.id == step, old))
                left -= forgotten + 1
                if forgotten < _BITE:
                    break
                time.sleep(time.monotonic() - begun)

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if error is None:
            self.close()
            return
        with suppress(StoreError):  # what went wrong first is told
            self.close()


# -- rows ----------------------------------------------------------------------------------------------------------------------------

_Row = tuple[bytes, "bytes | None", str, bytes]  # key, record, told, value
_Numbered = tuple[int, _Row]
_Placed = tuple[int, bytes, "bytes | None", str, bytes]
_Waiter = tuple[asyncio.AbstractEventLoop, "asyncio.Future[None]"]


class _Told(NamedTuple):
    """An error, to be raised once per caller."""

    what: str
    fix: str | None = None

    def again(self) -> StoreError:
        return StoreError(self.what, fix=self.fix)


class _Batch:
    """What is committed together, and who waits for it."""

    __slots__ = ("error", "rows", "settled", "waiters")

    def __init__(self) -> None:
        self.rows: list[_Numbered] = []
        self.waiters: list[_Waiter] = []
        self.settled = False
        self.error: _Told | None = None

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error.again()

    def settle(self) -> None:
        self.settled = True
        loops = {loop for loop, _ in self.waiters}
        for loop in loops:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_resolve, [future for its, future in self.waiters if its is loop], self.error)


def _resolve(futures: list[asyncio.Future[None]], error: _Told | None) -> None:
    for future in futures:
        if future.done():  # its task was cancelled; the answer is kept all the same
            continue
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error.again())


def _row(key: str, record: str | None, value: bytes, told: CallRecord) -> _Row:
    return bytes.fromhex(key), None if record is None else record.encode("utf-8", "surrogatepass"), _encoded(told), value


def _encoded(told: CallRecord) -> str:
    try:
        return to_json(told).decode()
    except PydanticSerializationError:  # a model's name that is no UTF-8
        clean = [part.encode("utf-8", "backslashreplace").decode() if isinstance(part, str) else part for part in told]
        return to_json(clean).decode()


def _record(told: str) -> CallRecord:
    return CallRecord(*from_json(told)[: len(CallRecord._fields)])


# -- where they lie -------------------------------------------------------------------------------------------------------------------


class _Index:
    """Where the answers of some steps lie, by key.

    Read from the store as far as that has grown, into a temporary database of SQLite's own: once it is large it is a file of this process
    alone, and ends with it.
    """

    def __init__(self, shared: SharedStore) -> None:
        self._shared = shared
        self._read: dict[int, int] = {}  # the last place read, by step
        self._places = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        for setting in ("journal_mode=OFF", "synchronous=OFF", "cache_size=-16384"):
            self._places.execute(f"PRAGMA {setting}")
        self._places.execute("CREATE TABLE places (prefix INTEGER PRIMARY KEY, place INTEGER NOT NULL)")

    def read(self, steps: Iterable[int]) -> None:
        """Reads what these steps have kept since the last time. A step commits in the order of its numbers, so nothing is passed over."""
        for step in steps:
            within = _ANSWERS.c.id < (step + 1) * _NUMBERS
            while True:
                after = self._read.get(step, step * _NUMBERS)
                page = sa.select(_ANSWERS.c.id, _ANSWERS.c.key).where(_ANSWERS.c.id > after, within).order_by(_ANSWERS.c.id).limit(_PAGE)
                with self._shared.reading() as connection:
                    rows = connection.execute(page).all()
                if rows:
                    self._places.execute("BEGIN")
                    self._places.executemany(_PLACE, [(_prefix(key), place) for place, key in rows])
                    self._places.execute("COMMIT")
                    self._read[step] = rows[-1].id
                if len(rows) < _PAGE:
                    break

    def find(self, keys: Iterable[bytes]) -> list[int]:
        """The places of these keys, in order. By their first eight bytes: whoever reads there compares the rest."""
        found: list[int] = []
        for part in _parts([_prefix(key) for key in keys]):
            rows = self._places.execute(f"SELECT place FROM places WHERE prefix IN ({', '.join('?' * len(part))})", part)  # noqa: S608
            found.extend(place for (place,) in rows)
        return sorted(found)


def _parts(whole: Sequence[int]) -> Iterator[Sequence[int]]:
    return (whole[start : start + _LOOKED_UP] for start in range(0, len(whole), _LOOKED_UP))


_PLACE = "INSERT INTO places VALUES (?, ?) ON CONFLICT (prefix) DO UPDATE SET place = max(place, excluded.place)"


def _prefix(key: bytes) -> int:
    return int.from_bytes(key[:8], "big", signed=True)


# -- the connection ------------------------------------------------------------------------------------------------------------------


class _BrokenLineError(Exception):
    """The driver failed; its text may hold values."""


_BROKEN = (_BrokenLineError, StoreError)


class _Line:
    """A connection of the driver's own, outside of SQLAlchemy's pool, that commits without an fsync."""

    def __init__(self, shared: SharedStore) -> None:
        engine = shared._ready()
        self._is_sqlite = engine.dialect.name == "sqlite"
        # SQLite has one writer: threads of a process take turns sooner than by its busy timeout.
        self.turn: AbstractContextManager[Any] = shared._lock if self._is_sqlite else nullcontext()
        self._errors: Any = engine.dialect.loaded_dbapi.Error
        self._integrity: Any = engine.dialect.loaded_dbapi.IntegrityError
        with shared._driver_errors_told():
            pooled = engine.raw_connection()
            raw: Any = pooled.driver_connection
            pooled.detach()
        self._raw = raw
        try:
            if self._is_sqlite:
                raw.execute("PRAGMA synchronous=NORMAL")
            else:
                raw.autocommit = True
                raw.execute("SET synchronous_commit = off")
        except self._errors:
            self.close()
            raise _BrokenLineError from None

    def insert(self, rows: list[_Placed]) -> None:
        """Commits the rows. Raises `_BrokenLineError`."""
        try:
            (self._sqlite if self._is_sqlite else self._postgres)(rows)
        except self._integrity as error:
            raise RuntimeError(f"two steps share an identity: {type(error).__name__}") from None
        except self._errors:
            raise _BrokenLineError from None

    def _sqlite(self, rows: list[_Placed]) -> None:
        if len(rows) == 1:
            self._raw.execute(_SQLITE_INSERT, rows[0])
            return
        self._raw.execute("BEGIN IMMEDIATE")
        self._raw.executemany(_SQLITE_INSERT, rows)
        self._raw.execute("COMMIT")

    def _postgres(self, rows: list[_Placed]) -> None:
        self._raw.execute(_POSTGRES_INSERT, [list(column) for column in zip(*rows, strict=True)], prepare=True)

    def close(self) -> None:
        with suppress(self._errors):
            self._raw.close()


_SQLITE_INSERT = f"INSERT INTO mao_answers ({_COLUMNS}) VALUES (?, ?, ?, ?, ?)"  # noqa: S608
_POSTGRES_INSERT = (
    f"INSERT INTO mao_answers ({_COLUMNS}) "  # noqa: S608
    "SELECT * FROM unnest(%b::bigint[], %b::bytea[], %b::bytea[], %b::text[], %b::bytea[])"
)


# -- forks ---------------------------------------------------------------------------------------------------------------------------

# As in the shared store, whose hooks run inside of these: a fork waits for the commits of other threads, and no connection crosses it.
_ALL: weakref.WeakSet[Answers] = weakref.WeakSet()
_fork_turn = threading.Lock()  # two threads may fork at once
_forking: list[Answers] = []


def _before_fork() -> None:
    _fork_turn.acquire()
    _forking.extend(_ALL)
    for answers in _forking:
        answers._looking.acquire()
        answers._commits.acquire()
        answers._state.acquire()
        answers._drop_line()


def _after_fork_in_parent() -> None:
    while _forking:
        answers = _forking.pop()
        answers._state.release()
        answers._commits.release()
        answers._looking.release()
    _fork_turn.release()


def _after_fork_in_child() -> None:
    while _forking:
        _forking.pop()._begin()  # with a step of its own
    _fork_turn.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
