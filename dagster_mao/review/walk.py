"""A workflow version by version: what each agent saw, what it said, and what of that is new."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl

from dagster_mao.errors import MaoError, TamperedError
from dagster_mao.review.diff import Difference, compared
from dagster_mao.review.history import history, records
from dagster_mao.state import Seal, StateStore, When

Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Scene:
    """One version: `place` of `count`. `inputs` are the versions that it was made from, and `output` what it holds, each with its first
    rows, or those of one record; personal fields are masked.

    `difference` is from the version by the same agent before it, `previous`; None where there is none, or the two cannot be compared.
    """

    place: int
    count: int
    seal: Seal
    inputs: tuple[tuple[Seal, Rows], ...]
    output: Rows
    previous: Seal | None
    difference: Difference | None


def walk(
    store: StateStore,
    workflow: str,
    *,
    agent: str | None = None,
    record: str | None = None,
    rows: int = 3,
    as_of: When | None = None,
) -> Iterator[Scene]:
    """The versions of a workflow in their order, those of one agent or of all; each is read when it is asked for.

    With `record`, only what the versions hold under this key. Raises `UnknownVersionError` for a workflow that there is not,
    `TamperedError` when a snapshot is not what was sealed.
    """
    seals = history(store, workflow, as_of=as_of)
    shown = chosen(seals, agent)
    return (scene(store, seals, shown, place, record=record, rows=rows) for place in range(len(shown)))


def chosen(seals: Sequence[Seal], agent: str | None) -> list[Seal]:
    """Those of one agent, or all."""
    return [seal for seal in seals if agent in (None, seal.agent)]


def scene(
    store: StateStore, seals: Sequence[Seal], shown: Sequence[Seal], place: int, *, record: str | None = None, rows: int = 3
) -> Scene:
    """One of the versions that are `shown`; `seals` are all of its workflow."""
    seal = shown[place]
    found = store.seals_at((parent.workflow_id, parent.version) for parent in seal.parents)
    parents = [found[parent.workflow_id, parent.version] for parent in seal.parents]
    limit = None if record is not None else rows
    previous = next((one for one in reversed(seals[: seal.version]) if one.agent == seal.agent and one.path), None) if seal.path else None
    return Scene(
        place=place + 1,
        count=len(shown),
        seal=seal,
        inputs=tuple((parent, records(store, parent, key=record, limit=limit)) for parent in parents),
        output=records(store, seal, key=record, limit=limit),
        previous=previous,
        difference=None if previous is None else _difference(previous, seal, _reader(store, record), rows),
    )


def _difference(previous: Seal, seal: Seal, read: Callable[[Seal], pl.LazyFrame], limit: int) -> Difference | None:
    try:
        return compared(previous, seal, read, read, limit=limit)
    except TamperedError:
        raise
    except MaoError:  # another key field: they are not the same records
        return None


def _reader(store: StateStore, record: str | None) -> Callable[[Seal], pl.LazyFrame]:
    def read(seal: Seal) -> pl.LazyFrame:
        rows = store.read(seal)
        return rows if record is None or seal.key is None else rows.filter(pl.col(seal.key).cast(pl.String) == record)

    return read
