"""A failed attempt is compensated by a Dagster run: who starts it, what its steps do, and where it is told."""

import time
import uuid

import dagster as dg
import pytest
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.execution.api import create_execution_plan, execute_run

from dagster_mao.dagster import StateStoreResource, build_compensation_job, build_compensation_sensor
from dagster_mao.dagster import reconciling as reconciling_module
from dagster_mao.dagster.saga import run_config
from dagster_mao.saga import Saga, unfinished
from tests.journal.bank import Bank
from tests.journal.world import DAY, PIPELINE, World, act_of, expected

AMOUNTS = {"A1": 100, "A2": 200}
APPROVAL, INQUIRY = dg.AssetKey(["loans", "approval"]), dg.AssetKey(["loans", "inquiry"])


class StubbornBank(Bank):
    """Cancels nothing while it is stubborn."""

    stubborn = True

    def cancel(self, key: str, epoch: int) -> None:
        if self.stubborn:
            raise ConnectionError("secret-4711")
        super().cancel(key, epoch)


class Failing:
    """A world in which attempts fail, the Dagster instance that ran them, and what compensates them."""

    def __init__(self, folder, instance, bank):
        self.world, self.instance, self.bank = World(folder / "state", bank), instance, bank
        resources = {"state_store": StateStoreResource(root=str(folder / "state")), "bank": dg.ResourceDefinition.hardcoded_resource(bank)}
        job, self.sensor = build_compensation_job(PIPELINE), build_compensation_sensor(PIPELINE)
        self.defs = dg.Definitions(jobs=[job], sensors=[self.sensor], resources=resources)
        self.resources = resources

    def attempt(self, status=dg.DagsterRunStatus.FAILURE, *, amounts=AMOUNTS, run=True):
        """An attempt whose approval fails at its last record, and its run."""
        attempt = str(uuid.uuid4())
        if run:
            self.instance.add_run(dg.DagsterRun(job_name="loans_job", run_id=attempt, status=status))

        def act(effects, record, bank):
            if record == list(amounts)[-1]:
                raise ValueError(record)
            act_of("approval")(effects, record, bank)

        with pytest.raises(ValueError, match="A"):
            self.world.attempt(attempt, amounts, approval=act)
        return attempt

    def tick(self):
        """The run requests of one tick, or why there are none."""
        with dg.build_sensor_context(instance=self.instance, resources={"state_store": self.resources["state_store"]}) as context:
            told = self.sensor.evaluate_tick(context)
        return told.run_requests or told.skip_message

    def run(self, config, **tags):
        """A run of the job as a launcher makes it, with the job's own executor."""
        job = self.defs.resolve_job_def("loans_compensate")
        plan = create_execution_plan(job, config)
        run = self.instance.create_run_for_job(job_def=job, run_config=config, execution_plan=plan, tags=tags)
        execute_run(InMemoryJob(job), run, self.instance)
        return self.instance.get_run_by_id(run.run_id)

    def steps(self, run):
        """How the steps of a run ended, in the order of their ends."""
        kinds = {dg.DagsterEventType.STEP_SUCCESS, dg.DagsterEventType.STEP_FAILURE}
        found = [entry.dagster_event for entry in self.instance.all_logs(run.run_id) if entry.dagster_event]
        return [(event.step_key, event.event_type == dg.DagsterEventType.STEP_SUCCESS) for event in found if event.event_type in kinds]

    def check(self, key):
        found = self.instance.event_log_storage.get_latest_asset_check_execution_by_key([dg.AssetCheckKey(key, "compensated")])
        record = next(iter(found.values()))
        return record.run_id, record.event.dagster_event.asset_check_evaluation_data

    def text(self):
        """All that the event log has of all runs."""
        return "".join(str(entry) for run in self.instance.get_runs() for entry in self.instance.all_logs(run.run_id))


@pytest.fixture
def instance(tmp_path):
    (tmp_path / "home").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "home")) as instance:
        yield instance


@pytest.fixture
def failing(tmp_path, instance):
    return Failing(tmp_path, instance, Bank(tmp_path / "bank.db"))


