"""A step that is done once more as it was then, and leaves nothing: what it reads is the store's, what it writes goes into a folder."""

from __future__ import annotations

import datetime as dt
import os
from collections.abc import Sequence

import polars as pl

from dagster_mao.state.attempt import Attempt, Pins, Provenance
from dagster_mao.state.seal import Parent, Seal, SealedFile
from dagster_mao.state.snapshots import Staged, read
from dagster_mao.state.store import StateStore


class Beside(StateStore):
    """A store that reads what another one holds, and writes into a folder of its own, its shared database too. To be thrown away."""

    def __init__(self, store: StateStore, folder: str | os.PathLike[str]) -> None:
        super().__init__(folder)
        self._log, self._source = store._log, store

    def _read(self, seal: Seal, file: SealedFile, columns: Sequence[str] | None = None) -> pl.LazyFrame:
        return self._source._read(seal, file, columns)

    def read_made(self, seal: Seal) -> pl.LazyFrame:
        """The rows of a version that was made here."""
        return read(self.objects, seal, seal.files[0])


class Rehearsed(Attempt):
    """The attempt in which a version was sealed, as its step joined it: the versions before it, the same parents, time and seed. What is
    sealed in it is a row that nobody else sees.
    """

    def __init__(self, store: Beside, seal: Seal) -> None:
        seen = store.seals(seal.workflow_id, as_of=seal.version)[:-1]
        found = store.seals_at((parent.workflow_id, parent.version) for parent in seal.parents)
        pins = Pins(
            workflow_id=seal.workflow_id,
            pipeline=seal.pipeline,
            attempt=seal.attempt,
            entry="",
            plan=seal.plan,
            base=min(seal.base, len(seen) - 1),
            now=seal.now,
        )
        reads = [found[parent.workflow_id, parent.version] for parent in seal.parents]
        super().__init__(store.objects, store._log, None, pins, run_id=seal.run_id, lineage=(seal.run_id,), seen=seen, reads=reads)
        self._then = seal

    def seal(
        self,
        agent: str,
        staged: Staged,
        *,
        row_count: int,
        schema: pl.Schema,
        parents: Sequence[Parent],
        provenance: Provenance,
        quarantine: Staged | None = None,
        quarantined: int = 0,
        deferred: Staged | None = None,
        deferred_count: int = 0,
        verdicts: Staged | None = None,
    ) -> tuple[Seal, bool]:
        """The row that would be the version now, with its rows in the folder."""
        path = f"made/{staged.digest}.parquet"
        self._objects.adopt(staged.file, path)
        files = {"quarantine": quarantine, "deferred": deferred, "verdicts": verdicts}
        told = {
            **{f"{name}_{part}": None for name in files for part in ("path", "digest", "bytes")},
            **{f"{name}_digest": file.digest for name, file in files.items() if file is not None},
            **{f"{name}_bytes": file.size_bytes for name, file in files.items() if file is not None},
        }
        row = {
            **provenance.model_dump(),
            **told,
            **{"agent": agent, "parents": tuple(parents), "digest": staged.digest, "size_bytes": staged.size_bytes, "path": path},
            **{"row_count": row_count, "quarantined": quarantined, "deferred": deferred_count or None},
            "sealed_at": dt.datetime.now(dt.timezone.utc),
        }
        return self._then.model_copy(update=row).signed(), False
