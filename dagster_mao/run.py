"""Running a whole pipeline in plain Python: the same state, the same checks, no Dagster. For notebooks and tests."""

from __future__ import annotations

import logging
import tempfile
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl
from pydantic import BaseModel

from dagster_mao.boundary import Check, run_agent
from dagster_mao.configuration import config_digest
from dagster_mao.correlation import WorkflowLog, about
from dagster_mao.errors import MaoError, UnknownVersionError
from dagster_mao.overrides import changes_of, fresh_agents
from dagster_mao.pipeline import Pipeline
from dagster_mao.saga import Concluded, Saga
from dagster_mao.state import Attempt, Seal, StateStore

logger = WorkflowLog(logging.getLogger("dagster_mao.run"))


@dataclass(frozen=True)
class Result:
    """A completed attempt: its workflow, what each agent sealed, and every boundary check by agent. Rows are read, verified, on demand."""

    pipeline: Pipeline
    store: StateStore
    workflow_id: str
    seals: dict[str, Seal] = field(default_factory=dict)
    checks: dict[str, tuple[Check, ...]] = field(default_factory=dict)

    def __getitem__(self, agent: str) -> pl.DataFrame:
        """The rows that the agent sealed. Raises `UnknownVersionError` for a name that the pipeline does not have."""
        if agent not in self.seals:
            there = ", ".join(self.seals)
            raise UnknownVersionError("It sealed nothing in this run", agent=agent, workflow=self.workflow_id, fix=f"there are {there}")
        return self.store.read(self.seals[agent]).collect()

    def records(self, agent: str) -> list[BaseModel]:
        """The rows that the agent sealed, as models of its output contract."""
        return list(self.pipeline.node(agent).output.from_frame(self[agent]))


def run(
    pipeline: Pipeline,
    records: Any = None,
    *,
    store: StateStore | None = None,
    workflow: str | None = None,
    resources: Mapping[str, Any] | None = None,
    policies: Mapping[str, Mapping[str, Any]] | None = None,
    fresh: bool | Iterable[str] = False,
    compensate: bool = True,
    log: logging.Logger | None = None,
) -> Result:
    """Runs every agent of a pipeline, one after the other, as one attempt at a workflow.

    `records` (models, dicts or a polars frame) stand in for the entry's own `execute`; `workflow` is the key of the workflow, a new one by
    default; `resources` are the agents' keyword-only parameters by name. `policies` are changes of agents' policies by agent, or "*" for
    all: `{"score": {"timeout": 10, "breaker": None}}`; with `fresh`, or for the agents that it names, no answer that an earlier attempt
    kept is used. Without a `store`, the state goes to a new temporary folder, which
    stays (`result.store.root`). Raises what `boundary.run_agent` raises, from the first agent that fails; what was sealed before it stays
    sealed, and does not count in the effective state. What agents with effects had done until then is undone before it is raised, unless
    `compensate` is False; `error.compensation` says what became of it, a `saga.Concluded`.
    """
    changes = changes_of(pipeline, policies or {})
    anew = fresh_agents(pipeline, pipeline.agents if fresh is True else fresh or ())
    store = store or StateStore(tempfile.mkdtemp(prefix="dagster-mao-"))
    run_id = uuid.uuid4().hex
    seals: dict[str, Seal] = {}
    checks: dict[str, tuple[Check, ...]] = {}
    attempt: Attempt | None = None
    try:
        for name, agent in pipeline.agents.items():
            attempt = store.open_attempt(
                pipeline=pipeline.name, attempt=run_id, run_id=run_id, plan=pipeline.plan, entry=pipeline.entry_name, workflow_key=workflow
            )
            given = records if name == pipeline.entry_name else None
            outcome = run_agent(
                store,
                agent,
                attempt,
                resources=resources,
                config_digest=config_digest(agent.own_resources(resources)),
                partition_key=workflow,
                records=given,
                policies=changes,
                fresh=name in anew,
                log=log,
            )
            seals[name], checks[name] = outcome.seal, outcome.checks
    except BaseException as error:
        if compensate and attempt is not None:
            concluded = _compensated(store, pipeline, attempt, resources or {}, log)
            if isinstance(error, MaoError):
                error.compensation = concluded
        raise
    assert attempt is not None
    return Result(pipeline, store, attempt.workflow_id, seals, checks)


def _compensated(
    store: StateStore, pipeline: Pipeline, attempt: Attempt, resources: Mapping[str, Any], log: logging.Logger | None
) -> Concluded | None:
    """What became of the attempt's effects; None where it had none, or nobody can say now, which is logged."""
    if all(agent.effects == "read_only" for agent in pipeline.agents.values()):
        return None
    try:
        saga = Saga(store, pipeline, attempt.workflow_id, attempt.id, resources=resources, owner=attempt.id, log=log)
        return saga.run() if saga.plan().steps else None
    except MaoError as error:
        with about(attempt.workflow_id, attempt=attempt.id):
            logger.warning("what it did could not be undone now: %s", error)
        return None
