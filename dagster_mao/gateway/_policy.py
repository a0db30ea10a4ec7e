"""What an agent's calls may cost and how they may fail: declared on the agent, enforced by the gateway."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from dagster_mao.errors import WiringError

_UNITS = {"second": 1.0, "minute": 60.0, "hour": 3600.0, "day": 86400.0}
_RATE = re.compile(r"(\d+)\s*/\s*(second|minute|hour|day)")


class TransientError(Exception):
    """Raised by an agent for what may go well next time. `retry_after`: seconds that the other side asked to wait."""

    def __init__(self, what: str = "", *, retry_after: float | None = None) -> None:
        super().__init__(what)
        self.retry_after = retry_after


@dataclass(frozen=True)
class Breaker:
    """A circuit breaker: after `fail_max` failures in a row no call is made for `reset_timeout` seconds, then one, as a probe.

    Its state is shared by all processes on one store. Agents whose breakers have the same `name` share one; by default each has its own.
    """

    fail_max: int = 5
    reset_timeout: float = 30.0
    name: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.fail_max, int) or self.fail_max < 1:
            raise _wrong("fail_max", self.fail_max, "a whole number from 1 on")
        _positive("reset_timeout", self.reset_timeout)


@dataclass(frozen=True)
class Policy:
    """How an agent is called.

    `timeout`: seconds that one try may take. `retries`: further tries after the first, on `transient` errors only, with exponential backoff
    and jitter, all within `retry_within` seconds; a `retry_after` of the error is honoured. `rate_limit`: calls over all processes, as in
    "60/minute"; agents with the same `rate_key` share it. `breaker`: see `Breaker`; of what `execute` raises, errors of `not_counted`
    classes are no failure of the called side. `isolate`: each call of a sync agent runs in a child process that can be killed.

    `token_limit`: tokens over all processes, as in "100000/minute", shared like `rate_limit`; until a call's tokens are known it counts as
    `tokens_per_call`. `fallback`: a function with the parameters of `execute`, or another agent, that answers where the calls finally
    failed. `when_open` says what becomes of the records whose calls an open breaker refuses: "fail" the batch, take the "fallback" (the
    default where there is one), or "defer" them to the next run. `keep_answers`: seconds for which an answer is kept and the same call is
    not made again; 0 keeps none.
    """

    timeout: float | None = None
    retries: int = 0
    retry_within: float = 120.0
    transient: tuple[type[BaseException], ...] = (TransientError, ConnectionError, TimeoutError)
    rate_limit: str | None = None
    rate_key: str | None = None
    breaker: Breaker | None = None
    not_counted: tuple[type[BaseException], ...] = ()
    isolate: bool = False
    token_limit: str | None = None
    tokens_per_call: int = 1000
    fallback: Callable[..., Any] | None = None
    when_open: Literal["fail", "fallback", "defer"] | None = None
    keep_answers: float = 7 * 86400.0

    def __post_init__(self) -> None:
        if self.timeout is not None:
            _positive("timeout", self.timeout)
        if not isinstance(self.retries, int) or self.retries < 0:
            raise _wrong("retries", self.retries, "a whole number from 0 on")
        _positive("retry_within", self.retry_within)
        if self.rate_limit is not None:
            parse_rate(self.rate_limit)
        if self.isolate and self.timeout is None:
            raise _wrong("isolate", True, "give a timeout: a child process is only worth its cost if it can be killed")

    @property
    def is_shared(self) -> bool:
        """Whether processes must agree on it: it has a breaker or a rate limit."""
        return self.breaker is not None or self.rate_limit is not None


def parse_rate(text: str) -> tuple[int, float]:
    """Calls, and seconds in which they may be made: (60, 60.0) for "60/minute". Raises WiringError."""
    found = _RATE.fullmatch(text.strip()) if isinstance(text, str) else None
    if found is None or int(found[1]) < 1:
        raise _wrong("rate_limit", text, 'write "60/minute": a number, and second, minute, hour or day')
    return int(found[1]), _UNITS[found[2]]


def _positive(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise _wrong(name, value, "a number of seconds above 0")


def _wrong(name: str, value: object, fix: str) -> WiringError:
    return WiringError(f"A policy's `{name}` is {value!r}", field=name, fix=fix)
