"""The breaker in one process, where two breakers by one name stand for two processes; on SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import datetime as dt
import logging
import math
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pybreaker
import pytest
import sqlalchemy as sa

from dagster_mao.errors import BreakerOpenError, FencedError, StoreError, UnknownBreakerError
from dagster_mao.gateway import Breaker
from dagster_mao.gateway._breaker import (
    LOOK_EVERY,
    SharedBreaker,
    breakers,
    close_breaker,
    events,
    open_breaker,
    reset_breaker,
)
from dagster_mao.gateway._shared import SharedStore
from tests.gateway.crew import age

DECLARED = Breaker(fail_max=3, reset_timeout=30.0)


class Clock:
    def __init__(self, at: float) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at


class Rejected(Exception):
    """The caller's own fault."""


def breaker(shared: SharedStore, declared: Breaker = DECLARED, **options: object) -> SharedBreaker:
    return SharedBreaker(shared, "bank", declared, **options)


def fail(breaker: SharedBreaker, times: int = 1) -> None:
    for _ in range(times):
        breaker.admit().failed(TimeoutError("secret-4711"))


def probe(shared: SharedStore, **options: object) -> SharedBreaker:
    """A breaker that is due for a probe."""
    tripped = breaker(shared, **options)
    fail(tripped, 3)
    age(shared, 31)
    return breaker(shared, **options)


def state(shared: SharedStore) -> tuple[str, int]:
    (found,) = breakers(shared)
    return found.state, found.failures


@contextmanager
def statements() -> Iterator[list[str]]:
    """The SQL that is sent meanwhile."""
    sent: list[str] = []

    def note(connection: object, cursor: object, statement: str, *_: object) -> None:
        sent.append(statement)

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)


# -- what counts ---------------------------------------------------------------------------------------------------------------------


def test_it_opens_after_failures_in_a_row(shared: SharedStore) -> None:
    bank = breaker(shared)
    fail(bank, 2)
    bank.admit().succeeded()
    fail(bank, 2)
    assert state(shared) == ("closed", 2), "a success in between ends the row: in one process that is exact"
    fail(bank)
    assert state(shared) == ("open", 3)
    with pytest.raises(BreakerOpenError) as refused:
        bank.admit()
    assert (refused.value.breaker, refused.value.why) == ("bank", "TimeoutError")
    assert abs(refused.value.since - dt.datetime.now(dt.timezone.utc)) < dt.timedelta(seconds=60)
    assert refused.value.since.tzinfo is not None
    assert 0 < refused.value.retry_after <= 30
    assert "4711" not in str(refused.value)
    assert str(pickle.loads(pickle.dumps(refused.value))) == str(refused.value)  # noqa: S301


@pytest.mark.parametrize(
    "error", [Rejected(), KeyboardInterrupt(), asyncio.CancelledError(), StoreError("down"), FencedError("compensated")]
)
def test_errors_that_are_not_counted_count_nothing(shared: SharedStore, error: BaseException) -> None:
    bank = breaker(shared, not_counted=(Rejected,))
    fail(bank, 2)
    for _ in range(5):
        bank.admit().failed(error)
    assert state(shared) == ("closed", 2), "neither failures, nor successes that end the row"


@pytest.mark.parametrize("error", [Rejected(), asyncio.CancelledError()])
def test_errors_that_are_not_counted_close_nothing(shared: SharedStore, error: BaseException) -> None:
    bank = probe(shared, not_counted=(Rejected,))
    admitted = bank.admit()
    assert admitted.is_probe
    admitted.failed(error)
    assert state(shared)[0] == "half-open"
    second = bank.admit()
    assert second.is_probe, "the place is free at once"
    with pytest.raises(BreakerOpenError):
        bank.admit()
    second.succeeded()
    assert state(shared) == ("closed", 0)


def test_pybreaker_takes_an_excluded_error_for_a_success() -> None:
    """Why its `exclude` is not used: an error of the caller's closes a breaker whose other side is as dead as before."""
    naive = pybreaker.CircuitBreaker(fail_max=1, exclude=[Rejected])
    naive.half_open()

    def reject() -> None:
        raise Rejected

    with pytest.raises(Rejected):
        naive.call(reject)
    assert naive.current_state == pybreaker.STATE_CLOSED


