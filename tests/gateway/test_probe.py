"""Calls that come while another one is the probe: they wait for what becomes of it, for as long as a probe may take."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dagster_mao.errors import BreakerOpenError, StoreError
from dagster_mao.gateway import Breaker, Gateway, Policy, shared_store
from dagster_mao.gateway._breaker import (
    LOOK_EVERY,
    Admission,
    Probing,
    SharedBreaker,
    _probes,
    breakers,
    close_breaker,
    events,
    open_breaker,
)
from dagster_mao.gateway._shared import SharedStore
from tests.gateway.crew import SECONDS, Member, age, calls, end, soon, trip, until, use

DECLARED = Breaker(fail_max=1, reset_timeout=600)
both = pytest.mark.parametrize("is_async", [False, True], ids=["thread", "task"])


def probed(shared: SharedStore, **options: Any) -> tuple[SharedBreaker, Admission]:
    """A breaker whose probe is running."""
    bank = SharedBreaker(shared, "bank", DECLARED, **options)
    bank.admit().failed(ConnectionError())
    age(shared, 601)
    bank = SharedBreaker(shared, "bank", DECLARED, **options)
    probe = bank.admit()
    assert probe.is_probe
    return bank, probe


def held_up(breaker: SharedBreaker) -> Probing:
    entered = breaker.enter()
    assert entered.is_held_up
    return entered


class Waiters:
    """Calls that wait for a probe, in threads of their own or as tasks of one loop in another thread."""

    def __init__(self, is_async: bool, *waiting: Probing) -> None:
        self._pool = ThreadPoolExecutor(len(waiting))
        self._begun = threading.Barrier(2)

        async def tasks() -> list[Any]:
            made = [asyncio.ensure_future(probing.aadmitted()) for probing in waiting]
            await asyncio.sleep(0)
            self._begun.wait(SECONDS)
            return await asyncio.gather(*made, return_exceptions=True)

        if is_async:
            self._all = [self._pool.submit(asyncio.run, tasks())]
            self._begun.wait(SECONDS)
        else:
            self._all = [self._pool.submit(self._one, probing) for probing in waiting]

    @staticmethod
    def _one(probing: Probing) -> list[Any]:
        try:
            return [probing.admitted()]
        except Exception as error:
            return [error]

    def became(self) -> list[Any]:
        return [each for waiting in self._all for each in waiting.result(SECONDS)]


@both
def test_they_pass_when_it_was_answered(shared: SharedStore, is_async: bool) -> None:
    before = set(_probes)  # of tests whose probes never say anything
    bank, probe = probed(shared)
    waiters = Waiters(is_async, *(held_up(bank) for _ in range(3)))
    probe.succeeded()
    assert [admission.is_probe for admission in waiters.became()] == [False] * 3
    assert set(_probes) == before


@both
def test_they_are_refused_when_it_failed(shared: SharedStore, is_async: bool) -> None:
    bank, probe = probed(shared)
    waiters = Waiters(is_async, *(held_up(bank) for _ in range(3)))
    probe.failed(TimeoutError())
    assert [(type(error), error.why) for error in waiters.became()] == [(BreakerOpenError, "TimeoutError")] * 3


@both
def test_when_it_says_nothing_one_of_them_is_the_next_and_the_others_wait_on(shared: SharedStore, is_async: bool) -> None:
    bank, probe = probed(shared)
    waiters = [Waiters(is_async, held_up(bank)) for _ in range(3)]
    probe.released()
    first = until(lambda: next((w for w in waiters if w._all[0].done()), None))
    (second,) = first.became()
    assert second.is_probe
    assert sum(w._all[0].done() for w in waiters) == 1
    second.succeeded()
    assert sorted(admission.is_probe for w in waiters for admission in w.became()) == [False, False, True]


@both
def test_breakers_by_one_name_in_one_process_and_in_others_wait_too(shared: SharedStore, is_async: bool) -> None:
    _, probe = probed(shared)
    waiters = Waiters(is_async, held_up(SharedBreaker(shared, "bank", DECLARED)))
    _probes.clear()  # as it is in another process, which can only look
    others = Waiters(is_async, held_up(SharedBreaker(shared, "bank", DECLARED)))
    probe.succeeded()
    assert [admission.is_probe for admission in (*waiters.became(), *others.became())] == [False, False]


@both
def test_a_probe_that_hangs_holds_them_up_until_its_lease_is_over(shared: SharedStore, is_async: bool) -> None:
    bank, _ = probed(shared)
    waiters = Waiters(is_async, held_up(bank))
    age(shared, 601)
    (second,) = waiters.became()
    assert second.is_probe


@both
def test_nobody_waits_longer_than_a_probe_may_take(shared: SharedStore, is_async: bool) -> None:
    """Probe follows upon probe: here each time that it looks there is another."""
    now = [0.0]
    bank, _ = probed(shared, lease=60.0, clock=lambda: now[0])
    entered = bank.enter

    def again() -> Admission | Probing:
        now[0] += 20.0
        return entered()

    bank.enter = again  # type: ignore[method-assign]
    waiters = Waiters(is_async, held_up(bank))
    age(shared, -1e6)
    (refused,) = waiters.became()
    assert isinstance(refused, BreakerOpenError)
    assert now[0] == 80, "it came at 20"


@both
def test_what_is_decided_by_hand_meanwhile_counts(shared: SharedStore, is_async: bool) -> None:
    bank, hung = probed(shared)
    waiters = Waiters(is_async, held_up(bank))
    close_breaker(shared, "bank", why="it is back", by="ford")
    assert [admission.is_probe for admission in waiters.became()] == [False]
    hung.released()
    bank, hung = probed(shared)
    waiters = Waiters(is_async, held_up(bank))
    open_breaker(shared, "bank", why="maintenance", by="ford")
    assert [error.why for error in waiters.became()] == ["maintenance"]


def test_a_task_that_is_cancelled_while_it_waits_leaves_the_others_waiting(shared: SharedStore) -> None:
    bank, probe = probed(shared)

    async def main() -> list[Any]:
        waiting = [asyncio.ensure_future(held_up(bank).aadmitted()) for _ in range(2)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await waiting[0]
        probe.succeeded()
        return [await waiting[1]]

    assert [admission.is_probe for admission in asyncio.run(main())] == [False]


def test_when_a_probes_end_cannot_be_recorded_they_are_not_held_up_by_it(tmp_path: Path) -> None:
    shared = SharedStore(tmp_path / "shared.db")
    bank, probe = probed(shared)
    waiters = Waiters(False, held_up(bank))
    import sqlalchemy as sa

    with shared.transaction() as connection:
        connection.execute(sa.text("DROP TABLE mao_breakers"))
    probe.succeeded()
    (error,) = waiters.became()
    assert isinstance(error, StoreError)
    shared.close()


# -- over processes --------------------------------------------------------------------------------------------------------------------


def waiting(members: Sequence[Member]) -> None:
    """They ask for a call beside the probe, and none is answered; those that still believe what they read before ask again."""
    for member in members:
        member.start("call")

    def are_silent() -> bool:
        told = [member for member in members if not member.is_silent(2 * LOOK_EVERY / len(members))]
        for member in told:
            assert member.reply() == "refused", "it is not the only probe"
            member.start("call")
        return not told

    assert soon(are_silent), "they are refused while it runs"


@pytest.mark.parametrize("how", ["succeed", "fail"])
def test_eight_processes_wait_for_one_probe(crew: list[Member], shared: SharedStore, how: str) -> None:
    use(crew, engine="waiting", shared=shared, declared=Breaker(fail_max=5, reset_timeout=30.0))
    trip(crew)
    age(shared, 31)
    prober, others = crew[0], crew[1:]
    until(lambda: calls([prober]))
    waiting(others)
    end([prober], how)
    assert {member.reply() for member in others} == {"called" if how == "succeed" else "refused"}
    if how == "succeed":
        end(others, "succeed")
    assert [event.event for event in events(shared, "bank")][:2] == ["closed" if how == "succeed" else "open", "half-open"]


def test_when_the_prober_is_killed_one_of_those_who_wait_is_the_next(crew: list[Member], shared: SharedStore) -> None:
    prober = Member()
    use([*crew, prober], engine="waiting", shared=shared, declared=Breaker(fail_max=5, reset_timeout=30.0))
    trip([*crew, prober])
    age(shared, 31)
    until(lambda: calls([prober]))
    waiting(crew)
    prober.kill()
    age(shared, 61)
    (second,) = until(lambda: [member for member in crew if not member.is_silent(0)])
    assert second.reply() == "called"
    others = [member for member in crew if member is not second]
    assert all(member.is_silent(2 * LOOK_EVERY / len(others)) for member in others), "the second probe is the only one"
    assert breakers(shared)[0].state == "half-open"
    end([second], "succeed")
    assert {member.reply() for member in others} == {"called"}
    end(others, "succeed")


# -- with limits -----------------------------------------------------------------------------------------------------------------------


@both
def test_what_was_reserved_for_a_moment_is_given_back_for_the_wait(tmp_path: Path, is_async: bool) -> None:
    """Two permits of the second window: that of the probe, and one that came due while it ran, and must not be used late."""
    shared = shared_store(str(tmp_path / "shared.db"))
    policy = Policy(breaker=Breaker(fail_max=1, reset_timeout=600), rate_limit="1/second", keep_answers=0)
    with pytest.raises(ConnectionError):
        Gateway(policy, "bank", str(tmp_path / "shared.db")).call(_fails)
    age(shared, 601)
    gateway = Gateway(policy, "bank", str(tmp_path / "shared.db"))  # of another process: the first believes for a moment what it saw
    for _ in range(4):  # so that both calls wait for their permits, however slow this machine is
        gateway._quota.reserve()  # type: ignore[union-attr]
    given_back: list[Any] = []
    give_back = gateway._quota.give_back  # type: ignore[union-attr]
    gateway._quota.give_back = lambda reserved: (given_back.append(reserved), give_back(reserved))  # type: ignore[union-attr, assignment, method-assign, func-returns-value]

    came = itertools.count()  # whichever call is let through first is the probe

    def call() -> str:
        if next(came):
            return "other"
        until(lambda: given_back)
        return "probe"

    async def acall() -> str:
        if next(came):
            return "other"
        while not given_back:
            await asyncio.sleep(0.01)
        return "probe"

    def both_calls() -> list[str]:
        if not is_async:
            with ThreadPoolExecutor(2) as pool:
                return [made.result(SECONDS) for made in [pool.submit(gateway.call, call) for _ in range(2)]]

        async def main() -> list[str]:
            return await asyncio.gather(gateway.acall(acall), gateway.acall(acall))

        return asyncio.run(main())

    assert sorted(both_calls()) == ["other", "probe"]
    assert len(given_back) == 1


def _fails() -> None:
    raise ConnectionError
