"""Law 3 with a quarantine: a bad record is never part of a sealed snapshot and is never lost, and the numbers add up."""

from __future__ import annotations

import json
from typing import Annotated, Any

import polars as pl
import pytest
from deltalake import DeltaTable
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

import dagster_mao as mao
from dagster_mao.errors import BatchRefusedError, TamperedError, UnknownVersionError, WiringError
from dagster_mao.run import run
from dagster_mao.state import DISPOSITION_SCHEMA, StateStore
from dagster_mao.state.verify import verify
from tests.stores import on_every_store

SECRET = "Zaphod-Beeblebrox"
ANY = mao.Quarantine(max_share=1)


class Application(BaseModel):
    application_id: Annotated[str, mao.Key]
    name: Annotated[str, mao.Personal] = SECRET
    amount: float = Field(gt=0)


class Small(Application):
    amount: float = Field(gt=0, le=100)


class Score(BaseModel):
    application_id: Annotated[str, mao.Key]
    score: int = Field(ge=0, le=10)


class Few(BaseModel):
    application_id: Annotated[str, mao.Key]
    score: int = Field(le=1)


class Income(BaseModel):
    application_id: Annotated[str, mao.Key]
    income: float


class Risk(BaseModel):
    application_id: Annotated[str, mao.Key]
    risk: float


@mao.agent(quarantine=ANY)
def applications() -> list[Application]:
    return []


@mao.agent(quarantine=ANY)
def score(applications: Small) -> Score:
    """Scores above 10 break its own contract while the model is made."""
    return Score(application_id=applications.application_id, score=int(applications.amount))


@mao.agent(quarantine=ANY)
def income(applications: mao.LazyFrame[Application]) -> mao.LazyFrame[Income]:
    """Forgets who asks for seven, and gives NaN, which the contract takes, for eight."""
    return applications.filter(pl.col("amount") != 7).select("application_id", income=pl.col("amount") * 10)


@mao.agent(quarantine=ANY)
def risk(score: Score, income: Income) -> Risk:
    return Risk(application_id=score.application_id, risk=score.score / income.income)


CREDIT = mao.Pipeline("credit", entry=applications, agents=[score, income, risk])


def batch(*amounts: Any) -> list[dict[str, Any]]:
    return [{"application_id": str(n), "name": SECRET, "amount": amount} for n, amount in enumerate(amounts)]


def aside(result: mao.Result, agent: str) -> dict[str | None, tuple[str, list[str]]]:
    rows = result.store.quarantine(result.seals[agent])
    return {row["record"]: (row["side"], row["rules"]) for row in rows.iter_rows(named=True)}


def test_bad_records_are_set_aside_with_their_reasons_and_the_rest_is_sealed(local_store: StateStore) -> None:
    result = run(CREDIT, batch(1, -1, "x", 5, None, 200, 11, 7), store=local_store, workflow="day")
    assert result["applications"]["application_id"].to_list() == ["0", "3", "5", "6", "7"]
    assert {key: side for key, (side, _) in aside(result, "applications").items()} == {"1": "output", "2": "output", "4": "output"}
    assert aside(result, "score") == {"5": ("input", ["amount: le 100"]), "6": ("output", ["score: le 10"])}
    assert aside(result, "income") == {"7": ("output", ["record read, but not returned"])}
    assert aside(result, "risk") == {
        "5": ("input", ["record in income, missing here"]),
        "6": ("input", ["record in income, missing here"]),
        "7": ("input", ["record in score, missing here"]),
    }
    assert result["risk"]["application_id"].to_list() == ["0", "3"]
    assert {name: (seal.row_count, seal.quarantined) for name, seal in result.seals.items()} == {
        "applications": (5, 3),
        "score": (3, 2),
        "income": (4, 1),
        "risk": (2, 3),
    }


