"""Nothing is lost in any mode: every record is counted in every version, whatever fails where, and the next run completes what waits."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any

import polars as pl
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

import dagster_mao as mao
from dagster_mao.errors import AgentFailedError, BatchRefusedError, BreakerOpenError, PinError, UnknownBreakerError
from dagster_mao.state import Seal, StateStore
from dagster_mao.state.verify import verify
from tests.shop import Item, Price, Run, Side, batch, items, pricing
from tests.test_degradation import close_breaker, counted

FAILURES = (AgentFailedError, BatchRefusedError, BreakerOpenError, PinError)


class Listing(BaseModel):
    item_id: Annotated[str, mao.Key]
    worth: int


def instead(items: Item) -> Price:
    return Price(item_id=items.item_id, price=-1)


@dataclass(frozen=True)
class Plan:
    """How one agent is declared, and which of its records its other side fails on, how often."""

    way: str
    mode: str
    quarantined: bool
    with_fallback: bool
    fail_max: int
    retries: int
    failing: dict[str, int]

    def agent(self, name: str) -> Any:
        policy = mao.Policy(
            breaker=mao.Breaker(fail_max=self.fail_max, reset_timeout=600),
            retries=self.retries,
            retry_within=240,
            fallback=instead if self.with_fallback or self.mode == "fallback" else None,
            when_open=self.mode,  # type: ignore[arg-type]
        )
        quarantine = mao.Quarantine(max_share=1) if self.quarantined else None
        return pricing(self.way, name=name, policy=policy, quarantine=quarantine)


class Counting(Side):
    """Another side that counts what it answered: what is paid for."""

    def __init__(self, plan: Plan) -> None:
        self.answered, self.is_mended = Counter[str](), False
        super().__init__(self._does)
        self._plan = plan

    def _does(self, item: str, time: int) -> Any:
        if not self.is_mended and self._plan.failing.get(item, 0) >= time:
            return ConnectionError()
        self.answered[item] += 1
        return 1


@st.composite
def plans(draw: Any, count: int = 6) -> Plan:
    return Plan(
        way=draw(st.sampled_from(["sync", "sync", "async", "threads"])),
        mode=draw(st.sampled_from(["fail", "fallback", "defer", "defer"])),
        quarantined=draw(st.booleans()),
        with_fallback=draw(st.booleans()),
        fail_max=draw(st.integers(1, 3)),
        retries=draw(st.integers(0, 1)),
        failing=draw(st.dictionaries(st.sampled_from([f"i{n}" for n in range(count)]), st.sampled_from([1, 9]), max_size=4)),
    )


def joining(first: bool, *, optional: bool, quarantined: bool) -> Any:
    """Two required inputs, or the second optional; declared so that each of them is the driver once."""

    def required(one: Price, other: Price) -> Listing:
        return Listing(item_id=one.item_id, worth=one.price + other.price)

    def lenient(one: Price, other: Price | None) -> Listing:
        return Listing(item_id=one.item_id, worth=one.price + (other.price if other else 0))

    def swapped(other: Price, one: Price) -> Listing:
        return Listing(item_id=one.item_id, worth=one.price + other.price)

    function = lenient if optional else required if first else swapped
    return mao.agent(name="joined", quarantine=mao.Quarantine(max_share=1) if quarantined else None)(function)


@mao.agent
def framed(joined: mao.LazyFrame[Listing], items: mao.LazyFrame[Item]) -> mao.LazyFrame[Listing]:
    # Inner, as the boundary gives both the same records.
    return joined.join(items, on="item_id", maintain_order="left").select("item_id", worth=pl.col("worth") + pl.col("size"))


def keys(store: StateStore, seal: Seal) -> set[str]:
    return set(store.read(seal).collect()["item_id"]) | set(store.deferred(seal)["record"])


@pytest.mark.slow
@pytest.mark.timeout(900)
# An example takes a second, and is small: shrinking it would take minutes.
@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(st.integers(0, 6), plans(), plans(), st.booleans(), st.booleans(), st.booleans())
def test_every_record_is_counted_in_every_version_and_the_next_run_completes(
    tmp_path_factory: pytest.TempPathFactory, count: int, first: Plan, second: Plan, swapped: bool, optional: bool, quarantined: bool
) -> None:
    store = StateStore(tmp_path_factory.mktemp("state"))
    joined = joining(not swapped, optional=optional, quarantined=quarantined or first.quarantined or second.quarantined)
    pipeline = mao.Pipeline("shop", entry=items, agents=[first.agent("one"), second.agent("other"), joined, framed])
    sides = {"one": Counting(first), "other": Counting(second)}

    def attempt(name: str) -> dict[str, Seal]:
        run, sealed = Run(store, pipeline, name), dict[str, Seal]()
        sealed["items"] = run.enter(batch(count)).seal
        for step in pipeline.order[1:]:
            try:
                sealed[step] = run.step(step, resources={"side": sides.get(step)}).seal
            except FAILURES:
                assert step not in {seal.agent for seal in store.seals("shop/day") if seal.attempt == name}
                if step in ("one", "other"):
                    continue  # siblings do not stop each other
                break
            if any(read.upstream not in sealed for read in pipeline.inputs_of("joined")) and step == "other":
                break
        for agent, seal in sealed.items():
            total = sum(counted(store, seal))
            came_in = set().union(*(keys(store, sealed[read.upstream]) for read in pipeline.inputs_of(agent)))
            assert total == (len(came_in) if agent != "items" else count), agent
            assert total <= count
        return sealed

    attempt("before")
    for name, side in sides.items():
        side.is_mended = True
        with suppress(UnknownBreakerError):
            close_breaker(store, f"shop.{name}")
    after = attempt("after")
    assert set(after) == set(pipeline.order)
    assert {counted(store, seal) for seal in after.values()} == {(count, 0, 0)}
    assert {seal.fallbacks for seal in after.values()} == {None}
    for side in sides.values():
        assert side.answered == Counter({f"i{n}": 1 for n in range(count)}), "each answer is paid once, over both runs"
        assert all(len(found) == 1 for found in side.keys.values())
    assert verify(store).good
