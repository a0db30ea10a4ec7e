"""Events written by many processes and taken in by several, killed anywhere: each that was accepted is in exactly one sealed entry.

The naive ways fail the same tests.
"""

from __future__ import annotations

import os
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from dagster_mao.choreography import submit
from dagster_mao.state import StateStore
from tests.choreography.crew import EAGER, WAYS, start, store_in
from tests.choreography.loans import kill_myself, loans

PIPELINE = loans(inbox=EAGER)


def write(folder: Path, store: StateStore, writer: int, count: int, kill_after: int | None = None) -> int:
    """A writer, forked: one event after the other, each noted once it is accepted; some are the same as another writer's. Its pid."""
    child = os.fork()
    if child:
        return child
    try:
        for number in range(count):
            name = f"all-{number}" if number % 4 == 0 else f"{writer}-{number}"
            submit(store, PIPELINE, {"id": name, "amount": 100.0})
            if number == kill_after:
                kill_myself()
            with (folder / "accepted").open("ab", buffering=0) as file:
                file.write(f"{name}\n".encode())
        os._exit(0)
    finally:
        os._exit(1)


def ended(children: Sequence[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def entered(store: StateStore) -> Counter[str]:
    """How often each event is in a sealed entry."""
    found: Counter[str] = Counter()
    for workflow in store.workflows("loans"):
        for seal in store.seals(workflow):
            if seal.kind == "entry":
                found.update(store.read(seal).collect()["id"])
    return found


def accepted(folder: Path) -> set[str]:
    return set((folder / "accepted").read_text().splitlines())


def expected(writers: int, count: int) -> set[str]:
    return {f"all-{number}" if number % 4 == 0 else f"{writer}-{number}" for writer in range(writers) for number in range(count)}


POINT = ["entered", *(pytest.param(point, marks=pytest.mark.long) for point in ("launched", "taken"))]


@pytest.mark.parametrize("point", POINT)
def test_whoever_dies_taking_events_in_each_is_in_one_entry(tmp_path: Path, point: str) -> None:
    survived(tmp_path, "inbox", point)
    assert entered(store_in(tmp_path)) == dict.fromkeys(expected(2, 6), 1)


@pytest.mark.parametrize(("way", "count"), [("blind", 2), pytest.param("hasty", 0, marks=pytest.mark.long)])
def test_the_naive_ways_double_or_lose_events(tmp_path: Path, way: str, count: int) -> None:
    survived(tmp_path, way, "entered" if way == "blind" else "gone")
    counts = entered(store_in(tmp_path))
    assert {counts[name] for name in expected(2, 6)} == {1, count}


def survived(folder: Path, way: str, point: str) -> None:
    """Two writers, one of whom dies after the event that it could not note; then a taker dies, and another goes on."""
    store = store_in(folder)
    assert ended([write(folder, store, writer, 6, kill_after=3 if writer else None) for writer in range(2)]) == [0, -signal.SIGKILL]
    assert len(accepted(folder)) == 8
    assert ended([write(folder, store, 1, 6)]) == [0]  # it does not know, and begins anew
    (folder / "written").touch()
    assert start(folder, way, kill=point, nth=2).wait(timeout=250) == -signal.SIGKILL
    WAYS["inbox" if way == "hasty" else way](folder, store, PIPELINE)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_eight_who_write_and_two_who_take_in_some_of_whom_die(tmp_path: Path, database: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue("postgres_url") if database == "postgres" else None
    store = store_in(tmp_path, url)
    takers = [start(tmp_path, "inbox", database=url, kill=point, nth=nth) for point, nth in (("entered", 2), ("taken", 3))]
    writers = [write(tmp_path, store, writer, 40, kill_after=11 + writer if writer % 2 else None) for writer in range(8)]
    assert ended(writers) == [0, -signal.SIGKILL] * 4
    again = [write(tmp_path, store, writer, 40) for writer in range(1, 8, 2)]
    assert ended(again) == [0] * 4
    (tmp_path / "written").touch()
    assert [taker.wait(timeout=250) for taker in takers] == [-signal.SIGKILL] * 2
    last = [start(tmp_path, "inbox", database=url) for _ in range(2)]
    assert [taker.wait(timeout=250) for taker in last] == [0, 0]
    assert accepted(tmp_path) == expected(8, 40)
    assert entered(store) == dict.fromkeys(expected(8, 40), 1)
