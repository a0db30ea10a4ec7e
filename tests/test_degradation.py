"""What becomes of a batch when calls fail or a breaker refuses them: it fails, the fallback answers, or the rest waits for the next run."""

from __future__ import annotations

import asyncio
import json
import traceback
from collections import Counter
from typing import Annotated, Any

import polars as pl
import pytest
from pydantic import BaseModel, Field

import dagster_mao as mao
from dagster_mao.errors import AgentFailedError, BatchRefusedError, BreakerOpenError, PinError
from dagster_mao.gateway import shared_store
from dagster_mao.gateway._breaker import SharedBreaker
from dagster_mao.state import DEFERRED_SCHEMA, StateStore
from dagster_mao.state.verify import verify
from tests.shop import SECRET, WAYS, Item, Price, Run, Side, batch, failing, logged, pricing, rows, shop, told

ways = pytest.mark.parametrize("way", WAYS)
ANY = mao.Quarantine(max_share=1)
QUICK: dict[str, Any] = {"retry_within": 240.0}
BREAKER = mao.Breaker(fail_max=2, reset_timeout=600)


def open_breaker(store: StateStore, name: str = "shop.pricing") -> None:
    """As if calls had failed before, in another process."""
    breaker = SharedBreaker(shared_store(str(store.database)), name, mao.Breaker(fail_max=1, reset_timeout=600))
    breaker.admit().failed(ConnectionError())


def close_breaker(store: StateStore, name: str = "shop.pricing") -> None:
    from dagster_mao.gateway._breaker import close_breaker as close

    close(shared_store(str(store.database)), name, why="mended", by="test")


def instead(items: Item) -> Price:
    return Price(item_id=items.item_id, price=-1)


async def instead_async(items: Item) -> Price:
    await asyncio.sleep(0)
    return Price(item_id=items.item_id, price=-1)


fallbacks = pytest.mark.parametrize("fallback", [instead, instead_async], ids=["sync fallback", "async fallback"])


def stepped(store: StateStore, agent: Any, side: Side, count: int = 6, run: str = "one", **given: Any) -> Any:
    one = Run(store, shop(agent), run)
    one.enter(batch(count))
    return one.step(agent.name, resources={"side": side}, **given)


def check(outcome: Any, name: str) -> Any:
    return next(check for check in outcome.checks if check.name == name)


def counted(store: StateStore, outcome: Any) -> tuple[int, int, int]:
    """Sealed, quarantined and deferred records: by the files, which must say what the seal says."""
    seal = outcome.seal if hasattr(outcome, "seal") else outcome
    held, waiting = store.quarantine(seal), store.deferred(seal)
    assert waiting["record"].is_unique().all()
    sealed = store.read(seal).collect()
    keys = [set(sealed[str(seal.key)].cast(pl.String)), set(held["record"]), set(waiting["record"])]
    assert not keys[0] & keys[1]
    assert not keys[0] & keys[2]
    assert not keys[1] & keys[2]
    assert (sealed.height, len(keys[1]), waiting.height) == (seal.row_count, seal.quarantined, seal.deferred or 0)
    return sealed.height, len(keys[1]), waiting.height


# -- the batch fails -------------------------------------------------------------------------------------------------------------------


@ways
def test_without_a_word_the_batch_fails_and_its_answers_are_kept(local_store: StateStore, way: str) -> None:
    agent = pricing(way, policy=mao.Policy(breaker=BREAKER, retries=3, **QUICK), concurrency=1)
    side = Side(failing("i2"))
    with pytest.raises(BreakerOpenError) as caught:
        stepped(local_store, agent, side)
    assert side.asked == {"i0": 1, "i1": 1, "i2": 2}
    assert (caught.value.calls.answered, caught.value.calls.failed, caught.value.calls.refused) == (2, 2, 1)
    assert [(one.name, one.passed, one.severity) for one in caught.value.checks][-1] == ("breaker", False, "error")
    close_breaker(local_store)
    side.does = lambda item, time: 1
    assert counted(local_store, stepped(local_store, agent, side, run="two")) == (6, 0, 0)
    assert side.asked == {"i0": 1, "i1": 1, "i2": 3, "i3": 1, "i4": 1, "i5": 1}


