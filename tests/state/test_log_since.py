"""Following the log: every seal comes to every follower, whatever clocks, slow commits, merges and other followers do."""

from __future__ import annotations

import datetime as dt
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import polars as pl
import pytest
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import RemoveAction
from scenario import join, seal

from dagster_mao.state import StateStore
from dagster_mao.state.log import BRIEF, SCHEMA, StateLog


def enter(store: StateStore, number: int) -> None:
    seal(store, join(store, f"run-{number}", key=f"day-{number}"), "applications")


class Follower:
    """Reads increments, and counts how often each seal came."""

    def __init__(self, store: StateStore) -> None:
        self.store, self.cursor = store, ""
        self.came: dict[str, int] = {}

    def look(self) -> int:
        rows, self.cursor = self.store.sealed_since(self.cursor, "credit")
        for workflow in rows["workflow_id"]:
            self.came[workflow] = self.came.get(workflow, 0) + 1
        return rows.height


class ByNewestTime(Follower):
    """The naive one: whatever was sealed after the newest seal that it saw."""

    def look(self) -> int:
        newest = dt.datetime.fromisoformat(self.cursor) if self.cursor else dt.datetime.min.replace(tzinfo=dt.timezone.utc)
        rows = self.store.log().filter(pl.col("sealed_at") > newest).collect()
        for workflow in rows["workflow_id"]:
            self.came[workflow] = self.came.get(workflow, 0) + 1
        if rows.height:
            self.cursor = rows["sealed_at"].max().isoformat()  # type: ignore[union-attr]
        return rows.height


class ByUnreadFiles(Follower):
    """The naive one: whatever lies in files that it has not seen, each merged one counted as seen."""

    def look(self) -> int:
        table = self.store._log.open()
        assert table is not None
        names = [uri.rpartition("/")[2] for uri in table.file_uris()]
        new = [name for name in names if name not in self.cursor and "-" not in name]
        self.cursor += " ".join(new)
        if not new:
            return 0
        rows = self.store._log._rows([f"{self.store._log.uri}/{name}" for name in new]).collect()
        for workflow in rows["workflow_id"]:
            self.came[workflow] = self.came.get(workflow, 0) + 1
        return rows.height


def test_nothing_comes_of_a_store_that_is_not_there_and_nothing_is_made(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "state")
    rows, cursor = store.sealed_since("", "credit")
    assert (rows.columns, rows.height, cursor) == (list(BRIEF), 0, "")
    assert store.sealed("credit").is_empty()
    assert list(tmp_path.iterdir()) == []


def test_each_seal_comes_once_between_merges_and_only_those_of_the_pipeline(store: StateStore) -> None:
    follower = Follower(store)
    for number in range(4):
        enter(store, number)
        assert follower.look() == 1
    assert follower.look() == 0
    assert store.sealed_since("", "other")[0].is_empty()
    assert store.sealed("credit", ["credit/day-2", "credit/none"])["workflow_id"].to_list() == ["credit/day-2"]


@pytest.mark.parametrize(("follow", "is_right"), [(Follower, True), (ByNewestTime, False)])
def test_a_seal_whose_commit_was_slow_or_whose_clock_was_behind_comes(
    local_store: StateStore, monkeypatch: pytest.MonkeyPatch, follow: type[Follower], is_right: bool
) -> None:
    follower, append = follow(local_store), StateLog.append

    def slow(self: StateLog, *given: object) -> object:
        monkeypatch.setattr(StateLog, "append", append)
        enter(local_store, 2)  # begins later, and is committed first
        follower.look()
        return append(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(StateLog, "append", slow)
    enter(local_store, 1)
    follower.look()
    assert (set(follower.came) == {"credit/day-1", "credit/day-2"}) is is_right


@pytest.mark.parametrize(("follow", "is_right"), [(Follower, True), (ByUnreadFiles, False)])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.long), pytest.param(2, marks=pytest.mark.long)])
def test_every_seal_comes_to_every_follower_whenever_it_looks(
    local_store: StateStore, monkeypatch: pytest.MonkeyPatch, follow: type[Follower], is_right: bool, seed: int
) -> None:
    """Merges are made by handles as old as may be: what was committed behind their back lies beside the merged file."""
    chance, log = random.Random(seed), local_store._log
    monkeypatch.setattr(StateLog, "_maintain", lambda *_, **__: None)
    enter(local_store, 0)
    followers, sealed, handle, merges = [follow(local_store) for _ in range(3)], 1, DeltaTable(log.uri), 0
    while sealed < 65:
        what = chance.random()
        if what < 0.7:
            enter(local_store, sealed)
            sealed += 1
        elif what < 0.8:
            files = len(handle.file_uris())
            with suppress(CommitFailedError, DeltaError):  # a handle that is older than what is kept of the log gives up, as in a seal
                log._compact(handle)
                merges += files >= 10
            handle = DeltaTable(log.uri)
        else:
            chance.choice(followers[:2]).look()  # the third comes last of all
    for follower in followers:
        follower.look()
    assert merges >= 2
    assert all(len(follower.came) == sealed for follower in followers) is is_right
    if is_right:
        assert max(max(follower.came.values()) for follower in followers) <= 2


