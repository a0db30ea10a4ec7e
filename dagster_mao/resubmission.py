"""Resubmitting quarantined records: corrected, they re-enter their workflow as a new version of its entry."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import polars as pl
from pydantic import BaseModel

from dagster_mao.boundary import Check, run_agent
from dagster_mao.contract import MASK, Contract, field_of
from dagster_mao.errors import BatchRefusedError, InvalidRecordsError, StaleStateError, UnknownVersionError
from dagster_mao.pipeline import Pipeline
from dagster_mao.review.quarantine import Refusal, akin, decide, refusals
from dagster_mao.state import QUARANTINE_SCHEMA, Seal, StateStore, effective


@dataclass(frozen=True)
class Resubmission:
    """What a resubmission sealed: the new `entry`, and the `decision` that says which refusals it answers.

    `agents` are to be materialised again, in this order, before the records are decided; in choreography and hybrid mode they start by
    themselves. `checks` are those of the entry's boundary.
    """

    entry: Seal
    decision: Seal
    answered: tuple[Refusal, ...]
    agents: tuple[str, ...]
    checks: tuple[Check, ...]


def resubmit(
    pipeline: Pipeline,
    store: StateStore,
    workflow: str,
    corrections: Mapping[str, Mapping[str, Any]],
    *,
    why: str = "corrected",
    by: str = "",
) -> Resubmission:
    """Seals a new entry of the workflow: the effective one, with quarantined records corrected; what else is in quarantine stays there.

    In hybrid mode it begins an attempt of all agents, which counts once they have sealed it, and is undone, the correction with it, where
    one fails: the records wait to be decided on again then. So it starts from the last entry, whether that counts already or not.

    `corrections` maps the key of each record (or at least eight digits of its digest) to the fields to change. A record that was
    quarantined at the entry starts from what came in, one quarantined further down from its row in the entry. Where several records
    came in under one key, naming the key replaces them all, so that every field is to be given.

    Raises, with nothing sealed: `UnknownVersionError` for a record that is not in quarantine, `BatchRefusedError` for one that still breaks
    the entry's contract, `InvalidRecordsError` for a field that the contract does not have, `StaleStateError` when somebody else sealed an
    entry meanwhile. The agents below are not run: materialise them, without the entry, unless they start by themselves.
    """
    entry = _entry(pipeline, store, workflow)
    open_ones = refusals(store, workflow)
    named = {name: _named(open_ones, entry, name) for name in corrections}
    aside = store.quarantine(entry).with_row_index("at")
    rows = pipeline.entry.output.upgrade(store.read(entry), json.loads(entry.contract_schema))
    corrected, settled, replaced = list[BaseModel](), set[int](), set[str]()
    for name, changes in corrections.items():
        mine = [row for row in aside.iter_rows(named=True) if _is_of(row, named[name])]
        base = _base(pipeline.entry.output, rows, mine, named[name][0], entry)
        corrected.append(_corrected(pipeline.entry.output, base, changes, named[name][0]))
        settled |= {row["at"] for row in mine}
        replaced |= {str(named[name][0].key)} if not mine else set()
    key = str(entry.key)
    remaining = aside.filter(~pl.col("at").is_in(sorted(settled))).select(QUARANTINE_SCHEMA.names())
    kept = rows.filter(~pl.col(key).cast(pl.String).is_in(sorted(replaced)))
    _refuse_doubled(pipeline.entry.output, kept, remaining, corrected)
    answered = akin(store, [refusal for found in named.values() for refusal in found])
    batch = pl.concat([kept, pipeline.entry.output.to_frame(corrected).lazy()])
    outcome = _seal(pipeline, store, entry, batch, remaining)
    decision = decide(store, answered, "resubmitted", why=f"{why}: {outcome.seal.reference}", by=by, entry=outcome.seal)
    below = tuple(name for name in pipeline.order if name != pipeline.entry_name)
    return Resubmission(outcome.seal, decision, tuple(answered), below, outcome.checks)


def _entry(pipeline: Pipeline, store: StateStore, workflow: str) -> Seal:
    """The entry that is corrected."""
    seals = store.seals(workflow)
    state = effective(seals)
    if not workflow.startswith(f"{pipeline.name}/"):
        raise UnknownVersionError(f"It is no workflow of the pipeline {pipeline.name!r}", workflow=workflow)
    if pipeline.entry_name not in state:
        fix = "re-execute the run that failed, or start another; then look at its quarantine"
        raise UnknownVersionError("No attempt at this workflow has completed: there is no entry to correct", workflow=workflow, fix=fix)
    return _last_entry(pipeline, seals)


def _last_entry(pipeline: Pipeline, seals: Sequence[Seal]) -> Seal:
    """The one that counts; in hybrid mode the last one that no fence ended: what is made of it counts when all agents have sealed it."""
    if pipeline.mode != "hybrid":
        return effective(seals)[pipeline.entry_name]
    fenced = {seal.attempt for seal in seals if seal.kind == "fence"}
    return next(seal for seal in reversed(seals) if seal.kind == "entry" and seal.attempt not in fenced)


def _named(found: Sequence[Refusal], entry: Seal, name: str) -> list[Refusal]:
    """The refusals of one record, those at the entry first."""
    mine = sorted((refusal for refusal in found if refusal.is_named(name)), key=lambda refusal: refusal.seal != entry)
    if not mine:
        raise UnknownVersionError(
            "No record by this name is in quarantine in the effective state",
            workflow=entry.workflow_id,
            fix="`dagster-mao quarantine list` shows what is",
        )
    if mine[0].seal.key != entry.key:
        what = f"{mine[0].seal.agent} knows its records by {mine[0].seal.key!r}, the entry by {entry.key!r}"
        raise UnknownVersionError(what, workflow=entry.workflow_id, fix="correct the records of the entry that it was made from")
    return mine


def _is_of(row: Mapping[str, Any], named: Iterable[Refusal]) -> bool:
    """Whether a row of the entry's quarantine is of the record that was named: by its digest that one, by its key all of that key."""
    return any((row["record"], row["digest"]) == (refusal.key, refusal.digest) for refusal in named)


