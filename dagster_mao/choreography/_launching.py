"""What a launcher of runs asks: what a batch is about, who has it, and what is to be done again of it."""

from __future__ import annotations

from collections.abc import Iterable

import sqlalchemy as sa

from dagster_mao.choreography import _batches
from dagster_mao.choreography._deliveries import redeliver
from dagster_mao.choreography._tables import BATCHES, DELIVERIES, shared
from dagster_mao.pipeline import Pipeline
from dagster_mao.state import StateStore


def held(store: StateStore, pipeline: Pipeline, agent: str) -> dict[str, str]:
    """By run key, the run that has a batch and is believed to be alive. Who knows better tells it to `abandon`."""
    if not shared(store).holds(BATCHES):
        return {}
    own = (BATCHES.c.pipeline == pipeline.name) & (BATCHES.c.agent == agent) & BATCHES.c.is_open.is_(True)
    with shared(store).reading() as connection:
        rows = connection.execute(sa.select(BATCHES).where(own, BATCHES.c.run_id.is_not(None))).all()
    return {_batches._key(row.id, row.generation): str(row.run_id) for row in rows}


def workflows_of(store: StateStore, run_keys: Iterable[str]) -> dict[str, list[str]]:
    """By run key, the workflows that are left to do of a subscriber's batch, the oldest first."""
    return {run_key: [workflow for workflow, _ in left] for run_key, left in attempts_of(store, run_keys).items()}


def attempts_of(store: StateStore, run_keys: Iterable[str]) -> dict[str, list[tuple[str, str]]]:
    """The same, each with the attempt at it."""
    batches = {_batches.named(run_key): run_key for run_key in run_keys}
    found: dict[str, list[tuple[str, str]]] = {run_key: [] for run_key in batches.values()}
    told = DELIVERIES.c
    wanted = sa.select(told.batch, told.workflow_id, told.attempt).where(told.batch.in_(batches), told.state == "claimed")
    with shared(store).reading() as connection:
        for batch, workflow_id, attempt in connection.execute(wanted.order_by(told.id)):
            found[batches[batch]].append((workflow_id, attempt))
    return found


def done_of(store: StateStore, run_key: str) -> list[str]:
    """The workflows of a subscriber's batch that are done, whichever run of it sealed them."""
    batch = _batches.named(run_key)
    done = (DELIVERIES.c.batch == batch) & (DELIVERIES.c.state == "done")
    with shared(store).reading() as connection:
        return list(connection.scalars(sa.select(DELIVERIES.c.workflow_id).where(done).order_by(DELIVERIES.c.id)))


def redeliver_batch(store: StateStore, pipeline: Pipeline, agent: str, run_key: str) -> int:
    """Lets what failed in a batch be tried again, in another one; returns how many workflows that is."""
    batch = _batches.named(run_key)
    failed = (DELIVERIES.c.batch == batch) & (DELIVERIES.c.state == "failed")
    with shared(store).reading() as connection:
        workflows = list(connection.scalars(sa.select(DELIVERIES.c.workflow_id).where(failed)))
    return redeliver(store, pipeline, agent, workflows) if workflows else 0
