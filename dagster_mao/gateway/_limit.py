"""Rate limits over all processes on one shared store: a log of what was granted, kept for as long as it counts."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from dagster_mao.errors import RateLimitError
from dagster_mao.gateway._shared import METADATA, SharedStore

_MICRO = 1_000_000
_MOST_SLACK = 0.5  # seconds
_ENTRIES = 64  # grants that a log tells apart

_LIMITS = sa.Table(
    "mao_limits",
    METADATA,
    sa.Column("key", sa.Text, primary_key=True),
    sa.Column("seen", sa.BigInteger, nullable=False),  # the database's clock at the last look, in microseconds since the epoch
    sa.Column("number", sa.BigInteger, nullable=False),  # of the last grant
    sa.Column("grants", sa.Text, nullable=False),  # JSON: those that still count, as in `Grant`
)


class Grant(NamedTuple):
    """`permits` that may be used from `start` to `end`, microseconds since the epoch.

    Grants are numbered as they are made, without gaps; a merged one has the numbers from `first` to `number`.
    """

    first: int
    number: int
    start: int
    end: int
    permits: int


class Permit(float):
    """Seconds to wait until what was reserved may be used, 0.0 when that is now. `Limiter.settle` wants it back."""

    __slots__ = ("number", "permits")

    number: int
    permits: int

    def __new__(cls, wait: float, permits: int, number: int) -> Permit:
        made = super().__new__(cls, wait)
        made.permits, made.number = permits, number
        return made


class Limiter:
    """At most `calls` permits in any `seconds`, for all processes that use the same `key` at the same rate on one store.

    Whatever window of `seconds` one looks at, by the database's clock, no more than `calls` permits are used in it, if each is used at most
    `slack` seconds after its wait. Bursts are granted whole: `calls` at once, then, `seconds + 2 * slack` later, as many. The slack is a
    fortieth of `seconds`, and at most half a second.

    A process that uses up what it took takes twice as many next time, up to what the rate grants in the slack, so that a fast limit does
    not cost a round trip per call. What it has not used when the slack is over is given back when it next reserves. `clock` counts
    seconds, in this process alone.
    """

    def __init__(self, shared: SharedStore, key: str, calls: int, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._shared, self.key, self.calls, self._clock = shared, key, calls, clock
        self._seconds = round(seconds * _MICRO)
        self._slack = round(min(_MOST_SLACK, seconds / 40) * _MICRO)
        self._most = max(1, calls * self._slack // self._seconds)
        self._begin()

    @property
    def slack(self) -> float:
        """Seconds that a permit may be used later than it was reserved for."""
        return self._slack / _MICRO

    def reserve(self, permits: int = 1, *, not_before: float = -math.inf) -> Permit:
        """Takes permits; returns the seconds to wait until they may be used, not before a moment of the clock.

        It may wait for the database: in an event loop, see `held`. Raises `RateLimitError` when more are wanted than are ever granted at
        once, `StoreError` when the database cannot be used.
        """
        if not 0 < permits <= self.calls:
            raise RateLimitError(
                f"A call wants {permits} permits of the rate limit {self.key!r}: {self.calls} in {self._seconds / _MICRO:g} seconds",
                field="rate_limit",
                fix="raise the limit, or do less in one call",
            )
        if self._pid != os.getpid():
            self._begin()
        with self._lock:
            held = self._of_block(permits, not_before)
            return self._fetched(permits, not_before) if held is None else held

    def held(self) -> Permit | None:
        """As `reserve` of one permit, where that asks neither the database nor another thread; else None."""
        if self._pid != os.getpid() or not self._lock.acquire(blocking=False):
            return None
        try:
            return self._of_block(1, -math.inf)
        finally:
            self._lock.release()

    def settle(self, *uses: tuple[Permit, int]) -> None:
        """Corrects reservations to what was used of each (tokens are known afterwards); 0 when the call was not made after all.

        What was not used is free at once. What was used beyond counts from now on: later reservations wait for it, those made already
        stand.
        """
        if all(used == reserved.permits for reserved, used in uses):
            return
        with self._shared.transaction(durable=False) as connection:
            now, number, grants = self._log(connection)
            for reserved, used in uses:
                grants = given_back(grants, reserved.number, max(0, reserved.permits - used))
            if beyond := sum(max(0, used - reserved.permits) for reserved, used in uses):
                number += 1
                grants = [*grants, Grant(number, number, now, now, beyond)]
            self._write(connection, now, number, grants)

    # -- the block that this process holds -------------------------------------------------------------------------------------------

    def _begin(self) -> None:
        """Holds nothing: after a fork, too, because what was held is the parent's."""
        self._pid, self._lock = os.getpid(), threading.Lock()
        self._number, self._took, self._left = 0, 0, 0
        self._opens = self._closes = 0.0
        self._open = Permit(0.0, 1, 0)

    def _of_block(self, permits: int, not_before: float) -> Permit | None:
        if permits > self._left or max(now := self._clock(), not_before) > self._closes:
            return None
        self._left -= permits
        opens = max(self._opens, not_before)
        if permits == 1 and now >= opens:
            return self._open
        return Permit(max(0.0, opens - now), permits, self._number)

    def _fetched(self, permits: int, not_before: float) -> Permit:
        used = self._took - self._left
        next_size = used if self._left and self._clock() > self._closes else min(self._most, 2 * used)
        wanted = min(self.calls, max(permits, next_size))
        with self._shared.transaction(durable=False) as connection:
            before = self._clock()
            now, number, grants = self._log(connection)
            grants = given_back(grants, self._number, self._left)
            earliest = now + round(max(0.0, not_before - before) * _MICRO)
            grant = granted(grants, number + 1, earliest, wanted, calls=self.calls, seconds=self._seconds, hold=2 * self._slack)
            self._write(connection, now, number + 1, [*grants, grant])
        # `now` was between `before` and this moment, so what is counted from here is not too early, and from there not too late.
        wait = (grant.start - now) / _MICRO
        self._opens, self._closes = self._clock() + wait, before + wait + self.slack
        self._number, self._took, self._left = grant.number, wanted, wanted - permits
        self._open = Permit(0.0, 1, grant.number)
        return Permit(wait, permits, grant.number)

    # -- the log ---------------------------------------------------------------------------------------------------------------------

    def _log(self, connection: sa.Connection) -> tuple[int, int, list[Grant]]:
        """The database's clock, the number of the last grant, and the grants that still count. Locked until the transaction ends."""
        row = connection.execute(_READ, {"wanted": self.key}).one_or_none()
        if row is None:
            insert = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
            first = insert(_LIMITS).values(key=self.key, seen=0, number=0, grants="[]")
            connection.execute(first.on_conflict_do_nothing())
            row = connection.execute(_READ, {"wanted": self.key}).one()
        now = round(self._shared.now(connection) * _MICRO)
        # A clock that was set back: the grants are at least as old as they were at the last look.
        back = min(0, now - row.seen)
        grants = [Grant(first, last, start + back, end + back, permits) for first, last, start, end, permits in json.loads(row.grants)]
        return now, row.number, [grant for grant in grants if grant.end + self._seconds > now]

    def _write(self, connection: sa.Connection, now: int, number: int, grants: Sequence[Grant]) -> None:
        text = json.dumps(merged(grants, _ENTRIES), separators=(",", ":"))
        connection.execute(_WRITE, {"wanted": self.key, "seen": now, "number": number, "grants": text})


