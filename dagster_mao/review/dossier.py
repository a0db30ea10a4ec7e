"""The decision dossier: everything that the store, the journal and Dagster's event log say of one workflow, or of one record in it.

What came in, what every agent read and said, by which code and contract, over which calls, what was refused, undone or shown to people, and
whether all of it is still what was sealed.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any

import polars as pl

from dagster_mao.errors import MaoError, UnknownVersionError
from dagster_mao.review.calls import calls, told_of
from dagster_mao.review.deferred import waiting
from dagster_mao.review.history import facts, known, records
from dagster_mao.review.masking import MASK, fields_of, is_personal
from dagster_mao.review.quarantine import Refusal, refusals
from dagster_mao.review.verdicts import Judged, judged, votes
from dagster_mao.saga import SagaState, sagas
from dagster_mao.state import CallSummary, Seal, StateStore, effective
from dagster_mao.state.verify import Anchor, Finding, Report, verify

ROWS = 1_000
"""Records of an effective version, and calls, that a dossier of a whole workflow shows."""

_VOTES = 200  # of judges, on a version
_ROWS_BEFORE = 20  # of a version that is not in effect any more


@dataclass(frozen=True)
class RunTold:
    """A run as Dagster tells of it. `launched_by`: a person, schedule, sensor or backfill, as far as the run's tags say. Times are UTC."""

    run_id: str
    attempt: str
    job: str
    status: str
    launched_by: str
    started: dt.datetime | None = None
    ended: dt.datetime | None = None
    url: str | None = None


@dataclass(frozen=True)
class CheckTold:
    """A verdict on an agent's asset, as Dagster's event log has it."""

    agent: str
    check: str
    passed: bool
    severity: str
    description: str
    run_id: str
    at: dt.datetime


@dataclass(frozen=True)
class Evidence:
    """What Dagster adds: its runs, its checks, and the anchors that the chain is compared with. `source` is where it is from."""

    source: str
    runs: tuple[RunTold, ...] = ()
    checks: tuple[CheckTold, ...] = ()
    anchors: tuple[Anchor, ...] = ()


@dataclass(frozen=True)
class Disclosure:
    """That personal data is shown: to whom, and why. It is recorded as a version of the workflow before anything is shown."""

    by: str
    why: str


@dataclass(frozen=True)
class VersionTold:
    """A state version: what its agent read, by reference, and said. `total`: of how many records `said` holds the first.

    `declared` is what its agent said of itself when it sealed, as registered. `judged` is what judges' verdicts came to, and `votes`
    are some of them, or those on the record.
    """

    seal: Seal = field(repr=False)
    is_effective: bool
    reads: Mapping[str, Sequence[Mapping[str, Any]]] = field(repr=False)
    said: Sequence[Mapping[str, Any]] = field(repr=False)
    total: int
    deferred: Sequence[Mapping[str, Any]] = ()
    declared: Mapping[str, Any] | None = field(default=None, repr=False)
    judged: Sequence[Judged] = ()
    votes: Sequence[Mapping[str, Any]] = field(default=(), repr=False)

    @property
    def reference(self) -> str:
        return self.seal.reference

    @property
    def began(self) -> dt.datetime:
        return self.seal.sealed_at - dt.timedelta(seconds=self.seal.latency_seconds)


@dataclass(frozen=True)
class Event:
    """Something that happened, for the timeline. `version` is the state version that it made."""

    at: dt.datetime
    what: str
    kind: str
    detail: str = ""
    version: int | None = None


