"""The calls of a step, and the effects that each of them has: what stands behind `ctx.effect` and `ctx.effects`."""

from __future__ import annotations

import inspect
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from dagster_mao.errors import AgentFailedError, FencedError, WiringError
from dagster_mao.journal._effect import Effect, NotDoneError, batch_key, effect_key
from dagster_mao.journal._pages import DONE, GONE_DONE, GONE_UNKNOWN, INTENDED, NOT_DONE, UNKNOWN, Earlier, Entry, Segment, Slot, Slots
from dagster_mao.journal._step import Identity, Step
from dagster_mao.journal._values import digest_of, driven, json_of, nothing, rows_of, value_of, was_awaited

if TYPE_CHECKING:
    from dagster_mao.journal._journal import Journal


class Chunk:
    """The calls that come next, in order, each by its record and idempotency key; also those whose answer is known already.

    They are told by their place in it.
    """

    def __init__(self, step: Step, calls: Sequence[tuple[str | None, str]]) -> None:
        self._step, self._first, self._calls = step, step.take(len(calls)), calls
        self._announced = 0
        self._skipped: set[int] = set()

    def announce(self, place: int) -> None:
        """Returns when the intent of this call is durable. Places come in order. Raises `FencedError` and `StoreError`."""
        if place < self._announced:
            return
        pace = self._step.pace
        start, self._announced = self._announced, min(max(place + 1, self._announced + pace.next()), len(self._calls))
        left = sum(at not in self._skipped for at in range(start, self._announced))
        self._step.announce(self._segment(start), left)
        pace.begin()

    def call(self, place: int) -> Calling:
        """An announced call, as a context around all its tries."""
        record, key = self._calls[place]
        earlier = self._step.earlier
        return Calling(self._step, self._first + place, record, key, earlier.of_call(bytes.fromhex(key)) if earlier.steps else {})

    def skip(self, place: int) -> None:
        """A call that is not made: its answer is known."""
        if place < self._announced:
            self._step.over(self._first + place)
        else:
            self._skipped.add(place)

    def close(self) -> None:
        """No call of it will be made any more."""
        if self._announced < len(self._calls):
            start, self._announced = self._announced, len(self._calls)
            self._step.note(self._segment(start))

    def _segment(self, start: int) -> Segment:
        calls = self._calls[start : self._announced]
        step = self._step
        return Segment(self._first + start, [step.told(record) for record, _ in calls], [bytes.fromhex(key) for _, key in calls])


