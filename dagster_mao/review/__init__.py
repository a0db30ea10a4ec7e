"""Review: what happened, read from the state and never written to it. Whatever is marked personal leaves this room masked."""

from dagster_mao.review.bisect import Bisection, Candidate, Changed, Probe, bisect
from dagster_mao.review.diff import Difference, RecordDifference, diff
from dagster_mao.review.history import as_of, facts, history, parse_reference, records, resolve, sealed
from dagster_mao.review.masking import MASK, masked
from dagster_mao.review.replay import Replay, replay
from dagster_mao.review.walk import Scene, walk

__all__ = [
    "MASK",
    "Bisection",
    "Candidate",
    "Changed",
    "Difference",
    "Probe",
    "RecordDifference",
    "Replay",
    "Scene",
    "as_of",
    "bisect",
    "diff",
    "facts",
    "history",
    "masked",
    "parse_reference",
    "records",
    "replay",
    "resolve",
    "sealed",
    "walk",
]
