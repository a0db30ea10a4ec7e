"""One call: what it is about, how it stands, and what became of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from dagster_mao.gateway import CallRecord

WAITING, EXECUTING = "waiting", "executing"  # afterwards it stands as its last try ended


class Answered(NamedTuple):
    """`told`: of the try that answered; None where the fallback did."""

    value: Any
    told: CallRecord | None


class Deferred(NamedTuple):
    """It waits for the next run: `why` names the breaker that was open."""

    why: str


class Failed(NamedTuple):
    """It finally failed. `instead`: how the fallback failed, where there is one."""

    error: Exception
    instead: Exception | None = None


class WrongAnswerError(Exception):
    """`execute` returned what is no record of its contract. `args` are what it returned instead, and what it should have."""

    def told(self, record: str = "") -> str:
        returned, wanted = self.args
        return f"It returned {returned}{record}, not {wanted}"


class StoppedError(BaseException):
    """The step is over: no further try is made. Nothing that an agent or the gateway catches."""


class One:
    """A call with the values of one record, or with whole frames. As the observer of its tries it hands on what it is told.

    `shown` is the record's key as the log may have it. `stopped` says that no further try is to be made; `on_failed` is called then, when
    a try has ended without an answer.
    """

    __slots__ = ("_pause", "effects", "key", "last", "on_failed", "place", "record", "shown", "state", "stopped", "tell", "values")

    def __init__(
        self, place: int, record: str | None, shown: str | None, key: str, values: Mapping[str, Any], tell: Callable[[Any], object]
    ) -> None:
        self.place, self.record, self.shown, self.key, self.values, self.tell = place, record, shown, key, values, tell
        self.last: CallRecord | None = None
        self.state = WAITING
        self.stopped = False
        self.effects: Any = None  # how it has effects, as a context; None where the agent has none
        self.on_failed: Callable[[], object] | None = None
        self._pause: threading.Event | None = None

    def stop(self) -> bool:
        """Lets no further try be made, and ends a pause; whether it was in one."""
        self.stopped = True
        if (pause := self._pause) is None:
            return False
        pause.set()
        return True

    def pause(self, seconds: float) -> None:
        """Waits in a thread, for a limit or the next try. Raises `StoppedError` when the step ends meanwhile."""
        self._pause = over = threading.Event()
        if self.stopped or over.wait(seconds):
            raise StoppedError
        self._pause = None

    def __call__(self, told: CallRecord) -> None:
        if self.stopped and told.error is not None and told.error.endswith(StoppedError.__name__):
            return  # no try was made
        self.last = told
        self.tell((self.key, self.shown, told))
        self.state = told.outcome
        if self.on_failed is not None and told.outcome != "answered":
            self.on_failed()

    @property
    def is_under_way(self) -> bool:
        """Whether it is paid for, and its answer worth waiting for."""
        return self.state in (EXECUTING, "answered")
