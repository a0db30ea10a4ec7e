"""How subscribers stand, in the UI: a check of each one's asset, told when it changes, whatever runs or does not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

import dagster_mao as mao
from dagster_mao.gateway import shared_store
from tests.choreography.loans import loans
from tests.dagster.theatre import EAGER, Theatre


@pytest.fixture
def theatre(tmp_path: Path) -> Any:
    with dg.DagsterInstance.ephemeral() as instance:
        yield Theatre(tmp_path, instance, loans(micro_batch=EAGER, inbox=mao.MicroBatch(size=2, wait=0)))


def told(theatre: Theatre, agent: str) -> tuple[bool, dict[str, Any]]:
    check = theatre.check(agent, "lag")
    return check.passed, {name: value.value for name, value in check.metadata.items()}


def test_what_is_due_is_told_when_it_changes_and_not_again(theatre: Theatre) -> None:
    theatre.tick("lag")
    before = theatre.check("score", "lag")
    assert (before.passed, before.metadata["due"].value) == (True, 0)
    theatre.arrive("w1", "w2")
    theatre.tick("lag")
    assert told(theatre, "score")[1]["due"] == 2
    count = len(theatre.instance.event_log_storage.get_asset_check_execution_history(key(theatre, "score"), limit=50))
    theatre.tick("lag")
    assert len(theatre.instance.event_log_storage.get_asset_check_execution_history(key(theatre, "score"), limit=50)) == count


def test_a_join_that_is_stuck_names_the_workflow_and_what_is_missing(theatre: Theatre) -> None:
    theatre.arrive("w1")
    theatre.ledger.fail("income loans/w1")
    theatre.play()
    theatre.tick("lag")
    assert not told(theatre, "risk")[0]
    assert [(row.data["workflow"], row.data["missing"]) for row in theatre.check("risk", "lag").metadata["stuck"].records] == [
        ("loans/w1", "income")
    ]
    assert "loans/w1 waits for income" in theatre.check("risk", "lag").description
    passed, facts = told(theatre, "income")
    assert (passed, facts["failed"], facts["errors"]) == (False, 1, {"AgentFailedError": 1})
    assert "risk" in str(theatre.reasons["lag"])


def test_a_subscriber_that_nobody_looks_after_is_dead(theatre: Theatre, monkeypatch: pytest.MonkeyPatch) -> None:
    theatre.tick("score")
    database = shared_store(str(theatre.store.database))
    clock = database._clock
    monkeypatch.setattr(database, "_clock", lambda: clock() + 100)
    theatre.tick("lag")
    check = theatre.check("score", "lag")
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.ERROR)
    assert "nobody has looked since" in check.description
    theatre.tick("score")
    theatre.tick("lag")
    assert theatre.check("score", "lag").passed


def test_an_agent_of_another_code_location_that_was_never_seen_is_told_by_the_last_one_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever names one that nobody runs has attempts that never count, and the others' checks pass."""
    with dg.DagsterInstance.ephemeral() as instance:
        theatre = Theatre(tmp_path, instance, loans("hybrid", elsewhere=["letter"], micro_batch=EAGER))
        theatre.arrive("w1")
        theatre.play()
        theatre.tick("lag")
        check = theatre.check("approval", "lag")
        assert (check.passed, check.metadata["elsewhere"].value) == (True, {"letter": 1})
        assert "letter, which runs elsewhere, has never been seen: 1 workflow waits for it." in check.description
        assert "letter" not in theatre.check("risk", "lag").description
        database = shared_store(str(theatre.store.database))
        clock = database._clock
        monkeypatch.setattr(database, "_clock", lambda: clock() + 1000)
        for agent in ("score", "income", "risk", "approval"):
            theatre.tick(agent)
        theatre.tick("lag")
        check = theatre.check("approval", "lag")
        assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.ERROR)
        assert theatre.check("risk", "lag").passed
        assert "letter, which runs elsewhere, has never been seen" in str(theatre.reasons["lag"])


def test_executed_by_hand_it_looks_now(theatre: Theatre) -> None:
    theatre.arrive("w1")
    job = theatre.defs.resolve_implicit_global_asset_job_def()
    selected = job.get_subset(asset_selection=set(), asset_check_selection={key(theatre, "score"), key(theatre, "applications")})
    assert selected.execute_in_process(instance=theatre.instance, resources=None).success
    assert told(theatre, "score")[1]["due"] == 1
    entered = theatre.defs.resolve_job_def("loans_job").execute_in_process(instance=theatre.instance)
    assert "lag" not in {told.check_name for told in entered.get_asset_check_evaluations()}, "no part of a batch's run"


def key(theatre: Theatre, agent: str) -> dg.AssetCheckKey:
    return dg.AssetCheckKey(dg.AssetKey([theatre.pipeline.name, agent]), "lag")
