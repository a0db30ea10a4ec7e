"""Tries: what may go well next time is called again, later each time, within limits of number and time."""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from dagster_mao.errors import MaoError
from dagster_mao.gateway._policy import Policy

T = TypeVar("T")
Uniform = Callable[[float, float], float]

FIRST_WAIT = 0.5  # seconds before the first retry, doubled before each further one
LONGEST_WAIT = 30.0
_CAUSES = 5  # how far down its causes an error is asked for a Retry-After

# Before Python 3.11 these are no TimeoutError yet.
_TIMEOUTS = (asyncio.TimeoutError, concurrent.futures.TimeoutError)


def retry_call(
    policy: Policy,
    function: Callable[[int], T],
    *,
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
    uniform: Uniform = random.uniform,
) -> T:
    """What `function` returns, called with the number of the try, from 1 on, until it returns or the tries are used up.

    Only the policy's `transient` errors are tried again; of ours none that ends the step, such as `BreakerOpenError`. Waits half to all
    of 0.5, 1, 2 … 30 seconds, at random, and never less than the other side asked for (`retry_after`, or the Retry-After header of an
    HTTP client's error). No wait ends later than `retry_within` seconds after the first error: where it would, and after the last try,
    the last error is raised as it is, at once.
    """
    waits = _Waits(policy, clock, uniform)
    number = 1
    while True:
        try:
            return function(number)
        except Exception as error:
            if (wait := waits.after(error)) is None:
                raise
        sleep(wait)
        number += 1


async def aretry_call(
    policy: Policy,
    function: Callable[[int], Awaitable[T]],
    *,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    clock: Callable[[], float] = time.monotonic,
    uniform: Uniform = random.uniform,
) -> T:
    """As `retry_call`, for what is awaited."""
    waits = _Waits(policy, clock, uniform)
    number = 1
    while True:
        try:
            return await function(number)
        except Exception as error:
            if (wait := waits.after(error)) is None:
                raise
        await sleep(wait)
        number += 1


class _Waits:
    """The waits between the tries of one call."""

    __slots__ = ("_clock", "_deadline", "_failed", "_policy", "_uniform")

    def __init__(self, policy: Policy, clock: Callable[[], float], uniform: Uniform) -> None:
        self._policy, self._clock, self._uniform = policy, clock, uniform
        self._failed = 0
        self._deadline = math.inf

    def after(self, error: Exception) -> float | None:
        """Seconds until the next try; None when there is to be none."""
        now = self._clock()
        if self._failed == 0:
            # From the first error on: a call may have waited long for its rate limit before.
            self._deadline = now + self._policy.retry_within
        self._failed += 1
        if self._failed > self._policy.retries or not is_transient(self._policy, error):
            return None
        longest = min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** min(self._failed - 1, 30))
        wait = self._uniform(longest / 2, longest)
        asked = retry_after(error)
        if asked is not None:
            # Whoever was told the same must not come back at the same moment.
            wait = max(wait, asked + self._uniform(0.0, max(FIRST_WAIT, asked / 10)))
        return wait if now + wait <= self._deadline else None


def is_transient(policy: Policy, error: BaseException) -> bool:
    """Whether the policy lets the error be tried again."""
    if not isinstance(error, Exception) or (isinstance(error, MaoError) and not error.of_one_call):
        return False
    return isinstance(error, policy.transient) or (TimeoutError in policy.transient and isinstance(error, _TIMEOUTS))


def retry_after(error: BaseException, *, wall: Callable[[], float] = time.time) -> float | None:
    """Seconds that the other side asked to wait; None when it did not ask.

    Of the error or what caused it: an attribute `retry_after`, or the header in `response.headers`, `headers`, or what botocore has.
    """
    for link in _causes(error):
        asked = _seconds(getattr(link, "retry_after", None))
        if asked is None:
            asked = _of_headers(_headers(link), wall)
        if asked is not None:
            return asked
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    for _ in range(_CAUSES):
        if link is None:
            return
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _headers(error: BaseException) -> Mapping[str, str]:
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):  # botocore
        found = response.get("ResponseMetadata", {})
        headers = found.get("HTTPHeaders") if isinstance(found, Mapping) else None
    else:
        headers = getattr(response, "headers", None) or getattr(error, "headers", None)
    try:
        return {str(name).lower(): str(value) for name, value in headers.items()} if headers else {}
    except (AttributeError, TypeError, ValueError):
        return {}


def _of_headers(headers: Mapping[str, str], wall: Callable[[], float]) -> float | None:
    if (milliseconds := _seconds(headers.get("retry-after-ms"))) is not None:
        return milliseconds / 1000
    text = headers.get("retry-after")
    if (seconds := _seconds(text)) is not None:
        return seconds
    if (until := _date(text)) is None:
        return None
    # A date is by the clock of whoever wrote it, which is also in the answer's Date.
    since = _date(headers.get("date"))
    return max(0.0, until - (wall() if since is None else since))


def _seconds(value: Any) -> float | None:
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return seconds if 0 <= seconds < math.inf else None


def _date(text: str | None) -> float | None:
    try:
        return parsedate_to_datetime(text or "").timestamp()
    except (TypeError, ValueError, IndexError, OverflowError):
        return None
