"""Verification: does the store still hold what was sealed, all of it, and nothing else?

Four comparisons, each of which sees what the others cannot: the bytes of every snapshot with their digest, every row of the log with its
own seal digest and with the row before, the agents' Delta tables with the log, and the log with the digests that Dagster's event log kept
(anchors). The last one is what finds a tail that was cut off and a history that was written anew with all digests recomputed.
"""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import unquote

import polars as pl
from deltalake import DeltaTable
from polars.exceptions import PanicException
from pydantic import ValidationError

from dagster_mao.errors import MaoError, TamperedError, UnknownVersionError
from dagster_mao.state.calls import CALLS_SUFFIX
from dagster_mao.state.log import StateLog
from dagster_mao.state.projection import Projection
from dagster_mao.state.registry import registration_path
from dagster_mao.state.seal import Seal
from dagster_mao.state.snapshots import VERSION_COLUMN, WORKFLOW_COLUMN
from dagster_mao.state.store import StateStore
from dagster_mao.state.transactions import transactions

FindingKind = Literal[
    "log_unreadable",
    "row_damaged",
    "row_rewritten",
    "row_missing",
    "row_doubled",
    "chain_broken",
    "tail_cut",
    "parent_wrong",
    "file_missing",
    "file_changed",
    "anchor_missing",
    "anchor_differs",
    "table_unreadable",
    "table_unsealed",
    "table_relabelled",
    "table_removed",
]
WarningKind = Literal["table_behind", "unanchored"]

_LOG = "state_log"
_READERS = 8  # files hashed at once: an object store answers in parallel, and hashing lets go of the interpreter


@dataclass(frozen=True)
class Anchor:
    """A seal digest as Dagster's event log holds it. `uri`, of the agent's table, tells one store's anchors from another's."""

    workflow_id: str
    version: int
    seal_digest: str
    uri: str | None = None
    run_id: str | None = None


@dataclass(frozen=True)
class Finding:
    """Something that is not as it was sealed. `file` is relative to the store's root; None where no one file is meant."""

    kind: FindingKind | WarningKind
    workflow: str | None
    version: int | None
    file: str | None
    detail: str


@dataclass(frozen=True)
class Report:
    """What was looked at and what was found. `good` means no findings; warnings are states that heal or that nobody can judge."""

    findings: tuple[Finding, ...]
    warnings: tuple[Finding, ...]
    workflows: int
    versions: int
    files: int
    size_bytes: int
    tables: int
    anchors_compared: bool
    anchored: int
    unanchored: int
    foreign: Mapping[str, int]  # anchors that belong to stores at other roots, by root: not compared

    @property
    def good(self) -> bool:
        return not self.findings


def verify(store: StateStore, workflow: str | None = None, *, agent: str | None = None, anchors: Sequence[Anchor] | None = None) -> Report:
    """Compares all of a store, one workflow, or one agent's files in it, with what was sealed.

    `anchors` are those of Dagster's event log, read before this call (a seal comes before its anchor, so none can then be missing from the
    log for having been young); None when there is no event log to compare with. With `agent` the whole chain is still walked, and only
    the files, tables and anchors of the others are left out. Writes nothing. Raises `UnknownVersionError` when there is nothing by this
    name, sealed or anchored, and `StoreError` when the store cannot be reached.
    """
    log = _read_log(store, workflow)
    known = None if anchors is None else [anchor for anchor in anchors if workflow in (None, anchor.workflow_id)]
    if workflow is not None and not (log.seals or log.findings or known):
        raise UnknownVersionError(
            "Nothing was sealed for this workflow", workflow=workflow, fix="`dagster-mao history` lists what there is"
        )
    findings, warnings = list(log.findings), list[Finding]()
    for chain in _by_workflow(log.seals).values():
        findings += _walk(chain, log.heads)
    findings += _parents(log.seals, whole=workflow is None)
    meant = [seal for seal in log.seals if agent in (None, seal.agent)]
    files = _digests(store, meant)
    findings += _files(meant, log.seals, files)
    findings += _registrations(store, meant)
    tables = _tables(store, meant, whole=workflow is None and agent is None)
    for table in tables:
        found, behind = _table(store, table, log, workflow)
        findings += found
        warnings += behind
    compared = _compare_anchors(store.root, log.seals, meant, known, log.readable)
    return Report(
        findings=tuple(findings + compared.findings),
        warnings=tuple(warnings + compared.warnings),
        workflows=len({seal.workflow_id for seal in log.seals}),
        versions=len(log.seals),
        files=len(files),
        size_bytes=sum({file.path: file.size_bytes for seal in meant for file in seal.files}.values()),
        tables=len(tables),
        anchors_compared=known is not None,
        anchored=compared.anchored,
        unanchored=compared.unanchored,
        foreign=compared.foreign,
    )


