"""Diff: two state versions record by record, on the key, and what else was different when they were made."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl

from dagster_mao.contract import Change as ContractChange
from dagster_mao.errors import MaoError
from dagster_mao.review.contract import contract_changes
from dagster_mao.review.masking import MASK, fields_of, hide, is_personal
from dagster_mao.state.seal import Seal
from dagster_mao.state.store import StateStore

Change = Literal["added", "removed", "changed"]

# What can explain a difference. Digests, runs and times differ between any two versions and explain nothing.
_CIRCUMSTANCES = (
    "pipeline",
    "agent",
    "kind",
    "agent_version",
    "model",
    "config",
    "contract",
    "contract_version",
    "contract_hash",
    "attempt",
    "epoch",
    "seed",
    "library_version",
)


@dataclass(frozen=True)
class RecordDifference:
    """One record that is not the same on both sides: `fields` maps each field that differs to its two values, masked.

    `key` is the record's key (masked if personal; None without one). For an added or removed record `fields` is empty.
    """

    key: Any
    change: Change
    fields: Mapping[str, tuple[Any, Any]]


@dataclass(frozen=True)
class Difference:
    """From `left` to `right`. The counts are of all records; `records` are the first of those that differ, by key.

    `contract` is what changed in the agent's contract; two agents' contracts are not versions of each other, and it is empty.
    """

    left: Seal
    right: Seal
    key: str | None
    added: int
    removed: int
    changed: int
    same: int
    by_field: Mapping[str, int]
    columns: tuple[tuple[str, Change], ...]
    circumstances: Mapping[str, tuple[Any, Any]]
    contract: tuple[ContractChange, ...]
    records: tuple[RecordDifference, ...]

    @property
    def equal(self) -> bool:
        """Whether both versions hold the same records with the same fields, however they came to be."""
        return not (self.added or self.removed or self.changed or self.columns)


def diff(store: StateStore, left: Seal, right: Seal, *, limit: int | None = None) -> Difference:
    """Compares the rows of two versions, by key; without keys, row by row.

    `limit` bounds the records that are listed, not those that are compared. NaN equals NaN here, and null equals null. Raises
    `TamperedError` when a snapshot is not what was sealed, `MaoError` when the two cannot be compared (different key fields, no snapshot).
    """
    return compared(left, right, store.read, store.read, limit=limit)


def compared(
    left: Seal,
    right: Seal,
    read_left: Callable[[Seal], pl.LazyFrame],
    read_right: Callable[[Seal], pl.LazyFrame],
    *,
    limit: int | None = None,
) -> Difference:
    """`diff`, of versions that are read from different places."""
    key = _common_key(left, right)
    sides = [_numbered(read(seal), key) for seal, read in ((left, read_left), (right, read_right))]
    schemas = [side.collect_schema() for side in sides]
    shared = [name for name in schemas[0] if name in schemas[1] and name != _KEY]
    joined = _joined(sides[0], sides[1], schemas[0], schemas[1], shared)
    counts = (
        joined.select(
            *(pl.col("change").eq(change).sum().alias(change) for change in ("added", "removed", "changed", "same")),
            *(pl.col(f"d{i}").sum().alias(f"d{i}") for i in range(len(shared))),
        )
        .collect(engine="streaming")
        .row(0, named=True)
    )
    listed = joined.filter(pl.col("change") != "same").sort(_KEY)
    rows = (listed if limit is None else listed.head(limit)).collect(engine="streaming")
    return Difference(
        left=left,
        right=right,
        key=key,
        **{change: int(counts[change]) for change in ("added", "removed", "changed", "same")},
        by_field={name: int(counts[f"d{i}"]) for i, name in enumerate(shared) if counts[f"d{i}"]},
        columns=_columns(schemas[0], schemas[1]),
        circumstances=_circumstances(left, right),
        contract=contract_changes(left, right) if left.agent == right.agent else (),
        records=tuple(_record(row, key, shared, left, right) for row in rows.iter_rows(named=True)),
    )


_KEY = ".key"  # no field of a pydantic model can have a dot in its name


def _common_key(left: Seal, right: Seal) -> str | None:
    for seal in (left, right):
        if not seal.path:
            raise MaoError(f"{seal.reference} is a {seal.kind} and has no records", workflow=seal.workflow_id)
    if left.key != right.key:
        raise MaoError(
            f"{left.reference} is keyed by {left.key or 'nothing'}, {right.reference} by {right.key or 'nothing'}",
            fix="compare versions whose contracts have the same key field",
        )
    return left.key


def _numbered(frame: pl.LazyFrame, key: str | None) -> pl.LazyFrame:
    return frame.with_row_index(_KEY) if key is None else frame.rename({key: _KEY})


def _joined(left: pl.LazyFrame, right: pl.LazyFrame, lefts: pl.Schema, rights: pl.Schema, shared: list[str]) -> pl.LazyFrame:
    """One row per key of either side: `change`, per shared field i its values `l{i}` and `r{i}` and whether they differ, `d{i}`."""
    if lefts[_KEY] != rights[_KEY]:
        left, right = (side.with_columns(pl.col(_KEY).cast(pl.String)) for side in (left, right))
    sides = [
        side.select(_KEY, pl.lit(True).alias(mark), *(pl.col(name).alias(f"{mark}{i}") for i, name in enumerate(shared)))
        for side, mark in ((left, "l"), (right, "r"))
    ]
    differs = [_differs(i, lefts[name], rights[name]).alias(f"d{i}") for i, name in enumerate(shared)]
    change = (
        pl.when(pl.col("l").is_null())
        .then(pl.lit("added"))
        .when(pl.col("r").is_null())
        .then(pl.lit("removed"))
        .when(pl.any_horizontal([pl.col(f"d{i}") for i in range(len(shared))] or [pl.lit(False)]))
        .then(pl.lit("changed"))
        .otherwise(pl.lit("same"))
    )
    return sides[0].join(sides[1], on=_KEY, how="full", coalesce=True).with_columns(differs).with_columns(change.alias("change"))


def _differs(i: int, left: pl.DataType, right: pl.DataType) -> pl.Expr:
    both = pl.col("l").is_not_null() & pl.col("r").is_not_null()
    comparable = left == right or (left.is_numeric() and right.is_numeric())
    return both & pl.col(f"l{i}").ne_missing(pl.col(f"r{i}")) if comparable else both


def _columns(left: pl.Schema, right: pl.Schema) -> tuple[tuple[str, Change], ...]:
    gone: list[tuple[str, Change]] = [(name, "removed") for name in left if name not in right]
    new: list[tuple[str, Change]] = [(name, "added") for name in right if name not in left]
    retyped: list[tuple[str, Change]] = [(name, "changed") for name in left if name in right and left[name] != right[name]]
    return (*gone, *new, *retyped)


def _circumstances(left: Seal, right: Seal) -> dict[str, tuple[Any, Any]]:
    told = {name: (getattr(left, name), getattr(right, name)) for name in _CIRCUMSTANCES}
    parents = [
        {parent.agent: (f"{parent.workflow_id}@{parent.version}", parent.digest) for parent in seal.parents} for seal in (left, right)
    ]
    for agent in sorted(parents[0].keys() | parents[1].keys()):
        before, after = (side.get(agent) for side in parents)
        told[f"parent {agent}"] = (before and before[0], after and after[0])
        if before and after and before[1] != after[1]:
            told[f"content of parent {agent}"] = (before[1], after[1])
    return {name: values for name, values in told.items() if values[0] != values[1]}


def _record(row: Mapping[str, Any], key: str | None, shared: list[str], left: Seal, right: Seal) -> RecordDifference:
    described = fields_of(left), fields_of(right)

    def shown(name: str, value: Any) -> Any:
        # What either side's contract calls personal is masked on both.
        if any(is_personal(fields.get(name)) for fields in described):
            return MASK
        return hide(described[1].get(name), hide(described[0].get(name), value))

    changed = [(name, i) for i, name in enumerate(shared) if row["change"] == "changed" and row[f"d{i}"]]
    return RecordDifference(
        key=None if key is None else shown(key, row[_KEY]),
        change=row["change"],
        fields={name: (shown(name, row[f"l{i}"]), shown(name, row[f"r{i}"])) for name, i in changed},
    )
