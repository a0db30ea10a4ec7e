"""Another team's code location: it names what it listens to, and nobody there knows of it."""

from __future__ import annotations

import os

import polars as pl

import dagster_mao as mao
from dagster_mao.dagster import build_definitions
from tests.choreography.loans import Ledger, Notice, Risk
from tests.dagster.stage import FOLDER, SMALL, resources


@mao.agent
def notify(ctx: mao.AgentContext, risk: mao.LazyFrame[Risk], *, ledger: Ledger) -> mao.LazyFrame[Notice]:
    ledger.note("notify", ctx.workflow_id)
    return risk.select("id", text=pl.col("risk").cast(pl.String))


def elsewhere() -> mao.Pipeline:
    return mao.Pipeline("loans", listens={"risk": Risk}, agents=[notify], mode="choreography", micro_batch=SMALL)


if FOLDER in os.environ:
    defs = build_definitions(elsewhere(), resources=resources())
