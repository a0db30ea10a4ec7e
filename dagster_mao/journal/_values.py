"""Values that come from an agent's code: results of effects as JSON, and the rows of a batch with their digests."""

from __future__ import annotations

import hashlib
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

import polars as pl
from pydantic import BaseModel
from pydantic_core import PydanticSerializationError, from_json, to_json

from dagster_mao.errors import InvalidRecordsError

_ROWS = 10_000


_AWAITED = " "  # before the JSON, which does not mind


def json_of(value: Any, *, awaited: bool = False) -> str | None:
    """The value as JSON; None for what has none. It tells whether it was `awaited`: then it will be whenever it is asked for."""
    try:
        return (_AWAITED if awaited else "") + to_json(value).decode()
    except (PydanticSerializationError, ValueError, RecursionError):
        return None


def value_of(told: str) -> Any:
    return from_json(told)


def rows_of(records: Any, key: str | None, agent: str) -> Iterator[tuple[str, Any]]:
    """The rows of a frame, or of an iterable of dicts or models, each with its record's key as text."""
    rows: Iterable[Any] = records
    if isinstance(records, pl.LazyFrame):
        records = records.collect(engine="streaming")
    if isinstance(records, pl.DataFrame):
        rows = (row for part in records.iter_slices(_ROWS) for row in part.iter_rows(named=True))
    seen: set[str] = set()
    for row in rows:
        values = row if isinstance(row, Mapping) else vars(row)
        if key is None or key not in values or values[key] is None:
            raise InvalidRecordsError(f"A record of a batch of effects has no {key!r}", agent=agent, field=key, fix="name the key: key=...")
        record = str(values[key])
        if record in seen:
            raise InvalidRecordsError(
                "A record comes twice in a batch of effects", agent=agent, field=key, fix="one row per record, or two batches of two names"
            )
        seen.add(record)
        yield record, row


def digest_of(row: Any) -> str:
    """sha256 of a row's values by name, in whatever order they stand."""
    values = row.model_dump() if isinstance(row, BaseModel) else row
    told = to_json({name: values[name] for name in sorted(values)}, inf_nan_mode="strings", bytes_mode="base64", fallback=repr)
    return hashlib.sha256(told).hexdigest()


def driven(steps: Generator[Any, Any, Any]) -> Any:
    """What a generator returns. If it yields something to be awaited: a coroutine that awaits it, and returns that in the end."""
    try:
        waiting = next(steps)
    except StopIteration as stop:
        return stop.value
    return _awaiting(steps, waiting)


def was_awaited(told: str | None) -> bool:
    return told is not None and told.startswith(_AWAITED)


async def nothing() -> None:
    """What a generator yields to `driven` so that what it returns is awaited."""


async def _awaiting(steps: Generator[Any, Any, Any], waiting: Any) -> Any:
    while True:
        try:
            try:
                answer = await waiting
            except BaseException as error:
                waiting = steps.throw(error)
            else:
                waiting = steps.send(answer)
        except StopIteration as stop:
            return stop.value
