"""Agents that start by themselves, as Dagster runs and shows them: sensors, runs per batch, what is told of each workflow."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.execution.api import execute_run
from dagster._utils.tags import normalize_tags

import dagster_mao as mao
from dagster_mao.choreography import abandon, run_batch
from dagster_mao.dagster import choreography, runs
from dagster_mao.dagster.runs import workflow_tags
from dagster_mao.gateway import shared_store
from tests.choreography.loans import elsewhere, loans, once
from tests.dagster.theatre import EAGER, Theatre

DAYS = dg.DailyPartitionsDefinition(start_date="2026-01-05", end_date="2026-03-05")
MONDAY, TUESDAY, FRIDAY = "2026-01-05", "2026-01-06", "2026-01-09"


@pytest.fixture
def instance() -> Any:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def theatre(tmp_path: Path, instance: dg.DagsterInstance) -> Theatre:
    return Theatre(tmp_path, instance)


def daily(folder: Path, instance: dg.DagsterInstance, **changes: Any) -> Theatre:
    return Theatre(folder, instance, loans(micro_batch=EAGER, partitions_def=DAYS, **changes))


# -- what there is -------------------------------------------------------------------------------------------------------------------


def test_each_agent_has_a_job_and_a_sensor_that_runs_from_the_start_and_the_pipeline_s_job_is_the_entry(theatre: Theatre) -> None:
    sensors = {sensor.name: sensor for sensor in theatre.defs.sensors or ()}
    assert sensors.keys() == {f"loans__{agent}_sensor" for agent in ("score", "income", "risk", "approval", "lag")}
    assert {sensor.default_status for sensor in sensors.values()} == {dg.DefaultSensorStatus.RUNNING}
    repository = theatre.defs.get_repository_def()
    assert {"loans_job", *(f"loans__{agent}_job" for agent in ("score", "income", "risk", "approval"))} <= set(repository.job_names)
    keys = theatre.defs.resolve_job_def("loans_job").asset_layer.selected_asset_keys
    assert keys == {dg.AssetKey(["loans", "applications"]), dg.AssetKey(["loans", "applications_quarantine"])}


def test_the_same_agents_in_orchestration_have_neither(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    theatre = Theatre(tmp_path, instance, loans("orchestration"))
    assert not theatre.defs.sensors
    assert [job.name for job in theatre.defs.jobs or ()] == ["loans_job", "loans_audit"]


@pytest.mark.parametrize("mode", ["orchestration", "choreography", "hybrid"])
def test_a_job_says_how_its_pipeline_is_coordinated_and_which_pattern_it_asks_for(
    tmp_path: Path, instance: dg.DagsterInstance, mode: Any
) -> None:
    theatre = Theatre(tmp_path, instance, loans(mode))
    told = theatre.defs.resolve_job_def("loans_job").metadata
    assert told["mao/mode"].value == mode
    assert told["mao/advice"].value == mao.advise(theatre.pipeline).as_markdown()
    if mode != "orchestration":
        assert theatre.defs.resolve_job_def("loans__risk_job").metadata["mao/advice"] == told["mao/advice"]


# -- the way of a workflow -----------------------------------------------------------------------------------------------------------


def test_the_entry_s_run_seals_the_entry_alone_and_the_sensors_do_the_rest(theatre: Theatre) -> None:
    entered = theatre.defs.resolve_job_def("loans_job").execute_in_process(instance=theatre.instance)
    assert entered.success
    (workflow,) = theatre.store.workflows("loans")
    assert [seal.agent for seal in theatre.store.seals(workflow)] == ["applications"]
    results = theatre.play()
    assert {agent: len(runs) for agent, runs in results.items()} == {"score": 1, "income": 1, "risk": 1, "approval": 1}
    assert all(run.success for runs in results.values() for run in runs)
    assert theatre.sealed() == once(workflow.removeprefix("loans/"))
    tags = {run.run_id: run.tags for run in theatre.instance.get_runs()}
    key = f"mao/workflow.{workflow.removeprefix('loans/')}"
    assert {told.get(key) for told in tags.values()} == {"loans"}, "one filter of the run list finds all runs of a workflow"
    assert len(theatre.instance.get_runs(dg.RunsFilter(tags={key: "loans"}))) == 5
    attempt = theatre.store.seals(workflow)[0].attempt
    assert attempt == entered.run_id
    assert {seal.attempt for seal in theatre.store.seals(workflow)} == {attempt}, "all that descends from one entry seal"


def test_a_batch_of_many_workflows_tells_of_each_of_them(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    theatre = daily(tmp_path, instance)
    theatre.arrive(MONDAY, TUESDAY, FRIDAY)
    (request,) = theatre.tick("score")
    result = theatre.launch(request)
    assert result.success
    told = theatre.materializations("score")
    assert {one["mao/state_version"] for one in told} == {f"loans/{day}@1" for day in (MONDAY, TUESDAY, FRIDAY)}
    key = dg.AssetKey(["loans", "score"])
    assert theatre.instance.get_materialized_partitions(key) == {MONDAY, TUESDAY, FRIDAY}
    for day in (MONDAY, TUESDAY, FRIDAY):
        check = theatre.check("score", "output", day)
        assert (check.passed, check.partition) == (True, day)
    (event,) = theatre.instance.fetch_materializations(dg.AssetRecordsFilter(key, asset_partitions=[FRIDAY]), limit=5).records
    seal = theatre.store.seal_at(f"loans/{FRIDAY}", 1)
    tags = event.asset_materialization.tags
    assert (tags["dagster/data_version"], tags["dagster/code_version"]) == (seal.digest, seal.agent_version)
    assert tags["dagster/input_data_version/loans/applications"] == seal.parents[0].digest
    assert request.tags.keys() >= {f"mao/workflow.{day}" for day in (MONDAY, TUESDAY, FRIDAY)}


def test_without_partitions_a_run_s_check_speaks_of_all_its_workflows(theatre: Theatre) -> None:
    theatre.arrive("w1", "w2", "w3", amounts=[100.0])
    theatre.ledger.fail("score loans/w2")
    (request,) = theatre.tick("score")
    result = theatre.launch(request)
    check = theatre.check("score", "pinned_base")
    assert (check.passed, check.metadata["workflows"].value) == (True, 3)
    assert theatre.check("score", "output").metadata["workflows"].value == 2
    assert [one["mao/state_version"] for one in theatre.materializations("score")] == ["loans/w3@1", "loans/w1@1"]
    assert not result.success


def test_one_workflow_s_failure_fails_only_that_workflow_and_is_seen(theatre: Theatre) -> None:
    """The run is red, and names it; the others are sealed and go on; nothing is tried again by itself."""
    theatre.arrive("good", "bad", "fine")
    theatre.ledger.fail("risk loans/bad")
    results = theatre.play()
    assert [run.success for run in results["risk"]] == [False]
    failure = results["risk"][0].failure_data_for_node("loans__risk__batch").user_failure_data
    assert failure.description == "1 workflow failed; the others were sealed. loans/bad (AgentFailedError)"
    assert [row.data["workflow"] for row in failure.metadata["failed"].records] == ["loans/bad"]
    assert theatre.sealed() == once("good", "fine") + once("bad", agents=["score", "income"])
    assert theatre.tick("risk") == []
    assert theatre.reasons["risk"] == "Nothing is due."


def test_a_re_execution_of_a_run_lets_what_failed_in_it_be_tried_again(theatre: Theatre) -> None:
    theatre.arrive("good", "bad")
    theatre.ledger.fail("score loans/bad")
    (request,) = theatre.tick("score")
    failed = theatre.launch(request)
    theatre.ledger.fail()
    by_hand = {"dagster/parent_run_id": failed.run_id, "dagster/root_run_id": failed.run_id}
    assert theatre.launch(request).success, "a run of the same batch that is no re-execution does nothing"
    assert theatre.tick("score") == []
    job = theatre.defs.resolve_job_def("loans__score_job")
    again = theatre.instance.create_run_for_job(
        job, tags={**request.tags, **by_hand}, parent_run_id=failed.run_id, root_run_id=failed.run_id
    )
    assert execute_run(InMemoryJob(job), again, theatre.instance).success
    (retried,) = theatre.tick("score")
    assert theatre.launch(retried).success
    assert theatre.ledger.executions["score loans/bad"] == 2
    assert theatre.sealed()["score loans/bad"] == 1


# -- what may go wrong between a tick and a run --------------------------------------------------------------------------------------


def test_a_batch_is_asked_for_under_one_key_until_a_run_has_it(theatre: Theatre) -> None:
    theatre.arrive("w1", "w2")
    (first,), (second,) = theatre.tick("score"), theatre.tick("score")
    assert first.run_key == second.run_key, "Dagster launches one run per key"
    assert theatre.launch(first).success
    late = theatre.launch(second)
    assert late.success
    assert theatre.ledger.executions == once("w1", "w2", agents=["score"])


def test_a_cursor_that_is_reset_changes_nothing(theatre: Theatre) -> None:
    theatre.arrive("w1")
    theatre.play()
    theatre.cursors.clear()
    assert theatre.play() == {}
    theatre.arrive("w2")
    theatre.cursors = dict.fromkeys(theatre.cursors, "somebody's")
    theatre.play()
    assert theatre.sealed() == theatre.ledger.executions == once("w1", "w2")


def test_a_batch_whose_run_died_before_it_took_it_is_launched_under_another_key(theatre: Theatre) -> None:
    """Naive: the same key again, for which Dagster starts no run any more: the batch would wait for ever."""
    theatre.arrive("w1")
    (request,) = theatre.tick("score")
    job = theatre.defs.resolve_job_def("loans__score_job")
    run = theatre.instance.create_run_for_job(job, tags=request.tags)
    assert theatre.tick("score") == []
    assert "about to take" in str(theatre.reasons["score"])
    theatre.instance.report_run_failed(run)
    theatre.tick("score")
    (again,) = theatre.tick("score")
    assert again.run_key != request.run_key
    assert theatre.launch(again).success
    assert theatre.sealed() == once("w1", agents=["score"])


def test_a_run_that_never_starts_is_waited_for_for_two_minutes_and_not_for_ever(theatre: Theatre, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its launcher was killed between the launch and the start: Dagster leaves it STARTING, and nobody looks."""
    theatre.arrive("w1")
    (request,) = theatre.tick("score")
    job = theatre.defs.resolve_job_def("loans__score_job")
    run = theatre.instance.create_run_for_job(job, tags=request.tags, status=dg.DagsterRunStatus.STARTING)
    assert theatre.tick("score") == []
    now = time.time()
    monkeypatch.setattr(choreography.time, "time", lambda: now + choreography.STARTS_WITHIN + 1)
    theatre.tick("score")
    (again,) = theatre.tick("score")
    assert theatre.instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.FAILURE  # type: ignore[union-attr]
    monkeypatch.undo()
    assert theatre.launch(again).success
    assert theatre.launch(request).success, "should it start after all, it does nothing"
    assert theatre.ledger.executions == once("w1", agents=["score"])


