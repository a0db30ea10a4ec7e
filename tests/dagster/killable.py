"""Two assets side by side and one below them, that work until they are let go; in one process or in several."""

import os
from pathlib import Path

import dagster as dg

from tests.dagster.deployment import asked_for, until

FOLDER = "KILLABLE_FOLDER"


def told(name: str, what: object) -> None:
    """What happened, for the test to read."""
    (Path(os.environ[FOLDER]) / name).write_text(str(what))


@dg.failure_hook(name="tell")
def tell(context: dg.HookContext) -> None:
    told(f"{context.run_id}.{context.step_key}.hook", type(context.op_exception).__name__)


def working(name: str, *deps: str) -> dg.AssetsDefinition:
    @dg.multi_asset(name=name, specs=[dg.AssetSpec(name, deps=list(deps))], hooks={tell})
    def work(context: dg.AssetExecutionContext):
        told(f"{context.run_id}.{name}.pid", os.getpid())
        until((Path(os.environ[FOLDER]) / "go").exists, "being let go", 240)
        yield dg.MaterializeResult(asset_key=name)

    return work


in_one = dg.define_asset_job("in_one", "*", executor_def=dg.in_process_executor)
in_several = dg.define_asset_job("in_several", "*", executor_def=dg.multiprocess_executor)


@dg.sensor(jobs=[in_one, in_several], minimum_interval_seconds=1, default_status=dg.DefaultSensorStatus.RUNNING)
def launcher(context: dg.SensorEvaluationContext):
    with (Path(os.environ[FOLDER]) / "ticks").open("a") as ticks:
        ticks.write("tick\n")
    yield from asked_for(context)


defs = dg.Definitions(
    assets=[working("left"), working("right"), working("below", "left", "right")], jobs=[in_one, in_several], sensors=[launcher]
)
