"""Timeouts that end the call: coroutines are cancelled, child processes killed, threads left behind."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest

from dagster_mao.errors import CallProcessError, CallTimeoutError, MaoError
from dagster_mao.gateway import _timeout
from dagster_mao.gateway._timeout import acall, call_in_child, call_in_thread, strays

SPAWN = multiprocessing.get_context("spawn")


def until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    """Returns once it is true; fails when it does not become so."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def in_python(code: str, seconds: float = 60.0) -> subprocess.CompletedProcess[str]:
    """A program of its own, which must end in time."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=seconds, check=False, env={**os.environ}
    )


def test_the_error_is_a_timeout_and_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(CallTimeoutError("It is late", seconds=2.5, agent="score", fix="wait")))  # noqa: S301
    assert isinstance(error, MaoError)
    assert isinstance(error, TimeoutError)
    assert (error.seconds, str(error)) == (2.5, "It is late [agent 'score']. Fix: wait")


# -- coroutines ----------------------------------------------------------------------------------------------------------------------


def test_a_coroutine_in_time_answers_and_raises_as_it_is() -> None:
    async def double(value: int, *, plus: int = 0) -> int:
        await asyncio.sleep(0)
        return 2 * value + plus

    async def fail() -> None:
        raise KeyError("own")

    assert asyncio.run(acall(double, (4,), {"plus": 1}, timeout=30)) == 9
    with pytest.raises(KeyError, match="own"):
        asyncio.run(acall(fail, (), {}, timeout=30))


def test_a_late_coroutine_is_cancelled_and_cleans_up() -> None:
    said = []

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            said.append("cleaned up")

    with pytest.raises(CallTimeoutError, match=r"within 0\.05 seconds") as caught:
        asyncio.run(acall(hang, (), {}, timeout=0.05))
    assert caught.value.seconds == 0.05
    assert said == ["cleaned up"]


def test_what_a_cancelled_coroutine_returns_or_raises_late_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    async def late(error: Exception | None) -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            if error:
                raise error from None
        return "too late"

    for error in (None, ValueError("late")):
        with pytest.raises(CallTimeoutError):
            asyncio.run(acall(late, (error,), {}, timeout=0.02))
    assert caplog.text == ""


def test_a_coroutine_that_swallows_its_cancellation_is_closed_and_the_loop_ends() -> None:
    async def stubborn() -> None:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(3600)

    began = time.monotonic()
    with pytest.raises(CallTimeoutError):
        asyncio.run(acall(stubborn, (), {}, timeout=0.02, grace=0.05))
    assert time.monotonic() - began < 10
    assert strays() == 0


def test_waiting_for_it_naively_never_ends() -> None:
    naive = """
        import asyncio
        async def stubborn():
            while True:
                try:
                    await asyncio.sleep(3600)
                except asyncio.CancelledError:
                    pass
        asyncio.run(asyncio.wait_for(stubborn(), 0.05))
    """
    with pytest.raises(subprocess.TimeoutExpired):
        in_python(naive, seconds=3)


def test_whoever_cancels_the_caller_cancels_the_call() -> None:
    ended = []

    async def hang() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("call")

    async def main() -> None:
        task = asyncio.create_task(acall(hang, (), {}, timeout=30))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert ended == ["call"]


# -- threads -------------------------------------------------------------------------------------------------------------------------

asker: ContextVar[str] = ContextVar("asker")


def test_a_thread_answers_raises_and_knows_the_callers_context() -> None:
    asker.set("me")
    assert call_in_thread(lambda a, b=0: (a, b, asker.get()), (1,), {"b": 2}, timeout=30) == (1, 2, "me")
    with pytest.raises(ZeroDivisionError):
        call_in_thread(lambda: 1 / 0, (), {}, timeout=30)


def test_a_late_thread_is_left_behind_and_counted_until_it_ends() -> None:
    go_on = threading.Event()
    with pytest.raises(CallTimeoutError):
        call_in_thread(go_on.wait, (), {}, timeout=0.02)
    assert strays() == 1
    go_on.set()
    until(lambda: strays() == 0)


HANG = "import time\n        def hang(): time.sleep(3600)\n"


def test_a_process_does_not_wait_for_a_stray_thread() -> None:
    done = in_python(f"""
        {HANG}
        from dagster_mao.gateway._timeout import call_in_thread
        try:
            call_in_thread(hang, (), {{}}, timeout=0.05)
        except TimeoutError:
            print("in time")
    """)
    assert (done.stdout, done.returncode) == ("in time\n", 0)


def test_a_naive_thread_pool_times_out_and_then_waits_for_its_thread() -> None:
    naive = f"""
        {HANG}
        from concurrent.futures import ThreadPoolExecutor
        try:
            ThreadPoolExecutor(1).submit(hang).result(timeout=0.05)
        except Exception:
            print("in time", flush=True)
    """
    with pytest.raises(subprocess.TimeoutExpired) as caught:
        in_python(naive, seconds=5)
    assert caught.value.stdout == b"in time\n"


# -- child processes -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_children_left() -> Iterator[None]:
    yield
    assert strays() == 0


def double(value: int, *, plus: int = 0) -> int:
    return 2 * value + plus


def pid() -> int:
    return os.getpid()


def told_then_hung(path: str) -> None:
    """Writes its process id and that of a process that it starts, then never returns."""
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(3600)"])
    Path(path).write_text(f"{os.getpid()} {other.pid}")
    while True:
        time.sleep(3600)


class NeedsMore(Exception):
    """As many HTTP clients have it: pickled well, read back never."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status, self.lock = status, threading.Lock()


