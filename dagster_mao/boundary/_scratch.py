"""What a step puts aside on the disk while it works, so that its memory does not grow with its batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import polars as pl

from dagster_mao.state import StateStore, reaching

KEPT_ROWS = 50_000  # of one kind that are held in memory


class Scratch:
    """A folder of the step's own, made when it is first needed and gone at the end."""

    def __init__(self, store: StateStore) -> None:
        self._store, self._files = store, ExitStack()
        self._folder: Path | None = None
        self._made = 0

    def folder(self) -> Path:
        if self._folder is None:
            self._folder = self._files.enter_context(self._store.objects.staging())
        return self._folder

    def path(self) -> Path:
        """A file that nobody else writes."""
        self._made += 1
        return self.folder() / f"{self._made}.parquet"

    def write(self, frame: pl.DataFrame) -> Path:
        file = self.path()
        with reaching(self._store.root):
            frame.write_parquet(file, compression="lz4")
        return file

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._files.close()


class Spool:
    """Frames of one schema, one after the other; on the disk as soon as they are many."""

    def __init__(self, scratch: Scratch, schema: pl.Schema) -> None:
        self._scratch, self._schema = scratch, schema
        self._held: list[pl.DataFrame] = []
        self._files: list[Path] = []
        self.rows = 0

    def append(self, frame: pl.DataFrame) -> None:
        self._held.append(frame)
        self.rows += frame.height
        if sum(held.height for held in self._held) >= KEPT_ROWS:
            self._files.append(self._scratch.write(pl.concat(self._held)))
            self._held.clear()

    def scan(self) -> pl.LazyFrame:
        """All rows, in order."""
        return self.rows_held().lazy()

    def rows_held(self) -> pl.DataFrame | pl.LazyFrame:
        """The same, as a frame in memory where all of it is there."""
        held = pl.concat([pl.DataFrame(schema=self._schema), *self._held])
        return pl.concat([*(pl.scan_parquet(file) for file in self._files), held.lazy()]) if self._files else held


def slices(scratch: Scratch, frame: pl.LazyFrame, rows: int, size: int) -> Iterator[pl.DataFrame]:
    """A frame of so many rows, `size` rows at a time, evaluated once."""
    if rows <= KEPT_ROWS:
        yield from frame.collect().iter_slices(size)
        return
    file = scratch.path()
    frame.sink_parquet(file, compression="lz4", row_group_size=size)
    written = pl.scan_parquet(file)
    for start in range(0, rows, size):
        yield written.slice(start, size).collect()
