"""Choreography with effects: where an agent fails, what the attempt did in all its runs is undone, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

import dagster_mao as mao
from dagster_mao.choreography import enter
from dagster_mao.review.quarantine import refusals
from dagster_mao.state.log import StateLog
from tests.choreography.loans import Application, Decision, Ledger, applications, batch
from tests.dagster.theatre import EAGER, Theatre
from tests.journal.bank import FencingBank


class Inquiry(mao.Agent):
    """Asks about each applicant, which others can see."""

    def execute(self, ctx: mao.AgentContext, applications: Application, *, bank: FencingBank) -> Application:
        ctx.effect("inquiry", lambda effect: bank.do(effect.key, "inquiry", applications.id, effect.epoch), compares_epoch=True)
        return applications

    def compensate(self, undo: mao.Undo, *, bank: FencingBank) -> None:
        for effect in undo.effects:
            bank.cancel(effect.key, undo.epoch)


@mao.agent
def approval(ctx: mao.AgentContext, inquiry: mao.LazyFrame[Application], *, ledger: Ledger) -> mao.LazyFrame[Decision]:
    ledger.note("approval", ctx.workflow_id)
    return inquiry.select("id", approved=True)


def hybrid(**declared: Any) -> mao.Pipeline:
    return mao.Pipeline("loans", entry=applications, agents=[Inquiry, approval], mode="hybrid", micro_batch=EAGER, **declared)


@pytest.fixture
def theatre(tmp_path: Path) -> Any:
    with dg.DagsterInstance.ephemeral() as instance:
        bank = FencingBank(tmp_path / "bank.db")
        yield Theatre(tmp_path, instance, hybrid(), bank=dg.ResourceDefinition.hardcoded_resource(bank))


def standing(theatre: Theatre) -> dict[tuple[str, str], int]:
    bank: FencingBank = theatre.given["bank"].resource_fn(None)
    return bank.standing()


def compensate(theatre: Theatre) -> list[dg.ExecuteInProcessResult]:
    return [theatre.launch(request) for request in theatre.tick("loans_compensation")]


def test_a_failure_in_one_agent_s_run_undoes_what_another_s_run_did_for_that_workflow(theatre: Theatre) -> None:
    theatre.arrive("good", amounts=[100.0])
    theatre.arrive("bad", amounts=[100.0, 200.0])
    theatre.ledger.fail("approval loans/bad")
    results = theatre.play()
    assert [run.success for run in results["inquiry"]] == [True], "both in one run"
    assert standing(theatre) == {("inquiry", "A0"): 2, ("inquiry", "A1"): 1}
    (done,) = compensate(theatre)
    assert done.success
    assert standing(theatre) == {("inquiry", "A0"): 1}, "the good workflow's stays"
    kinds = {workflow: [seal.kind for seal in theatre.store.seals(f"loans/{workflow}")] for workflow in ("good", "bad")}
    assert kinds == {"good": ["entry", "output", "output"], "bad": ["entry", "output", "fence", "compensated"]}
    assert theatre.store.effective("loans/bad") == {}
    assert theatre.tick("loans_compensation") == []
    assert theatre.play() == {}, "what was fenced is nobody's any more"


def test_an_attempt_that_goes_on_is_left_alone(theatre: Theatre) -> None:
    """Its entry's run succeeded, and so did that of its first agent: the next is yet to be started."""
    entered = theatre.defs.resolve_job_def("loans_job").execute_in_process(instance=theatre.instance)
    theatre.arrive("w1", amounts=[100.0])
    (request,) = theatre.tick("inquiry")
    assert theatre.launch(request).success
    assert theatre.tick("loans_compensation") == []
    assert entered.success
    theatre.play()
    assert theatre.tick("loans_compensation") == []
    assert standing(theatre) == {("inquiry", "A0"): 1}
    assert theatre.store.effective("loans/w1").keys() == {"applications", "inquiry", "approval"}


def test_the_entry_s_run_begins_an_attempt_of_all_agents(theatre: Theatre) -> None:
    assert theatre.defs.resolve_job_def("loans_job").execute_in_process(instance=theatre.instance).success
    (workflow,) = theatre.store.workflows("loans")
    (entry,) = theatre.store.seals(workflow)
    assert set(entry.plan) == {"applications", "inquiry", "approval"}
    assert theatre.store.effective(workflow) == {}, "half an attempt does not count"


def test_side_effects_in_plain_choreography_are_an_error_at_load() -> None:
    with pytest.raises(mao.WiringError, match="side effects"):
        mao.Pipeline("loans", entry=applications, agents=[Inquiry, approval], mode="choreography")


def test_an_attempt_whose_own_run_was_killed_is_found_though_nobody_asked(theatre: Theatre) -> None:
    root = theatre.instance.create_run_for_job(theatre.defs.resolve_job_def("loans_job"), status=dg.DagsterRunStatus.FAILURE)
    enter(theatre.store, theatre.pipeline, batch(100.0), workflow="w1", run_id=root.run_id)
    theatre.arrive("w2", amounts=[100.0])
    for request in theatre.tick("inquiry"):
        assert theatre.launch(request).success
    (done,) = compensate(theatre)
    assert done.success
    assert standing(theatre) == {("inquiry", "A0"): 1}, "the other goes on"