def test_the_failed_checks_warn_and_show_masked_samples(local_store: StateStore) -> None:
    result = run(CREDIT, batch(1, -1, 200, 11), store=local_store)
    failed = {(agent, check.name): check for agent, checks in result.checks.items() for check in checks if not check.passed}
    assert set(failed) == {
        ("applications", "output"),
        ("score", "input_applications"),
        ("score", "output"),
        ("risk", "input_score"),
    }
    assert {check.severity for check in failed.values()} == {"warn"}
    reasons = failed["score", "output"].metadata["reasons"]
    assert reasons == [{"rule": "score: le 10", "field": "score", "count": 1, "samples": [{"application_id": "3", "score": 11}]}]
    assert SECRET not in str(failed)


def test_what_came_in_is_kept_for_correcting_it_and_masked_for_showing_it(local_store: StateStore) -> None:
    records = [*batch(1), {"application_id": "1", "name": SECRET, "amount": -1, "ssn": SECRET}]
    result = run(CREDIT, records, store=local_store)
    (row,) = local_store.quarantine(result.seals["applications"]).to_dicts()
    assert json.loads(row["values"]) == records[1]
    assert json.loads(row["masked"]) == {"application_id": "1", "name": "***", "amount": -1, "ssn": "***"}


def test_past_the_declared_share_the_batch_fails_after_all_and_the_agent_is_not_called(local_store: StateStore) -> None:
    called = []

    @mao.agent(quarantine=mao.Quarantine(max_share=0.25))
    def picky(applications: Small) -> Score:
        called.append(applications)
        return Score(application_id=applications.application_id, score=1)

    pipeline = mao.Pipeline("credit", entry=applications, agents=[picky])
    assert run(pipeline, batch(1, 2, 3, 200), store=local_store)["picky"].height == 3
    called.clear()
    with pytest.raises(BatchRefusedError, match=r"2 of 4 records; at most 25.0% may be quarantined") as caught:
        run(pipeline, batch(1, 2, 300, 200), store=local_store, workflow="day")
    assert not called
    assert [(c.name, c.passed, c.severity) for c in caught.value.checks][-1] == ("input_applications", False, "error")
    assert [seal.agent for seal in local_store.seals("credit/day")] == ["applications"]


def test_a_share_passed_on_the_output_side_writes_nothing(local_store: StateStore) -> None:
    @mao.agent(quarantine=mao.Quarantine(max_share=0.5))
    def score(applications: Application) -> Score:
        return Score(application_id=applications.application_id, score=int(applications.amount))

    pipeline = mao.Pipeline("credit", entry=applications, agents=[score])
    with pytest.raises(BatchRefusedError, match="3 of 4 records"):
        run(pipeline, batch(1, 20, 30, 40), store=local_store, workflow="day")
    assert not any("/score/" in path or "/score_quarantine/" in path for path in local_store.objects.list("tables"))


@pytest.mark.parametrize(
    ("records", "rule"),
    [
        (pl.DataFrame({"application_id": ["a"], "amount": [1.0]}), "schema: column 'name' missing"),
        (pl.DataFrame({"application_id": ["a"], "name": [SECRET], "amount": ["1"]}), "schema: column 'amount' is String, not Float64"),
    ],
)
def test_wrong_columns_are_of_no_single_record_and_refuse_the_batch(local_store: StateStore, records: pl.DataFrame, rule: str) -> None:
    with pytest.raises(BatchRefusedError, match=rule):
        run(CREDIT, records, store=local_store, workflow="day")
    assert local_store.seals("credit/day") == []


def test_all_records_of_a_doubled_key_are_set_aside(local_store: StateStore) -> None:
    doubled = [*batch(1, 2), {"application_id": "0", "name": SECRET, "amount": 3}]
    result = run(CREDIT, doubled, store=local_store)
    assert result["applications"]["application_id"].to_list() == ["1"]
    assert (result.seals["applications"].row_count, result.seals["applications"].quarantined) == (1, 2)


def test_a_record_that_nobody_asked_for_refuses_the_batch(local_store: StateStore) -> None:
    @mao.agent(quarantine=ANY)
    def inventive(applications: mao.DataFrame[Application]) -> mao.DataFrame[Income]:
        return pl.DataFrame({"application_id": ["0", "ghost"], "income": [1.0, 2.0]})

    with pytest.raises(BatchRefusedError, match="record returned, but never read"):
        run(mao.Pipeline("credit", entry=applications, agents=[inventive]), batch(1), store=local_store)


