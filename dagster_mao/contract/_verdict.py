"""The verdict over a batch: which rules broke, how often, and a few records to look at, with what is personal masked."""

from __future__ import annotations

import base64
import datetime as dt
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl
from pydantic import BaseModel, Secret, SecretBytes, SecretStr
from pydantic_core import to_json

from dagster_mao.contract._types import Field, Type

MASK = "***"
LONGEST_TEXT = 200  # characters of a sample value; a report is no place for a document
_LONGEST_INT = 10_000  # bits that Python writes and reads as decimal digits without being told to


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


def field_of(rule: str) -> str:
    """The top-level field in the name of a rule ("amount: gt 0", "contact.phone: pattern", "tags[]: ge 1")."""
    return re.split(r"[:.\[]", rule, maxsplit=1)[0]


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


ROW, RULES = "_row", "_rules"  # no field of a model has such a name: pydantic takes no leading underscore


@dataclass(frozen=True)
class Sifted:
    """What `Contract.sift` parted: the `verdict`, which is `check`'s; the `valid` records, in order; the `broken` ones.

    `broken` has the contract's columns, then `_row`, the position in the batch, ascending, and `_rules`, the names of the rules that the
    record broke, sorted. Its values are not masked.
    """

    verdict: Verdict
    valid: pl.LazyFrame
    broken: pl.DataFrame


@dataclass(frozen=True)
class Refused:
    """A record that cannot even be a row: its `position`, its `key` (None where it has none), the `rules` it broke, sorted.

    `values` is what came in, as JSON text, not masked; what JSON does not know is in it as text.
    """

    position: int
    key: Any | None
    rules: tuple[str, ...]
    values: str = field(repr=False)


def shown(value: Any, of: Field) -> Any:
    """A column's value as a report may show it: JSON-able, and masked where the field, or the part of it, is personal."""
    return MASK if of.personal else _shown(value, of.type)


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
    if isinstance(value, int) and value.bit_length() > _LONGEST_INT:
        return _cut(hex(value))
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, bytes):
        return _cut(base64.b64encode(value[: LONGEST_TEXT + 1]).decode())
    if isinstance(value, (dt.date, dt.datetime)):
        return value.isoformat()
    return _cut(_utf8(_told(value)))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + "…"


def text_of(record: Any) -> str:
    """A record as JSON text, whatever it holds: nothing that came in is lost, and nothing is masked."""
    try:
        return to_json(_bare(record), fallback=_told, inf_nan_mode="strings", bytes_mode="base64").decode()
    except Exception:
        # It contains itself, or is nested too deep.
        return json.dumps(_told(record, repr))


def _utf8(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


def _told(value: Any, how: Callable[[Any], str] = str) -> str:
    try:
        return how(value)
    except Exception:  # of its own: what came in may be anything
        return object.__repr__(value)


def _bare(value: Any) -> Any:
    """Models as what they hold: their own serializers may leave things out, and secrets would be stars. Text as UTF-8 can hold it."""
    if isinstance(value, BaseModel):
        return {**{name: _bare(v) for name, v in vars(value).items()}, **(value.__pydantic_extra__ or {})}
    if isinstance(value, (Secret, SecretStr, SecretBytes)):
        return _bare(value.get_secret_value())
    if isinstance(value, str):
        return _utf8(value)
    if isinstance(value, int) and value.bit_length() > _LONGEST_INT:
        return hex(value)
    if isinstance(value, Mapping):
        return {_bare(k if isinstance(k, str) else _told(k)): _bare(v) for k, v in value.items()}
    return [_bare(v) for v in value] if isinstance(value, (list, tuple, set, frozenset)) else value
