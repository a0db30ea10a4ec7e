"""An agent that is called in a child process, which imports this module."""

import os
from typing import Annotated

from pydantic import BaseModel

import dagster_mao as mao


class Item(BaseModel):
    item_id: Annotated[str, mao.Key]


class Where(BaseModel):
    item_id: Annotated[str, mao.Key]
    process: int


@mao.agent
def entry() -> list[Item]:
    return [Item(item_id=name) for name in ("a", "b", "c")]


@mao.agent(policy=mao.Policy(timeout=60, isolate=True))
def isolated(ctx: mao.AgentContext, entry: Item) -> Where:
    ctx.log.info("in a child process")
    return Where(item_id=entry.item_id, process=os.getpid())


pipeline = mao.Pipeline("isolation", entry=entry, agents=[isolated])
