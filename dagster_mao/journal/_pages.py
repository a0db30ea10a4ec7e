"""What a step writes into the journal, page by page, and what its pages tell when they are read again. No SQL here.

A step numbers what it is about to do: its calls, and each effect of a batch. A page says any of these things:

- segment: these calls, or these effects of a batch, are about to happen (their records and keys);
- cover: any of the calls may have this effect, so that an announced call is the intent of it, and the effect needs no line of its own;
- entry: what became of one effect; or its intent, where nothing covers it;
- closed: of this segment nothing more will happen, and whatever happened has its entry.

So a step that dies leaves nothing out: what was announced, is covered, and has no entry, may have happened.
"""

from __future__ import annotations

import bisect
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic_core import from_json, to_json

from dagster_mao.journal._effect import effect_key

INTENDED, DONE, UNKNOWN, NOT_DONE = range(4)
GONE_DONE, GONE_UNKNOWN = 4, 5  # superseded: a saga of its own undoes it
KEY_BYTES = 32


class Slot(NamedTuple):
    """The n-th effect of a name in a call. `compares`: its target compares epochs, and refuses late effects itself."""

    name: str
    n: int = 0
    compares: bool = False


class Segment(NamedTuple):
    """Calls, in order, that are about to be made; with a `slot`, effects of a batch that the call `parent` is about to have.

    `keys` are those of the calls, or of the effects.
    """

    first: int
    records: Sequence[str | None]
    keys: Sequence[bytes]
    slot: Slot | None = None
    parent: int = 0


class Entry(NamedTuple):
    """What is known of one effect. `item`: the number of its call, or its own in a batch. `result`: JSON. `deadline`: as time.time()."""

    item: int
    slot: Slot
    state: int
    result: str | None = None
    deadline: float | None = None
    again: int = 0


@dataclass
class Page:
    """What one commit of a step says."""

    segments: Sequence[Segment] = ()
    cover: Sequence[Slot] = ()
    entries: Sequence[Entry] = ()
    closed: Sequence[int] = ()
    saga: int = 0  # by which the entries are superseded

    def __bool__(self) -> bool:
        return bool(self.segments or self.cover or self.entries or self.closed)

    def encode(self) -> tuple[bytes, bytes]:
        """The page as two columns: the keys, which nothing compresses, and compressed JSON for the rest."""
        slots = {slot: place for place, slot in enumerate(dict.fromkeys(entry.slot for entry in self.entries))}
        told: dict[str, Any] = {}
        if self.segments:
            told["segments"] = [(s.first, s.records, s.slot, s.parent) for s in self.segments]
        if self.cover:
            told["cover"] = self.cover
        if self.entries:
            told["slots"] = list(slots)
            # Column by column: half the size, and a third of the time.
            items, of, states, results, deadlines, agains = zip(
                *((e.item, slots[e.slot], e.state, e.result, e.deadline, e.again) for e in self.entries), strict=True
            )
            told["entries"] = [items, of, states, results, deadlines, agains if any(agains) else None]
        if self.closed:
            told["closed"] = self.closed
        if self.saga:
            told["saga"] = self.saga
        return b"".join(key for segment in self.segments for key in segment.keys), zlib.compress(to_json(told), 1)

    @classmethod
    def decode(cls, keys: bytes, body: bytes) -> Page:
        told, place = from_json(zlib.decompress(body)), 0

        def taken(count: int) -> list[bytes]:
            nonlocal place
            start, place = place, place + count * KEY_BYTES
            return [keys[at : at + KEY_BYTES] for at in range(start, place, KEY_BYTES)]

        segments = [
            Segment(first, records, taken(len(records)), Slot(*slot) if slot else None, parent)
            for first, records, slot, parent in told.get("segments", ())
        ]
        slots = [Slot(*slot) for slot in told.get("slots", ())]
        entries: list[Entry] = []
        if told.get("entries"):
            items, of, states, results, deadlines, agains = told["entries"]
            rows = zip(items, of, states, results, deadlines, agains or [0] * len(items), strict=True)
            entries = [Entry(item, slots[slot], state, result, deadline, again) for item, slot, state, result, deadline, again in rows]
        cover = [Slot(*slot) for slot in told.get("cover", ())]
        return cls(segments, cover, entries, told.get("closed", []), told.get("saga", 0))


class Outstanding(NamedTuple):
    """An effect that happened or may have happened, and was not undone. `call` is the key of its call; `known`: it has an entry."""

    key: bytes
    call: bytes
    record: str | None
    entry: Entry
    known: bool
    is_of_batch: bool


class _Mark(NamedTuple):
    entry: Entry
    page: int
    saga: int


