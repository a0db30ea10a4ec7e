"""What a disclosure holds: who was shown personal data, and why."""

from __future__ import annotations

import polars as pl

_DISCLOSURE: dict[str, pl.DataType | type[pl.DataType]] = {
    "record": pl.String,  # the key of the record that was shown; null where all of them were
    "why": pl.String,
    "by": pl.String,
    "at": pl.Datetime("us", "UTC"),
}
DISCLOSURE_SCHEMA = pl.Schema(_DISCLOSURE)
"""One row per disclosure of personal data to a person."""
