"""The rules of a contract as polars expressions, with pydantic's meaning.

Each rule is one boolean expression that is true on the rows that break it; null and false both mean that the row keeps it. A rule says
nothing about null (but "not null"), as pydantic says nothing about None inside Optional.
"""

from __future__ import annotations

import datetime as dt
import decimal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import polars as pl

from dagster_mao.contract._types import Field, Type, spell
from dagster_mao.contract._values import KEYS_UNIQUE, MICROSECOND, SORTED, fits_64_bits

UNIQUE = "unique"
CALENDAR = ": year 1 to 9999"
# What pydantic takes for a UUID in text: plain or hyphenated in either case, braced, or as a URN.
_HYPHENATED = "[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}"
UUID_TEXT = rf"\A(?:[0-9a-fA-F]{{32}}|{_HYPHENATED}|\{{{_HYPHENATED}\}}|urn:uuid:{_HYPHENATED})\z"


@dataclass(frozen=True)
class Rule:
    """One rule: its name ("score: ge 300"), the column it is about, and the expression that is true where a row breaks it."""

    name: str
    field: str
    broken: pl.Expr


def rules_of(field: Field, decided: bool) -> Iterator[Rule]:
    """The rules of a top-level field. If polars cannot decide it, pydantic judges it, and only what Python cannot even read is a rule."""
    for name, broken in _broken(field.type, pl.col(field.name), field.name):
        if decided or name.endswith(CALENDAR):
            yield Rule(name, field.name, broken)


def _broken(node: Type, value: pl.Expr, path: str, parent: pl.Expr | None = None) -> Iterator[tuple[str, pl.Expr]]:
    if not node.nullable:
        # The member of a struct that is null is null too, and that is not its fault.
        yield f"{path}: not null", value.is_null() if parent is None else parent.is_not_null() & value.is_null()
    for name, limit in node.constraints.items() if node.exact else ():
        if (compiler := _CONSTRAINTS.get(name)) is not None and (broken := compiler(value, limit, node)) is not None:
            yield f"{path}: {spell(name, limit)}", broken
    if (natural := _NATURAL.get(node.name)) is not None:
        yield f"{path}: {natural[0]}", natural[1](value)
    for member in node.fields:
        yield from _broken(member.type, value.struct.field(member.name), f"{path}.{member.name}", value)
    if node.item is not None:
        for name, broken in _broken(node.item, pl.element(), f"{path}[]"):
            yield name, value.list.eval(broken).list.any()


# --- one function per constraint: (value, limit, type) -> where it is broken, None where it never is --------------------------------------

Compiler = Callable[[pl.Expr, Any, Type], "pl.Expr | None"]


def _literal(limit: Any, node: Type) -> pl.Expr:
    if node.name == "float":
        return pl.lit(float(limit), dtype=pl.Float64)
    if node.name == "timedelta":
        return pl.lit(limit // MICROSECOND, dtype=pl.Int64)
    return pl.lit(limit, dtype=node.dtype)


def _bound(keeps: Callable[[pl.Expr, pl.Expr], pl.Expr]) -> Compiler:
    def compile_bound(value: pl.Expr, limit: Any, node: Type) -> pl.Expr | None:
        if node.dtype == pl.Int64() and not fits_64_bits(limit // MICROSECOND if node.name == "timedelta" else limit):
            return None  # beyond all that a column holds, on the harmless side: the other side was refused at definition
        broken = ~keeps(value, _literal(limit, node))
        # NaN is above every number for polars; to pydantic, as to IEEE, it keeps no bound.
        return broken | value.is_nan() if node.name == "float" else broken

    return compile_bound


def _multiple_of(value: pl.Expr, limit: Any, node: Type) -> pl.Expr | None:
    return value % limit != 0 if fits_64_bits(limit) else value != 0


def _length(value: pl.Expr, node: Type) -> pl.Expr:
    if node.name == "str":
        return value.str.len_chars()
    return value.bin.size() if node.name == "bytes" else value.list.len()


def _min_length(value: pl.Expr, limit: Any, node: Type) -> pl.Expr | None:
    return _length(value, node) < limit if limit > 0 else None


def _max_length(value: pl.Expr, limit: Any, node: Type) -> pl.Expr | None:
    return _length(value, node) > limit if limit < 2**32 else None


def _pattern(value: pl.Expr, limit: Any, node: Type) -> pl.Expr | None:
    return ~value.str.contains(limit)


def _one_of(value: pl.Expr, limit: Any, node: Type) -> pl.Expr | None:
    return ~value.is_in(pl.Series(limit, dtype=node.dtype).implode())


def _finite(value: pl.Expr, limit: Any, node: Type) -> pl.Expr | None:
    return ~value.is_finite()


def _max_digits(value: pl.Expr, limit: Any, node: Type) -> pl.Expr | None:
    whole = limit - node.constraints["decimal_places"]
    if whole >= 38 - node.constraints["decimal_places"]:
        return None  # the column has no more digits than that
    limit_value = pl.lit(decimal.Decimal(10) ** whole, dtype=node.dtype)
    return (value >= limit_value) | (value <= -limit_value)


_CONSTRAINTS: dict[str, Compiler] = {
    "gt": _bound(lambda value, limit: value > limit),
    "ge": _bound(lambda value, limit: value >= limit),
    "lt": _bound(lambda value, limit: value < limit),
    "le": _bound(lambda value, limit: value <= limit),
    "multiple_of": _multiple_of,
    "min_length": _min_length,
    "max_length": _max_length,
    "pattern": _pattern,
    "one_of": _one_of,
    "finite": _finite,
    "max_digits": _max_digits,
}


# What Python's type demands although nobody wrote it down: polars' calendar is longer than Python's, and a UUID is text in the column.
def _outside_calendar(value: pl.Expr) -> pl.Expr:
    return (value.dt.year() < dt.MINYEAR) | (value.dt.year() > dt.MAXYEAR)


def _unsorted(value: pl.Expr) -> pl.Expr:
    item = pl.element()
    late_null = item.is_null() & (pl.int_range(pl.len()) > 0)
    return value.list.eval(late_null | (item <= item.shift(1)).fill_null(False)).list.any()


def _doubled_keys(value: pl.Expr) -> pl.Expr:
    return value.list.eval(pl.element().struct.field("key").is_duplicated()).list.any()


_NATURAL: dict[str, tuple[str, Callable[[pl.Expr], pl.Expr]]] = {
    "date": (CALENDAR[2:], _outside_calendar),
    "datetime": (CALENDAR[2:], _outside_calendar),
    "set": (SORTED, _unsorted),
    "dict": (KEYS_UNIQUE, _doubled_keys),
    "uuid": ("uuid", lambda value: ~value.str.contains(UUID_TEXT)),
}
