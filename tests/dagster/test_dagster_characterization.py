"""What the design stands on in Dagster, pinned: when one of these fails after an upgrade, read the note beside it before touching it."""

from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.automation_tick_evaluation_context import build_run_requests_with_backfill_policies
from dagster._core.definitions.events import AssetKeyPartitionKey

from tests.dagster.three_assets import three

pytestmark = pytest.mark.filterwarnings("ignore::dagster.PreviewWarning")
DAYS = dg.StaticPartitionsDefinition(["monday", "tuesday"])


class Recorder(dg.IOManager):
    """An IO manager that tells what it was asked to do."""

    def __init__(self) -> None:
        self.handled: list[str] = []
        self.loaded: list[tuple[str, ...]] = []

    def handle_output(self, context: dg.OutputContext, obj: Any) -> None:
        self.handled.append(context.asset_key.path[-1])

    def load_input(self, context: dg.InputContext) -> Any:
        self.loaded.append(tuple(context.asset_key.path))
        return "loaded"


def checks_of(result: dg.ExecuteInProcessResult) -> dict[str, dg.AssetCheckEvaluation]:
    return {e.check_name: e for e in result.get_asset_check_evaluations()}


def test_a_failing_check_and_a_failure_leave_the_reasons_and_no_materialisation():
    """The boundary rejects before anything is visible: the failed evaluation keeps its metadata, the asset stays unmaterialised."""

    @dg.multi_asset(
        specs=[dg.AssetSpec("a")], check_specs=[dg.AssetCheckSpec("one", asset="a", blocking=True), dg.AssetCheckSpec("two", asset="a")]
    )
    def a():
        yield dg.AssetCheckResult(check_name="one", asset_key="a", passed=False, metadata={"rows": 3})
        raise dg.Failure("refused", metadata={"rows": 3}, allow_retries=False)

    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([a], instance=instance, raise_on_error=False)
        assert not result.success
        assert not result.get_asset_materialization_events()
        assert instance.get_latest_materialization_event(dg.AssetKey("a")) is None
        evaluation = checks_of(result)["one"]
        assert (evaluation.passed, evaluation.metadata["rows"].value) == (False, 3)
        assert "two" not in checks_of(result), "a check that was not reached is not evaluated"
        failure = result.failure_data_for_node("a").user_failure_data
        assert failure.description == "refused"


def test_checks_of_a_partitioned_asset_record_their_partition_only_when_declared_with_it():
    """A check without partitions_def of a partitioned asset is one check for all partitions: the last one overwrites the rest."""
    specs = [dg.AssetCheckSpec("plain", asset="a"), dg.AssetCheckSpec("daily", asset="a", partitions_def=DAYS)]

    @dg.multi_asset(specs=[dg.AssetSpec("a", partitions_def=DAYS)], check_specs=specs)
    def a():
        for name in ("plain", "daily"):
            yield dg.AssetCheckResult(check_name=name, asset_key="a", passed=True)
        yield dg.MaterializeResult(asset_key="a")

    evaluations = checks_of(dg.materialize([a], partition_key="monday"))
    assert evaluations["plain"].partition is None
    assert evaluations["daily"].partition == "monday"


def test_one_op_checks_several_partitioned_assets_and_can_be_run_alone():
    """multi_asset_check takes its partitions from its specs; one step checks all agents, and one agent's check runs by itself."""

    @dg.multi_asset(specs=[dg.AssetSpec("a", partitions_def=DAYS), dg.AssetSpec("b", partitions_def=DAYS)])
    def ab():
        yield dg.MaterializeResult(asset_key="a")
        yield dg.MaterializeResult(asset_key="b")

    seen = []

    @dg.multi_asset_check(specs=[dg.AssetCheckSpec("chain", asset=k, partitions_def=DAYS) for k in "ab"], can_subset=True, name="chain_op")
    def chain(context: dg.AssetCheckExecutionContext):
        for key in sorted(context.selected_asset_check_keys):
            seen.append((key.asset_key.to_user_string(), context.partition_key))
            yield dg.AssetCheckResult(check_name=key.name, asset_key=key.asset_key, passed=True)

    defs = dg.Definitions(assets=[ab], asset_checks=[chain])
    with dg.DagsterInstance.ephemeral() as instance:
        job = defs.resolve_implicit_global_asset_job_def()
        assert job.execute_in_process(instance=instance, partition_key="tuesday").success
        assert seen == [("a", "tuesday"), ("b", "tuesday")]
        seen.clear()
        alone = job.get_subset(asset_selection=set(), asset_check_selection={dg.AssetCheckKey(dg.AssetKey("a"), "chain")})
        result = alone.execute_in_process(instance=instance, partition_key="monday")
        assert seen == [("a", "monday")]
        assert result.get_asset_check_evaluations()[0].partition == "monday"


