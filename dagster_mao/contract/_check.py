"""Judging a batch.

A batch that keeps its contract is read once, by one streaming aggregation: how many rows, which rules break, how many different keys. Only
a batch that fails is read again, for the counts, the union of the broken rows, the doubled keys and the samples. What polars cannot decide
goes through pydantic, chunk by chunk, on the columns it needs and no more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import polars as pl
from pydantic import ValidationError

from dagster_mao.contract._rules import CALENDAR, UNIQUE, Rule
from dagster_mao.contract._types import dtype_text, spell
from dagster_mao.contract._verdict import RuleFailure, Verdict, shown

if TYPE_CHECKING:
    from dagster_mao.contract._contract import Contract

CHUNK = 20_000  # rows that pydantic sees at a time


@dataclass(frozen=True)
class Judge:
    """pydantic's own verdict, over one field (`field` names it) or over whole records (`field` is None)."""

    field: str | None
    columns: tuple[str, ...]
    validate: Callable[[Any], object]

    def broken(self, batch: pl.DataFrame) -> Iterator[tuple[int, set[tuple[str, str | None]]]]:
        """Each refused row's position in the batch, with the rules it broke and their columns."""
        values = batch[self.field].to_list() if self.field else batch.select(self.columns).iter_rows(named=True)
        for position, value in enumerate(values):
            try:
                self.validate(value)
            except ValidationError as refused:
                errors = refused.errors(include_url=False)
                yield position, {_rule_of(e, self.field) for e in errors}
            except Exception as error:
                # A validator may raise anything; whatever it is, the record did not pass. Its text may hold values: tell its kind only.
                yield position, {(f"{self.field or 'record'}: {type(error).__name__}", self.field)}


def check(contract: Contract[Any], frame: pl.LazyFrame | pl.DataFrame, samples: int, exact: bool) -> Verdict:
    """The verdict of `contract` on `frame`; see `Contract.check`."""
    lazy = frame.lazy()
    present = lazy.collect_schema()
    wrong = schema_failures(contract, present, exact)
    sound = {name for name, dtype in contract.schema.items() if name in present and fits(present[name], dtype)}
    lazy = conformed(lazy, present, contract.schema)
    key = contract.key if contract.key in sound else None
    rules = [rule for rule in contract.rules if rule.field in sound]
    rows, broken, keys_doubled = _count(lazy, rules, key)
    doubled = _doubled(lazy, key) if key is not None and keys_doubled else None

    failures = [RuleFailure(rule, column, rows) for rule, column in wrong]
    failures += _sampled(contract, lazy, broken, samples)
    if doubled is not None and doubled.height:
        failures.append(_unique_failure(contract, doubled, samples))
    spoiled = [rule.broken for rule in broken]
    if doubled is not None and doubled.height:
        spoiled.append(pl.col(doubled.columns[0]).is_in(doubled[doubled.columns[0]].implode()))

    judges = [judge for judge in contract.judges if sound.issuperset(judge.columns)]
    if judges and rows:
        judged = _judge(contract, lazy, judges, spoiled, [r for r in broken if r.name.endswith(CALENDAR)], samples)
        failures += judged.failures()
        failed = judged.failed_rows
    else:
        failed = _total(lazy, spoiled) if spoiled else 0
    return Verdict(contract.name, rows, rows if wrong else failed, tuple(failures))


# --- the columns -----------------------------------------------------------------------------------------------------------------------


def schema_failures(contract: Contract[Any], present: Mapping[str, pl.DataType], exact: bool) -> list[tuple[str, str | None]]:
    """What is wrong with the columns, as (rule, column)."""
    wrong: list[tuple[str, str | None]] = []
    for name, dtype in contract.schema.items():
        if name not in present:
            wrong.append((f"schema: column {name!r} missing", name))
        elif not fits(present[name], dtype) or (present[name] == pl.Null and not contract.field(name).type.nullable):
            wrong.append((f"schema: column {name!r} is {dtype_text(present[name])}, not {dtype_text(dtype)}", name))
    if exact:
        wrong += [(f"schema: unexpected column {name!r}", name) for name in present if name not in contract.schema]
    return wrong


def fits(present: pl.DataType, wanted: pl.DataType) -> bool:
    """Whether a column of one type is one of the other: the same, or one that has nothing but nulls where the other has values."""
    if present in (wanted, pl.Null):
        return True
    if isinstance(present, pl.List) and isinstance(wanted, pl.List):
        return fits(_dtype(present.inner), _dtype(wanted.inner))
    if isinstance(present, pl.Struct) and isinstance(wanted, pl.Struct):
        pairs = zip(present.fields, wanted.fields, strict=False)
        return len(present.fields) == len(wanted.fields) and all(
            p.name == w.name and fits(_dtype(p.dtype), _dtype(w.dtype)) for p, w in pairs
        )
    return False


