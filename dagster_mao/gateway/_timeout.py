"""Timeouts: the caller gets `CallTimeoutError` in time, and the call is ended as far as its kind allows.

- A child process is killed, with all that it started.
- A coroutine is cancelled; one that goes on nevertheless is closed. One that never awaits cannot be reached, and holds up its loop.
- A thread cannot be ended: it goes on as a stray, for which neither the step nor the exit of the process waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from multiprocessing import util
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

from dagster_mao.errors import CallProcessError, CallTimeoutError
from dagster_mao.gateway._record import Used, sink

T = TypeVar("T")

GRACE = 1.0  # seconds that a cancelled coroutine has for its clean-up
STARTUP = 120.0  # seconds that a child process may take to start and to import what it is to call
_IDLE = 60.0  # seconds that a child process waits for the next call before it ends
_OVERDUE = 1.0  # seconds after its timeout at which a call ends by itself, should nobody be left to kill it
_DRAINED = 1000  # messages that are still read when the time is over: what the call told before, and, it may be, its answer


def _timed_out(seconds: float) -> CallTimeoutError:
    return CallTimeoutError(f"The call did not answer within {seconds:g} seconds", seconds=seconds)


# -- coroutines ----------------------------------------------------------------------------------------------------------------------


async def acall(
    function: Callable[..., Awaitable[T]], args: Sequence[Any], kwargs: Mapping[str, Any], *, timeout: float, grace: float = GRACE
) -> T:
    """What `function` returns when awaited, or `CallTimeoutError` after `timeout` seconds.

    It is cancelled then, and has `grace` seconds for its clean-up; what it returns so late is dropped. If it swallows the cancellation it
    is closed where it awaits; if it goes on even then it is a stray (see `strays`). A call that never awaits delays this, and all others
    of its loop.
    """
    loop = asyncio.get_running_loop()
    task = loop.create_task(_awaited(function, args, kwargs))
    over: asyncio.Future[None] = loop.create_future()
    timer = loop.call_later(timeout, _set, over)
    task.add_done_callback(functools.partial(_set, over))
    try:
        await over
    except asyncio.CancelledError:
        await _end(task, grace)
        raise
    finally:
        timer.cancel()
    if not task.done():
        await _end(task, grace)
        raise _timed_out(timeout)
    return task.result()


async def _awaited(function: Callable[..., Awaitable[T]], args: Sequence[Any], kwargs: Mapping[str, Any]) -> T:
    return await function(*args, **kwargs)


def _set(future: asyncio.Future[None], _: object = None) -> None:
    if not future.done():
        future.set_result(None)


async def _end(task: asyncio.Task[Any], grace: float) -> None:
    task.cancel()
    await asyncio.wait((task,), timeout=grace)
    if not task.done():
        # Left alone it would hold up the end of the loop, which waits for all its tasks.
        with contextlib.suppress(BaseException):
            task.get_coro().close()
        task.cancel()
        await asyncio.wait((task,), timeout=0.1)
    if not task.done():
        _stray(task)
    task.add_done_callback(_forget)


def _forget(task: asyncio.Task[Any]) -> None:
    _gone(task)
    if not task.cancelled():
        task.exception()  # looked at, so that the loop does not log it


# -- threads -------------------------------------------------------------------------------------------------------------------------


def call_in_thread(function: Callable[..., T], args: Sequence[Any], kwargs: Mapping[str, Any], *, timeout: float) -> T:
    """What `function` returns in a thread of its own, or `CallTimeoutError` after `timeout` seconds.

    The thread cannot be ended: it goes on as a stray (see `strays`) until it returns or the process exits, and what it does so late is
    done. It has the caller's context variables; it is not the main thread, where alone signal handlers can be set.
    """
    done = threading.Event()
    answer: list[T] = []
    errors: list[BaseException] = []
    context = contextvars.copy_context()

    def run() -> None:
        try:
            answer.append(context.run(function, *args, **kwargs))
        except BaseException as error:
            errors.append(error)
        done.set()
        _gone(thread)

    # Not of a pool: the interpreter waits for a pool's threads before it exits.
    thread = threading.Thread(target=run, name="dagster-mao-call", daemon=True)
    thread.start()
    in_time = False
    try:
        in_time = done.wait(timeout)
    finally:  # also when the step is interrupted
        if not in_time:
            _stray(thread)
            if done.is_set():
                _gone(thread)
    if not in_time:
        raise _timed_out(timeout)
    if errors:
        raise errors.pop()
    return answer.pop()


_strays: set[object] = set()
_strays_lock = threading.Lock()


def strays() -> int:
    """How many calls of this process go on after their timeout."""
    with _strays_lock:
        return len(_strays)


def _stray(call: object) -> None:
    with _strays_lock:
        _strays.add(call)


def _gone(call: object) -> None:
    with _strays_lock:
        _strays.discard(call)


# -- child processes -----------------------------------------------------------------------------------------------------------------


def call_in_child(function: Callable[..., T], args: Sequence[Any], kwargs: Mapping[str, Any], *, timeout: float) -> T:
    """What `function` returns in a child process, or `CallTimeoutError` after `timeout` seconds: then the process is killed.

    The time counts from when the process is up and has imported what it is to call; for that it has two minutes. It then waits a minute
    for further calls. `function`, arguments and answer are pickled. An exception comes back with its class and attributes, the child's
    traceback as its cause. `CallProcessError`: something cannot be pickled, or the process died. Processes that the call started are
    killed with it, unless they are in a session of their own. What the call tells by `usage` is told here at once.
    """
    try:
        call = bytes(ForkingPickler.dumps((function, tuple(args), dict(kwargs))))
    except Exception as error:
        raise CallProcessError(
            f"The call cannot be sent to a child process: {type(error).__name__}: {error}",
            fix="call what is defined at module level, with values that can be pickled, or do without `isolate`",
        ) from error
    return _read(_answer_of_child(call, timeout))  # type: ignore[no-any-return]


Answer = tuple[str, bytes, str]  # what happened, with what (pickled, or a type's name), and the child's traceback


def _answer_of_child(call: bytes, timeout: float) -> Answer:
    try:
        waiting = _idle.pop()
    except IndexError:
        waiting = None
    if waiting is not None:
        with contextlib.suppress(_EndedBefore):  # its minute was over
            return waiting.call(call, timeout)
    try:
        return _Worker().call(call, timeout)
    except _EndedBefore as error:
        raise CallProcessError(
            f"The child process ended before the call: {error}",
            fix="see its own output; a script that makes calls needs `if __name__ == '__main__':`",
        ) from None


def _read(answer: Answer) -> Any:
    what, data, trace = answer
    if what == "returned":
        try:
            return pickle.loads(data)  # noqa: S301 - by our own child
        except Exception as error:
            raise CallProcessError(f"What the call returned cannot be read here: {type(error).__name__}: {error}") from error
    if what == "raised":
        raised: BaseException = pickle.loads(data)  # noqa: S301 - by our own child
        raise raised from _ChildTraceback(trace)
    raise CallProcessError(f"{what} {data.decode()}", fix="see the cause; what is called must be importable") from _ChildTraceback(trace)


class _ChildTraceback(Exception):
    """Where in the child process it was raised: a traceback itself cannot be pickled."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


