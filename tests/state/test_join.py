"""Joining an attempt with the versions to read told: what a subscriber does, in a run of its own."""

from __future__ import annotations

import pytest
from scenario import join, seal

from dagster_mao.errors import FencedError, PinError, StaleStateError, TamperedError
from dagster_mao.state import Attempt, Seal, StateStore

WORKFLOW = "credit/day"


def entered(store: StateStore) -> Seal:
    return seal(store, join(store, "entry-run", plan=["applications"]), "applications")


def told(store: StateStore, run: str, *reads: int, plan: str = "score") -> Attempt:
    return store.join_attempt(store.seals(WORKFLOW), attempt="entry-run", reads=reads, run_id=run, plan=[plan])


def test_runs_join_the_attempt_of_the_entry_and_read_what_they_were_told(store: StateStore) -> None:
    entry = entered(store)
    score = seal(store, told(store, "run-1", 0), "score", parents=[entry])
    risk = told(store, "run-2", 0, 1, plan="risk")
    assert (risk.id, risk.workflow_key, risk.now) == ("entry-run", "day", entry.now)
    assert [risk.pin("applications"), risk.pin("score")] == [entry, score]
    sealed = seal(store, risk, "risk", parents=[entry, score])
    assert (sealed.attempt, sealed.run_id, sealed.plan, sealed.kind) == ("entry-run", "run-2", ("risk",), "output")
    assert store.effective(WORKFLOW) == {"applications": entry, "score": score, "risk": sealed}
    assert not any(path.startswith("attempts/credit/entry-run/risk") for path in store.objects.list("attempts"))


def test_the_last_version_is_not_read_unless_it_was_told(local_store: StateStore) -> None:
    entry = entered(local_store)
    first = seal(local_store, told(local_store, "run-1", 0), "score", 1.0, parents=[entry])
    by_hand = local_store.open_attempt(
        pipeline="credit", attempt="run-2", run_id="run-2", plan=["score"], entry="applications", workflow_key="day"
    )
    second = seal(local_store, by_hand, "score", 2.0, parents=[entry])
    assert (first.version, second.version) == (1, 2)
    assert told(local_store, "run-3", 1).pin("score") == first
    with pytest.raises(PinError, match="not told which version"):
        told(local_store, "run-3", 1).pin("applications")


def test_of_two_runs_that_were_told_the_same_one_seals(local_store: StateStore) -> None:
    entry = entered(local_store)
    one, other = told(local_store, "run-1", 0), told(local_store, "run-2", 0)
    seal(local_store, one, "score", 1.0, parents=[entry])
    with pytest.raises(StaleStateError):
        seal(local_store, other, "score", 1.0, parents=[entry])
    assert [s.agent for s in local_store.seals(WORKFLOW)] == ["applications", "score"]


def test_a_fence_ends_the_attempt_for_all_its_runs(local_store: StateStore) -> None:
    entry = entered(local_store)
    running = told(local_store, "run-1", 0)
    local_store.fence(WORKFLOW, attempt="entry-run", run_id="saga")
    with pytest.raises(FencedError):
        seal(local_store, running, "score", parents=[entry])
    with pytest.raises(FencedError):
        told(local_store, "run-2", 0)


def test_a_version_whose_row_was_rewritten_is_not_read(local_store: StateStore) -> None:
    entered(local_store)
    seen = [s.model_copy(update={"row_count": 7}) for s in local_store.seals(WORKFLOW)]
    attempt = local_store.join_attempt(seen, attempt="entry-run", reads=[0], run_id="run-1", plan=["score"])
    with pytest.raises(TamperedError):
        attempt.pin("applications")


def test_what_was_sealed_before_this_run_joined_is_not_sealed_from_the_same_versions_again(local_store: StateStore) -> None:
    entry = entered(local_store)
    seal(local_store, told(local_store, "run-1", 0), "score", 1.0, parents=[entry])
    with pytest.raises(StaleStateError, match="run-1 sealed version 1"):
        seal(local_store, told(local_store, "run-2", 0), "score", 2.0, parents=[entry])
    assert len(local_store.seals(WORKFLOW)) == 2
