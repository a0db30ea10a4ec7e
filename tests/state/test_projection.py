"""The agents' Delta tables: idempotent projections that any Delta reader opens."""

from __future__ import annotations

import os
from typing import Any

import polars as pl
import pytest
from deltalake import DeltaTable
from scenario import AWKWARD_KEY, PROVENANCE, complete, join, rows, seal

from dagster_mao.errors import StoreError
from dagster_mao.state import StateStore, staged
from dagster_mao.state.projection import Projection
from tests.stores import on_every_store


def test_a_delta_reader_sees_workflow_and_version_beside_the_rows(store: StateStore) -> None:
    score = complete(store, "run-1", key=AWKWARD_KEY, points=2.0)[1]
    complete(store, "run-2", key=AWKWARD_KEY, points=3.0)
    table = pl.scan_delta(score.uri, storage_options=store.objects.storage_options or None)
    assert table.select("_workflow", "_version", "points").sort("_version").collect().rows() == [
        (f"credit/{AWKWARD_KEY}", 1, 20.0),
        (f"credit/{AWKWARD_KEY}", 4, 30.0),
    ]


@on_every_store
def test_a_table_left_behind_by_a_crash_is_completed_by_the_next_seal(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as crash:
        crash.setattr(Projection, "add", lambda *_: None)
        complete(store, "run-1")
    score = complete(store, "run-2")[1]
    table = pl.scan_delta(score.uri, storage_options=store.objects.storage_options or None)
    assert table.select("_version").collect()["_version"].sort().to_list() == [1, 4]


def test_a_table_that_cannot_be_written_does_not_undo_the_seal(local_store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise StoreError("no space")

    monkeypatch.setattr(Projection, "_try_add", full)
    assert complete(local_store, "run-1")[2].version == 2


def test_new_fields_widen_the_table_and_old_rows_stay(local_store: StateStore) -> None:
    complete(local_store, "run-1")
    wide = rows(1.0).with_columns(reason=pl.lit("thin file"))
    attempt = join(local_store, "run-2")
    with staged(local_store.objects, wide) as batch:
        sealed, _ = attempt.seal("score", batch, row_count=1, schema=wide.schema, parents=[], provenance=PROVENANCE)
    assert pl.scan_delta(sealed.uri).sort("_version").collect()["reason"].to_list() == [None, "thin file"]


def test_the_properties_that_protect_history_are_set(local_store: StateStore) -> None:
    score = complete(local_store, "run-1")[1]
    held = DeltaTable(score.uri).metadata().configuration
    assert held["delta.appendOnly"] == "true"
    assert held["delta.deletedFileRetentionDuration"] == "interval 36500 days"


def test_every_version_stays_in_the_table_when_its_commits_are_dropped(local_store: StateStore) -> None:
    sealed = [seal(local_store, join(local_store, f"run-{n}", key=f"day-{n}"), "applications", float(n)) for n in range(4)]
    for n in range(4, 12):
        for commit in (local_store.objects.local / sealed[0].table / "_delta_log").glob("*.json"):
            os.utime(commit, (0, 0))
        seal(local_store, join(local_store, f"run-{n}", key=f"day-{n}"), "applications", float(n))
    assert len(list((local_store.objects.local / sealed[0].table / "_delta_log").glob("*.json"))) < 12
    assert pl.scan_delta(sealed[0].uri).collect()["points"].sort().to_list() == [float(n) for n in range(12)]


def test_an_agent_that_runs_longer_than_commits_are_kept_seals_and_is_in_the_table(
    local_store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its table was opened before it ran; what others sealed meanwhile had the commits dropped that the handle would read."""
    seal(local_store, join(local_store, "run-0", key="day-0"), "applications", 0.0)
    slow, admit = join(local_store, "slow"), Projection.admit

    def admitted(projection: Projection, *given: Any) -> None:
        admit(projection, *given)
        monkeypatch.setattr(Projection, "admit", admit)
        for n in range(1, 12):
            for commit in (local_store.objects.local / projection.path / "_delta_log").glob("*.json"):
                os.utime(commit, (0, 0))
            seal(local_store, join(local_store, f"run-{n}", key=f"day-{n}"), "applications", float(n))

    monkeypatch.setattr(Projection, "admit", admitted)
    sealed = seal(local_store, slow, "applications", 12.0)
    assert pl.scan_delta(sealed.uri).collect()["points"].sort().to_list() == [float(n) for n in range(13)]


def test_an_empty_batch_is_a_version_with_no_rows(store: StateStore) -> None:
    attempt = join(store, "run-1")
    with staged(store.objects, rows()) as batch:
        sealed, _ = attempt.seal("applications", batch, row_count=0, schema=rows().schema, parents=[], provenance=PROVENANCE)
    assert store.read(sealed).collect().equals(rows())
    assert pl.scan_delta(sealed.uri, storage_options=store.objects.storage_options or None).collect().height == 0


def test_seals_of_one_agent_in_one_workflow_and_another_share_the_table(local_store: StateStore) -> None:
    entry = seal(local_store, join(local_store, "a", key="monday"), "applications", 1.0)
    seal(local_store, join(local_store, "b", key="tuesday"), "applications", 2.0)
    assert pl.scan_delta(entry.uri).select("_workflow").collect()["_workflow"].sort().to_list() == ["credit/monday", "credit/tuesday"]
