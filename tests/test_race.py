"""The article's war story, and lost updates: the naive form must be wrong, and ours right, on the same schedule."""

from __future__ import annotations

from pathlib import Path

import pytest

from dagster_mao.state import StateStore
from examples.race import invalidation_lags, storm, wrong_through_the_store, wrong_with_a_cache


def test_a_shared_cache_makes_a_fifth_of_the_ratings_wrong() -> None:
    shares = [wrong_with_a_cache(invalidation_lags(1_000, seed)) for seed in range(20)]
    assert 0.18 < sum(shares) / len(shares) < 0.22


def test_reading_the_latest_version_is_as_wrong_and_pinned_versions_are_never_wrong(tmp_path: Path) -> None:
    lags = invalidation_lags(200, seed=7)
    latest = wrong_through_the_store(StateStore(tmp_path / "latest"), lags, latest=True, workflows=3)
    assert latest == wrong_with_a_cache(lags) > 0.1
    assert wrong_through_the_store(StateStore(tmp_path / "pinned"), lags, workflows=3) == 0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_eight_processes_sealing_the_same_workflows_lose_nothing_even_when_killed(tmp_path: Path) -> None:
    found = storm(str(tmp_path / "state"), processes=8, tries=12, workflows=3, kills=2)
    assert found["killed"] == 2
    assert found["tried"] >= 8 * 12  # whoever was not killed got through all its tries
    assert found["sealed"] >= found["acknowledged"]
    assert {name: found[name] for name in ("lost", "doubled", "skipped", "torn")} == {"lost": 0, "doubled": 0, "skipped": 0, "torn": 0}
