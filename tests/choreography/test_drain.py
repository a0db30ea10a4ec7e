"""Subscribers drained in one process: what is delivered, in which batches, and what becomes of failures and of what was lost."""

from __future__ import annotations

import datetime as dt
import logging
from collections import Counter
from contextlib import suppress
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import BaseModel

import dagster_mao as mao
from dagster_mao.choreography import BatchTakenError, Delivered, abandon, drain, due, redeliver, run_batch, tick
from dagster_mao.choreography import _batches as batches_module
from dagster_mao.choreography import _run as run_module
from dagster_mao.choreography._tables import BATCHES, DELIVERIES, SUBSCRIBERS, shared
from dagster_mao.state import StateStore
from tests.choreography.loans import (
    AGENTS,
    Ledger,
    arrive,
    batch,
    elsewhere,
    loans,
    notify,
    once,
    sealed,
)


def rows(store: StateStore, table: sa.Table) -> list[Any]:
    with shared(store).reading() as connection:
        return list(connection.execute(sa.select(table).order_by(table.c[0])))


def states(store: StateStore, agent: str) -> Counter[str]:
    return Counter(row.state for row in rows(store, DELIVERIES) if row.agent == agent)


def work(
    store: StateStore, ledger: Ledger, agent: str, key: str, run: str = "run", pipeline: mao.Pipeline | None = None
) -> list[Delivered]:
    return list(run_batch(store, pipeline or loans(), agent, key, run_id=run, resources={"ledger": ledger}))


FIVE = (*AGENTS, notify)
EAGER = mao.MicroBatch(size=500, wait=0)


def test_each_version_is_processed_once_by_each_subscriber_in_few_runs(shared_state: StateStore, ledger: Ledger) -> None:
    workflows = [f"w{number}" for number in range(7)]
    arrive(shared_state, *workflows)
    drained = drain(shared_state, loans(micro_batch=mao.MicroBatch(size=4)), resources={"ledger": ledger})
    assert sealed(shared_state) == ledger.executions == once(*workflows)
    assert (drained.runs, drained.count("done"), drained.errors) == (2 * len(AGENTS), 7 * len(AGENTS), {})
    again = drain(shared_state, loans(), resources={"ledger": ledger})
    assert (again.runs, again.count("done")) == (0, 0)
    assert set(states(shared_state, "risk")) == {"done"}


def test_the_same_five_agents_decide_the_same_in_all_modes(local_store: StateStore, ledger: Ledger) -> None:
    decided = {}
    for mode in ("orchestration", "choreography", "hybrid"):
        pipeline, key = loans(mode, agents=FIVE), f"in-{mode}"  # type: ignore[arg-type]
        if mode == "orchestration":
            mao.run(pipeline, batch(), store=local_store, workflow=key, resources={"ledger": ledger})
        else:
            arrive(local_store, key, pipeline=pipeline)
            drain(local_store, pipeline, resources={"ledger": ledger})
        state = local_store.effective(f"loans/{key}")
        assert state.keys() == {"applications", *(agent.name for agent in FIVE)}
        # A join promises no order.
        decided[mode] = {name: local_store.read(seal).collect().sort("id").rows() for name, seal in state.items()}
    assert decided["orchestration"] == decided["choreography"] == decided["hybrid"]
    assert decided["hybrid"]["approval"] == [("A0", True), ("A1", False)]


def test_in_hybrid_an_attempt_counts_once_all_have_sealed_and_in_choreography_each_seal_by_itself(
    local_store: StateStore, ledger: Ledger
) -> None:
    ledger.fail("approval loans/h", "approval loans/c")
    for mode, key in (("hybrid", "h"), ("choreography", "c")):
        arrive(local_store, key, pipeline=loans(mode))  # type: ignore[arg-type]
        drain(local_store, loans(mode), resources={"ledger": ledger})  # type: ignore[arg-type]
    assert local_store.effective("loans/h") == {}
    assert local_store.effective("loans/c").keys() == {"applications", "score", "income", "risk"}
    (attempt,) = {seal.attempt for seal in local_store.seals("loans/h")}
    local_store.fence("loans/h", attempt=attempt, run_id="saga")
    ledger.fail()
    assert redeliver(local_store, loans("hybrid"), "approval") == 2
    drained = drain(local_store, loans("hybrid"), resources={"ledger": ledger})
    assert drained.counts["approval"] == {"done": 1}  # what was fenced is nobody's any more
    assert local_store.effective("loans/h") == {}


