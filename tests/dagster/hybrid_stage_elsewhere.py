"""Another team's: it writes letters, and fails at that, once a rating is on its way."""

from __future__ import annotations

import os
import time

import dagster_mao as mao
from dagster_mao.dagster import build_definitions
from tests.choreography.loans import Application, Ledger
from tests.dagster.hybrid_stage import ALONE, FOLDER, PATIENCE, Acting, resources
from tests.journal.bank import FencingBank


class Letter(Acting):
    def execute(self, ctx: mao.AgentContext, inquiry: Application, *, bank: FencingBank, ledger: Ledger) -> Application:
        self.act(ctx, inquiry.id, bank)
        until = time.monotonic() + PATIENCE
        while f"rating {ctx.workflow_id}" not in ledger.executions and time.monotonic() < until:
            time.sleep(0.1)
        raise ValueError("the printer is out of paper")


if FOLDER in os.environ:
    elsewhere = mao.Pipeline("loans", listens={"inquiry": Application}, agents=[Letter], mode="hybrid", micro_batch=ALONE)
    defs = build_definitions(elsewhere, resources=resources())