@ways
def test_agents_that_lean_on_one_side_share_one_breaker(local_store: StateStore, way: str) -> None:
    shared = mao.Policy(breaker=mao.Breaker(fail_max=2, reset_timeout=600, name="bureau"), retries=3, **QUICK)
    pipeline = shop(pricing(way, policy=shared, concurrency=1), pricing(way, name="rating", policy=shared))
    one, side, untouched = Run(local_store, pipeline, "one"), Side(failing("i0")), Side()
    one.enter(batch(3))
    for name, asked in (("pricing", side), ("rating", untouched)):
        with pytest.raises(BreakerOpenError, match="'bureau'"):
            one.step(name, resources={"side": asked})
    assert (side.asked, untouched.asked) == ({"i0": 2}, {})


# -- the fallback answers --------------------------------------------------------------------------------------------------------------


@ways
@fallbacks
def test_where_the_breaker_is_open_the_fallback_answers_and_that_shows(local_store: StateStore, way: str, fallback: Any) -> None:
    agent = pricing(way, policy=mao.Policy(breaker=BREAKER, retries=3, fallback=fallback, **QUICK), concurrency=1)
    side = Side(failing("i2"))
    outcome = stepped(local_store, agent, side)
    assert side.asked == {"i0": 1, "i1": 1, "i2": 2}
    sealed = rows(local_store, outcome)
    assert [(row["price"], row["from_fallback"]) for row in sealed.values()] == [(1, False)] * 2 + [(-1, True)] * 4
    assert (outcome.seal.fallbacks, outcome.calls.fallbacks, counted(local_store, outcome)) == (4, 4, (6, 0, 0))
    found = check(outcome, "breaker")
    assert (found.passed, found.severity) == (False, "warn")
    assert found.description.startswith("Open since ")
    assert found.description.endswith("(ConnectionError): 4 answers are the fallback's")
    assert (found.metadata["breaker"], found.metadata["fallbacks"], found.metadata["deferred"]) == ("shop.pricing", 4, 0)
    assert told(local_store) == {
        **{(f"i{n}", "answered"): 1 for n in range(2)},
        ("i2", "failed"): 2,
        **{(f"i{n}", outcome): 1 for n in range(2, 6) for outcome in ("refused", "fallback")},
    }
    assert len(set(logged(local_store)["call"])) == 6
    assert verify(local_store).good


@ways
@fallbacks
def test_what_the_fallback_answered_is_asked_again_on_the_next_run(local_store: StateStore, way: str, fallback: Any) -> None:
    agent = pricing(way, policy=mao.Policy(breaker=BREAKER, fallback=fallback, when_open="fallback"))
    open_breaker(local_store)
    side = Side()
    first = stepped(local_store, agent, side)
    assert (first.seal.fallbacks, side.asked) == (6, {})
    close_breaker(local_store)
    second = stepped(local_store, agent, side, run="two")
    assert (second.seal.fallbacks, second.calls.reused, side.asked.total()) == (None, 0, 6)
    assert {row["from_fallback"] for row in rows(local_store, second).values()} == {False}
    assert check(second, "breaker").passed


@ways
@fallbacks
def test_calls_that_finally_failed_are_answered_by_the_fallback_with_or_without_a_breaker(
    local_store: StateStore, way: str, fallback: Any
) -> None:
    agent = pricing(way, policy=mao.Policy(retries=1, fallback=fallback, keep_answers=0, **QUICK), quarantine=ANY)
    outcome = stepped(local_store, agent, Side(failing("i1", "i4")))
    assert counted(local_store, outcome) == (6, 0, 0)
    assert [item for item, row in rows(local_store, outcome).items() if row["from_fallback"]] == ["i1", "i4"]
    assert logged(local_store).filter(record="i1").select("number", "outcome").sort("number").rows() == [
        (1, "failed"),
        (2, "failed"),
        (3, "fallback"),
    ]


@ways
def test_what_an_agent_says_of_the_fallback_does_not_count(local_store: StateStore, way: str) -> None:
    def ask(items: Item) -> Price:
        return Price(item_id=items.item_id, price=1, from_fallback=True)

    async def asking(items: Item) -> Price:
        return ask(items)

    for policy in (None, mao.Policy(), mao.Policy(fallback=instead)):
        agent = mao.agent(name="pricing", policy=policy, **({"concurrency": 2} if way == "threads" else {}))(
            asking if way == "async" else ask
        )
        outcome = stepped(local_store, agent, Side(), run=str(policy))
        assert {row["from_fallback"] for row in rows(local_store, outcome).values()} == {False}
        assert outcome.seal.fallbacks is None


