"""The numbers add up, recounted from the store. The naive account trusts the counters that the boundary itself wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

import dagster_mao as mao
from dagster_mao.boundary import run_agent
from dagster_mao.errors import UnknownVersionError
from dagster_mao.review.deferred import waiting
from dagster_mao.review.quarantine import accounts, akin, discard, refusals, refusals_of
from dagster_mao.state import DEFERRED_SCHEMA, QUARANTINE_SCHEMA, Provenance, Seal, StateStore, staged

KEYS = pl.Schema({"id": pl.String})
PLAN = ("entry", "score")


def sealed(
    store: StateStore,
    attempt: str,
    agent: str,
    records: Sequence[str],
    aside: Sequence[str] = (),
    *,
    parents: Sequence[Seal] = (),
    personal: bool = False,
    deferred: Sequence[str] = (),
    told: tuple[int, int] | None = None,
) -> Seal:
    """One version with these records, set aside and deferred, whatever a boundary would say to it; `told` are the counters it writes."""
    opened = store.open_attempt(pipeline="loans", attempt=attempt, run_id=attempt, plan=PLAN, entry="entry", workflow_key="day")
    rows = [{"record": key, "side": "output", "rules": ["amount: gt 0"], "masked": json.dumps({"id": key})} for key in aside]
    frame = pl.DataFrame([{**row, "digest": key, "values": "{}"} for row, key in zip(rows, aside, strict=True)], schema=QUARANTINE_SCHEMA)
    described = json.dumps({"fields": [{"name": "id", "personal": personal}]})
    blank = dict.fromkeys(("contract_version", "contract_hash", "agent_version", "config", "library_version"), "1")
    provenance = Provenance(contract="Keys", contract_schema=described, key="id", model=None, seed=1, latency_seconds=0.0, **blank)
    rest = pl.DataFrame([{"record": key, "agent": agent, "why": "bureau"} for key in deferred], schema=DEFERRED_SCHEMA)
    with (
        staged(store.objects, pl.DataFrame({"id": records}, schema=KEYS)) as batch,
        staged(store.objects, frame) as held,
        staged(store.objects, rest) as waiting,
    ):
        counted = told or (len(records), len(aside))
        seal, _ = opened.seal(
            agent,
            batch,
            row_count=counted[0],
            schema=KEYS,
            parents=[parent.as_parent for parent in parents],
            provenance=provenance,
            quarantine=held if aside else None,
            quarantined=counted[1],
            deferred=waiting if deferred else None,
            deferred_count=len(deferred),
        )
    return seal


def naive(store: StateStore, seal: Seal) -> bool:
    """What the counters say."""
    came_in = sum(store.seal_at(parent.workflow_id, parent.version).row_count for parent in seal.parents)
    return came_in == seal.row_count + seal.quarantined


def test_what_adds_up(local_store: StateStore) -> None:
    entry = sealed(local_store, "a", "entry", ["1", "2", "3"], ["4"])
    score = sealed(local_store, "a", "score", ["1", "2"], ["3"], parents=[entry])
    for seal, numbers in ((entry, (4, 3, 1, 0)), (score, (3, 2, 1, 0))):
        account = accounts(local_store, seal)
        assert (account.came_in, account.sealed, account.quarantined, account.discarded) == numbers
        assert account.balanced


@pytest.mark.parametrize(
    ("records", "aside", "wrong"),
    [
        (["1", "1"], ["2"], {"neither": ("3",), "doubled": ("1",)}),
        (["1", "2"], ["2"], {"neither": ("3",), "both": ("2",)}),
        (["1", "ghost"], ["2"], {"neither": ("3",), "never_came_in": ("ghost",)}),
        (["1", "2"], ["ghost"], {"neither": ("3",), "never_came_in": ("ghost",)}),
    ],
)
def test_a_lost_record_is_found_where_the_counters_add_up(
    local_store: StateStore, records: list[str], aside: list[str], wrong: dict[str, Any]
) -> None:
    entry = sealed(local_store, "a", "entry", ["1", "2", "3"])
    score = sealed(local_store, "a", "score", records, aside, parents=[entry])
    assert naive(local_store, score)
    account = accounts(local_store, score)
    assert account.wrong == wrong
    assert not account.balanced


def test_counters_that_hide_a_lost_record_are_found_too(local_store: StateStore) -> None:
    entry = sealed(local_store, "a", "entry", ["1", "2", "3"])
    score = sealed(local_store, "a", "score", ["1"], ["2"], parents=[entry], told=(2, 1))
    assert naive(local_store, score)
    account = accounts(local_store, score)
    assert (account.wrong, account.balanced) == ({"neither": ("3",)}, False)


def test_counters_that_lie_although_no_record_is_lost(local_store: StateStore) -> None:
    entry = sealed(local_store, "a", "entry", ["1", "2", "3"])
    score = sealed(local_store, "a", "score", ["1", "2"], ["3"], parents=[entry], told=(1, 2))
    assert naive(local_store, score)
    account = accounts(local_store, score)
    assert (account.wrong, account.balanced) == ({}, False)


def test_deferred_records_are_accounted_for_and_carried_on(local_store: StateStore) -> None:
    entry = sealed(local_store, "a", "entry", ["1", "2", "3", "4"])
    score = sealed(local_store, "a", "score", ["1"], ["2"], parents=[entry], deferred=["3", "4"])
    account = accounts(local_store, score)
    assert (account.came_in, account.sealed, account.quarantined, account.deferred, account.balanced) == (4, 1, 1, 2, True)
    below = sealed(local_store, "a", "decision", ["1"], parents=[score], deferred=["3", "4"])
    account = accounts(local_store, below)
    assert (account.came_in, account.sealed, account.deferred, account.balanced) == (3, 1, 2, True)
    forgotten = sealed(local_store, "a", "offer", ["1"], parents=[score], deferred=["3"])
    assert accounts(local_store, forgotten).wrong == {"neither": ("4",)}


def test_a_deferred_record_is_in_no_other_place(local_store: StateStore) -> None:
    entry = sealed(local_store, "a", "entry", ["1", "2", "3"])
    score = sealed(local_store, "a", "score", ["1"], ["2"], parents=[entry], deferred=["1", "2", "3"])
    assert accounts(local_store, score).wrong == {"both": ("1", "2")}


def test_what_waits_is_shown_without_personal_keys(local_store: StateStore) -> None:
    entry = sealed(local_store, "a", "entry", ["1", "2", "3"])
    score = sealed(local_store, "a", "score", ["1"], parents=[entry], deferred=["3", "2"])
    assert waiting(local_store, score, limit=1) == [{"record": "2", "agent": "score", "why": "bureau"}]
    hidden = sealed(local_store, "a", "offer", ["1"], parents=[entry], deferred=["3", "2"], personal=True)
    assert [row["record"] for row in waiting(local_store, hidden)] == ["***", "***"]
    assert waiting(local_store, entry) == []


def test_an_entry_may_hold_no_record_in_both_places(local_store: StateStore) -> None:
    entry = sealed(local_store, "a", "entry", ["1", "2"], ["2"])
    account = accounts(local_store, entry)
    assert (account.came_in, account.wrong, account.balanced) == (3, {"both": ("2",)}, False)


def test_personal_keys_are_counted_and_not_named(local_store: StateStore) -> None:
    entry = sealed(local_store, "a", "entry", ["ann", "bob"], personal=True)
    score = sealed(local_store, "a", "score", ["ann"], parents=[entry], personal=True)
    account = accounts(local_store, score)
    assert (account.wrong, account.wrong_counts) == ({"neither": ("***",)}, {"neither": 1})


def test_without_keys_nothing_is_accounted_for(local_store: StateStore) -> None:
    class Summary(BaseModel):
        count: int

    @mao.agent
    def summary(applications: mao.DataFrame[Application]) -> mao.DataFrame[Summary]:
        return pl.DataFrame({"count": [applications.height]})

    result = mao.run(mao.Pipeline("loans", entry=applications, agents=[summary]), batch(1, 2), store=local_store)
    with pytest.raises(UnknownVersionError, match="one by one"):
        accounts(local_store, result.seals["summary"])


# -- what was decided ----------------------------------------------------------------------------------------------------------------


class Application(BaseModel):
    application_id: Annotated[str, mao.Key]
    amount: float = Field(gt=0)


class Small(Application):
    amount: float = Field(gt=0, le=100)


class Score(BaseModel):
    application_id: Annotated[str, mao.Key]
    score: int


@mao.agent(quarantine=mao.Quarantine(max_share=1))
def applications() -> list[Application]:
    return []


@mao.agent(quarantine=mao.Quarantine(max_share=1))
def score(applications: Small) -> Score:
    return Score(application_id=applications.application_id, score=1)


@mao.agent(quarantine=mao.Quarantine(max_share=1))
def income(applications: Application) -> Score:
    return Score(application_id=applications.application_id, score=int(applications.amount))


@mao.agent(quarantine=mao.Quarantine(max_share=1))
def risk(score: Score, income: Score) -> Score:
    return score


LOANS = mao.Pipeline("loans", entry=applications, agents=[score, income, risk])


def batch(*amounts: Any) -> list[dict[str, Any]]:
    return [{"application_id": str(n), "amount": amount} for n, amount in enumerate(amounts)]


def statuses(store: StateStore, **options: Any) -> dict[tuple[str, int, str | None], str]:
    return {(r.seal.agent, r.seal.version, r.key): r.status for r in refusals(store, "loans/day", **options)}


def test_a_discard_is_of_the_record_at_every_boundary_and_outlives_a_rerun(local_store: StateStore) -> None:
    """The naive list forgets a decision with the version that it was made on."""
    result = mao.run(LOANS, batch(1, -1, 500, 600), store=local_store, workflow="day")
    assert statuses(local_store) == {
        ("applications", 0, "1"): "open",
        ("score", 1, "2"): "open",
        ("score", 1, "3"): "open",
        ("risk", 3, "2"): "open",
        ("risk", 3, "3"): "open",
    }
    chosen = [r for r in refusals_of(local_store, result.seals["score"]) if r.is_named("2")]
    discard(local_store, akin(local_store, chosen), why="withdrawn", by="ford")
    assert {place for place, status in statuses(local_store).items() if status == "discarded"} == {("score", 1, "2"), ("risk", 3, "2")}
    account = accounts(local_store, result.seals["risk"])
    assert (account.came_in, account.sealed, account.quarantined, account.discarded) == (3, 1, 1, 1)
    assert account.balanced
    again = mao.run(LOANS, batch(1, -1, 500, 700), store=local_store, workflow="day")
    by_key = {(agent, key): status for (agent, _, key), status in statuses(local_store).items()}
    assert by_key["score", "2"] == "discarded"
    assert by_key["score", "3"] == "open", "its amount is another: that is another refusal"
    every = statuses(local_store, every=True)
    assert every["applications", 0, "1"] == "superseded"
    assert every["score", again.seals["score"].version, "2"] == "discarded"


def test_what_an_attempt_left_that_never_completed_is_not_of_the_effective_state(local_store: StateStore) -> None:
    opened = local_store.open_attempt(
        pipeline="loans", attempt="half", run_id="half", plan=LOANS.order, entry="applications", workflow_key="day"
    )
    run_agent(local_store, LOANS.node("applications"), opened, records=batch(1, -1))
    assert statuses(local_store) == {}
    assert statuses(local_store, every=True) == {("applications", 0, "1"): "unfinished"}


AMOUNTS = st.lists(
    st.tuples(st.sampled_from("01234567"), st.sampled_from([1, 7, 200, -1, "x", None, float("nan")])),
    max_size=12,
)


@settings(max_examples=12, deadline=None)
@given(AMOUNTS)
def test_whatever_comes_in_is_accounted_for_doubled_keys_included(records: list[tuple[str, Any]]) -> None:
    result = mao.run(LOANS, [{"application_id": key, "amount": amount} for key, amount in records])
    for agent, seal in result.seals.items():
        account = accounts(result.store, seal)
        assert account.balanced, (agent, account)
        if agent == "applications":
            assert account.came_in == len(records)
