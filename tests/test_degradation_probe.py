"""A run that begins when the reset timeout is over: its first call is the probe, and those beside it wait for what becomes of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from typing import Any

import pytest

import dagster_mao as mao
from dagster_mao.errors import BreakerOpenError
from dagster_mao.gateway import shared_store
from dagster_mao.gateway._breaker import SharedBreaker, breakers
from dagster_mao.state import StateStore
from tests.gateway.crew import SECONDS, age, until
from tests.shop import WAYS, Item, Price, Run, batch, logged, shop
from tests.test_degradation import ANY, check, close_breaker, counted, instead, open_breaker

ways = pytest.mark.parametrize("way", WAYS)
modes = pytest.mark.parametrize("mode", ["fail", "fallback", "defer"])
RECORDS, AT_ONCE = 60, {"async": 16, "threads": 8, "sync": 1}


class Probed:
    """The other side. The first that asks it is answered when as many others as can be beside it have come to the breaker.

    It `becomes` an answer, an error, or nothing.
    """

    def __init__(self, becomes: str, beside: int) -> None:
        self.asked, self.came, self.is_over = Counter[str](), list[object](), threading.Event()
        self._becomes, self._beside, self._lock = becomes, beside, threading.Lock()

    def _are_beside(self) -> bool:
        return len(self.came) >= self._beside

    def _is_first(self, item: str) -> bool:
        with self._lock:
            self.asked[item] += 1
            return self.asked.total() == 1

    def _answer(self) -> int:
        if self._becomes == "fails":
            raise ConnectionError
        return 1

    def ask(self, item: str) -> int:
        if not self._is_first(item):
            return 1
        until(self._are_beside)
        if self._becomes == "hangs":
            self.is_over.wait(SECONDS)
        return self._answer()

    async def ask_async(self, item: str) -> int:
        if not self._is_first(item):
            return 1
        deadline = time.monotonic() + SECONDS
        while not self._are_beside():
            assert time.monotonic() < deadline
            await asyncio.sleep(0)
        if self._becomes == "hangs":
            await asyncio.Event().wait()
        return self._answer()


def asking(way: str, **declared: Any) -> Any:
    def sync(items: Item, *, side: Probed) -> Price:
        return Price(item_id=items.item_id, price=side.ask(items.item_id))

    async def asynchronous(items: Item, *, side: Probed) -> Price:
        return Price(item_id=items.item_id, price=await side.ask_async(items.item_id))

    return mao.agent(name="pricing", concurrency=AT_ONCE[way], **declared)(asynchronous if way == "async" else sync)


def policy(mode: Any, **more: Any) -> mao.Policy:
    fallback = instead if mode == "fallback" else None
    return mao.Policy(breaker=mao.Breaker(fail_max=2, reset_timeout=600), when_open=mode, fallback=fallback, **more)


def probed(store: StateStore, agent: Any, side: Probed, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The step, on a breaker that is due for a probe."""
    open_breaker(store)
    age(shared_store(str(store.database)), 601)
    enter = SharedBreaker.enter

    def entered(breaker: SharedBreaker) -> Any:
        try:
            return enter(breaker)
        finally:
            side.came.append(None)

    monkeypatch.setattr(SharedBreaker, "enter", entered)
    one = Run(store, shop(agent), "one")
    one.enter(batch(RECORDS))
    try:
        return one.step("pricing", resources={"side": side})
    finally:
        side.is_over.set()


@ways
@modes
def test_those_beside_a_probe_that_is_answered_are_answered_too(
    local_store: StateStore, monkeypatch: pytest.MonkeyPatch, way: str, mode: str
) -> None:
    side = Probed("answers", AT_ONCE[way])
    outcome = probed(local_store, asking(way, policy=policy(mode)), side, monkeypatch)
    assert (counted(local_store, outcome), outcome.seal.fallbacks) == ((RECORDS, 0, 0), None)
    assert side.asked == {f"i{n}": 1 for n in range(RECORDS)}
    assert Counter(logged(local_store)["breaker"]) == {"half-open": 1, "closed": RECORDS - 1}
    assert check(outcome, "breaker").passed


@ways
@modes
@pytest.mark.parametrize("becomes", ["fails", "hangs"])
def test_those_beside_a_probe_that_fails_are_refused_and_make_no_call(
    local_store: StateStore, monkeypatch: pytest.MonkeyPatch, way: str, mode: str, becomes: str
) -> None:
    side = Probed(becomes, AT_ONCE[way])
    agent = asking(way, policy=policy(mode, timeout=0.5 if becomes == "hangs" else None), quarantine=ANY)
    if mode == "fail":
        with pytest.raises(BreakerOpenError):
            probed(local_store, agent, side, monkeypatch)
    else:
        outcome = probed(local_store, agent, side, monkeypatch)
        assert counted(local_store, outcome) == ((0, 1, RECORDS - 1) if mode == "defer" else (RECORDS, 0, 0))
        assert outcome.seal.fallbacks == (RECORDS if mode == "fallback" else None)
        assert check(outcome, "breaker").description.startswith("Open since ")
    assert side.asked.total() == 1, "the probe is the only call that is made"
    assert breakers(shared_store(str(local_store.database)))[0].state == "open"


def test_a_breaker_that_closed_again_is_not_told_as_open(local_store: StateStore) -> None:
    def mending(items: Item) -> Price:
        if items.item_id == "i5":
            close_breaker(local_store)
        return instead(items)

    @mao.agent(name="pricing", policy=mao.Policy(breaker=mao.Breaker(fail_max=2, reset_timeout=600), fallback=mending))
    def agent(items: Item) -> Price:
        raise ConnectionError

    one = Run(local_store, shop(agent), "one")
    one.enter(batch(6))
    found = check(one.step("pricing"), "breaker")
    assert (found.passed, found.severity) == (False, "warn"), "calls were refused"
    (now,) = breakers(shared_store(str(local_store.database)))
    assert now.since is not None
    assert found.description.startswith("Open from ")
    assert found.description.endswith(f" to {now.since:%Y-%m-%d %H:%M:%S} UTC (ConnectionError): 6 answers are the fallback's")
    assert found.metadata["closed"] == now.since.isoformat()
    assert "retry_after_seconds" not in found.metadata
