"""What Dagster does with a run over a range of partitions, pinned: why one step does all of it, and tells it by events."""

from collections import Counter
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.automation_tick_evaluation_context import build_run_requests_with_backfill_policies
from dagster._core.definitions.events import AssetKeyPartitionKey

pytestmark = pytest.mark.filterwarnings("ignore::dagster.PreviewWarning")
DAYS = dg.StaticPartitionsDefinition(["monday", "tuesday", "wednesday"])
KEYS = DAYS.get_partition_keys()
SINGLE = dg.BackfillPolicy.single_run()
RANGE = {"dagster/asset_partition_range_start": "monday", "dagster/asset_partition_range_end": "wednesday"}


def run(assets: list[Any], instance: dg.DagsterInstance, **options: Any) -> dg.ExecuteInProcessResult:
    job = dg.Definitions(assets).resolve_implicit_global_asset_job_def()
    return job.execute_in_process(instance=instance, tags=RANGE, raise_on_error=False, **options)


def outcomes(result: Any) -> dict[str, str]:
    ended = {"STEP_SUCCESS": "success", "STEP_FAILURE": "failure", "STEP_SKIPPED": "skipped"}
    return {event.step_key: ended[event.event_type_value] for event in result.all_events if event.event_type_value in ended}


def test_what_a_step_returns_is_told_of_all_partitions_alike_and_its_checks_of_none() -> None:
    """Metadata may be given by partition; a data version may not, and a partition that failed cannot be left out."""
    checks = [dg.AssetCheckSpec("sound", asset="a", partitions_def=DAYS)]

    @dg.multi_asset(specs=[dg.AssetSpec("a", partitions_def=DAYS)], check_specs=checks, backfill_policy=SINGLE)
    def a(context: dg.AssetExecutionContext):
        assert context.partition_keys == KEYS
        assert not context.has_partition_key
        context.add_asset_metadata({"rows": 3}, partition_key="monday")
        yield dg.AssetCheckResult(asset_key="a", check_name="sound", passed=True)
        yield dg.MaterializeResult(asset_key="a", data_version=dg.DataVersion("of all"))

    with dg.DagsterInstance.ephemeral() as instance:
        result = run([a], instance)
    told = {one.partition: one for one in result.asset_materializations_for_node("a")}
    assert sorted(told) == sorted(KEYS)
    assert {one.tags["dagster/data_version"] for one in told.values()} == {"of all"}
    assert [set(told[day].metadata) for day in KEYS] == [{"rows"}, set(), set()]
    assert [check.partition for check in result.get_asset_check_evaluations()] == [None]


@pytest.mark.parametrize(("yields", "below"), [("nothing", "skipped"), ("a failure", None)])
def test_below_a_step_without_outputs_steps_are_skipped_and_the_run_succeeds(yields: str, below: str | None) -> None:
    """What it told by events of each partition stands; below a failure nothing starts, though other partitions went well."""

    @dg.multi_asset(specs=[dg.AssetSpec("a", partitions_def=DAYS)], can_subset=True, backfill_policy=SINGLE)
    def a(context: dg.AssetExecutionContext):
        for key in KEYS[:2]:
            yield dg.AssetMaterialization("a", partition=key, tags={"dagster/data_version": key})
            yield dg.AssetMaterialization("b", partition=key, tags={"dagster/data_version": key})
        if yields == "a failure":
            raise dg.Failure("wednesday", allow_retries=False)

    @dg.multi_asset(specs=[dg.AssetSpec("b", partitions_def=DAYS, deps=["a"])], backfill_policy=SINGLE)
    def b():
        raise AssertionError

    with dg.DagsterInstance.ephemeral() as instance:
        result = run([a, b], instance)
        assert {key: instance.get_materialized_partitions(dg.AssetKey(key)) for key in "ab"} == {"a": set(KEYS[:2]), "b": set(KEYS[:2])}
    assert outcomes(result).get("b") == below
    assert result.success is (yields == "nothing")
    told = Counter((one.asset_key.path[-1], one.partition) for one in result.asset_materializations_for_node("a"))
    assert told == Counter((key, day) for key in "ab" for day in KEYS[:2])


def test_a_range_is_loaded_as_a_dict_by_partition_key(tmp_path: Path) -> None:
    """By Dagster's own IO managers: so is an existing asset that is the entry."""
    seen = []

    @dg.asset(partitions_def=DAYS)
    def raw(context: dg.AssetExecutionContext) -> str:
        return context.partition_key

    @dg.asset(partitions_def=DAYS, backfill_policy=SINGLE)
    def reads(raw: Any) -> None:
        seen.append(raw)

    files = {"io_manager": dg.FilesystemIOManager(base_dir=str(tmp_path))}
    with dg.DagsterInstance.ephemeral() as instance:
        for day in KEYS:
            dg.materialize([raw], partition_key=day, instance=instance, resources=files)
        job = dg.Definitions([raw, reads], resources=files).resolve_implicit_global_asset_job_def()
        assert job.execute_in_process(instance=instance, tags=RANGE, asset_selection=[reads.key]).success
    assert seen == [{day: day for day in KEYS}]


def test_a_backfill_makes_one_run_of_all_assets_with_the_policy_and_runs_of_the_others() -> None:
    """Days that do not follow each other are ranges of their own."""

    @dg.asset(partitions_def=DAYS, backfill_policy=SINGLE)
    def a(): ...

    @dg.asset(partitions_def=DAYS, backfill_policy=SINGLE, deps=[a])
    def b(): ...

    @dg.asset(partitions_def=DAYS, deps=[b])
    def report(): ...

    graph = dg.Definitions([a, b, report]).resolve_asset_graph()
    with dg.DagsterInstance.ephemeral() as instance:

        def asked(days: list[str]) -> set[tuple[Any, ...]]:
            wanted = [AssetKeyPartitionKey(one.key, day) for one in (a, b, report) for day in days]
            runs = build_run_requests_with_backfill_policies(wanted, graph, instance)
            ranges = [(run.tags.get(start), run.tags.get(end)) for run in runs for start, end in [tuple(RANGE)]]
            names = [frozenset(key.path[-1] for key in run.asset_selection or ()) for run in runs]
            return {(name, run.partition_key or told) for name, told, run in zip(names, ranges, runs, strict=True)}

        both, alone = frozenset("ab"), frozenset(["report"])
        assert asked(KEYS) == {(both, ("monday", "wednesday")), *((alone, day) for day in KEYS)}
        assert asked(["monday", "wednesday"]) == {
            *((both, (day, day)) for day in ("monday", "wednesday")),
            *((alone, day) for day in ("monday", "wednesday")),
        }