def test_a_failed_attempt_is_compensated_by_a_run_that_is_linked_from_everywhere(failing):
    attempt = failing.attempt()
    (asked,) = failing.tick()
    assert asked.tags["mao/compensates"] == attempt
    done = failing.run(asked.run_config, **asked.tags)
    assert done.status == dg.DagsterRunStatus.SUCCESS
    assert failing.steps(done) == [(step, True) for step in ("fence", "undo[approval]", "undo[inquiry]", "conclude")]
    assert failing.bank.standing() == {}
    assert failing.world.store.seals(DAY)[-1].kind == "compensated"
    assert failing.tick() == "Nothing is to be compensated."

    failed = failing.instance.get_run_by_id(attempt)
    assert failed.tags["mao/compensated_by"] == done.run_id
    assert {name: done.tags[f"mao/{name}"] for name in ("workflow", "attempt", "compensates")} == {
        "workflow": DAY,
        "attempt": attempt,
        "compensates": attempt,
    }
    told = [entry.dagster_event for entry in failing.instance.all_logs(attempt, of_type=dg.DagsterEventType.ENGINE_EVENT)]
    assert [event.message for event in told] == [
        "What this attempt did is being undone",
        "Everything that this attempt did was undone.",
    ]
    assert all(event.event_specific_data.metadata["compensation"].value == done.run_id for event in told)

    by, check = failing.check(APPROVAL)
    assert (by, check.passed, check.metadata["undone"].value) == (done.run_id, True, 2)
    (observed,) = failing.instance.fetch_observations(INQUIRY, limit=5).records
    assert observed.run_id == done.run_id
    observation = observed.event_log_entry.asset_observation
    assert observation.description == "Its version of this attempt no longer counts; its effects were undone."
    assert (observation.metadata["mao/effective"].value, observation.metadata["mao/undone"].value) == ("none", 2)
    assert not failing.instance.fetch_observations(dg.AssetKey(["loans", "applications"]), limit=1).records[0].asset_materialization


def test_one_undo_that_fails_stops_no_other_and_is_told_until_it_is_mended(failing, tmp_path):
    failing.bank.__class__ = StubbornBank
    failing.attempt()
    (asked,) = failing.tick()
    done = failing.run(asked.run_config, **asked.tags)
    assert done.status == dg.DagsterRunStatus.FAILURE
    assert failing.steps(done) == [("fence", True), ("undo[approval]", False), ("undo[inquiry]", False), ("conclude", False)]
    _, check = failing.check(APPROVAL)
    assert (check.passed, check.severity, check.metadata["left"].value) == (False, dg.AssetCheckSeverity.ERROR, 1)
    assert check.metadata["attempts"].records[0].data["why"] == "ConnectionError"
    assert "incomplete" in failing.tick(), "it waits for a person"
    assert "4711" not in failing.text()
    failing.bank.stubborn = False
    again = failing.run(run_config(DAY, ""))
    assert again.status == dg.DagsterRunStatus.SUCCESS
    assert failing.bank.standing() == {}
    assert failing.check(APPROVAL)[1].passed


def test_the_sensor_waits_for_what_may_still_become_of_an_attempt(failing):
    attempt = failing.attempt(dg.DagsterRunStatus.STARTED)
    assert f"run {attempt} is STARTED" in failing.tick()
    assert failing.bank.standing() != {}
    again = dg.DagsterRun(
        job_name="loans_job",
        run_id=str(uuid.uuid4()),
        root_run_id=attempt,
        parent_run_id=attempt,
        tags={"dagster/root_run_id": attempt, "dagster/parent_run_id": attempt},
        status=dg.DagsterRunStatus.STARTED,
    )
    failing.instance.report_run_failed(failing.instance.get_run_by_id(attempt))
    failing.instance.add_run(again)
    assert f"run {again.run_id} is STARTED" in failing.tick()
    failing.world.step(attempt, "approval", run=again.run_id)
    failing.instance.report_dagster_event(dg.DagsterEvent("PIPELINE_SUCCESS", "loans_job"), again.run_id)
    assert failing.tick() == "Nothing is to be compensated.", "the retry completed it"
    assert failing.bank.standing() == expected(AMOUNTS)


def test_an_attempt_that_was_terminated_is_compensated_like_a_failed_one(failing):
    attempt = failing.attempt(dg.DagsterRunStatus.CANCELING)
    assert f"run {attempt} is CANCELING" in failing.tick()
    failing.instance.report_run_canceled(failing.instance.get_run_by_id(attempt))
    (asked,) = failing.tick()
    assert asked.tags["mao/compensates"] == attempt
    assert failing.run(asked.run_config, **asked.tags).status == dg.DagsterRunStatus.SUCCESS
    assert failing.bank.standing() == {}


