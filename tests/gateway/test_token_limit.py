"""Tokens per minute: an estimate is reserved before a call and corrected to what it used. Beside calls per minute, over processes."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

import dagster_mao as mao
from dagster_mao.gateway import Breaker, CallRecord, Gateway, Policy, _gateway, shared_store
from dagster_mao.gateway._breaker import open_breaker
from dagster_mao.gateway._limit import _LIMITS, Limiter
from dagster_mao.gateway._quota import Quota
from dagster_mao.gateway._shared import SharedStore
from tests.gateway.crew import Member, until
from tests.gateway.test_limit import Time, most_in_a_window

TOKENS, CALLS = "tokens of shop.asking", "shop.asking"
both = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


def counted(shared: SharedStore, key: str = TOKENS) -> int:
    """What a limit counts now."""
    with shared.reading() as connection:
        grants = connection.scalar(sa.select(_LIMITS.c.grants).where(_LIMITS.c.key == key))
    return sum(grant[-1] for grant in json.loads(grants or "[]"))


class Asking:
    """Calls that use so many tokens each."""

    def __init__(self, folder: Path, *, is_async: bool = False, name: str = "shop.asking", **declared: Any) -> None:
        self.database = str(folder / "shared.db")
        self.shared = shared_store(self.database)
        self.gateway = Gateway(Policy(**{"token_limit": "10000/hour", "tokens_per_call": 100} | declared), name, self.database)
        self.is_async = is_async

    def __call__(self, tokens: int | None, error: BaseException | None = None, before: Callable[[], object] = lambda: None) -> None:
        def call() -> None:
            before()
            mao.usage(input_tokens=tokens, model="small")
            if error is not None:
                raise error

        async def asynchronous() -> None:
            await asyncio.sleep(0)
            call()

        try:
            if self.is_async:
                asyncio.run(self.gateway.acall(asynchronous))
            else:
                self.gateway.call(call)
        finally:
            self.gateway.flush()

    @property
    def counted(self) -> int:
        return counted(self.shared)


# -- what counts ---------------------------------------------------------------------------------------------------------------------


@both
def test_a_call_counts_as_its_estimate_and_then_as_what_it_used(tmp_path: Path, is_async: bool) -> None:
    asking, during = Asking(tmp_path, is_async=is_async), list[int]()
    asking(30, before=lambda: during.append(asking.counted))
    assert (during, asking.counted) == ([100], 30)
    asking(70, before=lambda: during.append(asking.counted))
    assert (during[1], asking.counted) == (30 + 30, 30 + 70), "the estimate is now what was seen"
    asking(50, before=lambda: during.append(asking.counted))
    assert during[2] == 100 + (30 + 70) // 2
    assert asking.counted == 150


@both
def test_what_a_call_counts_that_does_not_tell_all(tmp_path: Path, is_async: bool) -> None:
    """Answered and silent: the estimate. Failed and silent: nothing. Failed: what it told."""
    asking = Asking(tmp_path, is_async=is_async)
    asking(None)
    assert asking.counted == 100
    with pytest.raises(ConnectionError):
        asking(None, ConnectionError())
    assert asking.counted == 100
    with pytest.raises(ConnectionError):
        asking(7, ConnectionError())
    assert asking.counted == 107
    asking(0)
    assert asking.counted == 107, "it says that it used none"
    asking(None)
    assert asking.counted == 207, "failures are no model of what a call uses, and nothing none"


def test_a_call_that_was_ended_counts_at_least_as_estimated(tmp_path: Path) -> None:
    asking = Asking(tmp_path, timeout=0.5)
    released = threading.Event()
    for tokens, counts in ((None, 100), (40, 200), (150, 350)):
        with pytest.raises(mao.CallTimeoutError):
            asking.gateway.call(lambda used=tokens: (mao.usage(input_tokens=used), released.wait(60)))
        assert asking.counted == counts
    released.set()
    with pytest.raises(KeyboardInterrupt):
        Asking(tmp_path)(None, KeyboardInterrupt())
    assert asking.counted == 450


def test_what_a_call_used_is_all_that_it_told(tmp_path: Path) -> None:
    asking = Asking(tmp_path)

    def call() -> None:
        mao.usage(input_tokens=10, output_tokens=1)
        mao.usage(output_tokens=2, cost=0.1)

    asking.gateway.call(call)
    assert asking.counted == 13


def test_each_try_counts(tmp_path: Path) -> None:
    asking, tries = Asking(tmp_path, retries=2, retry_within=60), iter((ConnectionError(), ConnectionError(), None))

    def call() -> None:
        mao.usage(input_tokens=10)
        if error := next(tries):
            raise error

    asking.gateway.call(call)
    assert asking.counted == 30


def test_what_was_used_beyond_the_estimate_delays_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr(_gateway.time, "sleep", waited.append)
    asking = Asking(tmp_path)
    asking(9_950)
    assert not waited
    asking(9_950)
    assert waited == [pytest.approx(3601, abs=5)]


def test_a_long_wait_is_told_once_in_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Else nobody knows why a step does nothing for an hour."""
    monkeypatch.setattr(_gateway.time, "sleep", lambda _: None)
    asking = Asking(tmp_path, token_limit=None, rate_limit="1/hour")
    for _ in range(4):
        asking(None)
    assert [record.getMessage() for record in caplog.records] == ["a call of shop.asking waits for its limit: 3601 seconds"]


