"""The boundary: how one agent is run under the laws. Pin, check the inputs, execute, check the output, seal.

Knows agents, contracts and state; knows nothing of Dagster, which calls it once per step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

import polars as pl

from dagster_mao.agent import Agent, AgentContext
from dagster_mao.boundary._call import Call
from dagster_mao.boundary._checks import BREAKER, OUTPUT, PINNED_BASE, Check, check_names, input_check
from dagster_mao.boundary._expect import REPORT
from dagster_mao.boundary._step import Outcome, Step
from dagster_mao.gateway import Gateway
from dagster_mao.state import Attempt, StateStore

__all__ = ["BREAKER", "OUTPUT", "PINNED_BASE", "REPORT", "Check", "Outcome", "check_names", "input_check", "run_agent"]


def run_agent(
    store: StateStore,
    agent: Agent,
    attempt: Attempt,
    *,
    resources: Mapping[str, Any] | None = None,
    config_digest: str = "",
    partition_key: str | None = None,
    records: Any = None,
    quarantined: pl.DataFrame | None = None,
    log: logging.Logger | None = None,
) -> Outcome:
    """Runs one agent of an attempt up to its seal.

    `records` takes the place of `execute` for an entry: models, dicts, or a polars frame. With a quarantine declared, records that break a
    contract are kept out and sealed beside the snapshot, up to the declared share; without one, the first of them stops the step.
    `quarantined` are records of an earlier version of the entry that stay in quarantine, as they lie there.

    Whatever goes wrong is raised as an error of this library whose `checks` hold all verdicts reached until then, the failed one included:
    `BatchRefusedError` for records that broke a contract, `PinError`, `StaleStateError`, `FencedError` and `TamperedError` for the state,
    `AgentFailedError` for what `execute` raised. Nothing of a failed step is visible to anybody.
    """
    step = Step(store, agent, attempt)
    with step.reporting():
        if quarantined is not None:
            step.keep_aside(quarantined)
        pinned = step.pin()
        frames = step.read(pinned)
        agent.suite.prepare()  # what is wrong with it should be known before the agent is paid for
        context = AgentContext(
            workflow_id=attempt.workflow_id,
            agent=agent.name,
            attempt=attempt.id,
            run_id=attempt.run_id,
            now=attempt.now,
            seed=attempt.seed(agent.name),
            partition_key=partition_key,
            log=log or logging.getLogger(f"dagster_mao.agent.{agent.name}"),
        )
        started = time.perf_counter()
        gateway = Gateway(agent.policy, f"{attempt.pipeline}.{agent.name}", store.database) if agent.policy else None
        call = Call(agent, context, dict(resources or {}), step.aside, gateway)
        frame = step.as_frame(call.run(frames) if records is None else records)
        if gateway:
            gateway.flush()
            step.breaker_held()
        return step.seal(
            frame,
            pinned,
            frames,
            agent_version=agent.agent_version,
            config=config_digest,
            model=agent.model,
            seed=context.seed,
            started=started,
        )
