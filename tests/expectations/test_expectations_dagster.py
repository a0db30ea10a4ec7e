"""Expectations in a run: checks with severities and numbers in Dagster, a page in the store, drift between versions and workflows."""

import datetime as dt
import re
from pathlib import Path
from typing import Annotated

import dagster as dg
import polars as pl
import pytest
from pydantic import BaseModel, Field

import dagster_mao as mao
from dagster_mao.dagster import PolicyOverrides, StateIOManager, StateStoreResource, build_definitions
from dagster_mao.dagster.assets import build_assets
from dagster_mao.errors import BatchRefusedError, TamperedError
from dagster_mao.run import run
from tests.stores import on_every_store

SECRET = "Zaphod-Beeblebrox"
SHARE, ROWS, DRIFT, NAMES = (
    "expect_column_mean_to_be_between__approved",
    "expect_table_row_count_to_be_between",
    "expect_column_kl_divergence_to_be_less_than__outcome",
    "expect_column_values_to_be_in_set__name",
)


class Decision(BaseModel):
    application_id: Annotated[str, mao.Key]
    name: Annotated[str, mao.Personal]
    outcome: str


def decided(approved: int, declined: int) -> pl.DataFrame:
    outcomes = ["approve"] * approved + ["decline"] * declined
    return pl.DataFrame(
        {
            "application_id": [f"app-{n}" for n in range(len(outcomes))],
            "name": [f"{SECRET}-{n}" for n in range(len(outcomes))],
            "outcome": outcomes,
        }
    )


def one(type, severity="critical", **kwargs):
    return {"type": type, "kwargs": kwargs, "severity": severity}


SUITE = mao.Expectations(
    [
        one("expect_column_mean_to_be_between", column="approved", min_value=0.2, max_value=0.8),
        one("expect_table_row_count_to_be_between", "warning", min_value=5),
        one(
            "expect_column_kl_divergence_to_be_less_than",
            "warning",
            column="outcome",
            partition_object={"$PARAMETER": "previous_partition_outcome"},
            threshold=0.1,
        ),
        one("expect_column_values_to_be_in_set", "info", column="name", value_set=["Trillian"]),
    ],
    columns={"approved": pl.col("outcome") == "approve"},
)

calls: list[str] = []


@mao.agent(expectations=SUITE)
def decisions(*, applications: Path) -> mao.DataFrame[Decision]:
    """What was decided."""
    calls.append("decisions")
    return pl.read_parquet(applications)


def pipeline(partitions_def=None):
    return mao.Pipeline("credit", entry=decisions, partitions_def=partitions_def)


@pytest.fixture
def desk(tmp_path):
    decided(6, 4).write_parquet(tmp_path / "day.parquet")
    return tmp_path


def materialize(desk, instance=None, partitions_def=None, **options):
    state = StateStoreResource(root=str(desk / "state"))
    given = {"state_store": state, "state_io_manager": StateIOManager(state_store=state), "policies": PolicyOverrides()}
    resources = {**given, "applications": desk / "day.parquet"}
    assets = build_assets(pipeline(partitions_def))
    return dg.materialize(assets, resources=resources, instance=instance, raise_on_error=False, **options)


def evaluations(result):
    return {e.check_name: e for e in result.get_asset_check_evaluations()}


def test_each_expectation_is_a_check_and_only_critical_ones_block():
    (assets,) = build_assets(pipeline())
    specs = {spec.name: spec for spec in assets.check_specs}
    assert {name: specs[name].blocking for name in (SHARE, ROWS, DRIFT, NAMES)} == {SHARE: True, ROWS: False, DRIFT: False, NAMES: False}
    assert specs[SHARE].description == "Expect column mean to be between: column approved, min_value 0.2, max_value 0.8"
    assert build_definitions(pipeline(), resources={"state_store": StateStoreResource(root="x"), "applications": 1})