def pipelines(store: StateStore) -> set[str]:
    """The pipelines that the log speaks of, as far as it can be read."""
    return {seal.pipeline for seal in _read_log(store, None).seals}


# The log --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Log:
    seals: list[Seal]
    heads: dict[str, int | None]  # by workflow, the version its last commit recorded
    findings: list[Finding]
    readable: bool  # whether all of it was: what is missing from a damaged log is not a second finding


def _read_log(store: StateStore, workflow: str | None) -> _Log:
    try:
        table = StateLog(store.objects).open()
    except MaoError as error:
        return _Log([], {}, [Finding("log_unreadable", workflow, None, f"{_LOG}/_delta_log", error.what)], readable=False)
    if table is None:
        return _Log([], {}, [], readable=True)
    rows, findings = _rows(store, table, workflow)
    if findings:  # a compaction may have taken files away since the log was opened: what is damaged is so at the second look, too
        table = StateLog(store.objects).open() or table
        rows, findings = _rows(store, table, workflow)
    seals = list[Seal]()
    for row in rows:
        try:
            seals.append(Seal.model_validate(row))
        except ValidationError as error:
            wrong = ", ".join(sorted({str(problem["loc"][0]) for problem in error.errors() if problem["loc"]}))
            findings.append(Finding("row_damaged", row.get("workflow_id"), row.get("version"), _LOG, f"the log row has no valid {wrong}"))
    seals.sort(key=lambda seal: (seal.workflow_id, seal.version))
    heads = transactions(store.objects, _LOG, table, frozenset(seal.workflow_id for seal in seals))
    return _Log(seals, heads, findings, readable=not findings)


def _rows(store: StateStore, table: DeltaTable, workflow: str | None) -> tuple[list[dict[str, Any]], list[Finding]]:
    """All rows that can be read, and a finding for each file that cannot.

    File by file and from memory: so one damaged file does not hide the others, and polars, which panics on a file that has shrunk since
    Delta noted its size, only ever parses bytes.
    """
    rows, findings = list[dict[str, Any]](), list[Finding]()
    if "deletionVectors" in (table.protocol().reader_features or ()):
        findings.append(Finding("log_unreadable", workflow, None, f"{_LOG}/_delta_log", "the state log hides rows by deletion vectors"))
    chosen = pl.lit(True) if workflow is None else pl.col("workflow_id") == workflow
    for name in sorted(pl.DataFrame(table.get_add_actions(flatten=True))["path"]):
        file = f"{_LOG}/{unquote(name)}"
        try:
            rows += pl.read_parquet(io.BytesIO(store.objects.get(file))).filter(chosen).rows(named=True)
        except TamperedError:
            findings.append(Finding("log_unreadable", workflow, None, file, "a file of the state log is gone"))
        except (Exception, PanicException) as error:  # whatever damaged bytes make polars raise
            findings.append(
                Finding("log_unreadable", workflow, None, file, f"a file of the state log cannot be read: {_first_line(error)}")
            )
    return rows, findings


def _by_workflow(seals: Iterable[Seal]) -> dict[str, list[Seal]]:
    chains: dict[str, list[Seal]] = defaultdict(list)
    for seal in seals:
        chains[seal.workflow_id].append(seal)
    return dict(chains)


