"""Hybrid mode under a real daemon and two code locations: a failure in one stops the other's run, and is undone in both."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest

from dagster_mao.choreography import enter
from dagster_mao.saga import sagas
from dagster_mao.state import StateStore
from tests.choreography.loans import batch
from tests.dagster.deployment import deployed, until
from tests.dagster.hybrid_stage import FOLDER, PATIENCE, loans
from tests.journal.bank import FencingBank

MODULES = ["tests.dagster.hybrid_stage", "tests.dagster.hybrid_stage_elsewhere"]


@pytest.mark.long
@pytest.mark.timeout(2 * PATIENCE)
def test_a_failure_in_one_code_location_stops_the_other_s_run_and_is_undone_in_both(tmp_path: Path) -> None:
    store, bank = StateStore(tmp_path / "state"), FencingBank(tmp_path / "bank.db")
    enter(store, loans(), batch(100.0, 200.0), workflow="w")
    with deployed(tmp_path / "home", MODULES, {FOLDER: str(tmp_path)}) as deployment:

        def runs(job: str) -> list[dg.DagsterRun]:
            return list(deployment.instance.get_runs(dg.RunsFilter(job_name=job)))

        until(lambda: [one for one in sagas(store, "loans") if one.state == "compensated"], "the end of the compensation", PATIENCE)
        until(lambda: all(run.is_finished for run in deployment.instance.get_runs()), "the end of all runs", PATIENCE)
        stopped, compensations = runs("loans__rating_job"), runs("loans_compensate")
        locations = [one.remote_job_origin.repository_origin.code_location_origin.location_name for one in compensations]  # type: ignore[union-attr]
    assert stopped[-1].status == dg.DagsterRunStatus.CANCELED
    assert "mao/compensates" in compensations[0].tags
    assert locations[::-1] == ["tests.dagster.hybrid_stage_elsewhere", "tests.dagster.hybrid_stage"], "who comes last is undone first"
    assert bank.standing() == {}
    assert set(bank.asked("do")) == set(bank.asked("cancel")), "each was had, and undone"
    assert [seal.kind for seal in store.seals("loans/w")] == ["entry", "output", "fence", "compensated"]
