"""The state store: what happened, read and appended to under the laws. See `Attempt` for how an agent pins and seals."""

from __future__ import annotations

import datetime as dt
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version as library_version
from typing import Any, Literal
from urllib.parse import quote

import polars as pl
from deltalake import DeltaTable

from dagster_mao.errors import PinError, TamperedError, UnknownVersionError, WiringError
from dagster_mao.state import snapshots
from dagster_mao.state.attempt import Attempt, Pins, effective, entry_of, is_completed, next_seal
from dagster_mao.state.calls import CALLS_SUFFIX, CallsTable
from dagster_mao.state.disclosure import DISCLOSURE_SCHEMA
from dagster_mao.state.log import StateLog
from dagster_mao.state.moments import When, there
from dagster_mao.state.objects import Objects, safe_name
from dagster_mao.state.quarantine import DEFERRED_SCHEMA, DISPOSITION_SCHEMA, QUARANTINE_SCHEMA
from dagster_mao.state.registry import register, registered
from dagster_mao.state.seal import Kind, Seal, SealedFile
from dagster_mao.state.verdicts import VERDICTS_SCHEMA

_DATABASE = "shared.db"
_LONGEST_ID = 230  # it names a folder, and file systems end at 255 bytes


class StateStore:
    """One store: a state log, the agents' tables and snapshots, the pins of attempts; below one root.

    `root` is a folder or an object-store URI, `storage_options` what delta-rs takes for it (`AWS_ENDPOINT_URL` …). Making the object
    touches nothing; reading never creates anything. Raises `StoreError` when the root cannot be a store.

    `database` is the URL of the SQL database, or the path of the SQLite file, through which processes share what they must agree on at
    once; by default `shared.db` in a local root. None with an object store and no URL: then nothing can be shared. An object store is
    there for many hosts, and an SQLite file for one: together they are a `WiringError`, unless `single_host` says that there is but one.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        storage_options: Mapping[str, str] | None = None,
        *,
        database: str | None = None,
        single_host: bool = False,
    ) -> None:
        self.objects = Objects(root, storage_options)
        self.database = database or (str(self.objects.local / _DATABASE) if self.objects.local is not None else None)
        if self.objects.local is None and self.database and _is_sqlite(self.database) and not single_host:
            raise WiringError(
                f"The state lies in {self.root}, for any host, and the shared database is an SQLite file, which other hosts do not see: "
                "their breakers, limits and kept answers would be their own",
                field="database",
                fix="name a PostgreSQL that all hosts reach, `postgresql://user@host/database`; or, if all runs are on one host, say "
                "`single_host=True`",
            )
        self._log = StateLog(self.objects)

    @property
    def root(self) -> str:
        return self.objects.root

    def exists(self) -> bool:
        """Whether anything was ever sealed here."""
        return self._log.open() is not None

    def log(self) -> pl.LazyFrame:
        """The whole state log at the version it has now, one row per seal, columns as the fields of `Seal`."""
        return self._log.scan(self._log.open())

    def collect(self, rows: pl.LazyFrame) -> pl.DataFrame:
        """What a query over `log` finds. Raises `StoreError` when a file of the log cannot be read."""
        return self._log.collect(rows)

    def sealed_since(self, cursor: str, pipeline: str) -> tuple[pl.DataFrame, str]:
        """The seals of a pipeline that were committed since a cursor was taken, and the cursor of now. Columns: `BRIEF`.

        `""` is the cursor before everything. Each seal comes at least once to whoever hands back the cursor of what it has dealt with,
        however late it was committed and whatever clocks said; one may come again. A cursor that is lost, or another store's, costs time
        only. Raises `StoreError`.
        """
        return self._log.brief_since(pipeline, cursor)

    def sealed(self, pipeline: str, workflows: Iterable[str] | None = None) -> pl.DataFrame:
        """The seals of a pipeline, all or those of some workflows, in no order. Columns: `BRIEF`. Raises `StoreError`."""
        return self._log.brief(pipeline, None if workflows is None else frozenset(workflows))

    def completed(self, pipeline: str, workflows: Iterable[str]) -> set[tuple[str, str]]:
        """Workflow and attempt, of the attempts at these workflows that have completed, in one read. Raises `StoreError`."""
        wanted = frozenset(workflows)
        return self._log.completed(pipeline, wanted) if wanted else set()

    def workflows(self, pipeline: str | None = None) -> list[str]:
        """Ids of the workflows that have been sealed, sorted."""
        rows = self.log()
        if pipeline is not None:
            rows = rows.filter(pl.col("pipeline") == pipeline)
        return self.collect(rows.select("workflow_id").unique().sort("workflow_id"))["workflow_id"].to_list()

    def seals(self, workflow_id: str, *, as_of: When | None = None) -> list[Seal]:
        """All seals of a workflow by version; empty when it has none. `as_of`: those that were there then, see `moments.there`."""
        seals = self._log.seals(workflow_id)
        return seals if as_of is None else there(seals, as_of, workflow=workflow_id)

    def seals_of(self, workflows: Iterable[str]) -> dict[str, list[Seal]]:
        """The same of several workflows, in one read."""
        wanted = frozenset(workflows)
        return self._log.seals_of(wanted) if wanted else {}

    def seal_at(self, workflow_id: str, version: int) -> Seal:
        """Raises `UnknownVersionError`, saying what there is."""
        if found := self.seals_at([(workflow_id, version)]).get((workflow_id, version)):
            return found
        seals = self.seals(workflow_id)
        known = f"it has versions 0 to {seals[-1].version}" if seals else "nothing was sealed for this workflow"
        raise UnknownVersionError(f"No version {version}: {known}", workflow=workflow_id, fix="`dagster-mao history` lists what there is")

    def seals_at(self, versions: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Seal]:
        """The seals of some versions, by workflow and version, in one read; the rest of their workflows is not read. None that is not
        there.
        """
        return self._log.seals_at(frozenset(versions))

    def columns(self, pipeline: str, *names: str, workflow: str | None = None) -> pl.DataFrame:
        """Some columns of all seals of a pipeline, or of one workflow, in no order: fields of `Seal`. Raises `StoreError`."""
        return self._log.columns(pipeline, *names, workflow=workflow)

    def effective(self, workflow_id: str, *, as_of: When | None = None) -> dict[str, Seal]:
        """The effective state: by agent, what the completed attempts sealed last. Empty before any attempt completed.

        `as_of`: as it was then. What was sealed later does not count, a fence or a compensation neither.
        """
        return effective(self.seals(workflow_id, as_of=as_of))

    def sealed_before(self, time: dt.datetime, pipeline: str, agent: str, *, other_than: str) -> Seal | None:
        """What an agent had sealed at that time in the effective state of another workflow, the one of the latest such seal; else None.

        What is sealed afterwards does not change the answer, so that it is the same for every step and try of an attempt that began then.
        """
        told = self.log().filter(
            (pl.col("pipeline") == pipeline)
            & (pl.col("agent") == agent)
            & (pl.col("workflow_id") != other_than)
            & (pl.col("sealed_at") < time)
        )
        newest = told.group_by("workflow_id").agg(pl.col("sealed_at").max()).sort("sealed_at", "workflow_id", descending=True)
        for workflow_id in self.collect(newest)["workflow_id"]:
            found = effective([seal for seal in self.seals(workflow_id) if seal.sealed_at < time]).get(agent)
            if found is not None:
                return found
        return None

    def read(self, seal: Seal, *, columns: Sequence[str] | None = None) -> pl.LazyFrame:
        """The rows of a state version; with `columns`, these only. Raises `TamperedError` when row or bytes are not what was sealed,
        `UnknownVersionError` for a column that it does not have.
        """
        if not seal.path:
            raise UnknownVersionError(f"{seal.reference} is a {seal.kind} and has no rows", workflow=seal.workflow_id)
        return self._read(seal, seal.files[0], columns)

    def quarantine(self, seal: Seal) -> pl.DataFrame:
        """What was kept out of a state version, as `QUARANTINE_SCHEMA` says; unmasked. Raises as `read` does."""
        if not seal.quarantine_path:
            return pl.DataFrame(schema=QUARANTINE_SCHEMA)
        return self._read(seal, seal.files[1]).collect()

    def deferred(self, seal: Seal) -> pl.DataFrame:
        """The records that wait for the next run, as `DEFERRED_SCHEMA` says. Raises as `read` does."""
        if not seal.deferred_path:
            return pl.DataFrame(schema=DEFERRED_SCHEMA)
        return self._read_at(seal, seal.deferred_path)

    def verdicts(self, seal: Seal) -> pl.DataFrame:
        """What judges said of a state version, as `VERDICTS_SCHEMA` says; unmasked. Raises as `read` does."""
        if not seal.verdicts_path:
            return pl.DataFrame(schema=VERDICTS_SCHEMA)
        return self._read_at(seal, seal.verdicts_path)

    def _read_at(self, seal: Seal, path: str) -> pl.DataFrame:
        return self._read(seal, next(file for file in seal.files if file.path == path)).collect()

    def register(self, pipeline: str, agent: str, told: Mapping[str, Any]) -> str:
        """Keeps what an agent declares of itself, durably, unless it is there; its digest, for the seals that it makes."""
        return register(self.objects, pipeline, agent, told)

    def registered(self, seal: Seal) -> dict[str, Any] | None:
        """What the agent of a seal had declared of itself; None of seals from before there was a registry. Raises `TamperedError`."""
        return registered(self.objects, seal)

    def add_calls(self, pipeline: str, agent: str, calls: pl.DataFrame | pl.LazyFrame) -> bool:
        """Adds rows of `CALLS_SCHEMA` to the agent's table of calls, in one commit that survives power loss; the same rows are added once.

        False, with a warning in the log, when the store does not take them: what calls came to never fails a step.
        """
        return CallsTable(self.objects, pipeline, agent).append(calls)

    def calls(self, pipeline: str, agent: str, workflow_id: str | None = None) -> pl.LazyFrame:
        """The agent's calls as `CALLS_SCHEMA` says, of all workflows or one, in no order; empty when none was logged."""
        return CallsTable(self.objects, pipeline, agent).scan(workflow_id)

    def callers(self, pipeline: str) -> list[str]:
        """The agents of a pipeline whose calls were logged, and judges as `agent.judge`, sorted; also those that have sealed nothing."""
        folders = self.objects.folders(f"tables/{pipeline}")
        return sorted(name.removesuffix(CALLS_SUFFIX) for name in folders if name.endswith(CALLS_SUFFIX))

    def _read(self, seal: Seal, file: SealedFile, columns: Sequence[str] | None = None) -> pl.LazyFrame:
        if seal.canonical_digest() != seal.seal_digest:
            raise TamperedError(f"The log row of {seal.reference} was rewritten", agent=seal.agent, workflow=seal.workflow_id)
        return snapshots.read(self.objects, seal, file, columns)

    def dispositions(self, workflow_id: str, *, as_of: When | None = None) -> pl.DataFrame:
        """What people decided on quarantined records of a workflow, oldest first, as `DISPOSITION_SCHEMA` says; `as_of`: until then."""
        decided = [seal for seal in self.seals(workflow_id, as_of=as_of) if seal.kind == "disposition"]
        # Those of earlier releases have fewer columns.
        return pl.concat([pl.DataFrame(schema=DISPOSITION_SCHEMA), *(self.read(seal).collect() for seal in decided)], how="diagonal")

    def dispose(self, workflow_id: str, decisions: pl.DataFrame) -> Seal:
        """Records decisions on quarantined records, rows of `DISPOSITION_SCHEMA`, as a version of the workflow: chained, and never changed.

        Raises `UnknownVersionError` when a decision is about a version that has no such record in quarantine, or there is none.
        """
        if decisions.is_empty():
            raise UnknownVersionError("There is no record to decide on", workflow=workflow_id, fix="name at least one")
        seen = self.seals(workflow_id)
        for version in decisions["version"].unique():
            held = self.quarantine(self.seal_at(workflow_id, version))["record"]
            for record in decisions.filter(pl.col("version") == version)["record"]:
                if record not in held:
                    raise UnknownVersionError(
                        f"Version {version} has no record {record!r} in quarantine",
                        workflow=workflow_id,
                        fix="`dagster-mao quarantine list` shows what there is",
                    )
        parents = [seen[version].as_parent for version in decisions["version"].unique().sort()]
        return self._told_by_people(seen, "disposition", decisions.select(DISPOSITION_SCHEMA.names()).cast(DISPOSITION_SCHEMA), parents)

    def disclose(self, workflow_id: str, disclosures: pl.DataFrame) -> Seal:
        """Records to whom personal data of a workflow is shown, rows of `DISCLOSURE_SCHEMA`, as a version of it: chained, never changed.

        To be called before anything is shown. Raises `UnknownVersionError` when nothing was sealed for the workflow.
        """
        seen = self.seals(workflow_id)
        if not seen:
            raise UnknownVersionError("Nothing was sealed for this workflow", workflow=workflow_id, fix="there is nothing to disclose")
        rows = disclosures.select(DISCLOSURE_SCHEMA.names()).cast(DISCLOSURE_SCHEMA)
        return self._told_by_people(seen, "disclosure", rows, [seen[-1].as_parent])

    def disclosures(self, workflow_id: str) -> pl.DataFrame:
        """To whom personal data of a workflow was shown, oldest first, as `DISCLOSURE_SCHEMA` says."""
        told = [seal for seal in self.seals(workflow_id) if seal.kind == "disclosure"]
        return pl.concat([pl.DataFrame(schema=DISCLOSURE_SCHEMA), *(self.read(seal).collect() for seal in told)])

    def _told_by_people(self, seen: Sequence[Seal], kind: Literal["disposition", "disclosure"], rows: pl.DataFrame, parents: Any) -> Seal:
        workflow_id, told = seen[0].workflow_id, uuid.uuid4().hex
        with snapshots.staged(self.objects, rows) as batch:
            path = f"{kind}s/{seen[0].pipeline}/{quote(workflow_id, safe='')}/{batch.digest}.parquet"
            self.objects.adopt(batch.file, path)
            row = {
                "parents": parents,
                "digest": batch.digest,
                "path": path,
                "row_count": rows.height,
                "size_bytes": batch.size_bytes,
                "contract": kind.capitalize(),
                "contract_version": "1",
            }
            return self._log.append(workflow_id, seen, lambda now: _of_nobody(now, kind, told, told, **row))

    def open_attempt(
        self,
        *,
        pipeline: str,
        attempt: str,
        run_id: str,
        plan: Iterable[str],
        entry: str,
        lineage: Sequence[str] = (),
        workflow_key: str | None = None,
        now: dt.datetime | None = None,
    ) -> Attempt:
        """Joins an attempt, pinning its base if this is the first step of it to arrive; later calls, in any process, get the same pins.

        `attempt` is the id of the root run, `lineage` the run's own id and those of the runs it re-executes, `plan` the agents the attempt
        sets out to seal. Without a `workflow_key`, an attempt that seals the entry is a new workflow, and any other one continues the
        workflow whose attempt completed last. Raises `FencedError` when the attempt was fenced, `PinError` when there is no workflow to
        continue.
        """
        path = f"attempts/{pipeline}/{safe_name(attempt)}/{safe_name(workflow_key) if workflow_key is not None else 'unpartitioned'}.json"
        table = self._log.open()
        if not self.objects.exists(path):
            now = now or dt.datetime.now(dt.timezone.utc)
            pins = self._pin(pipeline, attempt, tuple(plan), entry, workflow_key, now, table)
            self.objects.put_if_absent(path, pins.model_dump_json().encode())
        pins = Pins.model_validate_json(self.objects.get(path))
        head, table = self._log.looked_up(pins.workflow_id, table)
        if pins.base > head:  # another step pinned meanwhile, and saw more
            table = self._log.open()
        joined = Attempt(self.objects, self._log, table, pins, run_id=run_id, lineage=tuple(lineage) or (run_id,))
        joined.refuse_if_fenced()
        return joined

    def join_attempt(self, seen: Sequence[Seal], *, attempt: str, reads: Sequence[int], run_id: str, plan: Iterable[str]) -> Attempt:
        """Joins an attempt as an agent that is told which versions of the workflow to read: those of `seen`, the workflow's seals as they
        were read, at the places `reads`.

        Nothing is written: whoever is told the same pins the same, and `now` is the entry's. Raises `FencedError` when the attempt was
        fenced.
        """
        told = [seen[version] for version in reads]
        entry = entry_of(seen, told[0]) or told[0]
        pins = Pins(
            workflow_id=entry.workflow_id,
            pipeline=entry.pipeline,
            attempt=attempt,
            entry="",
            plan=tuple(plan),
            base=len(seen) - 1,
            now=entry.now,
        )
        joined = Attempt(self.objects, self._log, None, pins, run_id=run_id, lineage=(run_id,), seen=seen, reads=told)
        joined.refuse_if_fenced()
        return joined

    def _pin(
        self,
        pipeline: str,
        attempt: str,
        plan: tuple[str, ...],
        entry: str,
        key: str | None,
        now: dt.datetime,
        table: DeltaTable | None,
    ) -> Pins:
        if key is not None:
            workflow_id = f"{pipeline}/{key}"
        elif entry in plan:
            workflow_id = f"{pipeline}/{now:%Y-%m-%d}-{safe_name(attempt)[:8]}"
        else:
            workflow_id = self._last_completed(pipeline)
        if len(quote(workflow_id, safe="")) > _LONGEST_ID:
            raise PinError(
                f"The workflow id is longer than {_LONGEST_ID} bytes, percent-encoded", workflow=workflow_id, fix="shorten the key"
            )
        base, _ = self._log.looked_up(workflow_id, table)
        return Pins(workflow_id=workflow_id, pipeline=pipeline, attempt=attempt, entry=entry, plan=plan, base=base, now=now)

    def _last_completed(self, pipeline: str) -> str:
        newest = self.log().filter(pl.col("pipeline") == pipeline).group_by("workflow_id").agg(pl.col("sealed_at").max())
        for workflow_id in self.collect(newest.sort("sealed_at", "workflow_id", descending=True))["workflow_id"]:
            if self.effective(workflow_id):
                return str(workflow_id)
        raise PinError(f"No attempt of {pipeline!r} has completed yet", fix="materialise the pipeline with its entry first")

    def fence(self, workflow_id: str, *, attempt: str, run_id: str) -> Seal:
        """Ends an attempt: its seals leave the effective state, and nothing that pinned before the fence can be sealed any more."""
        seal = self._fence(workflow_id, attempt, run_id, None)
        assert seal is not None
        return seal

    def fence_incomplete(self, workflow_id: str, *, pipeline: str, attempt: str, run_id: str) -> Seal | None:
        """As `fence`, once per attempt, and not if it has completed: then None, and nothing is changed. Which was first, the log decides.

        An attempt that died before anything was sealed for its workflow is fenced too, by version 0.
        """
        return self._fence(workflow_id, attempt, run_id, pipeline)

    def _fence(self, workflow_id: str, attempt: str, run_id: str, pipeline: str | None) -> Seal | None:
        """With a `pipeline`: an attempt is fenced once, a completed one never, and an empty workflow is begun."""

        def make(seen: Sequence[Seal]) -> Seal:
            if not seen and pipeline is None:
                raise UnknownVersionError("Nothing was sealed for this workflow", workflow=workflow_id)
            for seal in seen:
                if seal.kind == "fence" and seal.attempt == attempt and (pipeline is not None or seal.run_id == run_id):
                    return seal
            if pipeline is not None and is_completed(seen, attempt):
                raise _CompletedError
            if not seen:
                return _of_nobody(seen, "fence", attempt, run_id, workflow_id=workflow_id, pipeline=pipeline)
            return _of_nobody(seen, "fence", attempt, run_id)

        try:
            return self._log.append(workflow_id, self.seals(workflow_id), make)
        except _CompletedError:
            return None

    def compensated(self, workflow_id: str, *, fence: Seal) -> Seal:
        """Records that what the attempt that `fence` ended had done was undone, as a version of the workflow, once.

        Its parents are the fence and, agent by agent, the versions that are effective now.
        """

        def make(seen: Sequence[Seal]) -> Seal:
            for seal in seen:
                if seal.kind == "compensated" and seal.attempt == fence.attempt:
                    return seal
            parents = [fence.as_parent, *(seal.as_parent for seal in effective(seen).values())]
            return _of_nobody(seen, "compensated", fence.attempt, fence.run_id, parents=parents)

        return self._log.append(workflow_id, self.seals(workflow_id), make)


