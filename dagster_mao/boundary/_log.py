"""What the calls of a step told, as rows of the agent's table of calls."""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

import polars as pl

from dagster_mao.boundary._scratch import Scratch, Spool
from dagster_mao.gateway import CallRecord
from dagster_mao.state import CALLS_SCHEMA, CallSummary, StateStore

if TYPE_CHECKING:
    from dagster_mao.gateway import Unlogged

_AT_A_TIME = 10_000
_TOLD: dict[str, Any] = {
    "number": pl.Int64,
    "started": pl.Float64,
    "latency_seconds": pl.Float64,
    "outcome": pl.String,
    "error": pl.String,
    "model": pl.String,
    "input_tokens": pl.Int64,
    "output_tokens": pl.Int64,
    "cost": pl.Float64,
    "breaker": pl.String,
}  # the fields of a CallRecord, by the names of the table


class CallLog:
    """One step's rows, held as columns, and on the disk once they are many.

    `about`: what all of them have in common. `tell` may be called by any thread; the rest by the step's own.
    """

    def __init__(self, store: StateStore, pipeline: str, agent: str, scratch: Scratch, about: dict[str, Any]) -> None:
        self._store, self._pipeline, self._agent, self._about = store, pipeline, agent, about
        # Appended to by any thread, emptied by one: neither waits for the other.
        self._told: deque[tuple[str, str | None, CallRecord]] = deque()
        self._rows = Spool(scratch, CALLS_SCHEMA)
        self._writer: threading.Thread | None = None
        self._written: bool | None = None
        self.tell = self._told.append

    def settle(self) -> None:
        """Makes rows of what was told: to be called now and then."""
        while self._told:
            told = [self._told.popleft() for _ in range(min(len(self._told), _AT_A_TIME))]
            self._rows.append(_frame(told).with_columns(**{name: pl.lit(value) for name, value in self._about.items()}).select(_COLUMNS))

    def answered(self, calls: Sequence[str], records: Sequence[str | None], started: Sequence[float], seconds: Sequence[float]) -> None:
        """Calls that were answered at the first try and used nothing that anybody told of."""
        columns = {"call": calls, "record": records, "started": started, "latency_seconds": seconds}
        told = {
            "number": pl.lit(1),
            "outcome": pl.lit("answered"),
            "input_tokens": pl.lit(0),
            "output_tokens": pl.lit(0),
            "cost": pl.lit(0.0),
        }
        rest = dict.fromkeys(("error", "model", "breaker"), pl.lit(None))
        frame = pl.DataFrame(columns, schema={name: _SCHEMA[name] for name in columns}).with_columns(_moment, **told, **rest)
        self._rows.append(frame.with_columns(**{name: pl.lit(value) for name, value in self._about.items()}).select(_COLUMNS))

    def adopt(self, unlogged: Iterable[Unlogged]) -> None:
        """Adds the calls of steps that were killed before they logged them."""
        for of, calls in itertools.groupby(unlogged, key=lambda one: (one.attempt, one.run_id, tuple(sorted(one.about.items())))):
            attempt, run_id, about = of
            own = {**self._about, "agent_version": None, **dict(about), "attempt": attempt, "run_id": run_id}
            for told in _bites((call.key, call.record, call.told) for call in calls):
                self._rows.append(_frame(told).with_columns(**{name: pl.lit(value) for name, value in own.items()}).select(_COLUMNS))

    def summary(self) -> CallSummary:
        """What it all came to."""
        self.settle()
        return CallSummary.of(self._rows.rows_held()) if self._rows.rows else CallSummary()

    def rows(self) -> pl.LazyFrame:
        """All of them, as `CALLS_SCHEMA` says."""
        return self._rows.scan()

    def begin(self) -> None:
        """Begins to write what there is to the table, while the step goes on to its seal."""
        self.settle()
        if self._rows.rows and self._writer is None:
            self._writer = threading.Thread(target=copy_context().run, args=(self._write,), name="mao-calls", daemon=True)
            self._writer.start()

    def end(self) -> bool:
        """Whether the table has all rows now. What it does not take is told in the log, and fails nothing."""
        self.begin()
        if self._writer is not None:
            self._writer.join()
        return self._written is not False

    def _write(self) -> None:
        self._written = self._store.add_calls(self._pipeline, self._agent, self._rows.scan())


_SCHEMA = pl.Schema({"call": pl.String, "record": pl.String, **_TOLD})
_moment = (pl.col("started") * 1e6).round().cast(pl.Int64).cast(pl.Datetime("us", "UTC"))
_COLUMNS = [pl.col(name).cast(dtype) for name, dtype in CALLS_SCHEMA.items()]


def _frame(told: list[tuple[str, str | None, CallRecord]]) -> pl.DataFrame:
    calls, records, tries = zip(*told, strict=True)
    columns = dict(zip(_TOLD, zip(*tries, strict=True), strict=True))
    return pl.DataFrame({"call": calls, "record": records, **columns}, schema=_SCHEMA).with_columns(_moment)


def _bites(rows: Iterable[Any]) -> Iterator[list[Any]]:
    rest = iter(rows)
    while bite := list(itertools.islice(rest, _AT_A_TIME)):
        yield bite