def _base(contract: Contract[Any], rows: pl.LazyFrame, mine: Sequence[Mapping[str, Any]], named: Refusal, entry: Seal) -> dict[str, Any]:
    if len(mine) > 1:
        return {str(contract.key): named.key}
    if mine:
        came_in = json.loads(mine[0]["values"])
        return dict(came_in) if isinstance(came_in, dict) else {}
    row = rows.filter(pl.col(str(contract.key)).cast(pl.String) == named.key).collect()
    if row.is_empty():
        what = f"The record {named.record or named.digest[:12]!r} is not in the last entry, {entry.reference}, which does not count yet"
        fix = "wait until the agents have sealed what they make of it, then look at what is in quarantine"
        raise StaleStateError(what, agent=entry.agent, workflow=entry.workflow_id, fix=fix)
    model = next(contract.from_frame(row))
    return {name: getattr(model, name) for name in contract.schema}


def _corrected(contract: Contract[Any], base: dict[str, Any], changes: Mapping[str, Any], named: Refusal) -> BaseModel:
    """The record with its changes, if it keeps the contract."""
    names = {field: contract.names_of(field) for field in contract.model.model_fields}
    if contract.model.model_config.get("extra") == "forbid":
        base = {name: value for name, value in base.items() if any(name in known for known in names.values())}
    for name, value in changes.items():
        field = next((field for field, known in names.items() if name in known), None)
        if field is None:
            raise InvalidRecordsError(f"{contract.name} has no field {name!r}", field=name, fix=f"it has {', '.join(names)}")
        base = {other: held for other, held in base.items() if other not in names[field]} | {field: value}
    rows, refused = contract.sift_records([base])
    rules = refused[0].rules if refused else [failure.rule for failure in contract.check(rows).failures]
    if rules:
        _refuse(contract, f"The corrected record {named.record or named.digest[:12]!r} breaks {contract.name}: {'; '.join(rules)}", rules)
    model: BaseModel = next(contract.from_frame(rows))
    return model


def _refuse_doubled(contract: Contract[Any], kept: pl.LazyFrame, remaining: pl.DataFrame, corrected: Sequence[BaseModel]) -> None:
    """A corrected record must not have the key of another, sealed or in quarantine: both would be doubled."""
    key = str(contract.key)
    keys = [str(getattr(model, key)) for model in corrected]
    taken = set(kept.filter(pl.col(key).cast(pl.String).is_in(keys)).select(pl.col(key).cast(pl.String)).collect().to_series())
    for place, one in enumerate(keys):
        if one in taken or one in remaining["record"] or one in keys[:place]:
            shown = MASK if key in contract.personal else one
            _refuse(contract, f"Another record of the entry has the key {shown!r} of a corrected one", [f"{key}: unique"])


def _refuse(contract: Contract[Any], what: str, rules: Sequence[str]) -> NoReturn:
    field = field_of(rules[0])
    raise BatchRefusedError(what, field=field if field in contract.schema else None, fix="correct more of it; nothing was sealed")


def _seal(pipeline: Pipeline, store: StateStore, entry: Seal, batch: pl.LazyFrame, remaining: pl.DataFrame) -> Any:
    key, run_id = entry.workflow_id.removeprefix(f"{pipeline.name}/"), uuid.uuid4().hex
    plan = pipeline.plan if pipeline.mode == "hybrid" else (entry.agent,)
    attempt = store.open_attempt(pipeline=pipeline.name, attempt=run_id, run_id=run_id, plan=plan, entry=entry.agent, workflow_key=key)
    if _last_entry(pipeline, store.seals(entry.workflow_id)[: attempt.base + 1]) != entry:
        raise StaleStateError(
            "Another entry was sealed while this one was made",
            agent=entry.agent,
            workflow=entry.workflow_id,
            fix="look at what is in quarantine now, and resubmit what is left",
        )
    return run_agent(store, pipeline.entry, attempt, records=batch, quarantined=remaining, partition_key=key)
