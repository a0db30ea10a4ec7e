"""What judges said of a version: one file, sealed beside the snapshot, with the same columns for every agent."""

from __future__ import annotations

import polars as pl

_VERDICTS: dict[str, pl.DataType | type[pl.DataType]] = {
    "judge": pl.String,
    "record": pl.String,  # the record's key as text; null where it has none
    "vote": pl.Int64,  # of the record, from 1 on; null where the judge gave none
    "passed": pl.Boolean,
    "score": pl.Float64,
    "reason": pl.String,
    "unjudged": pl.String,  # why there is no verdict; null for a vote
    "model": pl.String,  # that answered; null where a function was asked that named none
    "version": pl.String,  # of the judge: rubric, template, function
    "input_tokens": pl.Int64,  # when it was asked: an answer that was kept was paid for once
    "output_tokens": pl.Int64,
    "cost": pl.Float64,
    "personal": pl.Boolean,  # the judge was sent personal fields, and its reason may quote them
}
VERDICTS_SCHEMA = pl.Schema(_VERDICTS)
"""One row per vote, and one for each record of the sample without a verdict."""
