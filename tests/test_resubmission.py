"""A corrected record re-enters its workflow as a new entry; whatever else was in quarantine stays there, exactly as it was."""

from __future__ import annotations

import json
import threading
from typing import Annotated, Any

import polars as pl
import pytest
from pydantic import BaseModel, ConfigDict, Field

import dagster_mao as mao
from dagster_mao import resubmission
from dagster_mao.boundary import run_agent
from dagster_mao.errors import BatchRefusedError, InvalidRecordsError, StaleStateError, UnknownVersionError
from dagster_mao.review.quarantine import accounts, discard, refusals, refusals_of
from dagster_mao.state import DISPOSITION_SCHEMA, Seal, StateStore
from dagster_mao.state import store as state_store
from dagster_mao.state.verify import verify

SECRET = "Zarniwoop"
ANY = mao.Quarantine(max_share=1)
DAY = "loans/day"


class Application(BaseModel):
    model_config = ConfigDict(extra="forbid")

    application_id: Annotated[str, mao.Key]
    name: Annotated[str, mao.Personal] = SECRET
    amount: float = Field(gt=0, validation_alias="betrag")


class Small(BaseModel):
    application_id: Annotated[str, mao.Key]
    amount: float = Field(le=100)


class Score(BaseModel):
    application_id: Annotated[str, mao.Key]
    score: int


@mao.agent(quarantine=ANY)
def applications() -> list[Application]:
    return []


@mao.agent(quarantine=ANY)
def score(applications: Small) -> Score:
    return Score(application_id=applications.application_id, score=int(applications.amount))


@mao.agent(quarantine=ANY)
def risk(applications: Application, score: Score) -> Score:
    return score


LOANS = mao.Pipeline("loans", entry=applications, agents=[score, risk])


def batch(*amounts: Any) -> list[dict[str, Any]]:
    return [{"application_id": str(n), "betrag": amount} for n, amount in enumerate(amounts)]


def run(store: StateStore, *amounts: Any) -> mao.Result:
    return mao.run(LOANS, batch(*amounts), store=store, workflow="day")


def agents_again(store: StateStore, agents: tuple[str, ...]) -> dict[str, Seal]:
    """What materialising the agents without the entry does."""
    for name in agents:
        attempt = store.open_attempt(
            pipeline="loans", attempt="again", run_id="again", plan=agents, entry="applications", workflow_key="day"
        )
        run_agent(store, LOANS.node(name), attempt)
    return store.effective(DAY)


def entry(store: StateStore) -> dict[str, float]:
    return dict(store.read(store.effective(DAY)["applications"]).select("application_id", "amount").collect().rows())


def statuses(store: StateStore) -> dict[tuple[str, str | None], str]:
    return {(refusal.seal.agent, refusal.key): refusal.status for refusal in refusals(store, DAY)}


def test_a_record_refused_at_the_entry_starts_from_what_came_in(store: StateStore) -> None:
    first = run(store, 1, -2, "much", 4)
    done = mao.resubmit(LOANS, store, DAY, {"1": {"amount": 2}}, by="ford")
    assert (done.entry.kind, done.entry.agent, done.entry.plan) == ("entry", "applications", ("applications",))
    assert entry(store) == {"0": 1, "3": 4, "1": 2}
    assert (done.decision.kind, done.agents) == ("disposition", ("score", "risk"))
    assert statuses(store) == {("applications", "2"): "open"}
    (decided,) = store.dispositions(DAY).to_dicts()
    assert (decided["agent"], decided["version"], decided["record"], decided["by"]) == ("applications", 0, "1", "ford")
    assert done.entry.reference in decided["why"]
    state = agents_again(store, done.agents)
    assert store.read(state["risk"]).collect()["application_id"].to_list() == ["0", "3", "1"]
    assert all(accounts(store, seal).balanced for seal in state.values())
    assert store.quarantine(done.entry).equals(store.quarantine(first.seals["applications"]).filter(pl.col("record") == "2"))
    assert verify(store).good


