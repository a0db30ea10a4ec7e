"""From a Dagster run to an attempt: the root run is the attempt, its execution plan says what the attempt sets out to seal."""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

import dagster as dg

from dagster_mao.boundary import EVERY
from dagster_mao.errors import WiringError
from dagster_mao.overrides import fresh_agents
from dagster_mao.pipeline import Pipeline
from dagster_mao.state import Attempt, StateStore

WORKFLOW_TAG = "mao/workflow"
"""A run tag that says, on an unpartitioned pipeline, which workflow the run belongs to."""

FRESH_TAG = "mao/fresh"
"""A run tag that says for which agents no kept answer is used: "true" for all of the run, or their names with commas between."""

WORKFLOWS_TAGGED = 50
"""How many of a run's workflows are tags of it; the others are in its log."""

BATCH_TAG = "mao/batch"
"""A run tag: the micro-batch that the run was launched for."""

PIPELINE_TAG, AGENT_TAG, ENTRY_TAG = "mao/pipeline", "mao/agent", "mao/entry"
"""Tags of an agent's op. The plan is read from them, so that whoever joins an attempt first, an IO manager too, pins the same plan."""

PLAN_TAG, WAITS_FOR_TAG = "mao/plan", "mao/waits_for"
"""Tags of an op where agents start by themselves: what an attempt is complete with that it begins; whose seals it waits for."""

_LONGEST_TAG = 63 - len("workflow.")  # Dagster takes 63 characters after the slash
_TAGGABLE = re.compile(rf"[A-Za-z0-9_.-]{{1,{_LONGEST_TAG}}}")


def open_attempt(
    store: StateStore, instance: dg.DagsterInstance, run: dg.DagsterRun, *, pipeline: str, partition_key: str | None
) -> Attempt:
    """Joins the attempt that a run belongs to, on the workflow of its partition. Raises as `StateStore.open_attempt` does."""
    return open_joined(store, joined(instance, run, pipeline), pipeline=pipeline, partition_key=partition_key)


class Joined(NamedTuple):
    """Which attempt a run belongs to: the run and those that it re-executes, the root last; what the root set out to seal."""

    lineage: tuple[str, ...]
    plan: tuple[str, ...]
    entry: str
    tagged_workflow: str | None


def joined(instance: dg.DagsterInstance, run: dg.DagsterRun, pipeline: str) -> Joined:
    """The attempt that a run belongs to, whatever its workflow."""
    lineage = ancestry(instance, run)
    root = instance.get_run_by_id(lineage[-1]) or run
    plan, entry = planned(instance, root, pipeline)
    return Joined(lineage, plan, entry, tagged_workflow(root.tags, pipeline))


def open_joined(store: StateStore, joined: Joined, *, pipeline: str, partition_key: str | None) -> Attempt:
    """`open_attempt`, for a run of many workflows, which all know the same of it."""
    return store.open_attempt(
        pipeline=pipeline,
        attempt=joined.lineage[-1],
        run_id=joined.lineage[0],
        lineage=joined.lineage,
        plan=joined.plan,
        entry=joined.entry,
        workflow_key=partition_key if partition_key is not None else joined.tagged_workflow,
    )


def ancestry(instance: dg.DagsterInstance, run: dg.DagsterRun) -> tuple[str, ...]:
    """The run's id, then those of the runs it re-executes, the root last. A deleted run in between is skipped; the root is always told."""
    ids = [run.run_id]
    while run.parent_run_id and run.parent_run_id not in ids:
        ids.append(run.parent_run_id)
        parent = instance.get_run_by_id(run.parent_run_id)
        if parent is None:
            if run.root_run_id and run.root_run_id not in ids:
                ids.append(run.root_run_id)
            break
        run = parent
    return tuple(ids)


