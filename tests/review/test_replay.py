"""Replay: an agent run again on what it saw then, by today's code, which leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import pytest
from pydantic import BaseModel, Field
from typer.testing import CliRunner

import dagster_mao as mao
from dagster_mao.cli import app
from dagster_mao.errors import AgentFailedError, AnswerNotFrozenError, BatchRefusedError, UnknownVersionError
from dagster_mao.review import MASK, replay
from dagster_mao.state import StateStore
from tests.shop import WAYS, Item, Price, Side, batch, pricing, shop

SECRET = "Trillian"


@pytest.fixture
def store(tmp_path: Path) -> StateStore:
    return StateStore(tmp_path / "state")


def bytes_of(store: StateStore) -> dict[str, str]:
    root = Path(store.root)
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in root.rglob("*") if file.is_file()}


@pytest.fixture
def untouched(store: StateStore) -> Any:
    """Whatever a test replays, each byte below the store's root is what it was, the shared database and the staging folder too."""
    before: dict[str, str] = {}

    def replayed(*given: Any, **options: Any) -> Any:
        before.update(bytes_of(store))
        try:
            return replay(store, *given, **options)
        finally:
            assert bytes_of(store) == before

    return replayed


# -- what it saw ---------------------------------------------------------------------------------------------------------------------


def doubling(factor: int = 2, version: str = "1", **declared: Any) -> Any:
    @mao.agent(name="pricing", version=version, **declared)
    def execute(items: Item) -> Price:
        return Price(item_id=items.item_id, price=factor * items.size)

    return execute


def test_the_same_code_makes_the_same_records(store: StateStore, untouched: Callable[..., Any]) -> None:
    pipeline = shop(doubling())
    seal = mao.run(pipeline, batch(3), store=store, workflow="day").seals["pricing"]
    found = untouched(pipeline, seal)
    assert found.same
    assert found.made.digest == seal.digest
    assert (found.difference.same, found.effects, found.calls.calls) == (3, (), 3)


def test_todays_code_is_compared_record_by_record(store: StateStore, untouched: Callable[..., Any]) -> None:
    seal = mao.run(shop(doubling()), batch(3), store=store, workflow="day").seals["pricing"]

    @mao.agent(version="2")
    def rounding(items: Item) -> Price:
        return Price(item_id=items.item_id, price=5 if items.item_id == "i1" else 2 * items.size)

    rounding.name = "pricing"
    found = untouched(shop(rounding), seal.reference)
    assert not found.same
    assert [(one.key, one.fields) for one in found.difference.records] == [("i1", {"price": (2, 5)})]
    assert found.difference.circumstances["agent_version"] == ("1", "2")


def test_it_reads_what_was_pinned_and_not_what_is_effective(store: StateStore, untouched: Callable[..., Any]) -> None:
    pipeline = shop(doubling())
    first = mao.run(pipeline, batch(2, size=1), store=store, workflow="day").seals["pricing"]
    mao.run(pipeline, batch(2, size=7), store=store, workflow="day")
    assert untouched(pipeline, first).same
    assert store.read(store.effective("shop/day")["items"]).collect()["size"].to_list() == [7, 7]


def test_a_version_of_an_attempt_that_was_fenced_since(store: StateStore, untouched: Callable[..., Any]) -> None:
    pipeline = shop(doubling())
    seal = mao.run(pipeline, batch(2), store=store, workflow="day").seals["pricing"]
    store.fence("shop/day", attempt=seal.attempt, run_id="undo")
    assert untouched(pipeline, seal).same


def test_time_and_chance_are_those_of_then(store: StateStore, untouched: Callable[..., Any]) -> None:
    @mao.agent(name="pricing")
    def by_chance(ctx: mao.AgentContext, items: Item) -> Price:
        return Price(item_id=items.item_id, price=ctx.random(items.item_id).randrange(10**9) + ctx.now.microsecond)

    pipeline = shop(by_chance)
    seal = mao.run(pipeline, batch(20), store=store, workflow="day").seals["pricing"]
    assert untouched(pipeline, seal).same


def test_what_read_nothing_cannot_be_replayed(store: StateStore, untouched: Callable[..., Any]) -> None:
    pipeline = shop(doubling())
    mao.run(pipeline, batch(1), store=store, workflow="day")
    with pytest.raises(UnknownVersionError, match="is an entry"):
        untouched(pipeline, "shop/day@0")


