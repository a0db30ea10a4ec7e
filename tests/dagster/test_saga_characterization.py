"""What compensation stands on in Dagster: hooks, retries, what is left of killed processes, what may be told of a run that has ended."""

import dagster as dg
import pytest
from dagster._core.event_api import PartitionKeyFilter
from dagster._core.events import EngineEventData

from tests.dagster import killable, undo_job
from tests.dagster.deployment import deployed, kill, until

pytestmark = pytest.mark.filterwarnings("ignore::dagster.PreviewWarning")
DAYS = dg.StaticPartitionsDefinition(["monday", "tuesday"])


def executed(job, tmp_path):
    undo_job.executed.clear()
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance, dg.execute_job(dg.reconstructable(job), instance=instance) as result:
        steps = {e.step_key: e.event_type_value for e in result.all_events if e.event_type_value in ("STEP_SUCCESS", "STEP_FAILURE")}
        return result.success, undo_job.executed, steps


def test_steps_found_at_run_time_go_in_the_order_of_their_outputs_and_the_last_one_comes_after_a_failure_too(tmp_path):
    """In one process: an agent's undo is a step that shows as failed, the others go on in their order, and what is left is told."""
    success, order, steps = executed(undo_job.concluding_job, tmp_path)
    assert order == [*undo_job.AGENTS, "conclude zeta alpha mid beta"]
    assert not success
    assert [key for key, what in steps.items() if what == "STEP_FAILURE"] == ["undo[alpha]"]


def test_by_default_a_step_does_not_start_after_a_failure_above_it(tmp_path):
    """Why the job has its own executor configuration."""
    _, order, steps = executed(undo_job.undo_job, tmp_path)
    assert order == undo_job.AGENTS
    assert "conclude" not in steps


@dg.failure_hook(name="tell")
def tell(context: dg.HookContext) -> None:
    told.append((context.job_name, context.op.tags["colour"], type(context.op_exception).__name__))


told: list[tuple[str, str, str]] = []


def test_hooks_of_an_asset_are_called_in_every_job_after_its_last_retry():
    """The UI's Materialize button runs the implicit job. A hook that raises fails neither the step nor the others."""

    @dg.failure_hook(name="broken")
    def broken(context: dg.HookContext) -> None:
        raise RuntimeError("the database is down")

    tries = []

    @dg.multi_asset(specs=[dg.AssetSpec("a")], hooks={tell, broken}, op_tags={"colour": "red"}, retry_policy=dg.RetryPolicy(max_retries=2))
    def a():
        tries.append(len(told))
        raise ValueError

    defs = dg.Definitions(assets=[a], jobs=[dg.define_asset_job("one", "*")])
    told.clear()
    with dg.DagsterInstance.ephemeral() as instance:
        for job in (defs.resolve_implicit_global_asset_job_def(), defs.resolve_job_def("one")):
            job.execute_in_process(instance=instance, raise_on_error=False)
    assert told == [("__ASSET_JOB", "red", "ValueError"), ("one", "red", "ValueError")]
    assert tries == [0, 0, 0, 1, 1, 1]


def test_a_step_of_any_job_may_tell_of_assets_and_their_checks():
    """The compensation's run is then the one that the check and the observation are linked to."""

    @dg.multi_asset_check(specs=[dg.AssetCheckSpec("undone", asset="a", partitions_def=DAYS)])
    def undone():
        yield dg.AssetCheckResult(check_name="undone", asset_key="a", passed=True)

    @dg.op
    def conclude(context: dg.OpExecutionContext):
        link = dg.MetadataValue.dagster_run(context.run_id)
        key = dg.AssetKey("a")
        context.log_event(dg.AssetObservation(key, partition="monday", metadata={"by": link}))
        context.log_event(
            dg.AssetCheckEvaluation(asset_key=key, check_name="undone", passed=False, partition="monday", metadata={"by": link})
        )

    @dg.job
    def compensate():
        conclude()

    with dg.DagsterInstance.ephemeral() as instance:
        run = dg.Definitions(assets=[dg.AssetSpec("a", partitions_def=DAYS)], asset_checks=[undone], jobs=[compensate])
        result = run.resolve_job_def("compensate").execute_in_process(instance=instance)
        assert result.success, "a failed check of an asset that the job does not make fails no step"
        key = dg.AssetCheckKey(dg.AssetKey("a"), "undone")
        monday = PartitionKeyFilter(key="monday")
        evaluation = instance.event_log_storage.get_latest_asset_check_execution_by_key([key], partition_filter=monday)[key]
        assert (evaluation.status.value, evaluation.partition, evaluation.run_id) == ("FAILED", "monday", result.run_id)
        (observed,) = instance.fetch_observations(dg.AssetKey("a"), limit=2).records
        assert (observed.run_id, observed.partition_key) == (result.run_id, "monday")


