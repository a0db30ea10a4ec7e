"""Effects beside what else becomes of calls: records set aside, fallbacks, kept answers, outcomes that nobody knows, undos that hang."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import pytest
from pydantic import BaseModel, Field

import dagster_mao as mao
from dagster_mao.errors import StoreError
from dagster_mao.journal import Sagas
from dagster_mao.saga import Saga, sagas, unfinished
from tests.journal.bank import Bank
from tests.saga.test_effects import RECORDS, Application, Decision, pipeline, release, reserve

FOUR = RECORDS[:4]


@pytest.fixture
def state(tmp_path: Path) -> mao.StateStore:
    return mao.StateStore(tmp_path / "state")


@pytest.fixture
def ledger(tmp_path: Path) -> Bank:
    return Bank(tmp_path / "bank.db")


def funds(*records: str) -> dict[tuple[str, str], int]:
    return {("funds", record): 1 for record in records}


class Referred(BaseModel):
    id: Annotated[str, mao.Key]
    from_fallback: Annotated[bool, mao.FromFallback] = False


class Told(BaseModel):
    id: Annotated[str, mao.Key]
    told: str = Field(pattern="^funds")


def test_what_a_record_did_that_is_set_aside_stands_while_the_attempt_does_and_is_undone_with_it(
    state: mao.StateStore, ledger: Bank
) -> None:
    """Its call happened, whatever its output was worth: it is the batch that completes, or does not."""

    @mao.agent(compensate=release, quarantine=mao.Quarantine(max_share=0.5))
    def decide(ctx: mao.AgentContext, applications: Application, *, bank: Bank) -> Told:
        told = reserve(ctx, applications.id, bank)
        if applications.id == "A2":
            raise ValueError
        return Told.model_construct(id=applications.id, told="broken" if applications.id == "A3" else told)

    failing = [False]

    @mao.agent
    def last(decide: Told) -> Told:
        if failing[0]:
            raise RuntimeError
        return decide

    run: dict[str, Any] = {"store": state, "workflow": "day", "resources": {"bank": ledger}}
    result = mao.run(pipeline(decide, last), FOUR, **run)
    assert sorted(result["decide"]["id"]) == ["A1", "A4"]
    assert ledger.standing() == funds("A1", "A2", "A3", "A4")
    assert unfinished(state, "loans") == []
    failing[0] = True
    with pytest.raises(mao.AgentFailedError):
        mao.run(pipeline(decide, last), RECORDS[4:8], **{**run, "workflow": "other"})
    assert ledger.standing() == funds("A1", "A2", "A3", "A4"), "all four of the other workflow were undone, those set aside too"
    assert len(ledger.asked("cancel")) == 4


def test_an_effect_before_a_fallback_is_undone_with_the_attempt(state: mao.StateStore, ledger: Bank) -> None:
    """The call failed, and its fallback answered: what it had done by then is still its doing."""

    def refer(applications: Application) -> Referred:
        return Referred(id=applications.id)

    @mao.agent(compensate=release, policy=mao.Policy(fallback=refer, keep_answers=0))
    def decide(ctx: mao.AgentContext, applications: Application, *, bank: Bank) -> Referred:
        reserve(ctx, applications.id, bank)
        raise ConnectionError

    @mao.agent
    def last(decide: Referred) -> Referred:
        raise RuntimeError

    with pytest.raises(mao.AgentFailedError) as failed:
        mao.run(pipeline(decide, last), FOUR, store=state, resources={"bank": ledger})
    assert failed.value.agent == "last"
    assert failed.value.compensation.state == "compensated"
    assert (len(ledger.asked("do")), ledger.standing()) == (4, {})


def test_a_kept_answer_is_not_asked_for_again_and_its_effects_are_known_all_the_same(state: mao.StateStore, ledger: Bank) -> None:
    """A re-execution makes no call whose answer was kept; what that call did is undone with the attempt."""
    failing = [True]

    @mao.agent(compensate=release)
    def decide(ctx: mao.AgentContext, applications: Application, *, bank: Bank) -> Decision:
        told = reserve(ctx, applications.id, bank)
        if failing[0] and applications.id == "A3":
            raise ValueError
        return Decision(id=applications.id, told=told)

    run: dict[str, Any] = {"store": state, "workflow": "day", "resources": {"bank": ledger}, "compensate": False}
    with pytest.raises(mao.AgentFailedError):
        mao.run(pipeline(decide), FOUR, **run)
    (first,) = unfinished(state, "loans")
    failing[0] = False
    mao.run(pipeline(decide), FOUR, **run)
    asked = ledger.asked("do")
    assert len(asked) == len(set(asked)) == 4, "the epoch is the same: A1, A2 and A3 are found done"
    assert ledger.standing() == funds("A1", "A2", "A3", "A4")
    taken_over = Saga(state, pipeline(decide), "loans/day", first.attempt, resources={"bank": ledger})
    assert taken_over.run().state == "compensated"
    assert ledger.standing() == funds("A1", "A2", "A3", "A4"), "the attempt that completed counts on them: they are its own now"
    assert ledger.asked("cancel") == []
    assert unfinished(state, "loans") == []
    # And being its own, they go when it is superseded: the fence has moved the epoch on, so all four are had under new keys.
    changed = [*FOUR[:3], {"id": "A4", "amount": 7}]
    mao.run(pipeline(decide), changed, **run)
    (old,) = unfinished(state, "loans")
    Saga(state, pipeline(decide), "loans/day", old.attempt, superseded_by=old.superseded_by, resources={"bank": ledger}).run()
    assert ledger.standing() == funds("A1", "A2", "A3", "A4")
    cancelled = ledger.asked("cancel")
    assert sorted(cancelled) == sorted(asked)
    assert [key for key in cancelled if key in asked[:3]] == asked[2::-1], "what was taken over is undone newest first, too"


def test_effects_of_a_batch_are_taken_over_too(state: mao.StateStore, ledger: Bank) -> None:
    failing = [True]

    @mao.agent(compensate=release)
    def decide(ctx: mao.AgentContext, applications: mao.DataFrame[Application], *, bank: Bank) -> mao.DataFrame[Decision]:
        told = ctx.effects("funds", lambda e: bank.do(e.key, "funds", e.record, e.epoch), applications, key="id")
        if failing[0]:
            raise ValueError
        return applications.select("id", told=pl.col("id").replace_strict(told))

    run: dict[str, Any] = {"store": state, "workflow": "day", "resources": {"bank": ledger}, "compensate": False}
    with pytest.raises(mao.AgentFailedError):
        mao.run(pipeline(decide), FOUR, **run)
    (first,) = unfinished(state, "loans")
    failing[0] = False
    mao.run(pipeline(decide), FOUR[:3], **run)
    assert len(ledger.asked("do")) == 4
    assert Saga(state, pipeline(decide), "loans/day", first.attempt, resources={"bank": ledger}).run().state == "compensated"
    assert ledger.standing() == funds("A1", "A2", "A3"), "what the completed attempt needs stays, the fourth goes"


def test_what_raised_may_have_happened_and_is_undone_as_unknown(state: mao.StateStore, ledger: Bank) -> None:
    seen = list[mao.Effect]()

    def look(undo: mao.Undo, *, bank: Bank) -> None:
        seen.extend(undo.effects)
        release(undo, bank=bank)

    @mao.agent(compensate=look, policy=mao.Policy(timeout=20, keep_answers=0))
    def decide(ctx: mao.AgentContext, applications: Application, *, bank: Bank) -> Decision:
        def answer_lost(effect: mao.Effect) -> None:
            bank.do(effect.key, "funds", effect.record, effect.epoch)
            raise ConnectionError

        ctx.effect("funds", answer_lost, compares_epoch=True)
        raise AssertionError

    with pytest.raises(mao.AgentFailedError):
        mao.run(pipeline(decide), FOUR[:1], store=state, resources={"bank": ledger})
    assert [(effect.record, effect.state, effect.result) for effect in seen] == [("A1", "unknown", None)]
    assert ledger.standing() == {}


def test_an_undo_that_hangs_is_ended_by_its_timeout_and_stops_no_other(state: mao.StateStore, ledger: Bank) -> None:
    def hang(undo: mao.Undo) -> None:
        time.sleep(3600)

    @mao.agent(compensate=hang, undo_policy=mao.Policy(timeout=0.2))
    def second(ctx: mao.AgentContext, first: Decision, *, bank: Bank) -> Decision:
        ctx.effect("offer", lambda effect: bank.do(effect.key, "offer", first.id, effect.epoch))
        raise ValueError

    @mao.agent(compensate=release)
    def first(ctx: mao.AgentContext, applications: Application, *, bank: Bank) -> Decision:
        return Decision(id=applications.id, told=reserve(ctx, applications.id, bank))

    with pytest.raises(mao.AgentFailedError) as failed:
        mao.run(pipeline(first, second), FOUR[:1], store=state, resources={"bank": ledger})
    assert [(left.agent, left.error) for left in failed.value.compensation.left] == [("second", "CallTimeoutError")]
    assert ledger.standing() == {("offer", "A1"): 1}


def test_branches_are_undone_in_the_reverse_order_of_their_seals_and_what_failed_first(state: mao.StateStore, ledger: Bank) -> None:
    """left and right read the same; below them sits the one that fails. What was sealed last is undone before what was sealed first."""
    order = list[str]()

    def branch(agent_name: str, *, fails: bool = False) -> Any:
        def undone(undo: mao.Undo) -> None:
            order.append(undo.agent)

        def act(ctx: mao.AgentContext, record: str) -> Decision:
            ctx.effect("funds", lambda effect: None)
            if fails:
                raise ValueError
            return Decision(id=record, told="")

        return undone, act

    undone, act = branch("left")

    @mao.agent(compensate=undone)
    def left(ctx: mao.AgentContext, applications: Application) -> Decision:
        return act(ctx, applications.id)

    @mao.agent(compensate=undone)
    def right(ctx: mao.AgentContext, applications: Application) -> Decision:
        return act(ctx, applications.id)

    _, fail = branch("below", fails=True)

    @mao.agent(compensate=undone)
    def below(ctx: mao.AgentContext, left: Decision, right: Decision) -> Decision:
        return fail(ctx, left.id)

    with pytest.raises(mao.AgentFailedError):
        mao.run(pipeline(left, right, below), FOUR[:1], store=state, workflow="day")
    sealed = [seal.agent for seal in state.seals("loans/day") if seal.agent in ("left", "right")]
    assert order == ["below", *sealed[::-1]]


def test_what_cannot_be_marked_now_is_looked_at_again(state: mao.StateStore, ledger: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """A database that takes no writes just now costs the sensor no tick."""

    @mao.agent(compensate=release)
    def decide(ctx: mao.AgentContext, applications: Application, *, bank: Bank) -> Decision:
        return Decision(id=applications.id, told=reserve(ctx, applications.id, bank))

    mao.run(pipeline(decide), FOUR[:1], store=state, resources={"bank": ledger})

    def locked(*_: object) -> None:
        raise StoreError("The shared database cannot be used", fix="wait")

    with monkeypatch.context() as now:
        now.setattr(Sagas, "settle", locked)
        assert unfinished(state, "loans") == []
    assert unfinished(state, "loans") == []
    assert sagas(state, "loans") == []