def test_what_todays_code_refuses_is_said(store: StateStore, untouched: Callable[..., Any]) -> None:
    class Dear(Price):
        price: int = Field(gt=10)

    @mao.agent(name="pricing")
    def dear(items: Item) -> Dear:
        return Dear.model_construct(item_id=items.item_id, price=2, from_fallback=False)

    @mao.agent(name="pricing")
    def broken(items: Item) -> Price:
        raise ZeroDivisionError

    seal = mao.run(shop(doubling()), batch(2), store=store, workflow="day").seals["pricing"]
    with pytest.raises(BatchRefusedError):
        untouched(shop(dear), seal)
    with pytest.raises(AgentFailedError):
        untouched(shop(broken), seal)


def test_what_would_be_kept_out_now_counts_as_a_difference(store: StateStore, untouched: Callable[..., Any]) -> None:
    class Cheap(Price):
        price: int = Field(lt=10)

    @mao.agent(name="pricing", quarantine=mao.Quarantine(max_share=0.5))
    def cheap(items: Item) -> Cheap:
        return Cheap.model_construct(item_id=items.item_id, price=2 * items.size, from_fallback=False)

    records = [*batch(3), Item(item_id="big", size=50)]
    seal = mao.run(shop(doubling()), records, store=store, workflow="day").seals["pricing"]
    found = untouched(shop(cheap), seal)
    assert not found.same
    assert (found.made.quarantined, [(one.key, one.change) for one in found.difference.records]) == (1, [("big", "removed")])


# -- effects -------------------------------------------------------------------------------------------------------------------------


class Bank:
    def __init__(self) -> None:
        self.reserved: list[str] = []

    def reserve(self, record: str) -> str:
        self.reserved.append(record)
        return f"r-{record}"

    async def areserve(self, record: str) -> str:
        return self.reserve(record)


def in_place(ctx: mao.AgentContext, items: Item, *, bank: Bank) -> Price:
    for _ in range(2):
        ctx.effect("reserve", lambda effect: bank.reserve(items.item_id))
    return Price(item_id=items.item_id, price=1)


async def awaited(ctx: mao.AgentContext, items: Item, *, bank: Bank) -> Price:
    for _ in range(2):
        await ctx.effect("reserve", lambda effect: bank.areserve(items.item_id))
    return Price(item_id=items.item_id, price=1)


def framed(ctx: mao.AgentContext, items: mao.DataFrame[Item], *, bank: Bank) -> mao.DataFrame[Price]:
    for _ in range(2):
        ctx.effects(f"reserve{_}", lambda effect: bank.reserve(effect.record), items, key="item_id")
    return items.select("item_id", price=pl.lit(1, pl.Int64), from_fallback=pl.lit(False))  # type: ignore[return-value]


def release(undo: mao.Undo, *, bank: Bank) -> None: ...


@pytest.mark.parametrize("execute", [in_place, awaited, framed])
@pytest.mark.parametrize("policy", [None, mao.Policy(retries=2, timeout=60, keep_answers=0)])
def test_no_effect_happens_and_each_is_told(
    store: StateStore, untouched: Callable[..., Any], execute: Any, policy: mao.Policy | None
) -> None:
    """Nothing in the bank, and nothing in the journal: the folder holds it."""
    bank = Bank()
    pipeline = shop(mao.agent(name="pricing", compensate=release, policy=policy)(execute))
    seal = mao.run(pipeline, batch(3), store=store, workflow="day", resources={"bank": bank}).seals["pricing"]
    assert len(bank.reserved) == 6
    found = untouched(pipeline, seal, resources={"bank": bank})
    assert len(bank.reserved) == 6
    assert found.same
    assert sorted(one.record for one in found.effects) == ["i0", "i0", "i1", "i1", "i2", "i2"]


def test_an_agent_that_needs_what_its_effect_returns_gets_nothing(store: StateStore, untouched: Callable[..., Any]) -> None:
    class Receipt(Price):
        receipt: str

    @mao.agent(name="pricing", compensate=release)
    def receipts(ctx: mao.AgentContext, items: Item, *, bank: Bank) -> Receipt:
        receipt = ctx.effect("reserve", lambda effect: bank.reserve(items.item_id))
        return Receipt(item_id=items.item_id, price=1, receipt=receipt or "none in a replay")

    pipeline = shop(receipts)
    seal = mao.run(pipeline, batch(1), store=store, workflow="day", resources={"bank": Bank()}).seals["pricing"]
    found = untouched(pipeline, seal, resources={"bank": Bank()})
    assert found.difference.records[0].fields == {"receipt": ("r-i0", "none in a replay")}


