"""The loan agents as two teams have them, each a code location: this one has the entry, a score, and what joins it with the entry."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import dagster as dg

import dagster_mao as mao
from dagster_mao.dagster import StateStoreResource, build_definitions
from tests.choreography.loans import Ledger, applications, income, risk, score

FOLDER = "STAGE_FOLDER"
SMALL = mao.MicroBatch(size=3, wait=0)


def resources() -> dict[str, Any]:
    folder = Path(os.environ[FOLDER])
    ledger = dg.ResourceDefinition.hardcoded_resource(Ledger(folder))
    return {"state_store": StateStoreResource(root=str(folder / "state")), "ledger": ledger}


def loans() -> mao.Pipeline:
    return mao.Pipeline("loans", entry=applications, agents=[score, income, risk], mode="choreography", micro_batch=SMALL)


if FOLDER in os.environ:
    defs = build_definitions(loans(), resources=resources())
