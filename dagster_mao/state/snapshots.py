"""Snapshots: zstd Parquet files named after the sha256 of their bytes. Until a seal names one, nobody may read it."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import polars as pl

from dagster_mao.errors import TamperedError, UnknownVersionError
from dagster_mao.state.objects import Objects, file_digest, reaching
from dagster_mao.state.seal import Seal, SealedFile

# pydantic forbids field names with a leading underscore, so these can never hide a contract's field.
WORKFLOW_COLUMN, VERSION_COLUMN = "_workflow", "_version"
_WHOLE_BYTES = 64 << 20  # up to this size a snapshot is read once, and the bytes that were checked are the bytes that are parsed
_ROW_GROUP_ROWS = 122_880
_DISK_REFUSES = re.compile(r"os error (28|30|122)\b")  # no space, read-only, quota


@dataclass(frozen=True)
class Staged:
    """A batch written to a file that nobody else knows of: to be validated, then adopted into the store or dropped."""

    file: Path
    digest: str
    size_bytes: int

    def scan(self) -> pl.LazyFrame:
        return pl.scan_parquet(self.file)


@contextmanager
def staged(objects: Objects, frame: pl.LazyFrame | pl.DataFrame) -> Iterator[Staged]:
    """Evaluates the frame once, streaming, into a file that is gone when the context ends unless it was adopted.

    Raises `StoreError` when the disk cannot take it; what the frame's own expressions raise comes through as it is.
    """
    with objects.staging() as folder:
        file = folder / "batch.parquet"
        _sink(frame.lazy(), file, objects.root)
        with reaching(objects.root):
            digest = file_digest(file)
            size = file.stat().st_size
        yield Staged(file, digest, size)


def _sink(frame: pl.LazyFrame, file: Path, root: str) -> None:
    try:
        frame.sink_parquet(file, compression="zstd", row_group_size=_ROW_GROUP_ROWS, sync_on_close="all")
    except (OSError, pl.exceptions.PolarsError) as error:
        # The frame may read files of its own; only what the staging disk says is the store's failure.
        if str(file.parent) not in str(error) and not _DISK_REFUSES.search(str(error)):
            raise
        with reaching(root):
            raise OSError(str(error)) from error


def snapshot_name(workflow_id: str, version: int, digest: str) -> str:
    """Path of a snapshot below its agent's table: a Hive path, because polars takes partition values from there and not from the log."""
    return f"{WORKFLOW_COLUMN}={quote(workflow_id, safe='')}/{VERSION_COLUMN}={version}/{digest}.parquet"


def read(objects: Objects, seal: Seal, file: SealedFile, columns: Sequence[str] | None = None) -> pl.LazyFrame:
    """The rows of a sealed file, after its bytes were compared with the digest in the seal; with `columns`, no others are decoded.

    Raises `TamperedError` when they differ or the file is gone, `StoreError` when the store cannot be reached.
    """
    if file.size_bytes <= _WHOLE_BYTES:
        data = objects.get(file.path)
        _expect(seal, file, hashlib.sha256(data).hexdigest())
        if columns is None:
            return pl.read_parquet(io.BytesIO(data)).lazy()
        _require(seal, columns, pl.read_parquet_schema(io.BytesIO(data)))
        return pl.read_parquet(io.BytesIO(data), columns=list(columns)).lazy()
    _expect(seal, file, objects.sha256(file.path))
    rows = pl.scan_parquet(objects.url(file.path), glob=False, storage_options=objects.storage_options or None)
    if columns is None:
        return rows
    _require(seal, columns, rows.collect_schema())
    return rows.select(columns)


def _require(seal: Seal, columns: Sequence[str], there: Iterable[str]) -> None:
    names = list(there)
    if absent := [name for name in columns if name not in names]:
        what = f"{seal.reference} has no field {absent[0]!r}"
        raise UnknownVersionError(what, agent=seal.agent, workflow=seal.workflow_id, field=absent[0], fix=f"it has {', '.join(names)}")


def _expect(seal: Seal, file: SealedFile, digest: str) -> None:
    if digest != file.digest:
        raise TamperedError(
            f"The snapshot of {seal.reference} is not what was sealed: {file.path}",
            agent=seal.agent,
            workflow=seal.workflow_id,
            fix="restore the file from a backup; `dagster-mao verify` lists all damage",
        )
