"""The calls of a step: told, each under its key, kept and not paid twice; and one bad record that does not stop the others."""

from __future__ import annotations

import asyncio
import json
import threading
import traceback
from collections import Counter
from typing import Annotated, Any

import polars as pl
import pytest
from pydantic import BaseModel, Field

import dagster_mao as mao
from dagster_mao.errors import AgentCallError, AgentFailedError, BatchRefusedError, RateLimitError, StoreError, WiringError
from dagster_mao.state import CallSummary, StateStore
from tests.shop import SECRET, WAYS, Item, Price, Run, Side, batch, failing, logged, pricing, rows, shop, told

ways = pytest.mark.parametrize("way", WAYS)
ANY = mao.Quarantine(max_share=1)
QUICK: dict[str, Any] = {"retry_within": 240.0}
KEPT = mao.Policy()


def priced(store: StateStore, agent: Any, side: Side, count: int = 3, run: str = "one", **given: Any) -> Any:
    """A run of the shop with so many items; the outcome of its pricing."""
    pipeline = shop(agent)
    one = Run(store, pipeline, run)
    one.enter(batch(count))
    return one.step(agent.name, resources={"side": side}, **given)


# -- the call log ----------------------------------------------------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("policy", [None, mao.Policy(retries=2, keep_answers=0, **QUICK)], ids=["no policy", "policy"])
def test_every_try_of_every_call_is_told(local_store: StateStore, way: str, policy: Any) -> None:
    side = Side(failing("i1", times=1))
    agent = pricing(way, policy=policy, model="m-1", quarantine=None if policy else ANY)
    outcome = priced(local_store, agent, side)
    found = logged(local_store)
    assert found.select("workflow_id", "epoch", "agent", "attempt", "run_id", "agent_version").unique().rows() == [
        ("shop/day", 0, "pricing", "one", "one", agent.agent_version)
    ]
    answered = {("i0", 1, "answered", None): 1, ("i2", 1, "answered", None): 1, ("i1", 1, "failed", "ConnectionError"): 1}
    again = {("i1", 2, "answered", None): 1} if policy else {}
    assert Counter(found.select("record", "number", "outcome", "error").rows()) == {**answered, **again}
    assert set(found["call"].str.len_bytes()) == {64}
    assert found.group_by("record").agg(pl.col("call").n_unique())["call"].to_list() == [1, 1, 1]
    assert (outcome.calls.calls, outcome.calls.tries, outcome.calls.failed) == (3, 4 if policy else 3, 1)
    assert CallSummary.model_validate_json(outcome.seal.usage) == outcome.calls == CallSummary.of(found)


@ways
def test_what_a_call_used_is_told_also_of_a_try_that_failed(local_store: StateStore, way: str) -> None:
    side = Side()

    def use(item: str, time: int) -> Any:
        mao.usage(input_tokens=10, output_tokens=time, cost=0.5, model="m-2")
        return ConnectionError() if item == "i1" else 1

    side.does = use
    outcome = priced(local_store, pricing(way, quarantine=ANY), side)
    assert logged(local_store).select("record", "model", "input_tokens", "output_tokens", "cost").sort("record").rows() == [
        ("i0", "m-2", 10, 1, 0.5),
        ("i1", "m-2", 10, 1, 0.5),
        ("i2", "m-2", 10, 1, 0.5),
    ]
    assert (outcome.calls.input_tokens, outcome.calls.cost) == (30, 1.5)


@ways
def test_a_failed_step_tells_its_calls_too(local_store: StateStore, way: str) -> None:
    with pytest.raises(AgentFailedError, match="ConnectionError on record 'i2'") as caught:
        priced(local_store, pricing(way, concurrency=1), Side(failing("i2")), count=9)
    assert told(local_store) == {("i0", "answered"): 1, ("i1", "answered"): 1, ("i2", "failed"): 1}
    assert (caught.value.calls.calls, caught.value.calls.failed) == (3, 1)
    assert [seal.agent for seal in local_store.seals("shop/day")] == ["items"]


