"""Agents that start by themselves: a sensor and a job for each. The sensor looks into the state log, and launches one run per batch.

What is to be done, and by whom, lies in the state log and the SQL database; Dagster is told to start runs, and told what became of them.
Its cursor and its run keys may be lost.
"""

import datetime as dt
import time
from collections.abc import Iterator, Sequence
from typing import Any

import dagster as dg

from dagster_mao.agent import Agent
from dagster_mao.boundary import Outcome
from dagster_mao.choreography import (
    Batch,
    BatchTakenError,
    Delivered,
    abandon,
    cut,
    done_of,
    held,
    intake_workflow,
    redeliver_batch,
    run_batch,
    run_inbox,
    subscribers,
    tick,
    workflows_of,
)
from dagster_mao.configuration import config_digest
from dagster_mao.correlation import Whose, WorkflowLog
from dagster_mao.dagster.assets import op_name
from dagster_mao.dagster.endings import standing
from dagster_mao.dagster.metadata import of_pattern
from dagster_mao.dagster.policies import POLICIES
from dagster_mao.dagster.resources import STATE_STORE
from dagster_mao.dagster.runs import BATCH_TAG, WORKFLOWS_TAGGED, is_fresh, workflow_tags
from dagster_mao.dagster.telling import Telling, untold
from dagster_mao.errors import MaoError
from dagster_mao.gateway import shared_store
from dagster_mao.pipeline import Pipeline
from dagster_mao.saga import request
from dagster_mao.state import StateStore

RUNS_AT_ONCE = 4
"""Runs of one agent that may be queued or at work at a time. A backlog waits in batches, not in Dagster's queue."""

STARTS_WITHIN = 120.0
"""Seconds. A run that has not started by then is taken for dead, and its batch is launched again. Should it start later, it does nothing.
"""

_LAUNCHED = (dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTING)
_UNFINISHED = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def agent_job_name(pipeline: str, agent: str) -> str:
    """The job that runs one agent over the workflows of a batch."""
    return f"{pipeline}__{agent}_job"


def build_agent_jobs(pipeline: Pipeline) -> list[dg.JobDefinition]:
    """A job for each agent that starts by itself (`build_agent_job`); none in orchestration."""
    return [build_agent_job(pipeline, one.agent) for one in subscribers(pipeline)]


def build_agent_job(pipeline: Pipeline, agent: str) -> dg.JobDefinition:
    """The job `<pipeline>__<agent>_job`: one agent over the workflows of a batch, in one step. The sensor launches its runs.

    It is no asset job, as a run of one is of one partition or of a range without gaps, and as a whole succeeds or fails: what is sealed of
    each workflow is told of the agent's asset all the same. Materialised from the UI, an agent is done again, in an attempt of its own. It
    requires what the asset does.
    """
    node = pipeline.node(agent)
    reads = ", ".join(read.upstream for read in node.inputs)
    name = op_name(pipeline.name, agent)

    @dg.op(
        name=f"{name}__batch",
        description=node.description,
        required_resource_keys={STATE_STORE, POLICIES, *node.all_resources},
        out=dg.Out(dg.Nothing),
        pool=node.pool,
    )
    def batch(context: dg.OpExecutionContext) -> Iterator[Any]:
        yield from _delivered(context, pipeline, node)

    @dg.job(
        name=agent_job_name(pipeline.name, agent),
        description=f"{agent} over the workflows of a batch: it starts by itself, when {reads} is sealed.",
        metadata=of_pattern(pipeline),
        # One step: a process of its own beside the run's would take longer to start than many a batch.
        executor_def=dg.in_process_executor,
    )
    def agent_job() -> None:
        batch()

    return agent_job


def build_subscriber_sensors(pipeline: Pipeline) -> list[dg.SensorDefinition]:
    """A sensor for each agent that starts by itself. Raises nothing: a pipeline in orchestration has none."""
    return [build_subscriber_sensor(pipeline, one.agent) for one in subscribers(pipeline)]


