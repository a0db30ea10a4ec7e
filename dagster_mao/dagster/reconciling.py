"""The sensor that finds what is to be compensated: from the journal and the run list, and from nothing else."""

import time
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import dagster as dg
from dagster._core.storage.tags import ROOT_RUN_ID_TAG

from dagster_mao.correlation import Whose, WorkflowLog
from dagster_mao.dagster.endings import RETRIED_WITHIN, Ending, ending, standing
from dagster_mao.dagster.resources import STATE_STORE
from dagster_mao.dagster.runs import WORKFLOW_TAG
from dagster_mao.dagster.saga import (
    ATTEMPT_TAG,
    COMPENSATES_TAG,
    HANDED_OVER_TAG,
    SUPERSEDED_BY_TAG,
    job_name,
    run_config,
    with_effects,
)
from dagster_mao.pipeline import Pipeline
from dagster_mao.saga import ABSENT_SECONDS, Saga, Unfinished, show_up, unfinished
from dagster_mao.state import StateStore

# Seconds between the end of a compensation that came to none and the next, doubled each time within an hour: soon at first, and no more
# than a dozen an hour; when what kept them from starting (a code server that is down) is over, ten minutes later at the latest.
_FIRST_PAUSE, _LONGEST_PAUSE = 10.0, 600.0
_AT_ONCE = 20  # runs asked for in one tick
_TOGETHER = 5000  # attempts asked about in one query
_NOT_SUCCEEDED = [status for status in dg.DagsterRunStatus if status != dg.DagsterRunStatus.SUCCESS]
_GOES_ON = "its agents are at work, or are started when what they read is sealed"
_FENCED_WITHIN = 30.0  # seconds in which a code location that has what is undone first begins; then another one ends the attempt
_PRIORITY = "10"  # in the run queue: what is half done goes before what is new


def build_compensation_sensor(
    pipeline: Pipeline,
    *,
    minimum_interval_seconds: int = 5,
    default_status: dg.DefaultSensorStatus = dg.DefaultSensorStatus.RUNNING,
    silent_seconds: float = 3600.0,
    retry_seconds: float = RETRIED_WITHIN,
    absent_seconds: float = ABSENT_SECONDS,
) -> dg.SensorDefinition:
    """The sensor `<pipeline>_compensation`: starts the compensation of attempts that are over and did not complete.

    An attempt is over when all its runs have ended, and no retry of them is due: one that Dagster promised is waited for at most
    `retry_seconds`. An attempt that is no run of this instance is taken for dead when the journal has heard nothing of it for
    `silent_seconds`. A compensation that was killed, or could not be started, is started again: after 10 seconds, then after twice as long
    each time, up to ten minutes. One that ended as incomplete waits for a person. It keeps nothing in memory or in its cursor, so a tick
    that is lost costs its seconds only. It runs from the start. It requires the resource `state_store`.

    In hybrid mode agents of the attempt that this code location does not have are left to the one that has them, in the order of the undos;
    what nobody with such a sensor has shown up for within `absent_seconds` is given up, and the compensation ends as incomplete.
    """
    patience = Patience(silent_seconds, retry_seconds, absent_seconds)

    @dg.sensor(
        name=f"{pipeline.name}_compensation",
        job_name=job_name(pipeline.name),
        description="Compensates attempts that are over and did not complete. What is due is read from the journal and the run list.",
        minimum_interval_seconds=minimum_interval_seconds,
        default_status=default_status,
        required_resource_keys={STATE_STORE},
    )
    def compensation_sensor(context: dg.SensorEvaluationContext) -> Any:
        store = getattr(context.resources, STATE_STORE).store()
        if store.database is None:
            return dg.SkipReason("No shared database is named, so there is no journal.")
        asked, waiting = list[dg.RunRequest](), list[str]()
        going_on = set[str]()

        def are_going_on(attempts: Collection[str]) -> set[str]:
            going_on.update(_going_on(context.instance, attempts))
            return going_on

        found = unfinished(store, pipeline.name, going_on=are_going_on if pipeline.mode == "hybrid" else None)
        if any(_is_shared(pipeline, one) for one in found):
            show_up(store, pipeline.name, with_effects(pipeline), every=absent_seconds / 10)
        if going_on:
            waiting.append(f"{len(going_on)} attempts: {_GOES_ON}")
        for one in found:
            try:
                due = _due(context.instance, store, pipeline, one, patience)
            except Exception as error:  # whatever is wrong with one attempt, the others are looked at
                WorkflowLog(context.log, Whose(one.workflow_id, attempt=one.attempt)).exception("it could not be looked at")
                due = f"it could not be looked at ({type(error).__name__})"
            if isinstance(due, dg.RunRequest):
                asked.append(due)
            else:
                waiting.append(f"{one.workflow_id}, attempt {one.attempt}: {due}")
        if asked:
            return dg.SensorResult(run_requests=asked[:_AT_ONCE])
        return dg.SkipReason("; ".join(waiting) or "Nothing is to be compensated.")

    return compensation_sensor


class Patience(NamedTuple):
    """For how many seconds the silence of an attempt that is no run here is waited out, the retry that was promised of a run, and a code

    location that has an agent which this one does not have.
    """

    silence: float
    retry: float
    absence: float


