"""Three plain assets in a row, importable by name: what a run in other processes and a re-execution need."""

import os
from pathlib import Path

import dagster as dg


@dg.asset(op_tags={"colour": "red"})
def first() -> None: ...


@dg.asset(deps=[first])
def second() -> None:
    assert Path(os.environ["THREE_ASSETS_MENDED"]).exists()


@dg.asset(deps=[second])
def third() -> None: ...


def three() -> dg.JobDefinition:
    """All three, in this process."""
    job = dg.define_asset_job("three", executor_def=dg.in_process_executor)
    return dg.Definitions(assets=[first, second, third], jobs=[job]).resolve_job_def("three")
