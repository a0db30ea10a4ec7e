"""The records that wait for the next run, as they may be shown."""

from __future__ import annotations

from dagster_mao.review.masking import MASK, fields_of, is_personal
from dagster_mao.state import Seal, StateStore


def waiting(store: StateStore, seal: Seal, *, limit: int | None = None) -> list[dict[str, str | None]]:
    """What a state version defers: `record` (masked where the key is personal), the `agent` whose call was not made, and `why`.

    The first `limit` in the order of their keys, else all. Raises `TamperedError` when the file is not what was sealed.
    """
    if not seal.deferred:
        return []
    rows = store.deferred(seal).sort("record")
    personal = is_personal(fields_of(seal).get(str(seal.key)))
    shown = rows if limit is None else rows.head(limit)
    return [{**row, "record": MASK if personal and row["record"] is not None else row["record"]} for row in shown.iter_rows(named=True)]
