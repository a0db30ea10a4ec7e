"""When something was materialised last, as Dagster's daemon judges it: by the policy that a translator gives an agent's asset."""

import asyncio
import datetime as dt
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.freshness import FreshnessState
from dagster._core.loader import LoadingContextForTest
from dagster._core.test_utils import freeze_time
from dagster._daemon.freshness import FreshnessDaemon

import dagster_mao as mao
from tests.dagster import loans

DAYS = dg.DailyPartitionsDefinition(start_date="2026-01-05", end_date="2026-01-09")
APPROVAL = dg.AssetKey(["loans", "approval"])
BY_TWO = dg.FreshnessPolicy.cron(deadline_cron="0 2 * * *", lower_bound_delta=dt.timedelta(hours=2))


class Punctual(mao.AgentTranslator):
    def get_asset_spec(self, agent: mao.Agent, pipeline: mao.Pipeline) -> dg.AssetSpec:
        spec = super().get_asset_spec(agent, pipeline)
        return spec.replace_attributes(freshness_policy=BY_TWO) if agent.name == "approval" else spec


def at(day: int, hour: int, minute: int = 0) -> dt.datetime:
    return dt.datetime(2026, 1, day, hour, minute, tzinfo=dt.timezone.utc)


def judged(defs: dg.Definitions, instance: dg.DagsterInstance, now: dt.datetime, agent: str = "approval") -> FreshnessState:
    """By the daemon's own evaluation."""
    node: Any = defs.resolve_asset_graph().get(dg.AssetKey(["loans", agent]))
    with freeze_time(now):
        daemon: Any = FreshnessDaemon()
        return asyncio.run(daemon._compute_asset_freshness_state(LoadingContextForTest(instance), node))


def test_decisions_are_fresh_until_the_next_deadline(tmp_path: Path) -> None:
    loans.write(tmp_path, days={"2026-01-05": [700.0]})
    defs = loans.definitions(tmp_path, partitions_def=DAYS, translator=Punctual())
    job = defs.resolve_job_def("loans_job")
    with dg.DagsterInstance.ephemeral() as instance:
        assert judged(defs, instance, at(6, 3)) == FreshnessState.UNKNOWN, "nothing was decided yet"
        with freeze_time(at(6, 0, 5)):  # as the schedule does it, of the day that ended
            assert job.execute_in_process(instance=instance, partition_key="2026-01-05").success
        told = [judged(defs, instance, now) for now in (at(6, 1), at(6, 3), at(7, 1, 59), at(7, 2))]
        assert told == [FreshnessState.PASS] * 3 + [FreshnessState.FAIL]
        assert judged(defs, instance, at(7, 2), "credit_score") == FreshnessState.NOT_APPLICABLE
        # Late data: decided again, and no sooner fresh than that.
        with freeze_time(at(7, 9)):
            assert job.execute_in_process(instance=instance, partition_key="2026-01-05").success
        assert judged(defs, instance, at(7, 9, 1)) == FreshnessState.PASS


def test_a_backfill_of_old_days_counts_as_fresh() -> None:
    """Whoever must know whether the last day is there looks at its partition."""
    spec = dg.AssetSpec(APPROVAL, partitions_def=DAYS, freshness_policy=BY_TWO)
    defs = dg.Definitions(assets=[spec])
    with dg.DagsterInstance.ephemeral() as instance:
        for now, day in ((at(8, 0, 5), "2026-01-07"), (at(9, 3), "2026-01-05")):
            with freeze_time(now):
                instance.report_runless_asset_event(dg.AssetMaterialization(APPROVAL, partition=day))
        assert judged(defs, instance, at(9, 4)) == FreshnessState.PASS
        assert "2026-01-08" not in instance.get_materialized_partitions(APPROVAL)


def test_checks_of_freshness_are_superseded() -> None:
    with pytest.warns(dg.SupersessionWarning, match="FreshnessPolicy"):
        dg.build_last_update_freshness_checks(assets=[APPROVAL], lower_bound_delta=dt.timedelta(days=1))
    with pytest.warns(dg.SupersessionWarning, match="FreshnessPolicy"):
        dg.build_time_partition_freshness_checks(assets=[APPROVAL], deadline_cron="0 2 * * *")
