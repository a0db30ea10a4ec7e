"""The naive version of the chaos project: what was done is kept in memory, and undone in the failure hook."""

from pathlib import Path

import dagster as dg

import dagster_mao as mao
from resources.core_bank import CoreBank
from tools.chaos.project import Order, Scripts, orders, workflows

done: list[tuple[CoreBank, str]] = []


@mao.agent(version="1")
def inquiry(ctx: mao.AgentContext, orders: Order, *, bank: CoreBank) -> Order:
    key = f"{ctx.workflow_id}/{orders.order_id}"
    bank.post(key, "inquiry", orders.order_id, orders.amount)
    done.append((bank, key))
    return orders


@mao.agent(version="1")
def audit(ctx: mao.AgentContext, inquiry: Order, *, scripts: Scripts) -> Order:
    scripts.of(ctx.partition_key).fail_if(ctx.agent, ctx.attempt, inquiry.order_id)
    return inquiry


@dg.failure_hook
def undo(context: dg.HookContext) -> None:
    for bank, key in reversed(done):
        bank.cancel(key)


def definitions(folder: Path) -> dg.Definitions:
    resources = {
        "state_store": mao.StateStoreResource(root=str(folder / "state")),
        "scripts": Scripts(folder=str(folder)),
        "bank": CoreBank(path=str(folder / "bank.db")),
    }
    made = mao.Pipeline("chaos", entry=orders, agents=[inquiry, audit], partitions_def=workflows).build_definitions(resources=resources)
    assets = [asset.with_hooks({undo}) for asset in made.assets or []]
    return dg.Definitions(assets=assets, jobs=made.jobs, asset_checks=made.asset_checks, resources=made.resources)