def test_a_run_that_has_ended_takes_tags_and_engine_events():
    """So the failed run leads to its compensation."""

    @dg.asset
    def a(): ...

    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([a], instance=instance)
        link = dg.MetadataValue.dagster_run("the other")
        instance.add_run_tags(result.run_id, {"mao/compensated_by": "the other"})
        instance.report_engine_event("Compensated", result.dagster_run, EngineEventData({"compensation": link}))
        run = instance.get_run_by_id(result.run_id)
        assert (run.status, run.tags["mao/compensated_by"]) == (dg.DagsterRunStatus.SUCCESS, "the other")
        last = list(instance.all_logs(result.run_id))[-1].dagster_event
        assert (last.message, last.event_specific_data.metadata) == ("Compensated", {"compensation": link})


def test_a_run_that_will_be_retried_says_so_from_its_failure_on(tmp_path):
    """The tag is a promise of the daemon's: without a remote origin, or once its backfill has ended, nobody keeps it."""

    @dg.asset
    def a():
        raise ValueError

    @dg.asset
    def fine(): ...

    settings = {"run_retries": {"enabled": True, "max_retries": 1}}
    with dg.DagsterInstance.local_temp(str(tmp_path), overrides=settings) as instance:
        run = dg.materialize([a], instance=instance, raise_on_error=False).dagster_run
        run = instance.get_run_by_id(run.run_id)
        assert run.tags["dagster/will_retry"] == "true"
        assert run.is_complete_and_waiting_to_retry
        assert run.remote_job_origin is None
        instance.add_run_tags(run.run_id, {"dagster/auto_retry_run_id": "the retry"})  # as the daemon does when it has made the run
        assert not instance.get_run_by_id(run.run_id).is_complete_and_waiting_to_retry
        untold = instance.get_run_by_id(dg.materialize([fine], instance=instance).run_id)
        assert "dagster/will_retry" not in untold.tags
    with dg.DagsterInstance.ephemeral() as instance:
        run = instance.get_run_by_id(dg.materialize([a], instance=instance, raise_on_error=False).run_id)
        assert "dagster/will_retry" not in run.tags, "told only where retries are enabled"


def test_a_run_is_marked_as_failed_from_outside_and_then_retried_like_any_other(tmp_path):
    """What the code server does when a run's process dies, and what we do when nobody is left to do it."""

    @dg.asset
    def a(): ...

    settings = {"run_retries": {"enabled": True, "max_retries": 1}}
    with dg.DagsterInstance.local_temp(str(tmp_path), overrides=settings) as instance:
        run = dg.DagsterRun(job_name="j", run_id="killed", status=dg.DagsterRunStatus.STARTED)
        instance.add_run(run)
        instance.report_run_failed(run, "its process is gone")
        record = instance.get_run_record_by_id("killed")
        assert record.dagster_run.status == dg.DagsterRunStatus.FAILURE
        assert record.end_time is not None
        assert record.dagster_run.tags["dagster/will_retry"] == "true"


@pytest.mark.long
def test_what_is_left_of_killed_steps_runs_and_code_servers(tmp_path):
    """No hook is called for any of them. A killed step fails, and its siblings go on; a killed run fails while its code server lives.

    When both die, the run stays STARTED for ever, and its steps go on: nobody but us sees that it ended.
    """
    folder = tmp_path / "folder"
    folder.mkdir()
    with deployed(tmp_path / "home", "tests.dagster.killable", {killable.FOLDER: str(folder)}) as dagster:

        def pid(name, step):
            file = folder / f"{dagster.run(name).run_id}.{step}.pid"
            return int(until(lambda: file.exists() and file.read_text(), f"{step} of {name}"))

        dagster.ask("run killed", job_name="in_one")
        dagster.ask("step killed", job_name="in_several")
        pid("run killed", "left")
        kill(dagster.pid("run killed"))
        assert dagster.ended("run killed").status == dg.DagsterRunStatus.FAILURE
        kill(pid("step killed", "left"))
        pid("step killed", "right")
        failed = dg.DagsterEventType.STEP_FAILURE
        told = until(lambda: dagster.instance.all_logs(dagster.run("step killed").run_id, of_type=failed), "the step's failure")
        assert [one.step_key for one in told] == ["left"]
        assert not dagster.run("step killed").is_finished, "its sibling goes on"

        dagster.ask("all killed", job_name="in_several")
        orphans = [pid("all killed", step) for step in ("left", "right")]
        before = dagster.run("all killed")
        process = dagster.pid("all killed")
        dagster.kill_daemon()
        kill(process)
        dagster.start()
        ticks = (folder / "ticks").read_text().count("tick")
        until(lambda: (folder / "ticks").read_text().count("tick") > ticks + 3, "ticks of the new daemon")
        assert dagster.run("all killed").status == dg.DagsterRunStatus.STARTED
        (folder / "go").touch()
        until(lambda: dagster.instance.get_latest_materialization_event(dg.AssetKey("left")), "what the zombie materialised")
        zombie = dagster.instance.get_latest_materialization_event(dg.AssetKey("left"))
        assert (zombie.run_id, dagster.run("all killed").status) == (before.run_id, dg.DagsterRunStatus.STARTED)
        assert len(orphans) == 2
        assert dagster.ended("step killed").status == dg.DagsterRunStatus.FAILURE
    assert [file.name for file in folder.glob("*.hook")] == []