def planned_assets(instance: dg.DagsterInstance, run: dg.DagsterRun) -> set[str]:
    snapshot = instance.get_execution_plan_snapshot(run.execution_plan_snapshot_id)
    outputs = [out for step in snapshot.steps if step.key in snapshot.step_keys_to_execute for out in step.outputs]
    return {out.properties.asset_key.to_user_string() for out in outputs if out.properties.asset_key}


def test_the_plan_of_the_root_run_and_the_ancestry_of_a_re_execution(tmp_path, monkeypatch):
    """The attempt is the root run; its plan is read from the root's plan snapshot, because a re-execution's own names only the steps left.

    Re-executing everything keeps the root too: it is the same attempt.
    """
    monkeypatch.setenv("THREE_ASSETS_MENDED", str(tmp_path / "mended"))
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:

        def execute(options=None):
            run = dg.execute_job(dg.reconstructable(three), instance=instance, reexecution_options=options)
            return instance.get_run_by_id(run.run_id)

        root = execute()
        (tmp_path / "mended").touch()
        rest = execute(dg.ReexecutionOptions.from_failure(root.run_id, instance))
        all_again = execute(dg.ReexecutionOptions(parent_run_id=rest.run_id))
        assert [(run.root_run_id, run.parent_run_id) for run in (root, rest, all_again)] == [
            (None, None),
            (root.run_id, root.run_id),
            (root.run_id, rest.run_id),
        ]
        assert planned_assets(instance, root) == {"first", "second", "third"}
        assert planned_assets(instance, rest) == {"second", "third"}
        snapshot = instance.get_execution_plan_snapshot(root.execution_plan_snapshot_id)
        assert {step.tags["colour"] for step in snapshot.steps if step.key == "first"} == {"red"}, "op tags are in the plan"


def test_a_plain_downstream_asset_loads_through_the_io_manager_of_the_asset_that_returned_no_value():
    """MaterializeResult without a value never calls handle_output, yet the asset's IO manager loads for plain ones: ours only reads."""
    spec = dg.AssetSpec(["p", "a"]).with_io_manager_key("mao")

    @dg.multi_asset(specs=[spec], name="p__a", required_resource_keys={"x"}, pool="pool")
    def a(context: dg.AssetExecutionContext):
        yield dg.MaterializeResult(asset_key=["p", "a"])

    @dg.asset(ins={"a": dg.AssetIn(["p", "a"])})
    def plain(a):
        assert a == "loaded"

    io = Recorder()
    result = dg.materialize([a, plain], resources={"mao": io, "x": 1})
    assert result.success
    assert (io.handled, io.loaded) == ([], [("p", "a")])
    with dg.DagsterInstance.ephemeral() as instance:
        io = Recorder()
        assert dg.materialize([a, plain], resources={"mao": io, "x": 1}, instance=instance, selection=[plain]).success
        assert io.loaded == [("p", "a")]


