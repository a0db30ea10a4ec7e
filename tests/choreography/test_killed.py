"""Real processes, SIGKILL at scripted points, several at once: every version is processed once by each subscriber.

The naive ways fail the same tests.
"""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import pytest

from tests.choreography.crew import EAGER, POINTS, WAYS, start, store_in
from tests.choreography.loans import NAMES, Ledger, arrive, loans, once, sealed

WORKFLOWS = [f"w{number}" for number in range(4)]


def survive(folder: Path, way: str, database: str | None = None) -> None:
    """Somebody else goes on, in this process."""
    WAYS[way](folder, store_in(folder, database), loans(micro_batch=EAGER, inbox=EAGER))


POINT = [point if point in ("claimed", "executing", "told") else pytest.param(point, marks=pytest.mark.long) for point in POINTS]


@pytest.mark.parametrize("point", POINT)
def test_whoever_dies_wherever_everything_is_processed_once(tmp_path: Path, point: str) -> None:
    arrive(store_in(tmp_path), *WORKFLOWS)
    assert start(tmp_path, kill=point, nth=3).wait(timeout=250) == -signal.SIGKILL
    survive(tmp_path, "ours")
    assert sealed(store_in(tmp_path)) == once(*WORKFLOWS)
    twice = Ledger(tmp_path).executions - once(*WORKFLOWS)
    # What was begun and had not come to its seal had to be begun again, and nothing else was.
    assert twice.total() == (1 if point == "executing" else 0)
    assert not once(*WORKFLOWS) - Ledger(tmp_path).executions


@pytest.mark.long
@pytest.mark.timeout(900)
def test_one_death_after_the_other(tmp_path: Path, postgres_url: str) -> None:
    arrive(store_in(tmp_path, postgres_url), *WORKFLOWS)
    for point, nth in (("claimed", 1), ("launched", 1), ("begun", 4), ("sealed", 2), ("told", 3), ("ended", 7)):
        assert start(tmp_path, kill=point, nth=nth, database=postgres_url).wait(timeout=250) == -signal.SIGKILL
    survive(tmp_path, "ours", postgres_url)
    assert sealed(store_in(tmp_path)) == once(*WORKFLOWS)
    assert Ledger(tmp_path).executions == once(*WORKFLOWS)


@pytest.mark.parametrize(("way", "is_right"), [("ours", True), ("unrecovered", False)])
def test_a_claim_whose_claimer_died_is_taken_up_by_another(tmp_path: Path, way: str, is_right: bool) -> None:
    arrive(store_in(tmp_path), *WORKFLOWS)
    assert start(tmp_path, way, kill="claimed", nth=1).wait(timeout=250) == -signal.SIGKILL
    survive(tmp_path, way)
    assert (sealed(store_in(tmp_path)) == once(*WORKFLOWS)) is is_right


@pytest.mark.parametrize(("way", "is_right"), [("ours", True), ("newest", False)])
def test_events_that_come_together_are_all_seen(tmp_path: Path, way: str, is_right: bool) -> None:
    arrive(store_in(tmp_path), *WORKFLOWS)
    survive(tmp_path, way)
    assert (sealed(store_in(tmp_path)) == once(*WORKFLOWS)) is is_right


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("way", "is_right", "size"),
    [("ours", True, 2), pytest.param("ours", True, 3, marks=pytest.mark.long), pytest.param("unclaimed", False, 3, marks=pytest.mark.long)],
)
def test_several_at_once_do_nothing_twice(tmp_path: Path, way: str, is_right: bool, size: int) -> None:
    workflows = [f"w{number}" for number in range(4 * size if size == 3 else 3)]
    arrive(store_in(tmp_path), *workflows)
    crowd = [start(tmp_path, way, crowd=size) for _ in range(size)]
    assert [one.wait(timeout=250) for one in crowd] == [0] * size
    assert sealed(store_in(tmp_path)) == once(*workflows)  # the seal has one winner, even with the naive one
    assert (Ledger(tmp_path).executions == once(*workflows)) is is_right


@pytest.mark.long
@pytest.mark.timeout(600)
def test_several_at_once_one_of_whom_dies(tmp_path: Path, postgres_url: str) -> None:
    workflows = [f"w{number}" for number in range(10)]
    arrive(store_in(tmp_path, postgres_url), *workflows)
    crowd = [
        start(tmp_path, crowd=3, database=postgres_url),
        start(tmp_path, crowd=3, database=postgres_url, kill="executing", nth=5),
        start(tmp_path, crowd=3, database=postgres_url, kill="ended", nth=3),
    ]
    assert [one.wait(timeout=250) for one in crowd] == [0, -signal.SIGKILL, -signal.SIGKILL]
    survive(tmp_path, "ours", postgres_url)
    assert sealed(store_in(tmp_path)) == once(*workflows)
    assert (Ledger(tmp_path).executions - once(*workflows)).total() <= 1
    assert Counter(key.split()[0] for key in sealed(store_in(tmp_path))) == dict.fromkeys(NAMES, 10)
