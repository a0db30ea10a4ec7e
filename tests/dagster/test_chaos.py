"""A few workflows of `make chaos`: real runs in processes that are killed and stopped, and banks that are asked afterwards."""

from pathlib import Path

import pytest

from tools.chaos.harness import Chaos
from tools.chaos.project import store
from tools.chaos.script import Point, Script
from tools.chaos.tally import Standing, Tally


def met(folder: Path, *scripts: Script, **options: object) -> Tally:
    Chaos(folder, seed=1, kill_ticks=0, **options).run(scripts)  # type: ignore[arg-type]
    return Tally.of(folder, store(folder))


@pytest.mark.timeout(900)  # on a busy machine processes take their time
def test_nothing_is_doubled_or_missing_whatever_dies(tmp_path):
    tally = met(
        tmp_path,
        Script(runs=[Point("effect", "after", 6)]),
        Script(runs=[Point("effect", "before", 2, "stop")]),
        Script(fails="offer", compensations=[Point("undo", "before", 3)]),
    )
    assert tally.unreached == []
    # Where the disk is slow, a run may die of the lock of Dagster's database: one more that is undone.
    kills = {kind: count for kind, count in tally.kills.items() if not kind.startswith("locked-out")}
    assert kills == {"run": 1, "zombie run": 1, "compensator": 1}
    assert (tally.workflows, tally.completed, tally.incomplete) == (3, 0, 0)
    assert tally.compensated == 3
    assert (tally.doubles, tally.missing) == (0, 0), tally.wrong


@pytest.mark.timeout(900)
def test_undoing_in_the_hook_from_memory_leaves_what_a_killed_run_did(tmp_path):
    """The naive version: right where an agent fails, wrong where a process does."""
    scripts = [Script(fails="audit"), Script(runs=[Point("effect", "after", 2)])]
    tally = met(tmp_path, *scripts, ticks=False, project="tests.dagster.naive_chaos")
    assert tally.kills == {"run": 1}
    assert [line.partition(":")[0] for line in tally.wrong] == ["chaos/w0001"] * 2
    assert tally.missing == 2
    assert not tally.good


def test_what_stands_twice_or_not_at_all_is_told_and_what_an_incomplete_compensation_left_is_not_taken_for_a_double():
    one = ("inquiry", "w0000-0", 100)
    for should, does, incomplete, doubles, missing, left in (
        (1, 1, 0, 0, 0, 0),
        (1, 2, 0, 1, 0, 0),
        (1, 0, 0, 0, 1, 0),
        (0, 1, 0, 0, 1, 0),
        (0, 2, 0, 1, 1, 0),
        (0, 1, 1, 0, 0, 1),
        (1, 2, 1, 0, 0, 1),
        (1, 3, 1, 1, 0, 1),
    ):
        tally = Tally()
        tally._compare("chaos/w0000", Standing({one: should}), Standing({one: does}), incomplete)
        assert (tally.doubles, tally.missing, tally.left) == (doubles, missing, left), (should, does, incomplete)
        assert tally.good is (doubles == missing == 0)
