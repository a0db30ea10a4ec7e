"""What is in quarantine, what was decided on it, and whether the numbers add up: recomputed from the store."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import polars as pl

from dagster_mao.contract import field_of
from dagster_mao.errors import UnknownVersionError
from dagster_mao.review.masking import MASK, fields_of, is_personal
from dagster_mao.state import DISPOSITION_SCHEMA, Seal, StateStore, When, effective

Status = Literal["open", "discarded", "resubmitted", "superseded", "unfinished"]
Wrong = Literal["neither", "both", "doubled", "never_came_in"]

_DIGITS = 8  # of a digest, to name a record by that has no key
_NAMED = 20  # records that an account names of each kind of wrong


@dataclass(frozen=True)
class Refusal:
    """One refusal of one record: why, on which side, and what became of it since. Everything but `key` may be shown.

    `status`: open; discarded or resubmitted (with `why`, `by`, `at`); superseded, by a later version of the effective state; unfinished,
    when its attempt has not completed.
    """

    seal: Seal
    key: str | None = field(repr=False)  # as it came in: to find the record by
    record: str | None  # the same, masked if the key is personal
    side: str
    upstream: str | None
    rules: tuple[str, ...]
    values: Mapping[str, Any]  # masked
    digest: str
    status: Status
    why: str = ""
    by: str = ""
    at: dt.datetime | None = None

    def is_named(self, name: str) -> bool:
        """Whether a person who writes this means this record: by its key in full, or by the first digits of its digest."""
        return self.key == name or (len(name) >= _DIGITS and self.digest.startswith(name))

    def is_about(self, field: str) -> bool:
        """Whether it broke a rule of this field: rules are called after theirs."""
        return any(field_of(rule) == field for rule in self.rules)


@dataclass(frozen=True)
class Account:
    """What became of the records that came to one boundary: in = sealed + quarantined + discarded + deferred.

    `quarantined` are those that wait: for a decision or, resubmitted, for the agents; `deferred` those that wait for the next run. `wrong`
    names the first records of each kind that does not fit (masked if the key is personal), `wrong_counts` counts them.
    """

    seal: Seal
    came_in: int
    sealed: int
    quarantined: int
    discarded: int
    deferred: int
    wrong: Mapping[Wrong, tuple[str | None, ...]]
    wrong_counts: Mapping[Wrong, int]

    @property
    def balanced(self) -> bool:
        """Whether every record that came in is in one place, once, and the seal says so too."""
        held = self.quarantined + self.discarded
        told = (self.seal.row_count, self.seal.quarantined, self.seal.deferred or 0) == (self.sealed, held, self.deferred)
        return told and not self.wrong_counts and self.came_in == self.sealed + held + self.deferred


def refusals(
    store: StateStore, workflow: str, *, agent: str | None = None, every: bool = False, as_of: When | None = None
) -> list[Refusal]:
    """What the effective state of a workflow holds in quarantine, by version; with `every`, what any of its versions does.

    `as_of`: as it was then; what was decided later does not count. Raises `TamperedError` when a quarantine is not what was sealed.
    """
    seals = store.seals(workflow, as_of=as_of)
    state = effective(seals)
    meant = [s for s in seals if s.quarantine_path and agent in (None, s.agent) and (every or s in state.values())]
    if not meant:
        return []
    decisions = _decisions(store, seals, as_of)
    return [refusal for seal in meant for refusal in _refusals(store, seal, state.get(seal.agent), decisions)]


def refusals_of(store: StateStore, seal: Seal, *, as_of: When | None = None) -> list[Refusal]:
    """What one version holds in quarantine, and what had become of it then. Raises as `refusals` does."""
    if not seal.quarantine_path:
        return []
    seals = store.seals(seal.workflow_id, as_of=as_of)
    return list(_refusals(store, seal, effective(seals).get(seal.agent), _decisions(store, seals, as_of)))


def discard(store: StateStore, chosen: Sequence[Refusal], *, why: str, by: str) -> Seal:
    """Records that nothing will become of these. Raises `UnknownVersionError` when a version has no such record in quarantine."""
    return decide(store, chosen, "discarded", why=why, by=by)


def decide(
    store: StateStore,
    chosen: Sequence[Refusal],
    verdict: Literal["discarded", "resubmitted"],
    *,
    why: str,
    by: str,
    entry: Seal | None = None,
) -> Seal:
    """Records one decision on refusals of one workflow, as a version of it. `entry`: in which they came in again."""
    now = dt.datetime.now(dt.timezone.utc)
    rows = [
        {"agent": r.seal.agent, "version": r.seal.version, "record": r.key, "digest": r.digest, "verdict": verdict, "why": why}
        for r in chosen
    ]
    told = {"by": by, "at": now, "entry": None if entry is None else entry.version}
    frame = pl.DataFrame([{**row, **told} for row in rows], schema=DISPOSITION_SCHEMA)
    return store.dispose(chosen[0].seal.workflow_id, frame)


def akin(store: StateStore, chosen: Iterable[Refusal]) -> list[Refusal]:
    """The refusals and those of the same records at every other boundary of the effective state that knows records by the same key.

    A record that one agent refused is missing for those that join with it: it is one record and takes one decision.
    """
    chosen = list(chosen)
    workflows = {refusal.seal.workflow_id for refusal in chosen}
    everywhere = [refusal for workflow in sorted(workflows) for refusal in refusals(store, workflow)]
    meant = {(r.seal.workflow_id, r.seal.key, r.key) for r in chosen if r.key is not None}
    own = {(r.seal.reference, r.key, r.digest) for r in chosen}
    doubled = {(r.seal.reference, r.key) for r in chosen}
    return [
        r
        for r in everywhere
        if (r.seal.reference, r.key, r.digest) in own
        or ((r.seal.workflow_id, r.seal.key, r.key) in meant and (r.seal.reference, r.key) not in doubled)
    ]


def _refusals(store: StateStore, seal: Seal, current: Seal | None, decisions: Sequence[Mapping[str, Any]]) -> Iterable[Refusal]:
    otherwise: Status = "open" if seal == current else "superseded" if current and current.version > seal.version else "unfinished"
    personal = seal.key is not None and is_personal(fields_of(seal).get(seal.key))
    for row in store.quarantine(seal).drop("values", "attempt").iter_rows(named=True):
        standing = _standing(seal, row, decisions)
        values = json.loads(row["masked"])
        hidden = personal or values.get(str(seal.key)) == MASK
        yield Refusal(
            seal,
            key=row["record"],
            record=row["record"] if row["record"] is None or not hidden else MASK,
            side=row["side"],
            upstream=row["upstream"],
            rules=tuple(row["rules"]),
            values=values,
            digest=row["digest"],
            status=standing["verdict"] if standing else otherwise,
            **({name: standing[name] for name in ("why", "by", "at")} if standing else {}),
        )


def _decisions(store: StateStore, seals: Sequence[Seal], as_of: When | None) -> list[dict[str, Any]]:
    """What was decided, without what came to nothing: records that came in again in an attempt that was ended wait as before."""
    if not any(seal.kind == "disposition" for seal in seals):
        return []
    fenced = {seal.attempt for seal in seals if seal.kind == "fence"}
    gone = {seal.version for seal in seals if seal.kind == "entry" and seal.attempt in fenced}
    return [one for one in store.dispositions(seals[0].workflow_id, as_of=as_of).to_dicts() if one["entry"] not in gone]


def _standing(seal: Seal, row: Mapping[str, Any], decisions: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The decision that holds for a refusal. A discard holds for the same refusal in later versions too: running again reopens nothing."""
    standing = None
    for decision in decisions:
        if (decision["agent"], decision["record"], decision["digest"]) != (seal.agent, row["record"], row["digest"]):
            continue
        if decision["version"] <= seal.version:
            standing = decision
    if standing is not None and standing["verdict"] == "resubmitted" and standing["version"] != seal.version:
        return None  # it came again and was refused again
    return standing


