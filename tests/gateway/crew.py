"""Eight processes that a test conducts: a call stops inside the called function until the test says how it ends. No sleeps, no chance."""

from __future__ import annotations

import datetime as dt
import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import pybreaker
import sqlalchemy as sa

from dagster_mao.errors import BreakerOpenError, StoreError
from dagster_mao.gateway import Breaker, Gateway, Policy
from dagster_mao.gateway._breaker import _ROWS, LOOK_EVERY, SharedBreaker, events
from dagster_mao.gateway._shared import METADATA, SharedStore

SECONDS = 60.0  # after which something that should have happened has not
_NAIVE = sa.Table(
    "naive_breakers",
    METADATA,
    sa.Column("name", sa.Text, primary_key=True),
    sa.Column("state", sa.Text),
    sa.Column("counter", sa.Integer),
    sa.Column("opened_at", sa.Double),
)


# -- engines -------------------------------------------------------------------------------------------------------------------------


@dataclass
class Use:
    """What a member is to call through. `skew`: seconds that its host's clock is ahead."""

    engine: str
    shared: SharedStore
    declared: Breaker
    name: str = "bank"
    skew: float = 0.0
    lease: float | None = None


class Ours:
    def __init__(self, use: Use) -> None:
        self._shared, self._name = SharedStore(use.shared.url, clock=lambda: time.time() + use.skew), use.name
        self._breaker = SharedBreaker(self._shared, use.name, use.declared, lease=use.lease)

    def call(self, function: Callable[[], None]) -> None:
        admission = self._breaker.admit()
        try:
            function()
        except BaseException as error:
            admission.failed(error)
            raise
        admission.succeeded()

    def opens(self) -> int:
        told = events(self._shared, self._name, limit=1000)
        return sum(event.event == "open" and event.process.endswith(f":{os.getpid()}") for event in told)

    def age(self, seconds: float) -> None:
        age(self._shared, seconds)


class Waiting(Ours):
    """Calls as the gateway makes them: beside a probe they wait."""

    def __init__(self, use: Use) -> None:
        super().__init__(use)
        self._gateway = Gateway(Policy(breaker=replace(use.declared, name=use.name), keep_answers=0), "", use.shared.url)

    def call(self, function: Callable[[], None]) -> None:
        self._gateway.call(function)


class Plain(pybreaker.CircuitBreakerListener):
    """pybreaker as it comes: each process has its own state."""

    def __init__(self, use: Use) -> None:
        self._opens, self._storage = 0, self.storage(use)
        self._breaker = pybreaker.CircuitBreaker(
            use.declared.fail_max,
            use.declared.reset_timeout,
            listeners=[self],
            state_storage=self._storage,
            throw_new_error_on_trip=False,
        )

    def storage(self, use: Use) -> pybreaker.CircuitBreakerStorage:
        return pybreaker.CircuitMemoryStorage(pybreaker.STATE_CLOSED)

    def state_change(self, cb: Any, old_state: Any, new_state: Any) -> None:
        self._opens += new_state.name == pybreaker.STATE_OPEN

    def call(self, function: Callable[[], None]) -> None:
        self._breaker.call(function)

    def opens(self) -> int:
        return self._opens

    def age(self, seconds: float) -> None:
        self._storage.opened_at = self._storage.opened_at - dt.timedelta(seconds=seconds)


class MerelyShared(Plain):
    """pybreaker with its state in the database, and nothing else changed."""

    def storage(self, use: Use) -> pybreaker.CircuitBreakerStorage:
        return _SqlStorage(use.shared, use.name)


class _SqlStorage(pybreaker.CircuitBreakerStorage):
    def __init__(self, shared: SharedStore, name: str) -> None:
        super().__init__(name)
        self._shared = shared
        with suppress(StoreError), shared.transaction() as connection:  # another process may be as quick
            if connection.scalar(sa.select(_NAIVE.c.name).where(_NAIVE.c.name == name)) is None:
                connection.execute(sa.insert(_NAIVE).values(name=name, state=pybreaker.STATE_CLOSED, counter=0))

    def _get(self, column: str) -> Any:
        with self._shared.reading() as connection:
            return connection.scalar(sa.select(_NAIVE.c[column]).where(_NAIVE.c.name == self.name))

    def _set(self, column: str, value: Any) -> None:
        with self._shared.transaction() as connection:
            connection.execute(sa.update(_NAIVE).where(_NAIVE.c.name == self.name).values({column: value}))

    state = property(lambda self: self._get("state"), lambda self, state: self._set("state", state))
    counter = property(lambda self: self._get("counter"))
    success_counter = property(lambda self: 1)
    opened_at = property(
        lambda self: dt.datetime.fromtimestamp(self._get("opened_at"), dt.timezone.utc),
        lambda self, at: self._set("opened_at", at.timestamp()),
    )

    def increment_counter(self) -> None:
        self._set("counter", _NAIVE.c.counter + 1)

    def reset_counter(self) -> None:
        self._set("counter", 0)


