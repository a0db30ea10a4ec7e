"""Compensation as Dagster shows it: a run of its own with a step per agent; told on the failed run, on its own run and on the assets."""

from collections.abc import Iterator, Sequence
from typing import Any

import dagster as dg
from dagster._core.events import EngineEventData
from pydantic import Field

from dagster_mao.correlation import Whose, WorkflowLog
from dagster_mao.dagster.anchors import STATE_VERSION
from dagster_mao.dagster.endings import ending
from dagster_mao.dagster.resources import STATE_STORE
from dagster_mao.dagster.runs import WORKFLOW_TAG, ancestry
from dagster_mao.dagster.stopping import stop
from dagster_mao.errors import FencedError, PinError
from dagster_mao.pipeline import Pipeline
from dagster_mao.saga import ABSENT_SECONDS, Concluded, Plan, Saga, SagaState, request, sagas, unfinished
from dagster_mao.state import StateStore

ATTEMPT_TAG, SUPERSEDED_BY_TAG = "mao/attempt", "mao/superseded_by"
"""Run tags of a compensation: which attempt it undoes, and which later one superseded what it undoes. `mao/workflow` says of what."""

COMPENSATES_TAG, COMPENSATED_BY_TAG = "mao/compensates", "mao/compensated_by"
"""Run tags that lead from a compensation to the failed run, and back."""

HANDED_OVER_TAG = "mao/handed_over"
"""A run tag of a compensation that undid what its code location has, and left the rest to others."""

COMPENSATED = "compensated"
"""The check of an agent with effects: was everything undone that attempts did which failed?"""

# One step after the other, in the order of the plan; and what comes after a failed undo goes on.
_IN_ORDER = dg.in_process_executor.configured({"step_dependency_config": {"require_upstream_step_success": False}})
_FENCE, _UNDO, _CONCLUDE = "fence", "undo", "conclude"
_ABOUT = {
    _FENCE: "Ends the attempt: nothing of it can be sealed, and no effect begun, any more. Finds what is to be undone, in which order.",
    _UNDO: "Undoes the effects of one agent: those that happened, and those that may have.",
    _CONCLUDE: "Records how it ended, in the state log, on the assets and on the failed run. Fails when something is left.",
}


def with_effects(pipeline: Pipeline) -> list[str]:
    """The agents that have effects on the world outside, in the pipeline's order."""
    return [name for name, agent in pipeline.agents.items() if agent.effects != "read_only"]


def undo_resources(pipeline: Pipeline) -> list[str]:
    """The resources that the agents' `compensate` take."""
    return list(dict.fromkeys(name for agent in pipeline.agents.values() for name in agent.undo_resources))


def job_name(pipeline: str) -> str:
    """The name of a pipeline's compensation job."""
    return f"{pipeline}_compensate"


def run_config(workflow: str, attempt: str, superseded_by: str = "", *, absent_seconds: float = ABSENT_SECONDS) -> dict[str, Any]:
    """The configuration of a run of the compensation job."""
    asked = {"workflow": workflow, "attempt": attempt, "superseded_by": superseded_by, "absent_seconds": absent_seconds}
    return {"ops": {_FENCE: {"config": asked}}}


# -- asked for -----------------------------------------------------------------------------------------------------------------------


def build_request_hook(pipeline: Pipeline) -> dg.HookDefinition:
    """The failure hook of agents with effects: it records that a compensation is asked for, and why.

    Nothing more: siblings may still run, the run may be retried, and of killed steps and runs there is no hook. Whether and when to
    compensate, the sensor decides.
    """

    @dg.failure_hook(name=f"{pipeline.name}_asks_for_compensation", required_resource_keys={STATE_STORE})
    def ask(context: dg.HookContext) -> None:
        run = context.instance.get_run_by_id(context.run_id)
        if run is not None:
            store, attempt = getattr(context.resources, STATE_STORE).store(), ancestry(context.instance, run)[-1]
            request(store, pipeline.name, None, attempt, run_id=run.run_id, why=_class_of(context.op_exception))

    return ask


def _class_of(error: BaseException | None) -> str:
    return type((error and error.__cause__) or error).__name__


# -- the job -------------------------------------------------------------------------------------------------------------------------


class Asked(dg.Config):
    """What is to be compensated."""

    workflow: str = Field(description="The workflow, as `dagster-mao history` names it: pipeline/key.")
    attempt: str = Field(default="", description="The attempt: the id of its root run. The one that did not finish, when left out.")
    superseded_by: str = Field(default="", description="Only what this later attempt superseded; all of the attempt when left out.")
    absent_seconds: float = Field(
        default=ABSENT_SECONDS, description="For how long a code location is waited for that has an agent which this one does not have."
    )


