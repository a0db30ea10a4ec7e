"""One attempt at a workflow: what it may read is pinned once, what it seals is chained and has one winner per version."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar

import polars as pl
from deltalake import DeltaTable
from pydantic import BaseModel, ConfigDict

from dagster_mao.errors import FencedError, PinError, StaleStateError, TamperedError
from dagster_mao.state.log import StateLog
from dagster_mao.state.objects import Objects
from dagster_mao.state.projection import Projection
from dagster_mao.state.quarantine import QUARANTINE_SCHEMA
from dagster_mao.state.seal import DEFERRED_SUFFIX, OUTPUTS, QUARANTINE_SUFFIX, VERDICTS_SUFFIX, Kind, Parent, Seal
from dagster_mao.state.snapshots import Staged, snapshot_name


class Pins(BaseModel):
    """What an attempt fixed when its first step arrived; written once, before anything is read."""

    model_config = ConfigDict(frozen=True)

    workflow_id: str
    pipeline: str
    attempt: str
    entry: str
    plan: tuple[str, ...]
    base: int
    now: dt.datetime


class Provenance(BaseModel):
    """What a seal says about how its rows came to be, beside the rows themselves."""

    model_config = ConfigDict(frozen=True)

    contract: str
    contract_version: str
    contract_hash: str
    contract_schema: str
    key: str | None
    agent_version: str
    config: str
    model: str | None
    seed: int
    latency_seconds: float
    library_version: str
    fallbacks: int | None = None
    policy: str | None = None
    usage: str | None = None
    registration: str | None = None
    readers: tuple[str, ...] | None = None
    judged: str | None = None


class Attempt:
    """An attempt as one step sees it. `pin` and `seal` judge by the seals that were there when the step joined."""

    def __init__(
        self,
        objects: Objects,
        log: StateLog,
        table: DeltaTable | None,
        pins: Pins,
        *,
        run_id: str,
        lineage: tuple[str, ...],
        seen: Sequence[Seal] | None = None,
        reads: Sequence[Seal] | None = None,
    ) -> None:
        self._objects, self._log, self._pins = objects, log, pins
        self.run_id, self._lineage = run_id, frozenset(lineage)
        self._table = table
        self._seen: list[Seal] = log.seals(pins.workflow_id, table) if seen is None else list(seen)
        self._reads = None if reads is None else {seal.agent: seal for seal in reads}

    @property
    def id(self) -> str:
        return self._pins.attempt

    @property
    def pipeline(self) -> str:
        return self._pins.pipeline

    @property
    def workflow_id(self) -> str:
        return self._pins.workflow_id

    @property
    def workflow_key(self) -> str:
        return self._pins.workflow_id.removeprefix(f"{self._pins.pipeline}/")

    @property
    def base(self) -> int:
        return self._pins.base

    @property
    def epoch(self) -> int:
        """How often the workflow had been fenced when this step joined."""
        return sum(seal.kind == "fence" for seal in self._seen)

    @property
    def now(self) -> dt.datetime:
        return self._pins.now

    @property
    def plan(self) -> tuple[str, ...]:
        return self._pins.plan

    def seed(self, agent: str) -> int:
        """A seed that is the same whenever this attempt runs this agent: 63 bits of sha256(attempt, workflow, agent)."""
        text = "\x00".join((self.id, self.workflow_id, agent))
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

    def refuse_if_fenced(self) -> None:
        for seal in self._seen:
            if seal.kind == "fence" and seal.attempt == self.id:
                raise FencedError(
                    f"This attempt was ended by a fence at version {seal.version}",
                    workflow=self.workflow_id,
                    fix="start a new run instead of re-executing this one",
                )

    def pin(self, agent: str) -> Seal:
        """The one version of an agent's output that this attempt may read.

        What this run or the runs it re-executes sealed comes first; what the attempt does not set out to seal comes from the effective
        state as it was when the attempt began. An attempt that was joined with the versions to read has these and no others. Raises
        `PinError` when there is none, `TamperedError` when its log row was changed.
        """
        if self._reads is not None:
            if agent not in self._reads:
                fix = "it is due once all that it reads is sealed"
                raise PinError("It was not told which version of it to read", agent=agent, workflow=self.workflow_id, fix=fix)
            return _untouched(self._reads[agent])
        if (own := self.own(agent)) is not None:
            return _untouched(own)
        if agent in self.plan:
            raise PinError(
                "This attempt sets out to seal it and has not done so yet",
                agent=agent,
                workflow=self.workflow_id,
                fix="include it in the run",
            )
        state = effective(self._seen[: self.base + 1])
        if agent not in state:
            raise PinError(
                "No completed attempt has sealed it",
                agent=agent,
                workflow=self.workflow_id,
                fix=f"materialise {agent} in the same run, or first",
            )
        return _untouched(state[agent])

    def own(self, agent: str) -> Seal | None:
        """What this run, or the runs that it re-executes, sealed last of the agent; None where they sealed nothing of it."""
        return next((seal for seal in reversed(self._seen) if self._is_own(seal, agent)), None)

    def previous(self, agent: str) -> Seal | None:
        """What the agent had sealed in the effective state when the attempt began; None before any attempt completed."""
        return effective(self._seen[: self.base + 1]).get(agent)

    def sealed(self, agent: str) -> Seal | None:
        """What the agent had sealed last in the workflow, in whatever attempt, when this step joined; None where it had sealed nothing."""
        return next((seal for seal in reversed(self._seen) if seal.agent == agent and seal.kind in OUTPUTS), None)

    def entry_of(self, seal: Seal) -> Seal | None:
        """The entry seal that a seal descends from; None for what has no entry above it."""
        return entry_of(self._seen, seal)

    def require_one_entry(self, agent: str, parents: Sequence[Seal]) -> None:
        """Raises `PinError` when the parents descend from different entry seals: their rows are not about the same batch."""
        require_one_entry(self._seen, agent, parents, fix="materialise the older ones again in the same run")

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
        """Makes the staged batch the workflow's next version; returns the seal and whether it was there already (its own, sealed before).

        `quarantine` is the file of the `quarantined` records that were kept out of it, `deferred` that of the `deferred_count` records that
        wait for the next run, `verdicts` that of what judges said. Raises `StaleStateError` or `FencedError` when this
        step lost; then nothing of it is visible to anybody.
        """
        table = f"tables/{self._pins.pipeline}/{agent}"
        projection = Projection(self._objects, table)
        projection.admit(schema, agent)
        kind: Kind = "entry" if agent == self._pins.entry else "output"
        row = {
            **provenance.model_dump(),
            **{"workflow_id": self.workflow_id, "kind": kind, "pipeline": self._pins.pipeline, "agent": agent, "attempt": self.id},
            **{"parents": tuple(parents), "digest": staged.digest, "row_count": row_count, "quarantined": quarantined},
            **{"size_bytes": staged.size_bytes, "table": table, "uri": self._objects.url(table)},
            **{"run_id": self.run_id, "base": self.base, "plan": self.plan, "now": self.now},
            "sealed_at": dt.datetime.now(dt.timezone.utc),
            "quarantine_digest": quarantine.digest if quarantine else None,
            "quarantine_bytes": quarantine.size_bytes if quarantine else None,
            "deferred": deferred_count or None,
            "deferred_digest": deferred.digest if deferred else None,
            "deferred_bytes": deferred.size_bytes if deferred else None,
            "verdicts_digest": verdicts.digest if verdicts else None,
            "verdicts_bytes": verdicts.size_bytes if verdicts else None,
        }
        pinned = len(self._seen)
        reused = False

        def make(seen: Sequence[Seal]) -> Seal:
            nonlocal reused
            if mine := self._already(seen, row):
                reused = True
                return mine
            # Whoever was told what to read may have been told what somebody else had done by then.
            again = [] if self._reads is None else [seal for seal in seen[:pinned] if seal.parents == row["parents"]]
            self._refuse_if_lost(agent, [*again, *seen[pinned:]])
            path = f"{table}/{snapshot_name(self.workflow_id, len(seen), staged.digest)}"
            self._objects.adopt(staged.file, path)
            aside = None
            if quarantine is not None:
                aside = f"{table}{QUARANTINE_SUFFIX}/{snapshot_name(self.workflow_id, len(seen), quarantine.digest)}"
                self._objects.adopt(quarantine.file, aside)
            waiting = None
            if deferred is not None:
                waiting = f"{table}{DEFERRED_SUFFIX}/{snapshot_name(self.workflow_id, len(seen), deferred.digest)}"
                self._objects.adopt(deferred.file, waiting)
            said = None
            if verdicts is not None:
                said = f"{table}{VERDICTS_SUFFIX}/{snapshot_name(self.workflow_id, len(seen), verdicts.digest)}"
                self._objects.adopt(verdicts.file, said)
            paths = {"path": path, "quarantine_path": aside, "deferred_path": waiting, "verdicts_path": said}
            return next_seal(seen, {**row, **paths})

        seal = self._log.append(self.workflow_id, self._seen, make, self._table)
        self._table = None  # it has moved
        self._seen = self._log.seals(self.workflow_id) if reused or seal.version != len(self._seen) else [*self._seen, seal]
        own = [s for s in self._seen if s.agent == agent and s.kind in OUTPUTS]
        projection.add(own, schema)
        if any(s.quarantine_path for s in own):
            Projection(self._objects, f"{table}{QUARANTINE_SUFFIX}").add(own, QUARANTINE_SCHEMA)
        return seal, reused

    def _already(self, seen: Sequence[Seal], row: Mapping[str, Any]) -> Seal | None:
        """This lineage's last seal of the agent, when it says the same: a lost acknowledgement, or a re-execution that changed nothing."""
        same = ("digest", "quarantine_digest", "deferred_digest", "parents", "contract_hash", "agent_version", "config", "model")
        own = [seal for seal in seen if self._is_own(seal, row["agent"])]
        if own and all(getattr(own[-1], name) == row[name] for name in same):
            return own[-1]
        return None

    def _is_own(self, seal: Seal, agent: str) -> bool:
        return seal.agent == agent and seal.kind in OUTPUTS and seal.attempt == self.id and seal.run_id in self._lineage

    def _refuse_if_lost(self, agent: str, since: Sequence[Seal]) -> None:
        for seal in since:
            if seal.kind == "fence":
                raise FencedError(
                    f"The workflow was fenced at version {seal.version} while this step ran",
                    agent=agent,
                    workflow=self.workflow_id,
                    fix="start a new run; nothing of this one was sealed after the fence",
                )
            if seal.agent == agent and seal.kind in OUTPUTS:
                raise StaleStateError(
                    f"Run {seal.run_id} sealed version {seal.version} of it while this step ran",
                    agent=agent,
                    workflow=self.workflow_id,
                    fix="look at that version (`dagster-mao diff`), then run again if it is still needed",
                )