@dataclass(frozen=True)
class Dossier:
    """What is known of a workflow, or of one `record` of it (masked where its key is personal, and None for all records).

    `versions` are those that hold the record, all of them without one. `refused`, `compensations` and `shown` (to whom personal data
    was) are the whole workflow's; `calls` are the record's where its key is not personal, `summaries` what all calls of an agent came to.
    `notes` say what could not be told.
    """

    workflow_id: str
    record: str | None
    made_at: dt.datetime
    library_version: str
    disclosure: Disclosure | None
    versions: tuple[VersionTold, ...]
    runs: tuple[RunTold, ...]
    checks: tuple[CheckTold, ...]
    calls: Sequence[Mapping[str, Any]] = field(repr=False)
    calls_total: int
    summaries: Mapping[str, CallSummary]
    refused: tuple[Refusal, ...] = field(repr=False)
    compensations: tuple[SagaState, ...]
    shown: Sequence[Mapping[str, Any]] = field(repr=False)
    verification: Report
    evidence: str | None
    notes: tuple[str, ...]

    @property
    def decided(self) -> tuple[VersionTold, ...]:
        """The effective versions that no other effective version was made from: what the workflow came to."""
        state = [told for told in self.versions if told.is_effective]
        read = {(parent.workflow_id, parent.version) for told in state for parent in told.seal.parents}
        return tuple(told for told in state if (told.seal.workflow_id, told.seal.version) not in read)

    @property
    def is_intact(self) -> bool:
        """Whether everything is what was sealed."""
        return self.verification.good

    def timeline(self) -> list[Event]:
        """What happened, oldest first."""
        events = [_sealed(told, self.summaries) for told in self.versions]
        for run in self.runs:
            about = f"{run.job}, launched by {run.launched_by}"
            events += [Event(run.started, f"run {run.run_id[:8]} began", "run", about)] if run.started else []
            events += [Event(run.ended, f"run {run.run_id[:8]} ended: {run.status.lower()}", "run", about)] if run.ended else []
        failed = [check for check in self.checks if not check.passed]
        events += [Event(check.at, f"{check.agent}: {check.check} failed", "failed", check.description) for check in failed]
        decided = {(r.at, r.status, r.by, r.why) for r in self.refused if r.at is not None}
        events += [Event(at, f"quarantined records {status}", "people", f"{by}: {why}") for at, status, by, why in decided if at]
        events += [Event(shown["at"], "personal data was shown", "people", f"{shown['by']}: {shown['why']}") for shown in self.shown]
        for saga in self.compensations:
            events.append(Event(saga.asked, "a compensation was asked for", "undone", saga.why or ""))
            events += [Event(saga.concluded, f"the compensation ended: {saga.state}", "undone")] if saga.concluded else []
        return sorted(events, key=lambda event: (event.at, event.version or 0))


def dossier(
    store: StateStore,
    workflow: str,
    *,
    record: str | None = None,
    disclosure: Disclosure | None = None,
    evidence: Evidence | None = None,
    rows: int = ROWS,
) -> Dossier:
    """Everything that is known of a workflow, or of the record with this key (as text, in full).

    Personal fields are masked, unless a `disclosure` says who is to see them and why: it is recorded first. `evidence` is Dagster's. Raises
    `UnknownVersionError` where there is no such workflow, or no version of it has the record; `TamperedError` never: what is not as it was
    sealed is in `verification`, and its rows are left out, with a note.
    """
    seals = known(store, workflow)
    notes: list[str] = []
    if disclosure is not None:
        _record(store, workflow, record, disclosure)
    found = _versions(store, seals, record, rows, unmask=disclosure is not None, notes=notes)
    refused = _refused(store, workflow, record, notes)
    if record is not None and not found and not refused:
        raise UnknownVersionError("No version holds a record with this key", workflow=workflow, fix="keys are compared as text, in full")
    made, total, summaries = _calls(store, workflow, seals, record, rows, notes)
    hidden = record is not None and disclosure is None and any(_is_hidden(seal) for seal in seals if seal.key)
    if evidence is None:
        notes.append("Dagster's event log was not asked: who launched the runs, the checks' verdicts and the anchors are not here.")
    return Dossier(
        workflow_id=workflow,
        record=MASK if hidden else record,
        made_at=dt.datetime.now(dt.timezone.utc),
        library_version=version("dagster-mao"),
        disclosure=disclosure,
        versions=found,
        runs=evidence.runs if evidence else (),
        checks=evidence.checks if evidence else (),
        calls=made,
        calls_total=total,
        summaries=summaries,
        refused=refused,
        compensations=tuple(sagas(store, seals[0].pipeline, workflow)),
        shown=_shown(store, workflow, notes),
        verification=verify(store, workflow, anchors=evidence.anchors if evidence else None),
        evidence=evidence.source if evidence else None,
        notes=tuple(notes),
    )


