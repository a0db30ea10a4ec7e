"""A step in a process of its own that is killed at a scripted point: `python -m tests.killed <root> <url> <way> <run> <point> <notes>`.

`point`: "kept:5" (the fifth answer was kept), "seal" (all is answered, nothing sealed), "sealed" (the seal stands, and nobody was told),
"logged" (the calls are in their table, and that is not noted), or "" for nowhere. `notes`: a file that says which answers were kept.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
import urllib.request
from typing import Any

import polars as pl

import dagster_mao as mao
from dagster_mao.gateway import Answers
from dagster_mao.state import Attempt, StateStore
from tests.shop import Item, Price, Run, batch, shop

COUNT, AT_A_TIME = 12, 4


def asked(url: str, item: str, key: str) -> int:
    request = urllib.request.Request(f"{url}/{item}", headers={"Idempotency-Key": key})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return int(answer.read())


@mao.agent(name="pricing", policy=mao.Policy())
def in_place(ctx: mao.AgentContext, items: Item, *, url: str) -> Price:
    return Price(item_id=items.item_id, price=asked(url, items.item_id, ctx.idempotency_key))


@mao.agent(name="pricing", policy=mao.Policy(), concurrency=AT_A_TIME)
def in_threads(ctx: mao.AgentContext, items: Item, *, url: str) -> Price:
    return Price(item_id=items.item_id, price=asked(url, items.item_id, ctx.idempotency_key))


@mao.agent(name="pricing", policy=mao.Policy(), concurrency=AT_A_TIME)
async def asynchronous(ctx: mao.AgentContext, items: Item, *, url: str) -> Price:
    return Price(item_id=items.item_id, price=await asyncio.to_thread(asked, url, items.item_id, ctx.idempotency_key))


@mao.agent(name="pricing", policy=mao.Policy())
def with_frames(ctx: mao.AgentContext, items: mao.LazyFrame[Item], *, url: str) -> mao.LazyFrame[Price]:
    price = asked(url, "frame", ctx.idempotency_key)
    return items.select("item_id", price=pl.lit(price, dtype=pl.Int64))


PIPELINES = {
    name: shop(agent) for name, agent in (("sync", in_place), ("threads", in_threads), ("async", asynchronous), ("frames", with_frames))
}


def run(root: str, way: str, name: str) -> Run:
    return Run(StateStore(root), PIPELINES[way], name, root="first" if name != "first" else None)


def enter(root: str, way: str, count: int = COUNT) -> None:
    run(root, way, "first").enter(batch(count))


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def script(point: str, notes: str) -> None:
    """Has this process kill itself when it comes to the point."""
    at, _, number = point.partition(":")
    kept, file = itertools.count(1), os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def noted(record: str | None) -> None:
        os.write(file, f"{record or 'frame'}\n".encode())
        if at == "kept" and next(kept) == int(number):
            killed()

    keep, akeep, seal, logged = Answers.keep, Answers.akeep, Attempt.seal, Answers.logged

    def keeping(self: Answers, key: str, record: str | None, *rest: Any) -> None:
        keep(self, key, record, *rest)
        noted(record)

    async def akeeping(self: Answers, key: str, record: str | None, *rest: Any) -> None:
        await akeep(self, key, record, *rest)
        noted(record)

    def sealing(self: Attempt, *given: Any, **named: Any) -> Any:
        if at == "seal":
            killed()
        sealed = seal(self, *given, **named)
        if at == "sealed":
            killed()
        return sealed

    def logging(self: Answers) -> None:
        if at == "logged":
            killed()
        logged(self)

    patched: Any = Answers
    patched.keep, patched.akeep, patched.logged = keeping, akeeping, logging
    Attempt.seal = sealing  # type: ignore[method-assign]


if __name__ == "__main__":
    root, url, way, name, point, notes = sys.argv[1:]
    script(point, notes)
    run(root, way, name).step("pricing", resources={"url": url})
