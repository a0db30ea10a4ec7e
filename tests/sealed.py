"""A small store for tests that look at state: three agents, two days, two attempts at the first; sealed through the store itself.

The records have awkward values on purpose: keys that look like markup, paths and options, a personal name at the top and in a nested field.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import polars as pl

from dagster_mao.state import Parent, Provenance, Seal, StateStore, staged

PIPELINE = "loans"
MONDAY, TUESDAY = "loans/2026-01-05", "loans/2026-01-06"
MARKUP_KEY = "[red]A/../1'\x1b[31m"
SECRET, NESTED_SECRET = "Grace Hopper", "+1 555 0100"

FIELDS: dict[str, list[dict[str, Any]]] = {
    "application": [
        {"name": "id", "personal": False},
        {"name": "name", "personal": True},
        {"name": "amount", "personal": False},
        {"name": "contact", "personal": False, "fields": [{"name": "phone", "personal": True}, {"name": "city", "personal": False}]},
    ],
    "score": [{"name": "id", "personal": False}, {"name": "score", "personal": False}],
    "decision": [{"name": "id", "personal": False}, {"name": "approved", "personal": False}],
}
PLAN = tuple(FIELDS)


def applications(*amounts: float) -> pl.DataFrame:
    """The first record has the awkward key and personal values that no output may show."""
    keys = [MARKUP_KEY, *(f"A{i}" for i in range(2, len(amounts) + 1))]
    contacts = [{"phone": NESTED_SECRET, "city": "Arlington"} for _ in amounts]
    schema: dict[str, Any] = {
        "id": pl.String,
        "name": pl.String,
        "amount": pl.Float64,
        "contact": pl.Struct({"phone": pl.String, "city": pl.String}),
    }
    return pl.DataFrame({"id": keys, "name": [SECRET] * len(keys), "amount": amounts, "contact": contacts}, schema=schema)


def seal_attempt(
    store: StateStore, day: str, attempt: str, frame: pl.DataFrame, *, agent_version: str = "1", only: Sequence[str] = PLAN
) -> list[Seal]:
    """One attempt of the three agents, each made from the entry and the one before. With `only`, it stops early and stays incomplete."""
    opened = store.open_attempt(pipeline=PIPELINE, attempt=attempt, run_id=f"run-{attempt}", plan=PLAN, entry=PLAN[0], workflow_key=day)
    outputs = {
        "application": frame,
        "score": frame.select("id", score=(pl.col("amount") / 10).cast(pl.Int64, strict=False)),
        "decision": frame.select("id", approved=pl.col("amount") > 5000),
    }
    seals: list[Seal] = []
    for agent in only:
        provenance = Provenance(
            contract=agent.title(),
            contract_version="1",
            contract_hash="c" * 64,
            contract_schema=json.dumps({"name": agent.title(), "fields": FIELDS[agent]}),
            key="id",
            agent_version=agent_version,
            config="",
            model=None,
            seed=7,
            latency_seconds=0.25,
            library_version="0",
        )
        parents = [Parent(agent=s.agent, workflow_id=s.workflow_id, version=s.version, digest=s.digest) for s in seals[-1:]]
        with staged(store.objects, outputs[agent]) as batch:
            rows = outputs[agent]
            seal, _ = opened.seal(agent, batch, row_count=rows.height, schema=rows.schema, parents=parents, provenance=provenance)
        seals.append(seal)
    return seals


def two_days(store: StateStore) -> dict[str, list[Seal]]:
    """Monday in two attempts (versions 0-2 and 3-5; the second changed an amount, dropped a record and brought one), Tuesday in one."""
    seal_attempt(store, "2026-01-05", "first", applications(1000.0, 9000.0, 400.0))
    later = applications(1000.0, 9500.0, 400.0, 7000.0)
    seal_attempt(store, "2026-01-05", "second", later.filter(pl.col("id") != "A3"), agent_version="2")
    seal_attempt(store, "2026-01-06", "first", applications(1.0, float("nan")))
    return {day: store.seals(day) for day in (MONDAY, TUESDAY)}
