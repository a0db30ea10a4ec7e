"""History: state versions, their facts and their records."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from typing import Any

import polars as pl

from dagster_mao.errors import UnknownVersionError
from dagster_mao.review.masking import masked
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


def history(store: StateStore, workflow: str | None = None) -> list[Seal]:
    """The seals of one workflow by version, or of all workflows in the order they were sealed.

    Raises `UnknownVersionError` for a workflow that has none.
    """
    if workflow is not None:
        return known(store, workflow)
    rows = store.collect(store.log().sort("sealed_at", "workflow_id", "version"))
    return [Seal.model_validate(row) for row in rows.iter_rows(named=True)]


def parse_reference(text: str) -> tuple[str, int | None]:
    """`workflow@3` as ("workflow", 3), `workflow` as ("workflow", None). The last `@` counts; a bare one at the end says "no version"."""
    match = _REFERENCE.fullmatch(text)
    if match is None:
        return text, None
    return match[1], int(match[2]) if match[2] else None


def resolve(store: StateStore, text: str) -> tuple[str, int | None]:
    """As `parse_reference`, except that the whole text is a workflow where only that makes sense: names may end like a version.

    Raises `UnknownVersionError` when there is no such workflow.
    """
    workflow, version = parse_reference(text)
    if version is not None and not store.seals(workflow) and store.seals(text):
        return text, None
    known(store, workflow)
    return workflow, version


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
