"""Tries: which errors, how often, how long, and what the other side asked for. Time is injected; nothing sleeps."""

from __future__ import annotations

import asyncio
import datetime as dt
import email.message
import random
import urllib.error
from collections.abc import Callable, Coroutine
from email.utils import format_datetime
from itertools import pairwise
from typing import Any

import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st

from dagster_mao.errors import BreakerOpenError, CallTimeoutError, FencedError
from dagster_mao.gateway import Policy, TransientError
from dagster_mao.gateway._retry import aretry_call, is_transient, retry_after, retry_call

OPEN = BreakerOpenError("bank", since=dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc), why="ConnectionError", retry_after=5.0)


class Script:
    """What is called: raises these errors, one a try, then returns. Time passes only in waits, and `takes` in each try."""

    def __init__(self, *errors: BaseException, takes: float = 0.0) -> None:
        self.errors, self.takes = list(errors), takes
        self.now, self.numbers, self.waits = 0.0, [], []

    def __call__(self, number: int) -> str:
        self.numbers.append(number)
        self.now += self.takes
        if self.errors:
            raise self.errors.pop(0)
        return "done"

    async def awaited(self, number: int) -> str:
        return self(number)

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    async def asleep(self, seconds: float) -> None:
        self.sleep(seconds)

    def retried(self, policy: Policy, *, is_async: bool = False, seed: int = 0) -> str:
        uniform = random.Random(seed).uniform
        if not is_async:
            return retry_call(policy, self, sleep=self.sleep, clock=lambda: self.now, uniform=uniform)
        return run(aretry_call(policy, self.awaited, sleep=self.asleep, clock=lambda: self.now, uniform=uniform))


def run(coroutine: Coroutine[Any, Any, str]) -> str:
    return asyncio.run(coroutine)


both = pytest.mark.parametrize("is_async", [False, True])


@both
def test_what_fails_for_a_time_is_tried_again_and_each_try_knows_its_number(is_async: bool) -> None:
    script = Script(TransientError(), ConnectionResetError(), CallTimeoutError("late", seconds=1.0))
    assert script.retried(Policy(retries=3), is_async=is_async) == "done"
    assert script.numbers == [1, 2, 3, 4]


@both
def test_the_last_error_is_raised_as_it_is_when_the_tries_are_used_up(is_async: bool) -> None:
    last = ConnectionError("third")
    script = Script(TransientError(), TransientError(), last)
    with pytest.raises(ConnectionError) as caught:
        script.retried(Policy(retries=2), is_async=is_async)
    assert caught.value is last
    assert caught.value.__context__ is None  # the earlier ones are not chained: their texts would come with them
    assert len(script.waits) == 2


@both
@pytest.mark.parametrize(
    "error", [ValueError(), KeyboardInterrupt(), SystemExit(), asyncio.CancelledError(), OPEN], ids=lambda e: type(e).__name__
)
def test_other_errors_are_raised_at_once(error: BaseException, is_async: bool) -> None:
    script = Script(error)
    with pytest.raises(type(error)):
        script.retried(Policy(retries=5), is_async=is_async)
    assert script.numbers == [1]


def test_neither_what_ends_the_step_nor_an_interruption_is_transient_whatever_is_declared() -> None:
    policy = Policy(retries=5, transient=(BaseException,))
    assert is_transient(policy, ValueError())
    assert not is_transient(policy, OPEN)
    assert not is_transient(policy, FencedError("compensated"))
    assert is_transient(policy, CallTimeoutError("late", seconds=1))
    assert not is_transient(policy, KeyboardInterrupt())


def test_a_timeout_of_asyncio_is_a_timeout_on_every_python() -> None:
    assert is_transient(Policy(), asyncio.TimeoutError())
    assert not is_transient(Policy(transient=(ConnectionError,)), asyncio.TimeoutError())


@given(seed=st.integers(), retries=st.integers(1, 12))
def test_waits_double_are_spread_by_half_and_are_bounded(seed: int, retries: int) -> None:
    script = Script(*[TransientError() for _ in range(retries)])
    script.retried(Policy(retries=retries, retry_within=10_000), seed=seed)
    for number, wait in enumerate(script.waits):
        longest = min(30.0, 0.5 * 2**number)
        assert longest / 2 <= wait <= longest


def test_callers_that_failed_together_do_not_come_back_together() -> None:
    def waits(retry_after: float | None) -> list[float]:
        scripts = [Script(TransientError(retry_after=retry_after)) for _ in range(8)]
        for seed, script in enumerate(scripts):
            script.retried(Policy(retries=1), seed=seed)
        return sorted(script.waits[0] for script in scripts)

    for asked in (None, 20.0):
        found = waits(asked)
        assert all(later - sooner > 1e-4 for sooner, later in pairwise(found))
        assert found[-1] - found[0] > 0.1