def test_what_was_admitted_before_a_change_says_nothing_after_it(shared: SharedStore) -> None:
    bank = breaker(shared)
    late_failures, late_success = [bank.admit() for _ in range(3)], bank.admit()
    fail(bank, 3)
    for late in late_failures[:2]:
        late.failed(TimeoutError())
    assert [event.event for event in events(shared, "bank")] == ["open"]
    age(shared, 31)
    probing = breaker(shared).admit()
    late_success.succeeded()
    bank.flush()
    assert state(shared)[0] == "half-open", "only the probe closes it"
    probing.succeeded()
    late_failures[2].failed(TimeoutError())
    assert state(shared) == ("closed", 0)


def test_breakers_by_one_name_are_one_and_others_are_not(shared: SharedStore) -> None:
    score, fraud, other = breaker(shared), breaker(shared), SharedBreaker(shared, "bureau", DECLARED)
    for each in (score, fraud, score, other):
        fail(each)
    assert [(found.name, found.state, found.failures) for found in breakers(shared)] == [("bank", "open", 3), ("bureau", "closed", 1)]


def test_the_error_that_a_probe_fails_with_is_told_and_since_stays(shared: SharedStore) -> None:
    bank = probe(shared)
    (before,) = breakers(shared)
    bank.admit().failed(ConnectionError())
    (after,) = breakers(shared)
    assert (after.state, after.why, after.since) == ("open", "ConnectionError", before.since)
    assert 29 < (after.retry_after or 0) <= 30
    assert [event.event for event in events(shared, "bank")] == ["open", "half-open", "open"]


# -- successes are told late ---------------------------------------------------------------------------------------------------------


def test_a_success_that_is_told_late_takes_nothing_away_that_came_after_it(shared: SharedStore) -> None:
    quick, slow = breaker(shared), breaker(shared)
    fail(quick)
    _failures_ago(shared, 60.0, times=1)  # a moment ago a busy machine might not tell it from the success
    slow.admit().succeeded()
    fail(quick)
    slow.flush()
    assert state(shared) == ("closed", 1), "the failure before the success is gone, the one after it is not"
    slow.flush()
    assert state(shared) == ("closed", 1)


def test_a_success_that_dies_with_its_process_opens_it_sooner_and_never_later(shared: SharedStore) -> None:
    """What laziness can cost: here the row was ended after two failures, and nobody was told."""
    bank, dying = breaker(shared), breaker(shared)
    fail(bank, 2)
    dying.admit().succeeded()
    del dying
    fail(bank)
    assert state(shared) == ("open", 3)


def test_a_success_is_told_when_the_process_looks_again(shared: SharedStore) -> None:
    clock = Clock(1000.0)
    bank, other = breaker(shared), breaker(shared, clock=clock)
    fail(bank, 2)
    other.admit().succeeded()
    other.admit()
    assert state(shared) == ("closed", 2)
    clock.at += LOOK_EVERY
    # The fake clock says that the success was LOOK_EVERY seconds ago: it must still be after the failures.
    age(shared, 0)
    _failures_ago(shared, 1.0)
    other.admit()
    assert state(shared) == ("closed", 0)


def _failures_ago(shared: SharedStore, seconds: float, times: int = 2) -> None:
    with shared.transaction() as connection:
        at = [shared.now(connection) - seconds] * times
        connection.execute(sa.text("UPDATE mao_breakers SET failures = :at"), {"at": str(at)})


def test_calls_of_a_closed_breaker_and_refusals_cost_no_sql(shared: SharedStore) -> None:
    clock = Clock(1000.0)
    bank = breaker(shared, clock=clock)
    bank.admit().succeeded()
    with statements() as sent:
        for _ in range(10_000):
            bank.admit().succeeded()
    assert sent == []
    fail(bank, 3)
    with statements() as sent:
        for _ in range(1_000):
            with pytest.raises(BreakerOpenError):
                bank.admit()
    assert sent == []


def test_a_process_that_only_succeeds_reads_and_never_writes(shared: SharedStore) -> None:
    clock = Clock(1000.0)
    bank = breaker(shared, clock=clock)
    bank.admit().succeeded()
    with statements() as sent:
        for _ in range(20):
            clock.at += LOOK_EVERY
            bank.admit().succeeded()
    assert len([statement for statement in sent if "mao_breakers" in statement]) == 20
    assert not [statement for statement in sent if statement.startswith(("UPDATE", "INSERT", "BEGIN IMMEDIATE"))]