def build_subscriber_sensor(
    pipeline: Pipeline,
    agent: str,
    *,
    minimum_interval_seconds: int = 5,
    runs_at_once: int = RUNS_AT_ONCE,
    default_status: dg.DefaultSensorStatus = dg.DefaultSensorStatus.RUNNING,
) -> dg.SensorDefinition:
    """The sensor `<pipeline>__<agent>_sensor`: launches one run of the agent's job for each batch of workflows that are due for it.

    How far the log was read lies in the SQL database, and what is due in the log itself: a cursor that is reset, a tick that dies, two
    daemons cost time only. A batch whose run died is launched again. It runs from the start: without it nobody starts the agent. It
    requires the resource `state_store`. Raises `WiringError` for an agent that does not start by itself.
    """
    reads = ", ".join(read.upstream for read in pipeline.node(agent).inputs)

    @dg.sensor(
        name=f"{pipeline.name}__{agent}_sensor",
        job_name=agent_job_name(pipeline.name, agent),
        description=f"Starts {agent} when {reads} is sealed.",
        minimum_interval_seconds=minimum_interval_seconds,
        default_status=default_status,
        required_resource_keys={STATE_STORE},
    )
    def subscriber_sensor(context: dg.SensorEvaluationContext) -> Any:
        store = getattr(context.resources, STATE_STORE).store()
        launcher = _Launcher(context.instance, store, pipeline, agent, agent_job_name(pipeline.name, agent))
        launcher.bury()
        batches = tick(store, pipeline, agent, every=minimum_interval_seconds)
        launched, asked = launcher.split(batches)
        free = max(runs_at_once - launcher.running(), 0)
        requests = launcher.requests(asked[:free])
        # A note for people: what counts lies in the database.
        note = f"looked {dt.datetime.now(dt.timezone.utc):%Y-%m-%d %H:%M:%S} UTC; the position in the log is in the shared database"
        return dg.SensorResult(run_requests=requests, cursor=note, skip_reason=None if requests else _why_none(launched, asked))

    return subscriber_sensor


def build_inbox_job(pipeline: Pipeline) -> dg.JobDefinition:
    """The job `<pipeline>__inbox_job`: seals a batch of submitted events as the entry of a workflow. The sensor launches its runs."""
    entry = pipeline.entry

    @dg.op(
        name=f"{pipeline.name}__inbox",
        description=f"Seals a batch of events as {entry.name}; bad ones go to its quarantine, with the reason.",
        required_resource_keys={STATE_STORE, POLICIES, *entry.all_resources},
        out=dg.Out(dg.Nothing),
    )
    def inbox(context: dg.OpExecutionContext) -> Iterator[Any]:
        yield from _taken_in(context, pipeline)

    @dg.job(
        name=inbox_job_name(pipeline.name),
        description=f"A batch of submitted events, sealed as {entry.name} of a workflow.",
        executor_def=dg.in_process_executor,
    )
    def inbox_job() -> None:
        inbox()

    return inbox_job


def build_inbox_sensor(
    pipeline: Pipeline,
    *,
    minimum_interval_seconds: int = 5,
    runs_at_once: int = RUNS_AT_ONCE,
    default_status: dg.DefaultSensorStatus = dg.DefaultSensorStatus.RUNNING,
) -> dg.SensorDefinition:
    """The sensor `<pipeline>__inbox_sensor`: cuts submitted events into batches, and launches a run of the inbox's job for each.

    It runs from the start. It requires the resource `state_store`.
    """

    @dg.sensor(
        name=f"{pipeline.name}__inbox_sensor",
        job_name=inbox_job_name(pipeline.name),
        description=f"Makes workflows of {pipeline.name} of the events that were submitted.",
        minimum_interval_seconds=minimum_interval_seconds,
        default_status=default_status,
        required_resource_keys={STATE_STORE},
    )
    def inbox_sensor(context: dg.SensorEvaluationContext) -> Any:
        store = getattr(context.resources, STATE_STORE).store()
        launcher = _Launcher(context.instance, store, pipeline, pipeline.entry_name, inbox_job_name(pipeline.name))
        launcher.bury()
        launched, asked = launcher.split(cut(store, pipeline, every=minimum_interval_seconds))
        requests = [
            dg.RunRequest(
                run_key=batch.run_key,
                tags={BATCH_TAG: batch.run_key, **workflow_tags([f"{pipeline.name}/{intake_workflow(batch.run_key)}"])},
            )
            for batch in asked[: max(runs_at_once - launcher.running(), 0)]
        ]
        return dg.SensorResult(run_requests=requests, skip_reason=None if requests else _why_none(launched, asked))

    return inbox_sensor


