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
from dagster_mao.contract._types import Field, Type, dtype_text, spell
from dagster_mao.contract._values import UndecodableError, decoded
from dagster_mao.contract._verdict import ROW, RULES, RuleFailure, Sifted, Verdict, field_of, shown

if TYPE_CHECKING:
    from dagster_mao.contract._contract import Contract

CHUNK = 20_000  # rows that pydantic sees at a time


@dataclass(frozen=True)
class Judge:
    """pydantic's own verdict, over one field (`field` names it) or over whole records (`field` is None)."""

    field: str | None
    columns: tuple[str, ...]
    decode: Callable[[Any], Any] | None
    validate: Callable[[Any], object]
    fields: tuple[Field, ...]

    def broken(self, batch: pl.DataFrame) -> Iterator[tuple[int, set[tuple[str, str | None]]]]:
        """Each refused row's position in the batch, with the rules it broke and their columns."""
        values = batch[self.field].to_list() if self.field else batch.select(self.columns).iter_rows(named=True)
        for position, value in enumerate(values):
            try:
                self.validate(decoded(value, self.decode, self.field or ""))
            except ValidationError as refused:
                errors = refused.errors(include_url=False)
                yield position, {rule_of(self.fields, e, self.field) for e in errors}
            except UndecodableError as refused:
                yield position, {(f"{refused.path}: {refused.rule}", field_of(refused.path))}
            except Exception as error:
                # A validator may raise anything; whatever it is, the record did not pass. Its text may hold values: tell its kind only.
                yield position, {(f"{self.field or 'record'}: {type(error).__name__}", self.field)}


def check(contract: Contract[Any], frame: pl.LazyFrame | pl.DataFrame, samples: int, exact: bool) -> Verdict:
    """The verdict of `contract` on `frame`; see `Contract.check`."""
    lazy, wrong, found, judges = _first_pass(contract, frame, exact)
    failures = [RuleFailure(rule, column, found.rows) for rule, column in wrong]
    failures += _sampled(contract, lazy, found.broken, samples) + found.doubled_failure(contract, samples)
    if judges and found.rows:
        judged = _judge(contract, lazy, judges, found, samples)
        failures += judged.failures()
        failed = judged.failed_rows
    else:
        failed = _total(lazy, found.spoiled) if found.spoiled else 0
    return Verdict(contract.name, found.rows, found.rows if wrong else failed, tuple(failures))


def sift(contract: Contract[Any], frame: pl.LazyFrame | pl.DataFrame, samples: int, exact: bool) -> Sifted:
    """The records that keep `contract`, and the others with the rules they broke; see `Contract.sift`."""
    lazy, wrong, found, judges = _first_pass(contract, frame, exact, positions=True)
    if wrong:
        return Sifted(check(contract, frame, samples, exact), pl.LazyFrame(schema=contract.schema), _nothing_broken(contract))
    lazy = lazy.select(contract.schema.names())
    judged = _judge(contract, lazy, judges, found, samples) if judges and found.rows else _Judged()
    if found.positions.is_empty() and found.doubled is None and not judged.rules:
        return Sifted(Verdict(contract.name, found.rows, 0), lazy, _nothing_broken(contract))
    rows = _rows_at(lazy, found, judged)
    broken = _rules_broken_by(rows, contract.rules)
    failures = [*_sampled(contract, rows.lazy(), broken, samples), *found.doubled_failure(contract, samples), *judged.failures()]
    # A row belongs to one side or the other by its position: no rule is evaluated twice, and none can answer differently.
    numbered = lazy.with_row_index(ROW).filter(~pl.col(ROW).is_in(rows[ROW].implode()))
    verdict = Verdict(contract.name, found.rows, rows.height, tuple(failures))
    return Sifted(verdict, numbered.drop(ROW), _with_rules(rows, broken, found, judged))