def test_one_workflow_s_failure_fails_only_that_workflow(shared_state: StateStore, ledger: Ledger) -> None:
    arrive(shared_state, "good", "bad", "fine")
    ledger.fail("risk loans/bad")
    drained = drain(shared_state, loans(), resources={"ledger": ledger})
    assert drained.counts["risk"] == {"done": 2, "failed": 1}
    assert isinstance(drained.errors["risk", "loans/bad"], mao.AgentFailedError)
    (failed,) = [row for row in rows(shared_state, DELIVERIES) if row.state == "failed"]
    assert (failed.agent, failed.workflow_id, failed.error, failed.tries) == ("risk", "loans/bad", "AgentFailedError", 1)
    assert sealed(shared_state) == once("good", "fine") + once("bad", agents=["score", "income"])

    assert drain(shared_state, loans(), resources={"ledger": ledger}).runs == 0  # not tried again by itself
    ledger.fail()
    assert redeliver(shared_state, loans(), "risk", ["loans/other"]) == 0
    assert redeliver(shared_state, loans(), "risk", ["loans/bad"]) == 1
    drain(shared_state, loans(), resources={"ledger": ledger})
    assert sealed(shared_state) == once("good", "fine", "bad")
    assert ledger.executions["risk loans/bad"] == 2


