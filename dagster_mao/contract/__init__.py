"""Contracts: plain pydantic models, compiled into column types and vectorised rules. No Dagster, no Delta in this room."""

from dagster_mao.contract._check import broken_records
from dagster_mao.contract._columns import Column, Line, columns, lines
from dagster_mao.contract._compare import Difference, compare
from dagster_mao.contract._contract import Contract
from dagster_mao.contract._evolve import Change, evolution
from dagster_mao.contract._markers import DataFrame, FromFallback, Key, LazyFrame, Personal
from dagster_mao.contract._masking import MASK, by_field, by_name, has_personal, hide, unmarked_personal
from dagster_mao.contract._types import spell
from dagster_mao.contract._verdict import Refused, RuleFailure, Sifted, Verdict, field_of, text_of

__all__ = [
    "MASK",
    "Change",
    "Column",
    "Contract",
    "DataFrame",
    "Difference",
    "FromFallback",
    "Key",
    "LazyFrame",
    "Line",
    "Personal",
    "Refused",
    "RuleFailure",
    "Sifted",
    "Verdict",
    "broken_records",
    "by_field",
    "by_name",
    "columns",
    "compare",
    "evolution",
    "field_of",
    "has_personal",
    "hide",
    "lines",
    "spell",
    "text_of",
    "unmarked_personal",
]