def test_an_estimate_is_never_more_than_the_limit(tmp_path: Path) -> None:
    """One call may use more than the limit of a whole window. It is made when the window is empty, and the next one when it is again."""
    asking = Asking(tmp_path, token_limit="50/hour")
    asking(5_000)
    assert asking.gateway._quota is not None
    assert asking.gateway._quota.estimate == 50
    assert asking.counted == 5_000


def test_it_forgets_how_calls_were_long_ago(tmp_path: Path) -> None:
    quota = Quota(None, Limiter(SharedStore(tmp_path / "shared.db"), "api", 10_000_000, 60.0), 1000)
    for used, calls in ((100, 1000), (900, 200)):
        for _ in range(calls):
            quota.used(quota.reserve(), used, None)
    assert 890 < quota.estimate <= 900


# -- who shares it -------------------------------------------------------------------------------------------------------------------


def test_agents_with_one_key_share_the_tokens_and_others_do_not(tmp_path: Path) -> None:
    one, other = (Asking(tmp_path, name=name, rate_key="endpoint", rate_limit="50/hour") for name in ("shop.one", "shop.other"))
    alone = Asking(tmp_path)
    for asking in (one, other, alone):
        asking(10)
    assert counted(one.shared, "tokens of endpoint") == 20
    assert counted(one.shared, "endpoint") == 2
    assert alone.counted == 10


# -- nothing stays reserved for a call that is not made ------------------------------------------------------------------------------

FULL = {"rate_limit": "1/hour", "token_limit": "150/hour", "tokens_per_call": 100}


def all_counted(shared: SharedStore) -> tuple[int, int]:
    return counted(shared, CALLS), counted(shared)