def build_compensation_job(pipeline: Pipeline) -> dg.JobDefinition:
    """The job `<pipeline>_compensate`: `fence`, then `undo[<agent>]` for each agent in the order of the plan, then `conclude`.

    It may be started by hand, with the workflow in the configuration of `fence`; started again, or killed and started again, it goes on
    where it was. `conclude` fails when something is left. It requires `state_store` and what the agents' `compensate` take.

    Agents that the pipeline does not have are undone by the code location that does, by a run of its job of the same name: each undoes what
    nothing depends on any more, and hands over.
    """
    needed = {STATE_STORE, *undo_resources(pipeline)}

    def named(step: str) -> dict[str, Any]:
        return {"name": f"{pipeline.name}__{step}", "description": _ABOUT[step], "required_resource_keys": needed}

    @dg.op(**named(_FENCE), out=dg.DynamicOut(dg.Nothing, is_required=False))
    def fence(context: dg.OpExecutionContext, config: Asked) -> Iterator[Any]:
        _tag(context, _store(context), pipeline, config)
        plan = _begin(context, pipeline, config.absent_seconds)
        agents = plan.here if plan.state == "running" else ()
        for agent in agents:
            yield dg.DynamicOutput(None, mapping_key=agent)
        if not agents:  # Dagster skips what would come after
            _conclude(context, pipeline)

    @dg.op(**named(_UNDO), ins={"fenced": dg.In(dg.Nothing)}, out=dg.Out(dg.Nothing))
    def undo(context: dg.OpExecutionContext) -> Iterator[Any]:
        undone = _saga(context, pipeline).undo(str(context.get_mapping_key()))
        told: dict[str, Any] = {"state": undone.state, "effects": undone.effects, "tries": undone.tries, "error": undone.error or ""}
        yield dg.Output(None, metadata=told)  # before the failure: what comes next waits for it
        if undone.state == "failed":
            fix = "`dagster-mao compensate --resume` tries again"
            raise dg.Failure(f"{undone.agent}: not all effects were undone ({undone.error}). {fix}", metadata=told, allow_retries=False)

    @dg.op(**named(_CONCLUDE), ins={"undone": dg.In(dg.Nothing)})
    def conclude(context: dg.OpExecutionContext) -> None:
        _conclude(context, pipeline)

    @dg.job(
        name=job_name(pipeline.name),
        description=f"Undoes what a failed attempt at a workflow of {pipeline.name} has done, in reverse order.",
        executor_def=_IN_ORDER,
    )
    def compensate() -> None:
        conclude.alias(_CONCLUDE)(fence.alias(_FENCE)().map(undo.alias(_UNDO)).collect())

    return compensate


def _begin(context: dg.OpExecutionContext, pipeline: Pipeline, absent_seconds: float) -> Plan:
    workflow, attempt, superseded_by = _told(context)
    log, found = WorkflowLog(context.log, Whose(workflow, attempt=attempt)), ending(context.instance, attempt)
    if found.waits_for and not superseded_by:
        log.warning(f"The attempt is not over: {found.waits_for}. What it still does is refused from now on.")
    try:
        plan = _saga(context, pipeline, absent_seconds).begin()
    except FencedError as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    if not superseded_by and plan.state != "void":
        stop(context.instance, _store(context), workflow, attempt, context.log)
        _link(context, found.runs)
    log.info(plan_told(plan))
    return plan


def _conclude(context: dg.OpExecutionContext, pipeline: Pipeline) -> None:
    workflow, attempt, superseded_by = _told(context)
    concluded = _saga(context, pipeline).conclude()
    told = concluded_told(concluded)
    WorkflowLog(context.log, Whose(workflow, attempt=attempt)).info(told)
    link = dg.MetadataValue.dagster_run(context.run_id)
    for event in events(pipeline, _store(context), workflow, attempt, superseded_by, concluded, by=link):
        context.log_event(event)  # type: ignore[arg-type]  # checks too: it takes them, and its annotation does not say so
    if not superseded_by and concluded.state != "void":
        for run in ending(context.instance, attempt).runs[-1:]:
            context.instance.report_engine_event(told, run, EngineEventData({"compensation": link}))
    if concluded.state == "compensation_incomplete":
        raise dg.Failure(told, allow_retries=False)
    if concluded.state == "handed_over":
        context.instance.add_run_tags(context.run_id, {HANDED_OVER_TAG: "true"})


