"""The seal: one row of the state log, and the digests that chain it to the seal before."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

Kind = Literal["entry", "output", "fence", "compensated", "disposition", "disclosure"]
OUTPUTS = ("entry", "output")
"""The kinds of seal that hold an agent's rows."""
QUARANTINE_SUFFIX = "_quarantine"  # of the table, and of the asset, beside the agent's own
DEFERRED_SUFFIX = "_deferred"
VERDICTS_SUFFIX = "_verdicts"


class SealedFile(NamedTuple):
    """A file that a seal vouches for: its path and Delta table relative to the root ("" where it is in no table), its digest and size.

    `rows` is None for a quarantine: the seal counts its records, and one record may have been refused several times.
    """

    path: str
    digest: str
    size_bytes: int
    rows: int | None
    table: str


class Parent(BaseModel):
    """A state version that a seal was made from, as pinned: which agent's, which version, and the content digest it had."""

    model_config = ConfigDict(frozen=True)

    agent: str
    workflow_id: str
    version: int
    digest: str


class Seal(BaseModel):
    """One state version: everything the state log says about it.

    `digest` is the sha256 of the snapshot file's bytes. `seal_digest` is the sha256 of this row's canonical JSON without `seal_digest`
    itself; it covers `previous_digest`, the seal digest of version n-1 of the workflow, so that rows cannot be changed, reordered or
    dropped from the middle unseen. `base` is the head of the workflow (-1 when empty) when the attempt pinned what it does not produce
    itself, and `plan` the agents the attempt set out to seal: it is complete when it has sealed them all.
    `quarantined` counts the records that were kept out of the snapshot; they are in the quarantine file, which may show one of them
    several times, once per boundary side that refused it. `deferred` counts those that wait for the next run, in the deferred file, and
    `fallbacks` those of the snapshot that the agent's fallback answered.
    """

    model_config = ConfigDict(frozen=True)

    workflow_id: str
    version: int
    kind: Kind
    pipeline: str
    agent: str
    attempt: str
    epoch: int
    parents: tuple[Parent, ...]
    digest: str
    previous_digest: str
    row_count: int
    quarantined: int
    size_bytes: int
    path: str  # of the snapshot file, relative to the store's root
    table: str  # of the agent's Delta table, relative to the store's root
    uri: str  # of the agent's Delta table, absolute, as the sealing process saw it
    contract: str
    contract_version: str
    contract_hash: str
    contract_schema: str  # Contract.describe() as JSON: what readers elsewhere compare their own contract with
    key: str | None
    agent_version: str
    config: str
    model: str | None
    run_id: str
    base: int
    plan: tuple[str, ...]
    now: dt.datetime
    seed: int
    latency_seconds: float
    sealed_at: dt.datetime
    library_version: str
    quarantine_path: str | None = None  # relative to the store's root; None when no record was quarantined
    quarantine_digest: str | None = None
    quarantine_bytes: int | None = None
    deferred: int | None = None  # None when no record waits
    deferred_path: str | None = None
    deferred_digest: str | None = None
    deferred_bytes: int | None = None
    fallbacks: int | None = None  # None when no answer came from the fallback
    policy: str | None = None  # JSON of the policy in force where an operator overrode the agent's
    usage: str | None = None  # JSON of what the calls came to, as `CallSummary`
    registration: str | None = None  # digest of what the agent declared of itself, in the registry
    readers: tuple[str, ...] | None = None  # who may read it; None: anybody
    judged: str | None = None  # JSON: by judge, what its verdicts came to; None where the agent had no judges
    verdicts_path: str | None = None  # of the file of what judges said
    verdicts_digest: str | None = None
    verdicts_bytes: int | None = None
    seal_digest: str

    @property
    def reference(self) -> str:
        """`workflow@n`, the form that the command line takes."""
        return f"{self.workflow_id}@{self.version}"

    @property
    def files(self) -> tuple[SealedFile, ...]:
        """The snapshot and, where there are such, the quarantine file, the file of deferred records, and that of what judges said."""
        found = [SealedFile(self.path, self.digest, self.size_bytes, self.row_count, self.table)] if self.path else []
        if self.quarantine_path and self.quarantine_digest:
            table = f"{self.table}{QUARANTINE_SUFFIX}"
            found.append(SealedFile(self.quarantine_path, self.quarantine_digest, self.quarantine_bytes or 0, None, table))
        if self.deferred_path and self.deferred_digest:
            found.append(SealedFile(self.deferred_path, self.deferred_digest, self.deferred_bytes or 0, self.deferred, ""))
        if self.verdicts_path and self.verdicts_digest:
            found.append(SealedFile(self.verdicts_path, self.verdicts_digest, self.verdicts_bytes or 0, None, ""))
        return tuple(found)

    def canonical_digest(self) -> str:
        """The seal digest that this row's contents call for."""
        return _digest(self.model_dump(exclude={"seal_digest"}, exclude_none=True))

    def signed(self) -> Seal:
        """This row with the seal digest that its contents call for."""
        return self.model_copy(update={"seal_digest": self.canonical_digest()})

    @property
    def as_parent(self) -> Parent:
        return Parent(agent=self.agent, workflow_id=self.workflow_id, version=self.version, digest=self.digest)


def _digest(row: dict[str, Any]) -> str:
    """sha256 of the canonical JSON: sorted keys, no spaces, UTF-8, times in UTC with microseconds.

    A field that is null is left out, so that a later release may add columns without changing the digests of rows it did not write.
    """
    text = json.dumps(row, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=_time)
    return hashlib.sha256(text.encode()).hexdigest()


def _time(value: dt.datetime) -> str:
    return value.astimezone(dt.timezone.utc).isoformat(timespec="microseconds")