class _EndedBefore(Exception):
    """The child process was gone before it had the call."""


class _Worker:
    """A child process that makes one call after the other."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._connection, theirs = spawn.Pipe()
        # No daemon: those may not have children of their own.
        self._process = spawn.Process(target=_serve, args=(theirs,), name="dagster-mao-call", daemon=False)
        try:
            self._process.start()
        except AssertionError as error:
            raise CallProcessError(f"No child process can be started here: {error}", fix="do without `isolate`") from error
        finally:
            theirs.close()
        self._is_up = False
        if not _workers:
            util.Finalize(None, _end_workers, exitpriority=100)  # before multiprocessing waits for its children; atexit would be too late
        _workers.add(self)

    def call(self, call: bytes, timeout: float) -> Answer:
        """Makes a pickled call. Raises `_EndedBefore`, `CallTimeoutError`, and `CallProcessError` when the process dies of it."""
        ready = False
        try:
            if not self._is_up:
                self._get_ready()  # a call may be too large to be sent to nobody
                self._is_up = True
            self._connection.send(timeout)
            self._connection.send_bytes(call)
            answer: Answer | None = self._get_ready()
            ready = True
            deadline, late = time.monotonic() + timeout, 0
            while answer is None:
                left = deadline - time.monotonic()
                late += left < 0
                if late > _DRAINED or not self._connection.poll(max(0.0, left)):
                    raise _timed_out(timeout)
                said: Answer | Used = self._connection.recv()
                if isinstance(said, Used):
                    _tell(said)
                else:
                    answer = said
        except (EOFError, ConnectionError):
            self.kill(whole_group=ready)
            how = f"exit code {self._process.exitcode}"
            if not ready:
                raise _EndedBefore(how) from None
            fix = "-9 is often the kernel's: out of memory"
            raise CallProcessError(f"The child process died during the call: {how}", fix=fix) from None
        except BaseException:  # too late, or the step was interrupted
            self.kill()
            raise
        _idle.append(self)
        return answer

    def _get_ready(self) -> Any:
        if not self._connection.poll(STARTUP):
            raise CallTimeoutError(
                f"The child process was not ready for the call within {STARTUP:g} seconds",
                seconds=STARTUP,
                fix="see what the modules do that it imports",
            )
        return self._connection.recv()

    def kill(self, *, whole_group: bool = True) -> None:
        """Ends the process at once, and those it started."""
        _workers.discard(self)
        if whole_group and self._process.pid is not None and hasattr(os, "killpg"):
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join(5)
        self._connection.close()


_idle: list[_Worker] = []
_workers: set[_Worker] = set()


def _tell(used: Used) -> None:
    tell = sink.get()
    if tell is not None:
        tell(used)


def _end_workers() -> None:
    for worker in list(_workers):
        worker.kill()


def _after_fork_in_child() -> None:
    _idle.clear()
    _workers.clear()
    _strays.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


# -- in the child process ------------------------------------------------------------------------------------------------------------


def _serve(connection: Connection[Any, Any]) -> None:
    if hasattr(os, "setsid"):
        os.setsid()  # a group that can be killed as one
    threading.Thread(target=_die_with_parent, daemon=True).start()
    with contextlib.suppress(EOFError, ConnectionError):
        connection.send(None)
        while connection.poll(_IDLE):
            timeout = connection.recv()
            data = connection.recv_bytes()
            try:
                function, args, kwargs = pickle.loads(data)  # noqa: S301 - by our own parent
            except BaseException as error:
                connection.send(("The child process cannot read the call:", type(error).__name__.encode(), traceback.format_exc()))
                continue
            connection.send(None)
            _alarm(timeout + _OVERDUE)
            telling = _Telling(connection)
            token = sink.set(telling)
            answer = _answer(function, args, kwargs)
            sink.reset(token)
            _alarm(0)
            telling.end()
            connection.send(answer)
            del function, args, kwargs, answer, data


class _Telling:
    """Sends to the parent what the call tells by `usage`, from any of its threads; nothing that outlives the call, nor from its forks."""

    def __init__(self, connection: Connection[Any, Any]) -> None:
        self._connection: Connection[Any, Any] | None = connection
        self._lock, self._pid = threading.Lock(), os.getpid()

    def __call__(self, used: Used) -> None:
        if self._pid != os.getpid():
            return
        with self._lock, contextlib.suppress(OSError):  # nobody is left to be told
            if self._connection is not None:
                self._connection.send(used)

    def end(self) -> None:
        with self._lock:
            self._connection = None


def _answer(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Answer:
    try:
        value = function(*args, **kwargs)
    except BaseException as error:
        data = _portable(error)
        if data is None:
            return "The call raised what cannot be pickled:", _name(error).encode(), traceback.format_exc()
        return "raised", data, traceback.format_exc()
    try:
        return "returned", bytes(ForkingPickler.dumps(value)), ""
    except Exception:
        return "The call returned what cannot be pickled:", _name(value).encode(), traceback.format_exc()


def _name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _portable(error: BaseException) -> bytes | None:
    """The pickled error, tried out; at need without calling its class, and without the attributes that cannot be pickled."""
    with contextlib.suppress(Exception):
        data = bytes(ForkingPickler.dumps(error))
        pickle.loads(data)  # noqa: S301 - our own
        return data
    with contextlib.suppress(Exception):
        data = bytes(ForkingPickler.dumps(_Parts(type(error), _picklable(dict(enumerate(error.args))), _picklable(vars(error)))))
        pickle.loads(data)  # noqa: S301 - our own
        return data
    return None


def _picklable(values: Mapping[Any, Any]) -> dict[Any, Any]:
    kept = {}
    for name, value in values.items():
        with contextlib.suppress(Exception):
            pickle.loads(ForkingPickler.dumps(value))  # noqa: S301 - our own
            kept[name] = value
    return kept


class _Parts:
    """An exception in parts: most that cannot be pickled have an `__init__` that wants more than their `args`."""

    def __init__(self, cls: type[BaseException], args: dict[int, Any], state: dict[str, Any]) -> None:
        self._parts = (cls, tuple(args.values()), state)

    def __reduce__(self) -> Any:
        return (_put_together, self._parts)


def _put_together(cls: type[BaseException], args: tuple[Any, ...], state: dict[str, Any]) -> BaseException:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


def _alarm(seconds: float) -> None:
    """Lets the kernel end this process after so many seconds (0: never), also if Python code cannot run any more."""
    if hasattr(signal, "setitimer"):
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        with contextlib.suppress(OSError, AttributeError):
            os.killpg(os.getpid(), signal.SIGKILL)
        os._exit(1)
