"""History: state versions, their facts and their records."""

from __future__ import annotations

import datetime as dt
import difflib
import json
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import polars as pl

from dagster_mao.errors import UnknownVersionError
from dagster_mao.review.masking import masked
from dagster_mao.state import When, effective, is_moment, moment, there
from dagster_mao.state.seal import Seal
from dagster_mao.state.store import StateStore

# What programs may rely on, in this order; everything else that a seal says follows.
_FACTS = (
    "workflow_id",
    "version",
    "kind",
    "agent",
    "attempt",
    "epoch",
    "parents",
    "digest",
    "seal_digest",
    "previous_digest",
    "row_count",
    "quarantined",
    "contract",
    "agent_version",
    "config",
    "run_id",
    "sealed_at",
    "table",
    "uri",
)
_REFERENCE = re.compile(r"(.*)@(\d*)", re.DOTALL)


def facts(seal: Seal) -> dict[str, Any]:
    """Everything a seal says except the description of its contract, JSON-able; of `usage` and `policy`, what their JSON says."""
    row = seal.model_dump(mode="json", exclude={"contract_schema"})
    row |= {name: json.loads(told) for name in ("usage", "policy") if (told := row[name])}
    return {name: row.pop(name) for name in _FACTS} | row


def history(store: StateStore, workflow: str | None = None, *, as_of: When | None = None) -> list[Seal]:
    """The seals of one workflow by version, or of all workflows in the order they were sealed; `as_of`: those that were there then.

    Raises `UnknownVersionError` for a workflow that has none.
    """
    if workflow is not None:
        seals = known(store, workflow)
        return seals if as_of is None else there(seals, as_of, workflow=workflow)
    rows = store.collect(store.log().sort("sealed_at", "workflow_id", "version"))
    found = [Seal.model_validate(row) for row in rows.iter_rows(named=True)]
    if as_of is None:
        return found
    chains = groupby(sorted(found, key=lambda seal: (seal.workflow_id, seal.version)), lambda seal: seal.workflow_id)
    left = {seal.reference for name, chain in chains for seal in there(list(chain), as_of, workflow=name)}
    return [seal for seal in found if seal.reference in left]


class _Sealed(NamedTuple):
    """What of a seal tells whether it is effective."""

    workflow_id: str
    version: int
    kind: str
    agent: str
    attempt: str
    plan: list[str]
    sealed_at: dt.datetime


def as_of(store: StateStore, name: str, when: dt.datetime | None = None) -> dict[str, dict[str, Seal]]:
    """What was effective at a moment, by workflow, then by agent: of a pipeline, all workflows that had something effective then; of one
    workflow (`<pipeline>/<key>`), it alone. Without a moment: what is effective now.

    What came later does not count: a version that replaced another since, a fence or a compensation neither. Which versions were there at
    a moment, `state.there` says. Raises `UnknownVersionError` when there is no such pipeline or workflow, or the moment is none.
    """
    if "/" in name:
        known(store, name)
        return {name: store.effective(name, as_of=when)}
    rows = [_Sealed(*row) for row in store.columns(name, *_Sealed._fields).sort("workflow_id", "version").iter_rows()]
    if not rows:
        raise UnknownVersionError(f"There is no pipeline {name!r} in this store", fix="`dagster-mao history` lists what there is")
    chains = ((workflow, list(chain)) for workflow, chain in groupby(rows, lambda row: row.workflow_id))
    states = {workflow: effective(chain if when is None else there(chain, when)) for workflow, chain in chains}
    seals = store.seals_at((row.workflow_id, row.version) for state in states.values() for row in state.values())
    return {workflow: {agent: seals[workflow, row.version] for agent, row in state.items()} for workflow, state in states.items() if state}


def chosen(store: StateStore, workflow: str, when: When | None = None, agent: str | None = None) -> list[Seal]:
    """The one version that `when` numbers; else what is effective, now or at that moment, by all agents or by one, in the order of sealing.

    Raises `UnknownVersionError` when the version is another agent's, or there is nothing by the agent.
    """
    if isinstance(when, int):
        seal = store.seal_at(workflow, when)
        if agent not in (None, seal.agent):
            raise UnknownVersionError(f"Version {when} is by {seal.agent or 'nobody'}, not by {agent}", workflow=workflow)
        return [seal]
    state = store.effective(workflow, as_of=when)
    if agent is not None:
        if agent not in state:
            had = ", ".join(state) or "nothing: no attempt had completed"
            raise UnknownVersionError(
                "The effective state has no version by this agent",
                agent=agent,
                workflow=workflow,
                fix=f"it has {had}" if when is None else f"at that moment it had {had}",
            )
        return [state[agent]]
    return sorted(state.values(), key=lambda seal: seal.version)


