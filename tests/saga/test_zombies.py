"""Processes that are stopped, declared dead and compensated, and then wake up: steps with effects on their way, and compensators."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

import dagster_mao.saga._saga as engine
from dagster_mao.errors import FencedError
from dagster_mao.gateway import _shared
from dagster_mao.journal import _step as journal_step
from dagster_mao.saga import Saga, unfinished
from dagster_mao.state.verify import verify
from tests.journal.bank import Bank, until
from tests.journal.killing import start
from tests.journal.world import DAY, PIPELINE, World, act_of, expected

AMOUNTS = {"A1": 100, "A2": 200}


class Gate:
    """Lets a process wait, stopped, at a point in its work."""

    def __init__(self, folder: Path) -> None:
        self._reached, self.ended = folder / "reached", folder / "ended"

    def pause(self) -> None:
        """In the process: stops it, once."""
        if self._reached.exists():
            return
        with ExitStack() as nobody_writes:
            # In the middle of a commit of another thread it would hold SQLite's lock: all others would fail before they came to any fence.
            for store in _shared._stores():
                nobody_writes.enter_context(store._lock)
            self._reached.touch()
            os.kill(os.getpid(), signal.SIGSTOP)

    def wait(self, process: BaseProcess) -> None:
        until(self._reached.exists)
        until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")

    def wake(self, process: BaseProcess) -> str:
        """How the process ended, as it told."""
        os.kill(process.pid or 0, signal.SIGCONT)
        process.join(60)
        return self.ended.read_text() if self.ended.exists() else ""


def saga(world: World, **options: Any) -> Saga:
    return Saga(world.store, PIPELINE, DAY, "one", resources={"bank": world.bank}, **options)


def zombie(world: World, gate: Gate, where: str, seconds: float | None, naive: bool) -> None:
    """Approves; stops before or after the first effect at the bank, or between the check of the fence and the effect."""
    points: dict[str, Callable[[], object]] = {where: gate.pause}
    act = act_of("approval", before=points.get("before", int), after=points.get("after", int))
    if naive:
        journal_step.Step.check = lambda self: None  # type: ignore[method-assign]
    if where == "checked":
        check = journal_step.Step.check

        def checked(self: Any) -> None:
            check(self)
            gate.pause()

        journal_step.Step.check = checked  # type: ignore[method-assign]
    if where == "between":
        inner = act

        def act(effects: Any, record: str, bank: Bank) -> None:
            inner(effects, record, bank)
            gate.pause()

    try:
        world.step("one", "approval", seconds=seconds, act=act)
        gate.ended.write_text("sealed")
    except BaseException as error:
        gate.ended.write_text(type(error).__name__)


def stopped(world: World, tmp_path: Path, where: str, *, seconds: float | None = None, naive: bool = False) -> tuple[BaseProcess, Gate]:
    world.attempt("one", AMOUNTS, agents=["inquiry", "rating"])
    gate = Gate(tmp_path)
    process = start(zombie, world, gate, where, seconds, naive)
    gate.wait(process)
    return process, gate


WHERE = ("before", "after", "between", "checked")
PLACES = [
    *(("sqlite", where) for where in WHERE),
    *(pytest.param("postgres", where, marks=pytest.mark.long) for where in WHERE[:-1]),
    ("postgres", "checked"),
]


@pytest.mark.parametrize(("shared", "where"), PLACES, indirect=["shared"])
def test_a_zombie_step_seals_nothing_and_what_it_does_late_is_undone_again(world: World, tmp_path: Path, where: str) -> None:
    process, gate = stopped(world, tmp_path, where)
    assert saga(world).run().state == "compensated"
    assert world.bank.standing() == {}
    assert gate.wake(process) == ("RefusedError" if where in ("before", "checked") and world.bank.compares_epoch else "FencedError")
    late = unfinished(world.store, "loans")
    if where in ("before", "checked") and not world.bank.compares_epoch:
        assert world.bank.standing() == {("funds", "A1"): 1}, "this bank does what was cancelled before it was asked for"
        assert [(one.kind, one.attempt, one.agents) for one in late] == [("late", "one", ("approval",))]
    if late:
        assert saga(world).run().state == "compensated"
    assert unfinished(world.store, "loans") == []
    assert world.bank.standing() == {}
    assert [seal.kind for seal in world.store.seals(DAY)].count("compensated") == 1
    world.attempt("two", AMOUNTS)
    assert world.bank.standing() == expected(AMOUNTS)
    assert verify(world.store).good


def test_an_unfenced_effect_comes_after_the_undo(world: World, tmp_path: Path) -> None:
    """Naive: nobody looks at the fence before an effect. Between two records it wakes up, and goes on."""
    process, gate = stopped(world, tmp_path, "between", naive=True)
    assert saga(world).run().state == "compensated"
    gate.wake(process)
    assert len(world.bank.asked("do")) > 4, "it went on with the second record"


def test_an_undo_waits_for_what_may_still_come_unless_the_target_refuses_it(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, gate = stopped(world, tmp_path, "before", seconds=20.0)
    waited: list[float] = []
    now = journal_step.SLACK_SECONDS

    class Clock:
        def __init__(self, sagas: Any) -> None:
            self._sagas = sagas

        def now(self) -> float:
            return self._sagas.now() + sum(waited)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._sagas, name)

    monkeypatch.setattr(engine, "sleep", waited.append)
    compensating = saga(world)
    compensating._sagas = Clock(compensating._sagas)  # type: ignore[assignment]
    assert compensating.run().state == "compensated"
    assert (15 < sum(waited) <= 21 + now) if not world.bank.compares_epoch else not waited
    gate.wake(process)


def test_a_second_compensator_is_refused_until_the_lease_of_the_first_is_over(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.attempt("one", AMOUNTS, agents=["inquiry"])
    first, second = saga(world, owner="first"), saga(world, owner="second")
    first.begin()
    with pytest.raises(FencedError, match="first compensates") as refused:
        second.begin()
    assert 10 < (refused.value.retry_after or 0) <= engine.LEASE
    (held,) = unfinished(world.store, "loans")
    assert (held.state, held.lease_until is not None) == ("running", True)
    saga(world, owner="first").begin()  # another process of the same run
    with pytest.raises(FencedError, match="taken over"):
        first.undo("inquiry")
    assert world.bank.standing(), "and it did nothing any more"


def undoing(world: World, gate: Gate) -> None:
    """A compensator that stops in the middle of an undo."""
    engine.LEASE = 1.0

    class Stopping(type(world.bank)):  # type: ignore[misc]
        def cancel(self, key: str, epoch: int) -> None:
            gate.pause()
            super().cancel(key, epoch)

    try:
        Saga(world.store, PIPELINE, DAY, "one", resources={"bank": Stopping(world.bank.path)}, owner="first").run()
        gate.ended.write_text("concluded")
    except BaseException as error:
        gate.ended.write_text(type(error).__name__)


def test_a_compensator_that_was_stopped_writes_nothing_when_it_wakes(world: World, tmp_path: Path) -> None:
    world.attempt("one", AMOUNTS, agents=["inquiry", "rating"])
    gate = Gate(tmp_path)
    process = start(undoing, world, gate)
    gate.wait(process)

    def takes_over() -> bool:
        try:
            return saga(world, owner="second").run().state == "compensated"
        except FencedError:
            return False

    until(takes_over)
    assert world.bank.standing() == {}
    assert gate.wake(process) == "FencedError"
    assert world.bank.standing() == {}
    assert [seal.kind for seal in world.store.seals(DAY)][-2:] == ["fence", "compensated"]
    assert unfinished(world.store, "loans") == []