def _first_pass(
    contract: Contract[Any], frame: pl.LazyFrame | pl.DataFrame, exact: bool, positions: bool = False
) -> tuple[pl.LazyFrame, list[tuple[str, str | None]], _Found, list[Judge]]:
    """The frame with its declared types, what is wrong with its columns, what one pass over its rows found, and who judges the rest."""
    lazy = frame.lazy()
    present = lazy.collect_schema()
    sound = {name for name, dtype in contract.schema.items() if name in present and fits(present[name], dtype)}
    lazy = conformed(lazy, present, contract.schema)
    rules = [rule for rule in contract.rules if rule.field in sound]
    found = _count(lazy, rules, contract.key if contract.key in sound else None, positions)
    wrong = schema_failures(contract, present, exact or contract.closed)
    return lazy, wrong, found, [judge for judge in contract.judges if sound.issuperset(judge.columns)]


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

_BROKEN = "\x00broken "


@dataclass(frozen=True)
class _Found:
    """What the pass found: the rules that break, and the keys that occur more than once (`doubled`, with how often).

    Where the `positions` of the rows that break rules were asked for, `broken` has those rules alone that make a row unreadable.
    """

    rows: int
    broken: list[Rule]
    doubled: pl.DataFrame | None
    positions: pl.Series

    @property
    def spoiled(self) -> list[pl.Expr]:
        """Where a row is broken, by any rule or by its key."""
        return [rule.broken for rule in self.broken] + ([] if self.doubled is None else [self.is_doubled])

    @property
    def is_doubled(self) -> pl.Expr:
        assert self.doubled is not None
        keys = self.doubled.to_series()
        return pl.col(keys.name).is_in(keys.implode())

    @property
    def unreadable(self) -> list[Rule]:
        return [rule for rule in self.broken if rule.name.endswith(CALENDAR)]

    def doubled_failure(self, contract: Contract[Any], samples: int) -> list[RuleFailure]:
        if self.doubled is None:
            return []
        key = contract.field(self.doubled.columns[0])
        shown_keys = tuple({key.name: shown(v, key)} for v in self.doubled[key.name].head(samples))
        return [RuleFailure(_unique(key.name), key.name, int(self.doubled[_ROWS].sum()), shown_keys)]


def _count(lazy: pl.LazyFrame, rules: Sequence[Rule], key: str | None, positions: bool) -> _Found:
    """One aggregation: the number of rows, the rules that break (or the rows that break them), and hashes of keys that may be doubled.

    Keys are compared by their sorted 64-bit hashes: where no neighbours are equal, all keys differ. Equal ones prove nothing, and
    `_doubled` looks at their keys themselves. This is the one thing here that grows with the batch, by some 12 bytes a row; a hash set
    takes 45.
    """
    named = [rule for rule in rules if rule.name.endswith(CALENDAR)] if positions else rules
    # A step of their own: `list.eval` under `arg_true` makes polars 2.1 panic, where the engine puts a list's chunks together again.
    lazy = lazy.with_columns(rule.broken.alias(f"{_BROKEN}{rule.name}") for rule in rules)
    columns = [pl.len().alias("rows")] + [pl.col(f"{_BROKEN}{rule.name}").any().alias(f"rule {i}") for i, rule in enumerate(named)]
    if positions and rules:
        columns.append(pl.any_horizontal(f"{_BROKEN}{rule.name}" for rule in rules).arg_true().implode().alias("positions"))
    if key is not None:
        hashes = _hash(pl.col(key).drop_nulls()).sort()
        columns.append(hashes.map_batches(_repeated, return_dtype=pl.List(pl.UInt64), returns_scalar=True).alias("hashes"))
    found = lazy.select(columns).collect(engine="streaming")
    broken = [rule for i, rule in enumerate(named) if found[f"rule {i}"].item()]
    doubled = _doubled(lazy, key, found["hashes"].explode()) if key is not None and found["hashes"].list.len().item() else None
    at = found["positions"].explode().drop_nulls() if "positions" in found.columns else pl.Series([], dtype=pl.get_index_type())
    return _Found(found["rows"].item(), broken, doubled, at.alias(ROW))


def _hash(keys: pl.Expr) -> pl.Expr:
    return keys.hash().cast(pl.UInt64)