ENGINES = {"ours": Ours, "waiting": Waiting, "plain": Plain, "merely shared": MerelyShared}


def age(shared: SharedStore, seconds: float) -> None:
    """Time passes for the breakers of a store: what was, is longer ago. The clocks stay as they are."""
    moved = {name: sa.column(name) - seconds for name in ("since", "retry_at", "lease_until")}
    with shared.transaction() as connection:
        connection.execute(sa.update(_ROWS).values(moved))


# -- in the process ------------------------------------------------------------------------------------------------------------------


def serve(pipe: Any) -> None:
    engine: Any = None
    while True:
        try:
            command, *given = pipe.recv()
        except EOFError:
            return
        try:
            if command == "use":
                (use,) = given
                _skew_pybreaker(use.skew)
                engine = ENGINES[use.engine](use)
                pipe.send("ready")
            elif command == "run":
                function, *arguments = given
                pipe.send(function(*arguments))
            elif command == "call":
                pipe.send(_call(engine, pipe))
            else:
                pipe.send(getattr(engine, command)(*given))
        except Exception as error:  # the test shall see it
            pipe.send(f"{type(error).__name__}: {error}")


def _call(engine: Any, pipe: Any) -> str:
    try:
        engine.call(lambda: _called(pipe))
    except (BreakerOpenError, pybreaker.CircuitBreakerError):
        return "refused"
    except TimeoutError:
        return "failed"
    return "succeeded"


def _called(pipe: Any) -> None:
    pipe.send("called")
    if pipe.recv() == ("fail",):
        raise TimeoutError("secret-4711")


def _skew_pybreaker(seconds: float) -> None:
    class Skewed(dt.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> dt.datetime:
            return dt.datetime.now(tz) + dt.timedelta(seconds=seconds)

    pybreaker.datetime = Skewed


# -- in the test ---------------------------------------------------------------------------------------------------------------------


class Member:
    """One process. `start` tells it something, `reply` is what it says to that."""

    def __init__(self) -> None:
        # A fork server that has imported everything: real processes, in milliseconds each.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.in_call = False

    def start(self, *said: Any) -> None:
        self._pipe.send(said)

    def reply(self) -> Any:
        assert self._pipe.poll(SECONDS), "no answer"
        said = self._pipe.recv()
        self.in_call = said == "called"
        return said

    def is_silent(self, seconds: float) -> bool:
        """Whether it says nothing in so long."""
        return not self._pipe.poll(seconds)

    def ask(self, *said: Any) -> Any:
        self.start(*said)
        return self.reply()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(SECONDS)
        self.in_call = False


def calls(members: Iterable[Member]) -> list[Member]:
    """All make a call at the same time; those whose call is running."""
    asked = list(members)
    for member in asked:
        member.start("call")
    replies = [member.reply() for member in asked]
    assert set(replies) <= {"called", "refused"}, replies
    return [member for member in asked if member.in_call]


def end(members: Iterable[Member], how: str) -> list[str]:
    """Their running calls end, all at the same time: "fail" or "succeed"."""
    asked = list(members)
    for member in asked:
        member.start(how)
    replies = [member.reply() for member in asked]
    assert set(replies) <= {"succeeded", "failed"}, replies
    return replies


def until(happens: Callable[[], Any]) -> Any:
    """Asks again until it is so."""
    deadline = time.monotonic() + SECONDS
    while not (found := happens()):
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)  # so that it may
    return found


def soon(happens: Callable[[], Any]) -> Any:
    """Asks again until it is so; what it said last when it has not become so in the time that all processes take to look again."""
    deadline = time.monotonic() + 8 * LOOK_EVERY
    while not (found := happens()) and time.monotonic() < deadline:
        pass
    return found


def use(members: Sequence[Member], **what: Any) -> None:
    for member in members:
        member.start("use", Use(**what))
    replies = [member.reply() for member in members]
    assert set(replies) == {"ready"}, replies


def trip(members: Sequence[Member]) -> None:
    """All calls fail, until none is made any more."""
    until(lambda: not end(calls(members), "fail"))


def pass_time(members: Sequence[Member], engine: str, seconds: float) -> None:
    for member in members if engine == "plain" else members[:1]:
        said = member.ask("age", seconds)
        assert said is None, said