def refusing(items: Item) -> Price:
    raise LookupError(SECRET)


async def refusing_async(items: Item) -> Price:
    raise LookupError(SECRET)


def returning_nothing(items: Item) -> Price:
    return None  # type: ignore[return-value]


@ways
@pytest.mark.parametrize(
    ("fallback", "how"),
    [(refusing, "raised LookupError"), (refusing_async, "raised LookupError"), (returning_nothing, "returned NoneType")],
)
def test_a_fallback_that_fails_too_leaves_the_record_to_the_quarantine_or_the_batch_to_fail(
    local_store: StateStore, way: str, fallback: Any, how: str
) -> None:
    policy = mao.Policy(fallback=fallback, keep_answers=0)
    with pytest.raises(AgentFailedError, match=f"execute raised ConnectionError on record 'i1', and its fallback {how}") as caught:
        stepped(local_store, pricing(way, policy=policy, concurrency=1), Side(failing("i1")))
    if "raised" in how:
        assert "ConnectionError" in "".join(traceback.format_exception(caught.value)), "both are told"
    outcome = stepped(local_store, pricing(way, policy=policy, quarantine=ANY), Side(failing("i1")), run="two")
    assert counted(local_store, outcome) == (5, 1, 0)
    assert local_store.quarantine(outcome.seal)["rules"].to_list() == [["execute: ConnectionError"]]
    assert outcome.seal.fallbacks is None


def overpriced(items: Item) -> Price:
    return Price.model_construct(item_id=items.item_id + ("x" if items.item_id == "i1" else ""), price=2)


class Cheap(Price):
    price: int = Field(le=1)


def too_dear(items: Item) -> Cheap:
    return Cheap.model_construct(item_id=items.item_id, price=2, from_fallback=False)


@ways
def test_a_fallback_is_held_to_the_contract_as_the_agent_is(local_store: StateStore, way: str) -> None:
    def ask(items: Item, *, side: Side) -> Cheap:
        return Cheap(item_id=items.item_id, price=side.ask(items.item_id))

    async def asking(items: Item, *, side: Side) -> Cheap:
        return ask(items, side=side)

    declared = {"name": "pricing", "policy": mao.Policy(fallback=too_dear, keep_answers=0)}
    function = asking if way == "async" else ask
    with pytest.raises(BatchRefusedError, match="price: le 1"):
        stepped(local_store, mao.agent(**declared)(function), Side(failing("i1")))
    outcome = stepped(local_store, mao.agent(**declared, quarantine=ANY)(function), Side(failing("i1", "i2")), run="two")
    assert counted(local_store, outcome) == (4, 2, 0)
    assert outcome.seal.fallbacks is None, "of those that are in the snapshot"
    agent = pricing(way, policy=mao.Policy(fallback=overpriced, keep_answers=0), quarantine=ANY)
    with pytest.raises(BatchRefusedError, match="never read"):
        stepped(local_store, agent, Side(failing("i1")), run="three")


class Clerk(mao.Agent):
    """A fallback with a policy of its own, and another side."""

    policy = mao.Policy(retries=1, retry_within=240.0)

    def execute(self, ctx: mao.AgentContext, items: Item, *, desk: Side) -> Price:
        mao.usage(cost=3.0)
        return Price(item_id=items.item_id, price=desk.ask(items.item_id, ctx.idempotency_key))


@ways
def test_a_fallback_agent_is_called_as_its_own_policy_says(local_store: StateStore, way: str) -> None:
    agent = pricing(way, policy=mao.Policy(retries=1, fallback=Clerk, **QUICK))
    side, desk = Side(failing("i1")), Side(failing("i1", times=1))
    one = Run(local_store, shop(agent), "one")
    one.enter(batch(2))
    outcome = one.step("pricing", resources={"side": side, "desk": desk})
    assert (outcome.seal.fallbacks, desk.asked, outcome.calls.cost) == (1, {"i1": 2}, 6.0)
    assert side.keys["i1"] == desk.keys["i1"], "it is the same intent"
    assert logged(local_store).filter(record="i1").select("number", "outcome", "cost").sort("number").rows() == [
        (1, "failed", 0.0),
        (2, "failed", 0.0),
        (3, "failed", 3.0),
        (4, "fallback", 3.0),
    ]


