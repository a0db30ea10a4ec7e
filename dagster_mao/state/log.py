"""The state log: one append-only Delta table with one row per seal, and the compare-and-swap that gives each version one winner."""

from __future__ import annotations

import io
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple, TypeVar

import polars as pl
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake import Schema as DeltaSchema
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction, RemoveAction

from dagster_mao.correlation import WorkflowLog
from dagster_mao.errors import MaoError, StoreError, TamperedError
from dagster_mao.state.objects import Objects, reaching
from dagster_mao.state.seal import OUTPUTS, Seal
from dagster_mao.state.tables import open_table

_PATH = "state_log"
_UTC = pl.Datetime("us", "UTC")
_COLUMNS: dict[str, pl.DataType | type[pl.DataType]] = {
    "workflow_id": pl.String,
    "version": pl.Int64,
    "kind": pl.String,
    "pipeline": pl.String,
    "agent": pl.String,
    "attempt": pl.String,
    "epoch": pl.Int64,
    "parents": pl.List(pl.Struct({"agent": pl.String, "workflow_id": pl.String, "version": pl.Int64, "digest": pl.String})),
    "digest": pl.String,
    "previous_digest": pl.String,
    "row_count": pl.Int64,
    "quarantined": pl.Int64,
    "size_bytes": pl.Int64,
    "path": pl.String,
    "table": pl.String,
    "uri": pl.String,
    "contract": pl.String,
    "contract_version": pl.String,
    "contract_hash": pl.String,
    "contract_schema": pl.String,
    "key": pl.String,
    "agent_version": pl.String,
    "config": pl.String,
    "model": pl.String,
    "run_id": pl.String,
    "base": pl.Int64,
    "plan": pl.List(pl.String),
    "now": _UTC,
    "seed": pl.Int64,
    "latency_seconds": pl.Float64,
    "sealed_at": _UTC,
    "library_version": pl.String,
    "quarantine_path": pl.String,
    "quarantine_digest": pl.String,
    "quarantine_bytes": pl.Int64,
    "deferred": pl.Int64,
    "deferred_path": pl.String,
    "deferred_digest": pl.String,
    "deferred_bytes": pl.Int64,
    "fallbacks": pl.Int64,
    "policy": pl.String,
    "usage": pl.String,
    "registration": pl.String,
    "readers": pl.List(pl.String),
    "judged": pl.String,
    "verdicts_path": pl.String,
    "verdicts_digest": pl.String,
    "verdicts_bytes": pl.Int64,
    "seal_digest": pl.String,
}
SCHEMA = pl.Schema(_COLUMNS)
BRIEF = ("workflow_id", "version", "kind", "agent", "attempt", "parents", "digest", "sealed_at")
"""The columns by which a reader that follows the log tells what there is to do."""

# An open reads every commit since the last checkpoint, so checkpoints are frequent; the commits behind one are dropped after seconds,
# because the log's own time travel is not used (the rows say everything, and are chained). `setTransactionRetentionDuration` must never
# be set: the compare-and-swap lives on these transactions.
_CHECKPOINT_EVERY = 5
_COMPACT_EVERY = 10
_PROPERTIES = {
    "delta.appendOnly": "true",
    "delta.checkpointInterval": str(_CHECKPOINT_EVERY),
    "delta.logRetentionDuration": "interval 10 seconds",
    "delta.enableExpiredLogCleanup": "true",
    # Checkpoints carry the names of merged files for so long (a week by default), and every open reads them.
    "delta.deletedFileRetentionDuration": "interval 30 seconds",
}
# Ten files of about as many rows become one: each row is rewritten once per power of ten, and no more often, up to the largest tier.
_TIER_FILES, _TIERS = 10, 4
_VACUUM_EVERY = 500
_COMPACTION = "compaction"  # no workflow id: those have a slash
# A merged file says of each row, in a column of its own that is no part of the row, a version of the table by which it had been committed,
# and in its name the last of these: what a follower had read until then, it need not read again.
_LANDED = "_landed"
_MERGED = re.compile(r"(\d+)-[0-9a-f]{32}\.parquet")
_TRIES = 1000
_UNREADABLE = (OSError, pl.exceptions.PolarsError, pl.exceptions.PanicException)  # polars panics on a file that is cut off

