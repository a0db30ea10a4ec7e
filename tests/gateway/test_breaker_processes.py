"""The breaker's laws over eight real processes, on SQLite and PostgreSQL. What pybreaker does by itself breaks each of them."""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable

import pytest

from dagster_mao.gateway import Breaker
from dagster_mao.gateway._breaker import breakers, close_breaker, events, open_breaker
from dagster_mao.gateway._shared import SharedStore
from tests.gateway.crew import Member, age, calls, end, pass_time, soon, trip, until, use

DECLARED = Breaker(fail_max=5, reset_timeout=30.0)
NAIVE = pytest.mark.parametrize("engine", ["plain", "merely shared"])
Law = Callable[[list[Member], SharedStore, str], None]


def trips_once(crew: list[Member], shared: SharedStore, engine: str) -> None:
    """Eight calls run at the same time and fail, again and again: one opening."""
    use(crew, engine=engine, shared=shared, declared=DECLARED)
    trip(crew)
    assert sum(member.ask("opens") for member in crew) == 1


def admits_one_probe(crew: list[Member], shared: SharedStore, engine: str) -> None:
    """After the reset timeout all want to be the probe. One is, and until it has its answer nobody else makes a call."""
    use(crew, engine=engine, shared=shared, declared=DECLARED)
    trip(crew)
    pass_time(crew, engine, 31)
    probing = until(lambda: calls(crew))
    waiting = [member for member in crew if member not in probing]
    assert len(probing) == 1
    for _ in range(3):
        assert calls(waiting) == []
    end(probing, "fail")
    assert calls(crew) == [], "a failed probe opens it for another reset timeout"
    pass_time(crew, engine, 31)
    probing = until(lambda: calls(crew))
    assert len(probing) == 1
    end(probing, "succeed")
    until(lambda: len(end(calls(crew), "succeed")) == len(crew))


@pytest.mark.parametrize("law", [trips_once, admits_one_probe])
def test_over_eight_processes(crew: list[Member], shared: SharedStore, law: Law) -> None:
    law(crew, shared, "ours")


@NAIVE
def test_naive_breakers_trip_more_than_once(crew: list[Member], shared: SharedStore, engine: str) -> None:
    with pytest.raises(AssertionError, match=r"== 1"):
        trips_once(crew, shared, engine)


@NAIVE
def test_naive_breakers_admit_more_than_one_probe(crew: list[Member], shared: SharedStore, engine: str) -> None:
    with pytest.raises(AssertionError, match=r"== 1"):
        admits_one_probe(crew, shared, engine)


def test_failures_of_all_processes_add_up(crew: list[Member], shared: SharedStore) -> None:
    """Five processes fail once each: told one after the other, the fifth opens it."""
    use(crew, engine="ours", shared=shared, declared=DECLARED)
    for failures, member in enumerate(crew[:5], 1):
        end(calls([member]), "fail")
        (state,) = breakers(shared)
        assert (state.state, state.failures) == ("open" if failures == 5 else "closed", failures)
    assert (state.why, state.fail_max, state.reset_timeout) == ("TimeoutError", 5, 30.0)
    assert 25 < state.retry_after <= 30
    trip(crew)  # those who do not know yet make a call more, which changes nothing
    (opened,) = events(shared, "bank")
    assert (opened.event, opened.why, opened.by) == ("open", "TimeoutError", None)
    assert "4711" not in str((state, opened)), "an error's class is told, never its text"


def killed_prober(crew: list[Member], shared: SharedStore, lease: float | None) -> None:
    """The prober dies in its call. Another one probes when the lease has ended, alone again."""
    prober = Member()
    use([*crew, prober], engine="ours", shared=shared, declared=DECLARED, lease=lease)
    trip([*crew, prober])
    age(shared, 31)
    until(lambda: calls([prober]))
    prober.kill()
    assert calls(crew) == []
    assert breakers(shared)[0].state == "half-open"
    age(shared, 61)
    probing = soon(lambda: calls(crew))
    assert len(probing) == 1, "nobody may ever call again"
    end(probing, "succeed")
    until(lambda: len(end(calls(crew), "succeed")) == len(crew))


