"""The log under pressure: lost acknowledgements, housekeeping at the wrong moment, damage, roots that are no roots."""

from __future__ import annotations

import logging
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError
from scenario import complete, join, rows, seal

from dagster_mao.errors import PinError, StoreError, TamperedError, UnknownVersionError
from dagster_mao.state import StateStore
from dagster_mao.state.log import SCHEMA, StateLog, _crowded_tier
from dagster_mao.state.objects import Objects, safe_name
from tests.stores import on_every_store


def test_reading_an_empty_store_creates_nothing(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "state")
    assert store.seals("credit/day") == []
    assert store.workflows() == []
    assert not store.exists()
    assert store.log().collect().is_empty()
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_version_says_what_there_is(local_store: StateStore) -> None:
    complete(local_store, "run-1")
    with pytest.raises(UnknownVersionError, match="versions 0 to 2"):
        local_store.seal_at("credit/day", 9)


def test_a_commit_that_landed_without_its_acknowledgement_is_found_and_not_repeated(
    local_store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = StateLog._commit

    def unanswered(self: StateLog, *given: object) -> bool:
        commit(self, *given)  # type: ignore[arg-type]
        monkeypatch.setattr(StateLog, "_commit", commit)
        return False

    monkeypatch.setattr(StateLog, "_commit", unanswered)
    sealed = seal(local_store, join(local_store, "run-1"), "applications")
    assert [s.seal_digest for s in local_store.seals("credit/day")] == [sealed.seal_digest]


def test_a_compaction_and_a_vacuum_between_pin_and_seal_do_no_harm(local_store: StateStore) -> None:
    entry = seal(local_store, join(local_store, "run-1"), "applications")
    attempt = join(local_store, "run-1")
    for n in range(25):  # past a checkpoint and a compaction
        seal(local_store, join(local_store, f"other-{n}", key=f"day-{n}"), "applications")
    DeltaTable(local_store._log.uri).vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False)
    assert seal(local_store, attempt, "score", parents=[entry]).version == 1
    assert len(local_store.log().collect()) == 27


def drop_commits(store: StateStore) -> None:
    """As the log does by itself at a checkpoint, with those that are ten seconds old: so long a step takes on a busy machine."""
    folder = Path(store._log.uri) / "_delta_log"
    newest = max(int(file.name[:20]) for file in folder.glob("*.checkpoint.parquet"))
    for file in folder.glob("*.json"):
        if int(file.stem) < newest:
            file.unlink()


def test_commits_that_were_dropped_between_pin_and_seal_are_not_missed(local_store: StateStore) -> None:
    entry = seal(local_store, join(local_store, "run-1"), "applications")
    for n in range(5):  # the handles stand between two checkpoints
        seal(local_store, join(local_store, f"before-{n}", key=f"before-{n}"), "applications")
    attempt, late = join(local_store, "run-1"), local_store._log.open()
    for n in range(25):
        seal(local_store, join(local_store, f"other-{n}", key=f"day-{n}"), "applications")
    drop_commits(local_store)
    assert seal(local_store, attempt, "score", parents=[entry]).version == 1
    assert local_store._log.head("credit/day", late) is None
    assert [found.version for found in local_store._log.seals("credit/day", late)] == [0]  # what it stands for


