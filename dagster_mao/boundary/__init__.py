"""The boundary: how one agent is run under the laws. Pin, check the inputs, execute, check the output, seal.

Knows agents, contracts and state; knows nothing of Dagster, which calls it once per step.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from typing import Any

import polars as pl

from dagster_mao.agent import Agent, AgentContext, NoEffects, Shape, check_policy, registration
from dagster_mao.boundary._call import Calls, RecordCalls, WholeCall
from dagster_mao.boundary._checks import BREAKER, OUTPUT, PINNED_BASE, Check, check_names, input_check
from dagster_mao.boundary._effects import journaled
from dagster_mao.boundary._expect import REPORT
from dagster_mao.boundary._judging import VERDICTS, Judgement, Judging, asked_about, judge_policy
from dagster_mao.boundary._policy import EVERY, UNKEPT, in_force
from dagster_mao.boundary._rehearsal import Rehearsal, WouldBe, WouldHave
from dagster_mao.boundary._scratch import Scratch
from dagster_mao.boundary._step import Outcome, Step
from dagster_mao.correlation import Whose, WorkflowLog, about
from dagster_mao.state import Attempt, StateStore

__all__ = [
    "BREAKER",
    "EVERY",
    "OUTPUT",
    "PINNED_BASE",
    "REPORT",
    "UNKEPT",
    "VERDICTS",
    "Check",
    "Judgement",
    "Outcome",
    "Rehearsal",
    "WouldBe",
    "WouldHave",
    "asked_about",
    "check_names",
    "in_force",
    "input_check",
    "judge_policy",
    "run_agent",
]


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
    policies: Mapping[str, Mapping[str, Any]] | None = None,
    fresh: bool = False,
    log: logging.Logger | None = None,
    rehearsal: Rehearsal | None = None,
) -> Outcome:
    """Runs one agent of an attempt up to its seal.

    `records` takes the place of `execute` for an entry: models, dicts, or a polars frame. With a quarantine declared, records that break a
    contract, or whose calls finally fail, are kept out and sealed beside the snapshot, up to the declared share; without one, the first of
    them stops the step. `quarantined` are records of an earlier version of the entry that stay in quarantine, as they lie there.

    `policies`: what an operator changes of agents' policies, by the agent's name, "*" for all (`{"score": {"timeout": 10}}`); it is in
    the seal. With `fresh`, no answer is used that an earlier attempt kept. `log` is what `ctx.log` writes to, each line with the workflow,
    the agent and the attempt before it.

    With a `rehearsal` no effect happens, nothing is journaled, no answer is kept, and answers may come from those that were kept: to be
    used with a store and an attempt that leave nothing either.

    Whatever goes wrong is raised as an error of this library whose `checks` hold all verdicts reached until then, the failed one included,
    and whose `calls` what was called: `BatchRefusedError` for records that broke a contract, `PinError`, `StaleStateError`, `FencedError`
    and `TamperedError` for the state, `BreakerOpenError`, `AgentFailedError` for what `execute` raised. Nothing of a failed step is visible
    to anybody.
    """
    policy = in_force(agent.policy, policies or {}, agent.name)
    check_policy(agent, policy)
    whose = Whose(attempt.workflow_id, agent.name, attempt.id)
    with about(*whose), Scratch(store) as scratch, ExitStack() as files:
        step = Step(store, agent, attempt, scratch)
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
                having=NoEffects(agent.name) if agent.effects == "read_only" else rehearsal.effects if rehearsal else None,
                log=WorkflowLog(log or logging.getLogger(f"dagster_mao.agent.{agent.name}"), whose),
            )
            judging = files.enter_context(
                Judging(
                    *(store, agent, attempt, context, resources or {}, scratch, frames),
                    policies=policies or {},
                    fresh=fresh,
                    judges=() if rehearsal else None,  # what is done once more is not judged once more
                )
            )
            started = time.perf_counter()
            provenance: dict[str, Any] = {
                "agent_version": agent.agent_version,
                "config": config_digest,
                "model": agent.model,
                "registration": store.register(attempt.pipeline, agent.name, registration(agent)),
                "readers": None if agent.readers is None else tuple(agent.readers),
                "seed": context.seed,
                "started": started,
                "judging": judging,
            }
            if records is not None:
                return step.seal(step.as_frame(records), pinned, frames, policy=policy, **provenance)
            common: dict[str, Any] = {"config": config_digest, "fresh": fresh, "rehearsal": rehearsal}
            with (
                nullcontext() if rehearsal else journaled(store, agent, attempt, pinned, policy) as effects,
                Calls(store, agent, attempt, policy, context, resources or {}, scratch, frames, effects=effects, **common) as calls,
            ):
                if agent.is_entry or agent.output_shape is not Shape.RECORD:
                    answered = WholeCall(calls, step).run(frames, pinned, files)
                else:
                    answered = step.of_records(RecordCalls(calls, step).run(frames))
                if effects is not None:
                    effects.executed()
                outcome = step.seal(
                    answered,
                    pinned,
                    frames,
                    policy=policy,
                    overridden=policy != (agent.policy or UNKEPT),
                    opened=calls.opened,
                    closed_since=calls.closed_since(),
                    answered_instead=calls.answered_instead,
                    summary=calls.summary(),
                    **provenance,
                )
                if effects is not None:
                    effects.sealed(outcome.seal.version)
                calls.sealed = outcome.seal
                return outcome