@ways
def test_the_fallbacks_own_open_breaker_ends_the_step(local_store: StateStore, way: str) -> None:
    class Broken(Clerk):
        name = "broken"
        policy = mao.Policy(breaker=mao.Breaker(fail_max=1, reset_timeout=600))

    open_breaker(local_store, "shop.broken")
    one = Run(local_store, shop(pricing(way, policy=mao.Policy(fallback=Broken), quarantine=ANY)), "one")
    one.enter(batch(2))
    with pytest.raises(BreakerOpenError, match=r"shop\.broken"):
        one.step("pricing", resources={"side": Side(failing("i1")), "desk": Side()})


@ways
def test_an_operator_switches_the_fallback_off(local_store: StateStore, way: str) -> None:
    agent = pricing(way, policy=mao.Policy(fallback=instead))
    with pytest.raises(AgentFailedError):
        stepped(local_store, agent, Side(failing("i1")), policies={"pricing": {"fallback": None}})


def framed_instead(items: mao.LazyFrame[Item]) -> mao.LazyFrame[Price]:
    return items.select("item_id", price=-pl.col("size"))


async def framed_instead_async(items: mao.LazyFrame[Item]) -> mao.LazyFrame[Price]:
    return framed_instead(items)


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("fallback", [framed_instead, framed_instead_async])
@pytest.mark.parametrize("is_open", [False, True], ids=["fails", "open"])
def test_a_fallback_for_a_whole_batch(local_store: StateStore, is_async: bool, fallback: Any, is_open: bool) -> None:
    def work(items: mao.LazyFrame[Item], *, side: Side) -> mao.LazyFrame[Price]:
        side.ask("frame")
        return items.select("item_id", price="size")

    async def working(items: mao.LazyFrame[Item], *, side: Side) -> mao.LazyFrame[Price]:
        return work(items, side=side)

    agent = mao.agent(name="pricing", policy=mao.Policy(breaker=BREAKER, fallback=fallback))(working if is_async else work)
    if is_open:
        open_breaker(local_store)
    side = Side(failing("frame", times=1))
    outcome = stepped(local_store, agent, side)
    assert {(row["price"], row["from_fallback"]) for row in rows(local_store, outcome).values()} == {(-1, True)}
    assert (outcome.seal.fallbacks, check(outcome, "breaker").passed) == (6, not is_open)
    if is_open:
        close_breaker(local_store)
        side.does = lambda item, time: 1
    again = stepped(local_store, agent, side, run="two")
    assert {(row["price"], row["from_fallback"]) for row in rows(local_store, again).values()} == {(1, False)}
    assert again.calls.reused == 0


def yesterdays() -> list[Item]:
    return [Item(item_id="old")]


class Flagged(Item):
    from_fallback: Annotated[bool, mao.FromFallback] = False


def flagged_yesterdays() -> list[Flagged]:
    return [Flagged(item_id="old")]


def test_an_entrys_fallback(local_store: StateStore) -> None:
    @mao.agent(name="items", policy=mao.Policy(fallback=flagged_yesterdays))
    def source() -> list[Flagged]:
        raise ConnectionError

    outcome = Run(local_store, shop(entry=source), "one").step("items")
    assert rows(local_store, outcome)["old"]["from_fallback"] is True
    assert outcome.seal.fallbacks == 1
    Run(local_store, shop(entry=source), "two").enter([Flagged(item_id="i0", from_fallback=True)])
    assert local_store.read(local_store.seals("shop/day")[-1]).collect()["from_fallback"].to_list() == [True], "handed in as it was"


# -- the rest waits ----------------------------------------------------------------------------------------------------------------------

DEFER = mao.Policy(breaker=BREAKER, retries=3, when_open="defer", **QUICK)


