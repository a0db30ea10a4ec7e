"""Calls that wait when the step ends are dropped, and keep nothing that was reserved for them; what the step knows is told."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import dagster_mao as mao
from dagster_mao.boundary._one import One, StoppedError
from dagster_mao.errors import AgentFailedError
from dagster_mao.gateway import shared_store
from dagster_mao.gateway._breaker import SharedBreaker, breakers
from dagster_mao.state import StateStore
from tests.gateway.crew import SECONDS, until
from tests.gateway.test_token_limit import counted
from tests.shop import Item, Price, Run, batch, shop
from tests.test_calls_ways import interrupt

LIMITED = mao.Policy(rate_limit="1/day", keep_answers=0)


def permits(store: StateStore, key: str) -> int:
    return counted(shared_store(str(store.database)), key)


def stepped(store: StateStore, agent: Any) -> Any:
    one = Run(store, shop(agent), "one")
    one.enter(batch(9))
    return one.step("pricing")


@pytest.mark.parametrize("how", ["fails", "is interrupted"])
def test_threads_that_wait_for_a_limit_give_back_what_was_reserved_for_them(local_store: StateStore, how: str) -> None:
    over = threading.Event()

    @mao.agent(name="pricing", policy=LIMITED, concurrency=3)
    def agent(items: Item) -> Price:
        until(lambda: permits(local_store, "shop.pricing") == 3)
        if how == "fails":
            raise ConnectionError
        interrupt()
        over.wait(SECONDS)
        return Price(item_id=items.item_id, price=1)

    with pytest.raises(AgentFailedError if how == "fails" else KeyboardInterrupt):
        stepped(local_store, agent)
    assert permits(local_store, "shop.pricing") == 1, "that of the call that was made"
    over.set()


def test_threads_of_a_fallback_that_wait_for_its_limit_give_it_back_and_hold_up_nobody(local_store: StateStore) -> None:
    class Clerk(mao.Agent):
        policy = LIMITED

        def execute(self, items: Item) -> Price:
            until(lambda: permits(local_store, "shop.clerk") == 3)
            raise LookupError

    @mao.agent(name="pricing", policy=mao.Policy(fallback=Clerk, keep_answers=0), concurrency=3)
    async def agent(items: Item) -> Price:
        raise ConnectionError

    with pytest.raises(AgentFailedError):
        stepped(local_store, agent)
    assert permits(local_store, "shop.clerk") == 1


def test_a_call_that_comes_to_wait_when_the_step_is_over_does_not() -> None:
    one = One(0, None, None, "", {}, lambda _: None)
    assert not one.stop()
    with pytest.raises(StoppedError):
        one.pause(SECONDS)
    another = One(0, None, None, "", {}, lambda _: None)
    another.pause(0)
    assert not another.stop(), "it waits no more"


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_what_the_gateway_of_a_fallback_knows_is_told_at_the_end_of_the_step(local_store: StateStore, is_async: bool) -> None:
    """Two failures elsewhere, then the fallback's calls go well: the next failure is the first in a row."""
    declared = mao.Breaker(fail_max=3, reset_timeout=600)
    elsewhere = SharedBreaker(shared_store(str(local_store.database)), "shop.clerk", declared)
    for _ in range(2):
        elsewhere.admit().failed(ConnectionError())

    class Clerk(mao.Agent):
        policy = mao.Policy(breaker=declared)

        def execute(self, items: Item) -> Price:
            return Price(item_id=items.item_id, price=-1)

    def failing(items: Item) -> Price:
        raise ConnectionError

    async def failing_async(items: Item) -> Price:
        raise ConnectionError

    agent = mao.agent(name="pricing", policy=mao.Policy(fallback=Clerk, keep_answers=0))(failing_async if is_async else failing)
    assert stepped(local_store, agent).seal.fallbacks == 9
    assert breakers(shared_store(str(local_store.database)))[0].failures == 0


# -- a child process for what is never called in one -----------------------------------------------------------------------------------


def test_isolation_of_an_async_agent_is_an_error_at_load(tmp_path: Path) -> None:
    isolated = mao.Policy(timeout=10, isolate=True)

    async def agent(items: Item) -> Price:
        return Price(item_id=items.item_id, price=1)

    async def instead(items: Item) -> Price:
        return Price(item_id=items.item_id, price=1)

    def sync(items: Item) -> Price:
        return Price(item_id=items.item_id, price=1)

    for declared in (
        mao.agent(name="pricing", policy=isolated)(agent),
        mao.agent(name="other", policy=mao.Policy(fallback=mao.agent(name="pricing", policy=isolated)(instead)))(sync),
    ):
        with pytest.raises(mao.WiringError, match="it is async") as refused:
            shop(declared)
        assert (refused.value.agent, refused.value.field) == ("pricing", "isolate")
        assert "timeout" in str(refused.value.fix)
    shop(mao.agent(name="pricing", policy=isolated)(sync))
    pipeline, changes = shop(mao.agent(name="pricing")(agent)), {"pricing": {"timeout": 1, "isolate": True}}
    with pytest.raises(mao.WiringError, match="it is async"):
        mao.run(pipeline, batch(1), store=StateStore(tmp_path), policies=changes)
