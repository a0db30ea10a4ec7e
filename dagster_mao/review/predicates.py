"""Predicates: what is true of a good version. An expression, a function, a contract; anything else that is called with a seal."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol, runtime_checkable

import polars as pl
from pydantic import BaseModel

from dagster_mao.contract import Contract
from dagster_mao.errors import IncompatibleContractError, MaoError, WiringError
from dagster_mao.state import Seal, StateStore

# A subquery is read while the text is parsed, from any file that it names. Words in quotes are refused with the others: the parser and we
# might see differently where quotes end.
_QUERY = re.compile(r"\bselect\b|\bwith\b|\b(read|scan)_\w+\s*\(|\(\s*from\b", re.IGNORECASE)


@runtime_checkable
class Predicate(Protocol):
    """Whether a version is good. `name` is how it is told; `of_rows`: it is about the rows, so that versions without any say nothing, and
    versions with the same bytes and contract are alike.
    """

    name: str
    of_rows: bool

    def __call__(self, store: StateStore, seal: Seal) -> bool: ...


class Expression:
    """A polars expression, or the text of one in SQL, that is true of every record of a good version; null is not true.

    Only the columns that it names are read. An expression that sums up (`avg(score) > 500`) is true of the version. Raises `WiringError`
    for text that is none, or that asks for anything but the version's own rows.
    """

    of_rows = True

    def __init__(self, expression: str | pl.Expr) -> None:
        self.name = expression if isinstance(expression, str) else str(expression)
        self._expression = _parsed(expression) if isinstance(expression, str) else expression
        self._columns = tuple(dict.fromkeys(self._expression.meta.root_names()))

    def __call__(self, store: StateStore, seal: Seal) -> bool:
        frame = store.read(seal, columns=self._columns) if self._columns else store.read(seal)
        try:
            held = frame.select(self._expression.alias("held")).collect()["held"]
        except pl.exceptions.PolarsError as error:  # its text may quote values
            raise self._wrong(
                seal, f"cannot be told ({type(error).__name__})", "compare what can be compared; cast where types differ"
            ) from None
        if held.dtype != pl.Boolean:
            raise self._wrong(seal, f"is {held.dtype}, and not yes or no", "write a comparison: score >= 300")
        return bool(held.fill_null(False).all())

    def _wrong(self, seal: Seal, what: str, fix: str) -> WiringError:
        return WiringError(f"{self.name!r} {what} of {seal.reference}", agent=seal.agent, workflow=seal.workflow_id, fix=fix)


def _parsed(text: str) -> pl.Expr:
    fix = "write what is true of every record, as in `score >= 300 and decided is not null`; for more, name a Python function"
    if _QUERY.search(text):
        raise WiringError("An expression is about a version's own columns, and cannot ask for anything else", field="expression", fix=fix)
    try:
        return pl.sql_expr(text)
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        told = next(iter(str(error).splitlines()), type(error).__name__)
        raise WiringError(f"{text!r} is no expression: {told}", field="expression", fix=fix) from None


class Function:
    """A function of the operator's own: called with the rows (`pl.LazyFrame`) and, if it takes two, the seal; true for a good version."""

    of_rows = False  # it may look at the seal, and may say something else the next time

    def __init__(self, function: Callable[..., Any], name: str = "") -> None:
        self._function, self.name = function, name or getattr(function, "__qualname__", type(function).__name__)

    @cached_property
    def _takes(self) -> int:
        kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        count = sum(parameter.kind in kinds for parameter in inspect.signature(self._function).parameters.values())
        if count not in (1, 2):
            raise WiringError(
                f"{self.name} takes {count} parameters", field="function", fix="def is_good(rows: pl.LazyFrame, seal) -> bool"
            )
        return count

    def __call__(self, store: StateStore, seal: Seal) -> bool:
        given = (store.read(seal), seal)[: self._takes]
        try:
            good = self._function(*given)
        except MaoError:
            raise
        except Exception as error:
            what = f"{self.name} raised {type(error).__name__} about {seal.reference}"
            raise WiringError(what, agent=seal.agent, workflow=seal.workflow_id, fix="let it say yes or no of every version") from error
        if not isinstance(good, bool):
            what = f"{self.name} returned {type(good).__name__} about {seal.reference}"
            raise WiringError(what, agent=seal.agent, workflow=seal.workflow_id, fix="return True or False")
        return good


class Keeps:
    """Whether a version keeps a contract, as a reader who asks for it would find: a version sealed under a contract that cannot be read as
    this one does not.
    """

    of_rows = True

    def __init__(self, contract: type[BaseModel] | Contract[Any]) -> None:
        self._contract: Contract[Any] = contract if isinstance(contract, Contract) else Contract.of(contract)
        self.name = f"keeps {self._contract.name}"

    def __call__(self, store: StateStore, seal: Seal) -> bool:
        try:
            rows = self._contract.upgrade(store.read(seal), json.loads(seal.contract_schema))
        except IncompatibleContractError:
            return False
        except (ValueError, TypeError, KeyError, AttributeError):  # a description that cannot be read: the rows speak for themselves
            rows = store.read(seal)
        return not self._contract.check(rows).failures


Good = str | pl.Expr | type[BaseModel] | Contract[Any] | Predicate | Callable[..., Any]
"""What says that a version is good: an expression (polars, or text in SQL), a contract, a predicate, or a function."""


def predicate_of(good: Good) -> Predicate:
    """The predicate that is meant. Raises `WiringError` for text that is no expression."""
    if isinstance(good, (str, pl.Expr)):
        return Expression(good)
    if isinstance(good, Contract) or (isinstance(good, type) and issubclass(good, BaseModel)):
        return Keeps(good)
    return good if isinstance(good, Predicate) else Function(good)
