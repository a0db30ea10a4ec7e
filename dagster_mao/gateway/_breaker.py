"""A circuit breaker that all processes share: pybreaker's state machine, on a row of the shared store.

pybreaker counts, trips, half-opens and closes; here is what it leaves to one process: a row that is locked while it decides, the database's
clock, the one probe, and no lock and no SQL while the call itself runs. docs/adr/0012 says what is exact and what is lazy.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import logging
import math
import os
import socket
import time
import uuid
from collections.abc import Callable
from concurrent import futures
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal, cast

import pybreaker
import sqlalchemy as sa
from pybreaker import STATE_CLOSED, STATE_HALF_OPEN, STATE_OPEN
from sqlalchemy.dialects import postgresql, sqlite

from dagster_mao.correlation import WorkflowLog
from dagster_mao.errors import BreakerOpenError, MaoError, StoreError, UnknownBreakerError
from dagster_mao.gateway._policy import Breaker
from dagster_mao.gateway._record import class_of
from dagster_mao.gateway._shared import METADATA, SharedStore

LOOK_EVERY = 0.25  # seconds for which a process believes what it read of a breaker
_SHORTEST_LEASE = 60.0
_EVENTS_KEPT = 30 * 86400.0
_LOG = WorkflowLog(logging.getLogger(__name__))

_ROWS = sa.Table(
    "mao_breakers",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("state", sa.Text, nullable=False),
    sa.Column("failures", sa.Text, nullable=False),  # times of the failures in a row, as JSON, newest last
    sa.Column("since", sa.Double),  # when it opened, through failed probes; once closed, when it closed
    sa.Column("why", sa.Text),
    sa.Column("by", sa.Text),  # who opened it by hand
    sa.Column("retry_at", sa.Double),  # when it half-opens; null while it is held open by hand
    sa.Column("generation", sa.BigInteger, nullable=False),  # of states: what was admitted in one says nothing about another
    sa.Column("prober", sa.Text),
    sa.Column("lease_until", sa.Double),
    sa.Column("fail_max", sa.Integer, nullable=False),
    sa.Column("reset_timeout", sa.Double, nullable=False),
)
_EVENTS = sa.Table(
    "mao_breaker_events",
    METADATA,
    sa.Column("id", sa.BigInteger().with_variant(sa.Integer, "sqlite"), primary_key=True),
    sa.Column("breaker", sa.Text, nullable=False, index=True),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("event", sa.Text, nullable=False),  # the state it came into, or "reset"
    sa.Column("why", sa.Text),
    sa.Column("by", sa.Text),  # whoever did it by hand
    sa.Column("process", sa.Text, nullable=False),
)


@dataclass(frozen=True)
class BreakerState:
    """How a breaker stands. `state`: closed, open or half-open. `failures`: in a row. `since`: when it opened, or, closed, when it closed.

    `why`: class of the last error that counted, or what was said by hand, `by` whom. `retry_after`: seconds until a call may be made as a
    probe; None for a closed breaker, and for one that is held open by hand.
    """

    name: str
    state: str
    failures: int
    since: dt.datetime | None
    why: str | None
    by: str | None
    retry_after: float | None
    fail_max: int
    reset_timeout: float


@dataclass(frozen=True)
class BreakerEvent:
    """A change of a breaker's state. `event`: the state it came into, or "reset". `by`: None when it did so itself. `process`: host:pid."""

    breaker: str
    at: dt.datetime
    event: str
    why: str | None
    by: str | None
    process: str


