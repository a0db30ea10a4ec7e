"""What an agent's calls may cost and how they may fail: declared on the agent, enforced by the gateway."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
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
        _whole("breaker.fail_max", self.fail_max, 1)
        _seconds("breaker.reset_timeout", self.reset_timeout)
        _name("breaker.name", self.name)


@dataclass(frozen=True)
class Policy:
    """How an agent is called.

    `timeout`: seconds that one try may take. `retries`: further tries after the first, on `transient` errors only, with exponential backoff
    and jitter, all within `retry_within` seconds; a `retry_after` of the error is honoured. `rate_limit`: calls over all processes, as in
    "60/minute"; agents with the same `rate_key` share it. `breaker`: see `Breaker`; of what `execute` raises, errors of `not_counted`
    classes are no failure of the called side. `isolate`: each call of a sync agent runs in a child process that can be killed.

    `token_limit`: tokens over all processes, as in "100000/minute", shared like `rate_limit`; until a call's tokens are known it counts as
    `tokens_per_call`, and once some are known as what they used on average. `fallback`: a function with the parameters of `execute`, or
    another agent, that answers where the calls finally failed. `when_open` says what becomes of the records whose calls an open breaker
    refuses: "fail" the batch, take the "fallback" (the default where there is one), or "defer" them to the next run. `keep_answers`:
    seconds for which an answer is kept and the same call is not made again; 0 keeps none.

    What cannot be is a `WiringError` that names field and fix.
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
            _seconds("timeout", self.timeout)
        _whole("retries", self.retries, 0)
        _seconds("retry_within", self.retry_within)
        _classes("transient", self.transient)
        _classes("not_counted", self.not_counted)
        if self.rate_limit is not None:
            parse_rate(self.rate_limit)
        _name("rate_key", self.rate_key)
        if self.breaker is not None and not isinstance(self.breaker, Breaker):
            raise _wrong("breaker", self.breaker, "breaker=mao.Breaker(fail_max=5, reset_timeout=30)")
        if not isinstance(self.isolate, bool):
            raise _wrong("isolate", self.isolate, "True or False")
        if self.isolate and self.timeout is None:
            raise _wrong("isolate", True, "give a timeout: a child process is only worth its cost if it can be killed")
        _whole("tokens_per_call", self.tokens_per_call, 1)
        if self.token_limit is not None:
            parse_rate(self.token_limit, "token_limit")
        if self.fallback is not None and not callable(self.fallback):
            raise _wrong("fallback", self.fallback, "a function with the parameters of `execute`, or an agent")
        self._check_degradation()
        if _is_no_number(self.keep_answers) or not 0 <= self.keep_answers < math.inf:
            raise _wrong("keep_answers", self.keep_answers, "a number of seconds from 0 on; 0 keeps no answers")

    def _check_degradation(self) -> None:
        if self.when_open not in (None, "fail", "fallback", "defer"):
            raise _wrong(
                "when_open", self.when_open, '"fail", "fallback" or "defer"' + _meant(self.when_open, ("fail", "fallback", "defer"))
            )
        if self.when_open in ("fallback", "defer") and self.breaker is None:
            raise _wrong("when_open", self.when_open, "give it a breaker: without one nothing is ever open. Or leave `when_open` out")
        if self.when_open == "fallback" and self.fallback is None:
            raise _wrong("when_open", "fallback", 'give it a fallback, or say what else becomes of the records: "fail" or "defer"')

    @property
    def is_shared(self) -> bool:
        """Whether it needs the database that processes share: for a breaker, a limit, or answers that are kept."""
        return bool(self.breaker or self.rate_limit or self.token_limit or self.keep_answers)

    @property
    def degradation(self) -> Literal["fail", "fallback", "defer"]:
        """What becomes of the records whose calls an open breaker refuses."""
        return self.when_open or ("fail" if self.fallback is None else "fallback")

    def overridden(self, *changes: Mapping[str, Any] | None, agent: str) -> Policy:
        """The policy in force where an operator changes some of its fields; of several changes of a field the last counts.

        Values are what JSON can say. `breaker` is None, or fields of a `Breaker`: what they do not say stays as declared. `fallback` can be
        None only, and `transient` and `not_counted` not be changed: what is called, and which errors are meant, is said in code. Raises
        `WiringError` with the agent, the field, and the fix.
        """
        changed = _together(changes, agent)
        try:
            if isinstance(breaker := changed.get("breaker"), dict):
                changed["breaker"] = replace(self.breaker or Breaker(), **breaker)
            return replace(self, **changed) if changed else self
        except WiringError as error:
            error.what, error.agent = f"As it is overridden: {error.what}", agent
            raise

    def describe(self) -> dict[str, Any]:
        """All of it as JSON can say it: functions, agents and classes by their names."""
        return {field.name: _described(getattr(self, field.name)) for field in fields(self)}