def _tag(context: dg.OpExecutionContext, store: StateStore, pipeline: Pipeline, config: Asked) -> None:
    """The steps that follow, the sensor and whoever looks know by the tags what the run is about."""
    if not config.workflow.startswith(f"{pipeline.name}/"):
        raise dg.Failure(f"{config.workflow!r} is no workflow of {pipeline.name}: it is called {pipeline.name}/…", allow_retries=False)
    attempt = config.attempt or unfinished_attempt(store, pipeline.name, config.workflow)
    tags = {WORKFLOW_TAG: config.workflow, ATTEMPT_TAG: attempt}
    if config.superseded_by:
        tags[SUPERSEDED_BY_TAG] = config.superseded_by
    context.instance.add_run_tags(context.run_id, tags)


def unfinished_attempt(store: StateStore, pipeline: str, workflow: str) -> str:
    """The attempt at a workflow that did not finish. Raises `PinError` where there is none, or more than one."""
    found = {one.attempt for one in unfinished(store, pipeline) if one.workflow_id == workflow and not one.superseded_by}
    if len(found) == 1:
        return found.pop()
    what = f"{len(found)} attempts did not finish: {', '.join(sorted(found))}" if found else "There is nothing to be compensated"
    raise PinError(what, workflow=workflow, fix="name the attempt: the id of its root run")


def _told(context: dg.OpExecutionContext) -> tuple[str, str, str]:
    run = context.instance.get_run_by_id(context.run_id)
    tags = run.tags if run else {}
    return tags[WORKFLOW_TAG], tags[ATTEMPT_TAG], tags.get(SUPERSEDED_BY_TAG, "")


def _saga(context: dg.OpExecutionContext, pipeline: Pipeline, absent_seconds: float = ABSENT_SECONDS) -> Saga:
    workflow, attempt, superseded_by = _told(context)
    resources = {name: getattr(context.resources, name) for name in undo_resources(pipeline)}
    return Saga(
        *(_store(context), pipeline, workflow, attempt),
        superseded_by=superseded_by,
        resources=resources,
        owner=context.run_id,
        absent_seconds=absent_seconds,
        log=context.log,
    )


def _store(context: dg.OpExecutionContext) -> StateStore:
    store: StateStore = getattr(context.resources, STATE_STORE).store()
    return store


def _link(context: dg.OpExecutionContext, runs: Sequence[dg.DagsterRun]) -> None:
    """The attempt's runs lead to this one, and it to the last of them that did not succeed."""
    failed = next((run for run in reversed(runs) if run.status != dg.DagsterRunStatus.SUCCESS), None)
    if failed is None:
        return
    context.instance.add_run_tags(context.run_id, {COMPENSATES_TAG: failed.run_id})
    for run in runs:
        context.instance.add_run_tags(run.run_id, {COMPENSATED_BY_TAG: context.run_id})
    link = dg.MetadataValue.dagster_run(context.run_id)
    context.instance.report_engine_event("What this attempt did is being undone", failed, EngineEventData({"compensation": link}))


# -- told ----------------------------------------------------------------------------------------------------------------------------


def plan_told(plan: Plan) -> str:
    """What is to be undone, in a sentence."""
    if plan.state == "void":
        return "the attempt has completed; nothing is undone"
    said = {"here": "", "later": ", later", "elsewhere": ", in another code location"}
    steps = [f"{one.agent} ({one.done} done, {one.unknown} unknown{', stays' if one.kept else said[one.where]})" for one in plan.steps]
    return f"to be undone, in this order: {', '.join(steps)}" if steps else "it had no effects"


def concluded_told(concluded: Concluded) -> str:
    """How a compensation ended, in a sentence."""
    kept = f" What {', '.join(concluded.kept)} did stays: it cannot be undone." if concluded.kept else ""
    if concluded.state == "void":
        return "The attempt has completed: nothing was undone."
    if concluded.state == "compensated":
        return f"Everything that this attempt did was undone.{kept}"
    left = ", ".join(f"{one.agent} ({one.error or one.state})" for one in concluded.left)
    if concluded.state == "handed_over":
        return f"What can be undone here now was undone. Other code locations go on. Left: {left}.{kept}"
    return f"Not everything that this attempt did was undone. Left: {left}.{kept}"


