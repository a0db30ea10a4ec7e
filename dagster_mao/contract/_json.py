"""A record as JSON and back, through the values of its columns: what is read from the text is what would be read from a snapshot."""

from __future__ import annotations

import base64
import datetime as dt
import decimal
from collections.abc import Callable
from typing import Any

import polars as pl
from pydantic_core import from_json, to_json

Restore = Callable[[Any], Any]


def dumped(row: dict[str, Any]) -> bytes:
    """Raises ValueError for text that is no UTF-8."""
    return to_json(row, inf_nan_mode="constants", bytes_mode="base64")


def loaded(data: bytes, restore: Restore | None) -> Any:
    """The row of columns' values. Raises ValueError for what `dumped` did not write."""
    row = from_json(data)
    if not isinstance(row, dict):
        raise ValueError("is no JSON object")
    return row if restore is None else restore(row)


def restoring(schema: pl.Schema) -> Restore | None:
    """What makes the columns' values again of what JSON holds in their place; None where that is the same."""
    return _members(dict(schema))


def _of(dtype: Any) -> Restore | None:
    if isinstance(dtype, pl.Struct):
        return _members({field.name: field.dtype for field in dtype.fields})
    if isinstance(dtype, pl.List):
        inner = _of(dtype.inner)
        return None if inner is None else lambda values: [None if v is None else inner(v) for v in values]
    return next((restore for kind, restore in _SCALARS.items() if dtype == kind), None)


def _members(dtypes: dict[str, Any]) -> Restore | None:
    changed = {name: found for name, dtype in dtypes.items() if (found := _of(dtype)) is not None}
    if not changed:
        return None

    def restore(row: dict[str, Any]) -> dict[str, Any]:
        return {name: value if value is None or name not in changed else changed[name](value) for name, value in row.items()}

    return restore


def _bytes(text: str) -> bytes:
    return base64.b64decode(text.translate(_STANDARD), validate=True)


def _datetime(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(text.replace("Z", "+00:00"))  # Python 3.10 does not know the Z


_STANDARD = str.maketrans("-_", "+/")  # pydantic writes base64 for URLs
_SCALARS: dict[Any, Restore] = {
    pl.Binary: _bytes,
    pl.Date: dt.date.fromisoformat,
    pl.Datetime: _datetime,
    pl.Decimal: decimal.Decimal,
}
