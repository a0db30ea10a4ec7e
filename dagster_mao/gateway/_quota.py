"""What a call may use: a permit of the rate limit, and tokens of the token limit, both at the same moment."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import NamedTuple

from dagster_mao.correlation import WorkflowLog
from dagster_mao.errors import CallTimeoutError, StoreError
from dagster_mao.gateway._limit import Limiter, Permit

_LOG = WorkflowLog(logging.getLogger("dagster_mao.gateway"))
_REMEMBERED = 32  # calls, about, whose tokens make the estimate


class Reserved(NamedTuple):
    """What a call may use after so many seconds: a permit of the rate limit, and an estimate of its tokens, where there are such limits."""

    wait: float
    permit: Permit | None
    tokens: Permit | None


class Quota:
    """The limits of one agent's calls. `tokens_per_call` is the first estimate of what a call uses.

    Both limits are shared with other processes; a call's reservations lie so close together that each is used within its limit's slack.
    `clock` is that of the limiters.
    """

    def __init__(
        self,
        calls: Limiter | None,
        tokens: Limiter | None,
        tokens_per_call: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._calls, self._tokens, self._clock = calls, tokens, clock
        self._mean, self._known = float(tokens_per_call), 0
        self._waiting: list[_Correction] = []
        self._lock = threading.Lock()  # of what waits; held for an instant

    @property
    def estimate(self) -> int:
        """Tokens that the next call is expected to use: as declared, then as those used on average that this process saw."""
        assert self._tokens is not None
        return min(self._tokens.calls, max(1, math.ceil(self._mean)))

    def reserve(self) -> Reserved:
        """What the next call needs. Raises `StoreError`; nothing stays reserved then."""
        if self._tokens is None:
            assert self._calls is not None
            permit = self._calls.reserve()
            return Reserved(permit, permit, None)
        if self._calls is None:
            tokens = self._tokens.reserve(self.estimate)
            return Reserved(tokens, None, tokens)
        return self._both(self._calls, self._tokens)

    def _both(self, calls: Limiter, tokens: Limiter) -> Reserved:
        """Each limit in turn, not before the other has room, until both have at the same moment."""
        permit = spent = None
        try:
            permit = calls.reserve()
            permit_at = self._clock() + permit
            spent = tokens.reserve(self.estimate, not_before=permit_at)
            spent_at = self._clock() + spent
            while abs(permit_at - spent_at) > (calls if permit_at < spent_at else tokens).slack / 2:
                if permit_at < spent_at:
                    calls.settle((permit, 0))
                    permit = calls.reserve(not_before=spent_at)
                    permit_at = self._clock() + permit
                else:
                    tokens.settle((spent, 0))
                    spent = tokens.reserve(spent.permits, not_before=permit_at)
                    spent_at = self._clock() + spent
            return Reserved(max(0.0, permit_at - self._clock(), spent_at - self._clock()), permit, spent)
        except BaseException:
            self.give_back(Reserved(0.0, permit, spent))
            raise

    async def areserve(self) -> Reserved:
        """As `reserve`, without holding up the event loop. Nothing stays reserved for whoever is cancelled meanwhile."""
        if self._tokens is None and self._calls is not None and (held := self._calls.held()) is not None:
            return Reserved(held, held, None)
        job = _pool().submit(self.reserve)
        try:
            return await asyncio.wrap_future(job)
        except asyncio.CancelledError:
            if not job.cancelled():
                job.add_done_callback(self._unwanted)
            raise

    def _unwanted(self, job: Future[Reserved]) -> None:
        if not job.cancelled() and job.exception() is None:
            self.give_back(job.result())

    def give_back(self, reserved: Reserved) -> None:
        """The call was not made after all: what was reserved for it is for others. Raises nothing."""
        self._corrected((self._calls, reserved.permit, 0), (self._tokens, reserved.tokens, 0))

    def used(self, reserved: Reserved, tokens: int | None, error: BaseException | None) -> None:
        """A call that had this reserved has ended, and told so many tokens; None where it told nothing of them. Raises nothing.

        What it told counts from now on. One that was answered and told nothing counts as estimated; so does at least one that was ended
        before it could tell all, for it may have used as many. One that failed and told nothing used none.
        """
        if reserved.tokens is None:
            return
        estimate = reserved.tokens.permits
        if error is None:
            counts = estimate if tokens is None else tokens
            if tokens:  # none at all says nothing of the next call's
                self._saw(tokens)
        elif isinstance(error, CallTimeoutError) or not isinstance(error, Exception):
            counts = max(tokens or 0, estimate)
        else:
            counts = tokens or 0
        self._corrected((self._tokens, reserved.tokens, max(0, counts)))

    def _saw(self, tokens: int) -> None:
        # No lock: of two threads that come at once one may be left out of an average.
        self._known += 1
        self._mean += (tokens - self._mean) / min(self._known, _REMEMBERED)

    def _corrected(self, *corrections: _Correction) -> None:
        """At once, or, where that would hold up an event loop, in the thread that reserves for it: many together, if there are many."""
        wanted = [(limiter, permit, used) for limiter, permit, used in corrections if permit is not None and used != permit.permits]
        if not wanted:
            return
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            _correct(wanted)
            return
        with self._lock:
            is_first = not self._waiting
            self._waiting.extend(wanted)
        if is_first:
            with suppress(RuntimeError):  # the interpreter ends and starts nothing any more
                _pool().submit(self._correct_waiting)

    def _correct_waiting(self) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, []
        _correct(waiting)

    def flush(self) -> None:
        """Waits until all of it is told."""
        if _threads is not None:
            _threads.submit(self._correct_waiting).result()


_Correction = tuple[Limiter | None, Permit | None, int]


def _correct(corrections: Sequence[_Correction]) -> None:
    by_limiter = defaultdict[Limiter, list[tuple[Permit, int]]](list)
    for limiter, permit, used in corrections:
        if limiter is not None and permit is not None:
            by_limiter[limiter].append((permit, used))
    for limiter, uses in by_limiter.items():
        try:
            limiter.settle(*uses)
        except StoreError as error:  # it must not hide what became of the call; what was reserved counts until it leaves the window
            _LOG.warning("what calls used of the limit %r could not be told: %s", limiter.key, error)


# -- for event loops -----------------------------------------------------------------------------------------------------------------

# A thread of our own: asyncio's may all be busy with what agents do in theirs. One is enough, and keeps the order.
_threads: ThreadPoolExecutor | None = None


def _pool() -> ThreadPoolExecutor:
    global _threads  # noqa: PLW0603
    if _threads is None:
        _threads = ThreadPoolExecutor(1, thread_name_prefix="mao-limits")
    return _threads


def _after_fork_in_child() -> None:
    global _threads  # noqa: PLW0603
    _threads = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