def fails(how: str) -> Any:
    if how == "own":
        raise KeyError("own")
    if how == "needs more":
        raise NeedsMore("busy", status=429)
    if how == "local":

        class Local(Exception):
            pass

        raise Local("here only")
    if how == "answer":
        return threading.Lock()
    if how == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    raise SystemExit(3)


def test_a_child_answers_and_is_used_again() -> None:
    assert call_in_child(double, (4,), {"plus": 1}, timeout=30) == 9
    first = call_in_child(pid, (), {}, timeout=30)
    assert first != os.getpid()
    assert call_in_child(pid, (), {}, timeout=30) == first


def test_errors_come_back_with_their_class_and_where_they_were_raised() -> None:
    with pytest.raises(KeyError, match="own") as caught:
        call_in_child(fails, ("own",), {}, timeout=30)
    assert 'raise KeyError("own")' in str(caught.value.__cause__)
    with pytest.raises(NeedsMore, match="busy") as needs:
        call_in_child(fails, ("needs more",), {}, timeout=30)
    assert needs.value.status == 429
    assert not hasattr(needs.value, "lock")
    with pytest.raises(SystemExit):
        call_in_child(fails, ("exits",), {}, timeout=30)


def test_what_cannot_cross_is_told_and_the_child_goes_on() -> None:
    first = call_in_child(pid, (), {}, timeout=30)
    for how, told in (("local", "raised what cannot be pickled: .*Local"), ("answer", "returned what cannot be pickled: _thread.lock")):
        with pytest.raises(CallProcessError, match=told):
            call_in_child(fails, (how,), {}, timeout=30)
    with pytest.raises(CallProcessError, match="cannot be sent to a child process"):
        call_in_child(lambda: None, (), {}, timeout=30)
    assert call_in_child(pid, (), {}, timeout=30) == first


def test_a_child_that_dies_is_told_and_replaced() -> None:
    first = call_in_child(pid, (), {}, timeout=30)
    with pytest.raises(CallProcessError, match="died during the call: exit code -9"):
        call_in_child(fails, ("dies",), {}, timeout=30)
    assert call_in_child(pid, (), {}, timeout=30) != first


def test_one_that_ended_while_it_waited_is_replaced_unnoticed() -> None:
    first = call_in_child(pid, (), {}, timeout=30)
    os.kill(first, signal.SIGKILL)
    until(lambda: not alive(first))
    assert call_in_child(pid, (), {}, timeout=30) not in (first, os.getpid())