# -- answers -------------------------------------------------------------------------------------------------------------------------

KEEPS = mao.Policy(retries=1, breaker=mao.Breaker(fail_max=3), rate_limit="6000/minute")


def framed_pricing(**declared: Any) -> Any:
    @mao.agent(name="pricing", **declared)
    def execute(items: mao.DataFrame[Item], *, side: Side) -> mao.DataFrame[Price]:
        prices = pl.Series("price", [side.ask(item) for item in items["item_id"]], dtype=pl.Int64)
        return items.select("item_id").with_columns(prices, from_fallback=pl.lit(False))  # type: ignore[return-value]

    return execute


def asking(way: str, **declared: Any) -> Any:
    return framed_pricing(**declared) if way == "frame" else pricing(way, **declared)


@pytest.mark.parametrize("way", [*WAYS, "frame"])
def test_frozen_nobody_is_asked(store: StateStore, untouched: Callable[..., Any], way: str) -> None:
    side = Side(lambda item, time: 10 * time)
    pipeline = shop(asking(way, policy=KEEPS, version="1"))
    seal = mao.run(pipeline, batch(3), store=store, workflow="day", resources={"side": side}).seals["pricing"]
    found = untouched(pipeline, seal, resources={"side": side})
    assert found.same
    assert set(side.asked.values()) == {1}
    assert (found.calls.tries, found.calls.reused) == (0, 1 if way == "frame" else 3)


def test_what_a_killed_process_left_of_the_database_is_read_and_left_as_it_is(store: StateStore, tmp_path: Path) -> None:
    """Its last commits are in a file beside the database. Whoever opens the two, only to read, and leaves, writes them into one."""
    side = Side()
    pipeline = shop(pricing("sync", policy=KEEPS, version="1"))
    seal = mao.run(pipeline, batch(3), store=store, workflow="day", resources={"side": side}).seals["pricing"]
    left = StateStore(shutil.copytree(store.root, tmp_path / "left"))
    before = bytes_of(left)
    assert "shared.db-wal" in before
    assert replay(left, pipeline, seal, resources={"side": side}).same
    assert bytes_of(left) == before


@pytest.mark.parametrize("way", [*WAYS, "frame"])
def test_frozen_a_missing_answer_is_an_error_and_live_it_is_asked(store: StateStore, untouched: Callable[..., Any], way: str) -> None:
    """Answers are of one code: after a change they are missing."""
    side = Side(lambda item, time: 10 * time)
    seal = mao.run(shop(asking(way, policy=KEEPS, version="1")), batch(3), store=store, workflow="day", resources={"side": side}).seals[
        "pricing"
    ]
    changed = shop(asking(way, policy=KEEPS, version="2"))
    with pytest.raises(AnswerNotFrozenError, match="--live"):
        untouched(changed, seal, resources={"side": side})
    assert set(side.asked.values()) == {1}
    found = untouched(changed, seal, resources={"side": side}, live=True)
    assert set(side.asked.values()) == {2}
    assert found.difference.records[0].fields == {"price": (10, 20)}


def test_live_nothing_is_kept_and_a_breaker_of_then_is_left_alone(store: StateStore, untouched: Callable[..., Any]) -> None:
    side = Side(lambda item, time: 1 if time == 1 else ConnectionError(SECRET))
    policy = mao.Policy(breaker=mao.Breaker(fail_max=1))
    pipeline = shop(pricing("sync", policy=policy, version="1"))
    seal = mao.run(pipeline, batch(2), store=store, workflow="day", resources={"side": side}).seals["pricing"]
    for _ in range(2):
        with pytest.raises((AgentFailedError, mao.BreakerOpenError)):
            untouched(pipeline, seal, resources={"side": side}, live=True)
    assert side.asked["i0"] == 3  # the breaker that the first replay opened was its own
    assert untouched(pipeline, seal, resources={"side": side}).same  # the answers of then are there still


def test_where_nothing_was_kept_all_is_missing(store: StateStore, untouched: Callable[..., Any]) -> None:
    side = Side()
    seal = mao.run(shop(pricing("sync")), batch(1), store=store, workflow="day", resources={"side": side}).seals["pricing"]
    with pytest.raises(AnswerNotFrozenError, match="1 of 1 answers"):
        untouched(shop(pricing("sync", policy=KEEPS)), seal, resources={"side": side})


