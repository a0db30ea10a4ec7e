"""Ends the process it is in, by SIGKILL or SIGSTOP, where a script says so. The library knows nothing of it: it is wrapped."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any

from dagster_mao.gateway._shared import SharedStore
from dagster_mao.state.log import StateLog
from resources.core_bank import CoreBank
from tools.chaos.script import Point

_PLACES: dict[str, tuple[Any, str]] = {
    "journal": (SharedStore, "transaction"),
    "seal": (StateLog, "append"),
    "effect": (CoreBank, "post"),
    "undo": (CoreBank, "cancel"),
}


def arm(point: Point, told: Path) -> Callable[[], None]:
    """From now on this process ends at that point, and writes its number into `told` before. What is returned takes it back."""
    end = _end(point, told)
    if point.where == "anywhere":
        timer = threading.Timer(point.n / 1000, end)
        timer.daemon = True
        timer.start()
        return timer.cancel
    owner, name = _PLACES[point.where]
    honest = getattr(owner, name)
    count = _Countdown(point, end)
    setattr(owner, name, _around(honest, count) if point.where == "journal" else _wrapped(honest, count))
    return lambda: setattr(owner, name, honest)


def _end(point: Point, told: Path) -> Callable[[], None]:
    def end() -> None:
        told.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP if point.how == "stop" else signal.SIGKILL)

    return end


class _Countdown:
    def __init__(self, point: Point, end: Callable[[], None]) -> None:
        self._point, self._end, self._lock = point, end, threading.Lock()
        self._left = point.n

    @contextmanager
    def around(self, called: Any = None) -> Iterator[None]:
        with self._lock:
            self._left -= 1
            is_it = self._left == 0
        if is_it and self._point.when == "before":
            self._end_beside(called)
        yield
        if is_it and self._point.when == "after":
            self._end_beside(called)

    def _end_beside(self, called: Any) -> None:
        """Not while another thread posts to the same bank: stopped in there, this process would hold its lock, and the calls of all others
        would time out before they came to points of their own.
        """
        with called._lock if isinstance(called, CoreBank) else nullcontext():
            self._end()


def _wrapped(function: Callable[..., Any], count: _Countdown) -> Any:
    @wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with count.around(args[0]):
            return function(*args, **kwargs)

    return wrapped


def _around(transaction: Callable[..., Any], count: _Countdown) -> Any:
    @contextmanager
    def wrapped(*args: Any, **kwargs: Any) -> Iterator[Any]:
        with count.around(), transaction(*args, **kwargs) as connection:
            yield connection

    return wrapped
