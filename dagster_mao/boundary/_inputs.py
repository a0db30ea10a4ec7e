"""What a record-wise agent reads: its upstreams, joined, chunk by chunk; each record with its key and the text that stands for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import polars as pl

from dagster_mao.agent import Input
from dagster_mao.boundary._digest import digest, named, texts
from dagster_mao.boundary._scratch import Scratch, slices

CHUNK_RECORDS = 10_000  # models alive at a time in a record-wise agent


class Chunk:
    """Some records, in order. `keys` are as their column has them; a batch without a key is one record, whose key is None."""

    def __init__(self, inputs: Sequence[Input], single: Mapping[str, Any], told: str, rows: pl.DataFrame | None) -> None:
        self._inputs, self._single, self._told, self._rows = inputs, single, told, rows
        self.keys: list[Any] = [None] if rows is None else rows["key"].to_list()

    @cached_property
    def records(self) -> list[str | None]:
        """The keys as text."""
        if self._rows is None:
            return [None]
        records: list[str | None] = self._rows["key"].cast(pl.String).to_list()
        return records

    @cached_property
    def inputs(self) -> list[str]:
        """For each record the text that stands for its inputs, those without a key among them, which are the same for all records."""
        if self._rows is None:
            return [self._told]
        columns = [texts(self._rows[i.parameter]) for i in self._inputs]
        if len(columns) == 1:
            return [self._told + text for text in columns[0]]
        return [self._told + "".join(parts) for parts in zip(*columns, strict=True)]

    def values(self, places: Sequence[int] | None = None) -> Iterator[dict[str, Any]]:
        """`execute`'s arguments by parameter, models of one record after the other, as they are asked for. `places`: of these only."""
        if self._rows is None:
            yield dict(self._single)
            return
        rows = self._rows if places is None else self._rows[list(places)]
        names = [i.parameter for i in self._inputs]
        if not self._single and len(names) == 1:
            (name,) = names
            yield from ({name: value} for value in _models(self._inputs[0], rows[name]))
            return
        for values in zip(*(_models(i, rows[i.parameter]) for i in self._inputs), strict=True):
            yield {**self._single, **dict(zip(names, values, strict=True))}

    def row(self, place: int) -> dict[str, dict[str, Any] | None]:
        """One record's values by upstream, as their columns have them."""
        if self._rows is None:
            return {}
        return {i.upstream: self._rows[i.parameter][place] for i in self._inputs}


def chunks(inputs: Sequence[Input], frames: Mapping[str, pl.LazyFrame], scratch: Scratch) -> Iterator[Chunk]:
    """In the order of the first upstream with a key that is not optional."""
    single, told = _single([i for i in inputs if not i.contract.key], frames)
    keyed = sorted((i for i in inputs if i.contract.key), key=lambda i: not i.required)
    told = digest(told + "".join(named(i.upstream, i.contract.schema) for i in keyed))
    if not keyed:
        yield Chunk((), single, told, None)
        return
    first = keyed[0]
    rows = int(frames[first.upstream].select(pl.len()).collect(engine="streaming").item())
    table = _side(first, frames)
    for other in keyed[1:]:
        table = table.join(_side(other, frames), on="key", how="left", maintain_order="left")
    for part in slices(scratch, table, rows, CHUNK_RECORDS):
        yield Chunk(keyed, single, told, part)


def _side(wanted: Input, frames: Mapping[str, pl.LazyFrame]) -> pl.LazyFrame:
    return frames[wanted.upstream].select(pl.col(str(wanted.contract.key)).alias("key"), pl.struct(pl.all()).alias(wanted.parameter))


def _single(inputs: Sequence[Input], frames: Mapping[str, pl.LazyFrame]) -> tuple[dict[str, Any], str]:
    """The records that are there for all others, by parameter, and the text that stands for their values."""
    found, told = {}, ""
    for one in inputs:
        rows = frames[one.upstream].collect()
        found[one.parameter] = next(one.contract.from_frame(rows))
        told += named(one.upstream, one.contract.schema) + "".join(texts(rows.select(one.contract.schema.names()).to_struct()))
    return found, told


def _models(wanted: Input, rows: pl.Series) -> Iterator[Any]:
    if not rows.null_count():
        yield from wanted.contract.from_frame(rows.struct.unnest())
        return
    there = rows.is_not_null()
    found = wanted.contract.from_frame(rows.filter(there).struct.unnest())
    for is_there in there:
        yield next(found) if is_there else None
