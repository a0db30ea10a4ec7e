"""How calls are made: never more at a time than declared, records as they are asked for, and an end that loses nothing that was paid."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import pytest

from dagster_mao.boundary._one import EXECUTING, One, StoppedError
from dagster_mao.boundary._ways import Loop, as_tasks, in_place, in_threads

SECONDS = 30.0
COLOUR: ContextVar[str] = ContextVar("colour", default="none")


def ones(count: int, drawn: list[int] | None = None) -> Iterator[One]:
    for place in range(count):
        if drawn is not None:
            drawn.append(place)
        yield One(place, str(place), str(place), "", {}, lambda _: None)


def threads(ones: Iterator[One], work: Callable[[One], object], limit: int) -> None:
    in_threads(ones, work, limit)


def tasks(ones: Iterator[One], work: Callable[[One], object], limit: int) -> None:
    """The same work, each call of it in a thread, so that both ways can be told to wait alike."""

    async def awaited(one: One) -> None:
        await asyncio.to_thread(work, one)

    with Loop() as loop:
        loop.run(as_tasks(ones, awaited, limit))


ways = pytest.mark.parametrize("way", [threads, tasks])


@ways
def test_no_more_calls_at_a_time_than_declared_and_no_record_is_made_before_its_turn(way: Any) -> None:
    drawn, running, most = list[int](), set[int](), 0
    together, lock = threading.Barrier(4, timeout=SECONDS), threading.Lock()

    def work(one: One) -> None:
        nonlocal most
        with lock:
            running.add(one.place)
            most = max(most, len(running))
            assert len(drawn) <= one.place + 1 + 4
        together.wait()  # so that there are four at a time indeed
        with lock:
            running.discard(one.place)

    way(ones(40, drawn), work, 4)
    assert most == 4
    assert drawn == list(range(40))


@ways
def test_a_call_has_the_callers_context_and_leaves_nothing_in_it(way: Any) -> None:
    seen = []

    def work(one: One) -> None:
        seen.append(COLOUR.get())
        COLOUR.set(f"of {one.place}")

    COLOUR.set("green")
    way(ones(9), work, 2)
    assert seen == ["green"] * 9
    assert COLOUR.get() == "green"


@ways
def test_what_executes_when_the_step_ends_ends_first_and_what_waits_is_dropped(way: Any) -> None:
    executing, done = threading.Event(), list[int]()
    started = threading.Barrier(3, timeout=SECONDS)

    def work(one: One) -> None:
        if one.place == 0:  # executes until the error is out
            one.state = EXECUTING
            started.wait()
            assert executing.wait(SECONDS)
            done.append(0)
        elif one.place == 1:
            one.state = EXECUTING
            started.wait()
            threading.Timer(0.2, executing.set).start()
            raise ValueError("ends the step")
        else:  # waits for its next try; of a task, only the awaiting is dropped
            started.wait()
            executing.wait(SECONDS)

    drawn = list[int]()
    with pytest.raises(ValueError, match="ends the step"):
        way(ones(99, drawn), work, 3)
    assert done == [0]
    assert drawn == [0, 1, 2]


def test_a_task_that_waits_is_cancelled_when_the_step_ends() -> None:
    ended = []

    async def work(one: One) -> None:
        if one.place == 1:
            raise ValueError("ends the step")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append(one.place)
            raise

    with Loop() as loop, pytest.raises(ValueError, match="ends the step"):
        loop.run(as_tasks(ones(99), work, 3))
    assert sorted(ended) == [0, 2]


@ways
def test_of_several_errors_that_of_the_first_record_is_raised(way: Any) -> None:
    together = threading.Barrier(5, timeout=SECONDS)

    def work(one: One) -> None:
        one.state = EXECUTING
        together.wait()
        raise ValueError(one.record)

    with pytest.raises(ValueError, match=r"^0$"):
        way(ones(5), work, 5)


@ways
def test_a_stopped_call_is_no_error_of_its_own(way: Any) -> None:
    def work(one: One) -> None:
        if one.place:
            raise StoppedError
        raise ValueError("the one")

    with pytest.raises(ValueError, match="the one"):
        way(ones(9), work, 3)


@ways
def test_an_error_of_the_records_themselves_ends_the_step(way: Any) -> None:
    done = []

    def broken() -> Iterator[One]:
        yield from ones(3)
        raise KeyError("a row that is no record")

    with pytest.raises(KeyError):
        way(broken(), lambda one: done.append(one.place), 2)
    assert set(done) <= {0, 1, 2}


def test_in_place_one_call_comes_after_the_other() -> None:
    drawn, done = list[int](), list[tuple[int, int]]()
    in_place(ones(3, drawn), lambda one: done.append((one.place, len(drawn))))
    assert done == [(0, 1), (1, 2), (2, 3)]


# -- the loop --------------------------------------------------------------------------------------------------------------------------


async def which() -> tuple[int, int]:
    return id(asyncio.get_running_loop()), threading.get_ident()


def test_one_loop_for_all_chunks_in_the_callers_thread() -> None:
    with Loop() as loop:
        assert loop.run(which()) == loop.run(which())
        assert loop.run(which())[1] == threading.get_ident()


def test_inside_a_running_loop_it_has_a_thread_and_the_callers_context() -> None:
    async def notebook() -> None:
        COLOUR.set("blue")
        with Loop() as loop:
            first, second = loop.run(which()), loop.run(which())
            assert first == second
            assert first[1] != threading.get_ident()

            async def colour() -> str:
                return COLOUR.get()

            assert loop.run(colour()) == "blue"

    asyncio.run(notebook())


def test_apart_it_serves_several_threads_at_once() -> None:
    together = threading.Barrier(3, timeout=SECONDS)

    async def meet() -> int:
        await asyncio.to_thread(together.wait)
        return threading.get_ident()

    found = []
    with Loop(apart=True) as loop:
        callers = [threading.Thread(target=lambda: found.append(loop.run(meet()))) for _ in range(3)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join(SECONDS)
    assert len(found) == 3
    assert len(set(found)) == 1


def test_at_the_end_nothing_of_it_is_left() -> None:
    ended = []

    async def behind() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def leaves() -> None:
        task = asyncio.get_running_loop().create_task(behind())
        await asyncio.sleep(0)
        assert not task.done()

    for apart in (False, True):
        with Loop(apart=apart) as loop:
            loop.run(leaves())
        assert ended.pop()
    assert not [thread for thread in threading.enumerate() if thread.name == "mao-loop"]


def interrupt() -> None:
    """As the kernel does on Ctrl-C: the main thread is woken, and raises."""
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def interrupt_its_wait(begun: threading.Event) -> None:
    """Interrupts the main thread when it waits for others: at many looks in a row it stood at the same place of a wait."""
    assert begun.wait(SECONDS)
    main, looks, deadline = threading.main_thread().ident or 0, deque[tuple[str, int]](maxlen=50), time.monotonic() + SECONDS
    while len(looks) < 50 or set(looks) != {("wait", looks[0][1])}:
        assert time.monotonic() < deadline
        frame = sys._current_frames()[main]
        looks.append((frame.f_code.co_name, frame.f_lasti))
        os.sched_yield()
    interrupt()


@pytest.mark.parametrize("inside", [False, True], ids=["script", "notebook"])
@pytest.mark.parametrize("limit", [1, 3])
def test_an_interruption_ends_the_tasks_and_comes_through(inside: bool, limit: int) -> None:
    """As Ctrl-C does, and as Dagster ends a step: a signal's handler raises in the main thread."""
    ended, begun = list[int](), itertools.count(1)

    async def work(one: One) -> None:
        one.state = EXECUTING  # nothing is waited for
        try:
            if next(begun) == limit:
                interrupt()
            await asyncio.Event().wait()
        finally:
            ended.append(one.place)

    def step() -> None:
        with Loop() as loop:
            loop.run(as_tasks(ones(9), work, limit))

    async def notebook() -> None:
        step()

    # Not asyncio.run, which keeps the first interruption to itself while the loop is held up.
    around = asyncio.new_event_loop()
    with pytest.raises(KeyboardInterrupt):
        around.run_until_complete(notebook()) if inside else step()
    around.close()
    assert sorted(ended) == list(range(limit))


def test_an_interruption_waits_for_no_thread() -> None:
    """Nor for its own wait to end, which the kernel would go on with: polars has a handler for Ctrl-C that asks it to."""
    forever, begun, over = threading.Event(), threading.Event(), list[int]()

    def work(one: One) -> None:
        one.state = EXECUTING
        begun.set()
        forever.wait(SECONDS)
        over.append(one.place)

    threading.Thread(target=interrupt_its_wait, args=(begun,), daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        in_threads(ones(9), work, 2)
    assert not over, "the calls go on"
    forever.set()


def test_an_interruption_ends_what_a_thread_of_the_loop_runs_for_the_caller() -> None:
    begun, ended = threading.Event(), list[str]()

    async def forever() -> None:
        begun.set()
        try:
            await asyncio.sleep(SECONDS)
            ended.append("it was waited for")
        finally:
            ended.append("cancelled")

    threading.Thread(target=interrupt_its_wait, args=(begun,), daemon=True).start()
    with Loop(apart=True) as loop, pytest.raises(KeyboardInterrupt):
        loop.run(forever())
    assert ended == ["cancelled"]
