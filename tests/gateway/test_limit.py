"""Rate limits: never more than so many in any window, over processes, with bursts, blocks, late and dead users, and clocks set back."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dagster_mao.errors import RateLimitError, StoreError
from dagster_mao.gateway._limit import Grant, Limiter, Permit, merged
from dagster_mao.gateway._quota import Quota
from dagster_mao.gateway._shared import SharedStore
from tests.gateway.crew import Member

START = 1_700_000_000.0


class Time:
    """True time, told to the database and, each with an offset of its own, to processes."""

    def __init__(self) -> None:
        self.now = START
        self.set_back = 0.0

    def database(self) -> float:
        return self.now - self.set_back

    def of_process(self, offset: float) -> Callable[[], float]:
        return lambda: self.now + offset


def most_in_a_window(uses: list[tuple[float, int]], seconds: float) -> int:
    """The most permits used in any window of so many seconds. A microsecond is rounding."""
    uses = sorted(uses)
    most = total = first = 0
    for when, permits in uses:
        total += permits
        while uses[first][0] <= when - seconds + 2e-6:
            total -= uses[first][1]
            first += 1
        most = max(most, total)
    return most


class InMemory:
    """Naive: exact in one process, unknown to the others."""

    def __init__(self, calls: int, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.calls, self.seconds, self.clock = calls, seconds, clock
        self.uses: list[float] = []

    def reserve(self) -> float:
        now = self.clock()
        start = max(now, self.uses[-self.calls] + self.seconds) if len(self.uses) >= self.calls else now
        self.uses.append(start)
        return start - now


class Bucket:
    """Naive: a bucket that holds a full burst and is refilled all the time, as GCRA is mostly configured."""

    def __init__(self, calls: int, seconds: float, clock: Callable[[], float]) -> None:
        self.calls, self.each, self.clock, self.arrival = calls, seconds / calls, clock, 0.0

    def reserve(self) -> float:
        now = self.clock()
        wait = max(0.0, self.arrival - (self.calls - 1) * self.each - now)
        self.arrival = max(self.arrival, now) + self.each
        return wait


class Hoarding(Limiter):
    """Naive: a block of permits is good for ever."""

    def _fetched(self, permits: int, not_before: float) -> Permit:
        permit = super()._fetched(permits, not_before)
        self._closes = float("inf")
        return permit


@pytest.fixture
def clock() -> Time:
    return Time()


@pytest.fixture
def store(tmp_path: Path, clock: Time) -> SharedStore:
    return SharedStore(tmp_path / "shared.db", clock=clock.database)


def test_a_burst_is_granted_whole_and_the_next_when_it_has_left_the_window(store: SharedStore, clock: Time) -> None:
    limiter = Limiter(store, "api", 60, 60.0, clock=clock.of_process(0))
    assert [limiter.reserve() for _ in range(60)] == [0.0] * 60
    assert limiter.reserve() == pytest.approx(61.0)
    clock.now += 61.0
    assert limiter.reserve(59) == 0.0
    assert limiter.reserve() == pytest.approx(61.0)


@given(
    calls=st.one_of(st.integers(1, 4), st.integers(1, 400)),
    seconds=st.sampled_from([1.0, 60.0, 3600.0]),
    steps=st.lists(
        st.tuples(
            st.sampled_from([0.0, 1e-6, 0.001, 0.01, 0.2, 0.5, 0.97, 1.01, 30.0]),  # time that passes, in shares of the window
            st.integers(0, 2),  # the process
            st.sampled_from([1, 1, 1, 1, 3, 50]),  # permits
            st.sampled_from([0.0, 0.3, 1.0]),  # how late it is, in shares of the slack
            st.sampled_from([1.0, 1.0, 0.0, 0.5]),  # what it uses of them
            st.sampled_from([0.0, 0.0, 0.0, 0.004, 0.3, 2.5]),  # how long it cannot use them yet, in windows
        ),
        min_size=10,
        max_size=120,
    ),
    steps_back=st.lists(st.tuples(st.integers(0, 119), st.floats(0, 7200)), max_size=2),
)
@settings(max_examples=60, deadline=None)
def test_no_window_ever_holds_more_than_the_limit(
    calls: int, seconds: float, steps: list[tuple[float, int, int, float, float, float]], steps_back: list[tuple[int, float]]
) -> None:
    clock = Time()
    with TemporaryDirectory() as folder:
        store = SharedStore(Path(folder) / "shared.db", clock=clock.database)
        limiters = [Limiter(store, "api", calls, seconds, clock=clock.of_process(offset)) for offset in (0.0, -1e6, 5e5)]
        uses = []
        for index, (passes, process, permits, late, share, later) in enumerate(steps):
            clock.now += passes * seconds
            clock.set_back += sum(back for at, back in steps_back if at == index)
            limiter = limiters[process]
            permit = limiter.reserve(min(permits, calls), not_before=limiter._clock() + later * seconds)
            assert permit >= later * seconds - 1e-5
            used = round(permit.permits * share)
            uses.append((clock.now + permit + late * limiter.slack, used))
            limiter.settle((permit, used))
        store.close()
    assert most_in_a_window(uses, seconds) <= calls


def test_one_that_is_late_by_the_slack_breaks_nothing(store: SharedStore, clock: Time) -> None:
    limiter = Limiter(store, "api", 10, 60.0, clock=clock.of_process(0))
    uses = [(clock.now + limiter.reserve(10) + limiter.slack, 10)]
    clock.now += 60.2
    uses += hasty(limiter, clock, [(10, 0.0)])
    assert most_in_a_window(uses, 60.0) == 10


def test_what_a_slow_process_took_and_did_not_use_goes_to_others(store: SharedStore, clock: Time) -> None:
    slow, other = (Limiter(store, "api", 600, 60.0, clock=clock.of_process(0)) for _ in range(2))
    used = 0
    while slow._left < 3:
        slow.reserve()
        used += 1
    clock.now += 1.0
    slow.reserve()  # gives back what was left, and takes as many as it had used
    assert other.reserve(600 - used - slow._took) == 0.0
    assert other.reserve() > 0


def hasty(limiter: Any, clock: Time, pauses: list[tuple[int, float]]) -> list[tuple[float, int]]:
    """So many reservations after each pause, each used as soon as may be."""
    uses = []
    for number, pause in pauses:
        clock.now += pause
        uses += [(clock.now + limiter.reserve(), 1) for _ in range(number)]
    return uses


def test_a_refilled_bucket_allows_twice_the_limit(store: SharedStore, clock: Time) -> None:
    schedule = [(100, 0.0), (100, 1.0)]
    assert most_in_a_window(hasty(Bucket(100, 60.0, clock.of_process(0)), clock, schedule), 60.0) > 190
    assert most_in_a_window(hasty(Limiter(store, "api", 100, 60.0, clock=clock.of_process(0)), clock, schedule), 60.0) == 100


@pytest.mark.parametrize("kind", [Hoarding, Limiter])
def test_a_block_that_is_kept_for_later_breaks_the_limit(store: SharedStore, clock: Time, kind: type[Limiter]) -> None:
    slow, others = kind(store, "api", 600, 6.0, clock=clock.of_process(0)), Limiter(store, "api", 600, 6.0, clock=clock.of_process(0))
    while slow._left < 8:
        slow.reserve()
    clock.now += 6.3  # what the slow one took has left the window, says the log
    kept = slow._left
    most = most_in_a_window(hasty(slow, clock, [(kept, 0.0)]) + hasty(others, clock, [(600, 0.0)]), 6.0)
    assert most == 600 + kept if kind is Hoarding else most <= 600


def test_a_limit_in_full_use_is_used_to_nearly_the_whole(store: SharedStore, clock: Time) -> None:
    limiters = [Limiter(store, "api", 600, 60.0, clock=clock.of_process(0)) for _ in range(8)]
    ends = []
    for number in range(5_950):  # and some that the processes hold in the end
        ends.append(clock.now + limiters[number % 8].reserve())
    assert max(ends) - clock.now == pytest.approx(9 * 61)  # ten bursts: nine windows, each with its slack


def test_waiting_is_first_come_first_served(store: SharedStore, clock: Time) -> None:
    limiter = Limiter(store, "api", 10, 60.0, clock=clock.of_process(0))
    waits = [limiter.reserve() for _ in range(100)]
    assert waits == sorted(waits)


def test_a_fast_limit_costs_few_round_trips_and_a_slow_user_holds_little(
    store: SharedStore, clock: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    trips = 0
    transaction = SharedStore.transaction

    def counted(self: SharedStore, **options: Any) -> Any:
        nonlocal trips
        trips += 1
        return transaction(self, **options)

    monkeypatch.setattr(SharedStore, "transaction", counted)
    fast = Limiter(store, "api", 600_000, 60.0, clock=clock.of_process(0))
    for _ in range(50_000):
        fast.reserve()
    assert trips < 30
    clock.now += 3600
    slow = Limiter(store, "api", 600_000, 60.0, clock=clock.of_process(0))
    for _ in range(20):
        slow.reserve()
        clock.now += 10.0
    assert slow._took <= 2


def test_tokens_are_corrected_when_they_are_known(store: SharedStore, clock: Time) -> None:
    limiter = Limiter(store, "tokens", 1_000, 60.0, clock=clock.of_process(0))
    first = limiter.reserve(900)
    assert (first, first.permits) == (0.0, 900)
    waiting = limiter.reserve(200)
    assert waiting > 60
    limiter.settle((waiting, 0))  # it was not made after all
    limiter.settle((first, 300))
    assert limiter.reserve(700) == 0.0
    assert limiter.reserve(1) > 60


def test_tokens_used_beyond_what_was_reserved_delay_the_next(store: SharedStore, clock: Time) -> None:
    limiter = Limiter(store, "tokens", 1_000, 60.0, clock=clock.of_process(0))
    permit = limiter.reserve(100)
    clock.now += 30
    limiter.settle((permit, 950))
    assert limiter.reserve(51) == pytest.approx(31.0)  # until the 100 have left
    assert limiter.reserve(200) == pytest.approx(60.0)  # until the 850 have, which count from when they were told


def test_a_late_correction_takes_nothing_from_others(store: SharedStore, clock: Time) -> None:
    limiter = Limiter(store, "tokens", 1_000, 60.0, clock=clock.of_process(0))
    old = limiter.reserve(1_000)
    clock.now += 100
    assert limiter.reserve(1_000) == 0.0
    limiter.settle((old, 0))
    assert limiter.reserve(1) > 60


def test_a_clock_set_back_delays_and_does_not_stop(store: SharedStore, clock: Time) -> None:
    limiter = Limiter(store, "api", 5, 60.0, clock=clock.of_process(0))
    for _ in range(5):
        limiter.reserve()
    clock.set_back = 86_400.0
    assert 0 < limiter.reserve() <= 61.0


def test_more_than_the_limit_ever_grants_is_refused(store: SharedStore) -> None:
    limiter = Limiter(store, "api", 10, 60.0)
    with pytest.raises(RateLimitError, match=r"11 permits of the rate limit 'api': 10 in 60 seconds.*do less"):
        limiter.reserve(11)
    with pytest.raises(RateLimitError, match="0 permits"):
        limiter.reserve(0)


def test_keys_are_apart_and_shared_by_name(store: SharedStore) -> None:
    one, same, other = (Limiter(store, key, 1, 60.0) for key in ("one", "one", "other"))
    assert one.reserve() == 0.0
    assert other.reserve() == 0.0
    assert same.reserve() > 59


def test_an_event_loop_is_not_held_up_by_the_database(shared: SharedStore) -> None:
    quota = Quota(Limiter(shared, "api", 5, 60.0), None, 1)

    async def main() -> list[float]:
        beats = 0

        async def beat() -> None:
            nonlocal beats
            while True:
                beats += 1
                await asyncio.sleep(0)

        beating = asyncio.create_task(beat())
        waits = await asyncio.gather(*(quota.areserve() for _ in range(8)))
        beating.cancel()
        assert beats > 8
        return [reserved.wait for reserved in waits]

    assert sorted(wait > 0 for wait in asyncio.run(main())) == [False] * 5 + [True] * 3


def test_a_database_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="shared database"):
        Limiter(SharedStore(tmp_path / "file" / "shared.db"), "api", 5, 60.0).reserve()


def test_merging_forgets_no_permit_and_frees_none_earlier() -> None:
    grants = [Grant(n, n, n * 10, n * 10 + 5, n) for n in range(1, 200)]
    told = merged(grants, 64)
    assert len(told) == 64
    assert sum(grant.permits for grant in told) == sum(grant.permits for grant in grants)
    for grant in grants:
        [keeper] = [one for one in told if one.first <= grant.number <= one.number]
        assert keeper.start <= grant.start
        assert keeper.end >= grant.end


# -- processes -----------------------------------------------------------------------------------------------------------------------


class Witnessed(Limiter):
    """Knows what it was granted last."""

    granted: Grant

    def _write(self, connection: Any, now: int, number: int, grants: Sequence[Grant]) -> None:
        self.granted = grants[-1]
        super()._write(connection, now, number, grants)


def used(shared: SharedStore | None, calls: int, seconds: float, number: int) -> list[tuple[float, int]]:
    """What a process uses that reserves as fast as it can, by the clock of the database: every second permit as late as may be."""
    if shared is None:
        naive = InMemory(calls, seconds)
        return [(time.monotonic() + naive.reserve(), 1) for _ in range(number)]
    limiter = Witnessed(shared, "api", calls, seconds)
    found = []
    for n in range(number):
        limiter.reserve()
        found.append((limiter.granted.start / 1e6 + n % 2 * limiter.slack, 1))
    shared.close()
    return found


def used_by_eight(crew: list[Member], shared: SharedStore | None, calls: int, seconds: float, number: int) -> list[tuple[float, int]]:
    for member in crew:
        member.start("run", used, shared, calls, seconds, number)
    told = [member.reply() for member in crew]
    assert all(isinstance(uses, list) for uses in told), told
    return [use for uses in told for use in uses]


def test_eight_processes_keep_one_limit(crew: list[Member], shared: SharedStore) -> None:
    uses = used_by_eight(crew, shared, 60, 60.0, 25)
    assert len(uses) == 200
    assert most_in_a_window(uses, 60.0) == 60


def test_eight_processes_with_blocks_keep_one_limit(crew: list[Member], shared: SharedStore) -> None:
    assert most_in_a_window(used_by_eight(crew, shared, 6_000, 60.0, 1_500), 60.0) <= 6_000


def test_eight_limiters_in_memory_allow_eight_times_as_much(crew: list[Member]) -> None:
    assert most_in_a_window(used_by_eight(crew, None, 20, 60.0, 25), 60.0) >= 8 * 20


def test_what_a_process_holds_does_not_survive_a_fork(store: SharedStore, clock: Time) -> None:
    limiter = Limiter(store, "api", 60_000, 60.0, clock=clock.of_process(0))
    while limiter._left < 10:
        limiter.reserve()
    held, (reading, writing) = limiter._number, os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writing, str(limiter.reserve().number).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert int(os.read(reading, 100)) > held
    assert limiter.reserve().number == held