class Calling:
    """One call, over all its tries: what is known of its effects, and which of them are on their way."""

    __slots__ = ("_closed", "_flying", "_lock", "_running", "_slots", "_step", "key", "number", "record", "tries")

    def __init__(self, step: Step, number: int, record: str | None, key: str, slots: Slots) -> None:
        self._step, self.number, self.record, self.key, self._slots = step, number, record, key, slots
        self._lock = threading.Lock()
        self._flying: dict[tuple[int, Slot], list[int]] = {}  # of each effect on its way, how often it is done again; once per flight
        self._running: Try | None = None
        self._closed = False
        self.tries = 0

    def __enter__(self) -> Calling:
        return self

    def __exit__(self, *_: object) -> None:
        self._land(close=True)
        self._step.over(self.number)

    def __reduce__(self) -> Any:
        step = self._step
        return (_elsewhere, (step.journal, step.identity, step.earlier.steps, self.number, self.record, self.key, self._slots))

    def begun(self) -> Try:
        """A new try. One before it that still goes on, because it could not be ended, may begin no effect any more."""
        self._land(close=False)
        self.tries += 1
        self._running = running = Try(self, self._step.here())
        return running

    def _land(self, *, close: bool) -> None:
        with self._lock:
            self._closed = close
            self._running = None
            # Their outcomes may come after all is over. Until then nobody knows.
            for (number, slot), flights in self._flying.items():
                self._step.tell(self._step.entry(number, slot, INTENDED, again=flights[0]))

    def depart(self, running: Try, number: int, slot: Slot, again: int) -> None:
        """Notes that an effect is on its way. Raises `FencedError` in a try that is over."""
        with self._lock:
            if self._closed or self._running is not running:
                identity = self._step.identity
                what = "The call was ended, by its timeout, before it came to this effect"
                raise FencedError(what, agent=identity.agent, workflow=identity.workflow_id)
            self._flying.setdefault((number, slot), []).append(again)

    def arrive(self, step: Step, entry: Entry, before: int) -> None:
        """Tells an outcome, in the light of what was known `before`: what may have happened already did not not happen."""
        with self._lock:
            flights = self._flying[entry.item, entry.slot]
            flights.pop()
            if not flights:
                del self._flying[entry.item, entry.slot]
            if entry.item == self.number:
                before = self.known(entry.slot)[1]
            if entry.state != DONE and before == DONE:
                return
            if entry.state == NOT_DONE and (flights or before in (INTENDED, UNKNOWN)):
                entry = step.entry(entry.item, entry.slot, UNKNOWN, again=entry.again)
            if entry.item == self.number:
                self._slots[entry.slot.name, entry.slot.n] = (entry.again, entry.state, entry.result)
            step.tell(entry)

    def known(self, slot: Slot) -> tuple[int, int, str | None]:
        """How often it was undone and is done again, its state, its result."""
        return self._slots.get((slot.name, slot.n), (0, NOT_DONE, None))

    def recall(self, step: Step) -> None:
        """In another process: what earlier tries, in processes of their own, have told."""
        if self.tries == 1 and step.elsewhere:
            own = Earlier((step.identity.id,))
            step.journal.refresh(own, call=(self.number, bytes.fromhex(self.key)))
            self._slots.update(own.of_call(bytes.fromhex(self.key)))


def _elsewhere(
    journal: Journal, identity: Identity, earlier: Sequence[int], number: int, record: str | None, key: str, slots: Slots
) -> Calling:
    return Calling(Step(journal, identity, Earlier(earlier), elsewhere=True), number, record, key, slots)