# -- clocks --------------------------------------------------------------------------------------------------------------------------


def test_on_sqlite_the_hosts_clock_counts(tmp_path: Path) -> None:
    host, own = Clock(5_000.0), Clock(7.0)
    bank = SharedBreaker(SharedStore(tmp_path / "shared.db", clock=host), "bank", DECLARED, clock=own)
    fail(bank, 3)
    for clock in (host, own):
        clock.at += 29.9
    with pytest.raises(BreakerOpenError):
        bank.admit()
    for clock in (host, own):
        clock.at += 0.2
    assert bank.admit().is_probe


def test_on_postgres_the_hosts_clock_is_not_asked(postgres_url: str) -> None:
    shared = SharedStore(postgres_url, clock=lambda: math.nan)
    assert probe(shared).admit().is_probe
    shared.close()


# -- by hand -------------------------------------------------------------------------------------------------------------------------


def test_by_hand(shared: SharedStore) -> None:
    bank = breaker(shared)
    bank.admit()
    opened = open_breaker(shared, "bank", why="maintenance", by="ford", seconds=100)
    assert (opened.state, opened.why, opened.by) == ("open", "maintenance", "ford")
    assert 99 < (opened.retry_after or 0) <= 100
    held = open_breaker(shared, "bank", why="for longer", by="ford")
    assert held.retry_after is None
    with pytest.raises(BreakerOpenError, match="until it is closed by hand") as refused:
        breaker(shared).admit()
    assert refused.value.retry_after is None
    closed = close_breaker(shared, "bank", why="done", by="trillian")
    assert (closed.state, closed.why, closed.by) == ("closed", None, None)
    assert not breaker(shared).admit().is_probe
    reset_breaker(shared, "bank", why="gone", by="ford")
    assert breakers(shared) == []
    told = [(event.event, event.why, event.by) for event in events(shared, "bank")]
    assert told == [
        ("reset", "gone", "ford"),
        ("closed", "done", "trillian"),
        ("open", "for longer", "ford"),
        ("open", "maintenance", "ford"),
    ]


def test_a_probe_that_was_overtaken_by_hand_decides_nothing(shared: SharedStore) -> None:
    probing = probe(shared).admit()
    open_breaker(shared, "bank", why="no", by="ford")
    probing.succeeded()
    assert breakers(shared)[0].state == "open"
    reset_breaker(shared, "bank", why="gone", by="ford")
    probing.failed(TimeoutError())
    assert [(found.state, found.failures) for found in breakers(shared)] in ([], [("closed", 0)])


def test_what_was_never_used_cannot_be_decided_on(shared: SharedStore) -> None:
    assert breakers(shared) == []
    assert events(shared, "bank") == []
    if shared.file is not None:
        assert not shared.file.exists(), "looking makes nothing"
    for _ in range(2):
        for decide in (open_breaker, close_breaker, reset_breaker):
            with pytest.raises(UnknownBreakerError, match="no such"):
                decide(shared, "no such", why="x", by="y")
        breaker(shared).admit()


def test_events_of_its_own_are_kept_for_a_month_and_those_by_hand_for_good(shared: SharedStore) -> None:
    bank = breaker(shared)
    fail(bank, 3)
    open_breaker(shared, "bank", why="no", by="ford")
    close_breaker(shared, "bank", why="yes", by="ford")
    with shared.transaction() as connection:
        connection.execute(sa.text("UPDATE mao_breaker_events SET at = at - 31 * 86400"))
    fail(breaker(shared), 3)
    assert [(event.event, event.by) for event in events(shared, "bank")] == [("open", None), ("closed", "ford"), ("open", "ford")]


# -- a store that is down ------------------------------------------------------------------------------------------------------------


def test_a_store_that_fails_does_not_hide_what_became_of_a_call(shared: SharedStore, caplog: pytest.LogCaptureFixture) -> None:
    bank = breaker(shared)
    admitted = bank.admit()
    with shared.transaction() as connection:
        connection.execute(sa.text("DROP TABLE mao_breakers"))
    with caplog.at_level(logging.WARNING):
        admitted.succeeded()
        admitted.failed(TimeoutError("secret-4711"))
    assert "could not be recorded" in caplog.text
    assert "4711" not in caplog.text
    with pytest.raises(StoreError, match="mao_breakers"):
        breaker(shared).admit()
