"""Laws 1, 2 and 4: what may be read is pinned, a version has one winner, and nothing is changed."""

from __future__ import annotations

import polars as pl
import pytest
from deltalake import DeltaTable, write_deltalake
from scenario import AWKWARD_KEY, PROVENANCE, complete, join, rows, seal

from dagster_mao.errors import FencedError, IncompatibleContractError, PinError, StaleStateError, TamperedError
from dagster_mao.state import StateStore, staged
from tests.stores import on_every_store


def test_versions_are_gapless_chained_and_in_seal_order_over_agents_and_attempts(store: StateStore) -> None:
    complete(store, "run-1", key=AWKWARD_KEY)
    complete(store, "run-2", key=AWKWARD_KEY)
    seals = store.seals(f"credit/{AWKWARD_KEY}")
    assert [s.version for s in seals] == list(range(6))
    assert [s.kind for s in seals] == ["entry", "output", "output"] * 2
    assert [s.previous_digest for s in seals] == ["", *(s.seal_digest for s in seals[:-1])]
    assert all(s.seal_digest == s.canonical_digest() for s in seals)


def test_a_row_survives_the_log_as_it_was_signed(store: StateStore) -> None:
    sealed = complete(store, "run-1")[1]
    assert store.seal_at("credit/day", sealed.version) == sealed


@on_every_store
def test_what_was_sealed_is_what_is_read(store: StateStore) -> None:
    entry, *_ = complete(store, "run-1", points=2.5)
    assert store.read(entry).collect().equals(rows(2.5))


def test_the_naive_read_max_then_append_doubles_a_version(tmp_path) -> None:
    """What the compare-and-swap is for: two plain appends that saw the same maximum both succeed."""
    path = str(tmp_path / "log")
    write_deltalake(path, pl.DataFrame({"version": [0]}))
    first, second = DeltaTable(path), DeltaTable(path)
    for handle in (first, second):
        seen = pl.scan_delta(handle).select(pl.max("version")).collect().item()
        write_deltalake(handle, pl.DataFrame({"version": [seen + 1]}), mode="append")
    assert pl.scan_delta(path).collect()["version"].sort().to_list() == [0, 1, 1]


@on_every_store
def test_of_two_runs_sealing_the_same_agent_one_wins_and_nothing_of_the_other_is_visible(store: StateStore) -> None:
    entry = seal(store, join(store, "run-1"), "applications")
    one, other = join(store, "run-1"), join(store, "run-2")
    won = seal(store, one, "score", 1.0, parents=[entry])
    with pytest.raises(StaleStateError, match="run-1 sealed version 1"):
        seal(store, other, "score", 2.0, parents=[entry])
    assert [s.seal_digest for s in store.seals("credit/day")] == [entry.seal_digest, won.seal_digest]
    table = pl.scan_delta(won.uri, storage_options=_lower(store)).collect()
    assert table["points"].to_list() == [1.0]


def test_a_sibling_agents_seal_is_no_conflict(store: StateStore) -> None:
    entry = seal(store, join(store, "run-1"), "applications")
    score, fraud = join(store, "run-1"), join(store, "run-1")
    assert seal(store, score, "score", parents=[entry]).version == 1
    assert seal(store, fraud, "fraud", parents=[entry]).version == 2


def test_sealing_the_same_again_in_the_same_attempt_is_the_same_version(store: StateStore) -> None:
    """A lost acknowledgement, a step retried after its seal: nothing is added, in the log and in the table."""
    entry = seal(store, join(store, "run-1"), "applications")
    before = join(store, "run-1")
    first = seal(store, before, "score", 3.0, parents=[entry])
    assert seal(store, before, "score", 3.0, parents=[entry]) == first
    assert seal(store, join(store, "run-1"), "score", 3.0, parents=[entry]) == first
    assert seal(store, join(store, "run-1b", root="run-1"), "score", 3.0, parents=[entry]) == first
    assert pl.scan_delta(first.uri, storage_options=_lower(store)).collect().height == 1


def test_a_retry_that_comes_to_another_result_is_a_new_version_of_the_same_attempt(store: StateStore) -> None:
    entry = seal(store, join(store, "run-1"), "applications")
    first = seal(store, join(store, "run-1"), "score", 3.0, parents=[entry])
    again = seal(store, join(store, "run-1"), "score", 4.0, parents=[entry])
    assert (first.version, again.version) == (1, 2)
    assert join(store, "run-1").pin("score") == again


def test_the_same_rows_in_a_new_attempt_are_a_new_version(store: StateStore) -> None:
    assert [s.version for s in complete(store, "run-1")] == [0, 1, 2]
    assert [s.version for s in complete(store, "run-2")] == [3, 4, 5]


def test_an_attempt_reads_its_own_seals_and_never_the_latest(store: StateStore) -> None:
    """Two attempts interleaved: a reader of the newest version would mix them."""
    slow_entry = seal(store, join(store, "slow"), "applications", 1.0)
    fast_entry = seal(store, join(store, "fast"), "applications", 2.0)
    seal(store, join(store, "slow"), "score", 10.0, parents=[slow_entry])
    seal(store, join(store, "fast"), "score", 20.0, parents=[fast_entry])
    assert store.read(join(store, "slow").pin("score")).collect()["points"].item() == 10.0
    assert store.read(join(store, "fast").pin("score")).collect()["points"].item() == 20.0