def test_a_batch_whose_run_died_while_it_had_it_goes_on_at_the_next_tick(theatre: Theatre) -> None:
    theatre.arrive("w1", "w2")
    (request,) = theatre.tick("score")
    job = theatre.defs.resolve_job_def("loans__score_job")
    run = theatre.instance.create_run_for_job(job, tags=request.tags)
    resources = {"ledger": theatre.ledger}
    at_work = run_batch(theatre.store, theatre.pipeline, "score", str(request.run_key), run_id=run.run_id, resources=resources)
    assert next(at_work).state == "done"
    theatre.instance.report_run_failed(run)
    (again,) = theatre.tick("score")
    assert theatre.launch(again).success
    with pytest.raises(mao.MaoError, match=r"another has it"):
        list(at_work)
    assert theatre.sealed() == once("w1", "w2", agents=["score"])


def test_what_a_dead_run_sealed_and_did_not_tell_is_told_by_the_next(theatre: Theatre) -> None:
    theatre.arrive("w1")
    (request,) = theatre.tick("score")
    resources = {"ledger": theatre.ledger}
    at_work = run_batch(theatre.store, theatre.pipeline, "score", str(request.run_key), run_id="dead", resources=resources)
    next(at_work)  # sealed, and nothing told
    abandon(shared_store(str(theatre.store.database)), str(request.run_key))
    assert theatre.materializations("score") == []
    (again,) = theatre.tick("score")
    assert theatre.launch(again).success
    (told,) = theatre.materializations("score")
    assert (told["mao/state_version"], told["mao/reused"]) == ("loans/w1@1", True)
    assert theatre.ledger.executions == once("w1", agents=["score"])