def test_commits_that_are_dropped_while_an_attempt_is_opened_are_not_missed(
    local_store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(6):
        seal(local_store, join(local_store, f"before-{n}", key=f"before-{n}"), "applications")
    put = Objects.put_if_absent

    def slow(self: Objects, *given: Any) -> Any:
        result = put(self, *given)
        monkeypatch.undo()
        for n in range(10):
            seal(local_store, join(local_store, f"other-{n}", key=f"day-{n}"), "applications")
        drop_commits(local_store)
        return result

    monkeypatch.setattr(Objects, "put_if_absent", slow)
    assert seal(local_store, join(local_store, "run-1"), "applications").version == 0


def test_the_commit_of_the_seal_is_flushed_to_the_disk(local_store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A handle still shows the version before its own commit: flushing that one would be a durable nothing."""
    flushed: list[str] = []
    sync = Objects.sync
    monkeypatch.setattr(Objects, "sync", lambda self, path: (flushed.append(path), sync(self, path))[1])
    for n in range(3):
        seal(local_store, join(local_store, f"run-{n}", key=f"day-{n}"), "applications")
        newest = DeltaTable(local_store._log.uri).version()
        assert f"state_log/_delta_log/{newest:020d}.json" in flushed


def test_a_commit_that_is_cleaned_away_at_once_is_no_error(local_store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The day-old log of a daily job: the commit that makes a checkpoint due drops what is older than a minute."""
    for n in range(22):
        seal(local_store, join(local_store, f"run-{n}", key=f"day-{n}"), "applications")
        for commit in (local_store.objects.local / "state_log" / "_delta_log").glob("*.json"):
            os.utime(commit, (0, 0))
    assert len(local_store.workflows()) == 22


def test_whoever_was_stopped_longer_than_commits_are_kept_joins_and_seals_all_the_same(
    local_store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A handle that was opened before reads commits which are not there any more."""
    entry = seal(local_store, join(local_store, "run-1"), "applications")
    attempt = join(local_store, "run-1")
    old = local_store._log.open()
    for n in range(22):
        for commit in (local_store.objects.local / "state_log" / "_delta_log").glob("*.json"):
            os.utime(commit, (0, 0))
        seal(local_store, join(local_store, f"other-{n}", key=f"day-{n}"), "applications")
    with pytest.raises(DeltaError, match="not found"):
        old.transaction_version("credit/day")
    assert seal(local_store, attempt, "score", parents=[entry]).version == 1
    opened = StateLog.open
    handles = [old]
    monkeypatch.setattr(StateLog, "open", lambda log: handles.pop() if handles else opened(log))
    joined = join(local_store, "run-1")
    assert not handles
    assert joined.pin("applications").version == 0


def test_the_log_keeps_itself_small(local_store: StateStore) -> None:
    for n in range(45):
        seal(local_store, join(local_store, f"run-{n}", key=f"day-{n}"), "applications")
    files = DeltaTable(local_store._log.uri).file_uris()
    assert len(files) < 25
    assert len(local_store.workflows()) == 45


def test_a_row_is_rewritten_once_per_tier() -> None:
    """Merging everything into one growing file rewrites n*n/20 rows, and keeps them on the disk until a vacuum."""
    files, rewritten, names = {}, 0, iter(range(10_000_000))
    for sealed in range(1, 10_001):
        files[str(next(names))] = 1
        if sealed % 10 == 0 and (merged := _crowded_tier(files)):
            rows = sum(files.pop(name) for name in merged)
            files[str(next(names))] = rows
            rewritten += rows
    assert sum(files.values()) == 10_000
    assert rewritten <= 4 * 10_000
    assert len(files) < 50


def test_housekeeping_that_fails_does_not_fail_the_seal(
    local_store: StateStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: object) -> None:
        raise DeltaError("no")

    monkeypatch.setattr(StateLog, "_compact", broken)
    with caplog.at_level(logging.WARNING, "dagster_mao.state"):
        for n in range(20):
            seal(local_store, join(local_store, f"run-{n}", key=f"day-{n}"), "applications")
    assert "put off" in caplog.text


def test_a_removed_row_stops_the_next_seal(local_store: StateStore) -> None:
    complete(local_store, "run-1")
    handle = DeltaTable(local_store._log.uri)
    handle.alter.set_table_properties({"delta.appendOnly": "false"})
    DeltaTable(local_store._log.uri).delete("version = 1")
    with pytest.raises(TamperedError, match="lost or gained rows"):
        seal(local_store, join(local_store, "run-2"), "applications")


def test_a_rewritten_row_is_not_pinned(local_store: StateStore) -> None:
    complete(local_store, "run-1")
    DeltaTable(local_store._log.uri).alter.set_table_properties({"delta.appendOnly": "false"})
    DeltaTable(local_store._log.uri).update(updates={"row_count": "7"}, predicate="version = 1")
    with pytest.raises(TamperedError, match="rewritten"):
        join(local_store, "run-2", plan=["fraud"]).pin("score")


def test_a_damaged_log_is_an_error_and_not_an_empty_one(local_store: StateStore) -> None:
    complete(local_store, "run-1")
    for file in (local_store.objects.local / "state_log" / "_delta_log").iterdir():
        file.unlink()
    with pytest.raises(StoreError, match="state store at"):
        local_store.seals("credit/day")


def test_a_log_file_that_was_cut_off_is_an_error(local_store: StateStore) -> None:
    complete(local_store, "run-1")
    for file in (local_store.objects.local / "state_log").glob("*.parquet"):
        file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(StoreError, match="cannot be read"):
        local_store.seals("credit/day")


def test_a_root_may_have_any_name(tmp_path: Path) -> None:
    for name in ("with space", "é", "[b]*", "a+b=c"):
        store = StateStore(tmp_path / name)
        complete(store, "run-1")
        assert store.workflows() == ["credit/day"]


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        StateStore(tmp_path / "state")


def test_a_root_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="state store at"):
        complete(StateStore(tmp_path / "file" / "below"), "run-1")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_root_says_so(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="writable"):
        complete(StateStore(tmp_path / "state"), "run-1")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_says_so_and_nothing_is_sealed(tmp_path: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path], check=False).returncode:
        pytest.skip("this machine lets nobody mount")
    try:
        store = StateStore(tmp_path / "state")
        entry = seal(store, join(store, "run-1"), "applications")
        attempt = join(store, "run-1")
        with pytest.raises(StoreError, match=r"No space left.*free disk space"):
            seal(store, attempt, "score", *(n * 0.7919 for n in range(20_000)), parents=[entry])
        assert [s.agent for s in store.seals("credit/day")] == ["applications"]
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_a_bucket_that_is_not_there_says_so(s3: dict[str, str]) -> None:
    with pytest.raises(StoreError, match="s3://nowhere/state"):
        StateStore("s3://nowhere/state", s3).seals("credit/day")


def test_keys_never_leave_the_root(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "state")
    for key in ("../../outside", "/etc/passwd", "..", ".", "a/../../b", "\n", "C:\\x"):
        entry = seal(store, join(store, "../run", key=key), "applications")
        assert store.read(entry).collect().equals(rows(1.0))
    assert {path.name for path in tmp_path.iterdir()} == {"state"}
    assert {path.name for path in (tmp_path / "state").iterdir()} == {"state_log", "tables", "attempts", ".staging"}


def test_a_key_too_long_for_a_folder_is_refused_before_anything_is_written(local_store: StateStore) -> None:
    with pytest.raises(PinError, match="shorten the key"):
        join(local_store, "run-1", key="x" * 300)


def test_safe_names_differ_for_different_texts() -> None:
    texts = ["a", "a/b", "a-b", "a b", "", "..", "a/../b", "é", "É"]
    names = {safe_name(text) for text in texts}
    assert len(names) == len(texts)
    assert all("/" not in name and ".." not in name and name for name in names)


def test_what_a_killed_step_left_in_staging_is_removed_after_a_week(local_store: StateStore) -> None:
    complete(local_store, "run-1")
    staging = local_store.objects.local / ".staging"
    for name, age_days in (("old", 8), ("young", 6)):
        (staging / name).mkdir()
        (staging / name / "batch.parquet").write_bytes(b"half a ba")
        then = time.time() - age_days * 24 * 3600
        os.utime(staging / name, (then, then))
    complete(local_store, "run-2")
    assert {folder.name for folder in staging.iterdir()} == {"young"}


@on_every_store
def test_put_if_absent_has_one_winner(store: StateStore) -> None:
    assert store.objects.put_if_absent("attempts/one.json", b"first")
    assert not store.objects.put_if_absent("attempts/one.json", b"second")
    assert store.objects.get("attempts/one.json") == b"first"
    assert not list(store.objects.list("nothing"))
    assert Objects(store.root, store.objects.storage_options).size("attempts/one.json") == 5


def test_any_delta_reader_opens_the_log(local_store: StateStore) -> None:
    complete(local_store, "run-1")
    log = pl.scan_delta(local_store._log.uri).sort("version").collect()
    assert log["agent"].to_list() == ["applications", "score", "fraud"]
    assert log["parents"].list.len().to_list() == [0, 1, 1]


def test_rows_of_a_release_that_knew_fewer_columns_are_read_and_compacted(local_store: StateStore) -> None:
    first = complete(local_store, "run-0")
    assert local_store.objects.local
    for file in (local_store.objects.local / "state_log").glob("*.parquet"):
        pl.read_parquet(file).drop("quarantine_path", "quarantine_digest", "quarantine_bytes").write_parquet(file)
    assert local_store.seals("credit/day") == first
    for number in range(1, 6):
        complete(local_store, f"run-{number}")
    assert local_store.seals("credit/day")[:3] == first
    assert len(local_store.seals("credit/day")) == 18
    assert local_store.collect(local_store.log()).columns == SCHEMA.names()
