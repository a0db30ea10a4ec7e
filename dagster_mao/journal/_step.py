"""The journal of one step while it runs: what it is about to do is durable before it does it, what became of it soon after.

Calls are announced many at a time, as many as last about a quarter of a second: one commit says that all of them, and every effect seen so
far, may happen now. Outcomes follow together, with the next announcement or after 50 ms. So 100 000 effects cost some tens of commits, and
a killed step leaves unknown what a quarter of a second may have done.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from dagster_mao.correlation import WorkflowLog
from dagster_mao.errors import FencedError, StoreError
from dagster_mao.journal._effect import hidden
from dagster_mao.journal._pages import INTENDED, UNKNOWN, Earlier, Entry, Page, Segment, Slot

if TYPE_CHECKING:
    from dagster_mao.journal._journal import Journal

FENCE_SECONDS = 0.05  # for which a step believes that it was not fenced
SLACK_SECONDS = 2.0  # that ending a call may take beyond its timeout
_LINGER = 0.05  # seconds that an outcome waits for others
_WINDOW_SECONDS = 0.25  # that what is announced together should last
_FIRST_WINDOW, _LARGEST_WINDOW = 16, 10_000
_COVERED_SLOTS = 32  # effects of a call that an announcement covers; further ones are announced one by one
_LOG = WorkflowLog(logging.getLogger(__name__))
T = TypeVar("T")


class Identity(NamedTuple):
    """Which step it is. `seconds`: that one try of a call may take; None where nothing ends it. `personal`: its records are hidden."""

    id: int
    workflow_id: str
    epoch: int
    agent: str
    personal: bool
    seconds: float | None


class Step:
    """One step's part of the journal, for all threads of its process.

    `elsewhere`: in another process of the step, which did not announce the calls: each effect has its intent and outcome committed alone.
    """

    def __init__(
        self,
        journal: Journal,
        identity: Identity,
        earlier: Earlier,
        *,
        elsewhere: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.identity, self.earlier, self.elsewhere = identity, earlier, elsewhere
        self.journal, self._clock = journal, clock
        self._pid = os.getpid()
        self._commits = threading.Lock()  # one commit at a time
        self._state = threading.Lock()
        self._outcomes: deque[Entry] = deque()
        self._segments: deque[Segment] = deque()  # of calls that nobody had to wait for
        self._over: deque[int] = deque()  # windows of which nothing more will happen
        self._windows: list[_Window] = []
        self._numbers = time.time_ns() if elsewhere else 0  # where the step's own process never gets to
        self._covered: set[tuple[str, int]] = set()
        self.pace, self.batch_pace = _Pace(clock), _Pace(clock)
        self._believed_until = 0.0
        self._fenced = self._closed = False
        self._wake, self._stopping, self._flusher = threading.Event(), threading.Event(), threading.Lock()
        self._flushing: threading.Thread | None = None
        self._ahead = journal.now() - clock()  # of the database's clock over this process's

    # -- calls -----------------------------------------------------------------------------------------------------------------------

    def take(self, count: int) -> int:
        """The first of so many numbers."""
        with self._state:
            first = self._numbers
            self._numbers = first + count
        return first

    def announce(self, segment: Segment, left: int) -> None:
        """Returns when what the segment says is durable. `left`: how many of it are still to happen. Raises `FencedError`, `StoreError`."""
        window = _Window(segment.first, segment.first + len(segment.keys), left)
        with self._state:
            self._windows.append(window)
        self._commit(Page(segments=[segment]), durable=True)

    def note(self, segment: Segment) -> None:
        """Notes calls that were not made, because their answers were known: with the next commit."""
        self._segments.append(segment)
        self._over.append(segment.first)

    def over(self, number: int) -> None:
        """Of this one nothing more will happen: all of it has been told."""
        with self._state:
            for window in self._windows:
                if window.first <= number < window.end:
                    window.left -= 1
                    if window.left == 0:
                        self._windows.remove(window)
                        self._over.append(window.first)
                    return

    # -- effects ---------------------------------------------------------------------------------------------------------------------

    def intend(self, number: int, slot: Slot, again: int, *, covered: bool) -> None:
        """Returns when the intent of this effect is durable, which it mostly is. Raises `FencedError`, `StoreError`."""
        place = (slot.name, slot.n)
        if not covered or again or self.elsewhere or (len(self._covered) >= _COVERED_SLOTS and place not in self._covered):
            self._commit(Page(entries=[self.entry(number, slot, INTENDED, again=again)]), durable=True)
        elif place not in self._covered:
            self._commit(Page(cover=[slot]), durable=True)
            self._covered.add(place)

    def entry(self, number: int, slot: Slot, state: int, result: str | None = None, *, again: int = 0) -> Entry:
        is_open = state in (INTENDED, UNKNOWN) and self.identity.seconds is not None
        deadline = self._clock() + self._ahead + (self.identity.seconds or 0.0) + SLACK_SECONDS if is_open else None
        return Entry(number, slot, state, result, deadline, again)

    def tell(self, entry: Entry) -> None:
        """Notes an outcome, which is committed within 50 ms."""
        self._outcomes.append(entry)
        if not self._wake.is_set():
            self._wake.set()
            if self._flushing is None and not self.elsewhere:
                self._start_flushing()

    def landed(self) -> None:
        """Commits what was told, where nothing else will: in another process of the step, and after its end."""
        if self.elsewhere or self._closed:
            self._flush()

    def check(self) -> None:
        """Raises `FencedError` when the step was fenced, as of 50 ms ago at most: a process that was stopped asks anew when it goes on."""
        if self._fenced:
            self._refuse()
        now = self._clock()
        if now < self._believed_until:
            return
        if self.journal.is_fenced(self.identity.id):
            self._fenced = True
            self._refuse()
        self._believed_until = now + FENCE_SECONDS

    def check_after(self) -> None:
        """As `check`, when an effect has been told: then it is committed at once, as a late one if the step was fenced meanwhile."""
        if self._fenced or self._clock() >= self._believed_until:
            self._commit(Page(), durable=False)

    def _refuse(self) -> None:
        raise FencedError(
            "The attempt is being compensated, or was: it may have no further effects",
            agent=self.identity.agent,
            workflow=self.identity.workflow_id,
            fix="start a new run instead of going on with this one; nothing of this step was sealed",
        )

    def here(self) -> Step:
        """This step, or, in a child process that was forked off, the step as another process has it."""
        if os.getpid() == self._pid:
            return self
        return Step(self.journal, self.identity, self.earlier, elsewhere=True, clock=self._clock)

    def told(self, record: str | None) -> str | None:
        """What the journal says in place of a record's key."""
        return hidden(self.identity.workflow_id, record) if record is not None and self.identity.personal else record

    def done_before(self) -> Earlier:
        """What this step itself has done until now, in other tries of its one call, with frames."""
        self._commit(Page(), durable=False)
        own = Earlier((self.identity.id,))
        self.journal.refresh(own)
        return own

    # -- the end ---------------------------------------------------------------------------------------------------------------------

    def executed(self) -> None:
        """Everything that happened is durable: before the seal. Raises `FencedError` and `StoreError`: then nothing may be sealed."""
        self._end_windows()
        self._commit(Page(), durable=True, state="sealing")
        self._stop()

    def sealed(self, version: int) -> None:
        """Notes the version, for whoever looks; what counts is the state log."""
        try:
            self.journal.ended(self.identity.id, "sealed", version=version)
        except StoreError as error:
            _LOG.warning("the journal was not told of a seal, which the state log has: %s", error)

    def failed(self, error: BaseException) -> None:
        """Everything that happened is told, and that nothing more will. A database that is down is logged: then more stays unknown."""
        try:
            if not self._closed:
                self._end_windows()
                self._flush()
                self._stop()
            self.journal.ended(self.identity.id, "failed", error=type(error).__name__)
        except StoreError as down:
            _LOG.warning("the journal was not told how a step failed: %s", down)
        finally:
            self._stop()

    def _end_windows(self) -> None:
        with self._state:
            self._over.extend(window.first for window in self._windows)
            self._windows.clear()

    def _stop(self) -> None:
        self._closed = True
        self._stopping.set()
        self._wake.set()
        if self._flushing is not None and self._flushing is not threading.current_thread():
            self._flushing.join()

    # -- commits ---------------------------------------------------------------------------------------------------------------------

    def _commit(self, page: Page, *, durable: bool, state: str | None = None) -> None:
        """Commits the page with all that waits. Raises `FencedError`, once what had happened is committed, and `StoreError`."""
        with self._commits:
            began = self._clock()
            over, segments = _drained(self._over), _drained(self._segments)
            outcomes = _drained(self._outcomes)  # after the windows: what is over has all been told
            told = Page(segments=segments, entries=outcomes, closed=over)
            try:
                fenced = self.journal.write(self.identity, page, told, self.earlier, durable=durable, state=state, alone=self.elsewhere)
            except BaseException:
                self._over.extendleft(reversed(over))
                self._segments.extendleft(reversed(segments))
                self._outcomes.extendleft(reversed(outcomes))
                raise
            if fenced:
                self._fenced = True
            else:
                self._believed_until = began + FENCE_SECONDS
        if fenced:
            self._refuse()

    def _flush(self) -> None:
        with suppress(FencedError):  # it is noted: whoever begins an effect is told
            self._commit(Page(), durable=False)

    def _start_flushing(self) -> None:
        with self._flusher:
            if self._flushing is None and not self._closed:
                self._flushing = threading.Thread(
                    target=copy_context().run, args=(self._keep_flushing,), name="dagster-mao-journal", daemon=True
                )
                self._flushing.start()

    def _keep_flushing(self) -> None:
        down = False
        while not self._closed:
            self._wake.wait()
            self._stopping.wait(_LINGER)
            self._wake.clear()
            try:
                if not self._closed:
                    self._flush()
                down = False
            except StoreError as error:
                if not down:
                    _LOG.warning("outcomes of effects wait for the journal: %s", error)
                down = True
                self._wake.set()


class _Window:
    """Announced numbers, and how many of them may still have effects."""

    __slots__ = ("end", "first", "left")

    def __init__(self, first: int, end: int, left: int) -> None:
        self.first, self.end, self.left = first, end, left


class _Pace:
    """How many to announce at a time."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock, self._size, self._since = clock, _FIRST_WINDOW, 0.0

    def next(self) -> int:
        """As many as last a quarter of a second at the pace of the last ones, and no more than eight times as many."""
        now = self._clock()
        if self._since:
            wanted = self._size * _WINDOW_SECONDS / max(now - self._since, 0.001)
            self._size = int(max(1, min(wanted, self._size * 8, _LARGEST_WINDOW)))
        self._since = now
        return self._size

    def begin(self) -> None:
        """The time counts from now: announcing takes its own."""
        self._since = self._clock()


def _drained(waiting: deque[T]) -> list[T]:
    """What waits, taken away; what comes meanwhile stays."""
    return [waiting.popleft() for _ in range(len(waiting))]
