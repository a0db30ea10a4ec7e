"""A model of workflows: attempts that complete, fail, or die at any commit, with changed inputs; compensators that die. The ledger tells.

A process that dies is one whose database refuses everything from some commit on: before it, or after it without an answer.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dagster_mao.errors import FencedError
from dagster_mao.gateway._shared import SharedStore
from dagster_mao.saga import Saga, unfinished
from dagster_mao.state.log import StateLog
from tests.journal.bank import Bank, FencingBank
from tests.journal.world import DAY, PIPELINE, Act, World, act_of, expected


class Died(BaseException):
    """The process is gone: nothing that it does after this reaches anything."""


class Mortal:
    """Lets what runs inside die at a point, and with it everything that it might still write."""

    def __init__(self, dies_at: int | None) -> None:
        self._left, self.dead = dies_at, False

    def point(self) -> None:
        if self._left is not None:
            self.dead = self.dead or self._left == 0
            self._left -= 1
        if self.dead:
            raise Died

    @contextmanager
    def living(self) -> Iterator[None]:
        transaction, commit, do, cancel = SharedStore.transaction, StateLog._commit, Bank.do, Bank.cancel

        @contextmanager
        def counted(store: SharedStore, *, durable: bool = True) -> Iterator[Any]:
            if self.dead:
                raise Died
            with transaction(store, durable=durable) as connection:
                yield connection
                self.point()
            self.point()

        def around(function: Any) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.point()
                result = function(*args, **kwargs)
                self.point()
                return result

            return call

        SharedStore.transaction = counted  # type: ignore[method-assign, assignment]
        StateLog._commit, Bank.do, Bank.cancel = around(commit), around(do), around(cancel)  # type: ignore[method-assign]
        try:
            yield
        except Died:
            pass
        finally:
            self.dead = True
            SharedStore.transaction, StateLog._commit, Bank.do, Bank.cancel = transaction, commit, do, cancel  # type: ignore[method-assign]


AMOUNTS = st.dictionaries(st.sampled_from(["A1", "A2", "A3"]), st.integers(1, 3), min_size=1)
POINTS = st.none() | st.integers(0, 70)
ATTEMPTS = st.lists(
    st.tuples(AMOUNTS, POINTS, st.sampled_from([None, "inquiry", "approval"]), st.booleans(), POINTS), min_size=1, max_size=4
)


def raising(agent: str) -> Act:
    def acts(effects: Any, record: str, bank: Bank) -> None:
        act_of(agent)(effects, record, bank)
        raise ValueError

    return acts


def compensate_all(world: World, dies_at: int | None = None) -> None:
    with Mortal(dies_at).living():
        for told in unfinished(world.store, "loans"):
            by = told.superseded_by
            saga = Saga(world.store, PIPELINE, DAY, told.attempt, superseded_by=by, resources={"bank": world.bank}, owner="sensor")
            assert saga.run().state in ("compensated", "void")


@settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(bank=st.sampled_from([Bank, FencingBank]), attempts=ATTEMPTS)
def test_the_ledger_holds_what_the_completed_attempts_decided_and_nothing_else(bank: type[Bank], attempts: list[Any]) -> None:
    the_ledger_holds_what_was_decided(bank, attempts)


@pytest.mark.long
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(bank=st.sampled_from([Bank, FencingBank]), attempts=ATTEMPTS)
def test_so_it_does_whatever_happens(bank: type[Bank], attempts: list[Any]) -> None:
    the_ledger_holds_what_was_decided(bank, attempts)


def the_ledger_holds_what_was_decided(bank: type[Bank], attempts: list[Any]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder) / "state", bank(Path(folder) / "bank.db"), str(Path(folder) / "shared.db"))
        for number, (amounts, dies_at, fails, is_compensated, compensator_dies_at) in enumerate(attempts):
            with Mortal(dies_at).living(), suppress(ValueError, FencedError):
                world.attempt(f"run-{number}", amounts, **({fails: raising(fails)} if fails else {}))
            if is_compensated:
                compensate_all(world, compensator_dies_at)
        for _ in range(6):
            if not unfinished(world.store, "loans"):
                break
            compensate_all(world)
        assert unfinished(world.store, "loans") == []
        effective = world.store.effective(DAY)
        decided = world_amounts(world, effective) if effective else {}
        # A record that a later attempt did not have any more keeps what was decided on it.
        standing = world.bank.standing()
        assert all(net == 1 for net in standing.values()), "nothing is had twice"
        assert expected(decided).items() <= standing.items(), "nothing of the completed attempts is undone"
        completed = {record for amounts in completed_amounts(world) for record in amounts}
        assert standing.items() <= expected(dict.fromkeys(completed, 1)).items(), "nothing of the others stands"


def world_amounts(world: World, effective: Any) -> dict[str, int]:
    from tests.journal.world import read

    return read(world.store, effective["approval"])


def completed_amounts(world: World) -> list[dict[str, int]]:
    from dagster_mao.state import is_completed
    from tests.journal.world import read

    seals = world.store.seals(DAY)
    return [read(world.store, seal) for seal in seals if seal.agent == "approval" and is_completed(seals, seal.attempt)]
