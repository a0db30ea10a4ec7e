"""Each try of a call is told: what became of it, how long it took, what it used. Also of those that failed, hung or were refused."""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import dagster_mao as mao
from dagster_mao.gateway import Breaker, CallRecord, Gateway, Policy
from dagster_mao.gateway._limit import _LIMITS
from dagster_mao.gateway._shared import SharedStore
from tests.gateway.called import after_it, chatters, outlived, outlived_by_a_fork, tells
from tests.gateway.crew import until

UNGUARDED = Policy(keep_answers=0)
both = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


class Calls:
    """Calls through a gateway, and what is told of their tries."""

    def __init__(self, policy: Policy, folder: Path | str = "nowhere", *, is_async: bool = False) -> None:
        self.gateway = Gateway(policy, "shop.asking", str(Path(folder) / "shared.db"))
        self.told: list[CallRecord] = []
        self._is_async = is_async

    def __call__(self, function: Any, *args: Any) -> Any:
        if not self._is_async:
            return self.gateway.call(function, *args, observe=self.told.append)

        async def asynchronous(*args: Any) -> Any:
            await asyncio.sleep(0)
            return function(*args)

        return asyncio.run(self.gateway.acall(asynchronous, *args, observe=self.told.append))

    def without_times(self) -> list[CallRecord]:
        return [record._replace(started=0.0, latency=0.0) for record in self.told]


def failing(times: int, error: type[Exception] = ConnectionError) -> Any:
    """A function that tells 10 tokens each time it is called, and fails so many times first."""
    called = iter(range(1_000_000))

    def function() -> str:
        mao.usage(input_tokens=10, model="small")
        if next(called) < times:
            raise error("4711")
        return "answer"

    return function


@both
def test_an_answered_call_is_told_with_all_that_it_used(is_async: bool) -> None:
    calls = Calls(UNGUARDED, is_async=is_async)
    before = time.time()
    assert calls(tells, "answer") == "answer"
    assert calls.without_times() == [CallRecord(1, 0.0, 0.0, "answered", None, "second", 30, 1, 0.5, None)]
    (record,) = calls.told
    assert before <= record.started <= time.time()
    assert record.latency > 0


@both
def test_each_try_is_told_for_itself(tmp_path: Path, is_async: bool) -> None:
    calls = Calls(Policy(retries=2, breaker=Breaker()), tmp_path, is_async=is_async)
    assert calls(failing(2)) == "answer"
    failed = CallRecord(1, 0.0, 0.0, "failed", "ConnectionError", "small", 10, 0, 0.0, "closed")
    assert calls.without_times() == [failed, failed._replace(number=2), failed._replace(number=3, outcome="answered", error=None)]
    assert "4711" not in str(calls.told)


@both
def test_what_an_open_breaker_refuses_is_told_as_no_call(tmp_path: Path, is_async: bool) -> None:
    calls = Calls(Policy(breaker=Breaker(fail_max=1, reset_timeout=600)), tmp_path, is_async=is_async)
    with pytest.raises(ConnectionError):
        calls(failing(1))
    with pytest.raises(mao.BreakerOpenError):
        calls(failing(0))
    assert calls.without_times()[1] == CallRecord(0, 0.0, 0.0, "refused", "dagster_mao.errors.BreakerOpenError", breaker="open")


def test_a_probe_is_told_as_one(tmp_path: Path) -> None:
    calls = Calls(Policy(breaker=Breaker(fail_max=1, reset_timeout=0.01)), tmp_path)
    with pytest.raises(ConnectionError):
        calls(failing(1))

    def answered() -> bool:
        try:
            return bool(calls(failing(0)))
        except mao.BreakerOpenError:
            return False

    until(answered)
    assert (calls.told[-1].outcome, calls.told[-1].breaker) == ("answered", "half-open")