def _walk(chain: Sequence[Seal], heads: Mapping[str, int | None]) -> Iterator[Finding]:
    """Every row against its own digest, every link against the row before, the numbers against a gapless count."""
    previous: Seal | None = None
    for seal in chain:
        if seal.canonical_digest() != seal.seal_digest:
            yield _about(seal, "row_rewritten", "the log row is not the one that was sealed: its contents call for another seal digest")
        expected = 0 if previous is None else previous.version + 1
        if previous is not None and seal.version == previous.version:
            yield _about(seal, "row_doubled", "the log has this version twice")
        elif seal.version != expected:
            for version in range(expected, seal.version):
                yield Finding("row_missing", seal.workflow_id, version, _LOG, "the log has no row for this version, and has later ones")
        elif seal.previous_digest != ("" if previous is None else previous.seal_digest):
            yield _about(seal, "chain_broken", f"its link does not lead to version {expected - 1}")
        previous = seal
    if previous is not None and heads.get(previous.workflow_id) != previous.version:
        yield from _tail(previous, heads.get(previous.workflow_id))


def _tail(last: Seal, head: int | None) -> Iterator[Finding]:
    if head is None or head < last.version:
        yield _about(last, "tail_cut", f"the log committed versions up to {'none' if head is None else head}, and has rows beyond")
        return
    for version in range(last.version + 1, head + 1):
        yield Finding("tail_cut", last.workflow_id, version, _LOG, "the log committed this version and has lost its row")


def _parents(seals: Sequence[Seal], *, whole: bool) -> Iterator[Finding]:
    """Every parent against the version it names. With a part of the log, parents in other workflows cannot be looked up."""
    sealed = {(seal.workflow_id, seal.version): seal for seal in seals}
    loaded = {seal.workflow_id for seal in seals}
    for seal in seals:
        for parent in seal.parents:
            found = sealed.get((parent.workflow_id, parent.version))
            if found is None and not whole and parent.workflow_id not in loaded:
                continue
            if found is None:
                yield _about(seal, "parent_wrong", f"its parent {parent.workflow_id}@{parent.version} is not in the log")
            elif (found.agent, found.digest) != (parent.agent, parent.digest):
                yield _about(
                    seal, "parent_wrong", f"its parent {found.reference} is not what it was made from: another agent or content digest"
                )


# Snapshots ------------------------------------------------------------------------------------------------------------------------


def _digests(store: StateStore, seals: Sequence[Seal]) -> dict[str, str | None]:
    return _hashed(store, {file.path for seal in seals for file in seal.files})


def _hashed(store: StateStore, paths: Iterable[str]) -> dict[str, str | None]:
    """By path, the sha256 of the file as it is now; None for one that is gone."""

    def digest(path: str) -> str | None:
        try:
            return store.objects.sha256(path)
        except TamperedError:
            return None

    looked_at = sorted(paths)
    with ThreadPoolExecutor(_READERS) as pool:
        return dict(zip(looked_at, pool.map(digest, looked_at), strict=True))


def _files(meant: Sequence[Seal], seals: Sequence[Seal], files: Mapping[str, str | None]) -> Iterator[Finding]:
    owner = {file.digest: seal for seal in seals for file in seal.files}
    for seal in meant:
        for file in seal.files:
            kinds = {
                seal.path: "snapshot",
                seal.deferred_path: "list of deferred records",
                seal.verdicts_path: "file of the judges' verdicts",
            }
            actual, what = files[file.path], kinds.get(file.path, "quarantine")
            if actual is None:
                yield _about(seal, "file_missing", f"the {what} is gone", file.path)
            elif actual != file.digest:
                whose = f": it holds the bytes of {owner[actual].reference} ({owner[actual].agent})" if actual in owner else ""
                yield _about(seal, "file_changed", f"the {what}'s bytes are not those that were sealed{whose}", file.path)


def _registrations(store: StateStore, seals: Sequence[Seal]) -> Iterator[Finding]:
    """What agents declared of themselves, each once, at the first seal that names it."""
    first: dict[str, Seal] = {}
    for seal in seals:
        if seal.registration:
            first.setdefault(registration_path(seal.pipeline, seal.agent, seal.registration), seal)
    for path, actual in _hashed(store, first).items():
        if actual is None:
            yield _about(first[path], "file_missing", "what the agent declared of itself is gone", path)
        elif actual != first[path].registration:
            yield _about(first[path], "file_changed", "what the agent declared of itself is not what was registered", path)