def require_one_entry(seals: Sequence[Seal], agent: str, parents: Sequence[Seal], *, fix: str) -> None:
    """Raises `PinError` when the parents, all of the workflow with these seals, descend from different entry seals."""
    entries = {found.version: parent for parent in parents if (found := entry_of(seals, parent)) is not None}
    if len(entries) > 1:
        told = ", ".join(f"{parent.agent}@{parent.version} from entry {entry}" for entry, parent in sorted(entries.items()))
        workflow = next(iter(entries.values())).workflow_id
        raise PinError(f"Its inputs descend from different entries: {told}", agent=agent, workflow=workflow, fix=fix)


def entry_of(seals: Sequence[Seal], seal: Seal) -> Seal | None:
    """The entry seal of the workflow that a seal descends from; None for what has no entry above it."""
    while seal.kind != "entry":
        if not seal.parents:
            return None
        seal = seals[seal.parents[0].version]
    return seal


class Planned(Protocol):
    """A seal, or as much of it as the effective state is made of."""

    @property
    def kind(self) -> str: ...
    @property
    def agent(self) -> str: ...
    @property
    def attempt(self) -> str: ...
    @property
    def plan(self) -> Sequence[str]: ...


P = TypeVar("P", bound=Planned)


def effective(seals: Sequence[P]) -> dict[str, P]:
    """By agent, the last seal of completed attempts: an attempt counts from the seal that completes its plan, and no more once fenced.

    From then on what it seals counts seal by seal: it does not bring back what another attempt has replaced meanwhile.
    """
    fenced = {seal.attempt for seal in seals if seal.kind == "fence"}
    sealed: dict[str, dict[str, P]] = {}
    completed: set[tuple[str, tuple[str, ...]]] = set()
    state: dict[str, P] = {}
    for seal in seals:
        if seal.attempt in fenced or seal.kind not in OUTPUTS:
            continue
        attempt = sealed.setdefault(seal.attempt, {})
        attempt[seal.agent] = seal
        if attempt.keys() >= set(seal.plan):
            is_first = (seal.attempt, tuple(seal.plan)) not in completed
            completed.add((seal.attempt, tuple(seal.plan)))
            # Where agents start by themselves, an attempt is joined by such as are no part of its plan, and have one of their own.
            state.update({name: attempt[name] for name in seal.plan} if is_first and seal.agent in seal.plan else {seal.agent: seal})
    return state


