"""What is told of a call: by the gateway, try by try, and by the agent's code, what the call used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal, NamedTuple

CallOutcome = Literal["answered", "failed", "timed_out", "refused", "reused", "fallback"]
"""How a try ended. `refused`: the breaker was open, no call was made. `reused`: answered before, no call was made. `fallback`: the fallback
answered in the agent's place."""


class CallRecord(NamedTuple):
    """One try of one call. `started` in seconds since the epoch, `latency` in seconds (waits for the rate limit are not in it)."""

    number: int  # of the try, from 1 on; 0 where no call was made
    started: float
    latency: float
    outcome: CallOutcome
    error: str | None = None  # the class of the error
    model: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0
    breaker: str | None = None  # its state when the call was admitted: closed, open, half-open; None without a breaker


@dataclass
class Usage:
    """What one try has used until now, as told by `usage`."""

    model: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0


_usage: ContextVar[Usage | None] = ContextVar("mao_usage", default=None)


def usage(*, input_tokens: int = 0, output_tokens: int = 0, cost: float = 0.0, model: str | None = None) -> None:
    """Tells the gateway, from inside `execute`, what the call at hand used; adds to what was told before.

    `cost` in whatever currency all agents of a store use. Outside of a call (a unit test) it does nothing.
    """
    told = _usage.get()
    if told is None:
        return
    told.input_tokens += input_tokens
    told.output_tokens += output_tokens
    told.cost += cost
    told.model = model or told.model


@contextmanager
def metered() -> Iterator[Usage]:
    """Collects what `usage` is told inside."""
    collected = Usage()
    token = _usage.set(collected)
    try:
        yield collected
    finally:
        _usage.reset(token)