def test_a_backlog_is_drained_in_few_runs_and_few_at_a_time(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    theatre = Theatre(tmp_path, instance, loans(micro_batch=mao.MicroBatch(size=2, wait=0)))
    workflows = [f"w{number:03}" for number in range(13)]
    theatre.arrive(*workflows, amounts=[100.0])
    asked = theatre.tick("score")
    assert len(asked) == 4
    job = theatre.defs.resolve_job_def("loans__score_job")
    for request in asked:
        theatre.instance.create_run_for_job(job, tags=request.tags)
    assert theatre.tick("score") == []
    assert "3 batches wait" in str(theatre.reasons["score"])
    assert sum(len([key for key in request.tags if key.startswith("mao/workflow.")]) for request in asked) in (7, 8)


def test_so_many_workflows_are_tags_and_all_are_in_the_log(theatre: Theatre, monkeypatch: pytest.MonkeyPatch) -> None:
    assert runs.WORKFLOWS_TAGGED == 50
    for module in (runs, choreography):
        monkeypatch.setattr(module, "WORKFLOWS_TAGGED", 2)
    workflows = ["w1", "w2", "w3"]
    theatre.arrive(*workflows, amounts=[100.0])
    (request,) = theatre.tick("score")
    assert len([key for key in request.tags if key.startswith("mao/workflow.")]) == 2
    result = theatre.launch(request)
    logged = [entry.user_message for entry in theatre.instance.all_logs(result.run_id) if entry.user_message.startswith("3 workflows")]
    assert len(logged) == 1
    assert all(f"loans/{workflow}" in logged[0] for workflow in workflows)


# -- by hand -------------------------------------------------------------------------------------------------------------------------


def test_materialise_all_seals_the_entry_and_leaves_the_others_to_their_sensors(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    """Naive: the run's own steps and the sensors' runs race for every version, and the loser's run fails."""
    theatre = daily(tmp_path, instance)
    job = theatre.defs.resolve_implicit_global_asset_job_def()
    result = job.execute_in_process(instance=instance, partition_key=MONDAY, raise_on_error=False)
    assert result.success
    assert [seal.agent for seal in theatre.store.seals(f"loans/{MONDAY}")] == ["applications"]
    theatre.play()
    assert theatre.sealed() == once(MONDAY)


@pytest.mark.parametrize("mode", ["choreography", "hybrid"])
def test_an_agent_materialised_by_hand_is_done_again_and_those_below_follow(
    tmp_path: Path, instance: dg.DagsterInstance, mode: Any
) -> None:
    theatre = Theatre(tmp_path, instance, loans(mode, micro_batch=EAGER, partitions_def=DAYS))
    theatre.arrive(MONDAY)
    theatre.play()
    job = theatre.defs.resolve_implicit_global_asset_job_def()
    risk = [dg.AssetKey(["loans", "risk"])]
    assert job.execute_in_process(instance=instance, partition_key=MONDAY, asset_selection=risk).success
    assert theatre.sealed()[f"risk loans/{MONDAY}"] == 2
    newest = theatre.store.seals(f"loans/{MONDAY}")[-1]
    theatre.play()
    effective = theatre.store.effective(f"loans/{MONDAY}")
    assert effective["approval"].parents[1].version == newest.version or effective["approval"].parents[0].version == newest.version
    assert effective["risk"].version == newest.version, "what it was made from is what is effective"


def test_tags_of_awkward_workflows_are_tags_that_dagster_takes() -> None:
    told = workflow_tags(["loans/2026-01-05", 'loans/A "quoted"/1', "loans/" + "x" * 200, "loans/A 'quoted'/1"])
    assert told.keys() >= {"mao/workflow.2026-01-05"}
    assert len(told) == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        normalize_tags(told)  # warns of what Dagster will refuse some day


def test_a_team_that_listens_has_no_entry_and_no_job_of_it(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    defs = Theatre(tmp_path, instance, elsewhere()).defs
    assert [job.name for job in defs.jobs or ()] == ["loans__notify_job", "loans_audit"]
    assert defs.schedules == [] or not defs.schedules
    (asset,) = defs.assets or ()
    assert asset.asset_deps[dg.AssetKey(["loans", "notify"])] == {dg.AssetKey(["loans", "approval"])}  # type: ignore[union-attr]