def _dtype(dtype: Any) -> pl.DataType:
    # polars lets a nested type be named by its class.
    instance: pl.DataType = dtype() if isinstance(dtype, type) else dtype
    return instance


def conformed(lazy: pl.LazyFrame, present: Mapping[str, pl.DataType], schema: Mapping[str, pl.DataType]) -> pl.LazyFrame:
    """The frame with its all-null columns in their declared type: the only cast there is, and it changes no value."""
    casts = [pl.col(n).cast(d) for n, d in schema.items() if n in present and present[n] != d and fits(present[n], d)]
    return lazy.with_columns(casts) if casts else lazy


# --- the pass over all rows --------------------------------------------------------------------------------------------------------------


def _count(lazy: pl.LazyFrame, rules: Sequence[Rule], key: str | None) -> tuple[int, list[Rule], bool]:
    """One aggregation: the number of rows, the rules that break, and whether keys may be doubled.

    Keys are counted by their sorted 64-bit hashes: as many as there are keys proves that they differ. Fewer proves nothing, and `_doubled`
    looks at the keys themselves. This is the one thing here that grows with the batch, by some 12 bytes a row; a hash set takes 45.
    """
    columns = [pl.len().alias("rows")] + [rule.broken.any().alias(f"rule {i}") for i, rule in enumerate(rules)]
    if key is not None:
        columns += [pl.col(key).hash().sort().rle_id().max().alias("last"), pl.col(key).count().alias("keys")]
    found = lazy.select(columns).collect(engine="streaming").row(0, named=True)
    broken = [rule for i, rule in enumerate(rules) if found[f"rule {i}"]]
    if key is None or not found["rows"]:
        return found["rows"], broken, False
    null = int(found["keys"] < found["rows"])  # all nulls have one hash between them
    return found["rows"], broken, found["last"] + 1 < found["keys"] + null


# --- the passes over a batch that failed -------------------------------------------------------------------------------------------------


def _doubled(lazy: pl.LazyFrame, key: str) -> pl.DataFrame:
    """The keys that occur more than once, and how often. All rows of such a key are suspect: nothing says which one is right."""
    counts = lazy.select(pl.col(key).drop_nulls()).group_by(key).agg(pl.len().alias("\x00rows"))
    return counts.filter(pl.col("\x00rows") > 1).collect(engine="streaming").sort(key)


def _unique_failure(contract: Contract[Any], doubled: pl.DataFrame, samples: int) -> RuleFailure:
    key = contract.field(doubled.columns[0])
    shown_keys = tuple({key.name: shown(v, key)} for v in doubled[key.name].head(samples))
    return RuleFailure(f"{key.name}: {UNIQUE}", key.name, int(doubled["\x00rows"].sum()), shown_keys)


def _sampled(contract: Contract[Any], lazy: pl.LazyFrame, broken: Sequence[Rule], samples: int) -> list[RuleFailure]:
    if not broken:
        return []
    counted = lazy.select(rule.broken.sum().alias(str(i)) for i, rule in enumerate(broken))
    sampled = [lazy.filter(rule.broken).select(_readable(contract, rule.field)).head(samples) for rule in broken]
    counts, *rows = pl.collect_all([counted, *sampled], engine="streaming")
    return [
        RuleFailure(rule.name, rule.field, int(counts.item(0, i)), tuple(_sample(contract, row) for row in frame.iter_rows(named=True)))
        for i, (rule, frame) in enumerate(zip(broken, rows, strict=True))
    ]


def _readable(contract: Contract[Any], *names: str | None) -> list[pl.Expr]:
    """The columns of a sample, key first. Dates are read as text: polars' calendar has some that Python's has not."""
    wanted = dict.fromkeys(n for n in (contract.key, *names) if n is not None)
    return [_dates_as_text(pl.col(n), contract.schema[n]).alias(n) for n in wanted]


def _dates_as_text(value: pl.Expr, dtype: Any) -> pl.Expr:
    if isinstance(dtype, (pl.Date, pl.Datetime)):
        return value.cast(pl.String)
    if isinstance(dtype, pl.Struct):
        members = pl.struct(_dates_as_text(value.struct.field(f.name), f.dtype).alias(f.name) for f in dtype.fields)
        return pl.when(value.is_not_null()).then(members)
    if isinstance(dtype, pl.List):
        return value.list.eval(_dates_as_text(pl.element(), dtype.inner))
    return value