class FreezingSide(Side):
    """What `mao.LLM` is: its frozen twin answers from what it froze, and from nothing else."""

    def __init__(self, frozen: dict[str, int]) -> None:
        super().__init__()
        self.frozen = frozen

    def __mao_frozen__(self) -> FreezingSide:
        twin = FreezingSide(self.frozen)

        def answer(item: str, time: int) -> Any:
            return self.frozen[item] if item in self.frozen else AnswerNotFrozenError(f"No frozen answer for {item}")

        twin.does = answer
        return twin


def test_resources_that_freeze_their_answers_let_todays_code_run(store: StateStore, untouched: Callable[..., Any]) -> None:
    side = FreezingSide({"i0": 1, "i1": 1})
    seal = mao.run(
        shop(pricing("async", policy=KEEPS, version="1")), batch(2), store=store, workflow="day", resources={"side": side}
    ).seals["pricing"]
    changed = shop(pricing("async", policy=KEEPS, version="2"))
    assert untouched(changed, seal, resources={"side": side}).same
    assert set(side.asked.values()) == {1}
    del side.frozen["i1"]
    with pytest.raises(AnswerNotFrozenError, match="No frozen answer for i1"):
        untouched(changed, seal, resources={"side": side})


def test_the_frozen_twin_of_a_model_asks_nobody() -> None:
    class Answer(BaseModel):
        text: str

    live = mao.LLM(model="m", base_url="http://127.0.0.1:9/v1")
    with pytest.raises(AnswerNotFrozenError):
        live.__mao_frozen__().ask_sync(Answer, "Say something")
    recording = mao.LLM(model="m", base_url="http://127.0.0.1:9/v1", frozen="answers", record=True).__mao_frozen__()
    assert (recording.record, recording.frozen, recording.base_url) == (False, "answers", live.base_url)


# -- what is shown -------------------------------------------------------------------------------------------------------------------


class Person(BaseModel):
    id: Annotated[str, mao.Key, mao.Personal]
    name: Annotated[str, mao.Personal]
    points: int


@mao.agent
def people() -> list[Person]:
    return []


def pointed(more: int) -> Any:
    @mao.agent(name="points", compensate=release, version=str(more))
    def points(ctx: mao.AgentContext, people: Person, *, bank: Bank) -> Person:
        ctx.effect("reserve", lambda effect: bank.reserve(people.id))
        return Person(id=people.id, name=people.name + "!" * more, points=people.points + more)

    return points


def test_personal_fields_are_masked(store: StateStore) -> None:
    records = [{"id": SECRET, "name": SECRET, "points": 1}]
    resources = {"bank": Bank()}
    seal = mao.run(
        mao.Pipeline("club", entry=people, agents=[pointed(0)]), records, store=store, workflow="day", resources=resources
    ).seals["points"]
    found = replay(store, mao.Pipeline("club", entry=people, agents=[pointed(1)]), seal, resources=resources)
    assert found.difference.records[0].key == MASK
    assert found.difference.records[0].fields == {"name": (MASK, MASK), "points": (1, 2)}
    assert [one.record for one in found.effects] == [None]
    assert SECRET not in repr((found.difference, found.effects, found.checks))


CODE = """
import dagster as dg
import dagster_mao as mao
from tests.shop import Item, Price, items

@mao.agent(version="1")
def pricing(items: Item) -> Price:
    return Price(item_id=items.item_id, price={price})

pipeline = mao.Pipeline("shop", entry=items, agents=[pricing])
"""


def test_the_command(store: StateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seal = mao.run(shop(doubling()), batch(2), store=store, workflow="day").seals["pricing"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shop_then.py").write_text(CODE.format(price=2))
    (tmp_path / "shop_now.py").write_text(CODE.format(price=3))
    before = bytes_of(store)

    def call(*arguments: str, code: int) -> Any:
        given = ["replay", *arguments, "--root", store.root]
        result = CliRunner().invoke(app, given, env={"COLUMNS": "120", "NO_COLOR": "1"})
        assert result.exit_code == code, result.output
        return result

    assert "The records are the same" in call(seal.reference, "--pipeline", "shop_then:pipeline", code=0).stdout
    out = call("shop/day", "--agent", "pricing", "--pipeline", "shop_now:pipeline", code=1).stdout
    assert "0 added, 0 removed, 2 changed" in out
    told = json.loads(call(seal.reference, "--pipeline", "shop_now:pipeline", "--json", code=1).stdout)
    assert (told["changed"], told["same"], told["effects"]) == (2, False, [])
    assert "No pipeline is named" in call(seal.reference, code=1).stderr
    call("shop/day", "--pipeline", "shop_now:pipeline", code=2)
    assert bytes_of(store) == before