@ways
def test_what_is_done_is_sealed_and_the_rest_waits_for_the_next_run(local_store: StateStore, way: str) -> None:
    agent = pricing(way, policy=DEFER, concurrency=1)
    side = Side(failing("i2"))
    first = stepped(local_store, agent, side)
    assert counted(local_store, first) == (2, 0, 4)
    assert local_store.deferred(first.seal).schema == DEFERRED_SCHEMA
    assert local_store.deferred(first.seal).rows() == [(f"i{n}", "pricing", "shop.pricing") for n in range(2, 6)]
    found = check(first, "breaker")
    assert (found.passed, found.severity) == (False, "warn")
    assert found.description.endswith("(ConnectionError): 4 records wait for the next run")
    assert (found.metadata["deferred"], check(first, "output").metadata["deferred"]) == (4, 4)
    assert told(local_store)["i5", "refused"] == 1
    assert verify(local_store).good
    close_breaker(local_store)
    side.does = lambda item, time: 1
    second = stepped(local_store, agent, side, run="two")
    assert counted(local_store, second) == (6, 0, 0)
    assert (second.seal.deferred, second.seal.deferred_path, second.calls.reused, second.calls.answered) == (None, None, 2, 4)
    assert side.asked == {"i0": 1, "i1": 1, "i2": 3, "i3": 1, "i4": 1, "i5": 1}
    assert check(second, "breaker").passed
    assert verify(local_store).good


@ways
def test_a_re_execution_of_the_same_attempt_completes_it_too(local_store: StateStore, way: str) -> None:
    agent = pricing(way, policy=DEFER, concurrency=1)
    pipeline, side = shop(agent), Side(failing("i2"))
    one = Run(local_store, pipeline, "one")
    one.enter(batch(4))
    first = one.step("pricing", resources={"side": side})
    again = one.step("pricing", resources={"side": side})
    assert again.reused
    assert again.seal == first.seal
    close_breaker(local_store)
    side.does = lambda item, time: 1
    completed = Run(local_store, pipeline, "again", root="one").step("pricing", resources={"side": side})
    assert (first.seal.version, completed.seal.version, counted(local_store, completed)) == (1, 2, (4, 0, 0))
    assert local_store.effective("shop/day")["pricing"] == completed.seal


@ways
def test_a_step_with_nothing_but_records_that_wait_fails_with_the_breakers_refusal(local_store: StateStore, way: str) -> None:
    open_breaker(local_store)
    side = Side()
    with pytest.raises(BreakerOpenError) as caught:
        stepped(local_store, pricing(way, policy=DEFER), side)
    assert (side.asked, caught.value.calls.refused) == ({}, 6)
    assert [one.name for one in caught.value.checks if not one.passed and one.severity == "error"] == ["breaker"]
    assert [seal.agent for seal in local_store.seals("shop/day")] == ["items"]


@ways
def test_an_empty_batch_waits_for_nobody(local_store: StateStore, way: str) -> None:
    open_breaker(local_store)
    assert counted(local_store, stepped(local_store, pricing(way, policy=DEFER), Side(), count=0)) == (0, 0, 0)


@ways
def test_what_fails_for_other_reasons_is_not_deferred(local_store: StateStore, way: str) -> None:
    policy = mao.Policy(breaker=mao.Breaker(fail_max=9), when_open="defer", keep_answers=0)
    with pytest.raises(AgentFailedError, match="'i1'"):
        stepped(local_store, pricing(way, policy=policy, concurrency=1), Side(failing("i1")))
    outcome = stepped(local_store, pricing(way, policy=policy, quarantine=ANY), Side(failing("i1")), run="two")
    assert counted(local_store, outcome) == (5, 1, 0)


@ways
def test_quarantine_deferral_and_fallback_each_have_their_records(local_store: StateStore, way: str) -> None:
    """The fallback answers for i1 and i3, and knows no i2; with the third failure in a row the breaker opens, and the rest waits."""

    def knows_little(items: Item) -> Price:
        if items.item_id == "i2":
            raise LookupError
        return Price(item_id=items.item_id, price=-1)

    breaker = mao.Breaker(fail_max=3, reset_timeout=600)
    policy = mao.Policy(breaker=breaker, when_open="defer", fallback=knows_little)
    agent = pricing(way, policy=policy, quarantine=mao.Quarantine(max_share=0.2), concurrency=1)
    side = Side(failing("i1", "i2", "i3"))
    outcome = stepped(local_store, agent, side, count=8)
    assert counted(local_store, outcome) == (3, 1, 4)
    assert [item for item, row in rows(local_store, outcome).items() if row["from_fallback"]] == ["i1", "i3"]
    assert (outcome.seal.fallbacks, local_store.quarantine(outcome.seal)["record"].to_list()) == (2, ["i2"])
    assert check(outcome, "breaker").description.endswith("4 records wait for the next run; 2 answers are the fallback's")
    close_breaker(local_store)
    side.does = lambda item, time: 1
    completed = stepped(local_store, agent, side, count=8, run="two")
    assert (counted(local_store, completed), completed.calls.reused, completed.seal.fallbacks) == ((8, 0, 0), 1, None)