def _repeated(hashes: pl.Series) -> pl.Series:
    """Of sorted hashes, those that are equal to the one before. In one function, because as expressions polars would sort them thrice."""
    later = hashes.slice(1)
    repeated: pl.Series = later.filter(later == hashes.slice(0, len(later))).implode()
    return repeated


# --- the passes over a batch that failed -------------------------------------------------------------------------------------------------

_ROWS, _JUDGED = "\x00rows", "\x00judged"


def _unique(key: str) -> str:
    return f"{key}: {UNIQUE}"


def _doubled(lazy: pl.LazyFrame, key: str, hashes: pl.Series) -> pl.DataFrame | None:
    """The keys that occur more than once, and how often. All rows of such a key are suspect: nothing says which one is right."""
    suspect = lazy.select(pl.col(key).drop_nulls()).filter(_hash(pl.col(key)).is_in(hashes.unique().implode()))
    counts = suspect.group_by(key).agg(pl.len().alias(_ROWS)).filter(pl.col(_ROWS) > 1)
    doubled = counts.collect(engine="streaming").sort(key)
    return doubled if doubled.height else None


def _nothing_broken(contract: Contract[Any]) -> pl.DataFrame:
    return pl.DataFrame(schema={**contract.schema, ROW: pl.get_index_type(), RULES: pl.List(pl.String)})


def _rows_at(lazy: pl.LazyFrame, found: _Found, judged: _Judged) -> pl.DataFrame:
    """The rows that break a rule, each with its position in the batch."""
    positions = pl.concat([found.positions, pl.Series(ROW, list(judged.rules), dtype=found.positions.dtype)])
    wanted = pl.col(ROW).is_in(positions.implode())
    chosen = lazy.with_row_index(ROW).filter(wanted if found.doubled is None else wanted | found.is_doubled)
    return chosen.select(pl.exclude(ROW), ROW).collect(engine="streaming")


def _rules_broken_by(rows: pl.DataFrame, rules: Sequence[Rule]) -> list[Rule]:
    broken = rows.select(rule.broken.any().alias(str(i)) for i, rule in enumerate(rules)).row(0) if rules else ()
    return [rule for rule, is_broken in zip(rules, broken, strict=True) if is_broken]


def _with_rules(rows: pl.DataFrame, broken: Sequence[Rule], found: _Found, judged: _Judged) -> pl.DataFrame:
    """The rows, each with the names of the rules that it breaks, in order."""
    by_name = {rule.name: rule.broken for rule in broken}
    if found.doubled is not None:
        by_name[_unique(found.doubled.columns[0])] = found.is_doubled
    names = [pl.when(is_broken).then(pl.lit(name)) for name, is_broken in sorted(by_name.items())]
    rules = pl.concat_list(names).list.drop_nulls() if names else pl.lit([], dtype=pl.List(pl.String))
    rows = rows.with_columns(rules.alias(RULES))
    if not judged.rules:
        return rows
    told = pl.DataFrame(
        {ROW: list(judged.rules), _JUDGED: [list(names) for names in judged.rules.values()]},
        schema={ROW: rows.schema[ROW], _JUDGED: pl.List(pl.String)},
    )
    both = pl.concat_list(RULES, pl.col(_JUDGED).fill_null([])).list.unique().list.sort()
    return rows.join(told, on=ROW, how="left", maintain_order="left").with_columns(both.alias(RULES)).drop(_JUDGED)


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


def broken_records(broken: pl.DataFrame) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """What `sift` found broken, record by record, with its rules: Python's values, and text for dates that Python's calendar has not."""
    unreadable = pl.col(RULES).list.eval(pl.element().str.ends_with(CALENDAR)).list.any()
    as_text = [_dates_as_text(pl.col(name), dtype).alias(name) for name, dtype in broken.schema.items()]
    for rows in (broken.filter(~unreadable), broken.filter(unreadable).select(as_text)):
        for row in rows.drop(ROW).iter_rows(named=True):
            yield row, row.pop(RULES)


