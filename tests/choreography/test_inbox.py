"""Single events: whoever submits them how often, each that was accepted is in one entry, and a bad one in its quarantine."""

from __future__ import annotations

import datetime as dt
import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Annotated, Any

import pytest
import sqlalchemy as sa
from pydantic import BaseModel, ConfigDict, Field

import dagster_mao as mao
from dagster_mao.choreography import (
    BatchTakenError,
    Submitted,
    abandon,
    cut,
    drain,
    intake_workflow,
    run_inbox,
    submit,
    take,
)
from dagster_mao.choreography import _inbox as inbox_module
from dagster_mao.choreography._tables import BATCHES, INBOX, SUBSCRIBERS, shared
from dagster_mao.pipeline import Mode
from dagster_mao.state import StateStore
from tests.choreography.loans import AGENTS, Ledger, loans

EAGER = mao.MicroBatch(size=3, wait=0)


def listening(mode: Mode = "choreography", inbox: mao.MicroBatch = EAGER, **declared: Any) -> mao.Pipeline:
    return loans(mode, inbox=inbox, **declared)


def events(*names: str, amount: float = 100.0) -> list[dict[str, Any]]:
    return [{"id": name, "amount": amount} for name in names]


def entered(store: StateStore) -> list[str]:
    """The keys in all sealed entries, quarantined ones included."""
    found = []
    for workflow in store.workflows("loans"):
        for seal in store.seals(workflow):
            if seal.kind == "entry":
                found += [*store.read(seal).collect()["id"].to_list(), *store.quarantine(seal)["record"].to_list()]
    return sorted(found)


def take_in(store: StateStore, pipeline: mao.Pipeline) -> list[str]:
    batches = cut(store, pipeline)
    return [run_inbox(store, pipeline, one.run_key, run_id=f"run-{one.run_key}").state for one in batches]


def test_each_event_is_in_one_workflow_and_its_agents_run(shared_state: StateStore, ledger: Ledger) -> None:
    pipeline = listening()
    assert submit(shared_state, pipeline, events("A", "B", "C")) == Submitted(3, 0)
    assert submit(shared_state, pipeline, {"id": "D", "amount": 5000}) == Submitted(1, 0)
    drained = drain(shared_state, pipeline, resources={"ledger": ledger})
    assert drained.counts["applications"] == {"done": 2}
    assert drained.counts["approval"] == {"done": 2}
    assert entered(shared_state) == ["A", "B", "C", "D"]
    workflows = shared_state.workflows("loans")
    assert all(one.startswith("loans/events-") for one in workflows)
    decided = [sorted(shared_state.read(shared_state.effective(one)["approval"]).collect().rows()) for one in workflows]
    assert sorted(decided) == [[("A", True), ("B", True), ("C", True)], [("D", False)]]
    assert cut(shared_state, pipeline) == []


def test_what_comes_again_is_known_and_what_contradicts_it_is_refused(shared_state: StateStore) -> None:
    pipeline = listening()
    submit(shared_state, pipeline, events("A", "B"))
    assert submit(shared_state, pipeline, events("B", "C", "C")) == Submitted(1, 2)
    take_in(shared_state, pipeline)
    assert submit(shared_state, pipeline, events("A", "B", "C")) == Submitted(0, 3)  # sealed long ago
    with pytest.raises(mao.EventsRefusedError, match="came in under its key before") as caught:
        submit(shared_state, pipeline, [*events("D"), *events("A", amount=7.0)])
    assert caught.value.places == {1: "another one came in under its key before"}
    assert "resubmi" in str(caught.value.fix)
    assert submit(shared_state, pipeline, events("D")) == Submitted(1, 0)  # none of that call had been accepted
    with pytest.raises(mao.EventsRefusedError, match="submitted with it"):
        submit(shared_state, pipeline, [*events("E"), *events("E", amount=7.0)])
    take_in(shared_state, pipeline)
    assert entered(shared_state) == ["A", "B", "C", "D"]