def sealed(store: StateStore, reference: str, *, agent: str | None = None) -> Seal:
    """The version that is meant by `workflow@n`; or, of one agent, what is effective in `workflow`, or was in `workflow@2026-03-03T12:00Z`.

    Raises `UnknownVersionError` where that is not one version.
    """
    found = chosen(store, *resolve(store, reference), agent)
    if len(found) != 1:
        there_is = ", ".join(seal.agent for seal in found) or "nothing: no attempt had completed"
        raise UnknownVersionError(f"{reference!r} is not one version", fix=f"write WORKFLOW@N, or name one agent; it has {there_is}")
    return found[0]


def parse_reference(text: str) -> tuple[str, When | None]:
    """`workflow@3` as ("workflow", 3), `workflow@2026-03-03T12:00Z` with that moment, `workflow` as ("workflow", None).

    The last `@` counts; a bare one at the end says "no version". Raises `UnknownVersionError` for a moment that lacks its time or its zone.
    """
    if match := _REFERENCE.fullmatch(text):
        return match[1], int(match[2]) if match[2] else None
    workflow, _, last = text.rpartition("@")
    return (workflow, moment(last)) if workflow and is_moment(last) else (text, None)


def resolve(store: StateStore, text: str) -> tuple[str, When | None]:
    """As `parse_reference`, except that the whole text is a workflow where only that makes sense: names may end like a version.

    Raises `UnknownVersionError` when there is no such workflow.
    """
    try:
        workflow, when = parse_reference(text)
    except UnknownVersionError:
        if not store.seals(text):
            raise
        return text, None
    if when is not None and not store.seals(workflow) and store.seals(text):
        return text, None
    known(store, workflow)
    return workflow, when


def known(store: StateStore, workflow: str) -> list[Seal]:
    """The seals of a workflow that has some. Raises `UnknownVersionError`, which names workflows that are spelled alike."""
    seals = store.seals(workflow)
    if seals:
        return seals
    alike = difflib.get_close_matches(workflow, store.workflows(), n=3)
    fix = f"did you mean {' or '.join(map(repr, alike))}?" if alike else "`dagster-mao history` lists what there is"
    raise UnknownVersionError("There is no such workflow in this store", workflow=workflow, fix=fix)


def records(
    store: StateStore, seal: Seal, *, key: str | None = None, limit: int | None = None, unmask: bool = False
) -> list[dict[str, Any]]:
    """Rows of a state version, masked: all, the first `limit`, or those whose key reads as `key`.

    `unmask` shows personal fields as they are: to be recorded as a disclosure before.

    Raises `TamperedError` when the snapshot is not what was sealed. A version without rows of its own (a fence) has none.
    """
    if not seal.path:
        return []
    frame = store.read(seal)
    if key is not None:
        if seal.key is None:
            return []
        frame = frame.filter(pl.col(seal.key).cast(pl.String) == key)
    if limit is not None:
        frame = frame.head(limit)
    rows = frame.collect(engine="streaming").iter_rows(named=True)
    return list(rows) if unmask else [masked(seal, row) for row in rows]


def with_record(store: StateStore, seals: Sequence[Seal], key: str) -> list[tuple[Seal, list[dict[str, Any]]]]:
    """Of these versions, the ones that hold a record of this key, each with its rows. Raises `UnknownVersionError` when none does."""
    found = [(seal, rows) for seal in seals if (rows := records(store, seal, key=key))]
    if found:
        return found
    where = seals[0].reference if len(seals) == 1 else f"{len(seals)} versions"
    workflow = seals[0].workflow_id if seals else None
    if not any(seal.key for seal in seals):
        raise UnknownVersionError(f"No contract in {where} has a key to find a record by", workflow=workflow)
    raise UnknownVersionError(f"No record with this key in {where}", workflow=workflow, fix="keys are compared as text, in full")