class Admission:
    """The permission for one call, to be answered by exactly one of its methods, once. None of them raises."""

    __slots__ = ("_breaker", "_generation", "_token")
    is_held_up: Literal[False] = False

    def __init__(self, breaker: SharedBreaker, generation: int, token: str | None = None) -> None:
        self._breaker, self._generation, self._token = breaker, generation, token

    @property
    def is_probe(self) -> bool:
        return self._token is not None

    def succeeded(self) -> None:
        """The call was answered. A probe closes the breaker at once; other successes are told to the other processes later."""
        if self._token is not None:
            self._breaker._answer(self, "succeeded")
        else:
            self._breaker._note_success(self._generation)

    def failed(self, error: BaseException) -> None:
        """The call failed: recorded at once. Errors that are not counted are as `released`."""
        if self._breaker.counts(error):
            self._breaker._answer(self, "failed", class_of(error))
        else:
            self.released()

    def released(self) -> None:
        """The call says nothing about the called side. A probe leaves its place to the next call."""
        if self._token is not None:
            self._breaker._answer(self, "released")


class Probing:
    """No permission yet: another call is the probe, here or in another process, and what becomes of it decides.

    `refusal` is for whoever does not wait.
    """

    __slots__ = ("_breaker", "_outcome", "refusal")
    is_held_up: Literal[True] = True

    def __init__(self, breaker: SharedBreaker, refusal: BreakerOpenError, outcome: futures.Future[None] | None) -> None:
        self._breaker, self.refusal = breaker, refusal
        self._outcome = outcome  # done when a probe of this process has ended; None for that of another

    def admitted(self) -> Admission:
        """The permission, when that probe has ended, and what may follow it: waits as long as a probe may take, and is refused then.

        Raises as `SharedBreaker.enter`.
        """
        until, probing = self._breaker.patience(), self
        while True:
            seconds = probing._left(until)
            if probing._outcome is None:
                time.sleep(seconds)
            else:
                futures.wait((probing._outcome,), seconds)
            entered = self._breaker.enter()
            if not entered.is_held_up:
                return entered
            probing = entered

    async def aadmitted(self) -> Admission:
        """As `admitted`, without holding up the event loop."""
        until, probing = self._breaker.patience(), self
        while True:
            seconds = probing._left(until)
            if probing._outcome is None:
                await asyncio.sleep(seconds)
            else:
                await _ended(probing._outcome, seconds)
            entered = self._breaker.enter()
            if not entered.is_held_up:
                return entered
            probing = entered

    def _left(self, until: float) -> float:
        """Seconds until it looks again, for a probe of this process too: somebody may decide by hand meanwhile."""
        if (left := until - self._breaker.clock()) <= 0:
            raise self.refusal
        return min(left, LOOK_EVERY)


async def _ended(outcome: futures.Future[None], seconds: float) -> None:
    ended = asyncio.wrap_future(outcome)
    try:
        await asyncio.wait((ended,), timeout=seconds)
    finally:
        ended.cancel()


# The probes that this process runs, by their tokens, whichever of its breakers admitted them.
_probes: dict[str, futures.Future[None]] = {}