def test_calls_with_frames_and_of_entries_are_told_without_a_record(local_store: StateStore) -> None:
    @mao.agent(name="items")
    def source() -> list[Item]:
        return batch(2)

    @mao.agent
    def framed(items: mao.LazyFrame[Item]) -> mao.LazyFrame[Price]:
        mao.usage(cost=2.0)
        return items.select("item_id", price="size", from_fallback=pl.lit(True))

    one = Run(local_store, shop(framed, entry=source), "one")
    one.step("items")
    outcome = one.step("framed")
    assert logged(local_store, "items").select("record", "number", "outcome").rows() == [(None, 1, "answered")]
    assert logged(local_store, "framed").select("record", "outcome", "cost").rows() == [(None, "answered", 2.0)]
    assert rows(local_store, outcome)["i0"]["from_fallback"] is False, "what the platform sets counts"
    assert outcome.seal.fallbacks is None


def test_records_that_are_handed_in_are_no_calls(local_store: StateStore) -> None:
    outcome = Run(local_store, shop(), "one").enter(batch(2))
    assert (outcome.calls, outcome.seal.usage) == (CallSummary(), None)
    assert logged(local_store, "items").is_empty()


class Person(BaseModel):
    ssn: Annotated[str, mao.Key, mao.Personal]


@ways
def test_a_personal_key_is_in_no_log_and_no_error_and_not_beside_the_answer(local_store: StateStore, way: str) -> None:
    @mao.agent
    def people() -> list[Person]:
        return []

    def ask(people: Person) -> Person:
        if people.ssn == SECRET:
            raise ValueError(people.ssn)
        return people

    async def asking(people: Person) -> Person:
        return ask(people)

    agent = mao.agent(name="asking", policy=KEPT, quarantine=ANY, **({"concurrency": 2} if way == "threads" else {}))(
        asking if way == "async" else ask
    )
    one = Run(local_store, mao.Pipeline("shop", entry=people, agents=[agent]), "one")
    one.enter([Person(ssn=SECRET), Person(ssn="other")])
    outcome = one.step("asking")
    found = logged(local_store, "asking")
    assert found["record"].to_list() == [None, None]
    assert SECRET not in str(found.to_dicts()) + repr(outcome.checks)
    held = local_store.quarantine(outcome.seal).to_dicts()[0]
    assert (held["record"], json.loads(held["masked"])) == (SECRET, {"ssn": "***"})


# -- one bad record --------------------------------------------------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("policy", [None, mao.Policy(retries=1, keep_answers=0, **QUICK)], ids=["no policy", "policy"])
def test_a_record_whose_call_finally_failed_is_set_aside_and_the_others_go_on(local_store: StateStore, way: str, policy: Any) -> None:
    side = Side(failing("i1", "i7"))
    outcome = priced(local_store, pricing(way, quarantine=mao.Quarantine(max_share=0.2), policy=policy), side, count=10)
    assert (outcome.seal.row_count, outcome.seal.quarantined) == (8, 2)
    held = local_store.quarantine(outcome.seal)
    assert held.select("record", "side", "upstream", "rules").rows() == [
        ("i1", "output", None, ["execute: ConnectionError"]),
        ("i7", "output", None, ["execute: ConnectionError"]),
    ]
    assert [json.loads(values) for values in held["values"]] == [{"item_id": "i1", "size": 1}, {"item_id": "i7", "size": 1}]
    (check,) = [check for check in outcome.checks if check.name == "output"]
    assert (check.passed, check.severity, check.metadata["quarantined"]) == (False, "warn", 2)
    assert check.metadata["reasons"][0] == {
        "rule": "execute: ConnectionError",
        "field": None,
        "count": 2,
        "samples": [{"item_id": "i1"}, {"item_id": "i7"}],
    }
    assert SECRET not in held.write_json() + repr(outcome.checks)


@ways
def test_past_the_share_no_further_call_is_made(local_store: StateStore, way: str) -> None:
    side = Side(lambda item, time: ConnectionError())
    agent = pricing(way, quarantine=mao.Quarantine(max_share=0.02), **({"concurrency": 3} if way != "sync" else {}))
    with pytest.raises(BatchRefusedError, match=r"of 100 records; at most 2.0% may be quarantined") as caught:
        priced(local_store, agent, side, count=100)
    assert 3 <= sum(side.asked.values()) <= 3 + 2
    assert sum(told(local_store).values()) == sum(side.asked.values()) == caught.value.calls.tries
    assert [check.name for check in caught.value.checks if not check.passed] == ["output"]
    assert [seal.agent for seal in local_store.seals("shop/day")] == ["items"]


