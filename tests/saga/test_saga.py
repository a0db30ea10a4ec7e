"""The engine: what a failed attempt did is undone, in order, once, and nothing else is."""

from __future__ import annotations

import pytest

from dagster_mao.errors import FencedError
from dagster_mao.saga import Saga, request, sagas, unfinished
from dagster_mao.state.verify import verify
from tests.journal.world import DAY, PIPELINE, World, act_of, expected

AMOUNTS = {"A1": 100, "A2": 200, "A3": 300}


def saga(world: World, attempt: str, **options: object) -> Saga:
    return Saga(world.store, PIPELINE, DAY, attempt, resources={"bank": world.bank}, **options)  # type: ignore[arg-type]


def fail_at(world: World, attempt: str, record: str, amounts: dict[str, int] = AMOUNTS) -> None:
    """An attempt whose approval raises at one record."""

    def act(effects: object, at: str, bank: object) -> None:
        if at == record:
            raise ValueError(at)
        act_of("approval")(effects, at, world.bank)

    with pytest.raises(ValueError, match=record):
        world.attempt(attempt, amounts, approval=act)


def test_a_failed_attempt_nets_to_zero_and_the_next_one_works_with_new_keys(world: World) -> None:
    fail_at(world, "one", "A3")
    assert world.bank.standing() == {("inquiry", r): 1 for r in AMOUNTS} | {(k, r): 1 for k in ("funds", "offer") for r in ("A1", "A2")}
    plan = saga(world, "one").plan()
    assert plan.state is None
    assert [(step.agent, step.state, step.done, step.unknown) for step in plan.steps] == [
        ("approval", "pending", 4, 0),
        ("inquiry", "pending", 3, 0),
    ]
    assert len(world.store.seals(DAY)) == 3, "a plan changes nothing"
    concluded = saga(world, "one").run()
    assert (concluded.state, concluded.left, concluded.version) == ("compensated", (), f"{DAY}@4")
    assert world.bank.standing() == {}
    done, cancelled = world.bank.asked("do"), world.bank.asked("cancel")
    assert cancelled == done[::-1], "the newest first, each once"
    assert world.store.effective(DAY) == {}
    assert verify(world.store).good
    assert unfinished(world.store, "loans") == []
    with pytest.raises(FencedError, match="fence"):
        world.step("one", "approval", run="again")
    world.attempt("two", AMOUNTS)
    assert world.bank.standing() == expected(AMOUNTS)
    assert not set(world.bank.asked("do")[len(done) :]) & set(done), "an epoch has keys of its own"
    assert unfinished(world.store, "loans") == []


def test_a_failed_rerun_does_not_undo_what_was_decided_before(world: World) -> None:
    world.attempt("one", AMOUNTS)
    effective = world.store.effective(DAY)
    more = {**AMOUNTS, "A4": 400}
    fail_at(world, "two", "A4", more)
    assert world.bank.standing() == expected(AMOUNTS) | {("inquiry", "A4"): 1}, "what was done is not done again"
    assert saga(world, "two").run().state == "compensated"
    assert world.bank.standing() == expected(AMOUNTS)
    assert world.store.effective(DAY) == effective


def test_a_completed_attempt_is_not_compensated(world: World) -> None:
    world.attempt("one", AMOUNTS)
    assert saga(world, "one").plan().state == "void"
    assert saga(world, "one").begin().state == "void"
    assert saga(world, "one").run().state == "void"
    assert world.bank.standing() == expected(AMOUNTS)
    assert len(world.store.seals(DAY)) == 4


def test_what_was_asked_for_fences_nothing_and_is_void_when_the_attempt_completes_after_all(world: World) -> None:
    """The failure hook asks while siblings run and the run may still be retried: retries come first."""
    fail_at(world, "one", "A3")
    assert request(world.store, "loans", None, "one", run_id="run", why="ValueError") == 1
    assert [(one.state, one.why, one.runs) for one in unfinished(world.store, "loans")] == [("requested", "ValueError", ("one",))]
    world.step("one", "approval", run="retry")
    assert world.bank.standing() == expected(AMOUNTS)
    assert unfinished(world.store, "loans") == []
    assert [one.state for one in sagas(world.store, "loans")] == ["void"]
    assert world.bank.asked("cancel") == []
    assert request(world.store, "loans", None, "one", run_id="run", why="ValueError") == 0


def test_a_compensated_attempt_is_asked_for_in_vain(world: World) -> None:
    fail_at(world, "one", "A3")
    saga(world, "one").run()
    assert request(world.store, "loans", DAY, "one", run_id="run", why="ValueError") == 0
    assert unfinished(world.store, "loans") == []