# The agents' tables ---------------------------------------------------------------------------------------------------------------


def _tables(store: StateStore, seals: Sequence[Seal], *, whole: bool) -> list[str]:
    tables = {file.table for seal in seals for file in seal.files if file.table}
    if whole:  # also those that no seal speaks of (any more), but for tables of calls, which are not sealed
        found = {path.partition("/_delta_log/")[0] for path in store.objects.list("tables") if "/_delta_log/" in path}
        tables |= {table for table in found if not table.endswith(CALLS_SUFFIX)}
    return sorted(tables)


def _table(store: StateStore, path: str, log: _Log, workflow: str | None) -> tuple[list[Finding], list[Finding]]:
    """Findings and warnings about one agent's Delta table: each file in it against the seals, each seal against its files."""
    sealed = [(seal, file) for seal in log.seals for file in seal.files if file.table == path]
    try:
        table = Projection(store.objects, path).open()
        held = _held(path, table, workflow) if table is not None else {}
    except Exception as error:  # a damaged log makes delta-rs raise more than its own errors
        what = error.what if isinstance(error, MaoError) else _first_line(error)
        return [Finding("table_unreadable", workflow, None, f"{path}/_delta_log", f"the agent's Delta table cannot be read: {what}")], []
    findings = _aliens(store, held, log.seals) if log.readable else []
    missing = [(seal, file) for seal, file in sealed if file.path not in held]
    added = {seal.workflow_id: table.transaction_version(seal.workflow_id) if table is not None else None for seal, _ in missing}
    removed = [(seal, file) for seal, file in missing if (done := added[seal.workflow_id]) is not None and seal.version <= done]
    behind = [seal for seal, file in missing if (seal, file) not in removed]
    findings += [
        _about(seal, "table_removed", "the agent's Delta table had this snapshot and no longer has it", file.path) for seal, file in removed
    ]
    return findings, [
        _about(seal, "table_behind", "not yet in the agent's Delta table; the agent's next seal in this workflow adds it", path)
        for seal in behind
    ]


def _held(path: str, table: DeltaTable, workflow: str | None) -> dict[str, tuple[str | None, int | None]]:
    """By path, the workflow and version that the table gives a file's rows."""
    actions = pl.DataFrame(table.get_add_actions(flatten=True))
    if actions.is_empty():
        return {}
    names = [f"{path}/{unquote(name)}" for name in actions["path"]]  # Delta holds paths URL-encoded
    # A table that was not made by a seal need not be partitioned like one.
    labels = [(row.get(f"partition.{WORKFLOW_COLUMN}"), row.get(f"partition.{VERSION_COLUMN}")) for row in actions.iter_rows(named=True)]
    return {name: label for name, label in zip(names, labels, strict=True) if workflow in (None, label[0])}


def _aliens(store: StateStore, held: Mapping[str, tuple[str | None, int | None]], seals: Sequence[Seal]) -> list[Finding]:
    labels = _labels(seals)
    if not held.keys() <= labels.keys():
        # The table was opened after the log: what was sealed in between is no alien.
        for path, fresh in _labels(_read_log(store, None).seals).items():
            labels.setdefault(path, set()).update(fresh)
    findings = []
    for file, (workflow, version) in held.items():
        if file not in labels:
            detail = "the agent's Delta table has rows that nobody sealed"
            findings.append(Finding("table_unsealed", workflow, version, file, detail))
        elif (workflow, version) not in labels[file]:
            detail = "the agent's Delta table gives these rows another workflow or version than their seal"
            findings.append(Finding("table_relabelled", workflow, version, file, detail))
    return findings


def _labels(seals: Sequence[Seal]) -> dict[str, set[tuple[str | None, int | None]]]:
    labels: dict[str, set[tuple[str | None, int | None]]] = defaultdict(set)
    for seal in seals:
        for file in seal.files:
            labels[file.path].add((seal.workflow_id, seal.version))
    return labels


