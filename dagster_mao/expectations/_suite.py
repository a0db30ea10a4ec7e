"""An agent's suite: which checks it makes, and what they find in a batch."""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import polars as pl

from dagster_mao.contract import MASK, Contract
from dagster_mao.errors import WiringError
from dagster_mao.expectations import _engine
from dagster_mao.expectations._declared import Expectation, Expectations, Reader, Severity
from dagster_mao.expectations._previous import parameters

_LONGEST_TEXT, _LONGEST_LIST = 200, 50
# Who says one of these of a column has said what share of it may be missing.
_OF_NULLS = {
    "expect_column_values_to_not_be_null",
    "expect_column_values_to_be_null",
    "expect_column_proportion_of_non_null_values_to_be_between",
}
# What says which values an expectation is about.
_OF_DOMAIN = ("column", "row_condition", "condition_parser")
_EXCEPTION = re.compile(r"^([A-Za-z_][\w.]*(?:Error|Exception))(?::|$)", re.MULTILINE)
# What these observe is a count, a share or a distance, and no value of a record.
_IMPERSONAL = {
    "expect_column_unique_value_count_to_be_between",
    "expect_column_proportion_of_unique_values_to_be_between",
    "expect_column_proportion_of_non_null_values_to_be_between",
    "expect_column_kl_divergence_to_be_less_than",
}
# These judge a text by its code as they would by itself. Others compare, measure or concatenate.
_BY_CODES = {
    *_OF_NULLS,
    "expect_column_values_to_be_in_set",
    "expect_column_values_to_not_be_in_set",
    "expect_column_distinct_values_to_be_in_set",
    "expect_column_distinct_values_to_contain_set",
    "expect_column_distinct_values_to_equal_set",
    "expect_column_unique_value_count_to_be_between",
    "expect_column_proportion_of_unique_values_to_be_between",
    "expect_column_kl_divergence_to_be_less_than",
}


@dataclass(frozen=True)
class Finding:
    """What an expectation found. `metadata` is JSON; numbers in it are GX's own, values of personal columns are masked."""

    name: str
    passed: bool
    severity: Severity
    description: str
    metadata: dict[str, Any] = field(default_factory=dict)