def test_what_else_keeps_a_call_from_being_made_is_told_as_no_call(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    calls = Calls(Policy(breaker=Breaker()), tmp_path / "file")
    with pytest.raises(mao.StoreError):
        calls(failing(0))
    assert calls.without_times() == [CallRecord(0, 0.0, 0.0, "failed", "dagster_mao.errors.StoreError")]


def test_the_wait_for_the_rate_limit_is_no_latency(tmp_path: Path) -> None:
    calls = Calls(Policy(rate_limit="1/second"), tmp_path)
    calls(failing(0))
    asked = time.time()
    calls(failing(0))
    waited = calls.told[1].started - asked
    assert calls.told[1].latency < waited


# -- timeouts ------------------------------------------------------------------------------------------------------------------------

TIMED_OUT = CallRecord(1, 0.0, 0.0, "timed_out", "dagster_mao.errors.CallTimeoutError", "second", 30, 1, 0.5, None)


def test_what_a_coroutine_told_before_its_timeout_counts() -> None:
    calls = Calls(Policy(timeout=0.2, keep_answers=0))

    async def hangs() -> None:
        tells("answer")
        await asyncio.Event().wait()

    with pytest.raises(mao.CallTimeoutError):
        asyncio.run(calls.gateway.acall(hangs, observe=calls.told.append))
    assert calls.without_times() == [TIMED_OUT]


def test_what_a_thread_told_before_its_timeout_counts_and_what_it_tells_later_goes_to_no_other_try() -> None:
    # The second try waits for what the first one does late, which takes no time.
    calls = Calls(Policy(timeout=2.0, retries=1, retry_within=60, keep_answers=0))
    released, gone = threading.Event(), threading.Event()
    tries = iter((1, 2))

    def stuck_at_first() -> str:
        if next(tries) == 1:
            tells("answer")
            released.wait(60)
            mao.usage(input_tokens=1_000_000)
            gone.set()
            return "too late"
        released.set()
        gone.wait(60)
        mao.usage(input_tokens=2)
        return "answer"

    assert calls(stuck_at_first) == "answer"
    assert calls.without_times() == [TIMED_OUT, CallRecord(2, 0.0, 0.0, "answered", input_tokens=2)]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("answer", TIMED_OUT._replace(outcome="answered", error=None)),
        ("fail", TIMED_OUT._replace(outcome="failed", error="ConnectionError")),
        ("hang", TIMED_OUT),
    ],
)
def test_what_a_child_process_told_comes_back(how: str, expected: CallRecord) -> None:
    calls = Calls(Policy(timeout=2.0 if how == "hang" else 60.0, isolate=True, keep_answers=0))
    if how == "answer":
        assert calls(tells, how) == how
    else:
        with pytest.raises((ConnectionError, mao.CallTimeoutError)):
            calls(tells, how)
    assert calls.without_times() == [expected]


def test_what_outlives_a_call_in_its_child_tells_the_next_one_nothing() -> None:
    calls = Calls(Policy(timeout=60, isolate=True, keep_answers=0))
    calls(outlived)
    calls(after_it)
    assert [record.input_tokens for record in calls.told] == [1, 2]


def test_what_a_call_forks_tells_nothing() -> None:
    """It has the connection to the parent, on which the next call's answer is awaited."""
    calls = Calls(Policy(timeout=60, isolate=True, keep_answers=0))
    calls(outlived_by_a_fork)
    calls(tells, "answer")
    assert [record.input_tokens for record in calls.told] == [1, 30]


def test_a_call_in_a_child_that_never_stops_telling_is_ended_too() -> None:
    calls = Calls(Policy(timeout=0.5, isolate=True, keep_answers=0))
    with pytest.raises(mao.CallTimeoutError):
        calls(chatters)
    assert calls.told[0].outcome == "timed_out"
    assert calls.told[0].input_tokens > 0


# -- many at once --------------------------------------------------------------------------------------------------------------------


def test_tasks_are_told_apart() -> None:
    gateway = Gateway(UNGUARDED, "shop.asking", None)

    async def asking(number: int, told: list[CallRecord]) -> None:
        async def call() -> None:
            for _ in range(number):
                mao.usage(input_tokens=1)
                await asyncio.sleep(0)

        await gateway.acall(call, observe=told.append)

    async def main() -> list[list[CallRecord]]:
        told: list[list[CallRecord]] = [[] for _ in range(20)]
        await asyncio.gather(*(asking(number, mine) for number, mine in enumerate(told)))
        return told

    assert [[record.input_tokens for record in mine] for mine in asyncio.run(main())] == [[number] for number in range(20)]