@ways
def test_what_was_set_aside_before_the_calls_counts_in_the_share(local_store: StateStore, way: str) -> None:
    class Large(Item):
        size: int = Field(ge=2)

    def ask(items: Large, *, side: Side) -> Price:
        return Price(item_id=items.item_id, price=side.ask(items.item_id))

    async def asking(items: Large, *, side: Side) -> Price:
        return ask(items, side=side)

    limited = {"concurrency": 1, "quarantine": mao.Quarantine(max_share=0.5)}
    agent = mao.agent(name="asking", **limited)(asking if way == "async" else ask)
    side = Side(lambda item, time: ConnectionError())
    one = Run(local_store, shop(agent), "one")
    one.enter([*batch(3), *(Item(item_id=f"large{n}", size=2) for n in range(5))])
    with pytest.raises(BatchRefusedError, match="5 of 8 records"):
        one.step("asking", resources={"side": side})
    assert sum(side.asked.values()) == 2


@ways
@pytest.mark.parametrize("raised", [AgentCallError, WiringError, StoreError, RateLimitError, mao.PinError])
def test_errors_of_the_platform_are_about_the_batch_whatever_is_declared(local_store: StateStore, way: str, raised: Any) -> None:
    side = Side(lambda item, time: raised("of the platform") if item == "i1" else 1)
    with pytest.raises(raised, match="of the platform"):
        priced(local_store, pricing(way, quarantine=ANY, policy=mao.Policy(retries=1, keep_answers=0, **QUICK)), side)


@ways
def test_what_ends_a_process_ends_the_step(local_store: StateStore, way: str) -> None:
    with pytest.raises(SystemExit):
        priced(local_store, pricing(way, quarantine=ANY), Side(lambda item, time: SystemExit(3)))


@ways
def test_the_wrong_kind_of_answer_is_that_records_failure(local_store: StateStore, way: str) -> None:
    def ask(items: Item) -> Price:
        return None if items.item_id == "i1" else Price(item_id=items.item_id, price=1)  # type: ignore[return-value]

    async def asking(items: Item) -> Price:
        return ask(items)

    declared: dict[str, Any] = {"name": "asking", "concurrency": 2 if way == "threads" else 1}
    agent = mao.agent(**declared, quarantine=ANY)(asking if way == "async" else ask)
    outcome = priced(local_store, agent, Side())
    assert local_store.quarantine(outcome.seal).select("record", "rules").rows() == [("i1", ["execute: returned NoneType"])]
    with pytest.raises(AgentFailedError, match="It returned NoneType on record 'i1', not Price"):
        priced(local_store, mao.agent(**declared)(asking if way == "async" else ask), Side(), run="two")


class Named(BaseModel):
    item_id: Annotated[str, mao.Key]
    name: Annotated[str, mao.Personal] = SECRET


def test_what_several_upstreams_gave_is_kept_by_upstream_and_masked(local_store: StateStore) -> None:
    @mao.agent
    def names(items: mao.LazyFrame[Item]) -> mao.LazyFrame[Named]:
        return items.select("item_id", name=pl.lit(SECRET))

    @mao.agent(quarantine=ANY)
    def both(items: Item, names: Named) -> Price:
        raise ValueError(names.name)

    one = Run(local_store, shop(names, both), "one")
    one.enter(batch(1))
    one.step("names")
    outcome = one.step("both")
    (held,) = local_store.quarantine(outcome.seal).to_dicts()
    whole = {"item_id": "i0", "items": {"item_id": "i0", "size": 1}, "names": {"item_id": "i0", "name": SECRET}}
    assert json.loads(held["values"]) == whole
    assert json.loads(held["masked"]) == {**whole, "names": {"item_id": "i0", "name": "***"}}


@ways
def test_the_quarantine_is_the_same_whatever_order_the_calls_end_in(local_store: StateStore, way: str) -> None:
    digests = set()
    for run in ("one", "two", "three"):
        side = Side(failing("i1", "i3", "i5", "i8"))
        digests.add(priced(local_store, pricing(way, quarantine=ANY), side, count=10, run=run).seal.quarantine_digest)
        held = local_store.quarantine(local_store.seals("shop/day")[-1])
        assert held["record"].to_list() == ["i1", "i3", "i5", "i8"]
        digests.discard(None)
    assert len(digests) == 3, "the attempt is in the rows"