def test_async_agents_set_aside_what_they_cannot_make_and_finish_the_others(local_store: StateStore) -> None:
    @mao.agent(quarantine=ANY)
    async def score(applications: Application) -> Score:
        return Score.model_validate({"application_id": applications.application_id, "score": int(applications.amount)})

    result = run(mao.Pipeline("credit", entry=applications, agents=[score]), batch(1, 20, 3, 40), store=local_store)
    assert result["score"]["application_id"].to_list() == ["0", "2"]
    assert aside(result, "score") == {"1": ("output", ["score: le 10"]), "3": ("output", ["score: le 10"])}


def test_an_error_that_is_not_about_the_output_is_set_aside_with_what_was_read(local_store: StateStore) -> None:
    @mao.agent(quarantine=ANY)
    def score(applications: Application) -> Score:
        if applications.amount == 2:
            Income.model_validate({})
        return Score(application_id=applications.application_id, score=1)

    result = run(mao.Pipeline("credit", entry=applications, agents=[score]), batch(1, 2), store=local_store)
    assert aside(result, "score") == {"1": ("output", ["execute: ValidationError"])}
    (row,) = local_store.quarantine(result.seals["score"]).to_dicts()
    assert json.loads(row["values"]) == {"application_id": "1", "name": SECRET, "amount": 2}
    assert json.loads(row["masked"]) == {"application_id": "1", "name": "***", "amount": 2}


class Numbered(BaseModel):
    number: Annotated[int, mao.Key, mao.Personal]
    amount: float = Field(gt=0)


def test_keys_that_are_numbers_and_personal(local_store: StateStore) -> None:
    @mao.agent(quarantine=ANY)
    def numbers() -> mao.DataFrame[Numbered]:
        return pl.DataFrame({"number": [4711, 2, 3], "amount": [-1.0, 200, 3]})

    class Little(Numbered):
        amount: float = Field(gt=0, le=100)

    @mao.agent(quarantine=ANY)
    def halves(numbers: mao.LazyFrame[Little]) -> mao.LazyFrame[Numbered]:
        return numbers.with_columns(pl.col("amount") / 2)

    result = run(mao.Pipeline("credit", entry=numbers, agents=[halves]), store=local_store)
    assert aside(result, "numbers") == {"4711": ("output", ["amount: gt 0"])}
    assert result["halves"]["number"].to_list() == [3]
    assert "4711" not in str(result.checks)
    assert "4711" not in local_store.quarantine(result.seals["numbers"])["masked"].item()


def test_without_keys_there_is_no_telling_records_apart() -> None:
    class Loose(BaseModel):
        amount: float

    @mao.agent(quarantine=ANY)
    def loose() -> Loose:
        return Loose(amount=1)

    with pytest.raises(WiringError, match="has no key"):
        mao.Pipeline("credit", entry=loose)

    @mao.agent(quarantine=ANY)
    def summary(applications: mao.DataFrame[Application]) -> mao.DataFrame[Numbered]:
        return pl.DataFrame({"number": [1], "amount": [1.0]})

    with pytest.raises(WiringError, match="not the key of what it reads"):
        mao.Pipeline("credit", entry=applications, agents=[summary])
    with pytest.raises(WiringError, match="a share from 0 to 1"):
        mao.Quarantine(max_share=5)


# -- the numbers add up --------------------------------------------------------------------------------------------------------------

AMOUNTS = st.lists(st.sampled_from([1, 5, 7, 11, 200, -1, 0, "x", None, float("nan"), float("inf")]), max_size=12)


@settings(max_examples=25, deadline=None)
@given(AMOUNTS)
def test_every_record_is_sealed_or_quarantined_at_every_boundary(amounts: list[Any]) -> None:
    result = run(CREDIT, batch(*amounts))
    came_in = {"applications": {str(n) for n in range(len(amounts))}}
    for agent in CREDIT.order:
        sealed = set(result[agent]["application_id"])
        refused = set(result.store.quarantine(result.seals[agent])["record"])
        expected = came_in.get(agent) or set().union(*(came_in[i.upstream] for i in CREDIT.inputs_of(agent)))
        assert sealed | refused == expected
        assert not sealed & refused
        assert result.seals[agent].row_count + result.seals[agent].quarantined == len(expected)
        came_in[agent] = expected
        came_in |= {agent: sealed}


