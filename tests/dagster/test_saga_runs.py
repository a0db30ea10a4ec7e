"""From a real run that fails to its compensation and beyond: the hook, the sensor, the check, a re-execution, a new run."""

import dagster as dg
import pytest
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.execution.api import create_execution_plan, execute_run

import dagster_mao as mao
from dagster_mao.saga import sagas, unfinished
from tests.dagster import bookings
from tests.journal.bank import Bank

ALL = {(kind, record): 1 for kind in ("booking", "letter") for record in ("A1", "A2")}


class Office:
    """What lies in the folder, and the Dagster that works on it."""

    def __init__(self, folder, instance):
        self.folder, self.instance, self.bank = folder, instance, Bank(folder / "bank.db")
        self.store = mao.StateStore(folder / "state")
        self.outage = folder / "outage"
        self.defs = bookings.definitions()

    def run(self, parent=None):
        again = dg.ReexecutionOptions.from_failure(parent.run_id, self.instance) if parent else None
        return dg.execute_job(dg.reconstructable(bookings.bookings_job), instance=self.instance, reexecution_options=again)

    def tick(self):
        repository = self.defs.get_repository_def()
        resources = {"state_store": mao.StateStoreResource(root=str(self.folder / "state"))}
        with dg.build_sensor_context(instance=self.instance, repository_def=repository, resources=resources) as context:
            told = repository.get_sensor_def("bookings_compensation").evaluate_tick(context)
        return told.run_requests or told.skip_message

    def compensate(self):
        (asked,) = self.tick()
        job = self.defs.resolve_job_def("bookings_compensate")
        plan = create_execution_plan(job, asked.run_config)
        run = self.instance.create_run_for_job(job_def=job, run_config=asked.run_config, execution_plan=plan, tags=asked.tags)
        execute_run(InMemoryJob(job), run, self.instance)
        return self.instance.get_run_by_id(run.run_id)

    def check(self, agent):
        key = dg.AssetCheckKey(dg.AssetKey(["bookings", agent]), "compensated")
        found = self.instance.event_log_storage.get_latest_asset_check_execution_by_key([key]).get(key)
        return found and found.event.dagster_event.asset_check_evaluation_data

    def error_of(self, result, step):
        (failed,) = [event for event in result.all_events if event.event_type_value == "STEP_FAILURE" and event.step_key == step]
        return failed.step_failure_data.error.to_string()


@pytest.fixture
def office(tmp_path, monkeypatch):
    monkeypatch.setenv(bookings.FOLDER, str(tmp_path))
    monkeypatch.setenv("BOOKINGS_STATE", str(tmp_path / "state"))
    (tmp_path / "home").mkdir()
    (tmp_path / "outage").touch()
    with dg.DagsterInstance.local_temp(str(tmp_path / "home")) as instance:
        yield Office(tmp_path, instance)


def test_a_failing_run_asks_by_its_hook_is_compensated_and_cannot_be_gone_on_with(office):
    failed = office.run()
    assert not failed.success
    assert office.bank.standing() == ALL, "the hook undoes nothing: siblings may still run"
    (told,) = unfinished(office.store, "bookings")
    assert (told.state, told.attempt, told.why) == ("requested", failed.run_id, "ConnectionError")
    assert [one.requested_by for one in sagas(office.store, "bookings")] == [failed.run_id]

    done = office.compensate()
    assert done.status == dg.DagsterRunStatus.SUCCESS
    assert office.bank.standing() == {}
    for agent in ("booking", "letter"):
        assert office.check(agent).passed
        assert office.check(agent).metadata["undone"].value == 2
    assert office.check("applications") is None, "it has no effects"
    assert office.tick() == "Nothing is to be compensated."

    office.outage.unlink()
    again = office.run(parent=failed)
    assert not again.success
    said = office.error_of(again, "bookings__letter")
    assert "FencedError" in said
    assert "start a new run" in said
    assert office.bank.standing() == {}
    assert office.tick() == "Nothing is to be compensated.", "the refused one did nothing"

    assert office.run().success
    assert office.bank.standing() == ALL
    assert office.tick() == "Nothing is to be compensated."


def test_re_executed_in_time_the_attempt_completes_and_nothing_is_undone(office):
    """Retries come first: what the hook asked for is void when one succeeds."""
    failed = office.run()
    office.outage.unlink()
    assert office.run(parent=failed).success
    assert office.bank.standing() == ALL
    assert office.tick() == "Nothing is to be compensated."
    assert [one.state for one in sagas(office.store, "bookings")] == ["void"]
    assert len(office.bank.asked("do")) == 4, "what was done before is found done"


def test_agents_with_effects_have_the_check_and_others_do_not(office):
    names = {key.to_user_string() for key in office.defs.resolve_asset_graph().asset_check_keys}
    assert {name for name in names if name.endswith(":compensated")} == {"bookings/booking:compensated", "bookings/letter:compensated"}
