"""The agents' call tables: one row per try of a call, in a Delta table beside the agent's own.

They are told, not sealed (docs/adr/0016): one commit per step, whatever becomes of it, and nothing else in the store depends on them.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import time

import polars as pl
from deltalake import CommitProperties, DeltaTable
from deltalake import Schema as DeltaSchema
from deltalake.exceptions import DeltaError
from deltalake.transaction import AddAction
from pydantic import BaseModel, ConfigDict

from dagster_mao.correlation import WorkflowLog
from dagster_mao.errors import MaoError, StoreError
from dagster_mao.state.objects import Objects, reaching
from dagster_mao.state.snapshots import Staged, staged
from dagster_mao.state.tables import open_table

CALLS_SUFFIX = "_calls"  # of the table beside the agent's own
_COLUMNS: dict[str, pl.DataType | type[pl.DataType]] = {
    "call": pl.String,  # the idempotency key: the same for every try, in whatever run
    "workflow_id": pl.String,
    "epoch": pl.Int64,
    "agent": pl.String,
    "attempt": pl.String,
    "run_id": pl.String,
    "record": pl.String,  # the record's key as text; null where it is personal, and for a call with whole frames
    "number": pl.Int64,  # of the try, from 1 on; 0 where no call was made
    "started": pl.Datetime("us", "UTC"),
    "latency_seconds": pl.Float64,  # waits for the rate limit are not in it
    "outcome": pl.String,  # answered, failed, timed_out, refused, reused or fallback
    "error": pl.String,  # the class of the error
    "model": pl.String,
    "input_tokens": pl.Int64,
    "output_tokens": pl.Int64,
    "cost": pl.Float64,
    "breaker": pl.String,  # its state when the call was admitted; null without a breaker
    "agent_version": pl.String,
}
CALLS_SCHEMA = pl.Schema(_COLUMNS)
"""One row per try, and one for each call that needed none (`refused`, `reused`, `fallback`)."""

_MADE = ("answered", "failed", "timed_out")  # the outcomes of tries that were made
_ONE_TRY = ["call", "run_id", "number", "started", "outcome"]
_TRIES = 50
_SMALL_BYTES = 1 << 20  # of a file that is read whole: the streaming engine begins with milliseconds

# As the agents' own tables: checkpoints are frequent and the commits behind them are dropped, because an append slows with their number.
_PROPERTIES = {
    "delta.appendOnly": "true",
    "delta.checkpointInterval": "5",
    "delta.deletedFileRetentionDuration": "interval 36500 days",
    "delta.logRetentionDuration": "interval 10 seconds",
    "delta.enableExpiredLogCleanup": "true",
}

logger = WorkflowLog(logging.getLogger("dagster_mao.state"))


class CallSummary(BaseModel):
    """What calls came to.

    `tries` were made, on behalf of so many `calls`; each `answered`, `failed` or `timed_out`. `error_rate` is the share of those that did
    not answer, and the percentiles are of their latencies: both say how the called side is doing, whatever retries made good. No try was
    made for calls that were `reused` (answered before) or `refused` (the breaker was open). `fallbacks`: answers of the fallback.
    """

    model_config = ConfigDict(frozen=True)

    calls: int = 0
    tries: int = 0
    answered: int = 0
    reused: int = 0
    failed: int = 0
    refused: int = 0
    timed_out: int = 0
    fallbacks: int = 0
    error_rate: float = 0.0
    p50_seconds: float | None = None
    p95_seconds: float | None = None
    p99_seconds: float | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0

    @classmethod
    def of(cls, calls: pl.DataFrame | pl.LazyFrame) -> CallSummary:
        """Sums up rows of `CALLS_SCHEMA`."""
        made, outcome = pl.col("outcome").is_in(_MADE), pl.col("outcome")
        latency = pl.col("latency_seconds").filter(made)
        told = calls.lazy().select(
            # By 64 bits of each: two of a million are taken for one with a chance of 1 in 30 000 000, in a third of the memory.
            calls=pl.struct("call", "run_id").hash().filter(made).n_unique(),
            tries=made.sum(),
            **{name: (outcome == name).sum() for name in ("answered", "reused", "failed", "refused", "timed_out")},
            fallbacks=(outcome == "fallback").sum(),
            **{f"p{n}_seconds": latency.quantile(n / 100, "linear").round(6) for n in (50, 95, 99)},
            **{name: pl.col(name).sum() for name in ("input_tokens", "output_tokens")},
            cost=pl.col("cost").sum().round(9),  # sums of floats end in noise
        )
        # What is in memory is summed up there: the streaming engine begins with milliseconds.
        row = told.collect(engine="in-memory" if isinstance(calls, pl.DataFrame) else "streaming").row(0, named=True)
        errors = row["failed"] + row["timed_out"]
        return cls(**row, error_rate=errors / row["tries"] if row["tries"] else 0.0)


class CallsTable:
    """One agent's table of calls. Reading creates nothing; it appears with the first append."""

    def __init__(self, objects: Objects, pipeline: str, agent: str) -> None:
        self._objects = objects
        self.path = f"tables/{pipeline}/{agent}{CALLS_SUFFIX}"
        self.uri = objects.url(self.path)

    def append(self, calls: pl.DataFrame | pl.LazyFrame) -> bool:
        """Adds rows of `CALLS_SCHEMA` in one commit, durably; False, and a line in the log, when the store did not take them.

        The same rows appended twice are there once: the file is called after its bytes, and a table lists a file once.
        """
        rows = calls.lazy().select(CALLS_SCHEMA.names()).cast(CALLS_SCHEMA)
        try:
            with staged(self._objects, rows) as batch:
                self._add(batch)
        except MaoError as error:
            logger.warning("calls were not logged in %s: %s", self.path, error)
            return False
        return True

    def _add(self, batch: Staged) -> None:
        stats = _statistics(batch)
        if not stats["numRecords"]:
            return
        name = f"{batch.digest}.parquet"
        self._objects.adopt(batch.file, f"{self.path}/{name}")
        add = AddAction(name, batch.size_bytes, {}, int(time.time() * 1000), True, json.dumps(stats))
        for _ in range(_TRIES):
            table = open_table(self._objects, self.path, evidence=f"{self.path}/_delta_log") or self._create()
            before = table.version()
            try:
                table.create_write_transaction([add], "append", table.schema(), commit_properties=CommitProperties(max_commit_retries=1000))
            except (DeltaError, FileNotFoundError) as error:  # the handle is older than the clean-up, or no answer came: once more
                logger.debug("a commit to %s did not answer: %s", self.path, error)
                continue
            except OSError as error:
                with reaching(self._objects.root):
                    raise error
            self._objects.sync_commits(self.path, before)
            return
        raise StoreError(f"No commit got through in {_TRIES} tries", fix="fewer steps of one agent at a time")

    def scan(self, workflow_id: str | None = None) -> pl.LazyFrame:
        """The rows, as the table is now; of one workflow, from the files that may have some. In no order.

        A step that was killed between writing its rows and saying so leaves them to the next, which writes them again: they are here once.
        Raises `StoreError` when the table cannot be read.
        """
        names = self._files(workflow_id)
        if not names:
            return pl.LazyFrame(schema=CALLS_SCHEMA)
        options = self._objects.storage_options or None
        rows = pl.scan_parquet(
            [f"{self.uri}/{name}" for name in names], glob=False, schema=CALLS_SCHEMA, missing_columns="insert", storage_options=options
        )
        if workflow_id is not None:
            rows = rows.filter(pl.col("workflow_id") == workflow_id)
        return rows.unique(_ONE_TRY, keep="any")

    def _files(self, workflow_id: str | None) -> list[str]:
        table = open_table(self._objects, self.path, evidence=f"{self.path}/_delta_log")
        if table is None:
            return []
        with reaching(self._objects.root):
            files = pl.DataFrame(table.get_add_actions(flatten=True))
        if workflow_id is not None and "min.workflow_id" in files.columns:
            outside = (pl.col("min.workflow_id") > workflow_id) | (pl.col("max.workflow_id") < workflow_id)
            files = files.filter(~outside.fill_null(False))
        return files["path"].to_list() if files.height else []

    def _create(self) -> DeltaTable:
        with reaching(self._objects.root):
            return DeltaTable.create(
                self.uri,
                schema=DeltaSchema.from_arrow(CALLS_SCHEMA),
                mode="ignore",
                configuration=_PROPERTIES,
                storage_options=self._objects.storage_options,
            )


def _statistics(batch: Staged) -> dict[str, object]:
    """What lets a reader skip the file: workflow and time. Delta keeps milliseconds, so the latest is told a millisecond later."""
    first, last = pl.col("started").min(), pl.col("started").max() + dt.timedelta(milliseconds=1)
    told = batch.scan().select(
        pl.len().alias("rows"),
        pl.col("workflow_id").min().alias("from"),
        pl.col("workflow_id").max().alias("to"),
        *(moment.dt.strftime("%Y-%m-%dT%H:%M:%S.%3fZ").alias(name) for name, moment in (("first", first), ("last", last))),
    )
    row = told.collect(engine="in-memory" if batch.size_bytes <= _SMALL_BYTES else "streaming").row(0, named=True)
    return {
        "numRecords": row["rows"],
        "minValues": {"workflow_id": row["from"], "started": row["first"]},
        "maxValues": {"workflow_id": row["to"], "started": row["last"]},
        "nullCount": {"workflow_id": 0, "started": 0},
    }
