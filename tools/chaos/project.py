"""The code location of the chaos: four agents with effects and one that checks, on two banks, doing what a script says.

The first bank compares (key, epoch) and refuses what comes late; the second cannot. Each effect is posted to one of them; their ledgers are
the witnesses. Everything about a workflow stands in its script, a JSON file: which agent fails, whose undo does, and where a process is
killed or stopped.
"""

import asyncio
from pathlib import Path
from typing import Annotated, Any

import dagster as dg
from pydantic import BaseModel

import dagster_mao as mao
from resources.core_bank import CoreBank
from tools.chaos.script import Script

FOLDER = "CHAOS_FOLDER"  # the environment variable that names it to processes which Dagster starts
ORDERS = 4  # of a workflow; more than one, so that something is half done
CALL_SECONDS = 5.0  # that a call may take, and so the undo of an effect at the second bank may have to wait

workflows = dg.DynamicPartitionsDefinition(name="chaos")


class Forgetful(CoreBank):
    """A bank that knows nothing of what it has not done yet: it cannot refuse what is asked for after it was cancelled."""

    def cancel(self, key: str, epoch: int = 0) -> bool:
        with self._ledger() as ledger:
            there = ledger.execute("SELECT 1 FROM ledger WHERE key = ? AND took_effect", (key,)).fetchone()
        return bool(there) and super().cancel(key, epoch)


class Order(BaseModel):
    order_id: Annotated[str, mao.Key]
    amount: int


class Scripts(dg.ConfigurableResource[Any]):
    """The scripts of the workflows, by their keys."""

    folder: str

    def of(self, workflow: str | None) -> Script:
        """What is to happen in a workflow."""
        return Script.read(Path(self.folder), str(workflow))


@mao.agent
def orders(ctx: mao.AgentContext, *, scripts: Scripts) -> list[Order]:
    """The orders of a workflow; their amounts change when the script says that they come anew."""
    amount = scripts.of(ctx.partition_key).amount
    return [Order(order_id=f"{ctx.partition_key}-{n}", amount=amount if n == 0 else 100 + n) for n in range(ORDERS)]


class Inquiry(mao.Agent):
    """Record by record, at the bank that compares epochs."""

    version = "1"
    policy = mao.Policy(timeout=CALL_SECONDS, keep_answers=0)

    def execute(self, ctx: mao.AgentContext, orders: Order, *, bank: CoreBank, scripts: Scripts) -> Order:
        ctx.effect("inquiry", lambda e: bank.post(e.key, "inquiry", orders.order_id, orders.amount, epoch=e.epoch), compares_epoch=True)
        scripts.of(ctx.partition_key).fail_if(ctx.agent, ctx.attempt, orders.order_id)
        return orders

    def compensate(self, undo: mao.Undo, *, bank: CoreBank, scripts: Scripts) -> None:
        scripts.of(undo.workflow_id.partition("/")[2]).fail_undo(undo.agent)
        for effect in undo.effects:
            bank.cancel(effect.key, undo.epoch)


class Reservation(mao.Agent):
    """All at once, at the bank that cannot compare epochs."""

    version = "1"
    policy = mao.Policy(timeout=2 * CALL_SECONDS, keep_answers=0)

    def execute(
        self, ctx: mao.AgentContext, orders: mao.DataFrame[Order], *, forgetful: Forgetful, scripts: Scripts
    ) -> mao.DataFrame[Order]:
        def reserve(effect: mao.Effect) -> bool:
            return forgetful.post(effect.key, "reservation", effect.row["order_id"], effect.row["amount"], epoch=effect.epoch)

        ctx.effects("reservation", reserve, orders, key="order_id")
        scripts.of(ctx.partition_key).fail_if(ctx.agent, ctx.attempt, None)
        return orders

    def compensate(self, undo: mao.Undo, *, forgetful: Forgetful, scripts: Scripts) -> None:
        scripts.of(undo.workflow_id.partition("/")[2]).fail_undo(undo.agent)
        for effect in undo.effects:
            forgetful.cancel(effect.key, undo.epoch)


class Offer(mao.Agent):
    """Two effects for each record, several records at a time."""

    version = "1"
    policy = mao.Policy(timeout=CALL_SECONDS, keep_answers=0)

    async def execute(
        self, ctx: mao.AgentContext, inquiry: Order, reservation: Order, *, bank: CoreBank, forgetful: Forgetful, scripts: Scripts
    ) -> Order:
        order = inquiry
        await ctx.effect("funds", lambda e: _in_thread(forgetful, e, "funds", order))
        await ctx.effect("offer", lambda e: _in_thread(bank, e, "offer", order), compares_epoch=True)
        scripts.of(ctx.partition_key).fail_if(ctx.agent, ctx.attempt, order.order_id)
        return order

    def compensate(self, undo: mao.Undo, *, bank: CoreBank, forgetful: Forgetful, scripts: Scripts) -> None:
        scripts.of(undo.workflow_id.partition("/")[2]).fail_undo(undo.agent)
        for effect in undo.effects:
            (bank if effect.name == "offer" else forgetful).cancel(effect.key, undo.epoch)


async def _in_thread(bank: CoreBank, effect: mao.Effect, kind: str, order: Order) -> bool:
    return await asyncio.to_thread(bank.post, effect.key, kind, order.order_id, order.amount, epoch=effect.epoch)


@mao.agent(version="1")
def audit(ctx: mao.AgentContext, offer: Order, *, scripts: Scripts) -> Order:
    """Has no effects, comes last, and may fail: then all that was done before is to be undone."""
    scripts.of(ctx.partition_key).fail_if(ctx.agent, ctx.attempt, offer.order_id)
    return offer


chaos = mao.Pipeline("chaos", entry=orders, agents=[Inquiry, Reservation, Offer, audit], partitions_def=workflows)


def store(folder: Path) -> mao.StateStore:
    """The state of all workflows."""
    return mao.StateStore(folder / "state")


def definitions(folder: Path, scripts: Scripts | None = None) -> dg.Definitions:
    """What Dagster loads."""
    resources = {
        "state_store": mao.StateStoreResource(root=str(folder / "state")),
        "scripts": scripts or Scripts(folder=str(folder)),
        "bank": CoreBank(path=str(folder / "bank.db")),
        "forgetful": Forgetful(path=str(folder / "forgetful.db")),
    }
    made: dg.Definitions = chaos.build_definitions(resources=resources)
    return made
