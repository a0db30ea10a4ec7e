"""All subscribers of a pipeline, and its inbox, in this process and without any scheduler."""

from __future__ import annotations

import logging
import uuid
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from dagster_mao import configuration
from dagster_mao.agent import Agent
from dagster_mao.boundary import run_agent
from dagster_mao.choreography._batches import BatchTakenError
from dagster_mao.choreography._deliveries import handed_out
from dagster_mao.choreography._due import subscribers
from dagster_mao.choreography._inbox import cut_into, run_inbox
from dagster_mao.choreography._run import run_batch
from dagster_mao.errors import MaoError
from dagster_mao.pipeline import Pipeline
from dagster_mao.state import Seal, StateStore


@dataclass
class Drained:
    """What `drain` came to: how many `runs`, how many workflows by agent and what became of them, and by which error some failed."""

    runs: int = 0
    counts: dict[str, Counter[str]] = field(default_factory=dict)
    errors: dict[tuple[str, str], MaoError | None] = field(default_factory=dict)

    def count(self, state: str) -> int:
        return sum(counts[state] for counts in self.counts.values())


def drain(
    store: StateStore,
    pipeline: Pipeline,
    *,
    resources: Mapping[str, Any] | None = None,
    policies: Mapping[str, Mapping[str, Any]] | None = None,
    fresh: bool = False,
    log: logging.Logger | None = None,
) -> Drained:
    """Lets the inbox and every subscriber do what is due, in this process, until nothing is. For notebooks, tests and cron jobs.

    Any number of them, and of Dagster's sensors, may be at it at once. Nothing is waited for: what is to be delivered again later is left
    to a later call. Raises `StoreError`.
    """
    drained, is_busy = Drained(), True
    while is_busy:
        is_busy = _take_in(store, pipeline, drained, resources=resources, policies=policies, log=log)
        for subscriber in subscribers(pipeline):
            agent = pipeline.node(subscriber.agent)
            own, declared = _own(agent, resources), replace(agent.micro_batch or pipeline.micro_batch, wait=0)
            counts = drained.counts.setdefault(agent.name, Counter())
            for batch in handed_out(store, subscriber, declared):
                drained.runs += 1
                told = run_batch(
                    *(store, pipeline, agent.name, batch.run_key),
                    run_id=uuid.uuid4().hex,
                    resources=own,
                    config_digest=configuration.config_digest(agent.own_resources(own)),
                    policies=policies,
                    fresh=fresh,
                    log=log,
                )
                with suppress(BatchTakenError):  # another drain was first
                    for one in told:
                        is_busy = True
                        counts[one.state] += 1
                        if one.state in ("failed", "later"):
                            drained.errors[agent.name, one.workflow_id] = one.error
    return drained


def _take_in(store: StateStore, pipeline: Pipeline, drained: Drained, *, resources: Mapping[str, Any] | None, **options: Any) -> bool:
    """Makes workflows of what waits in the inbox; whether anything did."""
    if pipeline.inbox is None or pipeline.mode == "orchestration":
        return False
    counts, own, before = drained.counts.setdefault(pipeline.entry_name, Counter()), _own(pipeline.entry, resources), drained.runs
    for batch in cut_into(store, pipeline, replace(pipeline.inbox, wait=0)):
        drained.runs += 1
        with suppress(BatchTakenError):  # another drain was first
            told = run_inbox(
                *(store, pipeline, batch.run_key),
                run_id=uuid.uuid4().hex,
                resources=own,
                config_digest=configuration.config_digest(pipeline.entry.own_resources(own)),
                **options,
            )
            counts[told.state] += 1
    return drained.runs > before


def _own(agent: Agent, resources: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: resources[name] for name in agent.all_resources if resources and name in resources}


def enter(
    store: StateStore,
    pipeline: Pipeline,
    records: Any = None,
    *,
    workflow: str | None = None,
    resources: Mapping[str, Any] | None = None,
    run_id: str | None = None,
    log: logging.Logger | None = None,
) -> Seal:
    """Seals a batch as the entry of a workflow, and nothing else: the agents start by themselves. As `mao.run`, for the entry alone.

    Raises what `boundary.run_agent` raises.
    """
    run_id, entry = run_id or uuid.uuid4().hex, pipeline.entry
    plan = pipeline.plan if pipeline.mode == "hybrid" else (entry.name,)
    attempt = store.open_attempt(pipeline=pipeline.name, attempt=run_id, run_id=run_id, plan=plan, entry=entry.name, workflow_key=workflow)
    own = _own(entry, resources)
    digest = configuration.config_digest(entry.own_resources(own))
    return run_agent(store, entry, attempt, resources=own, config_digest=digest, partition_key=workflow, records=records, log=log).seal
