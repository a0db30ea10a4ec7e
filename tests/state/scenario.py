"""Sealing without agents: what the tests of the state room need to say in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl

from dagster_mao.state import Attempt, Provenance, Seal, StateStore, staged

AWKWARD_KEY = '2026-01-01 /../it\'s "100%" é'  # a partition key that is no file name, no SQL and no markup
PLAN = ("applications", "score", "fraud")
PROVENANCE = Provenance(
    contract="Score",
    contract_version="1",
    contract_hash="0" * 64,
    contract_schema="{}",
    key="id",
    agent_version="1",
    config="",
    model=None,
    seed=1,
    latency_seconds=0.0,
    library_version="0",
)


def rows(*points: float) -> pl.DataFrame:
    return pl.DataFrame(
        {"id": [str(i) for i in range(len(points))], "points": list(points)}, schema={"id": pl.String, "points": pl.Float64}
    )


def join(store: StateStore, run: str, *, key: str | None = "day", plan: Sequence[str] = PLAN, root: str | None = None) -> Attempt:
    """What each step does first. `root` is the run that this one re-executes."""
    lineage = (run,) if root is None else (run, root)
    return store.open_attempt(
        pipeline="credit", attempt=root or run, run_id=run, lineage=lineage, plan=plan, entry="applications", workflow_key=key
    )


def seal(store: StateStore, attempt: Attempt, agent: str, *points: float, parents: Sequence[Seal] = (), **changes: Any) -> Seal:
    """Seals rows as the agent's output, from where the attempt stood when it joined."""
    frame = rows(*(points or (1.0,)))
    with staged(store.objects, frame) as batch:
        sealed, _ = attempt.seal(
            agent,
            batch,
            row_count=frame.height,
            schema=frame.schema,
            parents=[parent.as_parent for parent in parents],
            provenance=PROVENANCE.model_copy(update=changes),
        )
    return sealed


def complete(store: StateStore, run: str, *, key: str | None = "day", points: float = 1.0) -> list[Seal]:
    """A whole attempt: entry, score and fraud, each step joining anew as Dagster's do."""
    entry = seal(store, join(store, run, key=key), "applications", points)
    made = [seal(store, join(store, run, key=key), agent, points * 10, parents=[entry]) for agent in PLAN[1:]]
    return [entry, *made]
