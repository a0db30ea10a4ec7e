"""Effects as an author writes them, through the whole of `mao.run`: in place, in threads, as tasks, in child processes, in batches."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import pytest
from pydantic import BaseModel

import dagster_mao as mao
from dagster_mao.saga import Saga, sagas, unfinished
from tests.journal.bank import Bank, FencingBank

RECORDS = [{"id": f"A{n}", "amount": n * 100} for n in range(1, 41)]
ALL = {("funds", record["id"]): 1 for record in RECORDS}


class Application(BaseModel):
    id: Annotated[str, mao.Key]
    amount: int


class Decision(BaseModel):
    id: Annotated[str, mao.Key]
    told: str


@mao.agent
def applications() -> list[Application]:
    raise NotImplementedError


def release(undo: mao.Undo, *, bank: Bank) -> None:
    for effect in undo.effects:
        bank.cancel(effect.key, undo.epoch)


def reserve(ctx: mao.AgentContext, record: str, bank: Bank) -> str:
    told: str = ctx.effect("funds", lambda effect: bank.do(effect.key, "funds", record, effect.epoch), compares_epoch=bank.compares_epoch)
    return told


@mao.agent(compensate=release)
def in_place(ctx: mao.AgentContext, applications: Application, *, bank: Bank, fails: str) -> Decision:
    told = reserve(ctx, applications.id, bank)
    if applications.id == fails:
        raise ValueError
    return Decision(id=applications.id, told=told)


@mao.agent(compensate=release, concurrency=8)
def in_threads(ctx: mao.AgentContext, applications: Application, *, bank: Bank, fails: str) -> Decision:
    told = reserve(ctx, applications.id, Bank(bank.path))
    if applications.id == fails:
        raise ValueError
    return Decision(id=applications.id, told=told)


async def arelease(undo: mao.Undo, *, bank: Bank) -> None:
    await asyncio.sleep(0)
    release(undo, bank=bank)


@mao.agent(compensate=arelease, concurrency=8)
async def as_tasks(ctx: mao.AgentContext, applications: Application, *, bank: Bank, fails: str) -> Decision:
    async def do(effect: mao.Effect) -> str:
        await asyncio.sleep(0.001)
        return bank.do(effect.key, "funds", applications.id, effect.epoch)

    told = await ctx.effect("funds", do)
    if applications.id == fails:
        raise ValueError
    return Decision(id=applications.id, told=told)


@mao.agent(compensate=release)
def by_frame(ctx: mao.AgentContext, applications: mao.DataFrame[Application], *, bank: Bank, fails: str) -> mao.DataFrame[Decision]:
    def do(effect: mao.Effect) -> str:
        told = bank.do(effect.key, "funds", effect.record, effect.epoch)
        if effect.record == fails:
            raise ValueError
        return told

    told = ctx.effects("funds", do, applications, key="id")
    return applications.select("id", told=pl.col("id").replace_strict(told))


@mao.agent(compensate=release)
def in_parts(ctx: mao.AgentContext, applications: mao.DataFrame[Application], *, bank: Bank, fails: str) -> mao.DataFrame[Decision]:
    def do(effects: list[mao.Effect]) -> list[str]:
        told = [bank.do(effect.key, "funds", effect.record, effect.epoch) for effect in effects]
        if fails in [effect.record for effect in effects]:
            raise ValueError
        return told

    told = ctx.effects("funds", do, applications, key="id", in_batches_of=7)
    return applications.select("id", told=pl.col("id").replace_strict(told))


class InAChild(mao.Agent):
    policy = mao.Policy(timeout=60, isolate=True, retries=1, transient=(ValueError,), keep_answers=0)

    def execute(self, ctx: mao.AgentContext, applications: Application, *, bank: Bank, fails: str) -> Decision:
        told = reserve(ctx, applications.id, bank)
        if applications.id == fails:
            raise ValueError
        return Decision(id=applications.id, told=told)

    def compensate(self, undo: mao.Undo, *, bank: Bank) -> None:
        release(undo, bank=bank)


KINDS = [in_place, in_threads, as_tasks, by_frame, in_parts, InAChild()]


@pytest.fixture
def state(tmp_path: Path) -> mao.StateStore:
    return mao.StateStore(tmp_path / "state")


def pipeline(*agents: Any) -> mao.Pipeline:
    return mao.Pipeline("loans", entry=applications, agents=agents)


def standing_within(part: dict[Any, int], whole: dict[Any, int]) -> bool:
    return part.items() <= whole.items()


@pytest.mark.parametrize("agent", KINDS, ids=lambda agent: agent.name)
def test_a_failure_is_undone_and_the_next_run_has_each_effect_once(agent: mao.Agent, state: mao.StateStore, bank: Bank) -> None:
    records, fails = (RECORDS[:5], 3) if agent.name == "in_a_child" else (RECORDS, 9)  # a process for each takes its time
    everything = {("funds", record["id"]): 1 for record in records}
    with pytest.raises(mao.AgentFailedError) as failed:
        mao.run(pipeline(agent), records, store=state, workflow="day", resources={"bank": bank, "fails": f"A{fails}"})
    assert failed.value.compensation.state == "compensated"
    assert bank.effects() >= fails or agent.name == "as_tasks"
    assert bank.standing() == {}
    asked = bank.asked("do")
    assert len(asked) == len(set(asked)) or agent.name in ("by_frame", "in_parts"), "a retry finds what was done"
    result = mao.run(pipeline(agent), records, store=state, workflow="day", resources={"bank": bank, "fails": ""})
    assert bank.standing() == everything
    assert set(result[agent.name]["told"]) == {f"funds {key[:8]}" for key in bank.asked("do")[len(asked) :]}
    before = len(bank.asked("do"))
    mao.run(pipeline(agent), records, store=state, workflow="day", resources={"bank": bank, "fails": ""})
    assert len(bank.asked("do")) == before, "what was done is not done again"
    assert unfinished(state, "loans") == []
    assert [saga.state for saga in sagas(state, "loans")] == ["compensated"]


@pytest.mark.parametrize("agent", [in_place, by_frame], ids=lambda agent: agent.name)
def test_a_changed_input_is_a_new_effect_and_undoes_the_one_before(agent: mao.Agent, state: mao.StateStore, bank: Bank) -> None:
    run = {"store": state, "workflow": "day", "resources": {"bank": bank, "fails": ""}}
    first = RECORDS[:5]
    changed = [*first[:4], {"id": "A5", "amount": 7}]
    mao.run(pipeline(agent), first, **run)
    mao.run(pipeline(agent), changed, **run)
    expected = {("funds", record["id"]): 1 for record in first}
    assert bank.standing() == {**expected, ("funds", "A5"): 2}
    (told,) = unfinished(state, "loans")
    assert (told.kind, told.agents) == ("superseded", (agent.name,))
    old = Saga(state, pipeline(agent), told.workflow_id, told.attempt, superseded_by=told.superseded_by, resources={"bank": bank})
    assert [(step.agent, step.done) for step in old.plan().steps] == [(agent.name, 1)]
    assert old.run().state == "compensated"
    assert bank.standing() == expected
    assert unfinished(state, "loans") == []
    kinds = [seal.kind for seal in state.seals("loans/day")]
    assert "fence" not in kinds
    # Back again: the effect of the first run was undone, and is had under another key.
    mao.run(pipeline(agent), first, **run)
    (told,) = unfinished(state, "loans")
    Saga(state, pipeline(agent), told.workflow_id, told.attempt, superseded_by=told.superseded_by, resources={"bank": bank}).run()
    assert bank.standing() == expected
    assert unfinished(state, "loans") == []


def test_a_retry_in_the_call_finds_what_was_done(state: mao.StateStore, tmp_path: Path) -> None:
    bank, tries = Bank(tmp_path / "bank.db"), []

    @mao.agent(compensate=release, policy=mao.Policy(retries=2, transient=(ConnectionError,), keep_answers=0))
    def flaky(ctx: mao.AgentContext, applications: Application, *, bank: Bank) -> Decision:
        one = reserve(ctx, applications.id, bank)
        two = ctx.effect("funds", lambda effect: bank.do(effect.key, "more", applications.id, effect.epoch))
        tries.append(one)
        if len(tries) == 1:
            raise ConnectionError
        return Decision(id=applications.id, told=f"{one} {two}")

    mao.run(pipeline(flaky), RECORDS[:1], store=state, resources={"bank": bank})
    assert tries[0] == tries[1]
    assert len(bank.asked("do")) == 2


def test_what_certainly_did_not_happen_is_not_undone(state: mao.StateStore, tmp_path: Path) -> None:
    bank = Bank(tmp_path / "bank.db")

    @mao.agent(compensate=release)
    def refused(ctx: mao.AgentContext, applications: Application, *, bank: Bank) -> Decision:
        def no(effect: mao.Effect) -> None:
            raise mao.NotDoneError

        reserve(ctx, applications.id, bank)
        ctx.effect("offer", no)
        raise AssertionError

    with pytest.raises(mao.AgentFailedError) as failed:
        mao.run(pipeline(refused), RECORDS[:1], store=state, resources={"bank": bank})
    assert failed.value.compensation.state == "compensated"
    assert bank.asked("cancel") == bank.asked("do")


def test_an_undo_that_fails_stops_no_other_and_is_said(state: mao.StateStore, tmp_path: Path) -> None:
    bank, broken = Bank(tmp_path / "bank.db"), [True]

    def refuse(undo: mao.Undo, *, bank: Bank) -> None:
        if broken:
            raise ConnectionError("4711")
        release(undo, bank=bank)

    @mao.agent(compensate=refuse, undo_policy=mao.Policy(retries=1, transient=(OSError,), retry_within=5))
    def second(ctx: mao.AgentContext, in_place: Decision, *, bank: Bank) -> Decision:
        ctx.effect("offer", lambda effect: bank.do(effect.key, "offer", in_place.id, effect.epoch))
        if in_place.id == "A3":
            raise ValueError
        return in_place

    both = pipeline(in_place, second)
    with pytest.raises(mao.AgentFailedError) as failed:
        mao.run(both, RECORDS[:4], store=state, workflow="day", resources={"bank": bank, "fails": ""})
    concluded = failed.value.compensation
    assert concluded.state == "compensation_incomplete"
    assert [(left.agent, left.state, left.error) for left in concluded.left] == [("second", "failed", "ConnectionError")]
    assert bank.standing() == {("offer", f"A{n}"): 1 for n in (1, 2, 3)}, "the other is undone all the same"
    assert [seal.kind for seal in state.seals("loans/day")][-1] == "fence"
    (told,) = unfinished(state, "loans")
    assert told.state == "incomplete"
    broken.clear()
    assert Saga(state, both, "loans/day", told.attempt, resources={"bank": bank}).run().state == "compensated"
    assert bank.standing() == {}
    assert [(undo.agent, undo.tries) for undo in sagas(state, "loans")[0].undos] == [("second", 2), ("in_place", 1)]


def test_undo_gets_what_the_agent_had(state: mao.StateStore, tmp_path: Path) -> None:
    bank, seen = Bank(tmp_path / "bank.db"), list[mao.Undo]()

    def look(undo: mao.Undo) -> None:
        seen.append(undo)

    @mao.agent(compensate=look)
    def first(ctx: mao.AgentContext, applications: Application, *, bank: Bank) -> Decision:
        return Decision(id=applications.id, told=reserve(ctx, applications.id, bank))

    @mao.agent
    def last(first: Decision) -> Decision:
        raise ValueError

    with pytest.raises(mao.AgentFailedError):
        mao.run(pipeline(first, last), RECORDS[:3], store=state, workflow="day", resources={"bank": bank})
    (undo,) = seen
    assert (undo.workflow_id, undo.agent, undo.epoch, undo.pipeline) == ("loans/day", "first", 1, "loans")
    assert [(effect.record, effect.state, effect.epoch) for effect in undo.effects] == [(f"A{n}", "done", 0) for n in (3, 2, 1)]
    assert undo.output is not None
    assert undo.output.collect()["told"].to_list() == [effect.result for effect in undo.effects[::-1]]
    assert undo.inputs["applications"].collect()["amount"].to_list() == [100, 200, 300]


def test_a_personal_key_stands_as_a_hash_and_is_known_to_the_undo(state: mao.StateStore, tmp_path: Path) -> None:
    class Person(BaseModel):
        name: Annotated[str, mao.Key, mao.Personal]

    seen = list[mao.Effect]()

    @mao.agent
    def people() -> list[Person]:
        raise NotImplementedError

    def look(undo: mao.Undo) -> None:
        seen.extend(undo.effects)

    @mao.agent(compensate=look)
    def greet(ctx: mao.AgentContext, people: Person) -> Person:
        ctx.effect("greeting", lambda effect: effect.record)
        raise ValueError

    with pytest.raises(mao.AgentFailedError):
        mao.run(mao.Pipeline("people", entry=people, agents=[greet]), [{"name": "Grace Hopper"}], store=state)
    assert [effect.record for effect in seen] == ["Grace Hopper"]
    from dagster_mao.journal import Sagas, journal_of

    journal = Sagas(journal_of(state.database))
    steps = journal.steps(state.workflows()[0])
    assert steps[0].personal
    assert all("Grace" not in str(told.segments) for told in journal.told([step.id for step in steps]).values())


def test_a_step_costs_tens_of_commits_and_not_one_per_effect(
    state: mao.StateStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dagster_mao.journal._journal import Journal

    writes: list[int] = []
    write = Journal.write
    monkeypatch.setattr(Journal, "write", lambda *args, **kwargs: writes.append(1) or write(*args, **kwargs))

    @mao.agent(compensate=lambda undo: None)
    def quick(ctx: mao.AgentContext, applications: Application) -> Decision:
        ctx.effect("nothing", lambda effect: None)
        return Decision(id=applications.id, told="")

    records = pl.DataFrame({"id": [str(n) for n in range(20_000)], "amount": list(range(20_000))})
    mao.run(pipeline(quick), records, store=state)
    assert len(writes) < 1000  # some fifty where nothing else runs; they follow the clock, some twenty a second


def test_effects_in_a_unit_test_need_no_pipeline(tmp_path: Path) -> None:
    bank = FencingBank(tmp_path / "bank.db")
    decision = in_place(mao.AgentContext.for_tests(record="A1"), Application(id="A1", amount=1), bank=bank, fails="")
    assert decision.told.startswith("funds")
    assert bank.standing() == {("funds", "A1"): 1}