# Anchors --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Compared:
    findings: list[Finding]
    warnings: list[Finding]
    anchored: int = 0
    unanchored: int = 0
    foreign: Mapping[str, int] = field(default_factory=dict)


def _compare_anchors(
    root: str, seals: Sequence[Seal], meant: Sequence[Seal], anchors: Sequence[Anchor] | None, readable: bool
) -> _Compared:
    if anchors is None:
        return _Compared([], [])
    own, foreign = _own(root, seals, anchors)
    sealed = {(seal.workflow_id, seal.version): seal for seal in seals}
    findings = [*_contradictions(own, {(seal.workflow_id, seal.version): seal for seal in meant})]
    if readable:
        findings += _lost(own, sealed)
    loose = [seal for seal in meant if seal.kind in ("entry", "output") and (seal.workflow_id, seal.version) not in own]
    anchored = sum((seal.workflow_id, seal.version) in own for seal in meant)
    warnings = [
        Finding("unanchored", workflow, None, None, f"not in Dagster's event log: {_spans([seal.version for seal in chain])}")
        for workflow, chain in _by_workflow(loose).items()
    ]
    return _Compared(findings, warnings, anchored, len(loose), foreign)


def _own(root: str, seals: Sequence[Seal], anchors: Sequence[Anchor]) -> tuple[dict[tuple[str, int], list[Anchor]], dict[str, int]]:
    """This store's anchors by version, and how many belong to stores elsewhere.

    One event log may know several stores. An anchor is this store's when it was made at this root, or at a root of which at least one
    anchor fits (the store was moved, or is a copy).
    """
    by_root: dict[str | None, list[Anchor]] = defaultdict(list)
    for anchor in anchors:
        by_root[anchor.uri.rpartition("/tables/")[0] if anchor.uri else None].append(anchor)
    fits = {(seal.workflow_id, seal.version, seal.seal_digest) for seal in seals}
    own: dict[tuple[str, int], list[Anchor]] = defaultdict(list)
    foreign: dict[str, int] = {}
    for place, there in by_root.items():
        if place in (None, "", root) or any((a.workflow_id, a.version, a.seal_digest) in fits for a in there):
            for anchor in there:
                own[anchor.workflow_id, anchor.version].append(anchor)
        else:
            foreign[str(place)] = len(there)
    return own, foreign


def _contradictions(own: Mapping[tuple[str, int], Sequence[Anchor]], meant: Mapping[tuple[str, int], Seal]) -> Iterator[Finding]:
    for place, seal in meant.items():
        wrong = sorted({str(anchor.run_id) for anchor in own.get(place, ()) if anchor.seal_digest != seal.seal_digest})
        if wrong:
            yield _about(seal, "anchor_differs", f"Dagster's event log holds another seal digest for this version (run {', '.join(wrong)})")


def _lost(own: Mapping[tuple[str, int], Sequence[Anchor]], sealed: Mapping[tuple[str, int], Seal]) -> Iterator[Finding]:
    for workflow, version in sorted(own.keys() - sealed.keys()):
        runs = ", ".join(sorted({str(anchor.run_id) for anchor in own[workflow, version]}))
        yield Finding(
            "anchor_missing", workflow, version, _LOG, f"Dagster's event log knows this version (run {runs}); the state log does not"
        )


# --------------------------------------------------------------------------------------------------------------------------------


def _about(seal: Seal, kind: FindingKind | WarningKind, detail: str, file: str = _LOG) -> Finding:
    return Finding(kind, seal.workflow_id, seal.version, file, detail)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def _spans(versions: Sequence[int]) -> str:
    """`versions 0-3, 7` for 0, 1, 2, 3, 7."""
    spans: list[list[int]] = []
    for version in sorted(set(versions)):
        if spans and version == spans[-1][-1] + 1:
            spans[-1][1:] = [version]
        else:
            spans.append([version])
    return ("versions " if len(versions) > 1 else "version ") + ", ".join("-".join(map(str, span)) for span in spans)
