"""What operators see: who is behind, what waits for whom, what was given up, who is dead. By the log, whatever the database says."""

from __future__ import annotations

import datetime as dt
import json

import pytest
import sqlalchemy as sa

import dagster_mao as mao
from dagster_mao.choreography import SubscriberState, abandon, cut, drain, lag, redeliver, run_batch, submit, take, tick
from dagster_mao.choreography._tables import DELIVERIES, SUBSCRIBERS, shared
from dagster_mao.state import StateStore
from tests.choreography.loans import AGENTS, NAMES, Decision, Ledger, Score, arrive, elsewhere, loans, notify

EAGER = mao.MicroBatch(size=500, wait=0)
ELSEWHERE = mao.Pipeline("loans", listens={"approval": Decision}, agents=[notify], mode="hybrid", micro_batch=EAGER)


def states(store: StateStore, pipeline: mao.Pipeline | None = None, **options: float) -> dict[str, SubscriberState]:
    return {one.agent: one for one in lag(store, pipeline or loans(micro_batch=EAGER), **options)}


def move(store: StateStore, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    clock = shared(store)._clock
    monkeypatch.setattr(shared(store), "_clock", lambda: clock() + seconds)


def test_nothing_is_there_and_nothing_is_made(local_store: StateStore) -> None:
    found = lag(local_store, loans())
    assert [one.agent for one in found] == list(NAMES)
    assert all(one == SubscriberState("loans", one.agent) and one.is_healthy for one in found)
    assert local_store.objects.local is not None
    assert not local_store.objects.local.exists()
    assert lag(local_store, loans("orchestration")) == []


def test_what_is_due_is_counted_from_when_it_became_so(shared_state: StateStore, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = loans(micro_batch=EAGER)
    arrive(shared_state, "w1", "w2")
    found = states(shared_state)
    assert (found["score"].due, found["income"].due, found["risk"].due, found["score"].in_flight) == (2, 2, 0, 0)
    assert found["score"].oldest is not None
    assert found["risk"].oldest is None
    assert found["score"].beat is None  # nobody has looked
    (made,) = tick(shared_state, pipeline, "score", every=5.0)
    score = states(shared_state)["score"]
    assert (score.due, score.in_flight, score.every) == (2, 2, 5.0)
    assert score.beat is not None
    assert score.beat.tzinfo is dt.timezone.utc
    run = run_batch(shared_state, pipeline, "score", made.run_key, run_id="run", resources={"ledger": ledger})
    assert next(run).state == "done"
    assert (states(shared_state)["score"].due, states(shared_state)["score"].in_flight) == (1, 1)
    list(run)
    assert states(shared_state)["score"].due == 0
    if shared(shared_state).file is not None:
        move(shared_state, monkeypatch, 100.0)
        income = states(shared_state)["income"]
        assert income.oldest is not None
        assert income.oldest > 100.0


def test_a_join_that_waits_for_what_failed_is_stuck_and_so_is_what_is_below_it(shared_state: StateStore, ledger: Ledger) -> None:
    pipeline = loans(micro_batch=EAGER)
    arrive(shared_state, "good", "bad")
    ledger.fail("income loans/bad")
    assert {one.agent: (one.joining, one.stuck) for one in lag(shared_state, pipeline)}["risk"] == (0, ())
    drain(shared_state, pipeline, resources={"ledger": ledger})
    found = states(shared_state)
    assert (found["income"].failed, found["income"].errors, found["income"].due) == (1, {"AgentFailedError": 1}, 0)
    (stuck,) = found["risk"].stuck
    assert (stuck.workflow_id, stuck.missing, stuck.why) == ("loans/bad", ("income",), "income failed (AgentFailedError)")
    (below,) = found["approval"].stuck
    assert (below.missing, below.why) == (("risk",), "income failed (AgentFailedError)")
    assert (found["risk"].is_healthy, found["income"].is_healthy) == (False, True)
    ledger.fail()
    assert redeliver(shared_state, pipeline, "income") == 1
    assert states(shared_state)["risk"].stuck == ()  # it is under way again
    drain(shared_state, pipeline, resources={"ledger": ledger})
    assert all(one.is_healthy and not one.failed and not one.joining for one in lag(shared_state, pipeline))


def test_a_join_is_stuck_when_it_waits_for_too_long(local_store: StateStore, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    arrive(local_store, "w1")
    drain(local_store, loans(agents=[AGENTS[0]]), resources={"ledger": ledger})
    found = states(local_store)
    assert (found["risk"].joining, found["risk"].stuck) == (1, ())
    move(local_store, monkeypatch, 400.0)
    (stuck,) = states(local_store)["risk"].stuck
    assert (stuck.missing, stuck.why) == (("income",), "income is due")
    tick(local_store, loans(micro_batch=EAGER), "income")
    assert states(local_store)["risk"].stuck[0].why == "income is in flight"
    assert states(local_store, stuck_after=4000.0)["risk"].stuck == ()


def test_what_is_sealed_elsewhere_is_waited_for(local_store: StateStore, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    @mao.agent(name="both")
    def both(score: mao.LazyFrame[Score], approval: mao.LazyFrame[Decision]) -> mao.LazyFrame[Score]:
        return score

    pipeline = mao.Pipeline("loans", listens={"score": Score, "approval": Decision}, agents=[both], mode="choreography")
    arrive(local_store, "w1")
    drain(local_store, loans(agents=[AGENTS[0]]), resources={"ledger": ledger})
    move(local_store, monkeypatch, 400.0)
    (stuck,) = states(local_store, pipeline)["both"].stuck
    assert stuck.why == "approval is sealed elsewhere, and was not"
    assert [one.agent for one in lag(local_store, elsewhere())] == ["notify"]


def test_what_is_superseded_or_fenced_is_neither_due_nor_stuck(local_store: StateStore, ledger: Ledger) -> None:
    (entry,) = arrive(local_store, "day")
    ledger.fail("income loans/day")
    drain(local_store, loans(micro_batch=EAGER), resources={"ledger": ledger})
    assert states(local_store)["risk"].stuck
    arrive(local_store, "day", amounts=[1.0])
    found = states(local_store)
    assert (found["risk"].stuck, found["risk"].joining, found["income"].failed, found["income"].due) == ((), 0, 0, 1)
    for attempt in {seal.attempt for seal in local_store.seals(entry.workflow_id)}:
        local_store.fence(entry.workflow_id, attempt=attempt, run_id="saga")
    assert all((one.due, one.joining, one.failed) == (0, 0, 0) for one in lag(local_store, loans()))


def test_whoever_looks_no_more_is_dead(local_store: StateStore, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = loans(micro_batch=EAGER)
    arrive(local_store, "w1")
    tick(local_store, pipeline, "score", every=20.0)
    tick(local_store, pipeline, "income")  # by hand: it promises nothing
    assert not any(one.is_dead for one in lag(local_store, pipeline))
    move(local_store, monkeypatch, 59.0)
    assert not states(local_store)["score"].is_dead
    move(local_store, monkeypatch, 2.0)
    assert {agent: one.is_dead for agent, one in states(local_store).items()} == dict.fromkeys(NAMES, False) | {"score": True}
    tick(local_store, pipeline, "score", every=20.0)
    assert not states(local_store)["score"].is_dead


def test_one_that_never_looked_is_dead_once_it_had_something_to_do_for_long(
    local_store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrive(local_store, "w1")
    tick(local_store, loans(micro_batch=EAGER), "income")
    assert not states(local_store)["score"].is_dead
    move(local_store, monkeypatch, 400.0)
    found = states(local_store)
    assert (found["score"].is_dead, found["income"].is_dead, found["risk"].is_dead) == (True, False, False)


def test_duplicates_that_were_refused_are_counted(local_store: StateStore, ledger: Ledger) -> None:
    pipeline = loans(micro_batch=EAGER)
    arrive(local_store, "w1")
    (made,) = tick(local_store, pipeline, "score")
    other = StateStore(local_store.root, database=str(local_store.objects.local) + "/other.db")
    drain(other, pipeline, resources={"ledger": ledger})
    list(run_batch(local_store, pipeline, "score", made.run_key, run_id="late", resources={"ledger": ledger}))
    assert (states(local_store)["score"].refused, states(local_store)["income"].refused) == (1, 0)


def test_the_log_counts_whatever_was_lost_of_the_database(local_store: StateStore) -> None:
    arrive(local_store, "w1", "w2")
    tick(local_store, loans(micro_batch=EAGER), "score")
    with shared(local_store).transaction() as connection:
        for table in (DELIVERIES, SUBSCRIBERS):
            connection.execute(sa.delete(table))
    assert (states(local_store)["score"].due, states(local_store)["score"].in_flight) == (2, 0)


def test_what_was_looked_at_is_not_read_again(local_store: StateStore, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole log is read for one who never looked, and for nobody else."""
    pipeline, cursors = loans(micro_batch=EAGER), list[str]()
    arrive(local_store, "w1", "w2")
    ledger.fail("income loans/w1")
    drain(local_store, pipeline, resources={"ledger": ledger})
    arrive(local_store, "w3")
    before = lag(local_store, pipeline)
    sealed_since = StateStore.sealed_since
    monkeypatch.setattr(StateStore, "sealed_since", lambda self, *given: cursors.append(given[0]) or sealed_since(self, *given))
    after = lag(local_store, pipeline)
    assert cursors
    assert all(cursors)
    same = ("agent", "due", "in_flight", "failed", "joining", "stuck")
    assert [[getattr(one, name) for name in same] for one in before] == [[getattr(one, name) for name in same] for one in after]
    assert [(one.due, one.failed, one.joining, len(one.stuck)) for one in after] == [(1, 0, 0, 0), (1, 1, 0, 0), (0, 0, 1, 1), (0, 0, 2, 1)]
    with shared(local_store).transaction() as connection:
        connection.execute(sa.update(SUBSCRIBERS).values(cursor=""))  # whoever reads the whole log finds the same
    assert [one.stuck for one in lag(local_store, pipeline)] == [one.stuck for one in after]
    assert "" in cursors


def test_an_inbox_stands_first_and_is_counted_in_events(local_store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = loans(inbox=mao.MicroBatch(size=2, wait=60))
    submit(local_store, pipeline, [{"id": name, "amount": 1.0} for name in "ABC"])
    found = lag(local_store, pipeline)[0]
    assert (found.agent, found.due, found.in_flight, found.beat, found.is_dead) == ("applications", 3, 0, None, False)
    (batch,) = cut(local_store, pipeline, every=5.0)
    found = lag(local_store, pipeline)[0]
    assert (found.due, found.in_flight, found.failed, found.every) == (3, 2, 0, 5.0)
    handed_out = [batch]
    for _ in range(3):
        (batch,) = handed_out
        with take(local_store, pipeline, batch.run_key, run_id="dies"):
            pass
        assert abandon(shared(local_store), batch.run_key)
        handed_out = cut(local_store, pipeline, every=5.0)
    assert handed_out == [], "it rests"
    assert lag(local_store, pipeline)[0].failed == 2
    move(local_store, monkeypatch, 40.0)
    found = lag(local_store, pipeline)[0]
    assert found.is_dead
    assert found.oldest is not None
    assert found.oldest >= 40.0


def test_it_is_told_in_plain_values(local_store: StateStore, ledger: Ledger) -> None:
    ledger.fail("income loans/w1")
    arrive(local_store, "w1")
    drain(local_store, loans(), resources={"ledger": ledger})
    told = [one.as_metadata() for one in lag(local_store, loans())]
    assert json.loads(json.dumps(told)) == told
    assert told[2]["stuck"][0]["missing"] == ["income"]
    assert told[2]["is_healthy"] is False


# -- other code locations ------------------------------------------------------------------------------------------------------------


def of_elsewhere(store: StateStore) -> SubscriberState:
    last = lag(store, loans("hybrid", elsewhere=["notify"], micro_batch=EAGER))[-1]
    assert (last.agent, last.is_elsewhere) == ("notify", True)
    return last


def test_an_agent_elsewhere_that_nobody_runs_is_shown_and_dead_once_attempts_wait_for_it(local_store: StateStore, ledger: Ledger) -> None:
    pipeline = loans("hybrid", elsewhere=["notify"], micro_batch=EAGER)
    assert of_elsewhere(local_store) == SubscriberState("loans", "notify", is_elsewhere=True), "nobody has seen it, and nothing waits"
    arrive(local_store, "w1", "w2", pipeline=pipeline)
    ledger.fail("approval loans/w2")
    drain(local_store, pipeline, resources={"ledger": ledger})
    state = of_elsewhere(local_store)
    assert (state.due, state.beat, state.is_dead) == (1, None, False), "what has not come through here does not wait for it yet"
    state = lag(local_store, pipeline, stuck_after=0)[-1]
    assert (state.is_dead, state.is_healthy) == (True, False)


def test_an_agent_elsewhere_that_has_looked_stands_as_it_noted(
    shared_state: StateStore, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrive(shared_state, "w1", pipeline=loans("hybrid", elsewhere=["notify"]))
    drain(shared_state, loans("hybrid", elsewhere=["notify"]), resources={"ledger": ledger})
    (made,) = tick(shared_state, ELSEWHERE, "notify", every=5.0)
    state = of_elsewhere(shared_state)
    assert (state.due, state.in_flight, state.every, state.is_dead) == (1, 1, 5.0, False)
    list(run_batch(shared_state, ELSEWHERE, "notify", made.run_key, run_id="run", resources={"ledger": ledger}))
    assert of_elsewhere(shared_state).due == 0
    if shared(shared_state).file is not None:
        move(shared_state, monkeypatch, 100.0)
        assert of_elsewhere(shared_state).is_dead, "its sensor looks no more"