# -- in the store --------------------------------------------------------------------------------------------------------------------


def test_the_quarantine_is_a_delta_table_beside_the_agents(local_store: StateStore) -> None:
    result = run(CREDIT, batch(1, -1, 200), store=local_store, workflow="2026-01-01 é")
    table = pl.read_delta(local_store.objects.url("tables/credit/applications_quarantine"))
    assert table.select("record", "side", "_workflow", "_version").rows() == [("1", "output", "credit/2026-01-01 é", 0)]
    assert table["attempt"].item() == result.seals["applications"].attempt
    assert verify(local_store).good


def test_a_record_refused_twice_is_one_record_and_two_rows_also_for_those_who_count_by_the_delta_log(store: StateStore) -> None:
    @mao.agent(name="score")
    def score(applications: Application) -> Score:
        return Score(application_id=applications.application_id, score=2 if applications.amount > 100 else 1)

    @mao.agent(quarantine=ANY)
    def both(applications: Small, score: Few) -> Score:
        return Score(application_id=score.application_id, score=score.score)

    result = run(mao.Pipeline("credit", entry=applications, agents=[score, both]), batch(1, 200), store=store)
    seal = result.seals["both"]
    assert (seal.quarantined, store.quarantine(seal).height) == (1, 2)
    assert DeltaTable(store.objects.url("tables/credit/both_quarantine"), storage_options=store.objects.storage_options).count() == 2


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_a_changed_quarantine_shows(local_store: StateStore, damage: str) -> None:
    result = run(CREDIT, batch(1, -1), store=local_store)
    assert local_store.objects.local
    file = local_store.objects.local / str(result.seals["applications"].quarantine_path)
    data = file.read_bytes()
    file.unlink()
    if damage == "changed":
        file.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
    with pytest.raises(TamperedError):
        local_store.quarantine(result.seals["applications"])
    (finding,) = verify(local_store).findings
    assert (finding.kind, finding.file) == (
        f"file_{'changed' if damage == 'changed' else 'missing'}",
        result.seals["applications"].quarantine_path,
    )


def decision(version: int, *records: str, verdict: str = "discarded") -> pl.DataFrame:
    row = {"agent": "applications", "version": version, "digest": "", "verdict": verdict, "why": "test", "by": "me", "at": None}
    return pl.DataFrame([{**row, "record": record} for record in records], schema=DISPOSITION_SCHEMA)


@on_every_store
def test_a_decision_on_a_quarantined_record_is_a_version_of_the_workflow(store: StateStore) -> None:
    result = run(CREDIT, batch(1, -1, -2), store=store, workflow="day")
    seal = store.dispose("credit/day", decision(0, "1"))
    assert (seal.version, seal.kind, seal.parents[0].version) == (4, "disposition", 0)
    assert store.dispositions("credit/day").select("version", "record", "verdict").rows() == [(0, "1", "discarded")]
    assert store.effective("credit/day") == result.seals
    assert verify(store).good
    with pytest.raises(UnknownVersionError, match="no record '0' in quarantine"):
        store.dispose("credit/day", decision(0, "0"))
    with pytest.raises(UnknownVersionError, match="no record to decide on"):
        store.dispose("credit/day", decision(0))
    assert len(store.seals("credit/day")) == 5


def test_a_decision_made_while_a_step_runs_is_no_conflict_for_it(local_store: StateStore) -> None:
    run(CREDIT, batch(1, -1), store=local_store, workflow="day")

    @mao.agent(name="applications", quarantine=ANY)
    def deciding() -> list[Application]:
        local_store.dispose("credit/day", decision(0, "1"))
        return [Application(application_id="9", amount=1)]

    result = run(mao.Pipeline("credit", entry=deciding), store=local_store, workflow="day")
    assert result.seals["applications"].version == 5