_IN_CODE = ("transient", "not_counted", "fallback")


def _together(changes: Iterable[Mapping[str, Any] | None], agent: str) -> dict[str, Any]:
    """Several overrides as one. What is said of a breaker adds up; None takes away what was said before."""
    together: dict[str, Any] = {}
    for change in changes:
        if change is not None and not isinstance(change, Mapping):
            raise WiringError(f"An override of a policy is {change!r}", agent=agent, field="policies", fix='give fields: {"timeout": 10}')
        for name, value in (change or {}).items():
            _overridable(name, value, agent)
            if isinstance(value, Mapping):
                _known(value, Breaker, "breaker.", agent)
                together[name] = {**(together.get(name) or {}), **value}
            else:
                together[name] = value
    return together


def _overridable(name: Any, value: Any, agent: str) -> None:
    _known((name,), Policy, "", agent)
    if name in _IN_CODE and not (name == "fallback" and value is None):
        fix = "`fallback: null` switches it off" if name == "fallback" else "leave it to the agent"
        raise WiringError(f"A policy's `{name}` is said in code, and cannot be overridden", agent=agent, field=name, fix=fix)
    if name == "breaker" and not (value is None or isinstance(value, Mapping)):
        fix = 'give its fields, as in {"fail_max": 3}, or null to switch it off'
        raise WiringError(f"An override's `breaker` is {value!r}", agent=agent, field=name, fix=fix)
    if name != "breaker" and not (value is None or isinstance(value, (str, int, float))):
        raise WiringError(f"An override's `{name}` is {value!r}", agent=agent, field=name, fix="give a number, a text, or null")


def _known(names: Iterable[Any], of: type, prefix: str, agent: str) -> None:
    known = [field.name for field in fields(of)]
    for name in names:
        if name not in known:
            fix = f"there are {', '.join(known)}" + _meant(name, known)
            raise WiringError(f"A policy has no field `{prefix}{name}`", agent=agent, field=f"{prefix}{name}", fix=fix)


def _meant(said: Any, known: Sequence[str]) -> str:
    near = get_close_matches(str(said), known, 1)
    return f". Is {near[0]!r} meant?" if near else ""


def _described(value: Any) -> Any:
    if isinstance(value, Breaker):
        return asdict(value)
    if isinstance(value, tuple):
        return [_described(item) for item in value]
    if callable(value):
        named = value if hasattr(value, "__qualname__") else type(value)
        return f"{named.__module__}.{named.__qualname__}".removeprefix("builtins.")
    return value


def parse_rate(text: str, field: str = "rate_limit") -> tuple[int, float]:
    """Calls, and seconds in which they may be made: (60, 60.0) for "60/minute". Raises WiringError, naming the field."""
    found = _RATE.fullmatch(text.strip()) if isinstance(text, str) else None
    if found is None or int(found[1]) < 1:
        raise _wrong(field, text, 'write "60/minute": a number, and second, minute, hour or day')
    return int(found[1]), _UNITS[found[2]]


def _is_no_number(value: object) -> bool:
    return isinstance(value, bool) or not isinstance(value, (int, float))


def _seconds(name: str, value: Any) -> None:
    if _is_no_number(value) or not 0 < value < math.inf:
        raise _wrong(name, value, "a number of seconds above 0")


def _whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise _wrong(name, value, f"a whole number from {least} on")


def _name(name: str, value: Any) -> None:
    if value is not None and (not isinstance(value, str) or not value):
        raise _wrong(name, value, "a text that is not empty; leave it out to share with nobody")


def _classes(name: str, value: Any) -> None:
    if not isinstance(value, tuple) or not all(isinstance(cls, type) and issubclass(cls, BaseException) for cls in value):
        raise _wrong(name, value, f"a tuple of error classes: {name}=(ConnectionError,)")


def _wrong(name: str, value: object, fix: str) -> WiringError:
    return WiringError(f"A policy's `{name}` is {value!r}", field=name, fix=fix)