def is_completed(seals: Sequence[Seal], attempt: str) -> bool:
    """Whether the attempt sealed all that it set out to seal, and was not fenced."""
    own = [seal for seal in seals if seal.attempt == attempt]
    if any(seal.kind == "fence" for seal in own):
        return False
    sealed = {seal.agent for seal in own if seal.kind in OUTPUTS}
    return bool(sealed) and sealed >= set(own[0].plan)


def is_replaced(seals: Sequence[Seal], attempt: str) -> bool:
    """Whether what came in later was completed meanwhile: agents that start by themselves make nothing of this attempt any more."""
    entries = [seal for seal in seals if seal.kind == "entry"]
    own = max((seal.version for seal in entries if seal.attempt == attempt), default=None)
    return own is not None and any(seal.version > own and is_completed(seals, seal.attempt) for seal in entries)


def next_seal(seen: Sequence[Seal], row: Mapping[str, Any]) -> Seal:
    """The row as the workflow's next version, chained to the last."""
    last = seen[-1] if seen else None
    epoch = sum(1 for seal in seen if seal.kind == "fence") + (row["kind"] == "fence")
    return Seal(**row, version=len(seen), epoch=epoch, previous_digest=last.seal_digest if last else "", seal_digest="").signed()


def _untouched(seal: Seal) -> Seal:
    if seal.canonical_digest() != seal.seal_digest:
        raise TamperedError(
            f"The log row of {seal.reference} was rewritten",
            agent=seal.agent,
            workflow=seal.workflow_id,
            fix="`dagster-mao verify` lists all damage; restore from a backup",
        )
    return seal
