"""Dagster's own backfill, by a real daemon: a run per day, and all days as a single run of which some fail."""

from __future__ import annotations

import time
import uuid
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.execution.backfill import BULK_ACTION_TERMINAL_STATUSES, BulkActionStatus, PartitionBackfill

from dagster_mao.state import StateStore
from tests.dagster import loans
from tests.dagster.backfilled import DAYS, FOLDER, SINGLE, partitions
from tests.dagster.deployment import Deployment, deployed, until

PATIENCE = 3600.0  # seconds in which a busy machine has run 90 runs, each a process of its own
QUEUE = "run_coordinator: {module: dagster, class: QueuedRunCoordinator, config: {max_concurrent_runs: 2}}\n"
AGENTS = loans.pipeline().order


def backfill(deployment: Deployment, folder: Path, count: int, days: list[str], assets: list[str]) -> PartitionBackfill:
    """As the UI asks for it. Returns once it has ended."""
    all_days = partitions(count)
    report = dg.AssetSpec(["loans", "report"], partitions_def=all_days, deps=[dg.AssetKey(["loans", "approval"])])
    graph = dg.Definitions.merge(loans.definitions(folder, partitions_def=all_days), dg.Definitions(assets=[report]))
    asked = PartitionBackfill.from_asset_partitions(
        backfill_id=uuid.uuid4().hex[:8],
        asset_graph=graph.resolve_asset_graph(),
        partition_names=days,
        asset_selection=[dg.AssetKey(["loans", asset]) for asset in assets],
        backfill_timestamp=time.time(),
        tags={},
        dynamic_partitions_store=deployment.instance,
        all_partitions=False,
        title=None,
        description=None,
        run_config=None,
    )
    deployment.instance.add_backfill(asked)

    def ended() -> list[PartitionBackfill]:
        found = deployment.instance.get_backfill(asked.backfill_id)
        return [found] if found and found.status in BULK_ACTION_TERMINAL_STATUSES else []

    return until(ended, "the end of the backfill", PATIENCE)[0]


def runs_of(deployment: Deployment, asked: PartitionBackfill, agent: str) -> list[dg.DagsterRun]:
    runs = deployment.instance.get_runs(dg.RunsFilter(tags={"dagster/backfill": asked.backfill_id}))
    return [run for run in runs if dg.AssetKey(["loans", agent]) in (run.asset_selection or ())]


@pytest.mark.long
@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize("count", [90])
def test_a_run_per_day_is_a_workflow_per_day(tmp_path: Path, count: int) -> None:
    days = partitions(count).get_partition_keys()
    loans.write(tmp_path, days={day: [700.0, 650.0] for day in days})
    environment = {FOLDER: str(tmp_path), DAYS: str(count)}
    with deployed(tmp_path / "home", "tests.dagster.backfilled", environment, QUEUE) as deployment:
        asked = backfill(deployment, tmp_path, count, days, [*AGENTS])
        assert asked.status == BulkActionStatus.COMPLETED_SUCCESS
        assert len(runs_of(deployment, asked, "approval")) == count
    store = StateStore(tmp_path / "state")
    assert [len({seal.attempt for seal in store.seals(f"loans/{day}")}) for day in days] == [1] * count
    assert all(set(store.effective(f"loans/{day}")) == set(AGENTS) for day in days)


@pytest.mark.long
@pytest.mark.timeout(PATIENCE)
@pytest.mark.parametrize("count", [90])
def test_a_single_run_decides_all_days_but_those_that_fail_and_another_backfill_these(tmp_path: Path, count: int) -> None:
    days = partitions(count).get_partition_keys()
    bad = [days[1], days[-1]]
    loans.write(tmp_path, days={day: [-1.0] if day in bad else [700.0] for day in days})
    environment = {FOLDER: str(tmp_path), DAYS: str(count), SINGLE: "1"}
    store = StateStore(tmp_path / "state")
    with deployed(tmp_path / "home", "tests.dagster.backfilled", environment, QUEUE) as deployment:
        asked = backfill(deployment, tmp_path, count, days, [*AGENTS])
        assert asked.status == BulkActionStatus.COMPLETED_FAILED
        (run,) = runs_of(deployment, asked, "approval")
        told = [entry.dagster_event for entry in deployment.instance.all_logs(run.run_id) if entry.dagster_event]
        (failed,) = [event.step_failure_data for event in told if event.is_step_failure]
        assert failed.user_failure_data.metadata["failed_partitions"].value == bad
        good = set(days) - set(bad)
        assert deployment.instance.get_materialized_partitions(dg.AssetKey(["loans", "approval"])) == good
        loans.write(tmp_path, days={day: [700.0] for day in bad})
        again = backfill(deployment, tmp_path, count, bad, [*AGENTS, "report"])
        assert again.status == BulkActionStatus.COMPLETED_SUCCESS
        assert len(runs_of(deployment, again, "approval")) == 2, "days that do not follow each other"
        assert deployment.instance.get_materialized_partitions(dg.AssetKey(["loans", "report"])) == set(bad)
    assert {day for day in days if store.effective(f"loans/{day}")} == set(days)