class Try:
    """One try of a call, as `ctx.effect` and `ctx.effects` have it."""

    __slots__ = ("_calling", "_counts", "_step")

    def __init__(self, calling: Calling, step: Step) -> None:
        self._calling, self._step = calling, step
        self._counts: Counter[str] = Counter()

    def begun(self) -> Try:
        return self._calling.begun()

    def effect(self, name: str, function: Callable[[Effect], Any], *, compares_epoch: bool = False) -> Any:
        slot = Slot(name, self._counts[name], compares_epoch)
        self._counts[name] += 1
        return driven(self._effect(slot, function))

    def _effect(self, slot: Slot, function: Callable[[Effect], Any]) -> Generator[Any, Any, Any]:
        step, calling = self._step.here(), self._calling
        if step.elsewhere:
            calling.recall(step)
        again, state, result = calling.known(slot)
        if state == DONE:
            step.check()
            if was_awaited(result):
                yield nothing()
            return self._returned(slot.name, result)
        step.intend(calling.number, slot, again, covered=calling.record is not None)
        step.check()
        effect = Effect(effect_key(calling.key, slot.name, slot.n, again), step.identity.epoch, slot.name, calling.record)
        calling.depart(self, calling.number, slot, again)
        became, told = UNKNOWN, None
        try:
            value = function(effect)
            if awaited := inspect.isawaitable(value):
                value = yield value
            became, told = DONE, json_of(value, awaited=awaited)
        except NotDoneError:
            became = NOT_DONE
            raise
        finally:
            calling.arrive(step, step.entry(calling.number, slot, became, told, again=again), state)
            step.landed()
        step.check_after()
        return self._returned(slot.name, told)

    def _returned(self, name: str, told: str | None) -> Any:
        if told is None:
            raise AgentFailedError(
                f"The function of the effect {name!r} returned what is no JSON",
                agent=self._step.identity.agent,
                fix="return a string, a number, a dict or a list: it is what a later try is handed in place of the effect",
            )
        return value_of(told)

    def effects(
        self,
        name: str,
        function: Callable[..., Any],
        records: Any,
        *,
        key: str | None = None,
        compares_epoch: bool = False,
        in_batches_of: int | None = None,
    ) -> Any:
        agent = self._step.identity.agent
        if self._calling.record is not None:
            raise WiringError(
                f"Agent {agent!r} calls ctx.effects for one record",
                agent=agent,
                field="effects",
                fix="call ctx.effect; ctx.effects is for agents that take frames",
            )
        self._counts[name] += 1
        if self._counts[name] > 1:
            raise WiringError(
                f"Agent {agent!r} has two effects {name!r} in one call",
                agent=agent,
                field="effects",
                fix="give a second batch another name",
            )
        return driven(self._effects(Slot(name, 0, compares_epoch), function, rows_of(records, key, agent), in_batches_of))

    def _effects(
        self, slot: Slot, function: Callable[..., Any], rows: Iterator[tuple[str, Any]], size: int | None
    ) -> Generator[Any, Any, dict[str, Any]]:
        step, results = self._step.here(), dict[str, Any]()
        if inspect.iscoroutinefunction(function):
            yield nothing()
        if step.elsewhere:
            step.journal.refresh(step.earlier)
        own = step.done_before() if step.elsewhere or self._calling.tries > 1 else None
        pace = step.batch_pace
        while window := list(islice(rows, max(pace.next(), size or 1))):
            effects = [self._of_row(step, slot.name, record, row) for record, row in window]
            keys = [bytes.fromhex(effect.key) for effect in effects]
            first = step.take(len(effects))
            step.announce(Segment(first, [step.told(effect.record) for effect in effects], keys, slot, self._calling.number), 1)
            pace.begin()
            try:
                waiting = list[_Waiting]()
                for number, (effect, key) in enumerate(zip(effects, keys, strict=True), first):
                    state, told = step.earlier.of_key(key)
                    if own is not None and state != DONE:
                        state, told = own.of_key(key)
                    if state == DONE:
                        if was_awaited(told):
                            yield nothing()
                        results[str(effect.record)] = self._returned(slot.name, told)
                    else:
                        waiting.append(_Waiting(number, effect, state))
                parts = [waiting[at : at + (size or 1)] for at in range(0, len(waiting), size or 1)]
                for part in parts:
                    results.update((yield from self._part(step, slot, function, part, whole=bool(size))))
            finally:
                step.over(first)
                step.landed()
        return results

    def _of_row(self, step: Step, name: str, record: str, row: Any) -> Effect:
        identity, digest, again = step.identity, digest_of(row), 0
        while True:
            key = batch_key(identity.workflow_id, identity.epoch, identity.agent, name, record, digest, again)
            if step.earlier.of_key(bytes.fromhex(key))[0] not in (GONE_DONE, GONE_UNKNOWN):
                return Effect(key, identity.epoch, name, record, row=row)
            again += 1

    def _part(
        self, step: Step, slot: Slot, function: Callable[..., Any], part: Sequence[_Waiting], *, whole: bool
    ) -> Generator[Any, Any, dict[str, Any]]:
        """One call of the function: for one effect, or with a list of them."""
        step.check()
        for one in part:
            self._calling.depart(self, one.number, slot, 0)
        became, told = UNKNOWN, list[str | None]()
        try:
            value = function([one.effect for one in part] if whole else part[0].effect)
            if awaited := inspect.isawaitable(value):
                value = yield value
            answers = list(value) if whole else [value]
            if len(answers) != len(part):
                raise AgentFailedError(
                    f"The function of the effects {slot.name!r} returned {len(answers)} results for {len(part)} effects",
                    agent=step.identity.agent,
                    fix="return one result per effect, in their order",
                )
            became, told = DONE, [json_of(answer, awaited=awaited) for answer in answers]
        except NotDoneError:
            became = NOT_DONE
            raise
        finally:
            for one, result in zip(part, told or [None] * len(part), strict=True):
                self._calling.arrive(step, step.entry(one.number, slot, became, result), one.state)
        step.check_after()
        return {str(one.effect.record): self._returned(slot.name, result) for one, result in zip(part, told, strict=True)}


class _Waiting(NamedTuple):
    number: int
    effect: Effect
    state: int
