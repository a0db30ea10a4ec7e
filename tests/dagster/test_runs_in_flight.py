"""When an attempt is fenced, its runs in flight are terminated, and those of nobody else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.events import EngineEventData

import dagster_mao as mao
from dagster_mao.dagster.runs import BATCH_TAG
from tests.choreography.loans import Application, Ledger
from tests.dagster.noting_launcher import NotingLauncher
from tests.dagster.test_choreography_hybrid import Inquiry, applications, approval
from tests.dagster.theatre import Theatre
from tests.journal.bank import FencingBank


@mao.agent
def rating(ctx: mao.AgentContext, inquiry: mao.LazyFrame[Application], *, ledger: Ledger) -> mao.LazyFrame[Application]:
    ledger.note("rating", ctx.workflow_id)
    return inquiry


class Flight:
    """A theatre in which approvals fail while ratings are in flight."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance, together: int) -> None:
        bank = dg.ResourceDefinition.hardcoded_resource(FencingBank(folder / "bank.db"))
        agents = [Inquiry, rating, approval]
        batch = mao.MicroBatch(size=together, wait=0)
        pipeline = mao.Pipeline("loans", entry=applications, agents=agents, mode="hybrid", micro_batch=batch)
        self.theatre, self.instance = Theatre(folder, instance, pipeline, bank=bank), instance
        self.standing = FencingBank(folder / "bank.db").standing

    def arrive(self, *workflows: str) -> None:
        """They come in, and are inquired about."""
        self.theatre.arrive(*workflows, amounts=[100.0])
        for request in self.theatre.tick("inquiry"):
            assert self.theatre.launch(request).success

    def launched(self, agent: str, status: dg.DagsterRunStatus = dg.DagsterRunStatus.STARTED) -> list[str]:
        """What the agent's sensor asks for is launched, and is at work for ever."""
        runs = []
        for request in self.theatre.tick(agent):
            job = self.theatre.defs.resolve_job_def(f"loans__{agent}_job")
            runs.append(self.instance.create_run_for_job(job, tags=dict(request.tags), status=status).run_id)
        return runs

    def fail(self, *workflows: str) -> None:
        self.theatre.ledger.fail(*(f"approval loans/{workflow}" for workflow in workflows))
        for request in self.theatre.tick("approval"):
            self.theatre.launch(request)

    def compensate(self) -> list[dg.ExecuteInProcessResult]:
        return [self.theatre.launch(request) for request in self.theatre.tick("loans_compensation")]

    def status(self, *runs: str) -> list[str]:
        found = [self.instance.get_run_by_id(run) for run in runs]
        return [run.status.value for run in found if run is not None]


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    (tmp_path / "home").mkdir()
    launcher = {"module": "tests.dagster.noting_launcher", "class": "NotingLauncher"}
    with dg.DagsterInstance.local_temp(str(tmp_path / "home"), overrides={"run_launcher": launcher}) as instance:
        yield instance


@pytest.fixture
def flight(tmp_path: Path, instance: dg.DagsterInstance, request: pytest.FixtureRequest) -> Flight:
    return Flight(tmp_path, instance, getattr(request, "param", 1))


def test_what_is_in_flight_for_the_attempt_is_terminated_and_nothing_else(flight: Flight) -> None:
    flight.arrive("bad", "good")
    runs = flight.launched("rating")
    flight.fail("bad")
    bad, good = sorted(runs, key=lambda run: "mao/workflow.bad" not in flight.instance.get_run_by_id(run).tags)  # type: ignore[union-attr]
    (done,) = flight.compensate()
    assert done.success
    assert flight.status(bad, good) == ["CANCELED", "STARTED"]
    assert flight.standing() == {("inquiry", "A0"): 1}


@pytest.mark.parametrize("flight", [2], indirect=True)
def test_a_run_that_holds_other_workflows_too_goes_on(flight: Flight) -> None:
    flight.arrive("bad", "good")
    (both,) = flight.launched("rating")
    flight.fail("bad")
    (done,) = flight.compensate()
    assert done.success
    assert flight.status(both) == ["STARTED"]
    assert flight.standing() == {("inquiry", "A0"): 1}, "the fence stops the one"


def test_a_later_attempt_at_the_workflow_goes_on(flight: Flight) -> None:
    flight.arrive("bad")
    flight.fail("bad")
    flight.arrive("bad")  # late data: a new entry, and so another attempt
    (later,) = flight.launched("rating")
    (done,) = flight.compensate()
    assert done.success
    assert flight.status(later) == ["STARTED"]


def test_the_attempt_s_own_runs_are_terminated_where_somebody_asks_for_its_compensation(flight: Flight) -> None:
    job = flight.theatre.defs.resolve_job_def("loans_job")
    root = flight.instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED)
    mao.choreography.enter(flight.theatre.store, flight.theatre.pipeline, [{"id": "A0", "amount": 1.0}], workflow="w", run_id=root.run_id)
    for request in flight.theatre.tick("inquiry"):
        assert flight.theatre.launch(request).success
    flight.fail("w")
    flight.compensate()
    assert flight.status(root.run_id) == ["CANCELED"]
    assert flight.standing() == {}


def test_a_run_whose_process_is_gone_is_marked_as_canceled_by_whoever_sees_it(flight: Flight, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nobody to be asked, and nobody else would ever say so."""
    monkeypatch.setattr(NotingLauncher, "is_down", True)
    flight.arrive("bad")
    (run,) = flight.launched("rating")
    flight.fail("bad")
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    found = flight.instance.get_run_by_id(run)
    assert found is not None
    data = EngineEventData.in_process(process.pid)
    flight.instance.report_engine_event("Executing steps in process", found, data)
    (done,) = flight.compensate()
    assert done.success
    assert flight.status(run) == ["CANCELED"]


def test_a_run_that_cannot_be_reached_is_left_to_the_fence(flight: Flight, monkeypatch: pytest.MonkeyPatch) -> None:
    flight.arrive("bad")
    (run,) = flight.launched("rating")
    flight.fail("bad")
    monkeypatch.setattr(NotingLauncher, "is_down", True)
    (done,) = flight.compensate()
    assert done.success
    assert flight.status(run) == ["STARTED"]
    assert flight.standing() == {}
    told = "".join(str(entry) for entry in flight.instance.all_logs(done.run_id))
    assert "could not be terminated (ConnectionError)" in told
    assert "4711" not in told


def test_a_terminated_run_s_batch_is_handed_out_once_more_and_found_void(flight: Flight) -> None:
    flight.arrive("bad")
    (run,) = flight.launched("rating")
    flight.fail("bad")
    flight.compensate()
    assert flight.status(run) == ["CANCELED"]
    # The sensor sees that the run is over, then launches the batch under another key.
    (request,) = next(asked for _ in range(3) if (asked := flight.theatre.tick("rating")))
    assert request.tags[BATCH_TAG].endswith(".1")
    assert flight.theatre.launch(request).success
    assert flight.theatre.ledger.executions["rating loans/bad"] == 0
    assert flight.theatre.tick("rating") == []