@ways
def test_the_share_is_of_all_records_also_those_that_wait(local_store: StateStore, way: str) -> None:
    breaker = mao.Breaker(fail_max=2, reset_timeout=600)
    policy = mao.Policy(breaker=breaker, when_open="defer", keep_answers=0)
    side = Side(failing("i1", "i2"))
    agent = pricing(way, policy=policy, quarantine=mao.Quarantine(max_share=0.25), concurrency=1)
    assert counted(local_store, stepped(local_store, agent, side, count=8)) == (1, 2, 5)
    close_breaker(local_store)
    stricter = pricing(way, policy=policy, quarantine=mao.Quarantine(max_share=0.2), concurrency=1)
    with pytest.raises(BatchRefusedError, match="2 of 8 records"):
        stepped(local_store, stricter, Side(failing("i1", "i2")), count=8, run="two")


def test_expectations_are_about_what_is_sealed(local_store: StateStore) -> None:
    expected = [{"type": "expect_table_row_count_to_be_between", "kwargs": {"min_value": 5}}]
    agent = pricing("sync", policy=DEFER, expectations=expected)
    with pytest.raises(BatchRefusedError, match="row_count"):
        stepped(local_store, agent, Side(failing("i2")))
    close_breaker(local_store)
    assert counted(local_store, stepped(local_store, agent, Side(failing("i5")), run="two")) == (5, 0, 1)


# -- downstream --------------------------------------------------------------------------------------------------------------------------


class Stock(BaseModel):
    item_id: Annotated[str, mao.Key]
    stock: int


class Offer(BaseModel):
    offer_id: Annotated[str, mao.Key]
    worth: int


class Listing(BaseModel):
    item_id: Annotated[str, mao.Key]
    worth: int | None


class Sums(BaseModel):
    worth: int


class Group(BaseModel):
    group: Annotated[str, mao.Key]
    worth: int


@mao.agent
def stock(items: mao.LazyFrame[Item]) -> mao.LazyFrame[Stock]:
    return items.select("item_id", stock=pl.lit(3, dtype=pl.Int64))


@mao.agent
def joined(pricing: Price, stock: Stock) -> Listing:
    return Listing(item_id=stock.item_id, worth=pricing.price * stock.stock)


@mao.agent
def optional(stock: Stock, pricing: Price | None) -> Listing:
    return Listing(item_id=stock.item_id, worth=None if pricing is None else pricing.price)


@mao.agent
def frames(stock: mao.LazyFrame[Stock], pricing: mao.LazyFrame[Price]) -> mao.LazyFrame[Listing]:
    return stock.join(pricing, on="item_id", maintain_order="left").select("item_id", worth="price")


@mao.agent
def sums(pricing: mao.LazyFrame[Price]) -> mao.LazyFrame[Sums]:
    return pricing.select(worth=pl.col("price").sum())


@mao.agent
def groups(pricing: mao.LazyFrame[Price]) -> mao.LazyFrame[Group]:
    return pricing.group_by(group=pl.lit("i3")).agg(worth=pl.col("price").sum())


@mao.agent
def listing(joined: Listing, stock: Stock, sums: Sums) -> Listing:
    return joined


@mao.agent
def last(groups: Group) -> Group:
    return groups


AGENTS = [stock, joined, optional, frames, sums, groups, listing, last]


