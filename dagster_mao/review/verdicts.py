"""What judges said of versions: the votes on one, and the numbers over all of an agent's or a workflow's."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import polars as pl

from dagster_mao.review.masking import MASK, fields_of, is_personal
from dagster_mao.state import Seal, StateStore


class Judged(NamedTuple):
    """What one judge's verdicts on one version came to. `numbers` are as the seal has them: score, share_passed, judged, cost and more."""

    seal: Seal
    judge: str
    numbers: Mapping[str, Any]


def judged(seals: Iterable[Seal], *, agent: str | None = None, judge: str | None = None) -> list[Judged]:
    """By version and judge, in the order of the versions; of one agent or judge where they are named."""
    return [
        Judged(seal, name, numbers)
        for seal in seals
        if seal.judged and agent in (None, seal.agent)
        for name, numbers in json.loads(seal.judged).items()
        if judge in (None, name)
    ]


def said_by(one: Judged) -> str:
    """What a judge's verdicts came to, in a line."""
    told = one.numbers
    judged = f"{told['passed']:,} of {told['judged']:,} records pass, score {told['score']:.3f}" if told["judged"] else ""
    unjudged = f"{told['not_judged']:,} not judged" if told["not_judged"] else ""
    return "; ".join(part for part in (judged, unjudged) if part) or "nothing to judge"


def votes(
    store: StateStore, seal: Seal, *, record: str | None = None, limit: int | None = None, unmask: bool = False
) -> list[dict[str, Any]]:
    """The votes on a version, or on one record of it, as `VERDICTS_SCHEMA` has them, or the first `limit`; who did not pass comes first.

    The key is masked where it is personal, and a reason where its judge was sent personal fields: it may quote them. Raises
    `TamperedError` when they are not what was sealed.
    """
    rows = store.verdicts(seal)
    if record is not None and seal.key is not None:
        rows = rows.filter(pl.col("record") == record)
    else:
        rows = rows.sort(pl.col("passed").fill_null(False).all().over("judge", "record"), maintain_order=True).head(limit or rows.height)
    hidden = seal.key is not None and is_personal(fields_of(seal).get(seal.key))
    return [row if unmask else _masked(row, hidden) for row in rows.iter_rows(named=True)]


def _masked(row: dict[str, Any], hidden: bool) -> dict[str, Any]:
    named = MASK if hidden and row["record"] is not None else row["record"]
    said = MASK if row["personal"] and row["reason"] is not None else row["reason"]
    return {**row, "record": named, "reason": said}
