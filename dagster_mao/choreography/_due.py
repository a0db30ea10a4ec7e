"""What a subscriber is to do, by the state log alone."""

from __future__ import annotations

import datetime as dt
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import polars as pl

from dagster_mao.errors import WiringError
from dagster_mao.pipeline import Pipeline
from dagster_mao.state import Parent, Seal, StateStore


class Subscriber(NamedTuple):
    """An agent that starts by itself: who it is, what it reads, and what an attempt is complete with (`plan`)."""

    pipeline: str
    agent: str
    upstreams: tuple[str, ...]
    plan: tuple[str, ...]

    @classmethod
    def of(cls, pipeline: Pipeline, agent: str) -> Subscriber:
        """Raises WiringError for a pipeline in orchestration mode, and for an entry, which nothing upstream starts."""
        node = pipeline.node(agent)
        if pipeline.mode == "orchestration":
            what = f"Pipeline {pipeline.name!r}: its agents are started by runs that cover them"
            raise WiringError(what, agent=agent, field="mode", fix='mode="choreography" or "hybrid"')
        if node.is_entry:
            what = f"Pipeline {pipeline.name!r}: {agent!r} brings the batch in, and waits for nothing"
            raise WiringError(what, agent=agent, fix="name an agent that reads another")
        plan = pipeline.plan if pipeline.mode == "hybrid" else (agent,)
        return cls(pipeline.name, agent, tuple(sorted(i.upstream for i in node.inputs)), plan)


def subscribers(pipeline: Pipeline) -> tuple[Subscriber, ...]:
    """Who starts by itself, in topological order; nobody in orchestration."""
    if pipeline.mode == "orchestration":
        return ()
    return tuple(Subscriber.of(pipeline, name) for name in pipeline.order if name != pipeline.entry_name)


class Brief(NamedTuple):
    """A seal, as far as it matters here. `parents`: their versions, in the same workflow."""

    version: int
    kind: str
    agent: str
    attempt: str
    parents: tuple[int, ...]
    digest: str
    sealed_at: dt.datetime

    @classmethod
    def of(cls, seal: Seal) -> Brief:
        parents = tuple(parent.version for parent in seal.parents)
        return cls(seal.version, seal.kind, seal.agent, seal.attempt, parents, seal.digest, seal.sealed_at)


class Due(NamedTuple):
    """What a subscriber is to do: these versions of a workflow, in an attempt. `since` is when the last of them was sealed."""

    workflow_id: str
    attempt: str
    parents: tuple[Parent, ...]
    since: dt.datetime

    @property
    def versions(self) -> tuple[int, ...]:
        return tuple(parent.version for parent in self.parents)

    @property
    def digest(self) -> str:
        """Names the parents, and so the delivery: sha256, hex."""
        return digest_of(self.workflow_id, ((parent.agent, parent.version, parent.digest) for parent in self.parents))


class Standing(NamedTuple):
    """How a subscriber stands with one workflow.

    `due`: what it is to do, if anything. `done`: the parents of what it has sealed, as `Due.digest`. `missing`: what it still waits for to
    be sealed, where something else has been since `since`.
    """

    due: Due | None = None
    done: frozenset[str] = frozenset()
    missing: tuple[str, ...] = ()
    since: dt.datetime | None = None


def standing(workflow_id: str, seals: Sequence[Brief], subscriber: Subscriber) -> Standing:
    """How a subscriber stands with a workflow, by its seals in the order of their versions.

    The last entry that no fence ended is what is worked on: what descends from an earlier one is superseded, and nobody's due any more. Of
    each upstream the last version that descends from that entry counts. So all parents are of one entry, whatever came in whatever order.
    """
    fenced = {seal.attempt for seal in seals if seal.kind == "fence"}
    root: dict[int, int] = {}  # the entry that a version descends from
    entry: Brief | None = None
    for seal in seals:
        if seal.attempt in fenced:
            continue
        if seal.kind == "entry":
            root[seal.version], entry = seal.version, seal
        elif seal.kind == "output" and seal.parents and seal.parents[0] in root:
            root[seal.version] = root[seal.parents[0]]
    if entry is None:
        return Standing()
    by_version = {seal.version: seal for seal in seals}
    last: dict[str, Brief] = {}
    done: set[str] = set()
    for seal in seals:
        if root.get(seal.version) == entry.version:
            last[seal.agent] = seal
        if seal.agent == subscriber.agent and seal.version in root:
            done.add(digest_of(workflow_id, ((by_version[n].agent, n, by_version[n].digest) for n in seal.parents if n in by_version)))
    there = [last[name] for name in subscriber.upstreams if name in last]
    if not there:
        return Standing(done=frozenset(done))
    if len(there) < len(subscriber.upstreams):
        missing = tuple(name for name in subscriber.upstreams if name not in last)
        return Standing(None, frozenset(done), missing, min(seal.sealed_at for seal in there))
    parents = tuple(Parent(agent=s.agent, workflow_id=workflow_id, version=s.version, digest=s.digest) for s in there)
    due = Due(workflow_id, entry.attempt, parents, max(seal.sealed_at for seal in there))
    return Standing(None if due.digest in done else due, frozenset(done))


def due(store: StateStore, pipeline: Pipeline, agent: str, since: str = "") -> list[Due]:
    """What an agent is to do in the workflows that something was sealed in since a cursor (of `StateStore.sealed_since`); in all, for "".

    By the log alone: what was handed out and is being worked on is due until it is sealed. Raises `WiringError`, `StoreError`.
    """
    subscriber = Subscriber.of(pipeline, agent)
    rows, _ = store.sealed_since(since, pipeline.name)
    stood = standings(history(store, subscriber, rows, whole=not since), subscriber)
    return [one.due for one in stood.values() if one.due is not None]


def history(store: StateStore, subscriber: Subscriber, rows: pl.DataFrame, *, whole: bool) -> pl.DataFrame:
    """All seals of the workflows in which some of these new ones concern the subscriber. `whole`: the new ones are all there are."""
    if whole:
        return rows
    concern = pl.col("agent").is_in([*subscriber.upstreams, subscriber.agent]) | pl.col("kind").is_in(["entry", "fence"])
    touched = rows.filter(concern)["workflow_id"].unique()
    return store.sealed(subscriber.pipeline, touched) if len(touched) else rows.clear()


def standings(rows: pl.DataFrame, subscriber: Subscriber) -> dict[str, Standing]:
    """By workflow, how the subscriber stands: by all seals of these workflows, as `StateStore.sealed` has them."""
    return {workflow: standing(workflow, seals, subscriber) for workflow, seals in by_workflow(rows).items()}


def by_workflow(rows: pl.DataFrame) -> Mapping[str, list[Brief]]:
    """Rows of the log as seals by workflow, by version. One that came twice is there once."""
    rows = rows.unique(["workflow_id", "version"]).sort("workflow_id", "version")
    rows = rows.with_columns(pl.col("parents").list.eval(pl.element().struct.field("version")))
    found: dict[str, list[Brief]] = {}
    columns = ("workflow_id", "version", "kind", "agent", "attempt", "parents", "digest", "sealed_at")
    for workflow, version, kind, agent, attempt, parents, digest, sealed_at in rows.select(columns).iter_rows():
        found.setdefault(workflow, []).append(Brief(version, kind, agent, attempt, tuple(parents), digest, sealed_at))
    return found


def digest_of(workflow_id: str, parents: Iterable[tuple[str, int, str]]) -> str:
    told = "\x00".join((workflow_id, *(f"{agent}@{version}:{digest}" for agent, version, digest in sorted(parents))))
    return hashlib.sha256(told.encode()).hexdigest()