def test_a_batch_as_expected_is_sealed_and_the_numbers_are_plotted(desk):
    result = materialize(desk)
    assert result.success
    checks = evaluations(result)
    assert (checks[SHARE].passed, checks[ROWS].passed, checks[DRIFT].passed, checks[NAMES].passed) == (True, True, True, False)
    # An evaluation's numbers are of these two types, or the UI does not plot them.
    assert checks[SHARE].metadata["observed_value"] == dg.MetadataValue.float(0.6)
    assert checks[ROWS].metadata["observed_value"] == dg.MetadataValue.int(10)
    assert checks[NAMES].metadata["unexpected_percent"] == dg.MetadataValue.float(100.0)
    assert checks[NAMES].severity == dg.AssetCheckSeverity.WARN
    assert checks[DRIFT].metadata["skipped"].value == "there is no previous version"
    page = Path(checks[SHARE].metadata["report"].value)
    (workflow,) = StateStoreResource(root=str(desk / "state")).store().workflows()
    assert page.parent == desk / "state" / "reports" / "credit" / "decisions" / workflow.removeprefix("credit/")
    told = page.read_text()
    assert SHARE in told
    assert not re.search(r"(?i)https?:|<script|<link", told)


def test_what_was_personal_is_in_no_event_and_on_no_page(desk):
    with dg.DagsterInstance.ephemeral() as instance:
        result = materialize(desk, instance)
        events = "".join(str(entry) for entry in instance.all_logs(result.run_id))
    checks = evaluations(result)
    assert "***" in str(checks[NAMES].metadata["reasons"])
    written = [path.read_bytes() for path in desk.rglob("*") if path.is_file() and path.suffix in (".html", ".json")]
    assert SECRET not in events
    assert not any(SECRET.encode() in content for content in written)


def test_a_critical_expectation_that_fails_refuses_the_batch_and_leaves_its_page(desk):
    decided(9, 1).write_parquet(desk / "day.parquet")
    result = materialize(desk)
    assert not result.success
    checks = evaluations(result)
    assert (checks[SHARE].passed, checks[SHARE].severity) == (False, dg.AssetCheckSeverity.ERROR)
    assert checks[SHARE].metadata["observed_value"].value == 0.9
    assert Path(checks[SHARE].metadata["report"].value).exists()
    assert not result.get_asset_materialization_events()
    assert StateStoreResource(root=str(desk / "state")).store().workflows() == []


def test_a_warning_that_fails_is_shown_and_the_batch_is_sealed(desk):
    decided(2, 1).write_parquet(desk / "day.parquet")
    result = materialize(desk)
    assert result.success
    assert (evaluations(result)[ROWS].passed, evaluations(result)[ROWS].severity) == (False, dg.AssetCheckSeverity.WARN)
    assert len(result.get_asset_materialization_events()) == 1


def test_drift_is_against_the_version_before_in_this_workflow(desk):
    days = dg.StaticPartitionsDefinition(["monday", "tuesday"])
    materialize(desk, partitions_def=days, partition_key="monday")
    decided(2, 8).write_parquet(desk / "day.parquet")
    materialize(desk, partitions_def=days, partition_key="tuesday")
    again = evaluations(materialize(desk, partitions_def=days, partition_key="tuesday"))[DRIFT]
    assert (again.passed, again.metadata["previous"].value) == (True, "credit/tuesday@0")
    assert again.metadata["observed_value"].value == 0


def test_a_workflow_without_one_is_compared_with_the_workflow_sealed_before(desk):
    """Each day is a workflow of its own: without this, nothing of a partitioned pipeline would ever be compared."""
    days = dg.StaticPartitionsDefinition(["monday", "tuesday"])
    materialize(desk, partitions_def=days, partition_key="tuesday")
    decided(2, 8).write_parquet(desk / "day.parquet")
    drifted = evaluations(materialize(desk, partitions_def=days, partition_key="monday"))[DRIFT]
    assert (drifted.passed, drifted.metadata["previous"].value) == (False, "credit/tuesday@0")
    assert drifted.metadata["observed_value"].value > 0.1