def test_an_asset_of_specs_may_take_inputs():
    """The entry that wraps an existing asset loads it by Dagster's own input mechanism and still declares spec and checks."""

    @dg.asset
    def raw() -> list:
        return [1, 2]

    @dg.multi_asset(
        specs=[dg.AssetSpec(["p", "e"], deps=[dg.AssetKey("raw")])],
        ins={"records": dg.AssetIn("raw")},
        check_specs=[dg.AssetCheckSpec("one", asset=["p", "e"])],
    )
    def entry(context: dg.AssetExecutionContext, records: Any):
        assert records == [1, 2]
        yield dg.AssetCheckResult(check_name="one", passed=True, asset_key=["p", "e"])
        yield dg.MaterializeResult(asset_key=["p", "e"])

    assert dg.materialize([raw, entry], resources={"io_manager": dg.mem_io_manager}).success


def test_data_versions_and_code_versions_make_the_audit_chain():
    """A materialisation with a data version tells its downstreams', by tags, without our doing."""

    @dg.multi_asset(specs=[dg.AssetSpec("a", code_version="1")])
    def a():
        yield dg.MaterializeResult(asset_key="a", data_version=dg.DataVersion("digest-of-a"))

    @dg.multi_asset(specs=[dg.AssetSpec("b", deps=["a"], code_version="2")])
    def b():
        yield dg.MaterializeResult(asset_key="b", data_version=dg.DataVersion("digest-of-b"))

    result = dg.materialize([a, b])
    tags = result.asset_materializations_for_node("b")[0].tags
    assert tags["dagster/data_version"] == "digest-of-b"
    assert tags["dagster/code_version"] == "2"
    assert tags["dagster/input_data_version/a"] == "digest-of-a"


def test_partitioning_an_asset_check_is_still_a_preview():
    """We silence this warning when we make the specs; when it goes, so should the silence."""
    with pytest.warns(dg.PreviewWarning, match="partitions_def"):
        dg.AssetCheckSpec("one", asset="a", partitions_def=DAYS)


def test_an_input_knows_its_run_and_what_an_io_manager_adds_to_it_is_kept():
    """Our IO manager joins the attempt of the run it loads for, and tells which state version it read."""
    seen = []

    class Telling(Recorder):
        def load_input(self, context: dg.InputContext) -> Any:
            seen.append(context.step_context.dagster_run.run_id)
            context.add_input_metadata({"read": "v1"})
            return 1

    @dg.asset(ins={"up": dg.AssetIn("up")})
    def down(up: int) -> int:
        return up

    result = dg.materialize(
        [dg.AssetSpec("up").with_io_manager_key("mao"), down], resources={"mao": Telling(), "io_manager": dg.mem_io_manager}
    )
    assert seen == [result.run_id]
    loaded = [event.event_specific_data.metadata for event in result.all_events if event.event_type_value == "LOADED_INPUT"]
    assert [{name: value.value for name, value in metadata.items()} for metadata in loaded] == [{"read": "v1"}]


def backfilled(policy):
    """The runs that a backfill of two days makes of an asset with this policy."""

    @dg.asset(partitions_def=DAYS, backfill_policy=policy, check_specs=[dg.AssetCheckSpec("sound", asset="a", partitions_def=DAYS)])
    def a():
        yield dg.AssetCheckResult(passed=True, check_name="sound")
        yield dg.MaterializeResult()

    with dg.DagsterInstance.ephemeral() as instance:
        two_days = [AssetKeyPartitionKey(a.key, day) for day in DAYS.get_partition_keys()]
        runs = build_run_requests_with_backfill_policies(two_days, dg.Definitions([a]).resolve_asset_graph(), instance)
        job = dg.Definitions([a], jobs=[dg.define_asset_job("all", "*")]).resolve_job_def("all")
        for run in runs:
            result = job.execute_in_process(instance=instance, partition_key=run.partition_key, tags=dict(run.tags))
            yield run, [e.partition for e in result.get_asset_check_evaluations()], result.get_asset_materialization_events()[0].partition


def test_without_a_backfill_policy_a_backfill_makes_a_run_per_partition_by_its_key():
    """A workflow is one partition, and the results of its checks belong to it."""
    told = [(run.partition_key, checked, made) for run, checked, made in backfilled(None)]
    assert sorted(told) == [(day, [day], day) for day in DAYS.get_partition_keys()]