def test_attempts_that_go_on_are_asked_about_together_and_not_one_by_one(theatre: Theatre, monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be thousands, at each tick, of which nothing is to be said."""
    asked = list[str]()
    for owner, name in ((StateLog, "open"), (dg.DagsterInstance, "get_runs"), (dg.DagsterInstance, "get_run_records")):
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *given, _of=original, _name=name, **named: asked.append(_name) or _of(*given, **named))

    def counts(workflows: int) -> list[str]:
        theatre.arrive(*(f"{workflows}-{number}" for number in range(workflows)), amounts=[100.0])
        for request in theatre.tick("inquiry"):
            assert theatre.launch(request).success
        asked.clear()
        assert theatre.tick("loans_compensation") == []
        return list(asked)

    few = counts(1)
    assert counts(8) == few
    assert "9 attempts: its agents are at work" in str(theatre.reasons["loans_compensation"])


# -- corrected and late ones ---------------------------------------------------------------------------------------------------------


def decided_on(theatre: Theatre, workflow: str) -> dict[str | None, str]:
    return {refusal.key: refusal.status for refusal in refusals(theatre.store, workflow)}


def test_a_failure_below_a_corrected_record_undoes_what_was_done_for_it_and_the_record_waits_again(theatre: Theatre) -> None:
    theatre.arrive("w1", amounts=[100.0, -5.0])
    theatre.play()
    before = theatre.store.effective("loans/w1")
    assert standing(theatre) == {("inquiry", "A0"): 1}
    done = mao.resubmit(theatre.pipeline, theatre.store, "loans/w1", {"A1": {"amount": 200}})
    assert set(done.entry.plan) == {"applications", "inquiry", "approval"}
    theatre.ledger.fail("approval loans/w1")
    theatre.play()
    assert standing(theatre) == {("inquiry", "A0"): 1, ("inquiry", "A1"): 1}
    assert decided_on(theatre, "loans/w1") == {"A1": "resubmitted"}
    (compensation,) = compensate(theatre)
    assert compensation.success
    assert standing(theatre) == {("inquiry", "A0"): 1}, "what the attempt before did stands"
    assert theatre.store.effective("loans/w1") == before
    assert decided_on(theatre, "loans/w1") == {"A1": "open"}, "nothing became of its correction"
    theatre.ledger.fail()
    mao.resubmit(theatre.pipeline, theatre.store, "loans/w1", {"A1": {"amount": 300}})
    theatre.play()
    assert [run.success for run in compensate(theatre)] == [True], "after a fence all is done anew, and what was done before is undone"
    assert standing(theatre) == {("inquiry", "A0"): 1, ("inquiry", "A1"): 1}
    state = theatre.store.effective("loans/w1")
    assert theatre.store.read(state["approval"]).collect()["id"].to_list() == ["A0", "A1"]
    assert decided_on(theatre, "loans/w1") == {}


def test_a_second_correction_starts_from_the_first_though_that_one_does_not_count_yet(theatre: Theatre) -> None:
    """The naive one starts from what counts, and the first correction is gone."""
    theatre.arrive("w1", amounts=[100.0, -5.0, -6.0])
    theatre.play()
    mao.resubmit(theatre.pipeline, theatre.store, "loans/w1", {"A1": {"amount": 200}})
    for request in theatre.tick("inquiry"):
        assert theatre.launch(request).success
    mao.resubmit(theatre.pipeline, theatre.store, "loans/w1", {"A2": {"amount": 300}})
    assert decided_on(theatre, "loans/w1") == {"A1": "resubmitted", "A2": "resubmitted"}
    mao.resubmit(theatre.pipeline, theatre.store, "loans/w1", {"A1": {"amount": 250}})
    theatre.play()
    entry = theatre.store.effective("loans/w1")["applications"]
    assert dict(theatre.store.read(entry).select("id", "amount").collect().rows()) == {"A0": 100.0, "A1": 250.0, "A2": 300.0}
    assert decided_on(theatre, "loans/w1") == {}


def test_what_an_attempt_did_that_later_data_replaced_midway_is_undone_once_that_is_through(theatre: Theatre) -> None:
    """None of its runs failed, and it never completes: the naive sensor waits for ever."""
    theatre.arrive("w1", amounts=[100.0, 200.0])
    for request in theatre.tick("inquiry"):
        assert theatre.launch(request).success
    assert standing(theatre) == {("inquiry", "A0"): 1, ("inquiry", "A1"): 1}
    theatre.arrive("w1", amounts=[100.0, 250.0])
    assert theatre.tick("loans_compensation") == [], "what it did may be needed by what replaces it"
    theatre.play()
    assert theatre.store.effective("loans/w1").keys() == {"applications", "inquiry", "approval"}
    assert standing(theatre) == {("inquiry", "A0"): 1, ("inquiry", "A1"): 2}
    before = theatre.store.effective("loans/w1")
    (compensation,) = compensate(theatre)
    assert compensation.success
    assert standing(theatre) == {("inquiry", "A0"): 1, ("inquiry", "A1"): 1}
    assert theatre.store.effective("loans/w1") == before
    assert theatre.tick("loans_compensation") == []