def test_only_what_compares_names_what_it_was_compared_with(local_store):
    run(pipeline(), decided(6, 4), store=local_store, workflow="a")
    checks = {c.name: c for c in run(pipeline(), decided(6, 4), store=local_store, workflow="a/../ b").checks["decisions"]}
    assert checks[DRIFT].metadata["previous"] == "credit/a@0"
    assert "previous" not in checks[SHARE].metadata
    assert Path(checks[SHARE].metadata["report"]).is_file()
    assert Path(checks[SHARE].metadata["report"]).parents[1] == Path(local_store.root) / "reports" / "credit" / "decisions"


def test_what_is_sealed_later_is_no_version_before(local_store):
    """Law 1: an attempt compares with what there was when it began, however late its steps are."""
    before = dt.datetime.now(dt.timezone.utc)
    sealed = run(pipeline(), decided(6, 4), store=local_store, workflow="a").seals["decisions"]
    after = dt.datetime.now(dt.timezone.utc)
    asked = {"pipeline": "credit", "agent": "decisions"}
    assert local_store.sealed_before(before, **asked, other_than="credit/b") is None
    assert local_store.sealed_before(after, **asked, other_than="credit/b") == sealed
    assert local_store.sealed_before(after, **asked, other_than="credit/a") is None
    local_store.fence("credit/a", attempt=sealed.attempt, run_id="x")
    assert local_store.sealed_before(dt.datetime.now(dt.timezone.utc), **asked, other_than="credit/b") is None
    assert local_store.sealed_before(after, **asked, other_than="credit/b") == sealed


def test_a_version_before_that_was_tampered_with_is_not_compared_with(local_store):
    sealed = run(pipeline(), decided(6, 4), store=local_store, workflow="a").seals["decisions"]
    path = Path(local_store.root) / sealed.path
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(TamperedError):
        run(pipeline(), decided(6, 4), store=local_store, workflow="b")


def test_without_dagster_it_is_the_same(local_store):
    result = run(pipeline(), decided(6, 4), store=local_store)
    checks = {check.name: check for check in result.checks["decisions"]}
    assert checks[SHARE].passed
    with pytest.raises(BatchRefusedError, match=SHARE):
        run(pipeline(), decided(9, 1), store=local_store)


def test_a_suite_that_gx_does_not_take_stops_the_step_before_the_agent_is_called(desk):
    wrong = mao.agent(expectations=[one("expect_column_mean_to_be_between", column="outcome", minimum=1)])(decisions._function)
    calls.clear()
    with pytest.raises(mao.WiringError, match="minimum"):
        run(mao.Pipeline("credit", entry=wrong), resources={"applications": desk / "day.parquet"})
    assert calls == []


@on_every_store
def test_the_report_lies_in_an_object_store_too(store):
    checks = {check.name: check for check in run(pipeline(), decided(6, 4), store=store).checks["decisions"]}
    path = checks[SHARE].metadata["report"]
    assert store.objects.get(path.removeprefix(f"{store.root}/")).startswith(b"<!DOCTYPE html>")


def test_quarantined_records_are_no_part_of_what_is_expected():
    """The suite is about the batch that is sealed."""

    rows = one("expect_table_row_count_to_equal", value=2)

    class Plain(BaseModel):
        application_id: Annotated[str, mao.Key]
        score: float

    class Scored(Plain):
        score: Annotated[float, Field(gt=0)]

    @mao.agent
    def applications() -> list[Plain]:
        return [Plain(application_id=str(n), score=n) for n in range(3)]

    @mao.agent(quarantine=mao.Quarantine(max_share=1), expectations=[rows])
    def scores(applications: mao.LazyFrame[Plain]) -> mao.LazyFrame[Scored]:
        return applications

    result = run(mao.Pipeline("p", entry=applications, agents=[scores]))
    assert {c.name: c.passed for c in result.checks["scores"]}["expect_table_row_count_to_equal"]