class Suite:
    """The expectations of an agent, read at load. False when it declared none."""

    def __init__(
        self,
        agent: str,
        expectations: Sequence[Expectation],
        columns: Mapping[str, pl.Expr],
        *,
        schema: Mapping[str, pl.DataType],
        personal: Collection[str],
    ) -> None:
        self._agent, self._columns, self._schema, self._personal = agent, dict(columns), schema, frozenset(personal)
        self.expectations = tuple(expectations)

    @classmethod
    def of(cls, declared: Any, contract: Contract[Any], *, agent: str, home: Path) -> Suite:
        """Reads what an agent declared about its output; paths are relative to `home`. Raises `WiringError`."""
        said = declared if isinstance(declared, Expectations) else Expectations(declared)
        reader = Reader(agent, contract, said.columns, home)
        return cls(agent, reader.expectations(said.suite), said.columns, schema=reader.schema, personal=reader.personal)

    @classmethod
    def empty(cls, agent: str) -> Suite:
        """The suite of an agent that declares none."""
        return cls(agent, (), {}, schema={}, personal=())

    def __bool__(self) -> bool:
        return bool(self.expectations)

    @property
    def compares(self) -> bool:
        """Whether it asks for values of the version before."""
        return any(one.previous for one in self.expectations)

    def prepare(self) -> None:
        """Imports GX and builds the expectations, so that wrong arguments are told before the agent runs. Raises `WiringError`."""
        self._build(self.expectations)
        for one in self.expectations:
            raised = _unevaluable(one, {value.name: value.example for value in one.previous})
            if raised and raised != ZeroDivisionError.__name__:  # that is for real values to say
                self._wrong(one, f"one of its parameters is no expression that GX can evaluate ({raised})")

    def judge(self, batch: pl.LazyFrame, previous: pl.LazyFrame | None = None) -> list[Finding]:
        """One finding per expectation about a batch that keeps its contract, in the order of declaration.

        What compares with the version before is skipped where there is none, or where that one cannot tell; of an empty batch only what
        is about the batch and none of its columns is judged. A missing value (null, NaN) breaks an expectation about its column, unless
        the suite says itself how many may be missing.
        """
        known = self._parameters(previous) if previous is not None else {}
        rows = batch.select(pl.len()).collect(engine="streaming").item()
        findings: dict[str, Finding] = {}
        for one in self.expectations:
            if reason := _reason_to_skip(one, rows, known, previous):
                findings[one.name] = _skipped(one, reason)
            elif raised := _unevaluable(one, known):
                findings[one.name] = _unjudged(one, _declared(one), raised)
        asked = [one for one in self.expectations if one.name not in findings]
        try:
            results = self._run(batch, rows, asked, known) if asked else {}
            findings |= {one.name: self._found(one, *results[one.name]) for one in asked}
        except _engine.EngineError as error:
            findings |= {one.name: _unjudged(one, _declared(one), str(error)) for one in asked}
        return [findings[one.name] for one in self.expectations]

    # -- what GX is asked ------------------------------------------------------------------------------------------------------------

    def _parameters(self, previous: pl.LazyFrame) -> dict[str, Any]:
        there = set(previous.collect_schema())
        derived = {name: e for name, e in self._columns.items() if there.issuperset(e.meta.root_names())}
        wanted = {value.name: value for one in self.expectations for value in one.previous}
        return parameters(list(wanted.values()), previous.with_columns(**derived))

    def _run(self, batch: pl.LazyFrame, rows: int, asked: Sequence[Expectation], known: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """By name, GX's result, and its result on what is missing in the column of an aggregate."""
        expectations = dict(enumerate(self._build(asked)))
        nulls = {one.name: number for number, one in enumerate(asked, len(asked)) if "column" in one.arguments and self._needs_nulls(one)}
        results: dict[int, Any] = {}
        if of_columns := [number for number, one in enumerate(asked) if one.of_columns]:
            names = [name for name in self._schema if name not in self._columns]
            some = pl.DataFrame({name: [0] for name in names})  # only which columns there are matters
            results |= _engine.judged(_engine.as_pandas(some, set()), [expectations.pop(number) for number in of_columns], known)
        for one in asked:
            if one.name in nulls:
                arguments = {name: value for name, value in one.entry["kwargs"].items() if name in _OF_DOMAIN}
                entry = {"type": "expect_column_values_to_not_be_null", "kwargs": arguments}
                expectations[nulls[one.name]] = _engine.built(entry, nulls[one.name])
        if expectations:
            results |= _engine.judged(self._pandas(batch, rows, asked), list(expectations.values()), known)
        return {one.name: (results[number], results.get(nulls.get(one.name, -1))) for number, one in enumerate(asked)}

    def _needs_nulls(self, one: Expectation) -> bool:
        if not one.columns or one.of_columns or one.type in _OF_NULLS or "ignore_row_if" in one.arguments:
            return False
        said = {column for other in self.expectations if other.type in _OF_NULLS for column in other.columns}
        return not said.issuperset(one.columns)

    def _build(self, asked: Sequence[Expectation]) -> list[Any]:
        found = []
        for number, one in enumerate(asked):
            try:
                found.append(_engine.built(one.entry, number))
            except ImportError:
                raise
            except Exception as error:
                self._wrong(one, _one_line(error), error)
        return found

    def _wrong(self, one: Expectation, why: str, cause: Exception | None = None) -> NoReturn:
        what = f"Agent {self._agent!r}: {one.type} is not declared as Great Expectations takes it: {why}"
        field = one.columns[0] if one.columns else "expectations"
        raise WiringError(what, agent=self._agent, field=field, fix="mend its arguments") from cause

    def _pandas(self, batch: pl.LazyFrame, rows: int, asked: Sequence[Expectation]) -> Any:
        """The columns that are asked about, and no others."""
        wanted = {name for one in asked if not one.of_columns for name in (*one.columns, *one.conditions)}
        compared = {name for one in asked for name in (*one.conditions, *(() if one.type in _BY_CODES else one.columns))}
        if not wanted:
            return _engine.as_pandas(pl.select(rows=pl.repeat(0, rows, dtype=pl.Int8)), set())
        chosen = {name: self._columns.get(name, pl.col(name)) for name in self._schema if name in wanted}
        return _engine.as_pandas(batch.select(**chosen).collect(engine="streaming"), wanted - compared)

    # -- what GX found ---------------------------------------------------------------------------------------------------------------

    def _found(self, one: Expectation, result: Any, nulls: Any) -> Finding:
        facts = _asked(one, result)
        raised = _raised(result) or _raised(nulls)
        if raised:
            return _unjudged(one, facts, raised)
        observed = self._observed(one, result.result)
        missing = self._missing(one, result.result, nulls)
        passed = bool(result.success)
        if missing:
            observed["missing_count"] = missing
            passed = passed and _passes_with(missing, result)
        reasons = [] if passed else self._reasons(one, result, missing)
        facts |= {**observed, **({"reasons": reasons} if reasons else {})}
        return Finding(one.name, passed, one.severity, _words(observed, reasons), facts)

    def _missing(self, one: Expectation, result: Mapping[str, Any], nulls: Any) -> int:
        """How many values were left out of account without a word in the suite that they may be."""
        if not self._needs_nulls(one):
            return 0
        if "missing_count" in result:
            return int(result["missing_count"])
        return int(nulls.result.get("unexpected_count", 0)) if nulls is not None else 0

    def _observed(self, one: Expectation, result: Mapping[str, Any]) -> dict[str, Any]:
        facts: dict[str, Any] = {}
        for name in ("element_count", "missing_count", "missing_percent", "unexpected_count", "unexpected_percent"):
            if result.get(name) is not None:
                facts[name] = _plain(result[name])
        if "observed_value" in result:
            shown = not one.personal or one.type in _IMPERSONAL
            facts.update(_observed(result["observed_value"]) if shown else {"observed_value": MASK})
        return facts

    def _reasons(self, one: Expectation, result: Any, missing: int) -> list[dict[str, Any]]:
        reasons = []
        if not result.success or not missing:
            values = result.result.get("partial_unexpected_list") or []
            samples = [self._sample(one, value) for value in values[: _engine.SAMPLES]]
            reasons.append({**_reason(one.type, one), "count": int(result.result.get("unexpected_count") or 0), "samples": samples})
        if missing:
            reasons.append({**_reason("missing values", one), "count": missing})
        return reasons

    def _sample(self, one: Expectation, value: Any) -> dict[str, Any]:
        if isinstance(value, Mapping):
            by_column = dict(value)
        elif len(one.columns) > 1 and isinstance(value, (list, tuple)):
            by_column = dict(zip(one.columns, value, strict=False))
        else:
            by_column = {one.columns[0] if one.columns else "value": value}
        hidden = one.personal and self._personal.isdisjoint(by_column)  # what makes it personal is none of the columns shown
        return {name: MASK if hidden or name in self._personal else _plain(value) for name, value in by_column.items()}


def suite_file(declared: Any) -> str | Path | None:
    """The suite file that a declaration names, which counts in the agent's version; None when it names none."""
    suite = declared.suite if isinstance(declared, Expectations) else declared
    return suite if isinstance(suite, (str, Path)) else None


def _reason_to_skip(one: Expectation, rows: int, known: Mapping[str, Any], previous: Any) -> str:
    if rows == 0 and not one.of_table:
        return "the batch is empty"
    if one.previous and previous is None:
        return "there is no previous version"
    if absent := [value.name for value in one.previous if value.name not in known]:
        return f"the previous version gives no {', '.join(absent)}"
    return ""


def _skipped(one: Expectation, reason: str) -> Finding:
    return Finding(one.name, True, one.severity, f"Not judged: {reason}", {**_declared(one), "skipped": reason})


def _unjudged(one: Expectation, facts: Mapping[str, Any], raised: str) -> Finding:
    reasons = [_reason(f"raised {raised}", one)]
    return Finding(one.name, False, one.severity, f"It could not be judged: {raised}", {**facts, "exception": raised, "reasons": reasons})


def _unevaluable(one: Expectation, known: Mapping[str, Any]) -> str | None:
    """The type of what evaluating its parameters raises."""
    for value in one.arguments.values():
        if isinstance(value, Mapping) and "$PARAMETER" in value:
            try:
                _engine.evaluated(str(value["$PARAMETER"]), known)
            except _engine.EngineError as error:
                return str(error)
    return None


def _declared(one: Expectation) -> dict[str, Any]:
    return {"expectation": one.type, "arguments": _jsonable(one.arguments), "gx_severity": one.gx_severity}


def _asked(one: Expectation, result: Any) -> dict[str, Any]:
    """What was asked; with the parameters' values in place of their names, unless those say something personal."""
    told = _declared(one)
    if one.previous and not one.personal:
        given = result.expectation_config.kwargs
        told["arguments"] = {name: _jsonable(given.get(name, value)) for name, value in told["arguments"].items()}
    return told


def _passes_with(missing: int, result: Any) -> bool:
    """Whether it holds when what is missing counts as broken. An average has no share that may be missing: it does not."""
    if "unexpected_count" not in result.result:
        return False
    total = int(result.result["element_count"])
    kept = (total - missing - int(result.result["unexpected_count"])) / total
    return kept >= float(result.expectation_config.kwargs.get("mostly", 1))


def _raised(result: Any) -> str | None:
    """The type of the exception that GX met, without its text, which quotes values. GX nests them by metric, or does not."""
    info = result.exception_info or {} if result is not None else {}
    for one in (info, *(value for value in info.values() if isinstance(value, Mapping))):
        if one.get("raised_exception"):
            names = _EXCEPTION.findall(str(one.get("exception_traceback") or ""))
            return names[-1].rpartition(".")[2] if names else "an exception"
    return None


def _observed(value: Any) -> dict[str, Any]:
    """GX's observed value; the numbers in it each under a name of their own, because Dagster plots numbers."""
    if isinstance(value, Mapping) and {"quantiles", "values"} <= set(value):
        return {f"observed_value_{quantile}": _plain(found) for quantile, found in zip(value["quantiles"], value["values"], strict=True)}
    return {"observed_value": "none (infinite, or not defined)" if value is None else _jsonable(value)}


def _words(observed: Mapping[str, Any], reasons: Sequence[Mapping[str, Any]]) -> str:
    among = f" of {observed['element_count']:,}" if "element_count" in observed else ""
    if reasons and reasons[0]["count"]:
        return f"{reasons[0]['rule']}: {reasons[0]['count']:,}{among}"
    told = [f"{name.replace('_', ' ')} {_short(value)}" for name, value in observed.items() if name.startswith("observed_value")]
    unexpected = f"{observed.get('unexpected_count', 0):,}{among} unexpected"
    return f"{'Broken: ' if reasons else ''}{', '.join(told) or unexpected}"


def _reason(rule: str, one: Expectation) -> dict[str, Any]:
    return {"rule": rule, "field": ", ".join(one.columns) or None, "count": 0, "samples": []}


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _jsonable(part) for name, part in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = [_jsonable(part) for part in list(value)[:_LONGEST_LIST]]
        return [*parts, f"and {len(value) - len(parts)} more"] if len(value) > len(parts) else parts
    return _plain(value)


def _plain(value: Any) -> Any:
    """A scalar as JSON can say it; numpy's, pandas' and GX's own among them."""
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if isinstance(value, float):
        return value if math.isfinite(value) else "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, (bool, int)):
        return value
    text = value.isoformat() if isinstance(value, (dt.date, dt.datetime)) else str(value)
    return text if len(text) <= _LONGEST_TEXT else f"{text[:_LONGEST_TEXT]}…"


def _short(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 100 else f"{text[:100]}…"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
