"""The agents' Delta tables: each sealed snapshot added, once, with its workflow and version as partition values.

They are for Spark, DuckDB and polars users. This library never reads them: a table may be behind the log (a crash between seal and add),
and whoever seals next adds what is missing.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence

import polars as pl
from deltalake import CommitProperties, DeltaTable, Transaction
from deltalake import Schema as DeltaSchema
from deltalake.exceptions import DeltaError
from deltalake.transaction import AddAction

from dagster_mao.correlation import WorkflowLog
from dagster_mao.errors import IncompatibleContractError, MaoError
from dagster_mao.state.objects import Objects, reaching
from dagster_mao.state.seal import Seal, SealedFile
from dagster_mao.state.snapshots import VERSION_COLUMN, WORKFLOW_COLUMN
from dagster_mao.state.tables import open_table

_PARTITION = pl.Schema({WORKFLOW_COLUMN: pl.String, VERSION_COLUMN: pl.Int64})
_TRIES = 50

# No file is ever removed (the default would let a vacuum take what a week-old delete left). The table's own commits are: an append slows
# with their number, each row says its workflow and version, and the table as it was at a moment is the rows sealed until then.
_PROPERTIES = {
    "delta.appendOnly": "true",
    "delta.checkpointInterval": "5",
    "delta.deletedFileRetentionDuration": "interval 36500 days",
    "delta.logRetentionDuration": "interval 10 seconds",
    "delta.enableExpiredLogCleanup": "true",
}

# What a handle gets that is older than the clean-up of commits: it was opened before the agent ran, for longer than they are kept.
_OUTDATED = (DeltaError, FileNotFoundError)

logger = WorkflowLog(logging.getLogger("dagster_mao.state"))


class Projection:
    """One agent's Delta table: of its snapshots, or of its quarantine."""

    def __init__(self, objects: Objects, table: str) -> None:
        self._objects, self.path, self.uri = objects, table, objects.url(table)
        self._table: DeltaTable | None = None

    def open(self) -> DeltaTable | None:
        return open_table(self._objects, self.path, evidence=f"{self.path}/_delta_log")

    def admit(self, schema: pl.Schema, agent: str) -> None:
        """Raises `IncompatibleContractError` when rows of this schema cannot stand beside those already in the table."""
        self._table = table = self.open()
        if table is None:
            return
        held, wanted = _types(table.schema()), _types(_delta_schema(schema))
        for field in wanted:
            if field in held and held[field] != wanted[field]:
                raise IncompatibleContractError(
                    f"The agent's table holds this field as {held[field]}, the contract now makes it {wanted[field]}",
                    agent=agent,
                    field=field,
                    fix="give the field or the agent a new name: history is never rewritten",
                )

    def add(self, seals: Sequence[Seal], schema: pl.Schema) -> None:
        """Adds those of one workflow's seals of this agent that the table does not have yet, in one commit.

        Idempotent, also between processes: each add is a transaction of the workflow. Failing here loses nothing (the seals stand), so
        failures are logged and left to whoever comes next.
        """
        try:
            for _ in range(_TRIES):
                if self._try_add(seals, schema):
                    return
            logger.warning("the table %s is behind the state log: no add got through", self.path)
        except MaoError as error:
            logger.warning("the table %s is behind the state log: %s", self.path, error)

    def _try_add(self, seals: Sequence[Seal], schema: pl.Schema) -> bool:
        table, self._table = self._table or self.open() or self._create(schema), None
        workflow = seals[-1].workflow_id
        try:
            done = table.transaction_version(workflow)
        except _OUTDATED:
            return False
        missing = [(seal, file) for seal in seals if done is None or seal.version > done for file in seal.files if file.table == self.path]
        if not missing:
            return True
        with reaching(self._objects.root):
            table = self._widen(table, schema)
            before = table.version()
            try:
                table.create_write_transaction(
                    [self._action(seal, file) for seal, file in missing],
                    "append",
                    table.schema(),
                    partition_by=list(_PARTITION),
                    commit_properties=CommitProperties(
                        app_transactions=[Transaction(workflow, missing[-1][0].version)], max_commit_retries=1000
                    ),
                )
            except _OUTDATED:  # or lost
                return False
            self._objects.sync_commits(self.path, before)
        return True

    def _action(self, seal: Seal, file: SealedFile) -> AddAction:
        values = {WORKFLOW_COLUMN: seal.workflow_id, VERSION_COLUMN: str(seal.version)}
        name = file.path.removeprefix(f"{self.path}/")
        rows = self._counted(file) if file.rows is None else file.rows
        return AddAction(name, file.size_bytes, values, int(time.time() * 1000), True, json.dumps({"numRecords": rows}))

    def _counted(self, file: SealedFile) -> int:
        """Rows by the file's footer: a reader that counts by the log must not be told another number."""
        options = self._objects.storage_options or None
        rows = pl.scan_parquet(self._objects.url(file.path), glob=False, storage_options=options).select(pl.len())
        return int(rows.collect().item())

    def _create(self, schema: pl.Schema) -> DeltaTable:
        with reaching(self._objects.root):
            return DeltaTable.create(
                self.uri,
                schema=_delta_schema(schema),
                mode="ignore",
                partition_by=list(_PARTITION),
                configuration=_PROPERTIES,
                storage_options=self._objects.storage_options,
            )

    def _widen(self, table: DeltaTable, schema: pl.Schema) -> DeltaTable:
        held = _types(table.schema())
        new = [field for field in _delta_schema(schema).fields if field.name not in held]
        if new:
            table.alter.add_columns(new)
            return DeltaTable(self.uri, storage_options=self._objects.storage_options)
        return table


def _delta_schema(schema: pl.Schema) -> DeltaSchema:
    return DeltaSchema.from_arrow(pl.Schema({**schema, **_PARTITION}))


def _types(schema: DeltaSchema) -> dict[str, str]:
    return {field.name: str(field.type) for field in schema.fields}