logger = WorkflowLog(logging.getLogger("dagster_mao.state"))
T = TypeVar("T")


class StateLog:
    """Reads and appends. Reading creates nothing; the table appears with the first append."""

    def __init__(self, objects: Objects) -> None:
        self._objects = objects
        self.uri = objects.url(_PATH)

    def open(self) -> DeltaTable | None:
        """A handle on the log as it is now; None when nothing was ever sealed here.

        Raises `StoreError` when the store cannot be reached or the log is damaged.
        """
        return open_table(self._objects, _PATH, evidence=_PATH)

    def scan(self, table: DeltaTable | None) -> pl.LazyFrame:
        """All rows, at the version of the handle."""
        if table is None:
            return pl.LazyFrame(schema=SCHEMA)
        return self._files(table)

    def seals(self, workflow_id: str, table: DeltaTable | None = None) -> list[Seal]:
        """The workflow's seals by version, at the version of the handle (opened now when none is given)."""
        return self.seals_of([workflow_id], table)[workflow_id]

    def seals_of(self, workflows: Collection[str], table: DeltaTable | None = None) -> dict[str, list[Seal]]:
        """The same of several workflows, in one read."""
        handles = [table] if table else []

        def read() -> dict[str, list[Seal]]:
            chosen = _within(workflows) & pl.col("workflow_id").is_in(sorted(workflows))
            # Compaction and vacuum may have taken a file away under an old handle.
            rows = self._files(handles.pop() if handles else self.open(), workflows).filter(chosen).sort("version").collect()
            found: dict[str, list[Seal]] = {workflow: [] for workflow in workflows}
            for row in rows.iter_rows(named=True):
                found[row["workflow_id"]].append(Seal.model_validate(row))
            return found

        return self._again(read)

    def seals_at(self, versions: Collection[tuple[str, int]]) -> dict[tuple[str, int], Seal]:
        """The seals of some versions, whatever else their workflows hold, in one read. One that is not there is left out."""
        wanted = pl.DataFrame(sorted(versions), schema={"workflow_id": pl.String, "version": pl.Int64}, orient="row")
        workflows = frozenset(wanted["workflow_id"])

        def read() -> dict[tuple[str, int], Seal]:
            numbers = pl.col("version").is_between(pl.lit(wanted["version"].min()), pl.lit(wanted["version"].max()))
            rows = self._files(self.open(), workflows).filter(_within(workflows) & numbers)
            found = rows.join(wanted.lazy(), on=["workflow_id", "version"], how="semi").collect()
            return {(row["workflow_id"], row["version"]): Seal.model_validate(row) for row in found.iter_rows(named=True)}

        return self._again(read) if versions else {}

    def columns(self, pipeline: str, *names: str, workflow: str | None = None) -> pl.DataFrame:
        """Some columns of a pipeline's rows, or of those of one workflow, in no order."""
        chosen = pl.col("pipeline") == pipeline
        chosen &= pl.lit(True) if workflow is None else pl.col("workflow_id") == workflow
        workflows = None if workflow is None else [workflow]
        return self._again(lambda: self._files(self.open(), workflows).filter(chosen).select(names).collect())

    def since(self, cursor: str) -> tuple[pl.LazyFrame, str]:
        """The rows that were committed after the cursor was taken, and the cursor of now; all rows, for "" or another log's cursor.

        Nobody's clock is asked: a row lies in one file of the table, and is left out only where that file was read before under its name,
        or where it says that the row had been committed by then. So none is passed over, however late it was committed. Rows that were
        merged into another file since the cursor was taken may come again.
        """
        table = self.open()
        if table is None:
            return pl.LazyFrame(schema=SCHEMA), ""
        read = _Cursor.of(cursor, table)
        names = _file_names(table)
        now = _Cursor(str(table.metadata().id), table.version(), frozenset(name for name in names if not _MERGED.fullmatch(name)))
        urls = [f"{self.uri}/{name}" for name in names if not read.has(name)]
        if not urls:
            return pl.LazyFrame(schema=SCHEMA), now.text()
        new = (pl.col(_LANDED) > read.version).fill_null(True)
        return self._rows(urls, landed=True).filter(new).select(SCHEMA.names()), now.text()

    def brief(self, pipeline: str, workflows: Collection[str] | None = None) -> pl.DataFrame:
        """The columns `BRIEF` of a pipeline's rows, all or those of some workflows."""

        def read() -> pl.DataFrame:
            rows = self._files(self.open(), workflows).filter(_within(workflows), pl.col("pipeline") == pipeline)
            return rows.select(BRIEF).collect()

        if workflows is None:
            return self._again(read)
        # To compare with many names costs more while the rows are read.
        return self._again(read).filter(pl.col("workflow_id").is_in(sorted(workflows)))

    def completed(self, pipeline: str, workflows: Collection[str]) -> set[tuple[str, str]]:
        """Workflow and attempt, of those attempts at these workflows that `is_completed` says it of, in one read."""
        columns = ("workflow_id", "version", "kind", "agent", "attempt", "plan")

        def read() -> pl.DataFrame:
            rows = self._files(self.open(), workflows).filter(_within(workflows), pl.col("pipeline") == pipeline)
            return rows.select(columns).collect()

        rows = self._again(read).filter(pl.col("workflow_id").is_in(sorted(workflows))).unique(["workflow_id", "version"]).sort("version")
        of_attempt = rows.group_by("workflow_id", "attempt", maintain_order=True).agg(
            pl.col("plan").first(), (pl.col("kind") == "fence").any().alias("fenced"), pl.col("agent").filter(pl.col("kind").is_in(OUTPUTS))
        )
        found = of_attempt.filter(~pl.col("fenced")).select("workflow_id", "attempt", "plan", "agent").iter_rows()
        return {(workflow, attempt) for workflow, attempt, plan, sealed in found if sealed and set(sealed) >= set(plan)}

    def brief_since(self, pipeline: str, cursor: str) -> tuple[pl.DataFrame, str]:
        """The columns `BRIEF` of a pipeline's rows since the cursor, and the cursor of now."""

        def read() -> tuple[pl.DataFrame, str]:
            rows, now = self.since(cursor)
            return rows.filter(pl.col("pipeline") == pipeline).select(BRIEF).collect(), now

        return self._again(read)

    def _again(self, read: Callable[[], T]) -> T:
        """What is read by a handle of its own; up to three times, as compaction and vacuum may take a file away under it."""
        for last in (False, False, True):
            try:
                return read()
            except _UNREADABLE as error:
                if last:
                    raise self._unreadable(error) from error
        raise AssertionError

    def collect(self, rows: pl.LazyFrame) -> pl.DataFrame:
        """What a query over `scan` finds. Raises `StoreError` when a file of the log cannot be read."""
        try:
            return rows.collect()
        except _UNREADABLE as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: BaseException) -> StoreError:
        return StoreError(
            f"The state log at {self.uri} cannot be read: {str(error).splitlines()[0]}",
            fix="run `dagster-mao verify` and restore from a backup",
        )

    def head(self, workflow_id: str, table: DeltaTable | None) -> int | None:
        """The workflow's last version by its transactions, without reading a row; -1 when it has none.

        None where the handle is too old to say: it reads the commits since its checkpoint again, and they are dropped behind the next one.
        """
        try:
            version = None if table is None else table.transaction_version(workflow_id)
        except (DeltaError, FileNotFoundError) as error:
            logger.debug("a handle on the state log is too old: %s", str(error).splitlines()[0])
            return None
        return -1 if version is None else version

    def looked_up(self, workflow_id: str, table: DeltaTable | None) -> tuple[int, DeltaTable | None]:
        """`head`, and the handle that says so: the given one, or one that is opened now. Raises `StoreError`."""
        while (head := self.head(workflow_id, table)) is None:
            table = self.open()
        return head, table

    def _files(self, table: DeltaTable | None, workflows: Collection[str] | None = None) -> pl.LazyFrame:
        """Rows at the version of the handle: all, or at least those of some workflows, from the files whose statistics allow it.

        A general Delta reader does more first, for partitions and deletes that this table does not have.
        """
        if table is None:
            return pl.LazyFrame(schema=SCHEMA)
        files = pl.DataFrame(table.get_add_actions(flatten=True)) if table.file_uris() else pl.DataFrame(schema={"path": pl.String})
        if workflows is not None and "min.workflow_id" in files.columns:
            wanted = pl.Series(sorted(workflows), dtype=pl.String)
            first, beyond = wanted.search_sorted(files["min.workflow_id"], "left"), wanted.search_sorted(files["max.workflow_id"], "right")
            files = files.filter((first < beyond) | files["min.workflow_id"].is_null())
        if files.is_empty():
            return pl.LazyFrame(schema=SCHEMA)
        return self._rows([f"{self.uri}/{path}" for path in files["path"]])

    def _rows(self, urls: list[str], *, landed: bool = False) -> pl.LazyFrame:
        # An earlier release knew fewer columns.
        schema = pl.Schema({**_COLUMNS, _LANDED: pl.Int64}) if landed else SCHEMA
        options = self._objects.storage_options or None
        return pl.scan_parquet(urls, glob=False, schema=schema, missing_columns="insert", extra_columns="ignore", storage_options=options)

    def append(
        self, workflow_id: str, seen: Sequence[Seal], make: Callable[[Sequence[Seal]], Seal], table: DeltaTable | None = None
    ) -> Seal:
        """Appends the row that `make` builds on the workflow's seals, as their one next version.

        `make` is called again on what won whenever another writer was first. It raises to give up, and returns a seal that is there already
        to say that nothing needs to be appended. `seen` is what the caller last read: while the head has not moved, the log is not read
        again. `table` is the handle that it was read by, which the first try then goes through: a key that moved since shows as a conflict.
        """
        mismatches = 0
        for _ in range(_TRIES):
            table = table or self.open() or self._create()
            head = self.head(workflow_id, table)
            if head is None:
                table = None
                continue
            length = head + 1
            if length != len(seen):
                seen = self.seals(workflow_id, table)
            if length != len(seen):
                # Rows that a compaction took from under the handle were read at a later version. Twice in a row it is damage.
                mismatches += 1
                if mismatches == 3:
                    raise _damaged(workflow_id)
                table = None
                continue
            seal = make(seen)
            if seal.version < len(seen) or self._commit(table, seal):
                return seal
            table = None
        raise StoreError(f"No seal got through in {_TRIES} tries", workflow=workflow_id, fix="fewer writers on one workflow")

    def _create(self) -> DeltaTable:
        with reaching(self._objects.root):
            return DeltaTable.create(
                self.uri,
                schema=DeltaSchema.from_arrow(SCHEMA),
                mode="ignore",
                configuration=_PROPERTIES,
                storage_options=self._objects.storage_options,
            )

    def _commit(self, table: DeltaTable, seal: Seal) -> bool:
        """True when the row landed; False when it may not have: the caller looks."""
        add, before = self._write(pl.DataFrame([seal.model_dump()], schema=SCHEMA), new=True), table.version()
        try:
            table.create_write_transaction(
                [add],
                "append",
                table.schema(),
                commit_properties=CommitProperties(app_transactions=[Transaction(seal.workflow_id, seal.version)], max_commit_retries=1000),
            )
        except CommitFailedError:
            return False  # lost the race, or the acknowledgement
        except (DeltaError, FileNotFoundError) as error:
            # What a handle gets whose version was dropped behind a checkpoint meanwhile. The commit may have landed: look.
            logger.debug("commit of %s did not answer: %s", seal.reference, error)
            return False
        except OSError as error:
            with reaching(self._objects.root):
                raise error
        new = self._objects.sync_commits(_PATH, before)
        if any(version % _COMPACT_EVERY == 0 for version in new):
            self._maintain(vacuum=any(version % _VACUUM_EVERY == 0 for version in new))
        return True

    def _write(self, rows: pl.DataFrame, *, new: bool, prefix: str = "") -> AddAction:
        """Writes a data file of the log, durably, and returns the action that would make it part of the log."""
        buffer = io.BytesIO()
        rows.write_parquet(buffer)
        data, name = buffer.getvalue(), f"{prefix}{uuid.uuid4().hex}.parquet"
        self._objects.put(f"{_PATH}/{name}", data)
        indexed = {name: rows[name].to_list() for name in ("workflow_id", "version", "agent", "pipeline")}
        stats = {
            "numRecords": rows.height,
            "minValues": {name: min(values) for name, values in indexed.items()},
            "maxValues": {name: max(values) for name, values in indexed.items()},
            "nullCount": dict.fromkeys(indexed, 0),
        }
        return AddAction(name, len(data), {}, _now_ms(), new, json.dumps(stats))

    def _maintain(self, *, vacuum: bool) -> None:
        try:
            table = DeltaTable(self.uri, storage_options=self._objects.storage_options)
            self._compact(table)
            if vacuum:
                table.vacuum(retention_hours=1, enforce_retention_duration=False, dry_run=False, full=True)
        except CommitFailedError:
            logger.debug("another process compacts the state log")
        except (DeltaError, MaoError, *_UNREADABLE) as error:
            logger.warning("housekeeping of the state log was put off: %s", str(error).splitlines()[0])  # the next seal's turn

    def _compact(self, table: DeltaTable) -> None:
        """Merges files of one tier into one of the next, as a transaction of its own: of two compactions at once, one loses.

        Delta's own `optimize.compact` does not look for another compaction: both land, and every row is there twice.
        """
        files = pl.DataFrame(table.get_add_actions(flatten=True))
        names = _crowded_tier(dict(files.select("path", "num_records").iter_rows()))
        if not names:
            return
        read = self._rows([f"{self.uri}/{name}" for name in names], landed=True)
        rows = read.with_columns(pl.col(_LANDED).fill_null(table.version())).sort("workflow_id", "version").collect()
        landed = rows.select(pl.col(_LANDED).max()).item()
        removes = [RemoveAction(name, False, _now_ms()) for name in names]
        turn = (table.transaction_version(_COMPACTION) or 0) + 1
        table.create_write_transaction(
            [*removes, self._write(rows, new=False, prefix=f"{landed}-")],
            "append",
            table.schema(),
            commit_properties=CommitProperties(app_transactions=[Transaction(_COMPACTION, turn)], max_commit_retries=1000),
        )


