"""Hybrid agents of one team: it asks about applicants, and rates them for as long as nobody stops it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import dagster as dg

import dagster_mao as mao
from dagster_mao.dagster import StateStoreResource, build_definitions
from tests.choreography.loans import Application, Ledger, applications
from tests.journal.bank import FencingBank

FOLDER = "HYBRID_STAGE_FOLDER"
ALONE = mao.MicroBatch(size=1, wait=0)
PATIENCE = 900.0  # seconds


def resources() -> dict[str, Any]:
    folder = Path(os.environ[FOLDER])
    given = {"ledger": Ledger(folder), "bank": FencingBank(folder / "bank.db")}
    hard = {name: dg.ResourceDefinition.hardcoded_resource(value) for name, value in given.items()}
    return {"state_store": StateStoreResource(root=str(folder / "state")), **hard}


class Acting(mao.Agent):
    def act(self, ctx: mao.AgentContext, record: str, bank: FencingBank) -> None:
        ctx.effect(self.name, lambda effect: bank.do(effect.key, self.name, record, effect.epoch), compares_epoch=True)

    def compensate(self, undo: mao.Undo, *, bank: FencingBank) -> None:
        for effect in undo.effects:
            bank.cancel(effect.key, undo.epoch)


class Inquiry(Acting):
    def execute(self, ctx: mao.AgentContext, applications: Application, *, bank: FencingBank) -> Application:
        self.act(ctx, applications.id, bank)
        return applications


@mao.agent
def rating(ctx: mao.AgentContext, inquiry: mao.LazyFrame[Application], *, ledger: Ledger) -> mao.LazyFrame[Application]:
    ledger.note("rating", ctx.workflow_id)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        time.sleep(0.1)
    return inquiry


def loans() -> mao.Pipeline:
    agents = [Inquiry, rating]
    return mao.Pipeline("loans", entry=applications, agents=agents, elsewhere=["letter"], mode="hybrid", micro_batch=ALONE)


if FOLDER in os.environ:
    defs = build_definitions(loans(), resources=resources())
