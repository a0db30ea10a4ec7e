"""An attempt whose agents run in two code locations: each undoes what it has, and none before what was made from it is undone elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import dagster_mao as mao
from dagster_mao.errors import FencedError
from dagster_mao.journal._tables import SAGAS
from dagster_mao.saga import Concluded, Saga, sagas, show_up, unfinished
from dagster_mao.state.verify import verify
from tests.journal.bank import Bank, FencingBank
from tests.journal.killing import killed_at
from tests.journal.world import DAY, Application, Approval, Inquiry, Rating, World, act_of, applications, expected

AMOUNTS = {"A1": 100, "A2": 200}
FIRST = mao.Pipeline("loans", entry=applications, agents=[Inquiry, Rating], mode="hybrid")
SECOND = mao.Pipeline("loans", listens={"inquiry": Application, "rating": Application}, agents=[Approval], mode="hybrid")


def saga(world: World, pipeline: mao.Pipeline, **options: Any) -> Saga:
    options = {"attempt": "one", **options}
    return Saga(world.store, pipeline, DAY, resources={"bank": world.bank}, **options)


def run(world: World, pipeline: mao.Pipeline, **options: Any) -> tuple[str, list[str]]:
    concluded: Concluded = saga(world, pipeline, **options).run()
    return concluded.state, [left.agent for left in concluded.left]


def fail(world: World, attempt: str = "one") -> None:
    """Both locations' agents have had effects; the second's fails at its last record."""

    def act(effects: object, at: str, bank: Bank) -> None:
        act_of("approval")(effects, at, bank)
        if at == "A2":
            raise ValueError(at)

    with pytest.raises(ValueError, match="A2"):
        world.attempt(attempt, AMOUNTS, approval=act)


class StubbornBank(FencingBank):
    """Cancels nothing while it is stubborn."""

    stubborn = True

    def cancel(self, key: str, epoch: int) -> None:
        if self.stubborn:
            raise ConnectionError
        super().cancel(key, epoch)


def kinds_undone(world: World) -> list[str]:
    """What was cancelled, in order, by the kind of it."""
    with world.bank._connected() as connection:
        known = dict(connection.execute("SELECT key, max(kind) FROM ledger GROUP BY key"))
    return [known[key] for key in world.bank.asked("cancel")]


def test_each_location_undoes_what_it_has_and_not_before_what_was_made_from_it_is_undone(world: World) -> None:
    fail(world)
    assert run(world, FIRST) == ("handed_over", ["approval", "inquiry"]), "it fences, and waits for the approval to be undone"
    assert world.bank.asked("cancel") == []
    assert [seal.kind for seal in world.store.seals(DAY)][-1] == "fence"
    assert run(world, SECOND) == ("handed_over", ["inquiry"])
    assert world.bank.standing() == {("inquiry", record): 1 for record in AMOUNTS}
    assert run(world, FIRST) == ("compensated", [])
    assert world.bank.standing() == {}
    assert kinds_undone(world) == ["offer", "funds", "offer", "funds", "inquiry", "inquiry"], "in the reverse order, each once"
    assert [seal.kind for seal in world.store.seals(DAY)][-2:] == ["fence", "compensated"]
    assert verify(world.store).good
    assert unfinished(world.store, "loans") == []
    world.attempt("two", AMOUNTS)
    assert world.bank.standing() == expected(AMOUNTS)


def test_one_location_s_failing_undo_stops_no_other_s_and_is_tried_again_when_a_person_asks(world: World) -> None:
    fail(world)
    stubborn = StubbornBank(world.bank.path)
    told = saga(world, SECOND)
    told._resources["bank"] = stubborn
    assert told.run().state == "handed_over"
    assert run(world, FIRST) == ("compensation_incomplete", ["approval"])
    (undo, other) = sagas(world.store, "loans")[0].undos
    assert (undo.agent, undo.state, undo.error, undo.tries) == ("approval", "failed", "ConnectionError", 1), "it was not tried again"
    assert (other.agent, other.state) == ("inquiry", "done")
    assert run(world, FIRST, owner="a person") == ("handed_over", ["approval"]), "who asks need not be who has it"
    assert run(world, SECOND) == ("compensated", [])
    assert world.bank.standing() == {}


def test_what_nobody_shows_up_for_is_given_up_and_the_others_go_on(world: World) -> None:
    fail(world)
    assert run(world, FIRST) == ("handed_over", ["approval", "inquiry"])
    assert run(world, FIRST) == ("handed_over", ["approval", "inquiry"]), "it is waited for"
    assert run(world, FIRST, absent_seconds=0) == ("compensation_incomplete", ["approval"])
    assert {kind for kind, _ in world.bank.standing()} == {"funds", "offer"}
    assert [left.error for left in sagas(world.store, "loans")[0].left] == ["NobodyHasIt"]
    assert world.store.seals(DAY)[-1].kind == "fence"
    assert run(world, SECOND, owner="a person") == ("compensated", []), "it is there again"
    assert world.bank.standing() == {}


def test_a_location_that_is_there_is_waited_for_however_long_it_takes(world: World) -> None:
    fail(world)
    assert run(world, FIRST) == ("handed_over", ["approval", "inquiry"])
    with world.journal.writing(DAY) as (connection, now):
        connection.execute(sa.update(SAGAS).values(fenced=now - 3600))
    assert saga(world, FIRST).turn().absent == ("approval",)
    show_up(world.store, "loans", ["approval"], every=60)
    assert saga(world, FIRST).turn().absent == ()
    assert run(world, FIRST) == ("handed_over", ["approval", "inquiry"])


def test_whose_turn_it_is_can_be_asked_before_anybody_began(world: World) -> None:
    fail(world)
    first, second = saga(world, FIRST).turn(), saga(world, SECOND).turn()
    assert (first.here, first.before, first.fenced) == ((), ("approval",), False)
    assert (second.here, second.before) == (("approval",), ("inquiry",))
    run(world, SECOND)
    assert saga(world, FIRST).turn().here == ("inquiry",)
    assert saga(world, SECOND).turn().here == ()


def test_one_compensates_at_a_time_and_who_handed_over_may_write_no_more(world: World) -> None:
    fail(world)
    first = saga(world, FIRST)
    held = first._claimed()
    with pytest.raises(FencedError, match="compensates this attempt"):
        run(world, SECOND)
    assert first.conclude().state == "handed_over"
    assert saga(world, SECOND).begin().here == ("approval",)
    for write in (first._sagas.renew, lambda row, _: first._sagas.end_undo(row, "approval", "done")):
        with pytest.raises(FencedError, match="taken over"):
            write(held, 15.0)
    with pytest.raises(FencedError, match="compensates this attempt"):
        first.undo("inquiry")


def test_a_pipeline_in_orchestration_has_no_other_location(world: World) -> None:
    fail(world)
    alone = mao.Pipeline("loans", entry=applications, agents=[Inquiry, Rating])
    assert run(world, alone) == ("compensation_incomplete", ["approval"])
    assert [left.error for left in sagas(world.store, "loans")[0].left] == ["WiringError"]


# -- killed --------------------------------------------------------------------------------------------------------------------------


def in_turns(world: World) -> None:
    """Both locations, one after the other, until nothing is left: as their sensors do."""
    for _ in range(6):
        for name, pipeline in (("first", FIRST), ("second", SECOND)):
            try:
                state, _ = run(world, pipeline, owner=name)
            except FencedError:  # the other one died, and is followed by its like
                continue
            if state != "handed_over":
                assert state in ("compensated", "void")
                return
    raise AssertionError("there is no end")


@pytest.mark.parametrize("stride", [pytest.param(37, id="some"), pytest.param(1, id="all", marks=pytest.mark.long)])
def test_compensators_of_two_locations_that_are_killed_at_any_point_are_followed_by_others(tmp_path: Path, stride: int) -> None:
    for kills in range(1000):
        folder = tmp_path / str(kills)
        folder.mkdir()
        world = World(folder / "state", (Bank, FencingBank)[kills % 2](folder / "bank.db"), str(folder / "shared.db"))
        fail(world)
        if not killed_at(kills * stride, in_turns, world):
            break
        if unfinished(world.store, "loans"):
            in_turns(world)
        assert world.bank.standing() == {}
        undone = kinds_undone(world)
        assert undone == sorted(undone, key=lambda kind: kind == "inquiry"), "nothing is undone before what was made from it"
        assert set(world.bank.asked("cancel")) == set(world.bank.asked("do")), "none is left out"
        assert [seal.kind for seal in world.store.seals(DAY)][-2:] == ["fence", "compensated"], "once each"
    assert kills > 40 / stride
