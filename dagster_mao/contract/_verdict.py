"""The verdict over a batch: which rules broke, how often, and a few records to look at, with what is personal masked."""

from __future__ import annotations

import base64
import datetime as dt
import math
from dataclasses import dataclass
from typing import Any

from dagster_mao.contract._types import Field, Type

MASK = "***"
LONGEST_TEXT = 200  # characters of a sample value; a report is no place for a document


@dataclass(frozen=True)
class RuleFailure:
    """One broken rule.

    `rule` names it ("score: ge 300", "application_id: unique", "schema: column 'score' missing"); `field` is its column, None where it
    concerns the record as a whole; `count` is the number of rows that break it; `samples` shows some of them as
    `{key field: ..., field: ...}`, JSON-able, personal values masked.
    """

    rule: str
    field: str | None
    count: int
    samples: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What `Contract.check` found: `failed_rows` of `rows` break one rule or several. An empty batch can fail too, by its columns."""

    contract: str
    rows: int
    failed_rows: int
    failures: tuple[RuleFailure, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.failures


def shown(value: Any, field: Field) -> Any:
    """A column's value as a report may show it: JSON-able, and masked where the field, or the part of it, is personal."""
    return MASK if field.personal else _shown(value, field.type)


def _shown(value: Any, node: Type) -> Any:
    if value is None:
        return None
    if node.fields and isinstance(value, dict):
        return {f.name: shown(value.get(f.name), f) for f in node.fields}
    if node.item is not None and isinstance(value, list):
        return [_shown(v, node.item) for v in value]
    return plain(value)


def plain(value: Any) -> Any:
    """A scalar as JSON can say it."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, bytes):
        return _cut(base64.b64encode(value[: LONGEST_TEXT + 1]).decode())
    if isinstance(value, (dt.date, dt.datetime)):
        return value.isoformat()
    return _cut(str(value))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"
