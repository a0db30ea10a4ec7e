"""What happened to breakers since somebody looked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import sqlalchemy as sa

from dagster_mao.gateway._breaker import _EVENTS, BreakerEvent, _at
from dagster_mao.gateway._shared import SharedStore


class News(NamedTuple):
    """An event and its number, which grows with each event of the same breaker."""

    number: int
    event: BreakerEvent


def news(shared: SharedStore, after: Mapping[str, int], *, limit: int = 200) -> list[News]:
    """The events of breakers by name, each after a number of its own, oldest first and at most `limit`; makes nothing.

    The numbers count per breaker: its events are written under the lock of its row, so that none appears after a later one was seen. Those
    of two breakers may. Raises `StoreError`.
    """
    if not after or not shared.holds(_EVENTS):
        return []
    wanted = sa.or_(*(sa.and_(_EVENTS.c.breaker == name, _EVENTS.c.id > number) for name, number in after.items()))
    with shared.reading() as connection:
        rows = connection.execute(sa.select(_EVENTS).where(wanted).order_by(_EVENTS.c.id).limit(limit)).mappings().all()
    return [
        News(row["id"], BreakerEvent(row["breaker"], _at(row["at"]), row["event"], row["why"], row["by"], row["process"])) for row in rows
    ]


def newest(shared: SharedStore, names: list[str]) -> dict[str, int]:
    """By breaker, the number of its newest event; 0 for one that has none. Raises `StoreError`."""
    found = dict.fromkeys(names, 0)
    if not shared.holds(_EVENTS):
        return found
    query = sa.select(_EVENTS.c.breaker, sa.func.max(_EVENTS.c.id)).where(_EVENTS.c.breaker.in_(names)).group_by(_EVENTS.c.breaker)
    with shared.reading() as connection:
        return found | {str(name): int(number) for name, number in connection.execute(query)}
