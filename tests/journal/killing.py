"""Processes that are killed at a chosen point: before or after any commit to the database, any seal, any effect and any undo."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Any

from dagster_mao.gateway._shared import SharedStore
from dagster_mao.state.log import StateLog
from tests.journal.bank import Bank

# Processes are forked off one that has imported all and done nothing: a fork of a process that has used polars hangs.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["dagster_mao", "dagster_mao.saga", "dagster_mao.journal._calling", "deltalake", "dagster_mao.gateway._shared"]
)


class Points:
    """Counts the points of this process, and kills it at one of them."""

    def __init__(self, kill_at: int | None) -> None:
        self.passed, self._kill_at = 0, kill_at

    def point(self) -> None:
        if self.passed == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.passed += 1

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.point()
            result = function(*args, **kwargs)
            self.point()
            return result

        return counted

    def install(self) -> None:
        """In this process, for good."""
        transaction = SharedStore.transaction

        @contextmanager
        def counted(store: SharedStore, *, durable: bool = True) -> Iterator[Any]:
            with transaction(store, durable=durable) as connection:
                yield connection
                self.point()
            self.point()

        SharedStore.transaction = counted  # type: ignore[method-assign, assignment]
        StateLog._commit = self.around(StateLog._commit)  # type: ignore[method-assign]
        Bank.do = self.around(Bank.do)  # type: ignore[method-assign]
        Bank.cancel = self.around(Bank.cancel)  # type: ignore[method-assign]


def start(function: Callable[..., Any], *args: Any) -> BaseProcess:
    process = _CONTEXT.Process(target=function, args=args, daemon=True)
    process.start()
    return process


def killed_at(point: int, function: Callable[..., Any], *args: Any) -> bool:
    """Runs it in a process that is killed at a point; False when it ended before it came to that."""
    process = start(_run, point, function, args)
    process.join(120)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode == -signal.SIGKILL


def _run(point: int, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    Points(point).install()
    function(*args)