class _CompletedError(Exception):
    """The attempt completed before it could be fenced."""


_BLANK: dict[str, Any] = {
    **dict.fromkeys(("agent", "digest", "path", "table", "uri", "agent_version", "config"), ""),
    **dict.fromkeys(("contract", "contract_version", "contract_hash", "contract_schema"), ""),
    **dict.fromkeys(("key", "model", "quarantine_path", "quarantine_digest", "quarantine_bytes"), None),
    **dict.fromkeys(("row_count", "quarantined", "size_bytes", "seed"), 0),
    **{"parents": (), "plan": (), "latency_seconds": 0.0},
}


def _of_nobody(seen: Sequence[Seal], kind: Kind, attempt: str, run_id: str, **row: Any) -> Seal:
    """The next version, made by no agent. The first one of a workflow needs `workflow_id` and `pipeline`."""
    now = dt.datetime.now(dt.timezone.utc)
    own = {"kind": kind, "attempt": attempt, "run_id": run_id, "base": len(seen) - 1, "now": now, "sealed_at": now}
    known = {"library_version": library_version("dagster-mao")}
    if seen:
        known |= {"workflow_id": seen[-1].workflow_id, "pipeline": seen[-1].pipeline}
    return next_seal(seen, {**_BLANK, **known, **own, **row})


def _is_sqlite(database: str) -> bool:
    scheme, separator, _ = database.partition("://")
    return not separator or scheme.partition("+")[0] == "sqlite"
