"""The inputs of a call as text, of which its idempotency key is the digest.

The same values give the same text in every process, on every host and under every hash seed. Each value stands after its length, so that
no two records run together to the same text; sets and dicts have an order already, because columns have.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import polars as pl

_NULL = "-"


def canonical(dtype: Any, value: pl.Expr) -> pl.Expr:
    """A column as text that stands for its values, each once and for all."""
    if isinstance(dtype, pl.Struct):
        members = [canonical(field.dtype, value.struct.field(field.name)) for field in dtype.fields]
        return pl.when(value.is_null()).then(pl.lit(_NULL)).otherwise(pl.concat_str([pl.lit("{"), *members]))
    if isinstance(dtype, pl.List):
        items = value.list.eval(canonical(dtype.inner, pl.element())).list.join("")
        counted = pl.concat_str([pl.lit("["), value.list.len().cast(pl.String), pl.lit(":"), items])
        return pl.when(value.is_null()).then(pl.lit(_NULL)).otherwise(counted)
    text = _text(dtype, value)
    after_length = pl.concat_str([text.str.len_bytes().cast(pl.String), pl.lit(":"), text])
    return pl.when(value.is_null()).then(pl.lit(_NULL)).otherwise(after_length)


def _text(dtype: Any, value: pl.Expr) -> pl.Expr:
    if dtype == pl.String:
        return value
    if dtype == pl.Binary:
        return value.bin.encode("hex")
    if isinstance(dtype, pl.Datetime):
        return value.dt.epoch("us").cast(pl.String)
    if dtype == pl.Date:
        return value.cast(pl.Int32).cast(pl.String)
    # Floats have the shortest text that is read back as the same number.
    return value.cast(pl.String)


def texts(struct: pl.Series) -> list[str]:
    """Each row of a column of structs as text."""
    return struct.to_frame("row").select(canonical(struct.dtype, pl.col("row"))).to_series().to_list()


def named(upstream: str, schema: pl.Schema) -> str:
    """What the text of one upstream's record begins with: the same values under other names are other inputs."""
    return json.dumps([upstream, [[name, str(dtype)] for name, dtype in schema.items()]])


def digest(text: str) -> str:
    """sha256 (hex)."""
    return hashlib.sha256(text.encode()).hexdigest()