def test_with_a_policy_of_one_partition_a_run_it_makes_ranges_of_one_and_the_checks_belong_to_none():
    """The naive way of asking for a run per partition: the UI then shows the checks of each partition as skipped."""
    told = [(run.partition_key, checked, made) for run, checked, made in backfilled(dg.BackfillPolicy.multi_run())]
    assert sorted(told, key=str) == [(None, [None], day) for day in DAYS.get_partition_keys()]


def test_a_check_that_has_no_partitions_is_told_by_steps_and_without_a_run_and_the_last_to_tell_counts():
    """The check `breaker` of a partitioned asset: by whichever partition's step, and by the sensor."""
    key = dg.AssetCheckKey(dg.AssetKey("a"), "breaker")

    @dg.asset(partitions_def=DAYS, check_specs=[dg.AssetCheckSpec("breaker", asset="a", blocking=True)])
    def a():
        yield dg.AssetCheckResult(passed=True, check_name="breaker")
        yield dg.MaterializeResult()

    def latest() -> tuple[bool, str | None]:
        record = instance.event_log_storage.get_latest_asset_check_execution_by_key([key])[key]
        evaluation = record.event.dagster_event.event_specific_data
        return evaluation.passed, evaluation.partition

    with dg.DagsterInstance.ephemeral() as instance:
        assert dg.materialize([a], instance=instance, partition_key="monday").success
        assert latest() == (True, None)
        instance.report_runless_asset_event(dg.AssetCheckEvaluation(asset_key=key.asset_key, check_name=key.name, passed=False))
        assert latest() == (False, None)
        # Its being blocking concerns the run that tells it: another run is not held up.
        assert dg.materialize([a], instance=instance, partition_key="tuesday").success
        assert latest() == (True, None)


def test_a_null_in_a_mapping_of_anything_is_a_defect_unless_values_may_be_null():
    """Why the values of `PolicyOverrides.overrides` are declared optional: `breaker: null` is an override."""

    def given(values: Any) -> Any:
        class Resource(dg.ConfigurableResource):
            overrides: values = {}

        @dg.asset(required_resource_keys={"it"})
        def a(context):
            return context.resources.it.overrides

        config = {"resources": {"it": {"config": {"overrides": {"agent": {"breaker": None}}}}}}
        return dg.materialize([a], resources={"it": Resource()}, run_config=config).output_for_node("a")

    assert given(dict[str, dict[str, Any | None]]) == {"agent": {"breaker": None}}
    with pytest.raises(Exception, match="Null map member not caught"):
        given(dict[str, dict[str, Any]])


def test_a_sensor_may_report_and_say_why_it_asked_for_no_run():
    result = dg.SensorResult(
        asset_events=[dg.AssetCheckEvaluation(asset_key=dg.AssetKey("a"), check_name="c", passed=True)], skip_reason="told", cursor="1"
    )
    sensor = dg.SensorDefinition(name="s", evaluation_fn=lambda context: result)
    with dg.DagsterInstance.ephemeral() as instance, dg.build_sensor_context(instance=instance) as context:
        ticked = sensor.evaluate_tick(context)
    assert (len(ticked.asset_events), ticked.skip_message, ticked.cursor) == (1, "told", "1")


def test_two_assets_cannot_bring_a_default_for_a_resource_that_the_definitions_give():
    """Why the resource `policies` is required, and not defaulted by each asset."""

    class Resource(dg.ConfigurableResource):
        pass

    def with_default(name: str) -> dg.AssetsDefinition:
        return dg.asset(name=name, resource_defs={"it": Resource().get_resource_definition()})(lambda: None)

    with pytest.raises(dg.DagsterInvalidDefinitionError, match="Conflicting versions"):
        dg.Definitions([with_default("a"), with_default("b")]).resolve_implicit_global_asset_job_def()
    with pytest.raises(dg.DagsterInvalidInvocationError, match="conflicting resource"):
        dg.Definitions([with_default("a")], resources={"it": Resource()}).resolve_implicit_global_asset_job_def()