def test_what_an_attempt_does_not_seal_is_pinned_once_when_it_begins(store: StateStore) -> None:
    old = complete(store, "run-1")
    join(store, "partial", plan=["fraud"])  # the first step of the partial run arrives ...
    complete(store, "run-2")  # ... another attempt completes ...
    late_step = join(store, "partial", plan=["fraud"])  # ... and a later step still reads what the first one did
    assert late_step.pin("applications") == old[0]
    assert join(store, "later", plan=["fraud"]).pin("applications").version == 3


def test_an_attempt_that_did_not_complete_is_not_in_the_effective_state(store: StateStore) -> None:
    completed = complete(store, "run-1")
    entry = seal(store, join(store, "run-2"), "applications", 9.0)
    seal(store, join(store, "run-2"), "score", 90.0, parents=[entry])
    assert store.effective("credit/day") == dict(zip(("applications", "score", "fraud"), completed, strict=True))
    seal(store, join(store, "run-2"), "fraud", 90.0, parents=[entry])
    assert {agent: s.version for agent, s in store.effective("credit/day").items()} == {"applications": 3, "score": 4, "fraud": 5}


def test_a_re_execution_continues_the_attempt_of_the_run_it_re_executes(store: StateStore) -> None:
    entry = seal(store, join(store, "run-1"), "applications", 5.0)
    seal(store, join(store, "run-1"), "score", parents=[entry])  # and then the run fails
    again = join(store, "run-1b", root="run-1")
    assert again.pin("applications") == entry
    seal(store, again, "fraud", parents=[entry])
    assert store.effective("credit/day").keys() == {"applications", "score", "fraud"}


def test_a_sibling_re_execution_is_not_read(store: StateStore) -> None:
    entry = seal(store, join(store, "run-1"), "applications", 5.0)
    ours = seal(store, join(store, "run-1"), "score", 1.0, parents=[entry])
    seal(store, join(store, "sibling", root="run-1"), "score", 2.0, parents=[entry])
    assert join(store, "mine", root="run-1").pin("score") == ours


def test_parents_of_different_entries_are_refused(store: StateStore) -> None:
    complete(store, "run-1")
    entry = seal(store, join(store, "run-2", plan=["applications", "score"]), "applications", 7.0)
    seal(store, join(store, "run-2", plan=["applications", "score"]), "score", 70.0, parents=[entry])
    mixed = join(store, "run-3", plan=["risk"])
    with pytest.raises(PinError, match=r"fraud@2 from entry 0, score@4 from entry 3"):
        mixed.require_one_entry("risk", [mixed.pin("score"), mixed.pin("fraud")])


def test_a_missing_upstream_says_what_to_materialise(store: StateStore) -> None:
    with pytest.raises(PinError, match="materialise score"):
        join(store, "run-1", plan=["risk"]).pin("score")
    with pytest.raises(PinError, match="include it in the run"):
        join(store, "run-2").pin("score")


@on_every_store
def test_a_fence_ends_the_attempt_and_everything_that_pinned_before_it(store: StateStore) -> None:
    before = complete(store, "run-1")
    complete(store, "run-2")
    zombie = join(store, "run-2")
    fence = store.fence("credit/day", attempt="run-2", run_id="undo")
    assert (fence.version, fence.kind, fence.epoch) == (6, "fence", 1)
    with pytest.raises(FencedError):
        seal(store, zombie, "score", 99.0)
    with pytest.raises(FencedError, match="start a new run"):
        join(store, "run-2b", root="run-2")
    assert store.effective("credit/day")["score"] == before[1]
    assert complete(store, "run-3")[0].epoch == 1
    assert store.fence("credit/day", attempt="run-2", run_id="undo") == fence


def test_unpartitioned_runs_with_the_entry_are_new_workflows_and_partial_ones_continue_the_last(store: StateStore) -> None:
    first = complete(store, "aaaaaaaa-1", key=None)[0].workflow_id
    second = complete(store, "bbbbbbbb-2", key=None)[0].workflow_id
    assert first != second
    assert join(store, "cccccccc-3", key=None, plan=["score"]).workflow_id == second
    with pytest.raises(PinError, match="No attempt of 'claims' has completed"):
        store.open_attempt(pipeline="claims", attempt="r", run_id="r", plan=["x"], entry="claims")


def test_a_changed_byte_is_not_read(local_store: StateStore) -> None:
    entry = seal(local_store, join(local_store, "run-1"), "applications")
    file = local_store.objects.local / entry.path
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(TamperedError, match="not what was sealed"):
        local_store.read(entry)


def test_a_field_that_changes_its_type_is_refused_before_the_seal(store: StateStore) -> None:
    complete(store, "run-1")
    frame = rows(1.0).with_columns(pl.col("points").cast(pl.String))
    attempt = join(store, "run-2")
    with staged(store.objects, frame) as batch, pytest.raises(IncompatibleContractError, match="points"):
        attempt.seal("score", batch, row_count=1, schema=frame.schema, parents=[], provenance=PROVENANCE)
    assert len(store.seals("credit/day")) == 3


def test_the_seed_and_the_time_are_the_attempts(store: StateStore) -> None:
    one, again, other = join(store, "run-1"), join(store, "run-1b", root="run-1"), join(store, "run-2")
    assert one.now == again.now
    assert one.seed("score") == again.seed("score") != other.seed("score")
    assert 0 <= one.seed("score") < 2**63


def _lower(store: StateStore) -> dict[str, str] | None:
    return store.objects.storage_options or None