def as_json(told: Dossier) -> dict[str, Any]:
    """The dossier as JSON-able facts; the contracts' descriptions once each, by hash."""
    one = {name: getattr(told, name) for name in ("workflow_id", "record", "made_at", "library_version", "disclosure", "evidence", "notes")}
    shown = [
        {
            "reference": v.reference,
            "is_effective": v.is_effective,
            "reads": v.reads,
            "said": v.said,
            "total": v.total,
            "deferred_records": v.deferred,
            "declared": v.declared,
            "judged": {one.judge: one.numbers for one in v.judged},
            "votes": v.votes,
            "seal": facts(v.seal),
        }
        for v in told.versions
    ]
    contracts = {v.seal.contract_hash: v.seal.contract_schema for v in told.versions if v.seal.contract_hash}
    rest = {name: getattr(told, name) for name in ("runs", "checks", "calls", "calls_total", "summaries", "compensations", "shown")}
    refused = [
        {name: getattr(r, name) for name in ("record", "side", "upstream", "rules", "values", "status", "why", "by", "at")}
        | {"reference": r.seal.reference, "agent": r.seal.agent}
        for r in told.refused
    ]
    verified = {name: getattr(told.verification, name) for name in ("good", "findings", "warnings", "versions", "files", "size_bytes")}
    return {
        **one,
        "versions": shown,
        "contracts": contracts,
        **rest,
        "quarantine": refused,
        "timeline": told.timeline(),
        "verification": {**verified, "anchors_compared": told.verification.anchors_compared, "anchored": told.verification.anchored},
    }


# -- reading -------------------------------------------------------------------------------------------------------------------------


def _record(store: StateStore, workflow: str, record: str | None, disclosure: Disclosure) -> None:
    row = {"record": record, "why": disclosure.why, "by": disclosure.by, "at": dt.datetime.now(dt.timezone.utc)}
    store.disclose(workflow, pl.DataFrame([row]))


def _versions(
    store: StateStore, seals: Sequence[Seal], record: str | None, rows: int, *, unmask: bool, notes: list[str]
) -> tuple[VersionTold, ...]:
    state = effective(seals).values()
    said: dict[str, Sequence[Mapping[str, Any]]] = {}

    def read(seal: Seal) -> Sequence[Mapping[str, Any]]:
        """The record, or the first records; of a version without a key, which speaks of all records, its own."""
        if seal.reference not in said:
            limit = rows if seal in state else min(rows, _ROWS_BEFORE)
            said[seal.reference] = _rows(store, seal, record if seal.key else None, limit, unmask=unmask, notes=notes)
        return said[seal.reference]

    found = []
    for seal in seals:
        made = bool(seal.agent)
        own = read(seal) if made else ()
        deferred = _waits(store, seal, record, rows, notes)
        if record is not None and made and seal.key and not own and not deferred:
            continue
        parents = [store.seal_at(parent.workflow_id, parent.version) for parent in seal.parents] if made else []
        reads = {parent.reference: read(parent) if record is not None else () for parent in parents}
        declared = _declared(store, seal, notes)
        said_of_it = _votes(store, seal, record, min(rows, _VOTES), unmask=unmask, notes=notes)
        total = seal.row_count if record is None else len(own)
        found.append(VersionTold(seal, seal in state, reads, own, total, deferred, declared, judged([seal]), said_of_it))
    if record is not None and not any(told.said or told.deferred for told in found if told.seal.key):
        return ()
    return tuple(found)


def _rows(store: StateStore, seal: Seal, key: str | None, limit: int, *, unmask: bool, notes: list[str]) -> Sequence[Mapping[str, Any]]:
    try:
        return records(store, seal, key=key, limit=limit, unmask=unmask)
    except MaoError as error:  # a dossier is wanted most of what was tampered with
        notes.append(f"{seal.reference} cannot be read ({type(error).__name__}): what it says is left out.")
        return ()


def _declared(store: StateStore, seal: Seal, notes: list[str]) -> Mapping[str, Any] | None:
    try:
        return store.registered(seal)
    except MaoError as error:
        notes.append(f"What {seal.agent} declared of itself cannot be read ({type(error).__name__}), and is left out.")
        return None


