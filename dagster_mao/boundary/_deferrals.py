"""The records of a step that wait for the next run: this agent's, and those of agents above it, which it can do nothing about either."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import polars as pl

from dagster_mao.agent import Agent
from dagster_mao.state import DEFERRED_SCHEMA, Seal, StateStore


class Deferrals:
    """By record, the agent whose call was not made, and why. What was carried from above is left out of everything that is read."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent
        self._carried: dict[str, tuple[str, str]] = {}
        self._own: dict[str, str] = {}

    def carry(self, store: StateStore, pinned: Iterable[Seal]) -> None:
        """Takes over what waits in the versions that are read."""
        for seal in pinned:
            if seal.deferred:
                for record, agent, why in store.deferred(seal).iter_rows():
                    self._carried.setdefault(record, (agent, why))

    def add(self, record: str, why: str) -> None:
        """A record of this agent, whose call was refused."""
        self._own[record] = why

    @property
    def own(self) -> int:
        return len(self._own)

    @property
    def carried(self) -> int:
        return len(self._carried)

    @property
    def carried_records(self) -> Iterable[str]:
        return self._carried

    @property
    def told(self) -> int:
        """How many are in the version: those carried too, where its records have the key that they had above."""
        return len(self._own) + (len(self._carried) if self._keeps_keys else 0)

    @property
    def _keeps_keys(self) -> bool:
        key = self._agent.output.key
        return key is not None and key in [i.contract.key for i in self._agent.inputs]

    def without(self, frame: pl.LazyFrame, key: str | None) -> pl.LazyFrame:
        """The rows of records that can be worked on."""
        if key is None or not self._carried:
            return frame
        return frame.filter(~pl.col(key).cast(pl.String).is_in(_set(self._carried)))

    def without_own(self, keys: pl.Series) -> pl.Series:
        """The keys of records that do not wait for this agent."""
        return keys.filter(~keys.cast(pl.String).is_in(_set(self._own))) if self._own else keys

    def frame(self) -> pl.DataFrame:
        """What is to be sealed, as `DEFERRED_SCHEMA` says, by record: the same records, the same bytes."""
        own = [(record, self._agent.name, why) for record, why in self._own.items()]
        carried = [(record, agent, why) for record, (agent, why) in self._carried.items()] if self._keeps_keys else []
        return pl.DataFrame([*own, *carried], schema=DEFERRED_SCHEMA, orient="row").sort("record")


def _set(records: Mapping[str, object]) -> Any:
    return pl.Series(list(records), dtype=pl.String).implode()
