"""One agent's calls: each passes its breaker, its rate limit and its timeout, and is tried again where that may help."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dagster_mao.correlation import WorkflowLog
from dagster_mao.errors import BreakerOpenError, CallTimeoutError, WiringError
from dagster_mao.gateway._policy import Policy, parse_rate
from dagster_mao.gateway._record import CallOutcome, CallRecord, Observe, Used, class_of, sink, total
from dagster_mao.gateway._retry import aretry_call, retry_call
from dagster_mao.gateway._timeout import acall, call_in_child, call_in_thread, strays

if TYPE_CHECKING:
    import datetime as dt

    from dagster_mao.gateway._breaker import Admission, Probing, SharedBreaker
    from dagster_mao.gateway._quota import Quota, Reserved
    from dagster_mao.gateway._shared import SharedStore

_LONG_WAIT = 60.0  # seconds of a wait for a limit that are told, and between two such words

Pause = Callable[[float], object]

logger = WorkflowLog(logging.getLogger("dagster_mao.gateway"))


class Gateway:
    """What the calls of one agent pass through. `name` is that of its breaker and of its rate limit, unless the policy names others.

    `database` is where breakers, limits and answers are shared; a policy that `is_shared` needs it. Raises `WiringError`
    when it is missing.
    """

    def __init__(self, policy: Policy, name: str, database: str | None) -> None:
        self._policy, self._name = policy, name
        self._tell_at = -math.inf
        self._breaker: SharedBreaker | None = None
        self._quota: Quota | None = None
        if not policy.is_shared:
            return
        if database is None:
            raise WiringError(
                "Breakers, limits and kept answers are shared through an SQL database, and none is named",
                field="database",
                fix="give the state store one: `database=` a URL `postgresql://user@host/database`, or, for one host, the path of an "
                "SQLite file; or share nothing: a policy with `keep_answers=0`, no breaker and no limits",
            )
        # SQLAlchemy and pybreaker are imported by steps that need them.
        if policy.breaker is not None:
            from dagster_mao.gateway._breaker import SharedBreaker

            # A probe may take as long as a call may, and a while more.
            lease = max(60.0, policy.breaker.reset_timeout, 2 * (policy.timeout or 0.0))
            self._breaker = SharedBreaker(
                shared_store(database), policy.breaker.name or name, policy.breaker, not_counted=policy.not_counted, lease=lease
            )
        if policy.rate_limit is not None or policy.token_limit is not None:
            from dagster_mao.gateway._limit import Limiter
            from dagster_mao.gateway._quota import Quota

            shared, key = shared_store(database), policy.rate_key or name
            self._quota = Quota(
                Limiter(shared, key, *parse_rate(policy.rate_limit)) if policy.rate_limit else None,
                Limiter(shared, f"tokens of {key}", *parse_rate(policy.token_limit)) if policy.token_limit else None,
                policy.tokens_per_call,
            )

    def call(self, function: Callable[..., Any], *args: Any, observe: Observe | None = None, pause: Pause | None = None) -> Any:
        """What the function returns. Raises what its last try raised, `CallTimeoutError`, or `BreakerOpenError`.

        `observe` is told each try when it has ended, also one that an open breaker refused; it must not raise. `pause` waits so many
        seconds, for a limit or the next try (`time.sleep`); what it raises ends the call, and what was reserved for it is given back.
        """
        pause = pause or time.sleep
        if self._policy.retries == 0:
            return self._try(function, args, 1, observe, pause)
        return retry_call(self._policy, lambda number: self._try(function, args, number, observe, pause), sleep=pause)

    async def acall(self, function: Callable[..., Awaitable[Any]], *args: Any, observe: Observe | None = None) -> Any:
        """As `call`, for what is awaited."""
        if self._policy.retries == 0:
            return await self._atry(function, args, 1, observe)
        return await aretry_call(self._policy, lambda number: self._atry(function, args, number, observe))

    def _try(self, function: Callable[..., Any], args: tuple[Any, ...], number: int, observe: Observe | None, pause: Pause) -> Any:
        admission, reserved = self._entered(observe, pause) if self._is_guarded else (None, None)
        if admission is None and reserved is None and observe is None:
            return self._timed(function, args)
        with _Try(number, admission, observe, self._quota, reserved):
            return self._timed(function, args)

    def _entered(self, observe: Observe | None, pause: Pause) -> tuple[Admission | None, Reserved | None]:
        """Admitted by the breaker, with what the limits have reserved for it: the call is to be made now."""
        try:
            while True:
                entered = self._enter()
                if entered is not None and entered.is_held_up:
                    entered = entered.admitted()
                if self._quota is None:
                    return entered, None
                with _given_back(entered):
                    reserved = self._quota.reserve()
                if not reserved.wait:
                    return entered, reserved
                # It may be longer than a probe's lease, and the breaker may open meanwhile.
                _release(entered)
                with self._returning(reserved):
                    pause(reserved.wait)
                    entered = self._enter()
                    if entered is None or not entered.is_held_up:
                        return entered, reserved
                self._quota.give_back(reserved)  # a probe may take longer than a reservation holds
        except Exception as error:
            _not_made(error, observe)
            raise

    def _timed(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if self._policy.timeout is None:
            return function(*args)
        timed = call_in_child if self._policy.isolate else call_in_thread
        try:
            return timed(function, args, {}, timeout=self._policy.timeout)
        except CallTimeoutError:
            if going_on := strays():
                logger.warning("%d calls of this process go on after their timeout, and may still take effect", going_on)
            raise

    async def _atry(self, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...], number: int, observe: Observe | None) -> Any:
        admission, reserved = await self._aentered(observe) if self._is_guarded else (None, None)
        if admission is None and reserved is None and observe is None:
            return await self._atimed(function, args)
        with _Try(number, admission, observe, self._quota, reserved):
            return await self._atimed(function, args)

    async def _aentered(self, observe: Observe | None) -> tuple[Admission | None, Reserved | None]:
        try:
            while True:
                entered = self._enter()
                if entered is not None and entered.is_held_up:
                    entered = await entered.aadmitted()
                if self._quota is None:
                    return entered, None
                with _given_back(entered):
                    reserved = await self._quota.areserve()
                if not reserved.wait:
                    return entered, reserved
                _release(entered)
                with self._returning(reserved):
                    await asyncio.sleep(reserved.wait)
                    entered = self._enter()
                    if entered is None or not entered.is_held_up:
                        return entered, reserved
                self._quota.give_back(reserved)
        except Exception as error:
            _not_made(error, observe)
            raise

    def _atimed(self, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> Awaitable[Any]:
        return function(*args) if self._policy.timeout is None else acall(function, args, {}, timeout=self._policy.timeout)

    def _enter(self) -> Admission | Probing | None:
        return self._breaker.enter() if self._breaker else None

    @property
    def _is_guarded(self) -> bool:
        return self._breaker is not None or self._quota is not None

    @contextmanager
    def _returning(self, reserved: Reserved) -> Iterator[None]:
        """What was reserved and not used, because the wait was interrupted or the breaker opened, is for others."""
        if reserved.wait >= _LONG_WAIT and (now := time.monotonic()) >= self._tell_at:
            self._tell_at = now + _LONG_WAIT
            logger.warning("a call of %s waits for its limit: %.0f seconds", self._name, reserved.wait)
        try:
            yield
        except BaseException:
            if self._quota is not None:
                self._quota.give_back(reserved)
            raise

    def closed_since(self) -> dt.datetime | None:
        """When its breaker closed, which had been open; None while it is not closed, or where there is none. Raises `StoreError`."""
        return self._breaker.closed_since() if self._breaker else None

    def flush(self) -> None:
        """Tells other processes what this one knows of breaker and limits and has not told yet: at the end of a step."""
        if self._quota is not None:
            self._quota.flush()
        if self._breaker is not None:
            self._breaker.flush()


class _Try:
    """One try, while the call runs.

    How it went is told to the breaker, the tokens it used to the token limit, and all of it to `observe`.
    """

    __slots__ = ("_admission", "_begun", "_is_metered", "_number", "_observe", "_quota", "_reserved", "_started", "_token", "_told")

    def __init__(
        self, number: int, admission: Admission | None, observe: Observe | None, quota: Quota | None, reserved: Reserved | None
    ) -> None:
        self._number, self._admission, self._observe, self._quota, self._reserved = number, admission, observe, quota, reserved
        self._is_metered = observe is not None or (reserved is not None and reserved.tokens is not None)

    def __enter__(self) -> None:
        if self._is_metered:
            self._told: list[Used] = []
            self._token = sink.set(self._told.append)
            self._started, self._begun = time.time(), time.perf_counter()

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        latency = time.perf_counter() - self._begun if self._is_metered else 0.0
        if (admission := self._admission) is not None:
            if error is None:
                admission.succeeded()
            elif isinstance(error, Exception):
                admission.failed(error)
            else:  # the step was interrupted, which says nothing about the called side
                admission.released()
        if self._is_metered:
            with suppress(ValueError):  # a coroutine that nobody awaits any more is closed in another context, with another sink
                sink.reset(self._token)
            used = total(self._told) if self._told else _NOTHING
            if self._quota is not None and self._reserved is not None and self._reserved.tokens is not None:
                self._quota.used(self._reserved, used.tokens, error)
            if self._observe is not None:
                self._observe(self._record(latency, error, used))

    def _record(self, latency: float, error: BaseException | None, used: Used) -> CallRecord:
        outcome: CallOutcome = "answered" if error is None else "timed_out" if isinstance(error, CallTimeoutError) else "failed"
        admission = self._admission
        name = None if error is None else class_of(error)
        breaker = None if admission is None else "half-open" if admission.is_probe else "closed"
        # Quicker than by its name, and made for every call.
        return CallRecord._make((self._number, self._started, latency, outcome, name, *used.columns(), breaker))


_NOTHING = Used()


def _not_made(error: Exception, observe: Observe | None) -> None:
    """Tells what kept a call from being made."""
    if observe is not None:
        refused = isinstance(error, BreakerOpenError)
        observe(CallRecord(0, time.time(), 0.0, "refused" if refused else "failed", class_of(error), breaker="open" if refused else None))


@contextmanager
def _given_back(admission: Admission | None) -> Iterator[None]:
    """An admission that came to no call is for others."""
    try:
        yield
    except BaseException:
        _release(admission)
        raise


def _release(admission: Admission | None) -> None:
    if admission:
        admission.released()


@lru_cache(maxsize=8)
def shared_store(database: str) -> SharedStore:
    """The store at a URL or path; one per process, because it holds connections."""
    from dagster_mao.gateway._shared import SharedStore

    return SharedStore(database)
