"""What delta-rs does that the state room stands on, or works around. When one of these fails, a release has changed it: look again."""

from __future__ import annotations

import time
from pathlib import Path

import polars as pl
import pytest
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake import Schema as DeltaSchema
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, RemoveAction


@pytest.fixture
def table(tmp_path: Path) -> str:
    path = str(tmp_path / "table")
    for n in range(6):
        write_deltalake(path, pl.DataFrame({"n": [n]}), mode="append", configuration={"delta.appendOnly": "true"} if n == 0 else None)
    return path


def _rows(path: str) -> list[int]:
    return pl.scan_delta(path).collect()["n"].sort().to_list()


def _commit(handle: DeltaTable, app: str, number: int, actions: list[AddAction | RemoveAction] | None = None) -> None:
    transaction = CommitProperties(app_transactions=[Transaction(app, number)], max_commit_retries=1000)
    handle.create_write_transaction(actions or [], "append", handle.schema(), commit_properties=transaction)


def test_two_optimize_compactions_at_once_double_every_row(table: str) -> None:
    """Why the log compacts by itself, as a transaction."""
    first, second = DeltaTable(table), DeltaTable(table)
    first.optimize.compact()
    second.optimize.compact(commit_properties=CommitProperties(max_commit_retries=0))
    assert _rows(table) == sorted(2 * list(range(6)))


def test_a_transaction_key_conflicts_when_it_moved_after_the_handle_was_loaded(table: str) -> None:
    first, second = DeltaTable(table), DeltaTable(table)
    _commit(first, "workflow", 0)
    with pytest.raises(CommitFailedError):
        _commit(second, "workflow", 0)
    # The number is recorded, not compared: on a fresh handle any passes. So the head is read on the handle that commits.
    _commit(DeltaTable(table), "workflow", 7)
    assert DeltaTable(table).transaction_version("workflow") == 7


def test_unrelated_keys_and_plain_appends_do_not_conflict(table: str) -> None:
    first, second = DeltaTable(table), DeltaTable(table)
    _commit(first, "one", 0)
    write_deltalake(table, pl.DataFrame({"n": [6]}), mode="append")
    _commit(second, "other", 0)
    assert _rows(table) == list(range(7))


def test_removes_in_a_transaction_lose_to_another_with_the_same_key(table: str) -> None:
    first, second = DeltaTable(table), DeltaTable(table)
    names = [Path(uri).name for uri in first.file_uris()]
    removes: list[AddAction | RemoveAction] = [RemoveAction(name, False, int(time.time() * 1000)) for name in names]
    _commit(first, "compaction", 1, removes)
    with pytest.raises(CommitFailedError):
        _commit(second, "compaction", 1, removes)


def test_transactions_survive_checkpoint_and_clean_up_and_a_handle_from_before_it_fails(table: str) -> None:
    """A commit through a handle whose version was cleaned away must not land on a number that nobody will read."""
    stale = DeltaTable(table)
    _commit(DeltaTable(table), "workflow", 3)
    DeltaTable(table).alter.set_table_properties({"delta.logRetentionDuration": "interval 0 seconds"})
    now = DeltaTable(table)
    now.create_checkpoint()
    now.cleanup_metadata()
    assert not list(Path(table, "_delta_log").glob("00000000000000000005.json"))
    assert DeltaTable(table).transaction_version("workflow") == 3
    with pytest.raises(DeltaError):
        _commit(stale, "late", 0)
    assert DeltaTable(table).transaction_version("late") is None


def test_polars_takes_partition_values_from_the_path_and_not_from_the_log(tmp_path: Path) -> None:
    """Why snapshots lie in Hive paths."""
    schema = pl.Schema({"n": pl.Int64, "part": pl.String})
    for folder, expected in (("", None), ("part=b/", "b")):
        handle = DeltaTable.create(tmp_path / f"table{folder[:1]}", DeltaSchema.from_arrow(schema), partition_by=["part"])
        file = tmp_path / f"table{folder[:1]}" / f"{folder}rows.parquet"
        file.parent.mkdir(exist_ok=True)
        pl.DataFrame({"n": [1]}).write_parquet(file)
        add = AddAction(f"{folder}rows.parquet", file.stat().st_size, {"part": "b"}, 0, True, "{}")
        handle.create_write_transaction([add], "append", handle.schema(), partition_by=["part"])
        assert pl.scan_delta(handle.table_uri).collect()["part"].to_list() == [expected]


def test_a_sink_writes_the_same_bytes_for_the_same_rows(tmp_path: Path) -> None:
    """What makes a re-seal of the same result the same digest."""
    frame = pl.LazyFrame({"n": range(300_000)}).with_columns(text=pl.col("n").cast(pl.String))
    for name in ("one", "other"):
        frame.sink_parquet(tmp_path / name, compression="zstd", row_group_size=122_880)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


def test_a_file_that_is_added_again_is_listed_once(tmp_path: Path) -> None:
    """Why files of calls are called after their bytes: a commit whose acknowledgement was lost is made again."""
    path = str(tmp_path / "table")
    DeltaTable.create(path, schema=DeltaSchema.from_arrow(pl.Schema({"n": pl.Int64})), configuration={"delta.checkpointInterval": "2"})
    pl.DataFrame({"n": [1, 2]}).write_parquet(f"{path}/a.parquet")
    add = AddAction("a.parquet", (tmp_path / "table" / "a.parquet").stat().st_size, {}, 0, True, '{"numRecords": 2}')
    for _ in range(5):
        handle = DeltaTable(path)
        handle.create_write_transaction([add], "append", handle.schema())
        assert _rows(path) == [1, 2]
    assert DeltaTable(path).version() == 5
