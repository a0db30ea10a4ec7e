"""The ways in which a step's calls are made: in place, in threads, or as tasks of an event loop. Never more at a time than was declared.

When one of them ends the step, those that execute end first: they are paid for, and their answers are kept. Those that wait (for a
permit, for their next try) are dropped.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import wait
from contextlib import suppress
from contextvars import copy_context
from types import TracebackType
from typing import Any

from dagster_mao.boundary._one import One, StoppedError

Ones = Iterator[One]
Work = Callable[[One], object]
AsyncWork = Callable[[One], Coroutine[Any, Any, object]]

# Seconds that the main thread waits at a time. polars lets the kernel go on with a wait that Ctrl-C interrupts, if it has no end.
_A_WHILE = 3600.0
_INTERRUPTIONS = 50  # that a loop goes on after, to let its tasks end: each of them may raise one
_CLEAN_UP = 5.0  # seconds that a step which ends waits for coroutines in another thread, and for threads that were in a pause


class Ended:
    """The errors that ended a step: of several, that of the first record counts, whichever came first."""

    def __init__(self) -> None:
        self._errors: list[tuple[float, BaseException]] = []
        self.at_once = False  # interrupted: nothing is waited for

    def __bool__(self) -> bool:
        return bool(self._errors)

    def add(self, error: BaseException, one: One | None) -> None:
        interrupts = not isinstance(error, Exception)
        self.at_once |= interrupts
        self._errors.append((float("-inf") if interrupts else float("inf") if one is None else one.place, error))

    def reraise(self) -> None:
        if self._errors:
            raise min(self._errors, key=lambda placed: placed[0])[1]


# -- in place, and in threads -------------------------------------------------------------------------------------------------------


def in_place(ones: Ones, work: Work) -> None:
    """One call after the other."""
    for one in ones:
        work(one)


def in_threads(ones: Ones, work: Work, limit: int) -> None:
    """Each call in one of `limit` threads, with the context variables of the caller. Raises what ended the step."""
    _Threads(ones, work, limit).run()


class _Threads:
    def __init__(self, ones: Ones, work: Work, limit: int) -> None:
        self._ones, self._work, self._limit = ones, work, limit
        self._context = copy_context()
        self._turn = threading.Lock()  # of the iterator
        self._changed = threading.Condition()
        self._running: dict[int, One | None] = {}  # by thread; None while it fetches its next call
        self._leaving: set[int] = set()  # the threads that were in a pause when the step ended
        self._ended = Ended()
        self._over = False

    def run(self) -> None:
        # Not of a pool: the interpreter waits for a pool's threads before it exits, and what is dropped may wait long.
        threads = [threading.Thread(target=self._serve, args=(n,), name=f"mao-call-{n}", daemon=True) for n in range(self._limit)]
        self._running = dict.fromkeys(range(self._limit))
        for thread in threads:
            thread.start()
        try:
            with self._changed:
                while not self._changed.wait_for(self._is_done, _A_WHILE):
                    pass
        finally:  # also when the step is interrupted
            self._stop()
        self._ended.reraise()

    def _is_done(self) -> bool:
        if not self._ended:
            return not self._running
        return self._ended.at_once or not any(one is None or one.is_under_way for one in self._running.values())

    def _stop(self) -> None:
        with self._changed:
            self._over = True
            self._drop()
            # They give back what was reserved for them, which the process might not live to see.
            self._changed.wait_for(lambda: not self._leaving & self._running.keys(), _CLEAN_UP)

    def _serve(self, number: int) -> None:
        one: One | None = None
        try:
            while (one := self._next(number)) is not None:
                self._context.copy().run(self._work, one)
        except StoppedError:
            pass
        except BaseException as error:
            self._ended.add(error, one)
        finally:
            with self._changed:
                del self._running[number]
                if self._ended:
                    self._drop()
                self._changed.notify_all()

    def _next(self, number: int) -> One | None:
        with self._turn:
            if self._over or self._ended:
                return None
            with self._changed:
                self._running[number] = None
            one = next(self._ones, None)
        with self._changed:
            if one is not None:
                one.stopped = self._over or bool(self._ended)
                one.on_failed = self._notify if one.stopped else None
            self._running[number] = one
        return one

    def _drop(self) -> None:
        """The step is over: no further try, no pause, and a word when a try ends."""
        for number, one in self._running.items():
            if one is not None:
                one.on_failed = self._notify
                if one.stop():
                    self._leaving.add(number)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()


# -- an event loop -------------------------------------------------------------------------------------------------------------------


class Loop:
    """One event loop for all coroutines of a step, because clients are bound to theirs.

    It runs where `run` is called, which may then be from one thread only; where a loop is running there already (a notebook), or with
    `apart`, it runs in a thread of its own.
    """

    def __init__(self, *, apart: bool = False) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None
        if apart or _is_running():
            self._thread = threading.Thread(target=self._serve, name="mao-loop", daemon=True)
            self._thread.start()

    def run(self, main: Coroutine[Any, Any, Any]) -> Any:
        """What it returns. If the caller is interrupted, it is cancelled and has ended."""
        if self._thread is None:
            return self._here(main)
        ended = threading.Event()

        async def whole() -> Any:
            try:
                return await main
            finally:
                ended.set()

        future = asyncio.run_coroutine_threadsafe(whole(), self._loop)
        try:
            while not wait((future,), _A_WHILE).done:
                pass
            return future.result()
        except BaseException:
            if not ended.is_set():
                future.cancel()
                ended.wait(_CLEAN_UP)
            raise

    def _here(self, main: Coroutine[Any, Any, Any]) -> Any:
        task = self._loop.create_task(main)
        try:
            return self._loop.run_until_complete(task)
        except BaseException:
            if not task.done():  # interrupted: the loop is, its tasks are not
                task.cancel()
                self._finish(task)
            raise

    def _finish(self, task: asyncio.Task[Any]) -> None:
        """Runs a task to its end, although others, or whoever waits, interrupt the loop again."""
        for _ in range(_INTERRUPTIONS):
            with suppress(BaseException):
                self._loop.run_until_complete(task)
            if task.done():
                return

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def close(self) -> None:
        """Ends what is left of its tasks, generators and threads, as `asyncio.run` does."""
        if self._thread is None:
            self._finish(self._loop.create_task(_left_over()))
        else:
            wait([asyncio.run_coroutine_threadsafe(_left_over(), self._loop)])
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def _is_running() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


async def _left_over() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    loop = asyncio.get_running_loop()
    await loop.shutdown_asyncgens()
    await loop.shutdown_default_executor()


async def as_tasks(ones: Ones, work: AsyncWork, limit: int) -> None:
    """Each call as a task of the running loop, at most `limit` at a time. Raises what ended the step."""
    await _Window(ones, work, limit).run()


class _Window:
    """The tasks that run. One that ends begins the next: records are made as they are asked for."""

    def __init__(self, ones: Ones, work: AsyncWork, limit: int) -> None:
        self._ones, self._work, self._limit = ones, work, limit
        self._loop = asyncio.get_running_loop()
        self._done: asyncio.Future[None] = self._loop.create_future()
        self._running: dict[asyncio.Task[Any], One] = {}
        self._ended = Ended()

    async def run(self) -> None:
        self._fill()
        try:
            await self._done
        except BaseException:  # interrupted: nothing is waited for but the clean-up
            for task, one in self._running.items():
                one.stop()
                task.remove_done_callback(self._over)
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
            raise
        self._ended.reraise()

    def _fill(self) -> None:
        while len(self._running) < self._limit and not self._ended:
            try:
                one = next(self._ones, None)
            except BaseException as error:
                self._end(error, None)
                break
            if one is None:
                break
            # A context of its own, which tasks copy anyway: what a call leaves in it is no other call's.
            task = self._loop.create_task(self._work(one))
            self._running[task] = one
            task.add_done_callback(self._over)
        if not self._running and not self._done.done():
            self._done.set_result(None)

    def _over(self, task: asyncio.Task[Any]) -> None:
        one = self._running.pop(task)
        if not task.cancelled() and (error := task.exception()) is not None and not isinstance(error, StoppedError):
            self._end(error, one)
        self._fill()

    def _end(self, error: BaseException, one: One | None) -> None:
        first = not self._ended
        self._ended.add(error, one)
        for task, other in self._running.items() if first or self._ended.at_once else ():
            other.on_failed = task.cancel
            other.stop()
            if self._ended.at_once or not other.is_under_way:
                task.cancel()
