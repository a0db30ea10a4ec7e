"""The processes of the chaos: one for each run, compensation and tick of the sensor, forked from a server that has all imported."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import uuid
from pathlib import Path

import dagster as dg
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.execution.api import create_execution_plan, execute_run

from tools.chaos.kills import arm
from tools.chaos.script import Point

COMPENSATION, RUN_KEY = "chaos_compensate", "dagster/run_key"
_QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


def run_workflow(project: str, folder: str, workflow: str, run_id: str, point: Point | None) -> None:
    """One run of the pipeline for one workflow."""
    instance, defs = _begin(project, folder, f"run-{run_id}")
    if point is not None:
        arm(point, Path(folder) / "ended" / run_id)
    defs.resolve_job_def("chaos_job").execute_in_process(
        _QUIET, instance=instance, run_id=run_id, partition_key=workflow, raise_on_error=False
    )


def compensate(project: str, folder: str, run_id: str, point: Point | None) -> None:
    """A run that the sensor asked for."""
    instance, defs = _begin(project, folder, f"compensation-{run_id}")
    if point is not None:
        arm(point, Path(folder) / "ended" / run_id)
    run = instance.get_run_by_id(run_id)
    assert run is not None
    execute_run(InMemoryJob(defs.resolve_job_def(COMPENSATION)), run, instance)


def tick(project: str, folder: str, point: Point | None) -> None:
    """One tick of the compensation's sensor. Runs are made of what it asks for, each once, as the daemon makes them."""
    instance, defs = _begin(project, folder, f"tick-{os.getpid()}")
    repository = defs.get_repository_def()
    if point is not None:
        arm(point, Path(folder) / "ended" / f"tick-{uuid.uuid4()}")
    resources = {"state_store": (defs.resources or {})["state_store"]}
    with dg.build_sensor_context(instance=instance, resources=resources, repository_def=repository) as context:
        told = repository.get_sensor_def("chaos_compensation").evaluate_tick(context)
    (Path(folder) / "tick.txt").write_text(told.skip_message or f"{len(told.run_requests or [])} asked for")
    job = defs.resolve_job_def(COMPENSATION)
    for asked in told.run_requests or []:
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
