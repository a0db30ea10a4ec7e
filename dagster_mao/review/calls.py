"""The calls that agents made: found by workflow or version, and what they came to in a line."""

from __future__ import annotations

import datetime as dt

import polars as pl

from dagster_mao.review.history import known
from dagster_mao.state import CALLS_SCHEMA, CallSummary, StateStore, When, passed

UNANSWERED = ("failed", "timed_out", "refused")
"""The outcomes of tries that brought no answer."""


def calls(store: StateStore, workflow: str, when: When | None = None, *, agent: str | None = None) -> pl.DataFrame:
    """Rows of `CALLS_SCHEMA` of a workflow's agents, or of one, in the order they began; of a version, those of the run that sealed it, its
    judges' among them;    of a moment, those that had begun by then.

    A workflow need have sealed nothing: calls of steps that failed are there too. Raises `UnknownVersionError` when there is neither such a
    workflow nor a call in it.
    """
    pipeline = workflow.partition("/")[0]
    seal = store.seal_at(workflow, when) if isinstance(when, int) else None
    until = passed(when) if isinstance(when, dt.datetime) else None
    callers = [agent] if agent and seal is None else store.callers(pipeline)
    if seal is not None:  # the agent's, and those of its judges
        callers = [caller for caller in callers if caller.partition(".")[0] == seal.agent]
    found = [store.calls(pipeline, caller, workflow) for caller in callers if agent in (None, caller)]
    rows = store.collect(pl.concat([pl.LazyFrame(schema=CALLS_SCHEMA), *found]).sort("started", "agent", "call", "number"))
    if rows.is_empty():
        known(store, workflow)
    if until is not None:
        return rows.filter(pl.col("started") <= until)
    return rows if seal is None else rows.filter(pl.col("run_id") == seal.run_id)


def told_of(came_to: CallSummary) -> str:
    """What calls came to, for people."""
    if not any((came_to.tries, came_to.reused, came_to.refused, came_to.fallbacks)):
        return "no calls"
    told = [_made(came_to)] if came_to.tries else []
    told += [f"{came_to.reused:,} answered before"] if came_to.reused else []
    told += [f"{came_to.refused:,} refused by an open breaker"] if came_to.refused else []
    told += [f"{came_to.fallbacks:,} answered by the fallback"] if came_to.fallbacks else []
    told += [f"{came_to.input_tokens:,} + {came_to.output_tokens:,} tokens"] if came_to.input_tokens or came_to.output_tokens else []
    told += [f"cost {came_to.cost:.6g}"] if came_to.cost else []
    return "; ".join(told)


def _made(came_to: CallSummary) -> str:
    unanswered = {"failed": came_to.failed, "timed out": came_to.timed_out}
    what = " and ".join(f"{count:,} {name}" for name, count in unanswered.items() if count)
    tries = f"{came_to.calls:,} call{'' if came_to.calls == 1 else 's'}"
    tries += f" in {came_to.tries:,} tries" if came_to.tries != came_to.calls else ""
    tries += f", of which {what} ({came_to.error_rate:.1%})" if what else ""
    return f"{tries}; p50 {_seconds(came_to.p50_seconds)}, p95 {_seconds(came_to.p95_seconds)}, p99 {_seconds(came_to.p99_seconds)}"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value * 1000:.3g} ms" if value < 1 else f"{value:.3g} s"
