"""The processes of the chaos: workers, which execute runs and compensations until they are killed, and one that ticks the sensor."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import dagster as dg
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.events import EngineEventData
from dagster._core.execution.api import create_execution_plan, execute_run
from sqlalchemy.exc import OperationalError

from tools.chaos.kills import arm
from tools.chaos.script import Point

COMPENSATION, RUN_KEY = "chaos_compensate", "dagster/run_key"
LOCKED_OUT = 75
"""The exit code of a process that could not write to Dagster's database."""

_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


class Task(NamedTuple):
    """A run that a worker is to execute, of a workflow; of a compensation where there is none. It ends at the point, if one is given."""

    name: str
    run_id: str
    workflow: str | None
    point: Point | None = None


def work(project: str, folder: str, tasks: Connection) -> None:
    """Executes what it is handed, one run after the other, until nothing more can come."""
    instance, defs = _begin(project, folder, f"worker-{os.getpid()}")
    while task := _next(tasks):
        disarm = arm(task.point, Path(folder) / "ended" / task.name) if task.point else None
        try:
            (_run if task.workflow else _compensate)(instance, defs, task)
        except OperationalError:
            # Of Dagster's own SQLite: whoever was stopped in a commit holds its lock, and the runs of others die of that.
            traceback.print_exc()
            os._exit(LOCKED_OUT)
        if disarm:
            disarm()
        tasks.send(task.name)


def _next(tasks: Connection) -> Task | None:
    try:
        told: Task = tasks.recv()
    except EOFError:
        return None
    return told


def _run(instance: dg.DagsterInstance, defs: dg.Definitions, task: Task) -> None:
    job = defs.resolve_job_def("chaos_job")
    job.execute_in_process(_QUIET, instance=instance, run_id=task.run_id, partition_key=task.workflow, raise_on_error=False)


def _compensate(instance: dg.DagsterInstance, defs: dg.Definitions, task: Task) -> None:
    run = instance.get_run_by_id(task.run_id)
    assert run is not None
    # As the launcher does: so the process can be looked for before the run says anything itself.
    told = EngineEventData({"pid": dg.MetadataValue.text(str(os.getpid()))})
    instance.report_engine_event(f"Started process for run (pid: {os.getpid()}).", run, told)
    execute_run(InMemoryJob(defs.resolve_job_def(COMPENSATION)), run, instance)


def tick(project: str, folder: str, alive: Connection, seconds: float, point: Point | None) -> None:
    """Ticks the compensation's sensor, over and over. Runs are made of what it asks for, each once, as the daemon makes them.

    It ends when the other end of `alive` is gone.
    """
    instance, defs = _begin(project, folder, f"ticks-{os.getpid()}")
    repository = defs.get_repository_def()
    sensor, job = repository.get_sensor_def("chaos_compensation"), defs.resolve_job_def(COMPENSATION)
    if point is not None:
        arm(point, Path(folder) / "ended" / f"tick-{os.getpid()}")
    while not alive.poll(seconds):
        resources = {"state_store": (defs.resources or {})["state_store"]}
        with dg.build_sensor_context(instance=instance, resources=resources, repository_def=repository) as context:
            try:
                for asked in sensor.evaluate_tick(context).run_requests or []:
                    _create(instance, job, asked)
            except Exception:  # a tick that fails is followed by the next
                traceback.print_exc()


def _create(instance: dg.DagsterInstance, job: dg.JobDefinition, asked: dg.RunRequest) -> None:
    key = {RUN_KEY: str(asked.run_key)}
    if not instance.get_runs(dg.RunsFilter(job_name=COMPENSATION, tags=key)):
        run_config = {**_QUIET, **asked.run_config}
        plan = create_execution_plan(job, run_config)
        instance.create_run_for_job(job_def=job, run_config=run_config, execution_plan=plan, tags={**asked.tags, **key})


def _begin(project: str, folder: str, name: str) -> tuple[dg.DagsterInstance, dg.Definitions]:
    log = (Path(folder) / "logs" / f"{name}.log").open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    logging.disable(logging.NOTSET)
    sys.stdout.flush()
    made = importlib.import_module(project).definitions(Path(folder))
    return dg.DagsterInstance.from_config(str(Path(folder) / "home")), made