@ways
def test_an_errors_text_is_withheld_where_there_is_personal_data(local_store: StateStore, way: str) -> None:
    class Told(Item):
        name: Annotated[str, mao.Personal] = SECRET

    @mao.agent(name="items")
    def told_items() -> list[Told]:
        return [Told(item_id="i0")]

    def ask(items: Told) -> Price:
        raise ValueError(items.name)

    async def asking(items: Told) -> Price:
        return ask(items)

    agent = mao.agent(name="asking", **({"concurrency": 2} if way == "threads" else {}))(asking if way == "async" else ask)
    one = Run(local_store, shop(agent, entry=told_items), "one")
    one.step("items")
    with pytest.raises(AgentFailedError, match="ValueError on record 'i0'") as caught:
        one.step("asking")
    text = "".join(traceback.format_exception(caught.value))
    assert SECRET not in text
    assert "raise ValueError(items.name)" in text


# -- concurrency -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("way", "declared", "most"), [("async", None, 16), ("async", 3, 3), ("sync", None, 1), ("sync", 1, 1), ("threads", 3, 3)]
)
def test_as_many_calls_at_a_time_as_declared(local_store: StateStore, way: str, declared: Any, most: int) -> None:
    running, found, lock = 0, 0, threading.Lock()
    together = threading.Barrier(most, timeout=30)

    async def asking(items: Item) -> Price:
        return await asyncio.to_thread(ask, items)

    def ask(items: Item) -> Price:
        nonlocal running, found
        with lock:
            running += 1
            found = max(found, running)
        together.wait()
        with lock:
            running -= 1
        return Price(item_id=items.item_id, price=1)

    agent = mao.agent(name="asking", concurrency=declared)(asking if way == "async" else ask)
    if way == "async" and declared is None:
        # asyncio's own pool may be smaller than sixteen.
        agent = mao.agent(name="asking")(_meeting(together_of(most)))
        assert priced(local_store, agent, Side(), count=32).seal.row_count == 32
        return
    assert priced(local_store, agent, Side(), count=12).seal.row_count == 12
    assert found == most


def together_of(most: int) -> Any:
    waiting: list[asyncio.Future[None]] = []

    async def meet() -> None:
        waiting.append(asyncio.get_running_loop().create_future())
        mine = waiting[-1]
        assert len(waiting) <= most
        if len(waiting) == most:
            for one in waiting:
                one.set_result(None)
            waiting.clear()
        await asyncio.wait_for(mine, 30)

    return meet


def _meeting(meet: Any) -> Any:
    async def asking(items: Item) -> Price:
        await meet()
        return Price(item_id=items.item_id, price=1)

    return asking