def test_a_late_child_is_killed_with_what_it_started(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    with pytest.raises(CallTimeoutError, match="within 3 seconds"):
        call_in_child(told_then_hung, (str(path),), {}, timeout=3)
    child, grandchild = map(int, path.read_text().split())
    until(lambda: not alive(child) and not alive(grandchild))
    assert call_in_child(double, (1,), {}, timeout=30) == 2


def test_starting_and_importing_is_not_the_calls_time() -> None:
    for worker in list(_timeout._workers):
        worker.kill()
    _timeout._idle.clear()
    assert call_in_child(double, (1,), {}, timeout=0.25) == 2  # a start takes longer


def interrupted() -> None:
    raise KeyboardInterrupt


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A process that a shell started in the background ignores SIGINT, and Python then leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_step_kills_its_call(tmp_path: Path) -> None:
    path = tmp_path / "pids"

    def interrupt() -> None:
        until(lambda: path.exists() and len(path.read_text().split()) == 2)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        call_in_child(told_then_hung, (str(path),), {}, timeout=60)
    child, grandchild = map(int, path.read_text().split())
    until(lambda: not alive(child) and not alive(grandchild))


def step(path: str) -> None:
    """A step process in the middle of a call."""
    call_in_child(told_then_hung, (path,), {}, timeout=3600)


def test_a_call_does_not_outlive_a_step_that_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "pids"
    process = SPAWN.Process(target=step, args=(str(path),))
    process.start()
    until(lambda: path.exists() and len(path.read_text().split()) == 2, 60)
    process.kill()
    process.join(30)
    child, grandchild = map(int, path.read_text().split())
    until(lambda: not alive(child) and not alive(grandchild))


def step_that_ends(path: str) -> None:
    Path(path).write_text(str(call_in_child(pid, (), {}, timeout=30)))


def test_a_step_does_not_wait_for_its_warm_children(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    process = SPAWN.Process(target=step_that_ends, args=(str(path),))
    process.start()
    until(lambda: path.exists() and path.read_text() != "", 60)
    process.join(20)  # sooner than a child would end of itself
    assert process.exitcode == 0
    until(lambda: not alive(int(path.read_text())))


def test_threads_have_a_child_each() -> None:
    meet = SPAWN.Manager()
    with meet:
        barrier = meet.Barrier(2)
        pids: list[int] = []
        threads = [threading.Thread(target=lambda: pids.append(call_in_child(met, (barrier,), {}, timeout=60))) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(90)
        assert len(set(pids)) == 2


def met(barrier: Any) -> int:
    barrier.wait(60)
    return os.getpid()


def test_importing_the_gateway_imports_no_database() -> None:
    done = in_python("""
        import sys
        import dagster_mao.gateway, dagster_mao.gateway._timeout, dagster_mao.gateway._retry
        print("sqlalchemy" in sys.modules)
    """)
    assert done.stdout == "False\n"


def alarm() -> float:
    return signal.getitimer(signal.ITIMER_REAL)[0]


def test_the_kernel_ends_a_call_that_nobody_is_left_to_kill() -> None:
    assert 30 < call_in_child(alarm, (), {}, timeout=30) <= 31


def test_a_child_that_never_gets_ready_is_told_and_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    for worker in list(_timeout._workers):
        worker.kill()
    _timeout._idle.clear()
    monkeypatch.setattr(_timeout, "STARTUP", 0.05)
    with pytest.raises(CallTimeoutError, match="was not ready for the call"):
        call_in_child(double, (1,), {}, timeout=30)
    assert not _timeout._workers


def test_a_call_that_is_too_large_for_the_pipe_waits_for_no_child_that_hangs(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import threading
        from dagster_mao.gateway import _timeout
        if __name__ != "__main__":
            threading.Event().wait()  # what a child imports, too
        _timeout.STARTUP = 1.0
        _timeout.call_in_child(len, (b" " * 10_000_000,), {}, timeout=30)
        """)
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert "was not ready for the call within 1 seconds" in done.stderr


def test_a_script_without_a_guard_is_told_what_it_lacks(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import operator
        from dagster_mao.gateway._timeout import call_in_child
        call_in_child(operator.add, (1, 2), {}, timeout=30)
        """)
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "ended before the call" in done.stderr
    assert "a script that makes calls needs `if __name__ == '__main__':`" in done.stderr


def daemon(path: str) -> None:
    try:
        call_in_child(double, (1,), {}, timeout=30)
    except CallProcessError as error:
        Path(path).write_text(str(error))


def test_where_no_child_can_be_started_that_is_told(tmp_path: Path) -> None:
    path = tmp_path / "error"
    process = SPAWN.Process(target=daemon, args=(str(path),), daemon=True)
    process.start()
    process.join(60)
    assert "No child process can be started here: daemonic processes" in path.read_text()