_READ = sa.select(_LIMITS.c.seen, _LIMITS.c.number, _LIMITS.c.grants).where(_LIMITS.c.key == sa.bindparam("wanted")).with_for_update()
_WRITE = _LIMITS.update().where(_LIMITS.c.key == sa.bindparam("wanted"))


def granted(grants: Sequence[Grant], number: int, earliest: int, permits: int, *, calls: int, seconds: int, hold: int) -> Grant:
    """The next grant, as early as can be from `earliest` on.

    Of those made before, all that end less than `seconds` before it starts count, with it no more than `calls`. So no window of `seconds`
    holds more: look at the last made of the grants in it; all others in it were counted then.
    """
    start, counted = earliest, permits + sum(grant.permits for grant in grants)
    for grant in sorted(grants, key=lambda grant: grant.end):
        if counted <= calls:
            break
        counted -= grant.permits
        start = max(start, grant.end + seconds)
    return Grant(number, number, start, start + hold, permits)


def given_back(grants: Sequence[Grant], number: int, permits: int) -> list[Grant]:
    """The grants, that of the number with `permits` less; the same where it counts no more."""
    left = [grant._replace(permits=max(0, grant.permits - permits)) if grant.first <= number <= grant.number else grant for grant in grants]
    return [grant for grant in left if grant.permits]


def merged(grants: Sequence[Grant], most: int) -> list[Grant]:
    """At most so many grants that allow no more: neighbours become one, that lasts from the first's start to the last's end."""
    told = list(grants)
    while len(told) > most:
        spans = [max(one.end, two.end) - min(one.start, two.start) for one, two in pairwise(told)]
        at = spans.index(min(spans))
        one, two = told[at : at + 2]
        start, end = min(one.start, two.start), max(one.end, two.end)
        told[at : at + 2] = [Grant(one.first, two.number, start, end, one.permits + two.permits)]
    return told