def _sample(contract: Contract[Any], row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: shown(value, contract.field(name)) for name, value in row.items()}


def _total(lazy: pl.LazyFrame, spoiled: Sequence[pl.Expr]) -> int:
    return int(lazy.select(pl.any_horizontal(spoiled).sum()).collect(engine="streaming").item())


# --- what only pydantic can say -----------------------------------------------------------------------------------------------------------


@dataclass
class _Judged:
    """What the judges have found so far."""

    failed_rows: int = 0
    counts: dict[tuple[str, str | None], int] = field(default_factory=dict)
    samples: dict[tuple[str, str | None], list[dict[str, Any]]] = field(default_factory=dict)

    def failures(self) -> list[RuleFailure]:
        return [RuleFailure(rule, column, n, tuple(self.samples[rule, column])) for (rule, column), n in self.counts.items()]


def _judge(
    contract: Contract[Any],
    lazy: pl.LazyFrame,
    judges: Sequence[Judge],
    spoiled: Sequence[pl.Expr],
    unreadable: Sequence[Rule],
    samples: int,
) -> _Judged:
    judged = _Judged()
    needed = dict.fromkeys(c for judge in judges for c in judge.columns) | dict.fromkeys(
        [contract.key] if contract.key in lazy.collect_schema() else []
    )
    already = (pl.any_horizontal(spoiled) if spoiled else pl.lit(False)).fill_null(False).alias("\x00broken")
    skipped = (pl.any_horizontal([r.broken for r in unreadable]) if unreadable else pl.lit(False)).fill_null(False)
    query = lazy.select(*needed, already, skipped.alias("\x00unreadable"))
    for batch in query.collect_batches(chunk_size=CHUNK, engine="streaming"):
        readable = batch.filter(~pl.col("\x00unreadable"))
        judged.failed_rows += batch.height - readable.height
        failed = set(readable["\x00broken"].arg_true().to_list())
        for judge in judges:
            for position, rules in judge.broken(readable):
                failed.add(position)
                _note(contract, judged, readable, position, rules, samples)
        judged.failed_rows += len(failed)
    return judged


def _note(
    contract: Contract[Any], judged: _Judged, batch: pl.DataFrame, position: int, rules: set[tuple[str, str | None]], samples: int
) -> None:
    for rule in sorted(rules, key=str):
        judged.counts[rule] = judged.counts.get(rule, 0) + 1
        kept = judged.samples.setdefault(rule, [])
        if len(kept) < samples:
            columns = [n for n in dict.fromkeys((contract.key, rule[1])) if n is not None and n in batch.columns]
            kept.append(_sample(contract, batch.select(columns).row(position, named=True)) if columns else {})


# pydantic's kinds of error and the rule of ours that says the same, so that a rule has one name whoever judges it.
_SAME_RULE = {
    "greater_than": "gt",
    "greater_than_equal": "ge",
    "less_than": "lt",
    "less_than_equal": "le",
    "multiple_of": "multiple_of",
    "string_too_short": "min_length",
    "string_too_long": "max_length",
    "bytes_too_short": "min_length",
    "bytes_too_long": "max_length",
    "too_short": "min_length",
    "too_long": "max_length",
    "string_pattern_mismatch": "pattern",
    "decimal_max_digits": "max_digits",
    "decimal_max_places": "decimal_places",
}
_SAME_WORDS = {"finite_number": "finite", "value_error": "validator", "assertion_error": "validator", "date_past": "in the past"} | {
    "date_future": "in the future",
    "datetime_past": "in the past",
    "datetime_future": "in the future",
}


def _rule_of(error: Mapping[str, Any], column: str | None) -> tuple[str, str | None]:
    """The rule that a pydantic error is about, and its column. Never its message, which may hold values."""
    path = column or ""
    for step in error["loc"]:
        path += "[]" if isinstance(step, int) else (f".{step}" if path else str(step))
    name = _SAME_RULE.get(error["type"])
    if error["input"] is None and error["type"] not in {"value_error", "assertion_error"}:
        words = "not null"
    elif name is not None and name in error.get("ctx", {}):
        words = spell(name, error["ctx"][name])
    else:
        words = _SAME_WORDS.get(error["type"], error["type"])
    return f"{path or 'record'}: {words}", column or (str(error["loc"][0]) if error["loc"] else None)
