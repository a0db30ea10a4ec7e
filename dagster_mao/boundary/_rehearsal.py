"""What a step of an agent is given when it is done once more without leaving anything: effects that do not happen, answers from then."""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from dagster_mao.agent import current
from dagster_mao.state import StateStore

if TYPE_CHECKING:
    from dagster_mao.gateway import Answers


class WouldHave(NamedTuple):
    """An effect that would have been had: its name, and the record (None where its key is personal, or it is about the whole batch)."""

    name: str
    record: str | None


@dataclass(frozen=True)
class Rehearsal:
    """A step that leaves nothing. `effects` notes what would have happened; with `kept_in`, answers are taken from what this store keeps,
    and one that is missing is an error; without, whoever is called is called.
    """

    effects: WouldBe
    kept_in: StateStore | None = None


class WouldBe:
    """Behind the context of an agent with effects: none of them happens, and each is noted once, however often its call is tried.

    What it returns in their place is `None`, which can be awaited too; of `ctx.effects`, None by record.
    """

    def __init__(self, *, personal: bool) -> None:
        self._personal = personal
        self._lock = threading.Lock()
        self._noted: dict[tuple[Any, ...], WouldHave] = {}

    @property
    def told(self) -> tuple[WouldHave, ...]:
        """In the order in which they would have happened."""
        return tuple(self._noted.values())

    def begun(self) -> _Try:
        return _Try(self)

    def note(self, key: tuple[Any, ...], name: str, record: str | None) -> None:
        with self._lock:
            self._noted.setdefault(key, WouldHave(name, None if self._personal else record))

    def effect(self, name: str, function: Callable[..., Any], *, compares_epoch: bool = False) -> Any:
        return self.begun().effect(name, function)

    def effects(self, name: str, function: Callable[..., Any], records: Any, *, key: str | None = None, **options: Any) -> Any:
        return self.begun().effects(name, function, records, key=key)


class _Try:
    """One try of a call."""

    def __init__(self, having: WouldBe) -> None:
        self._having = having
        self._counts: Counter[str] = Counter()

    def begun(self) -> _Try:
        return _Try(self._having)

    def effect(self, name: str, function: Callable[..., Any], *, compares_epoch: bool = False) -> Any:
        _, context = current()
        call, record = getattr(context, "idempotency_key", ""), getattr(context, "record", None)
        self._having.note((call, name, self._counts[name]), name, record)
        self._counts[name] += 1
        return _Nothing()

    def effects(self, name: str, function: Callable[..., Any], records: Any, *, key: str | None = None, **options: Any) -> Any:
        frame = records.collect() if isinstance(records, pl.LazyFrame) else records
        rows = frame.iter_rows(named=True) if isinstance(frame, pl.DataFrame) else iter(frame)
        column = str(key)
        keys = [str(row[column] if isinstance(row, Mapping) else getattr(row, column)) for row in rows]
        for record in keys:
            self._having.note((name, record), name, record)
        nothing = dict.fromkeys(keys)
        return _awaited(nothing) if inspect.iscoroutinefunction(function) else nothing


class _Nothing:
    """In the place of what an effect would have returned: nothing, also when it is awaited."""

    def __bool__(self) -> bool:
        return False

    def __await__(self) -> Generator[Any, None, None]:
        return
        yield

    def __repr__(self) -> str:
        return "<nothing: the effect did not happen>"


async def _awaited(value: Any) -> Any:
    return value


class AnswersThen:
    """The answers that were kept, to be looked up; nothing is added to them, and nothing noted."""

    def __init__(self, answers: Answers) -> None:
        self.known = answers.known

    def unlogged(self) -> Iterator[Any]:
        return iter(())

    def logged(self) -> None: ...

    def close(self) -> None: ...


class NoAnswers:
    """Where none was ever kept."""

    def known(self, keys: Sequence[str]) -> dict[str, Any]:
        return {}

    def unlogged(self) -> Iterator[Any]:
        return iter(())

    def logged(self) -> None: ...

    def close(self) -> None: ...


@contextmanager
def answers_then(store: StateStore, folder: Any, **scope: Any) -> Iterator[AnswersThen | NoAnswers]:
    """What a store's shared database keeps, of one agent, workflow and fingerprint. An SQLite file is copied, and the copy is read."""
    from dagster_mao.gateway import Answers, read_only  # SQLAlchemy is imported by those who need it

    shared = read_only(store.database, folder, *Answers.TABLES) if store.database else None
    if shared is None:
        yield NoAnswers()
        return
    try:
        yield AnswersThen(Answers(shared, keep=float("1e12"), **scope))
    finally:
        shared.close()
