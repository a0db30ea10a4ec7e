"""A shop whose agent asks another side that does as it is told: for tests of calls. Items are i0, i1, …"""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import polars as pl
from pydantic import BaseModel

import dagster_mao as mao
from dagster_mao.boundary import Outcome, run_agent
from dagster_mao.state import StateStore

SECRET = "Marvin-Android"


class Item(BaseModel):
    item_id: Annotated[str, mao.Key]
    size: int = 1


class Price(BaseModel):
    item_id: Annotated[str, mao.Key]
    price: int
    from_fallback: Annotated[bool, mao.FromFallback] = False


@mao.agent
def items() -> list[Item]:
    return []


class Side:
    """The other side. `does` is what it does with an item instead of answering, at each of its calls: an error to be raised, or a price.

    `asked` counts the calls by item; `keys` are the idempotency keys that came with them.
    """

    def __init__(self, does: Callable[[str, int], Any] | None = None) -> None:
        self.does = does or (lambda item, time: 1)
        self.asked, self.keys = Counter[str](), dict[str, set[str]]()
        self._lock = threading.Lock()

    def ask(self, item: str, key: str = "") -> int:
        with self._lock:
            self.asked[item] += 1
            time = self.asked[item]
            self.keys.setdefault(item, set()).add(key)
        answer = self.does(item, time)
        if isinstance(answer, BaseException):
            raise answer
        return answer if isinstance(answer, int) else 1


def failing(*items: str, error: type[Exception] = ConnectionError, times: int = 99) -> Callable[[str, int], Any]:
    """Those items fail, so many times."""
    return lambda item, time: error(SECRET) if item in items and time <= times else 1


def pricing(way: str, **declared: Any) -> Any:
    """The agent that asks: "async", "sync" (in place) or "threads"."""

    def sync(ctx: mao.AgentContext, items: Item, *, side: Side) -> Price:
        return Price(item_id=items.item_id, price=side.ask(items.item_id, ctx.idempotency_key))

    async def asynchronous(ctx: mao.AgentContext, items: Item, *, side: Side) -> Price:
        await asyncio.sleep(0)
        return Price(item_id=items.item_id, price=side.ask(items.item_id, ctx.idempotency_key))

    threads = {"concurrency": 4} if way == "threads" else {}
    return mao.agent(**{"name": "pricing", **threads, **declared})(asynchronous if way == "async" else sync)


WAYS = ("async", "sync", "threads")


def batch(count: int, **changes: Any) -> list[Item]:
    return [Item(item_id=f"i{n}", **changes) for n in range(count)]


def shop(*agents: Any, entry: Any = items) -> mao.Pipeline:
    return mao.Pipeline("shop", entry=entry, agents=list(agents))


class Run:
    """One attempt, whose agents are run one by one. `root`: the run that it re-executes."""

    def __init__(self, store: StateStore, pipeline: mao.Pipeline, name: str, *, root: str | None = None, plan: Any = None) -> None:
        self.store, self.pipeline, self.name, self.root = store, pipeline, name, root
        self.plan = plan or pipeline.order

    def enter(self, records: Any) -> Outcome:
        return self.step(self.pipeline.entry_name, records=records)

    def step(self, agent: str, **given: Any) -> Outcome:
        attempt = self.store.open_attempt(
            pipeline=self.pipeline.name,
            attempt=self.root or self.name,
            run_id=self.name,
            lineage=(self.name, *([self.root] if self.root else [])),
            plan=self.plan,
            entry=self.pipeline.entry_name,
            workflow_key="day",
        )
        return run_agent(self.store, self.pipeline.node(agent), attempt, **given)


def logged(store: StateStore, agent: str = "pricing") -> pl.DataFrame:
    """The agent's calls, in the order in which they began."""
    return store.calls("shop", agent).collect().sort("started", "record", "number")


def told(store: StateStore, agent: str = "pricing") -> Counter[tuple[str | None, str]]:
    """How many calls of each record ended how."""
    return Counter(logged(store, agent).select("record", "outcome").rows())


def rows(store: StateStore, outcome: Outcome) -> Mapping[str, Any]:
    """What was sealed, by item."""
    return {row["item_id"]: row for row in store.read(outcome.seal).collect().to_dicts()}
