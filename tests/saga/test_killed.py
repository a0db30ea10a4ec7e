"""SIGKILL at every point of an attempt, and at every point of its compensation: real processes, SQLite and PostgreSQL.

Points lie before and after each commit to the database, each seal, each effect and each undo.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dagster_mao.journal import Effect
from dagster_mao.journal._pages import DONE, Entry, Slot
from dagster_mao.saga import Saga, unfinished
from tests.gateway.conftest import new_schema
from tests.journal.bank import Bank, FencingBank
from tests.journal.killing import killed_at
from tests.journal.world import DAY, EFFECTS, PIPELINE, Act, World, act_of, expected

AMOUNTS = {"A1": 100, "A2": 200}
strides = pytest.mark.parametrize("stride", [pytest.param(13, id="some"), pytest.param(1, id="all", marks=pytest.mark.long)])
"""Every how manyth point a process is killed at."""

on_sqlite = pytest.mark.parametrize("fresh", ["sqlite"], indirect=True)

Fresh = Callable[[], World]


@pytest.fixture(params=["sqlite", "postgres"])
def fresh(request: pytest.FixtureRequest, tmp_path: Path) -> Fresh:
    """Makes new worlds, with banks of both kinds in turn."""
    postgres = request.getfixturevalue("postgres") if request.param == "postgres" else None
    made: list[World] = []

    def make() -> World:
        folder = tmp_path / str(len(made))
        folder.mkdir()
        bank = (Bank, FencingBank)[len(made) % 2](folder / "bank.db")
        made.append(World(folder / "state", bank, str(folder / "shared.db") if postgres is None else new_schema(postgres)))
        return made[-1]

    return make


def run(world: World, attempt: str, wrapped: Callable[[Act], Act] | None = None) -> None:
    acts = {agent: wrapped(act_of(agent)) if wrapped else act_of(agent) for agent in EFFECTS}
    world.attempt(attempt, AMOUNTS, **acts)


def compensate(world: World, attempt: str, owner: str = "run") -> str:
    return Saga(world.store, PIPELINE, DAY, attempt, resources={"bank": world.bank}, owner=owner).run().state


def every_point(fresh: Fresh, attempt: Callable[..., None], check: Callable[[World], None], stride: int = 1) -> int:
    """Kills the attempt at one point after the other, until it comes to none any more; how often."""
    for kills in range(1000):
        world = fresh()
        if not killed_at(kills * stride, attempt, world, "one"):
            return kills
        check(world)
    raise AssertionError("there is no end of points")


def nets_to_zero(world: World) -> None:
    """Nothing of a killed attempt stands once it is compensated, nothing was had twice, and the next attempt works."""
    if world.store.effective(DAY):
        assert compensate(world, "one") == "void", "it had completed before it was killed"
        assert world.bank.standing() == expected(AMOUNTS)
        return
    told = unfinished(world.store, "loans")
    assert [one.kind for one in told] in (["attempt"], []), "nothing had happened, or it is found"
    if told:
        assert compensate(world, "one") == "compensated"
    assert world.bank.standing() == {}, "all of it is undone"
    assert unfinished(world.store, "loans") == []
    before = len(world.bank.asked("do"))
    run(world, "two")
    assert world.bank.standing() == expected(AMOUNTS)
    assert len(world.bank.asked("do")) - before == len(expected(AMOUNTS)), "nothing is asked for twice"


@strides
def test_an_attempt_that_is_killed_at_any_point_nets_to_zero(fresh: Fresh, stride: int) -> None:
    assert every_point(fresh, run, nets_to_zero, stride) > 40 / stride


def after_effect(act: Act) -> Act:
    """Naive: the journal is told when the effect has happened."""

    def acts(effects: Any, record: str, bank: Bank) -> None:
        step, calling = effects._step, effects._calling
        step._end_windows()
        act(_Direct(calling.key, record, step), record, bank)
        for n, kind in enumerate(EFFECTS[step.identity.agent]):
            step.tell(Entry(calling.number, Slot(kind, n), DONE, "null"))
        step._flush()

    return acts


class _Direct:
    def __init__(self, call: str, record: str, step: Any) -> None:
        self._call, self._record, self._epoch = call, record, step.identity.epoch

    def effect(self, name: str, function: Callable[[Effect], Any], *, compares_epoch: bool = False) -> Any:
        from dagster_mao.journal import effect_key

        n = 1 if name == "offer" else 0
        return function(Effect(effect_key(self._call, name, n), self._epoch, name, self._record))


def run_naively(world: World, attempt: str) -> None:
    run(world, attempt, after_effect)


@on_sqlite
def test_an_intent_after_the_effect_misses_effects(fresh: Fresh) -> None:
    with pytest.raises(AssertionError, match="all of it is undone"):
        every_point(fresh, run_naively, nets_to_zero, 4)


def in_memory(world: World, attempt: str) -> None:
    """Naive: what is to be undone is a list in memory."""
    done: list[Effect] = []

    def remembering(act: Act) -> Act:
        def acts(effects: Any, record: str, bank: Bank) -> None:
            act(_Remembering(effects, done), record, bank)

        return acts

    try:
        run(world, attempt, remembering)
    except BaseException:
        for effect in reversed(done):
            world.bank.cancel(effect.key, effect.epoch + 1)
        raise


class _Remembering(_Direct):
    def __init__(self, effects: Any, done: list[Effect]) -> None:
        super().__init__(effects._calling.key, effects._calling.record, effects._step)
        self._done = done

    def effect(self, name: str, function: Callable[[Effect], Any], *, compares_epoch: bool = False) -> Any:
        def remembered(effect: Effect) -> Any:
            self._done.append(effect)
            return function(effect)

        return super().effect(name, remembered)


def stands_after_death(world: World) -> None:
    assert world.store.effective(DAY) or world.bank.standing() == {}, "all of it is undone"


@on_sqlite
def test_a_journal_in_memory_is_lost(fresh: Fresh) -> None:
    with pytest.raises(AssertionError, match="all of it is undone"):
        every_point(fresh, in_memory, stands_after_death, 4)


@strides
def test_a_compensator_that_is_killed_at_any_point_is_followed_by_another(fresh: Fresh, stride: int) -> None:
    def failed() -> World:
        world = fresh()

        def raising(act: Act) -> Act:
            def acts(effects: Any, record: str, bank: Bank) -> None:
                act(effects, record, bank)
                if record == "A2" and effects._step.identity.agent == "approval":
                    raise ValueError

            return acts

        with pytest.raises(ValueError):  # noqa: PT011
            run(world, "one", raising)
        return world

    for kills in range(1000):
        world = failed()
        if not killed_at(kills * stride, compensate, world, "one"):
            break
        told = unfinished(world.store, "loans")
        assert [(one.kind, one.state) for one in told] in ([("attempt", None)], [("attempt", "running")], []), told
        if told:
            assert compensate(world, "one") == "compensated"
        assert world.bank.standing() == {}
        assert [seal.kind for seal in world.store.seals(DAY)][-2:] == ["fence", "compensated"], "once each"
        asked = world.bank.asked("cancel")
        assert set(asked) == set(world.bank.asked("do")), "none is skipped"
        run(world, "two")
        assert world.bank.standing() == expected(AMOUNTS)
    assert kills > 20 / stride