def test_a_killed_prober_blocks_nobody_for_ever(crew: list[Member], shared: SharedStore) -> None:
    killed_prober(crew, shared, None)


def test_a_probe_without_a_lease_is_blocked_by_a_killed_prober(crew: list[Member], shared: SharedStore) -> None:
    with pytest.raises(AssertionError, match="nobody may ever call again"):
        killed_prober(crew, shared, 1e9)


def test_a_probe_that_outlives_its_lease_decides_nothing(crew: list[Member], shared: SharedStore) -> None:
    use(crew, engine="ours", shared=shared, declared=DECLARED)
    trip(crew)
    age(shared, 31)
    (slow,) = until(lambda: calls(crew))
    others = [member for member in crew if member is not slow]
    age(shared, 61)
    (second,) = until(lambda: calls(others))
    end([slow], "succeed")
    assert breakers(shared)[0].state == "half-open"
    end([second], "fail")
    assert breakers(shared)[0].state == "open"


def skewed_hosts(crew: list[Member], shared: SharedStore, engine: str) -> None:
    """The host that opens it is 20 s behind, then 20 s ahead; others are as much the other way. The reset timeout stays what it is."""
    for behind in (20.0, -20.0):
        name = f"bank {behind}"
        use(crew[:4], engine=engine, shared=shared, declared=DECLARED, name=name, skew=-behind)
        use(crew[4:], engine=engine, shared=shared, declared=DECLARED, name=name, skew=behind)
        trip(crew[:4])
        for _ in range(3):
            assert calls(crew[4:]) == [], "not a probe: no time has passed"
        pass_time(crew, engine, 31)
        found = soon(lambda: calls(crew[4:]))
        assert len(found) == 1, "one probe: the time has passed"
        end(found, "succeed")


def test_on_postgres_the_clocks_of_hosts_do_not_matter(crew: list[Member], postgres_url: str) -> None:
    shared = SharedStore(postgres_url)
    skewed_hosts(crew, shared, "ours")
    for state in breakers(shared):
        assert state.since is not None
        assert abs(state.since - dt.datetime.now(dt.timezone.utc)) < dt.timedelta(seconds=60)
    told = [event.at for state in breakers(shared) for event in events(shared, state.name)]
    assert len(told) == 6
    assert max(told) - min(told) < dt.timedelta(seconds=20), "events are told in the database's time"
    shared.close()


def test_hosts_with_skewed_clocks_confuse_a_merely_shared_breaker(crew: list[Member], postgres_url: str) -> None:
    shared = SharedStore(postgres_url)
    with pytest.raises(AssertionError, match="time has passed"):
        skewed_hosts(crew, shared, "merely shared")
    shared.close()


def test_what_is_decided_by_hand_reaches_all_processes(crew: list[Member], shared: SharedStore) -> None:
    use(crew, engine="ours", shared=shared, declared=DECLARED)
    assert len(end(calls(crew), "succeed")) == 8
    open_breaker(shared, "bank", why="maintenance", by="ford")
    until(lambda: not end(calls(crew), "succeed"))
    age(shared, 1e6)
    assert calls(crew) == [], "held open by hand, it does not half-open"
    close_breaker(shared, "bank", why="done", by="ford")
    until(lambda: len(end(calls(crew), "succeed")) == 8)


def test_a_success_of_another_process_counts(crew: list[Member], shared: SharedStore) -> None:
    """Four failures here, a success there, told when that process looks again: four more failures open nothing."""
    use(crew, engine="ours", shared=shared, declared=DECLARED)
    for _ in range(4):
        end(calls(crew[:1]), "fail")

    def told() -> bool:
        end(calls(crew[1:2]), "succeed")
        return breakers(shared)[0].failures == 0

    until(told)
    for _ in range(4):
        end(calls(crew[:1]), "fail")
    assert breakers(shared)[0].state == "closed"
    end(calls(crew[:1]), "fail")
    assert breakers(shared)[0].state == "open"
