"""Whether an attempt is over: what the run list says of its runs, and what nobody told it, because those who would have are dead too.

A run whose process and code server were both killed stays STARTED for ever: the default launcher cannot tell. So the process is looked for
here, where it can be known that it ran on this host. With other launchers that is the work of Dagster's run monitoring.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import dagster as dg
from dagster._core.events import EngineEventData
from dagster._core.execution.backfill import BULK_ACTION_TERMINAL_STATUSES
from dagster._core.launcher import DefaultRunLauncher
from dagster._core.storage.event_log.sqlite import SqliteEventLogStorage
from dagster._core.storage.tags import (
    AUTO_RETRY_RUN_ID_TAG,
    BACKFILL_ID_TAG,
    GRPC_INFO_TAG,
    ROOT_RUN_ID_TAG,
    WILL_RETRY_TAG,
)

_NEVER_STARTED = (dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTING)
_STARTS_WITHIN = 600.0  # seconds; a run that has no process by then will have none
RETRIED_WITHIN = 600.0
"""Seconds in which the daemon makes the retry that it promised; mostly six are enough."""

_TAGGED_WITHIN = 30.0  # seconds between a run's failure and the tag that says whether it will be retried
_PROC = Path("/proc")


class Ending(NamedTuple):
    """How an attempt stands by its runs, the oldest first. `waits_for` says what may still come of it; None when it is over."""

    runs: Sequence[dg.DagsterRun]
    waits_for: str | None

    @property
    def failed(self) -> dg.DagsterRun | None:
        """The newest run that did not succeed."""
        return next((run for run in reversed(self.runs) if run.status != dg.DagsterRunStatus.SUCCESS), None)


def ending(instance: dg.DagsterInstance, attempt: str, *, retried_within: float = RETRIED_WITHIN) -> Ending:
    """How an attempt, the root run and all its re-executions, stands.

    A run whose process is gone, unseen by anybody, is marked as failed: whatever follows a failed run (retries too) then follows it.
    """
    runs, waits = list[dg.DagsterRun](), None
    for record in _records(instance, attempt):
        told = standing(instance, record, retried_within=retried_within)
        runs.append(told.run)
        waits = waits or told.waits_for
    return Ending(runs, waits)


class Standing(NamedTuple):
    """How a run stands. `waits_for` says what may still come of it; None when nothing does."""

    run: dg.DagsterRun
    waits_for: str | None


def standing(instance: dg.DagsterInstance, record: dg.RunRecord, *, retried_within: float = RETRIED_WITHIN) -> Standing:
    """How a run stands; first it is marked as failed if its process is gone."""
    if not record.dagster_run.is_finished and is_gone(instance, record.dagster_run):
        mark_as_failed(instance, record.dagster_run)
        record = instance.get_run_record_by_id(record.dagster_run.run_id) or record
    return Standing(record.dagster_run, _waits_for(instance, record, retried_within))


def is_gone(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Whether the process that executes a run is certainly gone. False where that cannot be known from here."""
    if not _is_on_this_host(instance, run):
        return False
    told = _process(instance, run)
    return told is not None and not _is_alive(*told)


def mark_as_failed(instance: dg.DagsterInstance, run: dg.DagsterRun) -> None:
    """As the code server does when it sees a run's process die."""
    now = instance.get_run_by_id(run.run_id)
    if now is not None and not now.is_finished:
        instance.report_engine_event("The process of this run is gone, and nobody saw it end", run, EngineEventData({}))
        instance.report_run_failed(run, "This run has been marked as failed: its process is gone.")


def _records(instance: dg.DagsterInstance, attempt: str) -> list[dg.RunRecord]:
    again = instance.get_run_records(dg.RunsFilter(tags={ROOT_RUN_ID_TAG: attempt}), ascending=True)
    root = instance.get_run_record_by_id(attempt)
    return [*([root] if root else []), *again]


def _waits_for(instance: dg.DagsterInstance, record: dg.RunRecord, retried_within: float) -> str | None:
    run = record.dagster_run
    if not run.is_finished:
        if run.status in _NEVER_STARTED and time.time() - record.create_timestamp.timestamp() > _STARTS_WITHIN:
            return None
        return f"run {run.run_id} is {run.status.value}"
    return f"run {run.run_id} will be retried" if _retry_is_pending(instance, record, retried_within) else None


def _retry_is_pending(instance: dg.DagsterInstance, record: dg.RunRecord, retried_within: float) -> bool:
    run = record.dagster_run
    if run.status != dg.DagsterRunStatus.FAILURE or AUTO_RETRY_RUN_ID_TAG in run.tags:
        return False  # a retry that was made is a run of the attempt by itself
    since = time.time() - (record.end_time or time.time())
    told = run.tags.get(WILL_RETRY_TAG)
    if told is None:
        return instance.run_retries_enabled and since < _TAGGED_WITHIN
    return told == "true" and since < retried_within and _is_kept(instance, run)


def _is_kept(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Whether the daemon keeps the promise of a retry: not for runs that no code server launched, nor after their backfill has ended."""
    if run.remote_job_origin is None:
        return False
    backfill = run.tags.get(BACKFILL_ID_TAG)
    found = instance.get_backfill(backfill) if backfill else None
    return backfill is None or (found is not None and found.status not in BULK_ACTION_TERMINAL_STATUSES)


def _is_on_this_host(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """A code server's runs are where it is, and so are its sensors; a run of somebody's script is where a shared SQLite file can be."""
    if GRPC_INFO_TAG in run.tags:
        return isinstance(instance.run_launcher, DefaultRunLauncher)
    return isinstance(instance.event_log_storage, SqliteEventLogStorage)


def _process(instance: dg.DagsterInstance, run: dg.DagsterRun) -> tuple[int, float] | None:
    """The process that executes the run, and when it told so; None before it did."""
    engine = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ENGINE_EVENT)
    for entry in reversed(list(engine)):
        event = entry.dagster_event
        if event is None or event.step_key is not None:
            continue  # of a step's own process
        told = getattr(event.event_specific_data, "metadata", {}).get("pid")
        if told is not None:
            return int(str(told.value)), entry.timestamp
    return None


def _is_alive(pid: int, told_at: float) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # of another user, who has it now or had it all the time
        pass
    try:
        state, *rest = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        booted = next(int(line.split()[1]) for line in (_PROC / "stat").read_text().splitlines() if line.startswith("btime"))
    except (OSError, ValueError, StopIteration):  # no /proc here: then a number that came into use again is taken for the old one
        return True
    started = booted + int(rest[18]) / os.sysconf("SC_CLK_TCK")
    return state != "Z" and started < told_at + 2  # a number may come into use again
