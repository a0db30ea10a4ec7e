"""What is called in a child process, which imports this module."""

import contextvars
import os
import threading

import dagster_mao as mao


def tells(how: str) -> str:
    mao.usage(input_tokens=10, output_tokens=1, cost=0.5, model="first")
    mao.usage(input_tokens=20, model="second")
    if how == "fail":
        raise ConnectionError("4711")
    if how == "hang":
        threading.Event().wait()
    return how


def outlived() -> None:
    """Leaves a thread behind that tells later, with the context of this call."""
    context = contextvars.copy_context()

    def go_on() -> None:
        for _ in range(100):
            mao.usage(input_tokens=1_000_000)

    mao.usage(input_tokens=1)
    threading.Thread(target=lambda: (_left.wait(), context.run(go_on), _told.set())).start()


_left, _told = threading.Event(), threading.Event()


def outlived_by_a_fork() -> None:
    """Leaves a process behind that tells, at once and later."""
    mao.usage(input_tokens=1)
    if os.fork() == 0:
        for _ in range(2000):
            mao.usage(input_tokens=1_000_000)
        os._exit(0)
    os.wait()


def chatters() -> None:
    """Never ends, and never stops telling."""
    while True:
        mao.usage(input_tokens=1)


def after_it() -> int:
    """The next call: the thread of the one before tells while this one runs."""
    _left.set()
    assert _told.wait(60)
    mao.usage(input_tokens=2)
    return 0
