"""The code location of the chaos for a real daemon: each process that executes something ends where the workflow's script says so."""

import os
from pathlib import Path

import dagster as dg
from dagster._core.storage.tags import PARTITION_NAME_TAG

from tools.chaos.deployment import asked_for
from tools.chaos.kills import arm
from tools.chaos.processes import COMPENSATION
from tools.chaos.project import FOLDER, Scripts, definitions

_PRELOADED = ["tools.chaos.project", "tools.chaos.preloaded"]
_IN_PROCESSES = dg.multiprocess_executor.configured({"max_concurrent": 2, "start_method": {"forkserver": {"preload_modules": _PRELOADED}}})


class ArmedScripts(Scripts):
    """The scripts of the workflows. Whatever process takes them into its hands may end by that."""

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Sees to it that this process ends where the script of its workflow says so; once for each point, whoever comes to it first."""
        run, folder = context.run, Path(self.folder)
        if run is None:
            return
        is_compensation = run.job_name == COMPENSATION
        workflow = run.tags.get("mao/workflow", "").partition("/")[2] if is_compensation else run.tags.get(PARTITION_NAME_TAG, "")
        told = [(name, point) for name, point in self.of(workflow).points() if (".compensation" in name) is is_compensation]
        name, point = next((one for one in told if not (folder / "ended" / one[0]).exists()), ("", None))
        if point is not None:
            arm(point, folder / "ended" / name)
        (folder / "processes" / f"{workflow}.{os.getpid()}").touch()


def _defined() -> dg.Definitions:
    folder = Path(os.environ[FOLDER])
    made = definitions(folder, ArmedScripts(folder=str(folder)))
    agents = dg.AssetSelection.groups("chaos")
    jobs = [
        dg.define_asset_job("chaos_job", agents, executor_def=dg.in_process_executor),
        dg.define_asset_job("chaos_in_processes", agents, executor_def=_IN_PROCESSES),
    ]
    launcher = dg.SensorDefinition(
        name="launcher", evaluation_fn=asked_for, jobs=jobs, minimum_interval_seconds=1, default_status=dg.DefaultSensorStatus.RUNNING
    )
    own = [job for job in made.jobs or [] if job.name == COMPENSATION]
    return dg.Definitions(
        assets=made.assets,
        asset_checks=made.asset_checks,
        jobs=[*jobs, *own],
        sensors=[*(made.sensors or []), launcher],
        resources=made.resources,
    )


defs = _defined()