def test_files_that_an_earlier_release_merged_are_read_by_name(local_store: StateStore) -> None:
    for number in range(3):
        enter(local_store, number)
    follower = Follower(local_store)
    follower.look()
    log = local_store._log
    table = DeltaTable(log.uri)
    rows = log.scan(table).collect()
    removes = [RemoveAction(uri.rpartition("/")[2], False, 0) for uri in table.file_uris()]
    table.create_write_transaction(
        [*removes, log._write(rows, new=False)],
        "append",
        table.schema(),
        commit_properties=CommitProperties(app_transactions=[Transaction("compaction", 1)]),
    )
    assert follower.look() == 3
    assert follower.look() == 0
    for number in range(3, 15):  # and merged again by this one
        enter(local_store, number)
        follower.look()
    assert len(follower.came) == 15
    assert local_store.log().collect().schema == SCHEMA


@pytest.mark.parametrize("lost", ["", "nonsense", "{}", '{"log": "another", "version": 3, "files": []}'])
def test_a_cursor_that_is_lost_or_of_another_log_costs_time_only(local_store: StateStore, lost: str) -> None:
    for number in range(12):
        enter(local_store, number)
    assert local_store.sealed_since(lost, "credit")[0].height == 12


def test_a_cursor_of_a_log_that_was_restored_to_an_earlier_time_is_begun_again(local_store: StateStore, tmp_path: Path) -> None:
    for number in range(3):
        enter(local_store, number)
    root = Path(local_store.root)
    shutil.copytree(root, tmp_path / "backup")
    enter(local_store, 3)
    cursor = local_store.sealed_since("", "credit")[1]
    shutil.rmtree(root)
    shutil.copytree(tmp_path / "backup", root)
    assert StateStore(root).sealed_since(cursor, "credit")[0].height == 3


def test_a_file_that_a_vacuum_took_from_under_the_look_is_no_error(local_store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(9):
        enter(local_store, number)
    rows = StateLog._rows
    done: list[Callable[..., object]] = []

    def late(self: StateLog, *given: object, **options: object) -> pl.LazyFrame:
        found = rows(self, *given, **options)  # type: ignore[arg-type]
        if not done:
            done.append(rows)
            enter(local_store, 9)
            DeltaTable(local_store._log.uri).vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False, full=True)
        return found

    monkeypatch.setattr(StateLog, "_rows", late)
    assert local_store.sealed_since("", "credit")[0].height == 10


def test_some_workflows_are_found_in_whichever_files_they_lie(local_store: StateStore) -> None:
    assert local_store.sealed("credit", []).is_empty()
    for number in range(23):  # two merged files and some single ones
        seal(local_store, join(local_store, f"run-{number}", key=f"day-{number % 12}"), "applications", number)
    asked = ["credit/day-0", "credit/day-11", "credit/day-3", "credit/day-30", "credit/a", "credit/z"]
    found = local_store.sealed("credit", asked).sort("workflow_id", "version").select("workflow_id", "version").rows()
    assert found == [
        *[("credit/day-0", 0), ("credit/day-0", 1), ("credit/day-11", 0)],
        *[("credit/day-3", 0), ("credit/day-3", 1)],
    ]
    held = local_store._log.seals_of(asked)
    assert {name: len(seals) for name, seals in held.items()} == {name: found.count((name, 0)) + found.count((name, 1)) for name in asked}
    assert local_store.sealed("credit").height == 23
    assert local_store.sealed("other").is_empty()
