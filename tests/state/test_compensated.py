"""What a compensation leaves in the state log: a fence that ends the attempt, and a version that says what is effective again."""

from __future__ import annotations

import pytest
from scenario import AWKWARD_KEY, PLAN, complete, join, seal

from dagster_mao.errors import FencedError
from dagster_mao.state import StateStore, is_completed
from dagster_mao.state.verify import verify

WORKFLOW = f"credit/{AWKWARD_KEY}"


def compensate(store: StateStore, attempt: str) -> tuple[int, int]:
    fence = store.fence_incomplete(WORKFLOW, pipeline="credit", attempt=attempt, run_id="undo")
    assert fence is not None
    return fence.version, store.compensated(WORKFLOW, fence=fence).version


def test_the_state_before_the_attempt_is_effective_again_as_a_version_that_says_so(store: StateStore) -> None:
    before = complete(store, "run-1", key=AWKWARD_KEY)
    seal(store, join(store, "run-2", key=AWKWARD_KEY), PLAN[0], 7.0)
    assert join(store, "run-2", key=AWKWARD_KEY).epoch == 0
    assert compensate(store, "run-2") == (4, 5)
    told = store.seals(WORKFLOW)[-1]
    assert (told.kind, told.attempt, told.run_id, told.epoch) == ("compensated", "run-2", "undo", 1)
    assert [(parent.agent, parent.version) for parent in told.parents] == [("", 4), *((s.agent, s.version) for s in before)]
    assert store.effective(WORKFLOW) == {s.agent: s for s in before}
    assert verify(store).findings == ()
    assert join(store, "run-3", key=AWKWARD_KEY).epoch == 1
    again = complete(store, "run-3", key=AWKWARD_KEY, points=3.0)
    assert store.effective(WORKFLOW) == {s.agent: s for s in again}
    assert verify(store).good


def test_it_is_fenced_and_told_once_whoever_comes_again(local_store: StateStore) -> None:
    complete(local_store, "run-1", key=AWKWARD_KEY)
    seal(local_store, join(local_store, "run-2", key=AWKWARD_KEY), PLAN[0], 7.0)
    local_store.fence(WORKFLOW, attempt="run-2", run_id="an operator")
    assert compensate(local_store, "run-2") == compensate(local_store, "run-2") == (4, 5)
    assert len(local_store.seals(WORKFLOW)) == 6


def test_a_completed_attempt_is_not_fenced(local_store: StateStore) -> None:
    complete(local_store, "run-1", key=AWKWARD_KEY)
    assert local_store.fence_incomplete(WORKFLOW, pipeline="credit", attempt="run-1", run_id="undo") is None
    assert len(local_store.seals(WORKFLOW)) == 3


def test_an_attempt_that_sealed_nothing_is_fenced_by_version_0(local_store: StateStore) -> None:
    early = join(local_store, "run-1", key=AWKWARD_KEY)
    assert compensate(local_store, "run-1") == (0, 1)
    with pytest.raises(FencedError):
        seal(local_store, early, PLAN[0])
    with pytest.raises(FencedError):
        join(local_store, "run-1", key=AWKWARD_KEY)
    assert verify(local_store).good
    again = complete(local_store, "run-2", key=AWKWARD_KEY)
    assert [(s.version, s.epoch) for s in again] == [(2, 1), (3, 1), (4, 1)]
    assert local_store.effective(WORKFLOW) == {s.agent: s for s in again}


def test_which_attempts_at_many_workflows_have_completed_one_read_says_as_their_seals_do(store: StateStore) -> None:
    complete(store, "run-1", key=AWKWARD_KEY)
    seal(store, join(store, "run-2", key=AWKWARD_KEY), PLAN[0], 7.0)
    complete(store, "run-3", key="other")
    complete(store, "run-4", key="other", points=4.0)
    store.fence("credit/other", attempt="run-3", run_id="an operator")
    compensate(store, "run-2")
    workflows = {WORKFLOW, "credit/other", "credit/nobody's"}
    found = store.completed("credit", workflows)
    assert found == {(WORKFLOW, "run-1"), ("credit/other", "run-4")}
    told = {(name, seal.attempt) for name in workflows for seal in store.seals(name)}
    assert found == {(name, attempt) for name, attempt in told if is_completed(store.seals(name), attempt)}
    assert store.completed("another", workflows) == set()
