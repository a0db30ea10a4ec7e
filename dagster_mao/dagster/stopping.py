"""Runs in flight of an attempt that was fenced. They can neither seal nor have effects any more: they are ended, and not only refused."""

from collections.abc import Iterator
from typing import Any

import dagster as dg
from dagster._core.storage.dagster_run import CANCELABLE_RUN_STATUSES
from dagster._core.storage.tags import ASSET_PARTITION_RANGE_START_TAG

from dagster_mao.correlation import Whose, WorkflowLog
from dagster_mao.dagster.endings import ending, is_gone
from dagster_mao.dagster.runs import BATCH_TAG, WORKFLOW_TAG, workflow_tags
from dagster_mao.state import StateStore

_IN_FLIGHT = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
_WHY = "Its attempt is being compensated: it could seal nothing, and have no effect, any more."


def stop(instance: dg.DagsterInstance, store: StateStore, workflow: str, attempt: str, log: Any) -> list[str]:
    """Ends the runs in flight of a fenced attempt at a workflow, in all code locations of the instance; returns their ids.

    Runs that hold other workflows too go on: the fence keeps them from this one. To be called after the fence. What cannot be ended is
    logged, and refused by the fence all the same.
    """
    told, ended = WorkflowLog(log, Whose(workflow, attempt=attempt)), list[str]()
    for run in _in_flight(instance, store, workflow, attempt):
        try:
            if _is_ended(instance, run):
                ended.append(run.run_id)
        except Exception as error:  # whatever a launcher raises: the fence holds without it
            told.warning(f"run {run.run_id} could not be terminated ({type(error).__name__}); the fence refuses what it still does")
    if ended:
        told.info(f"in flight, and terminated: {', '.join(ended)}")
    return ended


def _is_ended(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    if is_gone(instance, run):  # nobody would ever say so, and what Dagster takes for failed it may retry
        instance.report_run_canceling(run, _WHY)
        instance.report_run_canceled(run, "Its process was gone.")
        return True
    if run.status not in CANCELABLE_RUN_STATUSES:
        return False  # it is about to start, and will find the fence; or it is being terminated
    instance.report_engine_event(_WHY, run)
    return instance.run_coordinator.cancel_run(run.run_id)


def _in_flight(instance: dg.DagsterInstance, store: StateStore, workflow: str, attempt: str) -> Iterator[dg.DagsterRun]:
    """The attempt's own runs, and those of batches in which this workflow, in this attempt, is all that is left to do."""
    for run in ending(instance, attempt).runs:
        if not run.is_finished and BATCH_TAG not in run.tags and ASSET_PARTITION_RANGE_START_TAG not in run.tags:
            yield run
    found = instance.get_runs(dg.RunsFilter(tags=workflow_tags([workflow]), statuses=_IN_FLIGHT))
    alone = [run for run in found if BATCH_TAG in run.tags and sum(tag.startswith(f"{WORKFLOW_TAG}.") for tag in run.tags) == 1]
    if not alone:
        return
    from dagster_mao.choreography import attempts_of  # SQLAlchemy, which whoever has batches has

    left = attempts_of(store, [run.tags[BATCH_TAG] for run in alone])
    yield from (run for run in alone if left[run.tags[BATCH_TAG]] == [(workflow, attempt)])
