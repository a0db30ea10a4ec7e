"""What Dagster's event log adds to a dossier: who launched the runs, when they ran, the verdicts of checks, the anchors of the chain."""

import datetime as dt
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import dagster as dg

from dagster_mao.dagster.anchors import read_anchors
from dagster_mao.dagster.runs import WORKFLOW_TAG, workflow_tags
from dagster_mao.errors import StoreError
from dagster_mao.review.dossier import CheckTold, Evidence, RunTold
from dagster_mao.state import StateStore

_USER, _SCHEDULE, _SENSOR, _BACKFILL = "user", "dagster/schedule_name", "dagster/sensor_name", "dagster/backfill"


def evidence(instance: dg.DagsterInstance, store: StateStore, workflow: str, source: str) -> Evidence:
    """What the instance knows of a workflow. Raises `StoreError` when its event log cannot be read."""
    pipeline = workflow.partition("/")[0]
    attempts = {seal.run_id: seal.attempt for seal in store.seals(workflow)}
    anchors = tuple(one for one in read_anchors(instance, [pipeline]) if one.workflow_id == workflow)
    try:
        runs = [*_runs(instance, workflow, attempts)]
        told = tuple(_run(run, attempts.get(run.dagster_run.run_id, "")) for run in runs)
        checks = tuple(check for run in runs for check in _checks(instance, run.dagster_run, workflow))
    except Exception as error:  # a database driver's, Dagster's own: there is no one class for them
        raise StoreError(f"Dagster's event log cannot be read: {type(error).__name__}", fix="check the instance's storage") from error
    return Evidence(source, told, checks, anchors)


def _runs(instance: dg.DagsterInstance, workflow: str, attempts: Mapping[str, str]) -> Iterator[dg.RunRecord]:
    """Those that sealed something, those of the partition, and those that are tagged with the workflow: failed ones among them."""
    pipeline, _, key = workflow.partition("/")
    filters = [
        dg.RunsFilter(run_ids=[*attempts]),
        dg.RunsFilter(tags={"dagster/partition": key}, job_name=f"{pipeline}_job"),
        dg.RunsFilter(tags={WORKFLOW_TAG: workflow}),
        dg.RunsFilter(tags=workflow_tags([workflow])),
    ]
    found = {record.dagster_run.run_id: record for one in filters for record in instance.get_run_records(one)}
    yield from sorted(found.values(), key=lambda record: record.create_timestamp)


def _run(record: dg.RunRecord, attempt: str) -> RunTold:
    run = record.dagster_run
    return RunTold(
        run_id=run.run_id,
        attempt=attempt or run.root_run_id or run.run_id,
        job="assets" if run.job_name.startswith("__") else run.job_name,  # a name of Dagster's own, for chosen assets
        status=run.status.value,
        launched_by=_launched_by(run.tags),
        started=_moment(record.start_time),
        ended=_moment(record.end_time),
    )


def _launched_by(tags: Mapping[str, str]) -> str:
    for name, what in ((_SCHEDULE, "the schedule"), (_SENSOR, "the sensor"), (_BACKFILL, "the backfill")):
        if name in tags:
            return f"{what} {tags[name]}"
    return tags.get(_USER, "a person, or a program, that Dagster does not name")


def _moment(seconds: float | None) -> dt.datetime | None:
    return None if seconds is None else dt.datetime.fromtimestamp(seconds, dt.timezone.utc)


def _checks(instance: dg.DagsterInstance, run: dg.DagsterRun, workflow: str) -> Iterable[CheckTold]:
    pipeline, _, key = workflow.partition("/")
    for record in instance.get_records_for_run(run.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION).records:
        event = record.event_log_entry.dagster_event
        told: Any = event.event_specific_data if event is not None else None
        # A run may be of several workflows: of them, the partition says which a verdict is of.
        if told is None or told.asset_key.path[0] != pipeline or getattr(told, "partition", None) not in (None, key):
            continue
        at = dt.datetime.fromtimestamp(record.event_log_entry.timestamp, dt.timezone.utc)
        agent = "/".join(told.asset_key.path[1:])
        yield CheckTold(agent, told.check_name, told.passed, told.severity.value.lower(), told.description or "", run.run_id, at)
