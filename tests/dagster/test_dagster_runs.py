"""Which run belongs to which attempt and workflow: re-execution, partitions, backfills, other processes."""

import datetime as dt
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.event_api import PartitionKeyFilter

from dagster_mao.dagster import StateStoreResource, build_definitions
from dagster_mao.dagster.runs import ancestry
from dagster_mao.state import StateStore
from tests.dagster import loans
from tests.dagster.loans import resources, write

DAYS = dg.DailyPartitionsDefinition(start_date="2026-01-05", end_date="2026-01-08")
MONDAY, TUESDAY = "2026-01-05", "2026-01-06"


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.setenv("LOANS_FOLDER", str(tmp_path))
    monkeypatch.setenv("LOANS_STATE", str(tmp_path / "state"))
    write(tmp_path, 700, 650.5, 620)
    return tmp_path


@pytest.fixture
def instance(tmp_path):
    """Persistent: re-executions and other processes need one."""
    (tmp_path / "home").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "home")) as instance:
        yield instance


def store(folder) -> StateStore:
    return StateStoreResource(root=str(folder / "state")).store()


def execute(job, instance, parent=None, **options):
    """Runs the job; with a parent, what of it did not succeed."""
    again = dg.ReexecutionOptions.from_failure(parent, instance) if parent else None
    return dg.execute_job(dg.reconstructable(job), instance=instance, reexecution_options=again, **options)


def only_workflow(folder):
    (workflow,) = store(folder).workflows()
    return workflow, store(folder).seals(workflow)


def test_a_re_execution_from_failure_goes_on_with_the_attempt(desk, instance):
    (desk / "outage").touch()
    first = execute(loans.loans_job, instance)
    assert not first.success
    started = {event.step_key for event in first.all_events if event.event_type_value == "STEP_START"}
    assert started == {"loans__applications", "loans__credit_score", "loans__verified_income"}, (
        "nothing below a failure, not the chain check"
    )
    workflow, seals = only_workflow(desk)
    assert {seal.agent for seal in seals} == {"applications", "verified_income"}
    assert store(desk).effective(workflow) == {}, "half an attempt does not count"
    (desk / "outage").unlink()
    second = execute(loans.loans_job, instance, first.run_id)
    assert second.success
    _, seals = only_workflow(desk)
    assert [seal.version for seal in seals] == [0, 1, 2, 3]
    assert {seal.attempt for seal in seals} == {first.run_id}
    assert {seal.run_id for seal in seals[2:]} == {second.run_id}
    assert {seal.plan for seal in seals} == {("applications", "approval", "credit_score", "verified_income")}
    assert set(store(desk).effective(workflow)) == set(loans.pipeline().order)
    assert [parent.version for parent in seals[3].parents] == [2, 1]


def test_re_executing_everything_is_the_same_attempt_and_reuses_what_did_not_change(desk, instance):
    first = execute(loans.loans_job, instance)
    again = dg.execute_job(
        dg.reconstructable(loans.loans_job),
        instance=instance,
        reexecution_options=dg.ReexecutionOptions(parent_run_id=first.run_id),
    )
    assert again.success
    _, seals = only_workflow(desk)
    assert len(seals) == 4
    told = [event.step_materialization_data.materialization for event in again.all_events if event.is_step_materialization]
    assert [one.metadata["mao/reused"].value for one in told] == [True] * 4


@pytest.mark.slow
def test_the_multiprocess_executor_seals_the_same(desk, instance):
    # From a process of its own: the fork server of a process keeps the environment it was started in, and so do its steps.
    code = "import sys; from tests.dagster.loans import main; main(*sys.argv[1:])"
    subprocess.run([sys.executable, "-c", code, str(desk / "home")], cwd=Path(__file__).parents[2], check=True, timeout=300)
    (run,) = instance.get_runs()
    assert run.is_success
    workflow, seals = only_workflow(desk)
    assert [seal.version for seal in seals] == [0, 1, 2, 3]
    assert {seal.attempt for seal in seals} == {run.run_id}
    assert len({seal.now for seal in seals}) == 1, "all agents of an attempt have one clock"
    assert set(store(desk).effective(workflow)) == set(loans.pipeline().order)


def daily(folder):
    return build_definitions(loans.pipeline(partitions_def=DAYS), resources=resources(folder))


def materialise(folder, instance, day, *agents, **options):
    job = daily(folder).resolve_job_def("loans_job")
    chosen = job.get_subset(asset_selection={dg.AssetKey(["loans", agent]) for agent in agents}) if agents else job
    return chosen.execute_in_process(instance=instance, partition_key=day, raise_on_error=False, **options)


