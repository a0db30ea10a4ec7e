"""Events that were submitted become workflows, by a sensor and a run each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

import dagster_mao as mao
from dagster_mao.choreography import submit
from tests.choreography.loans import loans, once
from tests.dagster.theatre import EAGER, Theatre


@pytest.fixture
def theatre(tmp_path: Path) -> Any:
    with dg.DagsterInstance.ephemeral() as instance:
        yield Theatre(tmp_path, instance, loans(micro_batch=EAGER, inbox=mao.MicroBatch(size=2, wait=0)))


def intake(theatre: Theatre) -> list[dg.ExecuteInProcessResult]:
    return [theatre.launch(request) for request in theatre.tick("inbox")]


def events(*names: str, amount: float = 100.0) -> list[dict[str, Any]]:
    return [{"id": name, "amount": amount} for name in names]


def test_events_are_cut_into_workflows_which_are_decided(theatre: Theatre) -> None:
    submit(theatre.store, theatre.pipeline, events("a", "b", "c"))
    taken_in = intake(theatre)
    assert [run.success for run in taken_in] == [True, True]
    assert intake(theatre) == []
    workflows = theatre.store.workflows("loans")
    assert len(workflows) == 2
    assert sum(theatre.store.seals(workflow)[0].row_count for workflow in workflows) == 3
    told = theatre.materializations("applications")
    assert {one["mao/state_version"] for one in told} == {f"{workflow}@0" for workflow in workflows}
    theatre.play()
    assert theatre.sealed() == once(*(workflow.removeprefix("loans/") for workflow in workflows))
    key = f"mao/workflow.{workflows[0].removeprefix('loans/')}"
    assert len(theatre.instance.get_runs(dg.RunsFilter(tags={key: "loans"}))) == 5


def test_a_bad_event_goes_to_quarantine_and_holds_up_no_other(theatre: Theatre) -> None:
    submit(theatre.store, theatre.pipeline, [*events("good"), *events("bad", amount=-1.0)])
    (run,) = intake(theatre)
    assert run.success
    (workflow,) = theatre.store.workflows("loans")
    entry = theatre.store.seals(workflow)[0]
    assert (entry.row_count, entry.quarantined) == (1, 1)
    check = theatre.check("applications", "output")
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert theatre.materializations("applications_quarantine")[0]["mao/quarantined"] == 1


def test_events_whose_run_died_are_handed_out_again_the_same(theatre: Theatre) -> None:
    submit(theatre.store, theatre.pipeline, events("a", "b"))
    (request,) = theatre.tick("inbox")
    died = theatre.instance.create_run_for_job(theatre.defs.resolve_job_def("loans__inbox_job"), tags=request.tags)
    theatre.instance.report_run_failed(died)
    assert theatre.tick("inbox") == []
    (again,) = theatre.tick("inbox")
    assert theatre.launch(again).success
    assert theatre.launch(request).success, "what it was launched for is done"
    (workflow,) = theatre.store.workflows("loans")
    assert theatre.store.seals(workflow)[0].row_count == 2


def test_an_inbox_where_nobody_starts_the_agents_is_an_error_at_load(tmp_path: Path) -> None:
    with dg.DagsterInstance.ephemeral() as instance, pytest.raises(mao.WiringError, match="nobody starts its agents"):
        Theatre(tmp_path, instance, loans("orchestration", inbox=mao.MicroBatch(size=2)))
