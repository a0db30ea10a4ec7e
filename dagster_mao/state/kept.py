"""Frames that calls answered, kept as files until they are not worth keeping: no part of the state, and nobody else's to read."""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Iterator
from contextlib import suppress

import polars as pl
from pydantic import BaseModel, ConfigDict

from dagster_mao.errors import TamperedError
from dagster_mao.state.objects import Objects
from dagster_mao.state.snapshots import Staged

_WHOLE_BYTES = 64 << 20


class KeptFile(BaseModel):
    """Where a kept frame lies below the store's root, and what it is."""

    model_config = ConfigDict(frozen=True)

    path: str
    digest: str
    size_bytes: int


class KeptFrames:
    """The kept frames of one agent."""

    def __init__(self, objects: Objects, pipeline: str, agent: str) -> None:
        self._objects, self._folder = objects, f"answers/{pipeline}/{agent}"

    def keep(self, name: str, frame: Staged) -> KeptFile:
        """Puts a staged frame there, all of it or nothing."""
        kept = KeptFile(path=f"{self._folder}/{name}.parquet", digest=frame.digest, size_bytes=frame.size_bytes)
        self._objects.adopt(frame.file, kept.path)
        return kept

    def read(self, kept: KeptFile) -> pl.LazyFrame | None:
        """The frame; None where the file is gone, or another than was kept."""
        with suppress(TamperedError):
            if kept.size_bytes <= _WHOLE_BYTES:
                data = self._objects.get(kept.path)
                return pl.read_parquet(io.BytesIO(data)).lazy() if hashlib.sha256(data).hexdigest() == kept.digest else None
            if self._objects.sha256(kept.path) == kept.digest:
                return pl.scan_parquet(self._objects.url(kept.path), glob=False, storage_options=self._objects.storage_options or None)
        return None

    def forget(self, seconds: float) -> None:
        """Removes the frames that were kept longer ago than that."""
        for path in list(self._old(time.time() - seconds)):
            self._objects.remove(path)

    def _old(self, before: float) -> Iterator[str]:
        return (path for path, written in self._objects.written(self._folder) if written < before)