def ignores_retry_after(policy: Policy, function: Callable[[int], str], sleep: Callable[[float], None]) -> str:
    """Naive: exponential backoff alone."""
    for number in range(1, policy.retries + 2):
        try:
            return function(number)
        except policy.transient:
            if number > policy.retries:
                raise
            sleep(0.5 * 2 ** (number - 1))
    raise AssertionError


class Quota(Script):
    """A server that is asked to wait: who comes before `free_at` is refused, and told how long."""

    free_at = 40.0

    def __call__(self, number: int) -> str:
        self.numbers.append(number)
        if self.now < self.free_at:
            raise TransientError("429", retry_after=self.free_at - self.now)
        return "done"


@both
def test_retry_after_is_waited_for_and_who_ignores_it_uses_up_its_tries(is_async: bool) -> None:
    policy = Policy(retries=3)
    naive = Quota()
    with pytest.raises(TransientError):
        ignores_retry_after(policy, naive, naive.sleep)
    patient = Quota()
    assert patient.retried(policy, is_async=is_async) == "done"
    assert patient.numbers == [1, 2]
    assert 40.0 <= patient.waits[0] <= 44.0


@both
def test_what_cannot_be_waited_for_in_time_is_not_waited_for_at_all(is_async: bool) -> None:
    script = Script(TransientError(retry_after=121.0))
    with pytest.raises(TransientError):
        script.retried(Policy(retries=5, retry_within=120.0), is_async=is_async)
    assert script.waits == []


def test_no_try_starts_later_than_the_time_allows_counted_from_the_first_error() -> None:
    script = Script(*[TransientError() for _ in range(100)], takes=50.0)
    with pytest.raises(TransientError):
        script.retried(Policy(retries=99, retry_within=120.0))
    assert script.numbers == [1, 2, 3, 4]  # errors at 50, 100, 150 and 200 seconds and some; no try starts after 170


# -- Retry-After ---------------------------------------------------------------------------------------------------------------------


def http_error(**headers: str) -> requests.HTTPError:
    response = requests.Response()
    response.headers.update({name.replace("_", "-"): value for name, value in headers.items()})
    return requests.HTTPError(response=response)


class BotoError(Exception):
    response = {"ResponseMetadata": {"HTTPHeaders": {"retry-after": "4"}}}


def urllib_error() -> urllib.error.HTTPError:
    headers = email.message.Message()
    headers["Retry-After"] = "6"
    return urllib.error.HTTPError("http://127.0.0.1", 429, "busy", headers, None)


WALL = 1_700_000_000.0


def http_date(at: float) -> str:
    return format_datetime(dt.datetime.fromtimestamp(at, dt.timezone.utc), usegmt=True)


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (TransientError(retry_after=7.0), 7.0),
        (TransientError(), None),
        (ValueError(), None),
        (http_error(Retry_After="3"), 3.0),
        (http_error(retry_after_ms="250"), 0.25),
        (http_error(Retry_After=http_date(WALL + 30)), 30.0),
        (http_error(Retry_After=http_date(WALL - 30)), 0.0),
        # The server's clock is an hour ahead, as its Date says.
        (http_error(Retry_After=http_date(WALL + 3630), Date=http_date(WALL + 3600)), 30.0),
        (http_error(Retry_After="soon"), None),
        (http_error(Retry_After="-3"), None),
        (http_error(Retry_After="nan"), None),
        (http_error(Retry_After="inf"), None),
        (http_error(), None),
        (BotoError(), 4.0),
        (urllib_error(), 6.0),
        (TransientError(retry_after="many"), None),  # type: ignore[arg-type]
    ],
)
def test_where_other_sides_say_how_long_to_wait(error: BaseException, seconds: float | None) -> None:
    assert retry_after(error, wall=lambda: WALL) == seconds


def test_what_a_wrapped_error_asked_for_counts() -> None:
    def wrapped() -> None:
        try:
            raise http_error(Retry_After="9")
        except requests.HTTPError as error:
            raise TransientError("busy") from error

    with pytest.raises(TransientError) as caught:
        wrapped()
    assert retry_after(caught.value) == 9.0


def test_a_call_that_goes_well_costs_next_to_nothing() -> None:
    reads = 0

    def clock() -> float:
        nonlocal reads
        reads += 1
        return 0.0

    assert retry_call(Policy(retries=3), lambda number: number, clock=clock) == 1
    assert reads == 0