class Payment(BaseModel):
    number: Annotated[int, mao.Key]
    paid: float
    made: dt.datetime = Field(default_factory=lambda: dt.datetime.now(dt.timezone.utc))


@mao.agent(quarantine=mao.Quarantine(max_share=1))
def payments() -> list[Payment]:
    return []


def test_an_event_is_known_by_what_its_contract_reads(local_store: StateStore) -> None:
    """However it is written: a number as text from a CSV file, a model, a field that the contract does not have."""
    pipeline = mao.Pipeline("payments", entry=payments, mode="choreography", inbox=EAGER)
    submit(local_store, pipeline, {"number": 7, "paid": 100})
    same: list[Any] = [{"number": "7", "paid": "100.0"}, {"paid": 100.0, "number": 7.0}, {"number": 7, "paid": 100, "trace": "x"}]
    assert submit(local_store, pipeline, same) == Submitted(0, 3)
    made = dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc)
    model = Payment(number=8, paid=float("nan"), made=made)
    assert submit(local_store, pipeline, model) == Submitted(1, 0)
    assert submit(local_store, pipeline, {"number": 8, "paid": "NaN", "made": "2026-01-01T00:00:00Z"}) == Submitted(0, 1)
    (batch,) = cut(local_store, pipeline)
    with take(local_store, pipeline, batch.run_key, run_id="run") as intake:
        first, second = intake.records
    assert (first.number, first.paid, second.made) == (7, 100.0, made)


class Strict(BaseModel):
    model_config = ConfigDict(strict=True)
    id: Annotated[str, mao.Key]
    day: dt.date


@mao.agent(quarantine=mao.Quarantine(max_share=1))
def strict() -> list[Strict]:
    return []


def test_what_json_cannot_say_is_no_reason_to_refuse(local_store: StateStore) -> None:
    pipeline = mao.Pipeline("days", entry=strict, mode="choreography", inbox=EAGER)
    submit(local_store, pipeline, [Strict(id="\0 ☃", day=dt.date(2026, 1, 2))])
    assert take_in(local_store, pipeline) == ["done"]
    (workflow,) = local_store.workflows("days")
    (seal,) = local_store.seals(workflow)
    assert local_store.read(seal).collect().rows() == [("\0 ☃", dt.date(2026, 1, 2))]


@pytest.mark.parametrize(
    ("record", "why"),
    [
        ({"amount": 1.0}, "it has no key, 'id'"),
        ({"id": None, "amount": 1.0}, "it has no key, 'id'"),
        ({"id": "A", "amount": object()}, "it cannot be written as JSON"),
        ({"id": "A\ud800", "amount": 1.0}, "it cannot be written as JSON"),
        ("A", "it is no record but str"),
        (["A", 1.0], "it is no record but list"),
    ],
    ids=["none", "null", "object", "surrogate", "text", "list"],
)
def test_what_can_be_no_event_is_refused_with_its_place(local_store: StateStore, record: Any, why: str) -> None:
    with pytest.raises(mao.EventsRefusedError) as caught:
        submit(local_store, listening(), [*events("good"), record])
    assert caught.value.places == {1: why}
    assert (caught.value.agent, caught.value.field) == ("applications", "id")
    assert cut(local_store, listening()) == []


def test_a_bad_event_goes_to_quarantine_with_its_reason_and_holds_up_nobody(shared_state: StateStore, ledger: Ledger) -> None:
    pipeline = listening()
    bad: list[dict[str, Any]] = [{"id": "negative", "amount": -1.0}, {"id": "text", "amount": "a lot"}, {"id": "empty"}, {"id": 7}]
    submit(shared_state, pipeline, [*bad[:2], *events("good"), *bad[2:]])
    drained = drain(shared_state, pipeline, resources={"ledger": ledger})
    assert drained.counts["applications"] == drained.counts["approval"] == {"done": 2}
    refused: dict[str, list[str]] = {}
    for workflow in shared_state.workflows("loans"):
        (entry,) = (seal for seal in shared_state.seals(workflow) if seal.kind == "entry")
        for row in shared_state.quarantine(entry).iter_rows(named=True):
            refused[row["record"]] = row["rules"]
    assert set(refused) == {"negative", "text", "empty", "7"}
    assert any("amount" in rule for rule in refused["negative"])
    assert submit(shared_state, pipeline, bad) == Submitted(0, 4)  # no way to make it good: that is resubmission