def test_what_waits_above_is_left_out_of_all_inputs_and_carried_on_until_it_was_answered(local_store: StateStore) -> None:
    agent = pricing("sync", policy=DEFER)
    pipeline = shop(agent, *AGENTS)
    side = Side(failing("i2"))

    def run(name: str) -> dict[str, Any]:
        one = Run(local_store, pipeline, name)
        outcomes = {"items": one.enter(batch(5))}
        for step in pipeline.order[1:]:
            outcomes[step] = one.step(step, resources={"side": side})
        return outcomes

    first = run("one")
    assert {name: counted(local_store, first[name]) for name in ("pricing", "stock", "joined", "optional", "frames", "listing")} == {
        "pricing": (2, 0, 3),
        "stock": (5, 0, 0),
        "joined": (2, 0, 3),
        "optional": (2, 0, 3),
        "frames": (2, 0, 3),
        "listing": (2, 0, 3),
    }
    for name in ("joined", "optional", "frames", "listing"):
        waiting = local_store.deferred(first[name].seal)
        assert waiting.rows() == [(f"i{n}", "pricing", "shop.pricing") for n in (2, 3, 4)]
        assert check(first[name], "pinned_base").metadata["deferred"] == 3
        assert "breaker" not in {one.name for one in first[name].checks}
    assert None not in [row["worth"] for row in rows(local_store, first["optional"]).values()], "what waits is not missing"
    assert {name: (first[name].seal.row_count, first[name].seal.deferred) for name in ("sums", "groups", "last")} == {
        "sums": (1, None),
        "groups": (1, None),
        "last": (1, None),  # its key has nothing to do with that of the records that wait, though one of its values is the same
    }
    assert verify(local_store).good
    close_breaker(local_store)
    side.does = lambda item, time: 1
    second = run("two")
    assert {counted(local_store, second[name]) for name in ("pricing", "joined", "optional", "frames", "listing")} == {(5, 0, 0)}
    assert local_store.read(second["sums"].seal).collect()["worth"].item() == 5
    assert side.asked == {"i0": 1, "i1": 1, "i2": 3, "i3": 1, "i4": 1}


def test_a_record_that_waits_above_is_in_no_quarantine_below(local_store: StateStore) -> None:
    """i0 and i3 are too many in stock; i1 cannot be listed; i2, i3 and i4 wait."""

    class Few(Stock):
        stock: int = Field(le=1)

    @mao.agent(name="stock")
    def much(items: mao.LazyFrame[Item]) -> mao.LazyFrame[Stock]:
        return items.select("item_id", stock=pl.when(pl.col("item_id").is_in(["i0", "i3"])).then(3).otherwise(1).cast(pl.Int64))

    @mao.agent(quarantine=ANY)
    def picky(pricing: Price, stock: Few) -> Listing:
        raise ValueError

    one = Run(local_store, shop(pricing("sync", policy=DEFER), much, picky), "one")
    one.enter(batch(5))
    for name in ("pricing", "stock"):
        one.step(name, resources={"side": Side(failing("i2"))})
    outcome = one.step("picky")
    assert counted(local_store, outcome) == (0, 2, 3)
    assert local_store.quarantine(outcome.seal).select("record", "side").rows() == [("i0", "input"), ("i1", "output")]


def test_an_agent_with_nothing_left_to_read_says_who_it_waits_for(local_store: StateStore) -> None:
    agent = pricing("sync", policy=DEFER, quarantine=ANY)

    @mao.agent
    def below(pricing: Price) -> Listing: ...

    run = Run(local_store, shop(agent, below), "one")
    run.enter(batch(3))
    # One record fails for good, and opens the breaker for the others: nothing is sealed but what waits and what was set aside.
    policy = {"pricing": {"retries": 0, "breaker": {"fail_max": 1}}}
    outcome = run.step("pricing", resources={"side": Side(failing("i0"))}, policies=policy)
    assert counted(local_store, outcome) == (0, 1, 2)
    with pytest.raises(PinError, match="All 2 records that it could read wait") as caught:
        run.step("below")
    assert [one.name for one in caught.value.checks if not one.passed] == ["pinned_base"]


def test_the_seal_says_what_was_in_force_and_what_it_came_to(local_store: StateStore) -> None:
    policies = {"pricing": {"when_open": "fallback", "breaker": {"fail_max": 1, "reset_timeout": 600}}}
    agent = pricing("sync", policy=mao.Policy(fallback=instead))
    outcome = stepped(local_store, agent, Side(failing("i0", times=1)), policies=policies)
    told_policy, usage = json.loads(outcome.seal.policy), json.loads(outcome.seal.usage)
    assert (told_policy["when_open"], told_policy["breaker"]["fail_max"]) == ("fallback", 1)
    assert told_policy["fallback"].endswith("test_degradation.instead")
    assert (usage["fallbacks"], usage["refused"], usage["failed"], outcome.seal.fallbacks) == (6, 5, 1, 6)
    assert "breaker" not in {one.name for one in outcome.checks}, "it is not declared"
    assert Counter(logged(local_store)["breaker"]) == {"closed": 1, "open": 5, None: 6}