@dataclass
class Told:
    """What the pages of one step tell, read in their order."""

    segments: list[Segment] = field(default_factory=list)
    last: int = 0  # the last page read
    _pages: list[int] = field(default_factory=list)  # of the segments
    _cover: dict[tuple[str, int], Slot] = field(default_factory=dict)
    _marks: dict[tuple[int, str, int, int], _Mark] = field(default_factory=dict)
    _closed: set[int] = field(default_factory=set)

    def add(self, number: int, page: Page) -> None:
        for segment in page.segments:
            self.segments.append(segment)
            self._pages.append(number)
        for slot in page.cover:
            self._cover[slot.name, slot.n] = slot
        for entry in page.entries:
            place = (entry.item, entry.slot.name, entry.slot.n, entry.again)
            self._marks.pop(place, None)  # newest last
            self._marks[place] = _Mark(entry, number, page.saga)
        self._closed.update(page.closed)
        self.last = number

    def calls(self) -> set[bytes]:
        """The keys of all calls that the step set out to make."""
        return {key for segment in self.segments if segment.slot is None for key in segment.keys}

    def batch_keys(self) -> set[bytes]:
        """The keys of all effects in batches that the step set out to have."""
        return {key for segment in self.segments if segment.slot is not None for key in segment.keys}

    def records(self) -> set[str | None]:
        """The records that the step set out to call its agent for."""
        return {record for segment in self.segments if segment.slot is None for record in segment.records}

    def places(self) -> dict[bytes, int]:
        """The number of each call, and of each effect in a batch, by its key."""
        return {key: segment.first + n for segment in self.segments for n, key in enumerate(segment.keys)}

    def outstanding(self, undone_to: int = 0) -> Iterator[Outstanding]:
        """The effects to be undone, newest first. What was told up to the page `undone_to` is undone already."""
        find = _Finder(self.segments)
        for place in sorted(range(len(self.segments)), key=lambda place: -self.segments[place].first):
            segment = self.segments[place]
            if segment.first in self._closed or self._pages[place] <= undone_to:
                continue
            slots = list(self._cover.values()) if segment.slot is None else [segment.slot]
            for item in reversed(range(segment.first, segment.first + len(segment.keys))):
                for slot in reversed(slots):
                    if (item, slot.name, slot.n, 0) not in self._marks:
                        yield find.effect(Entry(item, slot, UNKNOWN), known=False)
        for mark in reversed(self._marks.values()):
            if mark.page > undone_to and mark.entry.state in (INTENDED, DONE, UNKNOWN):
                yield find.effect(mark.entry, known=True)

    def superseded(self, saga: int) -> Iterator[Outstanding]:
        """The effects that are this saga's to undo, newest first."""
        find = _Finder(self.segments)
        return (find.effect(mark.entry, known=True) for mark in reversed(self._marks.values()) if mark.saga == saga)


class _Finder:
    """Where numbers lie."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        self._segments = sorted(segments, key=lambda segment: segment.first)
        self._firsts = [segment.first for segment in self._segments]

    def place(self, item: int) -> tuple[Segment, int]:
        segment = self._segments[bisect.bisect_right(self._firsts, item) - 1]
        return segment, item - segment.first

    def effect(self, entry: Entry, *, known: bool) -> Outstanding:
        segment, offset = self.place(entry.item)
        key, record, slot = segment.keys[offset], segment.records[offset], entry.slot
        if segment.slot is None:
            return Outstanding(bytes.fromhex(effect_key(key.hex(), slot.name, slot.n, entry.again)), key, record, entry, known, False)
        above, at = self.place(segment.parent)
        return Outstanding(key, above.keys[at], record, entry, known, True)


Slots = dict[tuple[str, int], tuple[int, int, "str | None"]]  # by name and number: how often undone before, state, result


class Earlier:
    """What earlier steps of an agent did in the same epoch, by call and by key: it is not done another time."""

    def __init__(self, steps: Iterable[int]) -> None:
        self.steps = tuple(steps)
        self.last = 0
        self._segments: dict[int, list[Segment]] = {step: [] for step in self.steps}
        self._calls: dict[bytes, Slots] = {}
        self._keys: dict[bytes, tuple[int, str | None]] = {}

    def add(self, step: int, number: int, page: Page) -> None:
        """Reads the next page. Pages of all steps come in their order."""
        segments = self._segments[step]
        segments.extend(page.segments)
        find, self.last = _Finder(segments), number
        for entry in page.entries:
            segment, offset = find.place(entry.item)
            key = segment.keys[offset]
            if segment.slot is None:
                slots = self._calls.setdefault(key, {})
                again, state, _ = slots.get((entry.slot.name, entry.slot.n), (0, NOT_DONE, None))
                if _outweighs(entry.again, entry.state, again, state):
                    slots[entry.slot.name, entry.slot.n] = (entry.again, entry.state, entry.result)
            elif _outweighs(0, entry.state, 0, self._keys.get(key, (NOT_DONE, None))[0]):
                self._keys[key] = (entry.state, entry.result)

    def of_call(self, call: bytes) -> Slots:
        """What is known of a call's effects. One that was superseded is to be done under another key."""
        return {
            slot: (again + 1, NOT_DONE, None) if state in (GONE_DONE, GONE_UNKNOWN) else (again, state, result)
            for slot, (again, state, result) in self._calls.get(call, {}).items()
        }

    def of_key(self, key: bytes) -> tuple[int, str | None]:
        """The state and result of an effect in a batch."""
        return self._keys.get(key, (NOT_DONE, None))


def _outweighs(again: int, state: int, other_again: int, other: int) -> bool:
    """Whether an entry says more than the one before it, perhaps of another step: what was done is not made unknown by a later one."""
    return again > other_again or (again == other_again and (other != DONE or state in (GONE_DONE, GONE_UNKNOWN)))
