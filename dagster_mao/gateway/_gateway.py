"""One agent's calls: each passes its breaker, its rate limit and its timeout, and is tried again where that may help."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dagster_mao.errors import WiringError
from dagster_mao.gateway._policy import Policy, parse_rate
from dagster_mao.gateway._retry import aretry_call, retry_call
from dagster_mao.gateway._timeout import acall, call_in_child, call_in_thread

if TYPE_CHECKING:
    from dagster_mao.gateway._breaker import Admission, SharedBreaker
    from dagster_mao.gateway._limit import Limiter
    from dagster_mao.gateway._shared import SharedStore


class Gateway:
    """What the calls of one agent pass through. `name` is that of its breaker and of its rate limit, unless the policy names others.

    `database` is where breakers and limits are shared; a policy without them needs none. Raises `WiringError` when it is missing.
    """

    def __init__(self, policy: Policy, name: str, database: str | None) -> None:
        self._policy = policy
        self._breaker: SharedBreaker | None = None
        self._limiter: Limiter | None = None
        if not policy.is_shared:
            return
        if database is None:
            raise WiringError(
                "Breakers and rate limits are shared through an SQL database, and none is named",
                field="database",
                fix="give the state store a database: `postgresql://user@host/database`, or, for one host, the path of an SQLite file",
            )
        # SQLAlchemy and pybreaker are imported by steps that need them.
        from dagster_mao.gateway._breaker import SharedBreaker
        from dagster_mao.gateway._limit import Limiter

        shared = shared_store(database)
        if policy.breaker is not None:
            self._breaker = SharedBreaker(shared, policy.breaker.name or name, policy.breaker, not_counted=policy.not_counted)
        if policy.rate_limit is not None:
            self._limiter = Limiter(shared, policy.rate_key or name, *parse_rate(policy.rate_limit))

    def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """What the function returns. Raises what its last try raised, `CallTimeoutError`, or `BreakerOpenError`."""
        return retry_call(self._policy, lambda _: self._try(function, args))

    async def acall(self, function: Callable[..., Awaitable[Any]], *args: Any) -> Any:
        """As `call`, for what is awaited."""
        return await aretry_call(self._policy, lambda _: self._atry(function, args))

    def _try(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        admission = self._breaker.admit() if self._breaker else None
        try:
            if self._limiter and (wait := self._limiter.reserve()):
                time.sleep(wait)
            result = self._timed(function, args)
        except BaseException as error:
            _failed(admission, error)
            raise
        if admission:
            admission.succeeded()
        return result

    def _timed(self, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        if self._policy.timeout is None:
            return function(*args)
        timed = call_in_child if self._policy.isolate else call_in_thread
        return timed(function, args, {}, timeout=self._policy.timeout)

    async def _atry(self, function: Callable[..., Awaitable[Any]], args: tuple[Any, ...]) -> Any:
        admission = self._breaker.admit() if self._breaker else None
        try:
            if self._limiter and (wait := self._limiter.reserve()):
                await asyncio.sleep(wait)
            if self._policy.timeout is None:
                result = await function(*args)
            else:
                result = await acall(function, args, {}, timeout=self._policy.timeout)
        except BaseException as error:
            _failed(admission, error)
            raise
        if admission:
            admission.succeeded()
        return result

    def flush(self) -> None:
        """Tells other processes what this one knows of the breaker and has not told yet: at the end of a step."""
        if self._breaker:
            self._breaker.flush()


def _failed(admission: Admission | None, error: BaseException) -> None:
    if admission is None:
        return
    if isinstance(error, Exception):
        admission.failed(error)
    else:
        admission.released()  # the step was interrupted, which says nothing about the called side


@lru_cache(maxsize=8)
def shared_store(database: str) -> SharedStore:
    """The store at a URL or path; one per process, because it holds connections."""
    from dagster_mao.gateway._shared import SharedStore

    return SharedStore(database)