def planned(instance: dg.DagsterInstance, run: dg.DagsterRun, pipeline: str) -> tuple[tuple[str, ...], str]:
    """What a run sets out to seal of a pipeline, sorted; and the pipeline's entry ("" when there are none).

    These are the agents among its steps; where they start by themselves, those that this run starts, or, of a run that seals the entry of
    an attempt in hybrid mode, all agents.
    """
    own = _steps(instance, run, pipeline)
    entry = next((tag[ENTRY_TAG] for tag in own), "")
    told = next((tag[PLAN_TAG].split(",") for tag in own if PLAN_TAG in tag), None)
    return tuple(sorted(told or _starting(own))), entry


def is_started(instance: dg.DagsterInstance, run: dg.DagsterRun, pipeline: str, agent: str) -> bool:
    """Whether a run starts an agent that else starts by itself: not where it seals what the agent waits for."""
    root = instance.get_run_by_id(ancestry(instance, run)[-1]) or run
    return agent in _starting(_steps(instance, root, pipeline))


def starting(instance: dg.DagsterInstance, run: dg.DagsterRun, pipeline: str) -> set[str]:
    """The agents that a run itself starts, of the steps that it executes."""
    return _starting(_steps(instance, run, pipeline))


def _starting(steps: Sequence[Mapping[str, str]]) -> set[str]:
    names = {tag[AGENT_TAG] for tag in steps}
    return {tag[AGENT_TAG] for tag in steps if names.isdisjoint(tag.get(WAITS_FOR_TAG, "").split(","))}


def _steps(instance: dg.DagsterInstance, run: dg.DagsterRun, pipeline: str) -> list[Mapping[str, str]]:
    """The tags of the pipeline's ops among the steps that a run set out to execute."""
    if run.execution_plan_snapshot_id is None:
        raise WiringError(f"Run {run.run_id} has no execution plan snapshot", fix="start it through Dagster's own launchers")
    plan = instance.get_execution_plan_snapshot(run.execution_plan_snapshot_id)
    tags = [step.tags for step in plan.steps if step.key in plan.step_keys_to_execute and step.tags]
    return [tag for tag in tags if tag.get(PIPELINE_TAG) == pipeline and AGENT_TAG in tag]


def workflow_tags(workflows: Iterable[str]) -> dict[str, str]:
    """The run tags of some workflows, one each, so that the run list can be filtered by one: `mao/workflow.<key>`, the pipeline.

    A key that is too long for a tag, or has other characters than these take, is cut short and ends in a hash.
    """
    told = (workflow.partition("/") for workflow in islice(workflows, WORKFLOWS_TAGGED))
    return {f"{WORKFLOW_TAG}.{_tag_name(key)}": pipeline for pipeline, _, key in told}


def _tag_name(key: str) -> str:
    if _TAGGABLE.fullmatch(key):
        return key
    return f"{re.sub(r'[^A-Za-z0-9_.-]+', '-', key)[: _LONGEST_TAG - 9]}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def only_partition(keys: Iterable[str], what: str) -> str:
    """The one partition key there is. Raises `WiringError`: a workflow is one partition, so a run is for one."""
    found = list(keys)
    if len(found) != 1:
        raise WiringError(
            f"A run of {what} covers {len(found)} partitions; a workflow is one partition",
            fix="backfill with a run per partition, or build_definitions(backfill_policy=dg.BackfillPolicy.single_run())",
        )
    return found[0]


def is_fresh(tags: Mapping[str, str], pipeline: Pipeline, agent: str) -> bool:
    """Whether the run's tag says so of an agent. Raises `WiringError` when it names one that there is not."""
    told = tags.get(FRESH_TAG, "").strip()
    if told.lower() in ("", "false"):
        return False
    return agent in fresh_agents(pipeline, [EVERY] if told.lower() == "true" else [name.strip() for name in told.split(",")])


def tagged_workflow(tags: Mapping[str, str], pipeline: str) -> str | None:
    """The key of the workflow that a run's tag names; None where it names none."""
    tagged = tags.get(WORKFLOW_TAG)
    return tagged.removeprefix(f"{pipeline}/") if tagged else None