def test_a_failed_rerun_undoes_its_own_effects_only(failing):
    first = str(uuid.uuid4())
    failing.instance.add_run(dg.DagsterRun(job_name="loans_job", run_id=first, status=dg.DagsterRunStatus.SUCCESS))
    failing.world.attempt(first, AMOUNTS)
    failing.attempt(amounts={**AMOUNTS, "A3": 300})
    (asked,) = failing.tick()
    failing.run(asked.run_config, **asked.tags)
    assert failing.bank.standing() == expected(AMOUNTS)
    observation = failing.instance.fetch_observations(INQUIRY, limit=1).records[0].event_log_entry.asset_observation
    assert observation.metadata["mao/effective"].value == f"{DAY}@1"


def test_a_second_compensator_is_refused_while_the_first_one_lives_and_started_again_when_it_does_not(failing, monkeypatch):
    attempt = failing.attempt()
    Saga(failing.world.store, PIPELINE, DAY, attempt, resources={"bank": failing.bank}, owner="somebody").begin()
    assert "another compensator holds it" in failing.tick()
    refused = failing.run(run_config(DAY, attempt))
    assert (refused.status, failing.steps(refused)) == (dg.DagsterRunStatus.FAILURE, [("fence", False)])
    later = time.time() + 20
    monkeypatch.setattr(reconciling_module.time, "time", lambda: later)
    (asked,) = failing.tick()
    assert asked.run_key.endswith(" 1"), "one run of it was there before"


def test_a_compensation_that_cannot_be_started_is_tried_again_ever_more_slowly_and_not_given_up(failing, monkeypatch):
    """A code server that is down for a minute must not cost an hour."""
    attempt = failing.attempt()
    assert len(failing.tick()) == 1
    for pause in (10, 20, 40, 80, 160, 320, 600, 600, 600):
        run = dg.DagsterRun(
            job_name="loans_compensate",
            run_id=str(uuid.uuid4()),
            tags={"mao/attempt": attempt, "mao/workflow": DAY},
            status=dg.DagsterRunStatus.STARTING,
        )
        failing.instance.add_run(run)
        failing.instance.report_run_failed(run, "the code server is down")
        ended = failing.instance.get_run_record_by_id(run.run_id).end_time
        with monkeypatch.context() as clock:
            clock.setattr(reconciling_module.time, "time", lambda at=ended + pause - 1: at)
            assert "the next one starts in 1 s" in failing.tick()
        with monkeypatch.context() as clock:
            clock.setattr(reconciling_module.time, "time", lambda at=ended + pause + 1: at)
            assert len(failing.tick()) == 1


def test_for_how_long_silence_and_a_promised_retry_are_waited_out_is_declared(failing, monkeypatch):
    failing.attempt(run=False)
    failing.sensor = build_compensation_sensor(PIPELINE, silent_seconds=60)
    assert "no run of this instance" in failing.tick()
    later = time.time() + 61
    monkeypatch.setattr(reconciling_module.time, "time", lambda: later)
    assert len(failing.tick()) == 1


def test_what_is_no_run_here_is_left_alone_until_it_is_silent_for_long(failing, monkeypatch):
    failing.attempt(run=False)
    assert "no run of this instance" in failing.tick()
    later = time.time() + 3700
    monkeypatch.setattr(reconciling_module.time, "time", lambda: later)
    assert len(failing.tick()) == 1


def test_what_is_wrong_with_one_attempt_does_not_keep_another_waiting(failing, monkeypatch):
    broken, other = failing.attempt(), failing.attempt()
    honest = reconciling_module.ending

    def ending(instance, attempt, **patience):
        if attempt == broken:
            raise OSError("secret-4711")
        return honest(instance, attempt, **patience)

    monkeypatch.setattr(reconciling_module, "ending", ending)
    (asked,) = failing.tick()
    assert asked.tags["mao/attempt"] == other


def test_by_hand_it_takes_the_workflow_only(failing):
    nothing = failing.run(run_config(DAY, ""))
    assert (nothing.status, failing.steps(nothing)) == (dg.DagsterRunStatus.FAILURE, [("fence", False)])
    attempt = failing.attempt(dg.DagsterRunStatus.STARTED)
    done = failing.run(run_config(DAY, ""))
    assert (done.status, done.tags["mao/attempt"]) == (dg.DagsterRunStatus.SUCCESS, attempt)
    assert failing.bank.standing() == {}
    assert unfinished(failing.world.store, "loans") == []


def test_a_completed_attempt_is_left_alone(failing):
    failing.world.attempt("complete", AMOUNTS)
    done = failing.run(run_config(DAY, "complete"))
    assert (done.status, failing.steps(done)) == (dg.DagsterRunStatus.SUCCESS, [("fence", True)])
    assert failing.bank.standing() == expected(AMOUNTS)