def events(
    pipeline: Pipeline,
    store: StateStore,
    workflow: str,
    attempt: str,
    superseded_by: str,
    concluded: Concluded,
    *,
    by: Any,
) -> Iterator[dg.AssetObservation | dg.AssetCheckEvaluation]:
    """What is told on the assets: an observation on all that the attempt sealed or did, and the check of those with effects."""
    if concluded.state == "void":
        return
    seals, effective = store.seals(workflow), store.effective(workflow)
    sealed = {seal.agent: seal for seal in seals if seal.attempt == attempt and seal.path} if not superseded_by else {}
    saga = next(
        (one for one in sagas(store, pipeline.name, workflow) if (one.attempt, one.superseded_by) == (attempt, superseded_by)), None
    )
    undos = {undo.agent: undo for undo in saga.undos} if saga else {}
    partition = workflow.removeprefix(f"{pipeline.name}/") if pipeline.partitions_def else None
    for agent in pipeline.order:
        if agent not in sealed and agent not in undos:
            continue
        key, now = dg.AssetKey([pipeline.name, agent]), effective.get(agent)
        undo = undos.get(agent)
        if concluded.state == "handed_over" and (undo is None or undo.state in ("pending", "running")):
            continue  # told when it is over
        metadata: dict[str, Any] = {
            "mao/workflow": dg.MetadataValue.text(workflow),
            "mao/attempt": dg.MetadataValue.dagster_run(attempt),
            "mao/compensation": by,
            "mao/effective": dg.MetadataValue.text(now.reference if now else "none"),
            **({"mao/undone": undo.effects, "mao/undo": undo.state} if undo else {}),
            **({STATE_VERSION: dg.MetadataValue.text(sealed[agent].reference)} if agent in sealed else {}),
        }
        yield dg.AssetObservation(key, _observed(sealed.get(agent) is not None, undo, superseded_by), metadata, partition)
        if undo is not None:
            yield evaluation(pipeline, store, workflow, agent, partition, by=by)


def report(
    instance: dg.DagsterInstance,
    pipeline: Pipeline,
    store: StateStore,
    workflow: str,
    attempt: str,
    superseded_by: str,
    concluded: Concluded,
    *,
    by: str,
) -> None:
    """Tells Dagster of a compensation that was no run of its: on the assets, and on the attempt's last run if it knows one."""
    for event in events(pipeline, store, workflow, attempt, superseded_by, concluded, by=by):
        instance.report_runless_asset_event(event)
    if not superseded_by and concluded.state != "void":
        for run in ending(instance, attempt).runs[-1:]:
            instance.report_engine_event(f"{concluded_told(concluded)} By {by}.", run, EngineEventData({}))


def _observed(was_sealed: bool, undo: Any, superseded_by: str) -> str:
    what = "Its version of this attempt no longer counts" if was_sealed else "It sealed nothing in this attempt"
    if superseded_by:
        what = "A later attempt superseded some of what it did"
    done = {"done": "its effects were undone", "failed": "not all of its effects were undone", "kept": "its effects stay"}
    return f"{what}; {done.get(undo.state, 'its effects wait to be undone')}." if undo else f"{what}."


def evaluation(
    pipeline: Pipeline, store: StateStore, workflow: str, agent: str, partition: str | None, **links: Any
) -> dg.AssetCheckEvaluation:
    """The check `compensated` of one agent in one workflow, as the journal has it now."""
    passed, severity, told, metadata = undone_verdict(sagas(store, pipeline.name, workflow), agent)
    return dg.AssetCheckEvaluation(
        asset_key=dg.AssetKey([pipeline.name, agent]),
        check_name=COMPENSATED,
        passed=passed,
        severity=severity,
        description=told,
        metadata={**metadata, **{f"mao/{name}": link for name, link in links.items()}},
        partition=partition,
    )


def undone_verdict(states: Sequence[SagaState], agent: str) -> tuple[bool, dg.AssetCheckSeverity, str, dict[str, Any]]:
    """Whether what failed attempts did by an agent was undone: passed, severity, a sentence, and the table of what is left."""
    left, kept, undone = list[tuple[SagaState, str]](), list[SagaState](), 0
    for saga in states:
        for undo in saga.undos:
            if undo.agent == agent:
                undone += undo.effects
                if undo.state == "kept":
                    kept.append(saga)
                elif undo.state != "done":
                    left.append((saga, undo.error or undo.state))
    counts: dict[str, Any] = {"undone": undone, "left": len(left)}
    if left:
        rows = [dg.TableRecord({"workflow": one.workflow_id, "attempt": one.attempt, "why": why}) for one, why in left]
        schema = dg.TableSchema([dg.TableColumn(name) for name in ("workflow", "attempt", "why")])
        table = dg.MetadataValue.table(rows, schema=schema)
        what = f"Of {len(left)} attempt{'s' if len(left) > 1 else ''} not all effects were undone"
        return False, dg.AssetCheckSeverity.ERROR, f"{what}. `dagster-mao compensate --resume` tries again.", {"attempts": table, **counts}
    if kept:
        names = ", ".join(dict.fromkeys(saga.attempt for saga in kept))
        return False, dg.AssetCheckSeverity.WARN, f"Its effects cannot be undone, and stay: attempts {names}", counts
    told = f"All {undone} effects of attempts that failed, or were superseded, were undone." if undone else "Nothing was to be undone."
    return True, dg.AssetCheckSeverity.ERROR, told, counts