def test_a_client_is_bound_to_one_loop_for_all_chunks(local_store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dagster_mao.boundary._inputs.CHUNK_RECORDS", 4)
    loops = set()

    @mao.agent
    async def asking(items: Item) -> Price:
        loops.add(asyncio.get_running_loop())
        return Price(item_id=items.item_id, price=1)

    async def notebook() -> None:
        priced(local_store, asking, Side(), count=11, run="two")

    priced(local_store, asking, Side(), count=11)
    assert len(loops) == 1
    asyncio.run(notebook())
    assert len(loops) == 2


@ways
def test_agents_that_call_agents_are_refused_in_whatever_thread(local_store: StateStore, way: str) -> None:
    @mao.agent
    def other(items: Item) -> Price: ...

    def reach(items: Item) -> Price:
        return other(items)

    async def reaching(items: Item) -> Price:
        return other(items)

    agent = mao.agent(name="reaching", quarantine=ANY, **({"concurrency": 2} if way == "threads" else {}))(
        reaching if way == "async" else reach
    )
    with pytest.raises(AgentCallError):
        priced(local_store, agent, Side())


@ways
def test_results_are_in_the_order_of_the_records_over_all_chunks(
    local_store: StateStore, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dagster_mao.boundary._inputs.CHUNK_RECORDS", 7)
    monkeypatch.setattr("dagster_mao.boundary._scratch.KEPT_ROWS", 10)
    outcome = priced(local_store, pricing(way, policy=KEPT), Side(lambda item, time: int(item[1:])), count=50)
    assert local_store.read(outcome.seal).collect()["price"].to_list() == list(range(50))
    assert not list((local_store.objects.local / ".staging").glob("*"))  # type: ignore[operator]
    assert logged(local_store).height == 50


# -- what is told to execute -----------------------------------------------------------------------------------------------------------


@ways
@pytest.mark.parametrize("policy", [None, KEPT], ids=["no policy", "policy"])
def test_a_call_knows_its_record_and_its_key(local_store: StateStore, way: str, policy: Any) -> None:
    seen: dict[str, tuple[str | None, str]] = {}

    def ask(ctx: mao.AgentContext, items: Item) -> Price:
        seen[items.item_id] = ctx.record, ctx.idempotency_key
        return Price(item_id=items.item_id, price=1)

    async def asking(ctx: mao.AgentContext, items: Item) -> Price:
        return ask(ctx, items)

    declared = {"name": "asking", "policy": policy, "concurrency": 2 if way == "threads" else 1}
    agent = mao.agent(**declared)(asking if way == "async" else ask)
    priced(local_store, agent, Side())
    assert {item: record for item, (record, _) in seen.items()} == {"i0": "i0", "i1": "i1", "i2": "i2"}
    assert {item: key for item, (_, key) in seen.items()} == dict(logged(local_store, "asking").select("record", "call").rows())


@ways
def test_the_key_of_a_call_is_its_intent(local_store: StateStore, way: str) -> None:
    """The same for the same inputs in every attempt; another for a changed record; another after a fence."""
    side, agent = Side(), pricing(way)
    for run in ("one", "two"):
        priced(local_store, agent, side, run=run)
    assert [len(keys) for keys in side.keys.values()] == [1, 1, 1]
    changed = Run(local_store, shop(agent), "three")
    changed.enter([*batch(2), Item(item_id="i2", size=2)])
    changed.step("pricing", resources={"side": side})
    assert [len(side.keys[item]) for item in ("i0", "i1", "i2")] == [1, 1, 2]
    local_store.fence("shop/day", attempt="three", run_id="undo")
    priced(local_store, agent, side, run="four")
    assert [len(side.keys[item]) for item in ("i0", "i1", "i2")] == [2, 2, 3]
    assert logged(local_store)["epoch"].unique().sort().to_list() == [0, 1]


# -- answers ---------------------------------------------------------------------------------------------------------------------------


@ways
def test_what_was_answered_is_not_asked_again(local_store: StateStore, way: str) -> None:
    side = Side(failing("i3", times=1))
    agent = pricing(way, policy=KEPT, concurrency=1)
    with pytest.raises(AgentFailedError):
        priced(local_store, agent, side, count=6)
    outcome = priced(local_store, agent, side, count=6, run="two")
    assert side.asked == {"i0": 1, "i1": 1, "i2": 1, "i3": 2, "i4": 1, "i5": 1}
    assert [len(keys) for keys in side.keys.values()] == [1] * 6
    assert told(local_store) == {
        **{(f"i{n}", "answered"): 1 for n in range(6)},
        **{(f"i{n}", "reused"): 1 for n in range(3)},
        ("i3", "failed"): 1,
    }
    assert (outcome.calls.reused, outcome.calls.answered, outcome.seal.row_count) == (3, 3, 6)
    again = priced(local_store, agent, side, count=6, run="three")
    assert (again.calls.reused, again.calls.tries, again.seal.digest) == (6, 0, outcome.seal.digest)
    assert sum(side.asked.values()) == 7


@ways
def test_another_input_agent_model_configuration_or_contract_is_asked_anew(local_store: StateStore, way: str) -> None:
    class Priced(Price):
        price: int = Field(ge=0)

    side = Side()
    first = pricing(way, policy=KEPT, version="1")
    asked = 0

    def asks(agent: Any, run: str, count: int = 1, **given: Any) -> int:
        nonlocal asked
        priced(local_store, agent, side, count=count, run=run, **given)
        before, asked = asked, side.asked.total()
        return asked - before

    assert asks(first, "1") == 1
    assert asks(first, "2") == 0
    assert asks(first, "3", count=3) == 2
    assert asks(pricing(way, policy=KEPT, version="2"), "4") == 1
    assert asks(pricing(way, policy=KEPT, version="1", model="m-2"), "5") == 1
    assert asks(first, "6", config_digest="other") == 1
    assert asks(first, "7") == 0
    assert asks(pricing(way, policy=mao.Policy(keep_answers=0), version="1"), "8") == 1


@ways
def test_fresh_asks_anew_and_its_own_answers_are_kept(local_store: StateStore, way: str) -> None:
    prices = iter(range(1, 9))
    side = Side(lambda item, time: next(prices))
    agent = pricing(way, policy=KEPT)
    pipeline = shop(agent)
    for run, fresh, price in (("one", False, 1), ("two", False, 1), ("three", True, 2), ("three", True, 2), ("four", False, 2)):
        one = Run(local_store, pipeline, run)
        one.enter(batch(1))
        outcome = one.step("pricing", resources={"side": side}, fresh=fresh)
        assert rows(local_store, outcome)["i0"]["price"] == price
    assert side.asked == {"i0": 2}


@ways
def test_an_answer_that_cannot_be_read_is_asked_again(local_store: StateStore, way: str) -> None:
    import sqlalchemy as sa

    from dagster_mao.gateway import shared_store

    side, agent = Side(), pricing(way, policy=KEPT)
    priced(local_store, agent, side)
    with shared_store(str(local_store.database)).transaction() as connection:
        found = connection.execute(sa.text("SELECT id, value FROM mao_answers ORDER BY id")).all()
        for answer, value in zip([row.id for row in found], (b"{", b'{"item_id":"i1","price":"x","from_fallback":false}'), strict=False):
            connection.execute(sa.text("UPDATE mao_answers SET value = :value WHERE id = :id"), {"value": value, "id": answer})
    assert len(found) == 3
    outcome = priced(local_store, agent, side, run="two")
    assert sorted(side.asked.values()) == [1, 2, 2]
    assert outcome.calls.reused == 1


@ways
def test_an_answer_that_breaks_the_contract_is_an_answer_and_not_paid_twice(local_store: StateStore, way: str) -> None:
    """A key that was never read: the batch is refused, and is not answered otherwise on the next run."""
    side = Side()

    def ask(items: Item) -> Price:
        return Price(item_id=items.item_id + "x", price=side.ask(items.item_id))

    async def asking(items: Item) -> Price:
        return ask(items)

    agent = mao.agent(name="asking", policy=KEPT)(asking if way == "async" else ask)
    for run in ("one", "two"):
        with pytest.raises(BatchRefusedError, match="never read"):
            priced(local_store, agent, side, run=run)
    assert side.asked == {"i0": 1, "i1": 1, "i2": 1}
    with pytest.raises(BatchRefusedError):
        priced(local_store, agent, side, run="three", fresh=True)
    assert side.asked == {"i0": 2, "i1": 2, "i2": 2}


@ways
def test_an_output_that_could_not_be_made_is_no_answer(local_store: StateStore, way: str) -> None:
    side = Side(lambda item, time: pl if item == "i1" else 1)

    def ask(items: Item) -> Price:
        side.ask(items.item_id)
        return Price.model_validate({"item_id": items.item_id, "price": "x" if items.item_id == "i1" else 1})

    async def asking(items: Item) -> Price:
        return ask(items)

    agent = mao.agent(name="asking", policy=KEPT, quarantine=ANY)(asking if way == "async" else ask)
    for run in ("one", "two"):
        outcome = priced(local_store, agent, side, run=run)
        assert local_store.quarantine(outcome.seal).select("record", "rules").rows() == [("i1", ["price: int_parsing"])]
    assert side.asked == {"i0": 1, "i1": 2, "i2": 1}


@ways
def test_what_can_be_no_row_is_not_kept_and_that_is_said(local_store: StateStore, way: str, caplog: pytest.LogCaptureFixture) -> None:
    def ask(items: Item) -> Price:
        return Price.model_construct(item_id=items.item_id, price="x" if items.item_id == "i1" else 1, from_fallback=False)

    async def asking(items: Item) -> Price:
        return ask(items)

    agent = mao.agent(name="asking", policy=KEPT, quarantine=ANY)(asking if way == "async" else ask)
    for run, reused in (("one", 0), ("two", 2)):
        outcome = priced(local_store, agent, Side(), run=run)
        assert local_store.quarantine(outcome.seal)["record"].to_list() == ["i1"]
        assert outcome.calls.reused == reused
    assert "were not kept" in caplog.text


def test_a_policy_needs_a_database_or_says_that_it_keeps_nothing(s3: dict[str, str]) -> None:
    import uuid

    store = StateStore(f"s3://states/{uuid.uuid4().hex}", s3)
    with pytest.raises(WiringError) as refused:
        priced(store, pricing("sync", policy=KEPT), Side())
    assert "database" in str(refused.value.fix)
    assert "keep_answers=0" in str(refused.value.fix)
    assert priced(store, pricing("sync", policy=mao.Policy(keep_answers=0)), Side(), run="two").seal.row_count == 3
    assert logged(store).height == 3


# -- answers of calls with frames --------------------------------------------------------------------------------------------------------


def framed(side: Side, *, how: str = "lazy", is_async: bool = False, **declared: Any) -> Any:
    """The agent with frames: lazily, eagerly, or with a column too many."""

    def work(ctx: mao.AgentContext, items: mao.LazyFrame[Item]) -> mao.LazyFrame[Price]:
        price = side.ask("frame", ctx.idempotency_key)
        made = items.select("item_id", price=pl.lit(price, dtype=pl.Int64))
        if how == "wrong":
            return made.with_columns(surplus=1)
        return made if how == "lazy" else made.collect()

    async def working(ctx: mao.AgentContext, items: mao.LazyFrame[Item]) -> mao.LazyFrame[Price]:
        return work(ctx, items)

    return mao.agent(name="framed", version=how, **declared)(working if is_async else work)


@pytest.mark.parametrize("how", ["lazy", "eager"])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_frame_is_paid_once(store: StateStore, how: str, is_async: bool, tmp_path: Any) -> None:
    store = StateStore(store.root, store.objects.storage_options, database=str(tmp_path / "shared.db"), single_host=True)
    side = Side(lambda item, time: time)
    agent = framed(side, how=how, is_async=is_async, policy=KEPT)
    first = priced(store, agent, side)
    second = priced(store, agent, side, run="two")
    assert (side.asked, first.seal.digest) == ({"frame": 1}, second.seal.digest)
    assert (second.calls.reused, second.calls.tries) == (1, 0)
    assert told(store, "framed") == {(None, "answered"): 1, (None, "reused"): 1}
    third = priced(store, agent, side, run="three", fresh=True)
    assert rows(store, third)["i0"]["price"] == 2
    assert rows(store, priced(store, agent, side, run="four"))["i0"]["price"] == 2
    priced(store, agent, side, count=4, run="five")
    assert (side.asked["frame"], len(side.keys["frame"])) == (3, 2)


def test_a_frame_that_breaks_the_contract_is_paid_once_too(local_store: StateStore) -> None:
    side = Side()
    for run in ("one", "two"):
        with pytest.raises(BatchRefusedError, match="unexpected column 'surplus'"):
            priced(local_store, framed(side, how="wrong", policy=KEPT), side, run=run)
    assert side.asked == {"frame": 1}


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_a_kept_frame_that_is_damaged_is_asked_again(local_store: StateStore, damage: str) -> None:
    side = Side()
    agent = framed(side, policy=KEPT)
    digest = priced(local_store, agent, side).seal.digest
    (path,) = local_store.objects.list("answers")
    file = local_store.objects.local / path  # type: ignore[operator]
    data = bytearray(file.read_bytes())
    file.unlink()
    if damage == "changed":
        data[10] ^= 1
        file.write_bytes(data)
    again = priced(local_store, agent, side, run="two")
    assert side.asked == {"frame": 2}
    assert again.seal.digest == digest


def test_what_an_entry_brings_in_is_of_its_attempt(local_store: StateStore) -> None:
    """A re-execution does not pay for it again; a new attempt asks the world how it is now."""
    side = Side()

    @mao.agent(name="items", policy=KEPT, quarantine=ANY)
    def source(ctx: mao.AgentContext) -> list[Item]:
        return batch(side.ask("batch", ctx.idempotency_key) + 1)

    pipeline = shop(entry=source)
    for run in (Run(local_store, pipeline, "one"), Run(local_store, pipeline, "again", root="one"), Run(local_store, pipeline, "one")):
        assert run.step("items").seal.row_count == 2
    assert side.asked == {"batch": 1}
    Run(local_store, pipeline, "two").step("items")
    assert (side.asked["batch"], len(side.keys["batch"])) == (2, 2)


def test_an_entry_with_records_that_can_be_no_rows_is_not_kept(local_store: StateStore) -> None:
    side = Side()

    @mao.agent(name="items", policy=KEPT, quarantine=ANY)
    def source() -> list[Item]:
        side.ask("batch")
        return [{"item_id": "i0", "size": "many"}, *batch(1)]  # type: ignore[list-item]

    for run in ("one", "again"):
        outcome = Run(local_store, shop(entry=source), run, root="one" if run == "again" else None).step("items")
        assert (outcome.seal.row_count, outcome.seal.quarantined) == (0, 2), "a doubled key is doubled, however bad one of them is"
    assert side.asked == {"batch": 2}


def test_old_frames_go(local_store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dagster_mao.boundary._call._SHORTEST_KEPT", 0.0)
    side = Side()
    priced(local_store, framed(side, policy=KEPT), side)
    import os
    import time

    (path,) = local_store.objects.list("answers")
    os.utime(local_store.objects.local / path, (0, time.time() - 10))  # type: ignore[operator]
    priced(local_store, framed(side, policy=mao.Policy(keep_answers=5)), side, count=2, run="two")
    assert len(list(local_store.objects.list("answers"))) == 1
    assert not local_store.objects.exists(path)


# -- operators -------------------------------------------------------------------------------------------------------------------------


@ways
def test_an_operator_changes_a_policy_and_the_seal_says_so(local_store: StateStore, way: str) -> None:
    agent = pricing(way, policy=mao.Policy(retries=0, keep_answers=0))
    with pytest.raises(AgentFailedError):
        priced(local_store, agent, Side(failing("i1", times=1)))
    changes = {"*": {"retries": 1}, "pricing": {"retry_within": 20}, "other": {"retries": 9}}
    outcome = priced(local_store, agent, Side(failing("i1", times=1)), run="two", policies=changes)
    in_force = json.loads(outcome.seal.policy)
    assert (in_force["retries"], in_force["retry_within"], in_force["timeout"]) == (1, 20, None)
    assert priced(local_store, agent, Side(), run="three").seal.policy is None
    assert priced(local_store, agent, Side(), run="four", policies={"*": {"retries": 0}}).seal.policy is None
    unlimited = priced(local_store, pricing(way), Side(), run="five", policies={"pricing": {"timeout": 30}})
    assert json.loads(unlimited.seal.policy)["timeout"] == 30


def test_an_override_that_makes_no_policy_is_refused(local_store: StateStore) -> None:
    with pytest.raises(WiringError) as refused:
        priced(local_store, framed(Side()), Side(), policies={"framed": {"breaker": {}, "when_open": "defer"}})
    assert (refused.value.agent, refused.value.field) == ("framed", "when_open")
    with pytest.raises(WiringError):
        priced(local_store, pricing("sync"), Side(), run="two", policies={"pricing": {"timeout": -1}})


@ways
@pytest.mark.parametrize("change", [None, {"breaker": None}, {"breaker": {"fail_max": 2}}])
def test_the_breakers_check_is_there_where_the_agent_declares_it(local_store: StateStore, way: str, change: Any) -> None:
    policies = {"pricing": change} if change else {}
    declared = priced(local_store, pricing(way, policy=mao.Policy(breaker=mao.Breaker())), Side(), policies=policies)
    checks = {check.name: check for check in declared.checks}
    assert list(checks) == ["pinned_base", "input_items", "breaker", "output"]
    assert checks["breaker"].passed
    assert ("switched it off" in checks["breaker"].description) == (change == {"breaker": None})
    undeclared = priced(local_store, pricing(way), Side(), run="two", policies=policies)
    assert "breaker" not in {check.name for check in undeclared.checks}