def _votes(store: StateStore, seal: Seal, record: str | None, limit: int, *, unmask: bool, notes: list[str]) -> Sequence[Mapping[str, Any]]:
    try:
        return votes(store, seal, record=record, limit=limit, unmask=unmask)
    except MaoError as error:
        notes.append(f"What judges said of {seal.reference} cannot be read ({type(error).__name__}), and is left out.")
        return ()


def _refused(store: StateStore, workflow: str, record: str | None, notes: list[str]) -> tuple[Refusal, ...]:
    try:
        return tuple(one for one in refusals(store, workflow, every=True) if record is None or one.is_named(record))
    except MaoError as error:
        notes.append(f"The quarantine cannot be read ({type(error).__name__}): what was set aside is left out.")
        return ()


def _shown(store: StateStore, workflow: str, notes: list[str]) -> list[dict[str, Any]]:
    try:
        return store.disclosures(workflow).drop("record").to_dicts()
    except MaoError as error:
        notes.append(f"The disclosures cannot be read ({type(error).__name__}): to whom personal data was shown is left out.")
        return []


def _waits(store: StateStore, seal: Seal, record: str | None, limit: int, notes: list[str]) -> Sequence[Mapping[str, Any]]:
    try:
        if record is None or not seal.deferred:
            return waiting(store, seal, limit=limit)
        rows = store.deferred(seal).filter(pl.col("record") == record)
    except MaoError as error:
        notes.append(f"What {seal.reference} deferred cannot be read ({type(error).__name__}), and is left out.")
        return ()
    return [{**row, "record": MASK if _is_hidden(seal) else row["record"]} for row in rows.to_dicts()]


def _calls(
    store: StateStore, workflow: str, seals: Sequence[Seal], record: str | None, rows: int, notes: list[str]
) -> tuple[Sequence[Mapping[str, Any]], int, dict[str, CallSummary]]:
    every = calls(store, workflow)
    summaries = {str(agent): CallSummary.of(made) for (agent,), made in every.group_by("agent", maintain_order=True)}
    if record is None:
        return every.head(rows).to_dicts(), every.height, summaries
    if any(_is_hidden(seal) for seal in seals if seal.key):
        notes.append("The key is personal, so the log of calls does not say which record a call was about.")
    # A call with whole frames was about all records.
    about = every.filter((pl.col("record") == record) | pl.col("record").is_null())
    return about.head(rows).to_dicts(), about.height, summaries


def _is_hidden(seal: Seal) -> bool:
    return seal.key is not None and is_personal(fields_of(seal).get(seal.key))


def _sealed(told: VersionTold, summaries: Mapping[str, CallSummary]) -> Event:
    seal = told.seal
    if not seal.agent:
        what = {"fence": "the attempt was ended", "compensated": "compensated: the state before is effective again"}
        return Event(seal.sealed_at, what.get(seal.kind, f"a {seal.kind} was recorded"), seal.kind, "", seal.version)
    made = f"{seal.row_count:,} records" + (f", {seal.quarantined:,} set aside" if seal.quarantined else "")
    came_to = CallSummary.model_validate_json(seal.usage) if seal.usage else None
    detail = "; ".join([made, *([told_of(came_to)] if came_to and came_to != CallSummary() else []), f"{seal.latency_seconds:.3g} s"])
    return Event(seal.sealed_at, f"{seal.agent} sealed {seal.reference}", seal.kind, detail, seal.version)


def finding_text(finding: Finding) -> str:
    """A finding in a sentence."""
    where = finding.workflow or "the state log"
    where += f"@{finding.version}" if finding.version is not None else ""
    return f"{finding.kind.replace('_', ' ')}: {where}: {finding.detail}" + (f" ({finding.file})" if finding.file else "")


def with_urls(evidence: Evidence, url: str | None) -> Evidence:
    """The evidence with links to the runs in the UI at this address."""
    if url is None:
        return evidence
    return replace(evidence, runs=tuple(replace(run, url=f"{url.rstrip('/')}/runs/{run.run_id}") for run in evidence.runs))