def test_a_batch_waits_for_its_size_or_its_time(shared_state: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [1e9]
    monkeypatch.setattr(type(shared(shared_state)), "now", lambda *_: clock[0])
    pipeline = listening(inbox=mao.MicroBatch(size=3, wait=5))
    submit(shared_state, pipeline, events("A", "B"))
    assert cut(shared_state, pipeline) == []
    submit(shared_state, pipeline, events("C", "D"))
    (first,) = cut(shared_state, pipeline)
    assert (first.size, first.pipeline, first.agent) == (3, "loans", "applications")
    clock[0] += 4.9
    assert cut(shared_state, pipeline) == [first]  # until a run has taken it
    clock[0] += 0.2
    again, second = cut(shared_state, pipeline, every=5.0)
    assert (again, second.size) == (first, 1)
    with shared(shared_state).reading() as connection:
        (row,) = connection.execute(sa.select(SUBSCRIBERS)).all()
    assert (row.agent, row.beat, row.every) == ("applications", clock[0], 5.0)


def test_whoever_takes_it_after_a_dead_run_is_given_the_same_events(shared_state: StateStore) -> None:
    pipeline = listening()
    submit(shared_state, pipeline, events("A", "B"))
    (batch,) = cut(shared_state, pipeline)
    with take(shared_state, pipeline, batch.run_key, run_id="dead") as intake:
        given = intake.records
        assert intake.sealed is None
        with pytest.raises(BatchTakenError, match="run dead has it"):
            run_inbox(shared_state, pipeline, batch.run_key, run_id="other")
    submit(shared_state, pipeline, events("C"))
    assert abandon(shared(shared_state), batch.run_key)
    again = next(one for one in cut(shared_state, pipeline) if one.run_key == f"{batch.run_key}.1")
    assert again.size == 2
    assert intake_workflow(again.run_key) == intake_workflow(batch.run_key)
    with take(shared_state, pipeline, again.run_key, run_id="heir") as intake:
        assert intake.records == given
    assert run_inbox(shared_state, pipeline, again.run_key, run_id="heir").state == "done"
    with pytest.raises(BatchTakenError, match="it is done"):
        run_inbox(shared_state, pipeline, again.run_key, run_id="heir")
    assert entered(shared_state) == ["A", "B"]


def test_a_batch_whose_run_died_after_the_seal_is_not_sealed_again(shared_state: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = listening()
    submit(shared_state, pipeline, events("A"))
    (batch,) = cut(shared_state, pipeline)
    with monkeypatch.context() as patched:
        patched.setattr(inbox_module.Intake, "finish", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_inbox(shared_state, pipeline, batch.run_key, run_id="dead")
    abandon(shared(shared_state), batch.run_key)
    (again,) = cut(shared_state, pipeline)
    assert run_inbox(shared_state, pipeline, again.run_key, run_id="heir").state == "duplicate"
    assert entered(shared_state) == ["A"]
    assert cut(shared_state, pipeline) == []


def test_a_batch_that_is_the_death_of_its_runs_is_handed_out_ever_more_slowly_and_others_at_once(shared_state: StateStore) -> None:
    pipeline = listening()

    def later(seconds: float) -> list[str]:
        """What is handed out when so many seconds more have passed since the last run died."""
        with shared(shared_state).transaction() as connection:
            connection.execute(sa.update(BATCHES).values(lease=BATCHES.c.lease - seconds))
        return [batch.run_key for batch in cut(shared_state, pipeline)]

    submit(shared_state, pipeline, events("A"))
    for _ in range(3):
        (key,) = later(0)
        assert abandon(shared(shared_state), key)
    for rest in (30, 60, 120, 240, 480, 600, 600):
        assert later(0) == later(rest - 5) == []
        (key,) = later(10)
        assert abandon(shared(shared_state), key)
    submit(shared_state, pipeline, events("B"))
    (other,) = later(0)
    assert other.partition(".")[0] != key.partition(".")[0]
    assert run_inbox(shared_state, pipeline, other, run_id="run").state == "done"
    assert take_in(shared_state, pipeline) == []
    (key,) = later(600)
    assert run_inbox(shared_state, pipeline, key, run_id="run").state == "done", "what killed them is over"
    assert entered(shared_state) == ["A", "B"]


@pytest.mark.parametrize("point", ["records", "run_agent"])
def test_of_two_that_have_the_same_batch_one_seals(shared_state: StateStore, monkeypatch: pytest.MonkeyPatch, point: str) -> None:
    """A run that was stopped and wakes up: before it joined its attempt, or just before it seals."""
    pipeline = listening()
    submit(shared_state, pipeline, events("A"))
    (batch,) = cut(shared_state, pipeline)
    told: list[str] = []

    def overtaken() -> None:
        monkeypatch.undo()
        assert abandon(shared(shared_state), batch.run_key)
        (again,) = cut(shared_state, pipeline)
        told.append(run_inbox(shared_state, pipeline, again.run_key, run_id="heir").state)

    _before(monkeypatch, point, overtaken)
    with pytest.raises(BatchTakenError, match="another has it"):
        run_inbox(shared_state, pipeline, batch.run_key, run_id="zombie")
    assert told == ["done"]
    (workflow,) = shared_state.workflows("loans")
    assert [seal.run_id for seal in shared_state.seals(workflow)] == ["heir"]


def _before(monkeypatch: pytest.MonkeyPatch, point: str, happens: Callable[[], None]) -> None:
    if point == "run_agent":
        run_agent = inbox_module.run_agent

        def later(*given: Any, **options: Any) -> Any:
            happens()
            return run_agent(*given, **options)

        monkeypatch.setattr(inbox_module, "run_agent", later)
        return
    open_attempt = StateStore.open_attempt

    def joined(*given: Any, **options: Any) -> Any:
        happens()
        return open_attempt(*given, **options)

    monkeypatch.setattr(StateStore, "open_attempt", joined)


def test_batches_that_are_lost_are_there_again_with_their_events(shared_state: StateStore) -> None:
    pipeline = listening()
    submit(shared_state, pipeline, events("A", "B", "C", "D"))
    first, second = cut(shared_state, pipeline)
    run_inbox(shared_state, pipeline, first.run_key, run_id="run")
    with shared(shared_state).transaction() as connection:
        connection.execute(sa.delete(BATCHES))
        connection.execute(sa.delete(SUBSCRIBERS))
    assert cut(shared_state, pipeline) == [second]
    assert take_in(shared_state, pipeline) == ["done"]
    assert entered(shared_state) == ["A", "B", "C", "D"]


def test_threads_that_submit_together_are_committed_together(shared_state: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, database = listening(), shared(shared_state)
    submit(shared_state, pipeline, events("first"))
    desk, commits = inbox_module._desk(database), list[int]()
    commit, begin = type(desk)._commit, threading.Barrier(9)

    def counted(self: Any, together: Any) -> None:
        commits.append(len(together))
        commit(self, together)

    monkeypatch.setattr(type(desk), "_commit", counted)
    told: dict[str, Any] = {}

    def one(name: str) -> None:
        begin.wait()
        try:
            told[name] = submit(shared_state, pipeline, events(name, amount=7.0))
        except mao.EventsRefusedError as error:
            told[name] = error.places

    with desk._commits:  # somebody is committing while they come
        threads = [threading.Thread(target=one, args=(name,)) for name in ("first", *"ABCDEFG")]
        for thread in threads:
            thread.start()
        begin.wait()
        deadline = time.monotonic() + 120
        while len(desk._waiting) < 8:
            assert time.monotonic() < deadline, "they did not all come"
            time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert commits == [8]
    assert told.pop("first") == {0: "another one came in under its key before"}  # and it held up nobody
    assert set(told.values()) == {Submitted(1, 0)}
    assert len(told) == 7


def test_a_forked_child_submits_by_itself(local_store: StateStore) -> None:
    pipeline = listening()
    submit(local_store, pipeline, events("A"))
    with inbox_module._desk(shared(local_store))._commits:  # a thread of the parent is committing
        child = os.fork()
        if not child:
            try:
                submit(local_store, pipeline, events("B"))
            finally:
                os._exit(0)
    os.waitpid(child, 0)
    assert submit(local_store, pipeline, events("A", "B")) == Submitted(0, 2)


def test_all_who_wait_are_told_when_the_database_is_down(local_store: StateStore) -> None:
    pipeline = listening()
    submit(local_store, pipeline, events("A"))
    with shared(local_store).transaction() as connection:
        INBOX.drop(connection)
    with pytest.raises(mao.StoreError, match="cannot be used"):
        submit(local_store, pipeline, events("B"))


def test_a_pipeline_without_an_inbox_takes_no_events(local_store: StateStore) -> None:
    for call in (lambda: submit(local_store, loans(), events("A")), lambda: cut(local_store, loans())):
        with pytest.raises(mao.WiringError, match="has no inbox") as caught:
            call()
        assert (caught.value.field, caught.value.agent) == ("inbox", "applications")


def test_a_batch_of_another_pipeline_is_not_taken(local_store: StateStore) -> None:
    pipeline = listening()
    submit(local_store, pipeline, events("A"))
    (batch,) = cut(local_store, pipeline)
    other = mao.Pipeline("payments", entry=payments, mode="choreography", inbox=EAGER)
    with pytest.raises(BatchTakenError, match="not of this inbox"):
        run_inbox(local_store, other, batch.run_key, run_id="run")
    assert run_inbox(local_store, pipeline, batch.run_key, run_id="run").state == "done"


def test_in_orchestration_a_batch_of_events_is_run_as_a_whole(local_store: StateStore, ledger: Ledger) -> None:
    pipeline = listening("orchestration")
    submit(local_store, pipeline, events("A", "B"))
    assert drain(local_store, pipeline).runs == 0
    (batch,) = cut(local_store, pipeline)
    with take(local_store, pipeline, batch.run_key, run_id="run") as intake:
        result = mao.run(pipeline, intake.records, store=local_store, workflow=intake.workflow_key, resources={"ledger": ledger})
        intake.finish()
    assert result["approval"]["id"].to_list() == ["A", "B"]
    assert cut(local_store, pipeline) == []


def test_in_hybrid_the_attempt_is_of_all_agents(local_store: StateStore, ledger: Ledger) -> None:
    pipeline = listening("hybrid")
    submit(local_store, pipeline, events("A"))
    take_in(local_store, pipeline)
    (workflow,) = local_store.workflows("loans")
    assert local_store.seals(workflow)[0].plan == pipeline.order
    assert local_store.effective(workflow) == {}
    drain(local_store, pipeline, resources={"ledger": ledger})
    assert local_store.effective(workflow).keys() == {"applications", *(agent.name for agent in AGENTS)}


def test_no_value_of_an_event_is_in_an_error_or_a_log(local_store: StateStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    pipeline, said = listening(), list[str]()
    one = {"id": "A", "name": "Ada Lovelace", "amount": 1.0}
    submit(local_store, pipeline, one)
    for wrong in ({**one, "amount": 2.0}, {"name": "Ada Lovelace"}, {**one, "id": object()}):
        with pytest.raises(mao.EventsRefusedError) as caught:
            submit(local_store, pipeline, wrong)
        said.append(f"{caught.value} {caught.value.places}")
    with shared(local_store).transaction() as connection:
        INBOX.drop(connection)
    with pytest.raises(mao.StoreError) as lost:
        submit(local_store, pipeline, {**one, "id": "Lovelace"})
    assert not any("Lovelace" in text for text in (*said, str(lost.value), caplog.text))