def test_a_record_refused_further_down_starts_from_its_row_in_the_entry(local_store: StateStore) -> None:
    run(local_store, 1, 200, 300)
    assert statuses(local_store) == {(agent, key): "open" for agent in ("score", "risk") for key in "12"}
    done = mao.resubmit(LOANS, local_store, DAY, {"1": {"amount": "20"}})
    assert entry(local_store) == {"0": 1, "2": 300, "1": 20}
    assert statuses(local_store)["score", "1"] == statuses(local_store)["risk", "1"] == "resubmitted", "one record, one decision"
    assert statuses(local_store)["score", "2"] == "open"
    state = agents_again(local_store, done.agents)
    assert statuses(local_store) == {("score", "2"): "open", ("risk", "2"): "open"}
    assert local_store.read(state["risk"]).collect()["application_id"].to_list() == ["0", "1"]
    assert {agent: accounts(local_store, seal).balanced for agent, seal in state.items()} == dict.fromkeys(LOANS.order, True)


def test_decisions_of_a_release_that_did_not_name_the_entry_hold_too(local_store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run(local_store, 1, 200, 300)
    with monkeypatch.context() as earlier:
        earlier.setattr(state_store, "DISPOSITION_SCHEMA", pl.Schema({k: v for k, v in DISPOSITION_SCHEMA.items() if k != "entry"}))
        mao.resubmit(LOANS, local_store, DAY, {"1": {"amount": "20"}})
    mao.resubmit(LOANS, local_store, DAY, {"2": {"amount": "30"}})
    assert local_store.dispositions(DAY)["entry"].to_list() == [None, None, 5, 5]
    assert set(statuses(local_store).values()) == {"resubmitted"}


def test_a_correction_that_does_not_help_is_open_again(local_store: StateStore) -> None:
    run(local_store, 1, 200)
    done = mao.resubmit(LOANS, local_store, DAY, {"1": {"name": "Hotblack"}})
    agents_again(local_store, done.agents)
    assert statuses(local_store) == {("score", "1"): "open", ("risk", "1"): "open"}


def test_a_discarded_record_stays_discarded_in_the_new_entry(local_store: StateStore) -> None:
    """The naive resubmission judges the rest of the quarantine again, or forgets it."""
    first = run(local_store, 1, -1, -2)
    discard(local_store, [r for r in refusals_of(local_store, first.seals["applications"]) if r.key == "1"], why="twice", by="me")
    done = mao.resubmit(LOANS, local_store, DAY, {"2": {"amount": 2}})
    assert statuses(local_store) == {("applications", "1"): "discarded"}
    account = accounts(local_store, done.entry)
    assert (account.came_in, account.sealed, account.quarantined, account.discarded, account.balanced) == (3, 2, 0, 1, True)


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"amount": -7}, "amount: gt 0"), ({"amount": "even more"}, "amount: float_parsing"), ({"name": None}, "name: ")],
)
def test_a_correction_that_breaks_the_contract_seals_nothing(local_store: StateStore, changes: dict[str, Any], told: str) -> None:
    run(local_store, 1, "much")
    with pytest.raises(BatchRefusedError, match=told) as caught:
        mao.resubmit(LOANS, local_store, DAY, {"1": {"amount": 3, **changes}})
    assert SECRET not in str(caught.value)
    assert len(local_store.seals(DAY)) == 3


def test_what_is_not_there_to_be_corrected(local_store: StateStore) -> None:
    run(local_store, 1, -1)
    for workflow, corrections, told in (
        (DAY, {"0": {"amount": 1}}, "No record by this name"),
        ("loans/night", {"1": {"amount": 1}}, "No attempt at this workflow has completed"),
        ("other/day", {"1": {"amount": 1}}, "no workflow of the pipeline 'loans'"),
    ):
        with pytest.raises(UnknownVersionError, match=told):
            mao.resubmit(LOANS, local_store, workflow, corrections)
    with pytest.raises(InvalidRecordsError, match="has no field 'amuont'"):
        mao.resubmit(LOANS, local_store, DAY, {"1": {"amuont": 1}})
    assert len(local_store.seals(DAY)) == 3


