"""What an agent declared about its batch, read and checked without great_expectations: names, severities, columns, parameters."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn

import polars as pl

from dagster_mao.contract import Contract
from dagster_mao.errors import WiringError
from dagster_mao.expectations._previous import PREVIOUS, Previous, UnknownParameterError

Severity = Literal["error", "warn"]
_SEVERITIES: dict[str, Severity] = {"critical": "error", "warning": "warn", "info": "warn"}
_ENTRY = ("type", "kwargs", "meta", "severity", "description", "notes", "id", "rendered_content", "expectation_context")
_ENGINE = {"type", "kwargs", "meta", "severity", "description", "notes"}  # what GX needs of an entry to judge by it
_COLUMN_ARGUMENTS = ("column", "column_A", "column_B")
# These ask a database, and the batch is a frame.
_OF_DATABASES = {"unexpected_rows_expectation", "expect_query_results_to_match_comparison", "expect_table_row_count_to_equal_other_table"}
_WORD = re.compile(r"[A-Za-z_]\w*")
_COLUMN = re.compile(r"""col\(\s*["'](.+?)["']\s*\)""")
# What GX's expressions know by themselves.
_EXPRESSION_WORDS = {"sin", "cos", "tan", "exp", "abs", "trunc", "round", "sgn", "now", "datetime", "timedelta", "pi", "e", "PI", "E"}
_TIMEDELTA_WORDS = {"weeks", "days", "hours", "minutes", "seconds", "year", "month", "day", "hour", "minute", "second"}


@dataclass(frozen=True)
class Expectations:
    """A suite, and the columns that polars works out for it from the agent's output.

    `suite` is a list of GX expectations or of dicts (`type`, `kwargs`, `severity`), an `ExpectationSuite`, or the path of a suite file
    relative to the agent's module. `columns` names expressions over the output contract's columns, one scalar per record:
    `{"approved": pl.col("outcome") == "approve", "reasons_count": pl.col("reasons").list.len()}`.
    """

    suite: Any
    columns: Mapping[str, pl.Expr] = field(default_factory=dict)


@dataclass(frozen=True)
class Expectation:
    """One expectation as declared: the name of its check, what to do when it fails, and which columns it looks at.

    `personal` says that a column it looks at, or compares with, is personal: then nothing but counts and shares is shown of it.
    """

    name: str
    type: str
    arguments: Mapping[str, Any]
    severity: Severity
    gx_severity: str
    description: str
    columns: tuple[str, ...]  # those it is about
    conditions: tuple[str, ...]  # those of its row_condition
    previous: tuple[Previous, ...]
    personal: bool
    entry: Mapping[str, Any] = field(compare=False)

    @property
    def of_table(self) -> bool:
        """Whether it is about the batch and no column of it."""
        return self.type.startswith("expect_table_")

    @property
    def of_columns(self) -> bool:
        """Whether it asks which columns there are, and nothing of their values."""
        return self.type.startswith("expect_table_column") or self.type == "expect_column_to_exist"


class Reader:
    """Reads what an agent declared. Raises `WiringError` naming agent, field and fix."""

    def __init__(self, agent: str, contract: Contract[Any], columns: Mapping[str, pl.Expr], home: Path) -> None:
        self._agent, self._contract, self._home = agent, contract, home
        private = {f["name"] for f in contract.describe()["fields"] if _anything_personal(f)}
        self.schema = dict(contract.schema)
        self.personal = set(private)
        for name, expression in columns.items():
            self.schema[name] = self._derived(name, expression)
            if private.intersection(expression.meta.root_names()):
                self.personal.add(name)

    def expectations(self, suite: Any) -> tuple[Expectation, ...]:
        found: list[Expectation] = []
        names: dict[str, int] = {}
        for entry in self._entries(suite):
            one = self._expectation(entry)
            names[one.name] = names.get(one.name, 0) + 1
            if names[one.name] > 1:
                one = Expectation(**{**vars(one), "name": f"{one.name}__{names[one.name]}"})
            found.append(one)
        if len({one.name for one in found}) < len(found):
            self._wrong("two of its expectations come to the same name", fix="give one of them another `meta={'name': ...}`")
        return tuple(found)

    # -- forms in which a suite comes ------------------------------------------------------------------------------------------------

    def _entries(self, suite: Any) -> Iterator[dict[str, Any]]:
        if isinstance(suite, (str, Path)):
            suite = self._from_file(self._home / suite, str(suite))
        elif hasattr(suite, "expectations") and hasattr(suite, "to_json_dict"):  # an ExpectationSuite
            suite = suite.expectations
        if isinstance(suite, (Mapping, bytes)) or not hasattr(suite, "__iter__"):
            fix = "give a list of GX expectations or dicts, an ExpectationSuite, or the path of a suite file"
            self._wrong(f"`expectations` is a {type(suite).__name__}", fix=fix)
        yield from (self._entry(one, number) for number, one in enumerate(suite, 1))

    def _from_file(self, path: Path, declared: str) -> Any:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            fix = f"give a path relative to {self._home}, or an absolute one"
            self._wrong(f"the suite file {declared!r} cannot be read ({error.strerror})", fix=fix, cause=error)
        except ValueError as error:
            self._wrong(f"the suite file {declared!r} is not JSON ({error})", fix="save the suite as JSON", cause=error)
        entries = content.get("expectations") if isinstance(content, dict) else None
        if not isinstance(entries, list):
            self._wrong(f"the suite file {declared!r} has no list `expectations`", fix='write {"name": ..., "expectations": [...]}')
        return entries

    def _entry(self, declared: Any, number: int) -> dict[str, Any]:
        if not isinstance(declared, Mapping):
            told = getattr(declared, "configuration", None)  # of a GX expectation
            if told is None or not hasattr(told, "to_json_dict"):
                shown = getattr(declared, "__name__", type(declared).__name__)
                fix = 'give gxe.ExpectColumnMeanToBeBetween(column=..., ...) or {"type": ..., "kwargs": {...}}'
                self._wrong(f"its expectation {number} is a {shown}", fix=fix)
            plain = told.to_json_dict()
            # The arguments as they were given: their JSON form has lost the types of dates.
            return {**plain, "given": dict(told.kwargs), "description": getattr(declared, "description", None)}
        if "expectation_type" in declared:
            self._wrong(f"its expectation {number} is of GX 0.x", fix="rename `expectation_type` to `type`, or save the suite with GX 1")
        if unknown := sorted(set(declared) - set(_ENTRY)):
            self._wrong(f"its expectation {number} has {unknown[0]!r}", fix=f"an expectation has {', '.join(_ENTRY[:6])}")
        kind = declared.get("type")
        if not isinstance(kind, str) or not isinstance(declared.get("kwargs", {}), Mapping):
            self._wrong(f"its expectation {number} names no `type`", fix='{"type": "expect_...", "kwargs": {...}, "severity": "warning"}')
        known = known_types()
        if known and kind not in known:
            close = get_close_matches(kind, sorted(known), n=1)
            fix = f"did you mean {close[0]!r}?" if close else "hand over the expectation itself, if it is one of your own"
            self._wrong(f"{kind!r} is no expectation of Great Expectations", fix=fix)
        return dict(declared)

    # -- one expectation -------------------------------------------------------------------------------------------------------------

    def _expectation(self, entry: dict[str, Any]) -> Expectation:
        kind, arguments = entry["type"], dict(entry.get("kwargs") or {})
        if kind in _OF_DATABASES:
            self._wrong(f"{kind} queries a database, and a batch is a frame", fix="say it of a column that polars works out")
        severity = str(getattr(entry.get("severity"), "value", entry.get("severity") or "critical")).lower()
        if severity not in _SEVERITIES:
            self._wrong(f"the severity of {kind} is {severity!r}", fix="critical (blocks), warning or info (warn)")
        columns = tuple(self._columns(kind, arguments))
        named = set(_in_condition(arguments.get("row_condition")))
        conditions = tuple(name for name, dtype in self.schema.items() if name in named and is_scalar(dtype))
        previous = tuple(self._previous(kind, arguments))
        looked_at = {*columns, *conditions, *(one.column for one in previous)}
        return Expectation(
            name=_name(kind, columns, entry.get("meta") or {}),
            type=kind,
            arguments=arguments,
            severity=_SEVERITIES[severity],
            gx_severity=severity,
            description=str(entry.get("description") or entry.get("notes") or _sentence(kind, arguments)),
            columns=columns,
            conditions=conditions,
            previous=previous,
            personal=not self.personal.isdisjoint(looked_at),
            entry={**{k: v for k, v in entry.items() if k in _ENGINE and v is not None}, "kwargs": entry.get("given", arguments)},
        )

    def _columns(self, kind: str, arguments: Mapping[str, Any]) -> Iterator[str]:
        if kind.startswith("expect_table_"):
            return
        named = [arguments[name] for name in _COLUMN_ARGUMENTS if name in arguments]
        named += arguments["column_list"] if isinstance(arguments.get("column_list"), (list, tuple)) else []
        for name in named:
            if kind == "expect_column_to_exist" and name in self._contract.schema:
                continue
            if not isinstance(name, str) or name not in self.schema:
                close = get_close_matches(str(name), list(self.schema), n=1)
                there = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(self.schema)}"
                self._wrong(f"{kind} names the column {name!r}, which {self._contract.name} does not have", fix=there, field=str(name))
            self._require_scalar(name, self.schema[name])
            yield name

    def _previous(self, kind: str, arguments: Mapping[str, Any]) -> Iterator[Previous]:
        for argument, value in arguments.items():
            if isinstance(value, Mapping) and "$PARAMETER" in value:
                yield from self._in_expression(kind, str(value["$PARAMETER"]))
            elif "$PARAMETER" in json.dumps(value, default=str):
                what = f"{kind} has a parameter inside of {argument!r}, where GX does not look for one"
                self._wrong(what, fix='let it be the whole argument: {"$PARAMETER": "previous_mean_score * 0.9"}')

    def _in_expression(self, kind: str, text: str) -> Iterator[Previous]:
        words = _WORD.findall(re.sub(r"[\d.]+[eE][+-]?\d+", "", text))
        for word in words:
            if word in _EXPRESSION_WORDS | _TIMEDELTA_WORDS:
                continue
            try:
                yield Previous.of(word, self.schema)
            except UnknownParameterError as error:
                self._wrong(f"{kind} asks for the parameter {word!r}: {error}", fix=f"there are {', '.join(PREVIOUS)}")

    # -- columns ---------------------------------------------------------------------------------------------------------------------

    def _derived(self, name: str, expression: Any) -> pl.DataType:
        if name in self.schema or not _WORD.fullmatch(name):
            fix = "letters, digits and _, and no column of the contract"
            self._wrong(f"a column worked out for its expectations is named {name!r}", fix=fix, field=name)
        if not isinstance(expression, pl.Expr):
            self._wrong(f"the column {name!r} is a {type(expression).__name__}", fix='give a polars expression: pl.col("...")', field=name)
        try:
            dtype = pl.LazyFrame(schema=self._contract.schema).select(expression.alias(name)).collect_schema()[name]
        except pl.exceptions.PolarsError as error:
            fix = f"write it over the columns of {self._contract.name}"
            self._wrong(f"the column {name!r} cannot be worked out ({type(error).__name__})", fix=fix, field=name, cause=error)
        self._require_scalar(name, dtype)
        return dtype

    def _require_scalar(self, name: str, dtype: pl.DataType) -> None:
        if not is_scalar(dtype):
            fix = f'say it of a scalar: mao.Expectations(suite, columns={{"{name}_count": pl.col("{name}").list.len()}})'
            if isinstance(dtype, pl.Struct):
                fix = f'say it of a scalar: mao.Expectations(suite, columns={{"inner": pl.col("{name}").struct.field("...")}})'
            self._wrong(f"the column {name!r} is a {dtype}, and expectations are about scalars", fix=fix, field=name)

    def _wrong(self, what: str, *, fix: str, field: str = "expectations", cause: Exception | None = None) -> NoReturn:
        raise WiringError(f"Agent {self._agent!r}: {what}", agent=self._agent, field=field, fix=fix) from cause


def is_scalar(dtype: pl.DataType) -> bool:
    return not isinstance(dtype, (pl.List, pl.Array, pl.Struct, pl.Object))


def known_types() -> frozenset[str]:
    """Names of the expectations there are: from GX's registry where it is imported, else from its files. Empty where neither tells."""
    registry = sys.modules.get("great_expectations.expectations.registry")
    if registry is not None:
        return frozenset(registry.list_registered_expectation_implementations())
    found = importlib.util.find_spec("great_expectations")  # finds it, and imports nothing
    if found is None or not found.origin:
        return frozenset()
    return frozenset(file.stem for file in (Path(found.origin).parent / "expectations" / "core").glob("*expect*.py"))


def _in_condition(condition: Any) -> Iterator[str]:
    """Names of columns in a `row_condition`: a condition object as JSON, GX's notation (`col("score") > 1`), or a pandas query."""
    if isinstance(condition, Mapping):
        if isinstance(condition.get("column"), Mapping):
            yield str(condition["column"].get("name"))
        for name in ("conditions", "pass_through_filter"):
            yield from _in_condition(condition.get(name))
    elif isinstance(condition, (list, tuple)):
        for one in condition:
            yield from _in_condition(one)
    elif isinstance(condition, str):
        yield from _COLUMN.findall(condition) or _WORD.findall(condition)


def _name(kind: str, columns: tuple[str, ...], meta: Mapping[str, Any]) -> str:
    """Of what Dagster allows in the name of a check. All begin alike, so that none is the name of a boundary's check."""
    said = str(meta["name"]) if meta.get("name") else "__".join((kind, *columns))
    name = re.sub(r"[^A-Za-z0-9_]+", "_", said).strip("_")
    return name if name.startswith("expect_") else f"expect_{name}"


def _sentence(kind: str, arguments: Mapping[str, Any]) -> str:
    told = ", ".join(f"{name} {_short(value)}" for name, value in arguments.items())
    return f"{kind.replace('_', ' ').capitalize()}{': ' + told if told else ''}"


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and "$PARAMETER" in value:
        return str(value["$PARAMETER"])
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _anything_personal(described: Any) -> bool:
    if isinstance(described, Mapping):
        return bool(described.get("personal")) or any(map(_anything_personal, described.values()))
    return isinstance(described, list) and any(map(_anything_personal, described))
