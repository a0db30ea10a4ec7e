"""What quarantine files, deferred files and dispositions hold: the same columns for every agent, whatever its contracts."""

from __future__ import annotations

import polars as pl

_QUARANTINE: dict[str, pl.DataType | type[pl.DataType]] = {
    "record": pl.String,  # the record's key as text; null where it has none
    "side": pl.String,  # "input" or "output": which side of the boundary refused it
    "upstream": pl.String,  # whose records the input contract is about; null on the output side
    "rules": pl.List(pl.String),
    "values": pl.String,  # JSON of what came in, personal fields among it: for correcting the record, never for showing
    "masked": pl.String,  # the same as it may be shown
    "digest": pl.String,  # sha256 of `values`: the same refusal met again
    "attempt": pl.String,
}
QUARANTINE_SCHEMA = pl.Schema(_QUARANTINE)
"""One row per refusal: a record that two upstreams' contracts refuse has two."""

_DEFERRED: dict[str, pl.DataType | type[pl.DataType]] = {
    "record": pl.String,  # the record's key as text
    "agent": pl.String,  # whose call was not made: this agent's, or that of one above it
    "why": pl.String,  # the breaker that was open
}
DEFERRED_SCHEMA = pl.Schema(_DEFERRED)
"""One row per record that waits for the next run."""

_DISPOSITION: dict[str, pl.DataType | type[pl.DataType]] = {
    "agent": pl.String,
    "version": pl.Int64,  # the state version whose quarantine the record is in
    "record": pl.String,
    "digest": pl.String,
    "verdict": pl.String,  # "discarded" or "resubmitted"
    "why": pl.String,
    "by": pl.String,
    "at": pl.Datetime("us", "UTC"),
    "entry": pl.Int64,  # of what was resubmitted: the version in which it came in again; null of the others
}
DISPOSITION_SCHEMA = pl.Schema(_DISPOSITION)
"""One row per quarantined record that a person decided on."""
