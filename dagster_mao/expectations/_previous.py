"""What a suite may ask of the version before: values that polars aggregates, under the names that GX's parameters take."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import polars as pl

_BINS = 10


class UnknownParameterError(Exception):
    """There is no such parameter. Its text says why."""


def _number(column: str, dtype: pl.DataType) -> pl.Expr:
    expression = pl.col(column).cast(pl.Float64) if isinstance(dtype, (pl.Decimal, pl.Boolean)) else pl.col(column)
    return expression.drop_nulls().drop_nans() if dtype.is_float() else expression.drop_nulls()


_OF_NUMBERS: dict[str, Callable[[pl.Expr], pl.Expr]] = {
    "mean": pl.Expr.mean,
    "median": pl.Expr.median,
    "stdev": pl.Expr.std,
    "sum": pl.Expr.sum,
    "min": pl.Expr.min,
    "max": pl.Expr.max,
}
_OF_ALL: dict[str, Callable[[pl.Expr], pl.Expr]] = {"unique_value_count": pl.Expr.n_unique}
_ROW_COUNT, _SHARE, _PARTITION = "row_count", "nonnull_share", "partition"

PREVIOUS = (
    f"previous_{_ROW_COUNT}",
    *(f"previous_{name}_<column>" for name in (*_OF_NUMBERS, *_OF_ALL, _SHARE, _PARTITION)),
)
"""The parameters there are."""


@dataclass(frozen=True)
class Previous:
    """One value of the version before. `name` is its parameter, `kind` what it is, `column` of which column ("" of the batch)."""

    name: str
    kind: str
    column: str
    dtype: pl.DataType

    @classmethod
    def of(cls, name: str, schema: Mapping[str, pl.DataType]) -> Previous:
        """The value that a parameter's name stands for. Raises `UnknownParameterError`."""
        if name == f"previous_{_ROW_COUNT}":
            return cls(name, _ROW_COUNT, "", pl.UInt32())
        for kind in (*_OF_NUMBERS, *_OF_ALL, _SHARE, _PARTITION):
            column = name.removeprefix(f"previous_{kind}_")
            if column == name or column not in schema:
                continue
            if kind in _OF_NUMBERS and not (schema[column].is_numeric() or schema[column] == pl.Boolean):
                raise UnknownParameterError(f"{column!r} is no number, but {schema[column]}")
            return cls(name, kind, column, schema[column])
        raise UnknownParameterError("there is no such value, or no such column")

    @property
    def example(self) -> Any:
        """A value of the kind, to try expressions with."""
        return {"values": [], "weights": []} if self.kind == _PARTITION else 1.5

    def expression(self) -> pl.Expr:
        """What polars aggregates, all values of a version in one pass; of a partition it is done apart."""
        if self.kind == _ROW_COUNT:
            return pl.len()
        if self.kind == _SHARE:
            there = pl.col(self.column).is_not_null()
            return (there & pl.col(self.column).is_not_nan() if self.dtype.is_float() else there).mean()
        if self.kind in _OF_ALL:
            return _OF_ALL[self.kind](pl.col(self.column).drop_nulls())
        return _OF_NUMBERS[self.kind](_number(self.column, self.dtype))


def parameters(wanted: Sequence[Previous], batch: pl.LazyFrame) -> dict[str, Any]:
    """The values by parameter; one that the version cannot give (no such column then, an empty batch) is left out."""
    schema = batch.collect_schema()
    there = {one.name: one for one in wanted if not one.column or schema.get(one.column) == one.dtype}
    plain = {name: one.expression().alias(name) for name, one in there.items() if one.kind != _PARTITION}
    found = batch.select(**plain).collect(engine="streaming").row(0, named=True) if plain else {}
    partitions = {name: _partition(batch, one) for name, one in there.items() if one.kind == _PARTITION}
    return {name: value for name, value in {**found, **partitions}.items() if value is not None}


def _partition(batch: pl.LazyFrame, one: Previous) -> dict[str, Any] | None:
    """The distribution of a column as GX's partition object: by bins of equal weight for numbers, else by value."""
    if one.dtype.is_numeric():
        return _by_bins(batch.select(_number(one.column, one.dtype).alias("it")))
    counts = batch.select(it=pl.col(one.column).drop_nulls()).group_by("it").len().sort("it").collect(engine="streaming")
    total = counts["len"].sum()
    return {"values": counts["it"].to_list(), "weights": [count / total for count in counts["len"]]} if total else None


def _by_bins(numbers: pl.LazyFrame) -> dict[str, Any] | None:
    values = numbers.collect()["it"].sort()
    last = len(values) - 1
    edges = sorted({values[last * n // _BINS] for n in range(1, _BINS)}) if len(values) else []
    if len(edges) < 2:
        return None
    # As numpy's histogram counts, which GX takes: a bin has its lower edge, and the last one both.
    upto = [*(int(values.search_sorted(edge, "left")) for edge in edges[:-1]), int(values.search_sorted(edges[-1], "right"))]
    counts = [high - low for low, high in pairwise([0, *upto, len(values)])]
    # Half a count more in each bin: one that was empty by chance must not make the divergence infinite.
    below, *weights, above = [(count + 0.5) / (len(values) + 0.5 * len(counts)) for count in counts]
    return {"bins": [float(edge) for edge in edges], "weights": weights, "tail_weights": [below, above]}