def test_a_backfill_with_a_run_per_partition_is_a_workflow_per_partition(desk):
    write(desk, days={MONDAY: [700, 650], TUESDAY: [620]})
    with dg.DagsterInstance.ephemeral() as instance:
        for day in (MONDAY, TUESDAY):
            result = materialise(desk, instance, day)
            assert result.success
            assert {e.partition for e in result.get_asset_check_evaluations()} == {day}
    assert store(desk).workflows() == [f"loans/{MONDAY}", f"loans/{TUESDAY}"]
    assert [[seal.row_count for seal in store(desk).seals(f"loans/{day}")] for day in (MONDAY, TUESDAY)] == [[2] * 4, [1] * 4]
    for asset in daily(desk).resolve_all_asset_keys():
        assert daily(desk).resolve_assets_def(asset).backfill_policy is None


def test_one_run_over_several_partitions_is_refused(desk):
    write(desk, days={MONDAY: [700], TUESDAY: [620]})
    tags = {"dagster/asset_partition_range_start": MONDAY, "dagster/asset_partition_range_end": TUESDAY}
    job = daily(desk).resolve_job_def("loans_job")
    result = job.execute_in_process(tags=tags, raise_on_error=False)
    assert not result.success
    assert "a run per partition" in result.failure_data_for_node("loans__applications").user_failure_data.description
    assert store(desk).workflows() == []


def test_a_failed_partition_does_not_overwrite_the_checks_of_another(desk):
    write(desk, days={MONDAY: [700], TUESDAY: [-1]})
    with dg.DagsterInstance.ephemeral() as instance:
        good, bad = materialise(desk, instance, MONDAY), materialise(desk, instance, TUESDAY)
        key = dg.AssetCheckKey(dg.AssetKey(["loans", "applications"]), "output")
        told = {
            day: instance.event_log_storage.get_latest_asset_check_execution_by_key([key], partition_filter=PartitionKeyFilter(key=day))
            for day in (MONDAY, TUESDAY)
        }
    assert (good.success, bad.success) == (True, False)
    passed = {day: found[key].event.dagster_event.asset_check_evaluation_data.passed for day, found in told.items()}
    assert passed == {MONDAY: True, TUESDAY: False}


def test_late_data_is_a_new_entry_in_the_same_workflow_and_one_asset_alone_reads_what_completed(desk):
    """The later entry is not read by an agent that is materialised alone before any attempt on it completed."""
    write(desk, days={MONDAY: [700, 650]})
    with dg.DagsterInstance.ephemeral() as instance:
        materialise(desk, instance, MONDAY)
        write(desk, days={MONDAY: [700, 650, 400]})
        half = materialise(desk, instance, MONDAY, "applications", "verified_income", "approval")
        assert not half.success, "its inputs descend from different entries"
        checks = {e.check_name: e.passed for e in half.get_asset_check_evaluations() if e.asset_key.path[-1] == "approval"}
        assert checks == {"pinned_base": False}
        assert materialise(desk, instance, MONDAY, "credit_score").success
    workflow, seals = only_workflow(desk)
    assert workflow == f"loans/{MONDAY}"
    assert [seal.kind for seal in seals].count("entry") == 2
    assert (seals[-1].agent, seals[-1].row_count, seals[-1].parents[0].version) == ("credit_score", 2, 0)


def test_the_daily_schedule_asks_for_the_partition_that_ended(desk):
    defs = build_definitions(
        loans.pipeline(partitions_def=dg.DailyPartitionsDefinition(start_date="2026-01-05")), resources=resources(desk)
    )
    repository = defs.get_repository_def()
    schedule = repository.get_schedule_def("loans_schedule")
    assert (schedule.cron_schedule, schedule.job_name) == ("0 0 * * *", "loans_job")
    context = dg.build_schedule_context(scheduled_execution_time=dt.datetime(2026, 1, 7, tzinfo=dt.timezone.utc), repository_def=repository)
    (request,) = schedule.evaluate_tick(context).run_requests
    assert request.partition_key == TUESDAY


def test_the_root_is_known_even_when_a_run_in_between_was_deleted():
    """The attempt is named after the root run; losing it would start another attempt in the middle of one."""
    with dg.DagsterInstance.ephemeral() as instance:
        for run_id, parent in (("root", None), ("second", "root"), ("third", "second")):
            instance.add_run(dg.DagsterRun(job_name="j", run_id=run_id, parent_run_id=parent, root_run_id="root" if parent else None))
        third = instance.get_run_by_id("third")
        assert ancestry(instance, third) == ("third", "second", "root")
        instance.delete_run("second")
        assert ancestry(instance, third) == ("third", "second", "root")