def test_records_of_one_key_are_replaced_together_or_told_apart_by_digest(local_store: StateStore) -> None:
    doubled = [*batch(1, 2), {"application_id": "0", "betrag": -3}]
    mao.run(LOANS, doubled, store=local_store, workflow="day")
    assert entry(local_store) == {"1": 2}
    (bad,) = [r for r in refusals(local_store, DAY) if "amount: gt 0" in r.rules]
    with pytest.raises(BatchRefusedError, match="has the key '0'"):
        mao.resubmit(LOANS, local_store, DAY, {bad.digest[:12]: {"amount": 3}})
    mao.resubmit(LOANS, local_store, DAY, {bad.digest[:12]: {"amount": 3, "application_id": "0b"}})
    assert entry(local_store) == {"1": 2, "0b": 3}
    assert statuses(local_store) == {("applications", "0"): "open"}

    mao.run(LOANS, doubled, store=local_store, workflow="day")
    with pytest.raises(BatchRefusedError, match="missing"):
        mao.resubmit(LOANS, local_store, DAY, {"0": {"name": "Ann"}})
    mao.resubmit(LOANS, local_store, DAY, {"0": {"amount": 5}})
    assert entry(local_store) == {"1": 2, "0": 5}
    assert statuses(local_store) == {}


def test_a_key_that_another_record_has_is_refused(local_store: StateStore) -> None:
    run(local_store, 1, -1)
    with pytest.raises(BatchRefusedError, match="has the key '0'"):
        mao.resubmit(LOANS, local_store, DAY, {"1": {"amount": 1, "application_id": "0"}})


def test_a_record_without_a_key_is_named_by_its_digest(local_store: StateStore) -> None:
    mao.run(LOANS, [*batch(1), {"betrag": 2, "notes": "?"}], store=local_store, workflow="day")
    (refusal,) = refusals(local_store, DAY)
    assert refusal.key is None
    mao.resubmit(LOANS, local_store, DAY, {refusal.digest[:8]: {"application_id": "9"}})
    assert entry(local_store) == {"0": 1, "9": 2}, "and what the contract forbids was left out"


def test_of_two_resubmissions_at_once_one_is_refused(local_store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both started from the same entry: if the later one won, the correction of the earlier one would be lost."""
    run(local_store, 1, -1, -2)
    honest = resubmission._refuse_doubled

    def slow(*arguments: Any) -> None:
        monkeypatch.setattr(resubmission, "_refuse_doubled", honest)
        mao.resubmit(LOANS, local_store, DAY, {"1": {"amount": 1}})
        honest(*arguments)

    monkeypatch.setattr(resubmission, "_refuse_doubled", slow)
    with pytest.raises(StaleStateError, match="Another entry was sealed"):
        mao.resubmit(LOANS, local_store, DAY, {"2": {"amount": 2}})
    assert entry(local_store) == {"0": 1, "1": 1}
    assert statuses(local_store) == {("applications", "2"): "open"}


def test_two_that_opened_their_attempts_together_have_one_winner(local_store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    run(local_store, 1, -1, -2)
    together, said = threading.Barrier(2), list[str]()

    def at_once(*arguments: Any, **options: Any) -> Any:
        together.wait(30)
        return run_agent(*arguments, **options)

    def one(key: str) -> None:
        try:
            mao.resubmit(LOANS, local_store, DAY, {key: {"amount": 9}})
            said.append("sealed")
        except StaleStateError:
            said.append("stale")

    monkeypatch.setattr(resubmission, "run_agent", at_once)
    threads = [threading.Thread(target=one, args=(key,)) for key in "12"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(said) == ["sealed", "stale"]
    assert len(entry(local_store)) == 2
    assert verify(local_store).good


def test_an_entry_without_a_quarantine_of_its_own(local_store: StateStore) -> None:
    @mao.agent(name="applications")
    def plain() -> list[Application]:
        return []

    loans = mao.Pipeline("loans", entry=plain, agents=[score])
    mao.run(loans, batch(1, 200), store=local_store, workflow="day")
    done = mao.resubmit(loans, local_store, DAY, {"1": {"amount": 3}})
    assert entry(local_store) == {"0": 1, "1": 3}
    assert (done.entry.quarantined, json.loads(done.entry.contract_schema)["name"]) == (0, "Application")


def test_a_quarantine_that_was_withdrawn_loses_nothing(local_store: StateStore) -> None:
    @mao.agent(name="applications")
    def plain() -> list[Application]:
        return []

    run(local_store, 1, -1, -2)
    with pytest.raises(InvalidRecordsError, match="1 records are in its quarantine"):
        mao.resubmit(mao.Pipeline("loans", entry=plain), local_store, DAY, {"1": {"amount": 1}})
    assert len(local_store.seals(DAY)) == 3