def test_declared_redeliveries_are_made_and_no_more(local_store: StateStore, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    arrive(local_store, "bad")
    ledger.fail("score loans/bad")
    pipeline = loans(micro_batch=mao.MicroBatch(redeliveries=2))
    seen = []
    for ahead in (0.0, 10.0, 20.0, 400.0, 800.0):
        monkeypatch.setattr(shared(local_store), "_clock", lambda ahead=ahead: 1e9 + ahead)
        seen.append(drain(local_store, pipeline, resources={"ledger": ledger}).counts["score"])
    assert seen == [{"later": 1}, {"later": 1}, {"failed": 1}, {}, {}]
    assert ledger.executions["score loans/bad"] == 3


def test_a_batch_waits_for_its_size_or_its_time(shared_state: StateStore, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1e9]
    database = shared(shared_state)
    monkeypatch.setattr(type(database), "now", lambda *_: clock[0])
    pipeline = loans(micro_batch=mao.MicroBatch(size=3, wait=5))
    arrive(shared_state, "w1", "w2")
    assert tick(shared_state, pipeline, "score") == []
    arrive(shared_state, "w3", "w4")
    (first,) = tick(shared_state, pipeline, "score")
    assert (first.size, first.pipeline, first.agent) == (3, "loans", "score")
    clock[0] += 4.9
    assert tick(shared_state, pipeline, "score") == [first]  # until a run has taken it
    clock[0] += 0.2
    again, second = tick(shared_state, pipeline, "score")
    assert (again, second.size) == (first, 1)
    assert [one.workflow_id for one in work(shared_state, ledger, "score", first.run_key)] == ["loans/w1", "loans/w2", "loans/w3"]
    assert tick(shared_state, pipeline, "score") == [second]


def test_a_batch_is_taken_by_one_run_and_only_while_it_is_to_be_done(shared_state: StateStore, ledger: Ledger) -> None:
    pipeline = loans(micro_batch=EAGER)
    arrive(shared_state, "w1", "w2")
    (made,) = tick(shared_state, pipeline, "score")
    one = run_batch(shared_state, pipeline, "score", made.run_key, run_id="one", resources={"ledger": ledger})
    assert next(one).workflow_id == "loans/w1"
    with pytest.raises(BatchTakenError, match="run one has it"):
        work(shared_state, ledger, "score", made.run_key, "two")
    assert tick(shared_state, pipeline, "score") == []
    assert [told.state for told in one] == ["done"]
    with pytest.raises(BatchTakenError, match="it is done"):
        work(shared_state, ledger, "score", made.run_key, "three")
    with pytest.raises(BatchTakenError, match="none of this name"):
        work(shared_state, ledger, "score", "20260101T000000-nothing", "four")


def test_a_silent_run_loses_its_batch_and_cannot_speak_for_it_any_more(
    shared_state: StateStore, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was stopped, or cut off, and wakes up: its batch has gone to another run."""
    pipeline = loans(micro_batch=EAGER)
    arrive(shared_state, "w1", "w2", "w3")
    (made,) = tick(shared_state, pipeline, "score")
    zombie = run_batch(shared_state, pipeline, "score", made.run_key, run_id="zombie", resources={"ledger": ledger})
    assert next(zombie).workflow_id == "loans/w1"
    with shared(shared_state).transaction() as connection:
        connection.execute(sa.update(BATCHES).values(lease=0.0))
    (again,) = tick(shared_state, pipeline, "score")
    assert again.run_key == f"{made.run_key}.1"
    assert [told.state for told in work(shared_state, ledger, "score", again.run_key, "heir")] == ["done", "done"]
    with pytest.raises(BatchTakenError):
        list(zombie)
    assert ledger.executions == once("w1", "w2", "w3", agents=["score"])
    assert Counter(row.run_id for row in rows(shared_state, DELIVERIES)) == {"zombie": 1, "heir": 2}
    assert states(shared_state, "score") == {"done": 3}


def test_a_run_that_is_known_to_be_dead_is_not_waited_for(shared_state: StateStore, ledger: Ledger) -> None:
    """It died before it took its batch: a launcher that starts one run per key would never start another under this one."""
    pipeline = loans(micro_batch=EAGER)
    arrive(shared_state, "w1")
    (made,) = tick(shared_state, pipeline, "score")
    assert tick(shared_state, pipeline, "score") == [made]
    assert abandon(shared(shared_state), made.run_key)
    (again,) = tick(shared_state, pipeline, "score")
    assert again.run_key != made.run_key
    assert not abandon(shared(shared_state), made.run_key)  # told twice
    with pytest.raises(BatchTakenError, match="taken for dead"):
        work(shared_state, ledger, "score", made.run_key)
    assert [told.state for told in work(shared_state, ledger, "score", again.run_key)] == ["done"]
    assert not abandon(shared(shared_state), again.run_key)


@pytest.mark.parametrize(
    "lost", [(SUBSCRIBERS,), (DELIVERIES,), (BATCHES,), (SUBSCRIBERS, DELIVERIES, BATCHES)], ids=lambda lost: str(len(lost))
)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_is_lost_of_the_database_is_read_from_the_log_again(
    shared_state: StateStore, ledger: Ledger, lost: tuple[sa.Table, ...], when: str
) -> None:
    arrive(shared_state, "w1", "w2")
    pipeline = loans(micro_batch=mao.MicroBatch(size=1, wait=0))
    for agent in ("score", "income"):
        made = tick(shared_state, pipeline, agent)
        if when == "after":
            work(shared_state, ledger, agent, made[0].run_key)
    with shared(shared_state).transaction() as connection:
        for table in lost:
            connection.execute(sa.delete(table))
    for agent in ("score", "income"):  # as from a sensor whose cursor was reset
        tick(shared_state, pipeline, agent, rebuild=lost == (DELIVERIES,))
    drain(shared_state, pipeline, resources={"ledger": ledger})
    assert sealed(shared_state) == ledger.executions == once("w1", "w2")


def test_the_database_file_may_be_gone_altogether(local_store: StateStore, ledger: Ledger) -> None:
    arrive(local_store, "w1")
    drain(local_store, loans(), resources={"ledger": ledger})
    fresh = StateStore(local_store.root, database=str(local_store.objects.local) + "/other.db")
    arrive(fresh, "w2")
    assert drain(fresh, loans(), resources={"ledger": ledger}).count("duplicate") == 0
    assert ledger.executions == once("w1", "w2")


def test_a_version_that_was_sealed_by_hand_is_not_made_again_and_counted(local_store: StateStore, ledger: Ledger) -> None:
    pipeline = loans(micro_batch=EAGER)
    (entry,) = arrive(local_store, "w1")
    (made,) = tick(local_store, pipeline, "score")
    other = StateStore(local_store.root, database=str(local_store.objects.local) + "/other.db")
    (copy,) = tick(other, pipeline, "score")
    work(other, ledger, "score", copy.run_key)
    assert [told.state for told in work(local_store, ledger, "score", made.run_key)] == ["duplicate"]
    assert [(row.state, row.refused) for row in rows(local_store, DELIVERIES)] == [("done", 1)]
    assert ledger.executions == {f"score {entry.workflow_id}": 1}


def test_two_that_execute_at_once_seal_once(local_store: StateStore, ledger: Ledger) -> None:
    """What gets through the claims, here because there are two databases, is caught by the seal."""
    pipeline = loans(micro_batch=EAGER)
    arrive(local_store, "w1")
    other = StateStore(local_store.root, database=str(local_store.objects.local) + "/other.db")
    (made,), (copy,) = tick(local_store, pipeline, "score"), tick(other, pipeline, "score")

    class Slow(Ledger):
        def note(self, agent: str, workflow: str) -> None:
            super().note(agent, workflow)
            with suppress(BatchTakenError):
                work(other, ledger, "score", copy.run_key)

    (told,) = run_batch(local_store, pipeline, "score", made.run_key, run_id="slow", resources={"ledger": Slow(ledger._file.parent)})
    assert told.state == "duplicate"
    assert isinstance(told.error, mao.StaleStateError)
    assert ledger.executions == {"score loans/w1": 2}
    assert sealed(local_store) == once("w1", agents=["score"])


def test_late_data_supersedes_what_was_not_done_yet(local_store: StateStore, ledger: Ledger) -> None:
    pipeline = loans(micro_batch=EAGER)
    arrive(local_store, "day", amounts=[100.0])
    tick(local_store, pipeline, "score")
    arrive(local_store, "day", amounts=[5000.0, 10.0])
    drained = drain(local_store, pipeline, resources={"ledger": ledger})
    assert drained.counts["score"] == {"void": 1, "done": 1}
    state = local_store.effective("loans/day")
    assert {seal.parents[0].version for name, seal in state.items() if name in ("score", "income")} == {1}
    assert local_store.read(state["approval"]).collect()["approved"].to_list() == [False, True]
    assert ledger.executions == once("day")


def test_a_late_seal_of_what_was_superseded_does_not_become_effective(local_store: StateStore, ledger: Ledger) -> None:
    """It was under way when the late entry came, and slower than its successor."""
    pipeline = loans(micro_batch=EAGER)
    arrive(local_store, "day", amounts=[100.0])
    (made,) = tick(local_store, pipeline, "score")

    class Slow(Ledger):
        def note(self, agent: str, workflow: str) -> None:
            arrive(local_store, "day", amounts=[5000.0])
            (newer,) = tick(local_store, pipeline, "score")
            work(local_store, ledger, "score", newer.run_key, "newer")

    (told,) = run_batch(local_store, pipeline, "score", made.run_key, run_id="slow", resources={"ledger": Slow(ledger._file.parent)})
    assert told.state == "void"
    assert local_store.effective("loans/day")["score"].run_id == "newer"


def test_another_code_location_listens_without_the_producers_knowing(local_store: StateStore, ledger: Ledger) -> None:
    arrive(local_store, "w1", "w2")
    assert drain(local_store, elsewhere(), resources={"ledger": ledger}).runs == 0
    drain(local_store, loans(), resources={"ledger": ledger})
    assert drain(local_store, elsewhere(), resources={"ledger": ledger}).counts == {"notify": {"done": 2}}
    state = local_store.effective("loans/w1")
    assert state["notify"].parents[0].version == state["approval"].version
    assert state["notify"].attempt == state["applications"].attempt


def test_what_was_sealed_elsewhere_under_another_contract_is_refused_when_it_is_pinned(local_store: StateStore, ledger: Ledger) -> None:
    class Renamed(BaseModel):
        id: str
        granted: bool

    @mao.agent(name="notify")
    def reads_another(approval: mao.DataFrame[Renamed]) -> mao.DataFrame[Renamed]:
        return approval

    arrive(local_store, "w1")
    drain(local_store, loans(), resources={"ledger": ledger})
    pipeline = mao.Pipeline("loans", listens={"approval": Renamed}, agents=[reads_another], mode="choreography")
    drained = drain(local_store, pipeline)
    (error,) = drained.errors.values()
    assert isinstance(error, mao.IncompatibleContractError)
    assert {row.error for row in rows(local_store, DELIVERIES) if row.state == "failed"} == {"IncompatibleContractError"}


def test_an_agent_that_is_added_later_gets_everything_that_was_sealed_before(local_store: StateStore, ledger: Ledger) -> None:
    arrive(local_store, *(f"w{number}" for number in range(12)))  # past a merge of the log's files
    drain(local_store, loans(agents=[AGENTS[0]]), resources={"ledger": ledger})
    drained = drain(local_store, loans(), resources={"ledger": ledger})
    assert drained.counts["score"] == {}
    assert drained.counts["income"] == {"done": 12}


def test_what_all_would_meet_is_met_by_one_and_the_others_come_later(
    local_store: StateStore, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrive(local_store, "w1", "w2", "w3")
    run_agent, tried = run_module.run_agent, list[str]()

    def down(*given: Any, **options: Any) -> Any:
        tried.append(options["partition_key"])
        raise mao.StoreError("no space left")

    monkeypatch.setattr(run_module, "run_agent", down)
    drained = drain(local_store, loans(agents=[AGENTS[0]]), resources={"ledger": ledger})
    assert (tried, drained.counts["score"]) == (["w1"], {"later": 1})
    assert {(row.state, row.error) for row in rows(local_store, DELIVERIES)} == {("waiting", "StoreError")}
    monkeypatch.setattr(run_module, "run_agent", run_agent)
    assert drain(local_store, loans(agents=[AGENTS[0]]), resources={"ledger": ledger}).runs == 0
    database = shared(local_store)
    now = database._clock()
    monkeypatch.setattr(database, "_clock", lambda: now + 40)  # the one it was met by stays behind
    assert drain(local_store, loans(agents=[AGENTS[0]]), resources={"ledger": ledger}).counts["score"] == {"done": 2}
    monkeypatch.setattr(database, "_clock", lambda: now + 400)
    assert drain(local_store, loans(agents=[AGENTS[0]]), resources={"ledger": ledger}).counts["score"] == {"done": 1}


def test_a_workflow_that_is_the_death_of_every_run_is_given_up_and_the_others_go_on(
    local_store: StateStore, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Death(BaseException):
        pass

    class Deadly(Ledger):
        def note(self, agent: str, workflow: str) -> None:
            super().note(agent, workflow)
            if workflow == "loans/deadly":
                raise Death

    pipeline, deadly = loans(agents=[AGENTS[0]], micro_batch=EAGER), Deadly(ledger._file.parent)
    arrive(local_store, "deadly", "w2")
    for generation in range(4):
        (made,) = tick(local_store, pipeline, "score")
        try:
            told = list(run_batch(local_store, pipeline, "score", made.run_key, run_id=f"r{generation}", resources={"ledger": deadly}))
        except Death:
            abandon(shared(local_store), made.run_key)
    assert [(one.workflow_id, one.state) for one in told] == [("loans/deadly", "failed"), ("loans/w2", "done")]
    assert ledger.executions == {"score loans/deadly": 3, "score loans/w2": 1}
    assert {row.error for row in rows(local_store, DELIVERIES) if row.state == "failed"} == {"RunDied"}


def test_the_lease_of_a_long_run_is_renewed(local_store: StateStore, ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batches_module, "LEASE", 0.2)
    pipeline = loans(agents=[AGENTS[0]], micro_batch=EAGER)
    arrive(local_store, "w1")
    (made,) = tick(local_store, pipeline, "score")
    leases: set[float] = set()

    class Slow(Ledger):
        def note(self, agent: str, workflow: str) -> None:
            while len(leases) < 4:
                leases.add(rows(local_store, BATCHES)[0].lease)
            assert tick(local_store, pipeline, "score") == []

    told = run_batch(local_store, pipeline, "score", made.run_key, run_id="slow", resources={"ledger": Slow(ledger._file.parent)})
    assert [one.state for one in told] == ["done"]


def test_who_starts_by_itself_is_said_or_refused() -> None:
    with pytest.raises(mao.WiringError, match="started by runs that cover them"):
        tick(StateStore("/nowhere"), loans("orchestration"), "score")
    with pytest.raises(mao.WiringError, match="waits for nothing"):
        tick(StateStore("/nowhere"), loans(), "applications")
    with pytest.raises(mao.WiringError, match="has no agent 'scores'"):
        tick(StateStore("/nowhere"), loans(), "scores")
    with pytest.raises(mao.StoreError, match="need the SQL database"):
        tick(StateStore("s3://nowhere/state"), loans(), "score")


def test_looking_for_what_is_due_makes_nothing(local_store: StateStore) -> None:
    assert due(local_store, loans(), "score") == []
    assert local_store.objects.local is not None
    assert not local_store.objects.local.exists()
    (entry,) = arrive(local_store, "w1")
    (found,) = due(local_store, loans(), "score")
    assert (found.workflow_id, found.attempt, found.versions, found.since) == ("loans/w1", entry.attempt, (0,), entry.sealed_at)


def test_no_value_of_a_record_is_in_the_database_or_the_logs(
    local_store: StateStore, ledger: Ledger, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    ledger.fail("risk loans/w1")
    arrive(local_store, "w1")
    drain(local_store, loans(), resources={"ledger": ledger})
    told = [str(row) for table in (DELIVERIES, BATCHES, SUBSCRIBERS) for row in rows(local_store, table)]
    assert not any("Grace" in text or "bureau" in text for text in (*told, caplog.text))


def test_what_choreography_sealed_verifies(local_store: StateStore, ledger: Ledger) -> None:
    from dagster_mao.state.verify import verify

    arrive(local_store, "w1", "w2")
    drain(local_store, loans("hybrid"), resources={"ledger": ledger})
    drain(local_store, elsewhere(), resources={"ledger": ledger})
    assert verify(local_store).findings == ()


# -- what was done long ago ----------------------------------------------------------------------------------------------------------


def long_ago(store: StateStore, days: int = 8) -> None:
    """As if all batches had been made so many days ago: their names say when."""
    made = f"{dt.datetime.now(dt.timezone.utc) - dt.timedelta(days=days):%Y%m%d}"
    with shared(store).transaction() as connection:
        for column in (BATCHES.c.id, DELIVERIES.c.batch):
            connection.execute(sa.update(column.table).values({column: sa.literal(made) + sa.func.substr(column, 9)}))


def test_what_was_sealed_long_ago_is_noted_no_more_and_not_done_again(shared_state: StateStore, ledger: Ledger) -> None:
    """The log has it. What failed is not in the log: its note is all that keeps it from being tried again and again."""
    pipeline = loans(agents=[AGENTS[0]], micro_batch=mao.MicroBatch(size=1, wait=0))
    arrive(shared_state, "w0", "w1", "w2", "bad")
    ledger.fail("score loans/bad")
    drain(shared_state, pipeline, resources={"ledger": ledger})
    executed = once("w0", "w1", "w2", "bad", agents=["score"])
    assert ledger.executions == executed
    with shared(shared_state).transaction() as connection:
        connection.execute(sa.update(DELIVERIES).where(DELIVERIES.c.workflow_id == "loans/w2").values(refused=1))
    long_ago(shared_state, 6)
    assert tick(shared_state, pipeline, "score") == []
    assert len(rows(shared_state, BATCHES)) == 4
    long_ago(shared_state)
    assert tick(shared_state, pipeline, "score") == []
    assert rows(shared_state, BATCHES) == []
    kept = {row.workflow_id: row.state for row in rows(shared_state, DELIVERIES)}
    assert kept == {"loans/bad": "failed", "loans/w2": "done"}
    assert tick(shared_state, pipeline, "score", rebuild=True) == [], "the whole log, read again"
    drain(shared_state, pipeline, resources={"ledger": ledger})
    assert ledger.executions == executed
    assert redeliver(shared_state, pipeline, "score") == 1
    ledger.fail()
    drain(shared_state, pipeline, resources={"ledger": ledger})
    assert sealed(shared_state) == once("w0", "w1", "w2", "bad", agents=["score"])


def test_a_batch_that_is_at_work_is_not_forgotten_however_old(shared_state: StateStore, ledger: Ledger) -> None:
    pipeline = loans(agents=[AGENTS[0]], micro_batch=EAGER)
    arrive(shared_state, "w0")
    tick(shared_state, pipeline, "score")
    long_ago(shared_state)
    (batch,) = tick(shared_state, pipeline, "score")
    assert [one.state for one in work(shared_state, ledger, "score", batch.run_key, pipeline=pipeline)] == ["done"]