def inbox_job_name(pipeline: str) -> str:
    """The job that seals batches of submitted events."""
    return f"{pipeline}__inbox_job"


class _Launcher:
    """What Dagster knows of the runs of an agent's batches."""

    def __init__(self, instance: dg.DagsterInstance, store: StateStore, pipeline: Pipeline, agent: str, job: str) -> None:
        self._instance, self._store, self._pipeline, self._agent, self._job = instance, store, pipeline, agent, job

    def bury(self) -> None:
        """Lets go of batches that dead runs have: nobody waits until they have been silent for long."""
        for run_key, run_id in held(self._store, self._pipeline, self._agent).items():
            record = self._instance.get_run_record_by_id(run_id)
            if record is not None and self._is_over(record):
                self._abandon(run_key)

    def split(self, batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
        """Those that have a run which is to take them, and those that are to be launched.

        A batch whose run is over and never took it is launched at the next tick, under another key: under its own Dagster starts no other.
        """
        launched, asked = list[Batch](), list[Batch]()
        for batch in batches:
            records = self._instance.get_run_records(dg.RunsFilter(tags={BATCH_TAG: batch.run_key}))
            if not records:
                asked.append(batch)
            elif all(self._is_over(record) for record in records):
                self._abandon(batch.run_key)
            else:
                launched.append(batch)
        return launched, asked

    def running(self) -> int:
        return self._instance.get_runs_count(dg.RunsFilter(job_name=self._job, statuses=_UNFINISHED))

    def requests(self, batches: Sequence[Batch]) -> list[dg.RunRequest]:
        workflows = workflows_of(self._store, [batch.run_key for batch in batches]) if batches else {}
        return [
            dg.RunRequest(run_key=batch.run_key, tags={BATCH_TAG: batch.run_key, **workflow_tags(workflows[batch.run_key])})
            for batch in batches
        ]

    def _is_over(self, record: dg.RunRecord) -> bool:
        run = record.dagster_run
        if run.status in _LAUNCHED and time.time() - record.update_timestamp.timestamp() > STARTS_WITHIN:
            # Whoever launched it died meanwhile. It would stay so for ever, and hold a place in the queue.
            self._instance.report_run_failed(run, f"It has not started within {STARTS_WITHIN:.0f} s; its batch is launched again.")
            return True
        return standing(self._instance, record).waits_for is None

    def _abandon(self, run_key: str) -> None:
        abandon(shared_store(str(self._store.database)), run_key)


def _why_none(launched: Sequence[Batch], asked: Sequence[Batch]) -> str:
    if asked:
        return f"{len(asked)} batches wait until a run of this agent has ended."
    if launched:
        return f"{len(launched)} batches have a run that is about to take them."
    return "Nothing is due."


# -- a run ---------------------------------------------------------------------------------------------------------------------------


def _delivered(context: dg.OpExecutionContext, pipeline: Pipeline, agent: Agent) -> Iterator[Any]:
    """The step of a run that was launched for a batch: the agent over its workflows, each told when it is through.

    A workflow that fails fails alone. The step fails at its end, so that it is seen, and names it; what was sealed stays so.
    """
    run_key = context.run.tags.get(BATCH_TAG)
    if run_key is None:
        fix = f"materialise {agent.name} to do it again; what is due its sensor starts"
        raise dg.Failure(f"This run is of no batch: it has no tag {BATCH_TAG}. Fix: {fix}", allow_retries=False)
    store: StateStore = getattr(context.resources, STATE_STORE).store()
    telling = Telling(context, store, pipeline, agent)
    resources = {name: getattr(context.resources, name) for name in agent.all_resources}
    _log_workflows(context, store, run_key)
    told = set[str]()
    try:
        for one in run_batch(
            *(store, pipeline, agent.name, run_key),
            run_id=context.run.run_id,
            resources=resources,
            config_digest=config_digest(agent.own_resources(resources)),
            policies=getattr(context.resources, POLICIES).of(pipeline),
            fresh=is_fresh(context.run.tags, pipeline, agent.name),
            log=context.log,
        ):
            told.add(one.workflow_id)
            yield from _told(context, store, pipeline, telling, one)
    except BatchTakenError as error:
        again = redeliver_batch(store, pipeline, agent.name, run_key) if context.run.parent_run_id else 0
        context.log.info(str(error))
        if again:
            context.log.info(f"{again} workflows that failed in this batch are delivered again, by the sensor, in a run of their own.")
    for seal in untold(context.instance, store, pipeline, agent, set(done_of(store, run_key)) - told):
        yield from telling.sealed(Outcome(seal, (), reused=True))
    yield from telling.summary()
    telling.end()


def _taken_in(context: dg.OpExecutionContext, pipeline: Pipeline) -> Iterator[Any]:
    """The step of a run that was launched for a batch of events. One that failed is handed out again, the same events."""
    entry, run_key = pipeline.entry, context.run.tags.get(BATCH_TAG)
    if run_key is None:
        raise dg.Failure(f"This run is of no batch: it has no tag {BATCH_TAG}. Fix: submit events", allow_retries=False)
    store: StateStore = getattr(context.resources, STATE_STORE).store()
    telling = Telling(context, store, pipeline, entry)
    resources = {name: getattr(context.resources, name) for name in entry.all_resources}
    try:
        told = run_inbox(
            *(store, pipeline, run_key),
            run_id=context.run.run_id,
            resources=resources,
            config_digest=config_digest(entry.own_resources(resources)),
            policies=getattr(context.resources, POLICIES).of(pipeline),
            log=context.log,
        )
    except BatchTakenError as error:
        context.log.info(str(error))
        return
    except MaoError as error:
        yield from telling.failed(f"{pipeline.name}/{intake_workflow(run_key)}", error)
    else:
        seals = [told.outcome.seal] if told.outcome else untold(context.instance, store, pipeline, entry, [told.workflow_id])
        for seal in seals:
            yield from telling.sealed(told.outcome or Outcome(seal, (), reused=True))
    yield from telling.summary()
    telling.end(outcome="its events are handed out again")


def _ask_for_compensation(
    context: dg.OpExecutionContext, store: StateStore, pipeline: Pipeline, agent: str, workflow_id: str, why: str
) -> None:
    """In hybrid mode an agent that fails ends the attempt: what all its agents did, in all their runs, is undone.

    Not one that the entry does not count on: it may fail without the others.
    """
    if pipeline.mode != "hybrid":
        return
    entry = next((seal for seal in reversed(store.seals(workflow_id)) if seal.kind == "entry"), None)
    if entry is not None and agent in entry.plan:
        request(store, pipeline.name, workflow_id, entry.attempt, run_id=context.run.run_id, why=why)


def _told(context: dg.OpExecutionContext, store: StateStore, pipeline: Pipeline, telling: Telling, one: Delivered) -> Iterator[Any]:
    log = WorkflowLog(context.log, Whose(one.workflow_id, telling.agent.name))
    if one.state == "done" and one.outcome is not None:
        yield from telling.sealed(one.outcome)
    elif one.state == "duplicate":
        log.info("it was sealed before; nothing was done.")
    elif one.state == "void":
        log.info("it was superseded, or fenced, before it was begun; nothing was done.")
    elif one.error is None:
        telling.given_up(one.workflow_id, "its runs died, one after the other, while they worked on it")
        _ask_for_compensation(context, store, pipeline, telling.agent.name, one.workflow_id, "RunDied")
    elif one.state == "later":
        yield from telling.failed(one.workflow_id, one.error, again="It is delivered again later.")
    else:
        yield from telling.failed(one.workflow_id, one.error)
        _ask_for_compensation(context, store, pipeline, telling.agent.name, one.workflow_id, type(one.error).__name__)


def _log_workflows(context: dg.OpExecutionContext, store: StateStore, run_key: str) -> None:
    """Those that are no tags of the run are in its log."""
    workflows = workflows_of(store, [run_key])[run_key]
    if len(workflows) > WORKFLOWS_TAGGED:
        context.log.info(f"{len(workflows)} workflows: {', '.join(workflows)}")