class SharedBreaker:
    """The breaker `name` in one process; whoever uses the name on the same store shares it.

    `not_counted`: classes of errors that are no failure of the called side. `lease`: seconds that a probe may take before another one is
    let through, because its process may be dead; by default the reset timeout, and a minute at least. `clock`: monotonic seconds.
    """

    def __init__(
        self,
        shared: SharedStore,
        name: str,
        declared: Breaker,
        *,
        not_counted: tuple[type[BaseException], ...] = (),
        lease: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shared, self._name, self._declared = shared, name, declared
        self._not_counted = not_counted
        self._lease = max(declared.reset_timeout, _SHORTEST_LEASE) if lease is None else lease
        self.clock = clock
        # No lock: a thread that overwrites what another saw costs a look more, and it is the database that decides.
        self._seen: _Seen | None = None
        self._look_at = -math.inf
        self._success_at: float | None = None

    def enter(self) -> Admission | Probing:
        """Permission to make a call, or what decides on it. Raises `BreakerOpenError`, and `StoreError` when the store cannot be asked."""
        now = self.clock()
        seen = self._seen if now < self._look_at and self._seen else self._look(now)
        if seen.closed is not None:
            return seen.closed
        return self._held_up(seen, now) if now < seen.wait_until else self._probe()

    def admit(self) -> Admission:
        """As `enter`, for a call that waits for nobody's probe: it is refused."""
        entered = self.enter()
        if entered.is_held_up:
            raise entered.refusal
        return entered

    def patience(self) -> float:
        """Until when, by `clock`, a call that comes now waits for probes."""
        return self.clock() + self._lease

    def closed_since(self) -> dt.datetime | None:
        """When it closed; None while it is not closed. Asks the store, and raises `StoreError`."""
        seen = self._look(self.clock())
        return None if seen.closed is None else seen.since

    def flush(self) -> None:
        """Tells the other processes of a success that they may not know of: at the end of a batch. Raises `StoreError`."""
        if self._success_at is not None:
            self._look(self.clock())

    def counts(self, error: BaseException) -> bool:
        """Whether an error is a failure of the called side. What ends the process, the call or the step is not."""
        if isinstance(error, MaoError) and not error.of_one_call:  # a fence, a store that is down, wrong wiring
            return False
        return isinstance(error, Exception) and not isinstance(error, self._not_counted)

    # -- what this process knows -----------------------------------------------------------------------------------------------------

    def _look(self, at: float) -> _Seen:
        """Reads the row, and writes to it only if there is a success to tell: one that came after the failures in it."""
        self._look_at = at + LOOK_EVERY
        with self._shared.reading() as connection:
            row = connection.execute(sa.select(_ROWS).where(_ROWS.c.name == self._name)).mappings().one_or_none()
            now = self._shared.now(connection)
        noted = self._success_at
        succeeded = self._by_database(noted, now)
        tells = succeeded is not None and row is not None and row["state"] == STATE_CLOSED and _before(row["failures"], succeeded)
        if row is not None and not tells and (self._seen is not None or self._is_declared(row)):
            self._forget(noted)  # there was nothing before it to take away
            return self._saw(dict(row), now)
        with self._shared.transaction(durable=False) as connection:
            locked = self._locked(connection)
            self._forgive(locked)
            locked.write()
        return self._saw(locked.values, locked.now)

    def _saw(self, row: dict[str, Any], now: float) -> _Seen:
        """`now` is the database's time of the row. Only the difference to it counts, so that no two clocks are ever compared."""
        closed = Admission(self, row["generation"]) if row["state"] == STATE_CLOSED else None
        wait = _wait(row, now)
        # A wait that is over must be so for whoever looked at the clock before this.
        until = math.inf if wait is None else self.clock() + wait if wait else -math.inf
        prober = row["prober"] if row["state"] == STATE_HALF_OPEN else None
        self._seen = seen = _Seen(row["generation"], closed, until, _at(row["since"] or now), row["why"] or "", prober)
        return seen

    def _is_declared(self, row: Any) -> bool:
        return (row["fail_max"], row["reset_timeout"]) == (self._declared.fail_max, self._declared.reset_timeout)

    def _note_success(self, generation: int) -> None:
        seen = self._seen
        if seen is not None and seen.generation == generation:
            self._success_at = self.clock()

    def _by_database(self, at: float | None, now: float) -> float | None:
        """A moment of this process's clock as the database's, where it is `now`."""
        return None if at is None else now - (self.clock() - at)

    def _forget(self, noted: float | None) -> None:
        if self._success_at == noted:  # else another thread has noted a later one
            self._success_at = None

    def _held_up(self, seen: _Seen, now: float) -> Probing:
        """By the probe that somebody makes. Raises `BreakerOpenError` where nobody does."""
        wait = seen.wait_until - now
        retry_after = max(0.0, wait) if wait < math.inf else None
        refusal = BreakerOpenError(self._name, since=seen.since, why=seen.why, retry_after=retry_after)
        if seen.prober is None:
            raise refusal
        return Probing(self, refusal, _probes.get(seen.prober))

    # -- what all processes agree on -------------------------------------------------------------------------------------------------

    def _locked(self, connection: sa.Connection) -> _Locked:
        """The row, locked until the transaction ends; made if there is none."""
        insert = (sqlite if connection.dialect.name == "sqlite" else postgresql).insert(_ROWS)
        declared = {"fail_max": self._declared.fail_max, "reset_timeout": self._declared.reset_timeout}
        new = {"name": self._name, "state": STATE_CLOSED, "failures": "[]", "generation": 0, **declared}
        row = _lock(connection, self._name)
        if row is None:
            connection.execute(insert.values(new).on_conflict_do_nothing())
            row = cast(dict[str, Any], _lock(connection, self._name))
        return _Locked(connection, {**row, **declared}, self._shared.now(connection))

    def _forgive(self, row: _Locked) -> None:
        """Takes away the failures that were before this process's last success. Later ones stay, however late this is told."""
        noted = self._success_at
        succeeded = self._by_database(noted, row.now)
        if succeeded is not None and row.state == STATE_CLOSED:
            row.failures = [at for at in row.failures if at > succeeded]
        self._forget(noted)

    def _probe(self) -> Admission | Probing:
        """The one probe that half-open admits over all processes; else as `enter`."""
        token = uuid.uuid4().hex
        # Known before the row is: another thread that reads it there waits for its end.
        _probes[token] = outcome = futures.Future[None]()
        outcome.set_running_or_notify_cancel()
        won = False
        try:
            row, won = self._locked_for(token)
            seen = self._saw(row.values, row.now)
        finally:
            if not won:
                _end_probe(token)
        if won:
            return Admission(self, seen.generation, token)
        return seen.closed if seen.closed is not None else self._held_up(seen, self.clock())

    def _locked_for(self, token: str) -> tuple[_Locked, bool]:
        """The row, and whether the probe with the token is the one that it admits now."""
        with self._shared.transaction(durable=False) as connection:
            row = self._locked(connection)
            if won := row.state != STATE_CLOSED and _wait(row.values, row.now) == 0.0:
                row.machine().half_open()
                row.values |= {"prober": token, "lease_until": row.now + self._lease}
                row.write()
        return row, won

    def _answer(self, admission: Admission, outcome: str, why: str | None = None) -> None:
        """Records what became of a call. A store that is down must not hide the call's own answer: the next `admit` says so."""
        if not admission.is_probe and self._seen is not None and self._seen.generation != admission._generation:
            return  # the breaker has moved on: this says nothing about the state it is in
        try:
            with self._shared.transaction(durable=False) as connection:
                row = self._locked(connection)
                self._settle(row, admission, outcome, why)
                row.write(why=why)
            self._saw(row.values, row.now)
        except StoreError as error:
            _LOG.warning("circuit breaker %r: that a call %s could not be recorded: %s", self._name, outcome, error)
        finally:
            if admission._token is not None:
                _end_probe(admission._token)

    def _settle(self, row: _Locked, admission: Admission, outcome: str, why: str | None) -> None:
        if admission.is_probe:
            if row.values["prober"] != admission._token:
                return  # its lease ended and another probes, or somebody decided by hand
        elif row.values["generation"] != admission._generation:
            return
        self._forgive(row)
        if outcome == "released":
            row.values |= {"prober": None, "lease_until": None}
            return
        if outcome == "failed":
            row.values |= {"why": why, "by": None}
        machine = row.machine()
        with suppress(_FailedCall):
            machine.call(_fail if outcome == "failed" else _succeed)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What a process read of the row. `wait_until` is of its own monotonic clock."""

    generation: int
    closed: Admission | None  # for all calls while the breaker is closed: it holds nothing of a call
    wait_until: float
    since: dt.datetime  # as in the row
    why: str
    prober: str | None  # the token of the probe that runs


def _end_probe(token: str) -> None:
    """Wakes those of this process who wait for the probe."""
    if (outcome := _probes.pop(token, None)) is not None:
        outcome.set_result(None)


class _Locked(pybreaker.CircuitBreakerStorage, pybreaker.CircuitBreakerListener):
    """A locked row as pybreaker's storage: what the state machine does to it is written at the end, its changes of state as events."""

    def __init__(self, connection: sa.Connection, values: dict[str, Any], now: float) -> None:
        super().__init__(values["name"])
        self.values, self.now = values, now
        self.failures: list[float] = json.loads(values["failures"])
        self._connection = connection
        self._changes: list[str] = []

    def machine(self) -> pybreaker.CircuitBreaker:
        return pybreaker.CircuitBreaker(
            fail_max=self.values["fail_max"], state_storage=self, listeners=[self], name=self.name, throw_new_error_on_trip=False
        )

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        self._changes.append(new_state.name)
        was_closed = self.state == STATE_CLOSED
        self.values |= {"prober": None, "lease_until": None, "generation": self.values["generation"] + 1}
        if new_state.name == STATE_OPEN:
            self.values["retry_at"] = self.now + self.values["reset_timeout"]
            if was_closed:
                self.values["since"] = self.now
        elif new_state.name == STATE_CLOSED:
            self.values |= {"since": self.now, "retry_at": None, "why": None, "by": None}

    def write(self, *, why: str | None = None, by: str | None = None) -> None:
        """Row and events, in one transaction."""
        if self.state == STATE_CLOSED and not self.failures:
            self.values["why"] = None
        self.values["failures"] = json.dumps(self.failures[-self.values["fail_max"] :])
        self._connection.execute(sa.update(_ROWS).where(_ROWS.c.name == self.name).values(self.values))
        for change in self._changes:
            _tell(self._connection, self.name, self.now, change, why, by)

    # -- as pybreaker wants it

    @property
    def state(self) -> str:
        return str(self.values["state"])

    @state.setter
    def state(self, state: str) -> None:
        self.values["state"] = state

    @property
    def counter(self) -> int:
        return len(self.failures)

    def increment_counter(self) -> None:
        self.failures.append(self.now)

    def reset_counter(self) -> None:
        self.failures.clear()

    @property
    def success_counter(self) -> int:
        return 1  # one probe closes it

    @property
    def opened_at(self) -> dt.datetime | None:
        return _moment(self.values["since"])

    @opened_at.setter
    def opened_at(self, _: dt.datetime) -> None:
        """pybreaker takes the host's clock here; `state_change` takes the database's."""


class _FailedCall(Exception):
    """Stands for the error of a call when its outcome is told to pybreaker: the error itself stays with its caller."""


def _fail() -> None:
    raise _FailedCall


def _succeed() -> None:
    pass


# -- by hand -------------------------------------------------------------------------------------------------------------------------


def breakers(shared: SharedStore) -> list[BreakerState]:
    """All breakers that were used on a store, by name; makes nothing. Raises `StoreError`."""
    if not shared.holds(_ROWS):
        return []
    with shared.reading() as connection:
        rows = connection.execute(sa.select(_ROWS).order_by(_ROWS.c.name)).mappings().all()
        now = shared.now(connection)
    return [_state(dict(row), now) for row in rows]


def events(shared: SharedStore, name: str, *, limit: int = 20) -> list[BreakerEvent]:
    """What happened to a breaker, newest first. What it did by itself is kept for 30 days, what was done by hand for good."""
    if not shared.holds(_EVENTS):
        return []
    wanted = sa.select(_EVENTS).where(_EVENTS.c.breaker == name).order_by(_EVENTS.c.id.desc()).limit(limit)
    with shared.reading() as connection:
        rows = connection.execute(wanted).mappings().all()
    return [BreakerEvent(row["breaker"], _at(row["at"]), row["event"], row["why"], row["by"], row["process"]) for row in rows]


def open_breaker(shared: SharedStore, name: str, *, why: str, by: str, seconds: float | None = None) -> BreakerState:
    """Opens a breaker for `seconds`, or until it is closed by hand. Raises `UnknownBreakerError`, `StoreError`."""

    def change(row: _Locked) -> None:
        row.machine().open()
        row.values |= {"why": why, "by": by, "retry_at": None if seconds is None else row.now + seconds, "since": row.now}

    return _by_hand(shared, name, change, why, by)


def close_breaker(shared: SharedStore, name: str, *, why: str, by: str) -> BreakerState:
    """Closes a breaker, forgetting its failures: all calls are made again. Raises `UnknownBreakerError`, `StoreError`."""
    return _by_hand(shared, name, lambda row: row.machine().close(), why, by)


def reset_breaker(shared: SharedStore, name: str, *, why: str, by: str) -> None:
    """Forgets a breaker: as if it had never been used, but for its events. Raises `UnknownBreakerError`, `StoreError`."""
    if not shared.holds(_ROWS):
        raise _unknown(shared, name)
    with shared.transaction() as connection:
        if _lock(connection, name) is None:
            raise _unknown(shared, name)
        connection.execute(sa.delete(_ROWS).where(_ROWS.c.name == name))
        _tell(connection, name, shared.now(connection), "reset", why, by)


def _by_hand(shared: SharedStore, name: str, change: Callable[[_Locked], object], why: str, by: str) -> BreakerState:
    if not shared.holds(_ROWS):
        raise _unknown(shared, name)
    with shared.transaction() as connection:
        values = _lock(connection, name)
        if values is None:
            raise _unknown(shared, name)
        row = _Locked(connection, values, shared.now(connection))
        change(row)
        row.write(why=why, by=by)
    return _state(row.values, row.now)


def _unknown(shared: SharedStore, name: str) -> UnknownBreakerError:
    what = f"No circuit breaker {name!r} was used with {shared.name}"
    return UnknownBreakerError(what, fix="`dagster-mao breakers list` shows what there is")


# -- rows ----------------------------------------------------------------------------------------------------------------------------


def _lock(connection: sa.Connection, name: str) -> dict[str, Any] | None:
    row = connection.execute(sa.select(_ROWS).where(_ROWS.c.name == name).with_for_update()).mappings().one_or_none()
    return None if row is None else dict(row)


def _tell(connection: sa.Connection, name: str, now: float, event: str, why: str | None, by: str | None) -> None:
    row = {"breaker": name, "at": now, "event": event, "why": why, "by": by, "process": f"{socket.gethostname()}:{os.getpid()}"}
    connection.execute(sa.insert(_EVENTS).values(row))
    if event == STATE_OPEN:
        old = (_EVENTS.c.breaker == name) & (_EVENTS.c.at < now - _EVENTS_KEPT) & _EVENTS.c.by.is_(None)
        connection.execute(sa.delete(_EVENTS).where(old))


def _wait(row: dict[str, Any], now: float) -> float | None:
    """Seconds until a call may be made; None while somebody holds the breaker open."""
    if row["state"] == STATE_OPEN:
        return None if row["retry_at"] is None else max(0.0, float(row["retry_at"]) - now)
    if row["state"] == STATE_HALF_OPEN and row["lease_until"] is not None:
        return max(0.0, float(row["lease_until"]) - now)
    return 0.0


def _before(failures: str, succeeded: float) -> bool:
    """Whether a failure was before a success."""
    return any(at <= succeeded for at in json.loads(failures))


def _state(row: dict[str, Any], now: float) -> BreakerState:
    return BreakerState(
        name=row["name"],
        state=row["state"],
        failures=len(json.loads(row["failures"])),
        since=_moment(row["since"]),
        why=row["why"],
        by=row["by"],
        retry_after=None if row["state"] == STATE_CLOSED else _wait(row, now),
        fail_max=row["fail_max"],
        reset_timeout=row["reset_timeout"],
    )


def _moment(seconds: float | None) -> dt.datetime | None:
    return None if seconds is None else _at(seconds)


def _at(seconds: float) -> dt.datetime:
    return dt.datetime.fromtimestamp(seconds, dt.timezone.utc)
