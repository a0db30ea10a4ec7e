"""A paid call is not paid twice: steps in real processes are killed with SIGKILL and run again; a service counts what it was asked."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dagster_mao.gateway._shared import SharedStore
from tests.gateway.asker import AFTER_KEEP, BEFORE_CALL, BEFORE_KEEP, IN_FLIGHT, Script, Service, serving, step
from tests.gateway.crew import SECONDS, Member, until

NAIVE = pytest.mark.parametrize("engine", ["in memory", "by batch"])
WAYS = pytest.mark.parametrize("way", list(IN_FLIGHT))


@pytest.fixture
def service() -> Iterator[Service]:
    with serving() as running:
        yield running


@pytest.fixture
def script(shared: SharedStore, service: Service, tmp_path: Path) -> Script:
    return Script(shared.url, service.port, tmp_path / "kept")


def begun(script: Script) -> Member:
    member = Member()
    member.start("run", step, script)
    return member


def killed(member: Member) -> None:
    """It has killed itself, as its script says."""
    member.process.join(SECONDS)
    assert member.process.exitcode == -signal.SIGKILL


def finished(script: Script) -> int:
    """Runs it in another process to its end; the number of calls that it made."""
    member = begun(replace(script, point=None))
    made = member.reply()
    member.kill()
    assert isinstance(made, int), made
    return made


def paid(script: Script, service: Service) -> None:
    """Each record has its answer, and no more calls were repeated than can be in flight."""
    times = [service.calls[key] for key in script.keys]
    assert set(times) <= {1, 2}
    assert times.count(2) <= IN_FLIGHT[script.way], "paid twice"
    assert finished(script) == 0


# -- one step ------------------------------------------------------------------------------------------------------------------------


def dies_at(point: str, repeated: int, script: Script, service: Service) -> None:
    """One call at a time, so that it is known to the call which one was in flight."""
    killed(begun(replace(script, point=point, at=7)))
    assert finished(script) == script.records - 7 + (point != AFTER_KEEP)
    assert service.calls == {key: 1 + (n == 6) * repeated for n, key in enumerate(script.keys)}, "paid twice"
    assert finished(script) == 0


POINTS = pytest.mark.parametrize(("point", "repeated"), [(BEFORE_CALL, 0), (BEFORE_KEEP, 1), (AFTER_KEEP, 0)])


@POINTS
def test_only_the_call_in_flight_is_repeated(script: Script, service: Service, point: str, repeated: int) -> None:
    dies_at(point, repeated, script, service)


@NAIVE
def test_naive_answers_are_paid_for_again(script: Script, service: Service, engine: str) -> None:
    with pytest.raises(AssertionError):
        dies_at(AFTER_KEEP, 0, replace(script, engine=engine), service)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_however_the_process_was_started(script: Script, service: Service, shared: SharedStore, start: Any) -> None:
    """The forked child inherits a store in use."""
    with shared.transaction():
        pass
    context = multiprocessing.get_context(start)
    process = context.Process(target=step, args=(replace(script, point=AFTER_KEEP, at=7),))
    process.start()
    process.join(SECONDS)
    assert process.exitcode == -signal.SIGKILL
    assert finished(script) == script.records - 7
    assert set(service.calls.values()) == {1}


def hangs(way: str, script: Script, service: Service) -> None:
    """Killed from outside, while some calls wait for their answer and all that were answered are kept: exactly the former are repeated."""
    service.hold_after = 20
    member = begun(replace(script, way=way))
    until(lambda: len(service.hanging) == IN_FLIGHT[way])
    until(lambda: script.kept.exists() and len(script.kept.read_text().split()) == 20)
    member.kill()
    hanging = set(service.hanging)
    service.let_go()
    assert finished(script) == script.records - 20, "paid twice"
    assert service.calls == {key: 1 + (key in hanging) for key in script.keys}


@WAYS
def test_exactly_the_calls_in_flight_are_repeated(script: Script, service: Service, way: str) -> None:
    hangs(way, script, service)


@NAIVE
def test_naive_answers_are_lost_beside_calls_in_flight(script: Script, service: Service, engine: str) -> None:
    with pytest.raises(AssertionError, match="paid twice"):
        hangs("async", replace(script, engine=engine), service)


@WAYS
@pytest.mark.parametrize("point", [BEFORE_KEEP, AFTER_KEEP])
def test_it_dies_anywhere_among_calls_in_flight(script: Script, service: Service, way: str, point: str) -> None:
    killed(begun(replace(script, way=way, point=point, at=21)))
    safe = set(script.kept.read_text().split())
    finished(replace(script, way=way))
    assert {service.calls[key] for key in safe} == {1}
    paid(replace(script, way=way), service)


def test_a_step_that_always_dies_comes_to_its_end(script: Script, service: Service) -> None:
    """Each run gets three calls further; the last one finds nothing to do."""
    for _ in range(4):
        killed(begun(replace(script, records=12, point=AFTER_KEEP, at=3)))
    assert finished(replace(script, records=12)) == 0
    assert set(service.calls.values()) == {1}


def test_another_agent_version_asks_again(script: Script, service: Service) -> None:
    killed(begun(replace(script, point=AFTER_KEEP, at=7)))
    assert finished(replace(script, fingerprint="v2")) == script.records


# -- eight -----------------------------------------------------------------------------------------------------------------------------


def test_eight_steps_are_killed_and_run_again(script: Script, service: Service, tmp_path: Path) -> None:
    """At the same time, on one database, each in the middle of what it does: by itself, at a point of its own."""
    scripts = [
        replace(script, workflow=f"credit/{n}", kept=tmp_path / f"kept {n}", way=list(IN_FLIGHT)[n % 3], records=30) for n in range(8)
    ]
    points = [BEFORE_CALL, BEFORE_KEEP, AFTER_KEEP]
    dying = [begun(replace(each, point=points[n % 3], at=5 + 2 * n)) for n, each in enumerate(scripts)]
    for member in dying:
        killed(member)
    safe = {key for each in scripts for key in each.kept.read_text().split()}
    again = [begun(each) for each in scripts]
    assert all(isinstance(member.reply(), int) for member in again)
    for member in again:
        member.kill()
    assert {service.calls[key] for key in safe} == {1}
    for each in scripts:
        paid(each, service)


def test_eight_steps_of_one_agent_in_one_workflow_do_no_harm(script: Script, service: Service) -> None:
    """Attempts and zombies: each call may be made by each of them, and is known to whoever comes later."""
    ways = [replace(script, way=list(IN_FLIGHT)[n % 3]) for n in range(8)]
    members = [begun(each) for each in ways]
    assert all(isinstance(member.reply(), int) for member in members)
    for member in members:
        member.kill()
    assert max(service.calls.values()) <= 8
    assert set(service.calls) == set(script.keys)
    assert finished(script) == 0