def _going_on(instance: dg.DagsterInstance, attempts: Collection[str]) -> set[str]:
    """The attempts that go on, of those in hybrid mode that nobody asked to compensate: none of their own runs has failed.

    There may be ten thousand, of which nothing is to be said: they are asked about together.
    """
    asked, failed = sorted(attempts), set[str]()
    for start in range(0, len(asked), _TOGETHER):
        some = asked[start : start + _TOGETHER]
        roots = instance.get_runs(dg.RunsFilter(run_ids=some, statuses=_NOT_SUCCEEDED))
        again = instance.get_runs(dg.RunsFilter(tags={ROOT_RUN_ID_TAG: some}, statuses=_NOT_SUCCEEDED))
        failed |= {run.root_run_id or run.run_id for run in (*roots, *again)}
    return set(asked) - failed


def _is_shared(pipeline: Pipeline, one: Unfinished) -> bool:
    """Whether agents of other code locations had effects in it."""
    return pipeline.mode == "hybrid" and not pipeline.agents.keys() >= set(one.agents)


def _due(instance: dg.DagsterInstance, store: StateStore, pipeline: Pipeline, one: Unfinished, patience: Patience) -> dg.RunRequest | str:
    """The run that is to be started, or what is waited for."""
    if one.state == "incomplete":
        return "its compensation is incomplete; `dagster-mao compensate --resume` tries again"
    before = _compensations(instance, pipeline, one)
    for record in before:
        if waits := standing(instance, record).waits_for:
            return waits
    if waits := _pauses(before):
        return waits
    if one.lease_until is not None and (left := one.lease_until.timestamp() - time.time()) > 0:
        return f"another compensator holds it for another {left:.0f} s"
    found = ending(instance, one.attempt, retried_within=patience.retry)
    if one.kind == "attempt" and (waits := _not_over(instance, found, one, pipeline, patience.silence)):
        return waits
    if _is_shared(pipeline, one) and (waits := _others_first(store, pipeline, one, patience.absence)):
        return waits
    number = len(before)
    failed = found.failed
    return dg.RunRequest(
        run_key=f"{one.workflow_id} {one.attempt} {one.superseded_by} {number}",
        run_config=run_config(one.workflow_id, one.attempt, one.superseded_by, absent_seconds=patience.absence),
        tags={**_tags(one), COMPENSATES_TAG: failed.run_id if failed else one.attempt, "dagster/priority": _PRIORITY},
    )


def _others_first(store: StateStore, pipeline: Pipeline, one: Unfinished, absence: float) -> str | None:
    """What is waited for where other code locations have agents of the attempt; None when it is this one's turn."""
    saga = Saga(store, pipeline, one.workflow_id, one.attempt, superseded_by=one.superseded_by, absent_seconds=absence)
    turn = saga.turn()
    if turn.here or turn.absent or not turn.before:
        return None
    if not turn.fenced and time.time() - one.last.timestamp() > _FENCED_WITHIN:
        return None
    return f"what {', '.join(turn.before)} did is undone first, in another code location"


def _pauses(before: Sequence[dg.RunRecord]) -> str | None:
    """What is waited for after compensations that came to no end, newest first."""
    now, before = time.time(), [record for record in before if HANDED_OVER_TAG not in record.dagster_run.tags]
    lately = sum(now - record.create_timestamp.timestamp() < 3600 for record in before)
    if not lately:
        return None
    pause = min(_FIRST_PAUSE * 2 ** (lately - 1), _LONGEST_PAUSE)
    left = (before[0].end_time or before[0].create_timestamp.timestamp()) + pause - now
    return f"{lately} compensations came to no end within an hour; the next one starts in {left:.0f} s" if left > 0 else None


def _not_over(instance: dg.DagsterInstance, found: Ending, one: Unfinished, pipeline: Pipeline, patience: float) -> str | None:
    if pipeline.mode == "hybrid" and one.state:
        # Its runs are of many attempts each: it is over when one of its agents has failed. The fence ends what the others still do for it.
        return None
    if pipeline.mode == "hybrid" and not found.failed:
        return _left_by(instance, one, patience) if one.completed or one.replaced else _GOES_ON
    if found.waits_for:
        return found.waits_for
    if not found.runs:
        return _silent(one, patience)
    return None if found.failed else "all its runs succeeded"


def _left_by(instance: dg.DagsterInstance, one: Unfinished, patience: float) -> str | None:
    """Who may still be at work for an attempt that has completed, or was replaced; None when all that is left was left by the dead."""
    for run_id in one.runs:
        record = instance.get_run_record_by_id(run_id)
        if waits := (_silent(one, patience) if record is None else standing(instance, record).waits_for):
            return waits
    return None


def _silent(one: Unfinished, patience: float) -> str | None:
    silent = time.time() - one.last.timestamp()
    return f"it is no run of this instance, and was at work {silent:.0f} s ago" if silent < patience else None


def _tags(one: Unfinished) -> dict[str, str]:
    superseded = {SUPERSEDED_BY_TAG: one.superseded_by} if one.superseded_by else {}
    return {WORKFLOW_TAG: one.workflow_id, ATTEMPT_TAG: one.attempt, **superseded}


def _compensations(instance: dg.DagsterInstance, pipeline: Pipeline, one: Unfinished) -> Sequence[dg.RunRecord]:
    found = instance.get_run_records(dg.RunsFilter(job_name=job_name(pipeline.name), tags=_tags(one)))
    return [record for record in found if record.dagster_run.tags.get(SUPERSEDED_BY_TAG, "") == one.superseded_by]