def test_threads_are_told_apart() -> None:
    gateway = Gateway(UNGUARDED, "shop.asking", None)
    together = threading.Barrier(8)

    def asking(number: int) -> list[CallRecord]:
        told: list[CallRecord] = []

        def call() -> None:
            together.wait(60)
            for _ in range(1000):
                mao.usage(input_tokens=number)

        gateway.call(call, observe=told.append)
        return told

    with ThreadPoolExecutor(8) as pool:
        assert [[record.input_tokens for record in told] for told in pool.map(asking, range(8))] == [[1000 * n] for n in range(8)]


def test_threads_of_one_call_lose_nothing() -> None:
    """Eight threads tell at the same time."""
    calls = Calls(UNGUARDED)

    def call() -> None:
        together = threading.Barrier(8)

        def tell() -> None:
            together.wait(60)
            for _ in range(2000):
                mao.usage(input_tokens=1, output_tokens=None, cost=None)

        with ThreadPoolExecutor(8) as pool:
            for told in [pool.submit(contextvars.copy_context().run, tell) for _ in range(8)]:
                told.result()

    calls(call)
    assert calls.told[0].input_tokens == 16_000


def test_a_thread_that_asyncio_starts_knows_its_call() -> None:
    calls = Calls(UNGUARDED)

    async def call() -> str:
        return await asyncio.to_thread(tells, "answer")

    asyncio.run(calls.gateway.acall(call, observe=calls.told.append))
    assert calls.told[0].input_tokens == 30


# -- interrupted ---------------------------------------------------------------------------------------------------------------------


def reservations(shared: SharedStore) -> int:
    with shared.reading() as connection:
        return connection.scalar(sa.select(_LIMITS.c.number)) or 0


def test_a_call_that_is_cancelled_is_told_with_what_it_used(tmp_path: Path) -> None:
    """It may have been paid for. One that still waited for its turn is no call."""
    calls = Calls(Policy(rate_limit="1/hour", breaker=Breaker()), tmp_path)

    async def main() -> None:
        running = asyncio.Event()

        async def hangs() -> None:
            mao.usage(input_tokens=10)
            running.set()
            await asyncio.Event().wait()

        first = asyncio.ensure_future(calls.gateway.acall(hangs, observe=calls.told.append))
        await running.wait()
        waiting = asyncio.ensure_future(calls.gateway.acall(hangs, observe=calls.told.append))
        while reservations(shared) < 2:
            await asyncio.sleep(0)
        for task in (first, waiting):
            task.cancel()
        await asyncio.gather(first, waiting, return_exceptions=True)

    shared = SharedStore(tmp_path / "shared.db")
    asyncio.run(main())
    assert calls.without_times() == [
        CallRecord(1, 0.0, 0.0, "failed", "asyncio.exceptions.CancelledError", input_tokens=10, breaker="closed")
    ]


class Hanging:
    def __await__(self) -> Any:
        yield


def test_a_coroutine_that_is_closed_elsewhere_is_told_and_closed(tmp_path: Path) -> None:
    """As the garbage collector closes one whose loop is gone: in its own context, not in the call's."""
    calls = Calls(Policy(breaker=Breaker()), tmp_path)

    async def hangs() -> None:
        mao.usage(input_tokens=10)
        await Hanging()

    coroutine = calls.gateway.acall(hangs, observe=calls.told.append)
    contextvars.copy_context().run(coroutine.send, None)
    coroutine.close()
    assert calls.without_times() == [CallRecord(1, 0.0, 0.0, "failed", "GeneratorExit", input_tokens=10, breaker="closed")]


def test_outside_of_a_call_usage_does_nothing() -> None:
    assert tells("answer") == "answer"
    calls = Calls(UNGUARDED)
    calls(lambda: None)
    mao.usage(input_tokens=5)
    assert calls.told[0].input_tokens == 0
