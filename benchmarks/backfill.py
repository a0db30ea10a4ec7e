"""What a backfill costs, the ways there are: one run over all days, a run per day in one process, and no Dagster at all.

    python benchmarks/backfill.py [--days 90] [--instance ephemeral|sqlite]

Wall and CPU seconds (of the process; SQLite writes included) and, by `mao.run`, the part that is not Dagster's. The four agents do next to
nothing, so that what is measured is ours and Dagster's. A run that the daemon launches has a process of its own besides: add what an
import costs, which the last line measures.
"""

from __future__ import annotations

import argparse
import datetime as dt
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import dagster as dg
import polars as pl
from pydantic import BaseModel, Field

import dagster_mao as mao

RECORDS = 1_000
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


class Application(BaseModel):
    id: Annotated[str, mao.Key]
    amount: float = Field(gt=0)


class Verdict(BaseModel):
    id: Annotated[str, mao.Key]
    value: float


@mao.agent
def applications(ctx: mao.AgentContext) -> mao.DataFrame[Application]:
    return pl.select(
        id=pl.format("{}-{}", pl.lit(ctx.partition_key), pl.int_range(RECORDS)), amount=pl.int_range(1, RECORDS + 1).cast(pl.Float64)
    )


@mao.agent
def score(applications: mao.LazyFrame[Application]) -> mao.LazyFrame[Verdict]:
    return applications.select("id", value="amount")


@mao.agent
def income(applications: mao.LazyFrame[Application]) -> mao.LazyFrame[Verdict]:
    return applications.select("id", value="amount")


@mao.agent
def approval(score: mao.LazyFrame[Verdict], income: mao.LazyFrame[Verdict]) -> mao.LazyFrame[Verdict]:
    return score.join(income, on="id").select("id", value=pl.col("value") + pl.col("value_right"))


def pipeline(days: int) -> tuple[mao.Pipeline, list[str]]:
    start = dt.date(2026, 1, 1)
    partitions = dg.DailyPartitionsDefinition(start.isoformat(), end_date=(start + dt.timedelta(days=days)).isoformat())
    made = mao.Pipeline("loans", entry=applications, agents=[score, income, approval], partitions_def=partitions)
    return made, list(partitions.get_partition_keys())


@contextmanager
def instance(kind: str) -> Iterator[dg.DagsterInstance]:
    if kind == "ephemeral":
        with dg.DagsterInstance.ephemeral() as made:
            yield made
        return
    with tempfile.TemporaryDirectory() as home, dg.DagsterInstance.local_temp(home) as made:
        yield made


def job(days: int, root: Path, policy: dg.BackfillPolicy | None) -> Any:
    made, _ = pipeline(days)
    resources = {"state_store": mao.StateStoreResource(root=str(root))}
    defs = made.build_definitions(resources=resources, backfill_policy=policy)
    return dg.Definitions.merge(defs, dg.Definitions(executor=dg.in_process_executor)).resolve_job_def("loans_job")


def single_run(days: int, root: Path, kind: str) -> None:
    keys = pipeline(days)[1]
    tags = {"dagster/asset_partition_range_start": keys[0], "dagster/asset_partition_range_end": keys[-1]}
    with instance(kind) as made:
        assert job(days, root, dg.BackfillPolicy.single_run()).execute_in_process(QUIET, instance=made, tags=tags).success


def run_per_day(days: int, root: Path, kind: str) -> None:
    with instance(kind) as made:
        whole = job(days, root, None)
        for key in pipeline(days)[1]:
            assert whole.execute_in_process(QUIET, instance=made, partition_key=key).success


def without_dagster(days: int, root: Path, kind: str) -> None:
    made, keys = pipeline(days)
    store = mao.StateStore(root)
    for key in keys:
        mao.run(made, store=store, workflow=key)


def measured(what: Callable[[int, Path, str], None], days: int, kind: str) -> tuple[float, float]:
    """Wall and CPU seconds."""
    with tempfile.TemporaryDirectory() as root:
        wall, cpu = time.perf_counter(), time.process_time()
        what(days, Path(root), kind)
        return time.perf_counter() - wall, time.process_time() - cpu


def import_seconds() -> float:
    """CPU seconds that a process takes to import what a run imports."""
    code = "import time, dagster, dagster_mao.dagster; print(time.process_time())"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=int, default=90)
    parser.add_argument("--instance", choices=["ephemeral", "sqlite"], default="sqlite")
    given = parser.parse_args()
    measured(without_dagster, 2, given.instance)  # what is done once in a process
    for what in (single_run, run_per_day, without_dagster):
        wall, cpu = measured(what, given.days, given.instance)
        print(f"{what.__name__:<16} {given.days} days: {wall:6.1f} s, {cpu:6.1f} CPU s, {cpu / given.days:.2f} CPU s a day", flush=True)
    print(f"importing        {import_seconds():.1f} CPU s in each process of a run")


if __name__ == "__main__":
    main()