def test_an_interrupted_wait_gives_both_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asking = Asking(tmp_path, **FULL)
    asking(100)

    def interrupted(_: float) -> None:
        assert all_counted(asking.shared) == (2, 200)
        raise KeyboardInterrupt

    monkeypatch.setattr(_gateway.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        asking(100)
    assert all_counted(asking.shared) == (1, 100)


def test_a_breaker_that_opens_during_the_wait_gives_both_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asking = Asking(tmp_path, **FULL, breaker=Breaker())
    asking(100)
    monkeypatch.setattr(_gateway.time, "sleep", lambda _: open_breaker(asking.shared, "shop.asking", why="drill", by="ford"))
    monkeypatch.setattr("dagster_mao.gateway._breaker.LOOK_EVERY", 0.0)
    asking.gateway = Gateway(Policy(**FULL, breaker=Breaker()), "shop.asking", asking.database)
    with pytest.raises(mao.BreakerOpenError):
        asking(100)
    assert all_counted(asking.shared) == (1, 100)


def test_a_cancelled_wait_gives_both_back(tmp_path: Path) -> None:
    asking = Asking(tmp_path, **FULL)
    asking(100)

    async def main() -> None:
        waiting = asyncio.ensure_future(asking.gateway.acall(asyncio.sleep, 0))
        while all_counted(asking.shared) != (2, 200):
            await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    asyncio.run(main())
    asking.gateway.flush()
    assert all_counted(asking.shared) == (1, 100)


@pytest.mark.parametrize("declared", [{"rate_limit": "10/hour"}, {"token_limit": "1000/hour"}, FULL])
def test_whoever_is_cancelled_while_it_reserves_leaves_nothing_reserved(tmp_path: Path, declared: dict[str, Any]) -> None:
    """The database is asked in a thread, which goes on. So does the queue before it."""
    asking = Asking(tmp_path, **{"token_limit": None} | declared)

    async def main() -> None:
        with asking.shared.transaction():  # nobody can reserve meanwhile
            tasks = [asyncio.ensure_future(asking.gateway.acall(asyncio.sleep, 0)) for _ in range(5)]
            for _ in range(10):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        assert all(task.cancelled() for task in tasks)

    asyncio.run(main())
    asking.gateway.flush()
    assert all_counted(asking.shared) == (0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_whatever_becomes_of_calls_the_limits_count_those_that_were_made(tmp_path: Path, seed: int) -> None:
    """Calls that answer, fail, hang, are tried again, and are cancelled at any moment: before, in, and between their tries."""
    chance = random.Random(seed)
    policy = Policy(
        rate_limit="40/hour",
        token_limit="100000/hour",
        tokens_per_call=100,
        timeout=0.05,
        retries=2,
        breaker=Breaker(fail_max=3, reset_timeout=0.05),
    )
    gateway, shared = Gateway(policy, "shop.asking", str(tmp_path / "shared.db")), shared_store(str(tmp_path / "shared.db"))
    told: list[CallRecord] = []

    async def call() -> None:
        await asyncio.sleep(chance.choice((0, 0, 0.01)))
        if (becomes := chance.random()) < 0.2:
            raise ConnectionError
        if becomes < 0.3:
            await asyncio.Event().wait()
        mao.usage(input_tokens=100)

    async def main() -> None:
        tasks = set[asyncio.Task[None]]()
        for _ in range(400):
            if len(tasks) < 60:
                tasks.add(asyncio.ensure_future(gateway.acall(call, observe=told.append)))
            for task in chance.sample(sorted(tasks, key=id), min(len(tasks), chance.choice((0, 0, 1, 3)))):
                task.cancel()
            await asyncio.sleep(chance.choice((0, 0, 0.002)))
            tasks = {task for task in tasks if not task.done()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
    gateway.flush()
    made = [record for record in told if record.number]
    assert {record.outcome for record in told} >= {"answered", "failed"}
    assert all_counted(shared)[0] == len(made)
    silent = [record for record in made if record.outcome == "failed" and record.error == "ConnectionError"]
    assert all_counted(shared)[1] == 100 * (len(made) - len(silent))
    until(lambda: breaker_lets_through(gateway))


def breaker_lets_through(gateway: Gateway) -> bool:
    assert gateway._breaker is not None
    try:
        gateway._breaker.admit().succeeded()
    except mao.BreakerOpenError:
        return False
    return True


def test_what_cannot_be_settled_hides_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    asking = Asking(tmp_path)

    def down(*_: object) -> None:
        raise mao.StoreError("down")

    def answer() -> str:
        monkeypatch.setattr(Limiter, "settle", down)
        mao.usage(input_tokens=5)
        return "answer"

    assert asking.gateway.call(answer) == "answer"
    assert "'tokens of shop.asking' could not be told: down" in caplog.text


def test_where_the_tokens_cannot_be_had_the_call_is_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asking = Asking(tmp_path, rate_limit="10/hour")
    reserve = Limiter.reserve

    def down(self: Limiter, permits: int = 1, **how: Any) -> Any:
        if self.key == TOKENS:
            raise mao.StoreError("down")
        return reserve(self, permits, **how)

    monkeypatch.setattr(Limiter, "reserve", down)
    with pytest.raises(mao.StoreError):
        asking(100)
    assert all_counted(asking.shared) == (0, 0)


# -- both limits at once -------------------------------------------------------------------------------------------------------------


@given(
    calls=st.sampled_from([1, 3, 40]),
    tokens=st.sampled_from([100, 1000]),
    seconds=st.sampled_from([(60.0, 60.0), (1.0, 60.0), (60.0, 1.0), (3600.0, 60.0)]),
    steps=st.lists(
        st.tuples(
            st.sampled_from([0.0, 1e-6, 0.01, 0.3, 0.97, 30.0]),  # seconds of the shorter window that pass
            st.integers(0, 2),  # the process
            st.sampled_from([0, 1, 30, 99, 100, 101, 250]),  # tokens that it uses
            st.booleans(),  # whether the call is made
        ),
        min_size=5,
        max_size=60,
    ),
)
@settings(max_examples=60, deadline=None)
def test_no_window_holds_more_calls_or_more_tokens_than_it_may(
    calls: int, tokens: int, seconds: tuple[float, float], steps: list[tuple[float, int, int, bool]]
) -> None:
    """Of tokens, what was used up to the estimate: what goes beyond is known too late, and counts afterwards."""
    clock = Time()
    made, spent = list[tuple[float, int]](), list[tuple[float, int]]()
    with TemporaryDirectory() as folder:
        shared = SharedStore(Path(folder) / "shared.db", clock=clock.database)

        def quota(offset: float) -> Quota:
            now = clock.of_process(offset)
            per_call, per_token = seconds
            return Quota(
                Limiter(shared, "api", calls, per_call, clock=now), Limiter(shared, "tokens", tokens, per_token, clock=now), 100, clock=now
            )

        quotas = [quota(offset) for offset in (0.0, -1e6, 5e5)]
        for passes, process, uses, is_made in steps:
            clock.now += passes * min(seconds)
            reserved = quotas[process].reserve()
            assert reserved.tokens is not None
            if is_made:
                made.append((clock.now + reserved.wait, 1))
                spent.append((clock.now + reserved.wait, min(uses, reserved.tokens.permits)))
                quotas[process].used(reserved, uses or None, None if uses else ConnectionError())
            else:
                quotas[process].give_back(reserved)
        shared.close()
    assert not made or most_in_a_window(made, seconds[0]) <= calls
    assert not spent or most_in_a_window(spent, seconds[1]) <= tokens


def test_waiting_for_one_limit_after_the_other_breaks_the_one_that_was_first(tmp_path: Path) -> None:
    """Naive: a permit to call, then the tokens. Whoever waits for tokens uses a permit that counts no more by then."""
    clock = Time()

    def most(is_naive: bool) -> int:
        shared = SharedStore(tmp_path / f"{is_naive}.db", clock=clock.database)
        calls = Limiter(shared, "api", 10, 1.0, clock=clock.of_process(0))
        tokens = Limiter(shared, "tokens", 2000, 60.0, clock=clock.of_process(0))
        quota, used = Quota(calls, tokens, 100, clock=clock.of_process(0)), list[tuple[float, int]]()
        tokens.reserve(2000)
        for _ in range(20):
            wait = max(calls.reserve(), tokens.reserve(100)) if is_naive else quota.reserve().wait
            used.append((clock.now + wait, 1))
            clock.now += 0.2
        return most_in_a_window(used, 1.0)

    assert most(is_naive=True) > 10
    assert most(is_naive=False) == 10


# -- processes -----------------------------------------------------------------------------------------------------------------------


class Spent(NamedTuple):
    at: float
    tokens: int
    estimate: int


def spending(database: str | None, policy: Policy, uses: list[int]) -> list[Spent]:
    """Calls as fast as may be. Nobody sleeps: a call is made, for the test, when its wait would be over."""
    gateway = Gateway(policy, "shop.asking", database)
    waits, spent = list[float](), list[Spent]()
    sleep, _gateway.time.sleep = _gateway.time.sleep, waits.append  # type: ignore[assignment]
    try:
        for tokens in uses:
            waits.clear()
            quota = gateway._quota
            assert quota is not None

            def call(tokens: int = tokens, estimate: int = quota.estimate) -> None:
                mao.usage(output_tokens=tokens)
                spent.append(Spent(time.time() + sum(waits), tokens, estimate))

            gateway.call(call)
    finally:
        _gateway.time.sleep = sleep
    return spent


def spent_by_eight(crew: list[Member], databases: Iterator[str], policy: Policy, uses: list[int]) -> list[Spent]:
    for member in crew:
        member.start("run", spending, next(databases), policy, uses)
    replies = [member.reply() for member in crew]
    assert all(isinstance(reply, list) for reply in replies), replies
    return [spent for reply in replies for spent in reply]


def shared_by_all(shared: SharedStore) -> Iterator[str]:
    while True:
        yield shared.url


def each_its_own(folder: Path) -> Iterator[str]:
    for number in range(1000):
        yield str(folder / f"{number}.db")


def tokens_in_a_minute(spent: list[Spent]) -> int:
    return most_in_a_window([(one.at, one.tokens) for one in spent], 60.0)


KNOWN = Policy(token_limit="6000/minute", tokens_per_call=100)


def test_eight_processes_keep_one_token_limit(crew: list[Member], shared: SharedStore) -> None:
    """What is used is what was estimated: then no window holds a token more than it may."""
    spent = spent_by_eight(crew, shared_by_all(shared), KNOWN, [100] * 25)
    assert len(spent) == 200
    assert tokens_in_a_minute(spent) == 6000


def test_eight_processes_with_a_limit_each_use_eight_times_as_many(crew: list[Member], tmp_path: Path) -> None:
    assert tokens_in_a_minute(spent_by_eight(crew, each_its_own(tmp_path), KNOWN, [100] * 25)) == 20_000


def test_eight_processes_with_calls_of_many_sizes(crew: list[Member], shared: SharedStore) -> None:
    """Up to the estimates, no window holds more than it may; beyond them, as much as the calls in it went beyond theirs."""
    spent = spent_by_eight(crew, shared_by_all(shared), KNOWN, [10, 190, 100, 40, 160] * 5)
    assert most_in_a_window([(one.at, min(one.tokens, one.estimate)) for one in spent], 60.0) <= 6000


UNKNOWN = Policy(token_limit="6000/minute", tokens_per_call=10)


def test_a_wrong_first_estimate_costs_one_call_per_process(crew: list[Member], shared: SharedStore) -> None:
    assert tokens_in_a_minute(spent_by_eight(crew, shared_by_all(shared), UNKNOWN, [100] * 25)) <= 6000 + 8 * 90


def test_estimates_that_nobody_corrects_use_ten_times_as_many(crew: list[Member], shared: SharedStore) -> None:
    """Naive: what is declared is all that counts."""
    for member in crew:
        assert member.ask("run", uncorrected, True) is None
    try:
        assert tokens_in_a_minute(spent_by_eight(crew, shared_by_all(shared), UNKNOWN, [100] * 25)) == 20_000
    finally:
        for member in crew:
            assert member.ask("run", uncorrected, False) is None


_corrected = Quota.used


def uncorrected(is_so: bool) -> None:
    Quota.used = (lambda *_: None) if is_so else _corrected  # type: ignore[method-assign]


def test_a_process_that_dies_gives_nothing_back_and_blocks_nobody(crew: list[Member], shared: SharedStore) -> None:
    """What it held counts until it leaves the window."""
    dying = Member()
    dying.start("run", hanging, shared.url)
    until(lambda: shared.holds(_LIMITS) and counted(shared) == 100)
    dying.kill()
    reply = crew[0].ask("run", spending, shared.url, KNOWN, [100] * 59)
    assert len(reply) == 59
    assert counted(shared) == 6000


def hanging(database: str) -> None:
    Gateway(KNOWN, "shop.asking", database).call(threading.Event().wait)