def _sample(contract: Contract[Any], row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: shown(value, contract.field(name)) for name, value in row.items()}


def _total(lazy: pl.LazyFrame, spoiled: Sequence[pl.Expr]) -> int:
    return int(lazy.select(pl.any_horizontal(spoiled).sum()).collect(engine="streaming").item())


# --- what only pydantic can say -----------------------------------------------------------------------------------------------------------


@dataclass
class _Judged:
    """What the judges have found so far."""

    failed_rows: int = 0
    rules: dict[int, set[str]] = field(default_factory=dict)  # by position
    counts: dict[tuple[str, str | None], int] = field(default_factory=dict)
    samples: dict[tuple[str, str | None], list[dict[str, Any]]] = field(default_factory=dict)

    def failures(self) -> list[RuleFailure]:
        return [RuleFailure(rule, column, n, tuple(self.samples[rule, column])) for (rule, column), n in self.counts.items()]


def _judge(contract: Contract[Any], lazy: pl.LazyFrame, judges: Sequence[Judge], found: _Found, samples: int) -> _Judged:
    judged = _Judged()
    needed = dict.fromkeys(c for judge in judges for c in judge.columns) | dict.fromkeys(
        [contract.key] if contract.key in lazy.collect_schema() else []
    )
    already = (pl.any_horizontal(found.spoiled) if found.spoiled else pl.lit(False)).fill_null(False).alias("\x00broken")
    unreadable = [rule.broken for rule in found.unreadable]
    skipped = (pl.any_horizontal(unreadable) if unreadable else pl.lit(False)).fill_null(False).alias("\x00unreadable")
    start = 0
    for batch in lazy.select(*needed, already, skipped).collect_batches(chunk_size=CHUNK, engine="streaming"):
        positions = (~batch["\x00unreadable"]).arg_true()
        readable = batch[positions] if len(positions) < batch.height else batch
        judged.failed_rows += batch.height - readable.height
        failed = set(readable["\x00broken"].arg_true().to_list())
        for judge in judges:
            for position, rules in judge.broken(readable):
                failed.add(position)
                judged.rules.setdefault(start + positions[position], set()).update(rule for rule, _ in rules)
                _note(contract, judged, readable, position, rules, samples)
        judged.failed_rows += len(failed)
        start += batch.height
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


def rule_of(fields: Sequence[Field], error: Mapping[str, Any], judged: str | None = None) -> tuple[str, str | None]:
    """The rule that a pydantic error is about, and its column. Never its message, nor a key of a dict: they may hold values.

    `judged` is the field that was judged by itself; its errors do not name it.
    """
    path, column, node = _path(fields, (judged, *error["loc"]) if judged else error["loc"])
    name = _SAME_RULE.get(error["type"])
    if error["input"] is None and error["type"] not in {"value_error", "assertion_error"}:
        words = "not null"
    elif name is not None and name in error.get("ctx", {}):
        words = spell(name, (node.constraints if node else {}).get(name, error["ctx"][name]))
    else:
        words = _SAME_WORDS.get(error["type"], error["type"])
    return f"{path or 'record'}: {words}", column


def _path(fields: Sequence[Field], loc: Sequence[int | str]) -> tuple[str, str | None, Type | None]:
    """Where pydantic was: in the names of fields, the column, the type. What else is in `loc` (keys, choices of a union) is left out."""
    path, column = "", None
    node: Type | None = None
    for i, step in enumerate(loc):
        members = fields if column is None else node.fields if node else ()
        member = next((f for f in members if step == f.name), None) or next((f for f in members if step == f.alias), None)
        if member is not None:
            path, node = (f"{path}.{member.name}" if path else member.name), member.type
            column = column or member.name
        elif node is not None and node.name == "dict" and not node.json and node.item is not None:
            part = node.item.fields[0 if loc[i + 1 : i + 2] == ("[key]",) else 1]
            path, node = f"{path}[].{part.name}", part.type
        elif isinstance(step, int) and node is not None and node.item is not None:
            path, node = f"{path}[]", node.item
    return path, column, node
