"""What is told of a call: by the gateway, try by try, and by the agent's code, what the call used."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
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


Observe = Callable[[CallRecord], object]


class Used(NamedTuple):
    """What a call used, as told by `usage`. Tokens are None where nothing was said of them."""

    model: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    cost: float = 0.0

    def columns(self) -> tuple[str | None, int, int, float]:
        """As in a `CallRecord`."""
        return self.model, self.input_tokens or 0, self.output_tokens or 0, self.cost

    @property
    def tokens(self) -> int | None:
        if self.input_tokens is None and self.output_tokens is None:
            return None
        return (self.input_tokens or 0) + (self.output_tokens or 0)


sink: ContextVar[Callable[[Used], object] | None] = ContextVar("mao_usage", default=None)
"""Where `usage` tells it in this thread or task, and in those that are started with its context."""


def usage(
    *, input_tokens: int | None = None, output_tokens: int | None = None, cost: float | None = None, model: str | None = None
) -> None:
    """Tells the gateway, from inside `execute`, what the call at hand used; adds to what was told before.

    `cost` in whatever currency all agents of a store use. None says nothing: in the call log it is 0, and a call that says nothing of its
    tokens counts in a token limit as estimated, one that says 0 as 0. What a call told before it failed, or before its timeout was over,
    counts too. Outside of a call (a unit test) it does nothing; nor in a process that `execute` starts, or in a thread that it starts
    without its context (`asyncio.to_thread` takes it along).
    """
    tell = sink.get()
    if tell is not None:
        tell(Used(None if model is None else str(model), _whole(input_tokens), _whole(output_tokens), float(cost or 0.0)))


@contextmanager
def overheard() -> Iterator[list[Used]]:
    """What is told in its block, for whoever wants to know it too: it goes on to the gateway."""
    outer, told = sink.get(), list[Used]()

    def tell(used: Used) -> None:
        told.append(used)
        if outer is not None:
            outer(used)

    token = sink.set(tell)
    try:
        yield told
    finally:
        sink.reset(token)


def _whole(number: int | None) -> int | None:
    return None if number is None else int(number)


def total(told: Sequence[Used]) -> Used:
    """All of it together; the model is that of the last who named one."""
    if len(told) == 1:
        return told[0]
    model = next((used.model for used in reversed(told) if used.model is not None), None)
    return Used(model, _sum(used.input_tokens for used in told), _sum(used.output_tokens for used in told), sum(used.cost for used in told))


def _sum(numbers: Iterable[int | None]) -> int | None:
    said = [number for number in numbers if number is not None]
    return sum(said) if said else None


def class_of(error: BaseException) -> str:
    """The class of an error, which is all that is told of it: its text may hold values."""
    cls = type(error)
    return cls.__qualname__ if cls.__module__ in ("builtins", "__main__") else f"{cls.__module__}.{cls.__qualname__}"