def accounts(store: StateStore, seal: Seal, *, as_of: When | None = None) -> Account:
    """Recounts one boundary from what is stored: the keys of the parents' snapshots, its own, those set aside and deferred.

    The counters that the boundary itself wrote are compared, not trusted. What a parent deferred came in too: it is carried on. What came
    in to an entry is what it sealed and quarantined; there it is about records that are in both, or twice. `as_of`: by what had been
    decided then. Raises `TamperedError` when a snapshot is not what was sealed, `UnknownVersionError` for a version whose records have no
    key, or not the one of its parents: nothing tells there what became of which.
    """
    parents = [store.seal_at(parent.workflow_id, parent.version) for parent in seal.parents]
    if seal.key is None or (parents and seal.key not in [parent.key for parent in parents]):
        raise UnknownVersionError(f"{seal.reference} does not account for its parents' records one by one", workflow=seal.workflow_id)
    sealed, found = _keys(store, seal), refusals_of(store, seal, as_of=as_of)
    aside = pl.Series("record", [refusal.key for refusal in found], dtype=pl.String)
    deferred = store.deferred(seal)["record"]
    discarded, waiting = _by_decision(found, single=not parents)
    read = [keys for parent in parents if parent.key for keys in (_keys(store, parent), store.deferred(parent)["record"])]
    came_in = pl.concat(read).unique() if parents else pl.concat([sealed, aside, deferred])
    placed = pl.concat([keys.unique() for keys in (sealed, aside, deferred)])
    wrong: dict[Wrong, pl.Series] = {
        "neither": _without(came_in, placed),
        "both": placed.drop_nulls().filter(placed.drop_nulls().is_duplicated()).unique(),
        "doubled": sealed.filter(sealed.is_duplicated()).unique(),
        "never_came_in": _without(placed, came_in),
    }
    return Account(
        seal,
        came_in=came_in.len(),
        sealed=sealed.len(),
        quarantined=waiting,
        discarded=discarded,
        deferred=deferred.len(),
        wrong={kind: tuple(_named(seal, keys)) for kind, keys in wrong.items() if keys.len()},
        wrong_counts={kind: keys.len() for kind, keys in wrong.items() if keys.len()},
    )


def _keys(store: StateStore, seal: Seal) -> pl.Series:
    return store.read(seal).select(pl.col(str(seal.key)).cast(pl.String).alias("record")).collect(engine="streaming").to_series()


def _without(keys: pl.Series, others: pl.Series) -> pl.Series:
    return keys.to_frame().join(others.to_frame(), on="record", how="anti", nulls_equal=True).to_series().unique()


def _by_decision(found: Sequence[Refusal], *, single: bool) -> tuple[int, int]:
    """How many records were discarded, and how many wait. Of an entry each refusal is a record (`single`), elsewhere those of one key."""
    statuses: dict[Any, set[Status]] = {}
    for place, refusal in enumerate(found):
        statuses.setdefault(place if single else refusal.key, set()).add(refusal.status)
    discarded = sum(status == {"discarded"} for status in statuses.values())
    return discarded, len(statuses) - discarded


def _named(seal: Seal, keys: pl.Series) -> Iterable[str | None]:
    personal = is_personal(fields_of(seal).get(str(seal.key)))
    return (MASK if personal and key is not None else key for key in keys.sort().head(_NAMED))