class _Cursor(NamedTuple):
    """How far a follower has read: the log, its version then, and the names of the files that do not say when their rows were committed."""

    log: str
    version: int
    files: frozenset[str]

    @classmethod
    def of(cls, text: str, table: DeltaTable) -> _Cursor:
        """Where nothing was read, for text that is no cursor of this log: another log's, or of a log that was ahead of this one."""
        try:
            told = json.loads(text)
            cursor = cls(told["log"], int(told["version"]), frozenset(told["files"]))
        except (ValueError, TypeError, KeyError):
            return _BEGINNING
        return cursor if cursor.log == str(table.metadata().id) and cursor.version <= table.version() else _BEGINNING

    def has(self, name: str) -> bool:
        """Whether all rows of a file were read."""
        merged = _MERGED.fullmatch(name)
        return int(merged[1]) <= self.version if merged else name in self.files

    def text(self) -> str:
        return json.dumps({"log": self.log, "version": self.version, "files": sorted(self.files)})


_BEGINNING = _Cursor("", -1, frozenset())


def _within(workflows: Collection[str] | None) -> pl.Expr:
    """Rows that may be of these workflows: what statistics can tell."""
    if workflows is None:
        return pl.lit(True)
    return pl.col("workflow_id").is_between(pl.lit(min(workflows)), pl.lit(max(workflows))) if workflows else pl.lit(False)


def _file_names(table: DeltaTable) -> list[str]:
    return [uri.rpartition("/")[2] for uri in table.file_uris()]


def _crowded_tier(rows: Mapping[str, int]) -> list[str]:
    """The files of the highest tier that has enough of them to be merged. A tier holds files of up to ten times the rows of the one below.

    The highest, because the lowest is crowded at every turn.
    """
    tiers: dict[int, list[str]] = {}
    for name, count in rows.items():
        tiers.setdefault(len(str(count)) - 1, []).append(name)
    return next((tiers[tier] for tier in sorted(tiers, reverse=True) if tier < _TIERS and len(tiers[tier]) >= _TIER_FILES), [])


def _now_ms() -> int:
    return int(time.time() * 1000)


def _damaged(workflow_id: str) -> TamperedError:
    return TamperedError(
        "The state log has lost or gained rows of this workflow",
        workflow=workflow_id,
        fix="run `dagster-mao verify` and restore from a backup",
    )
