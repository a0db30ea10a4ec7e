"""Laws 1, 3, 9, 10, 13 and 14 where they meet: one agent's step, from its pins to its seal."""

from __future__ import annotations

import asyncio
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import pytest
from pydantic import BaseModel, Field

import dagster_mao as mao
from dagster_mao.boundary import check_names, run_agent
from dagster_mao.errors import AgentCallError, AgentFailedError, BatchRefusedError, IncompatibleContractError, TamperedError
from dagster_mao.run import run
from dagster_mao.state import StateStore
from tests.stores import on_every_store

SECRET = "Zaphod-Beeblebrox"  # stands in every personal field, and must stand nowhere else


class Application(BaseModel):
    application_id: Annotated[str, mao.Key]
    name: Annotated[str, mao.Personal] = SECRET
    amount: float = Field(gt=0)


class Score(BaseModel):
    application_id: Annotated[str, mao.Key]
    score: float = Field(ge=0, le=1)


class GoodScore(BaseModel):
    application_id: Annotated[str, mao.Key]
    score: float = Field(gt=0.7)


class Decision(BaseModel):
    application_id: Annotated[str, mao.Key]
    approved: bool


class Policy(BaseModel):
    limit: float


class Personal(BaseModel):
    ssn: Annotated[str, mao.Key, mao.Personal]
    amount: float = Field(gt=0)


@mao.agent
def applications() -> list[Application]:
    return [Application(application_id=str(n), amount=n + 1) for n in range(3)]


@mao.agent
def score(applications: mao.LazyFrame[Application]) -> mao.LazyFrame[Score]:
    return applications.select("application_id", score=pl.col("amount") / 10)


@mao.agent
async def fraud(applications: Application) -> Score:
    await asyncio.sleep(0)
    return Score(application_id=applications.application_id, score=0.5)


@mao.agent
def decision(score: Score, fraud: Score) -> Decision:
    return Decision(application_id=score.application_id, approved=score.score > 0.15)


CREDIT = mao.Pipeline("credit", entry=applications, agents=[score, fraud, decision])


def files(store: StateStore) -> set[str]:
    return {path for folder in ("tables", "state_log") for path in store.objects.list(folder)}


def only(*agents: mao.Agent, entry: Any = applications) -> mao.Pipeline:
    return mao.Pipeline("credit", entry=entry, agents=list(agents))


def refused(store: StateStore, pipeline: mao.Pipeline, records: Any = None) -> dict[str, Any]:
    """Runs, expects a refusal that wrote nothing of the refused agent, and returns the failed check's reasons by rule."""
    with pytest.raises(BatchRefusedError) as caught:
        run(pipeline, records, store=store, workflow="day")
    failed = [check for check in caught.value.checks if not check.passed]
    assert failed
    assert caught.value.agent not in {seal.agent for seal in store.seals("credit/day")}
    assert not any(f"/{caught.value.agent}/" in path for path in files(store))
    assert not list((store.objects.local / ".staging").glob("*"))
    assert SECRET not in str(caught.value) + repr(failed)
    return {reason["rule"]: reason for check in failed for reason in check.metadata["reasons"]}


@on_every_store
def test_a_pipeline_runs_in_plain_python_and_seals_entry_and_outputs(store: StateStore) -> None:
    result = run(CREDIT, store=store, workflow="day")
    assert result["decision"]["approved"].to_list() == [False, True, True]
    assert [(s.version, s.kind, s.agent) for s in store.seals("credit/day")] == [
        (0, "entry", "applications"),
        (1, "output", "score"),
        (2, "output", "fraud"),
        (3, "output", "decision"),
    ]
    assert [p.version for p in result.seals["decision"].parents] == [1, 2]
    assert result.records("decision")[1] == Decision(application_id="1", approved=True)
    assert (
        [check.name for check in result.checks["decision"]]
        == check_names(decision)
        == [
            "pinned_base",
            "input_score",
            "input_fraud",
            "output",
        ]
    )


@pytest.mark.parametrize("count", [0, 1, 25_000])
def test_batches_of_any_size(local_store: StateStore, count: int) -> None:
    """25 000 is more than the records that a record-wise agent holds as models at a time."""
    records = pl.DataFrame(
        {"application_id": [str(n) for n in range(count)], "name": [SECRET] * count, "amount": [1.0] * count},
        schema={"application_id": pl.String, "name": pl.String, "amount": pl.Float64},
    )
    result = run(CREDIT, records, store=local_store)
    assert result["decision"]["application_id"].to_list() == records["application_id"].to_list()


def test_it_runs_inside_a_running_event_loop() -> None:
    async def notebook() -> int:
        return len(run(CREDIT)["decision"])

    assert asyncio.run(notebook()) == 3


@pytest.mark.parametrize(
    ("records", "rule"),
    [
        (pl.DataFrame({"application_id": ["a"], "amount": [1.0]}), "schema: column 'name' missing"),
        (pl.DataFrame({"application_id": ["a"], "name": [SECRET], "amount": ["1"]}), "schema: column 'amount' is String, not Float64"),
        (pl.DataFrame({"application_id": ["a"], "name": [SECRET], "amount": [1.0], "x": [1]}), "schema: unexpected column 'x'"),
        (pl.DataFrame({"application_id": ["a"], "name": [SECRET], "amount": [float("nan")]}), "amount: gt 0"),
        (
            pl.DataFrame({"application_id": ["a"], "name": [SECRET], "amount": [None]}, schema_overrides={"amount": pl.Float64}),
            "amount: not null",
        ),
        (pl.DataFrame({"application_id": ["a", "a"], "name": [SECRET] * 2, "amount": [1.0, 2.0]}), "application_id: unique"),
    ],
)
def test_a_bad_entry_is_refused_before_anything_is_written(local_store: StateStore, records: pl.DataFrame, rule: str) -> None:
    assert rule in refused(local_store, CREDIT, records)
    assert local_store.seals("credit/day") == []


def test_records_that_pydantic_refuses_are_all_counted_with_their_reasons(local_store: StateStore) -> None:
    records = [{"application_id": str(n), "name": SECRET, "amount": amount} for n, amount in enumerate([1, -1, 2, -2, "x"])]
    reasons = refused(local_store, CREDIT, [*records, {"application_id": "6", "name": [SECRET], "amount": 1}])
    assert {rule: reason["count"] for rule, reason in reasons.items()} == {
        "amount: gt 0": 2,
        "amount: float_parsing": 1,
        "name: string_type": 1,
    }
    assert reasons["amount: gt 0"]["samples"][0] == {"application_id": "1", "amount": -1}


def test_a_bad_output_is_refused_and_the_versions_before_it_stay(local_store: StateStore) -> None:
    reasons = refused(local_store, CREDIT, [Application(application_id="a", amount=11)])
    assert reasons["score: le 1"]["count"] == 1
    assert reasons["score: le 1"]["samples"] == [{"application_id": "a", "score": 1.1}]
    assert [s.agent for s in local_store.seals("credit/day")] == ["applications"]
    assert local_store.effective("credit/day") == {}


def test_a_consumer_that_asks_for_more_than_the_producer_promises_is_enforced_at_the_boundary(local_store: StateStore) -> None:
    called = []

    @mao.agent
    def picky(score: mao.DataFrame[GoodScore]) -> mao.DataFrame[Decision]:
        called.append(True)
        return score.select("application_id", approved=True)

    reasons = refused(local_store, only(score, picky), [Application(application_id="a", amount=5)])
    assert reasons["score: gt 0.7"]["count"] == 1
    assert not called


def test_the_producers_own_contract_is_not_checked_twice(local_store: StateStore) -> None:
    checks = {check.name: check for check in run(CREDIT, store=local_store).checks["decision"]}
    assert checks["input_score"].metadata["proven"]


# -- records, one by one -------------------------------------------------------------------------------------------------------------


@mao.agent(name="fraud")
def forgetful(applications: mao.DataFrame[Application]) -> mao.DataFrame[Score]:
    return applications.select("application_id", score=pl.lit(0.5)).head(2)


def test_a_dropped_record_is_refused_where_it_is_dropped(local_store: StateStore) -> None:
    reasons = refused(local_store, only(score, forgetful, decision))
    assert reasons["record read, but not returned"]["samples"] == [{"application_id": "2"}]


def test_an_invented_record_is_refused(local_store: StateStore) -> None:
    @mao.agent(name="fraud")
    def inventive(applications: Application) -> Score:
        return Score(application_id=applications.application_id + "x", score=0.5)

    assert refused(local_store, only(inventive))["record returned, but never read"]["count"] == 3


class Partial(BaseModel):
    partial_id: Annotated[str, mao.Key]
    score: float


@mao.agent
def partial(applications: mao.DataFrame[Application]) -> mao.DataFrame[Partial]:
    return applications.select(partial_id="application_id", score=pl.lit(0.5)).head(2)


def test_a_record_missing_on_one_side_fails_the_boundary_where_both_are_needed(local_store: StateStore) -> None:
    @mao.agent
    def both(score: Score, partial: Partial) -> Decision:
        return Decision(application_id=score.application_id, approved=True)

    reasons = refused(local_store, only(score, partial, both))
    assert reasons["record in score, missing here"]["samples"] == [{"partial_id": "2"}]


def test_a_record_missing_on_an_optional_side_arrives_as_none(local_store: StateStore) -> None:
    @mao.agent
    def either(score: Score, partial: Partial | None) -> Decision:
        return Decision(application_id=score.application_id, approved=partial is not None)

    assert run(only(score, partial, either), store=local_store)["either"]["approved"].to_list() == [True, True, False]


def test_an_upstream_without_a_key_is_one_record_for_all() -> None:
    @mao.agent
    def policy(applications: mao.DataFrame[Application]) -> mao.DataFrame[Policy]:
        return applications.select(limit=pl.col("amount").max())

    @mao.agent
    def decide(score: Score, policy: Policy) -> Decision:
        return Decision(application_id=score.application_id, approved=policy.limit == 3)

    assert run(only(score, policy, decide))["decide"]["approved"].all()


def test_without_a_key_there_is_exactly_one_record(local_store: StateStore) -> None:
    @mao.agent
    def policy(applications: mao.DataFrame[Application]) -> mao.DataFrame[Policy]:
        return applications.select(limit="amount")

    assert "exactly one record, as the contract has no key" in refused(local_store, only(policy))


def test_the_order_of_the_answers_does_not_matter() -> None:
    @mao.agent(concurrency=3)
    async def slow_first(applications: Application) -> Score:
        for _ in range(10 - int(applications.amount)):
            await asyncio.sleep(0)
        return Score(application_id=applications.application_id, score=applications.amount / 10)

    result = run(only(slow_first), [Application(application_id=str(n), amount=n + 1) for n in range(9)])
    assert result["slow_first"]["score"].to_list() == [(n + 1) / 10 for n in range(9)]


# -- what goes wrong inside ----------------------------------------------------------------------------------------------------------


def test_an_exception_names_the_record_and_not_its_values() -> None:
    @mao.agent
    def failing(applications: Application) -> Score:
        raise ValueError(applications.name)

    with pytest.raises(AgentFailedError, match="ValueError on record '0'") as caught:
        run(only(failing))
    told = "".join(traceback.format_exception(caught.value))
    assert SECRET not in told
    assert "raise ValueError(applications.name)" in told  # where it happened is still said


def test_an_exception_of_an_agent_without_personal_data_keeps_its_text() -> None:
    @mao.agent
    def failing(score: Score) -> Decision:
        raise ValueError("the bureau is closed")

    with pytest.raises(AgentFailedError, match="ValueError on record '0'") as caught:
        run(only(score, failing))
    assert str(caught.value.__cause__) == "the bureau is closed"


def test_a_frame_that_polars_cannot_evaluate_does_not_show_its_values() -> None:
    @mao.agent
    def failing(applications: mao.LazyFrame[Application]) -> mao.LazyFrame[Score]:
        return applications.select("application_id", score=pl.col("name").cast(pl.Float64))

    with pytest.raises(AgentFailedError, match="InvalidOperationError") as caught:
        run(only(failing))
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_personal_key_is_not_named() -> None:
    @mao.agent
    def people() -> list[Personal]:
        return [Personal(ssn=SECRET, amount=1)]

    @mao.agent
    async def failing(people: Personal) -> Personal:
        raise ValueError(people.ssn)

    with pytest.raises(AgentFailedError) as caught:
        run(mao.Pipeline("people", entry=people, agents=[failing]))
    assert SECRET not in str(caught.value)
    with pytest.raises(BatchRefusedError) as caught_batch:
        run(mao.Pipeline("people", entry=people, agents=[]), [Personal(ssn=SECRET, amount=1)] * 2)
    assert SECRET not in str(caught_batch.value) + repr(caught_batch.value.checks)


@pytest.mark.parametrize("wrong", [None, 7, {"application_id": "0"}, Decision(application_id="0", approved=True)])
def test_the_wrong_kind_of_answer_is_the_agents_failure(wrong: Any) -> None:
    @mao.agent
    def failing(applications: Application) -> Score:
        return wrong

    with pytest.raises(AgentFailedError, match="not Score"):
        run(only(failing))


def test_an_expression_that_fails_when_it_is_evaluated_is_the_agents_failure(local_store: StateStore) -> None:
    @mao.agent
    def failing(applications: mao.LazyFrame[Application]) -> mao.LazyFrame[Score]:
        return applications.select("application_id", score=pl.col("name").cast(pl.Float64))

    with pytest.raises(AgentFailedError, match="InvalidOperationError") as caught:
        run(only(failing), store=local_store)
    assert SECRET not in str(caught.value)


def test_a_file_that_the_agents_own_frame_misses_is_the_agents_failure(tmp_path: Path) -> None:
    @mao.agent
    def failing(applications: mao.LazyFrame[Application]) -> mao.LazyFrame[Score]:
        scores = pl.scan_ndjson(tmp_path / "scores.jsonl", schema={"application_id": pl.String, "score": pl.Float64})
        return applications.select("application_id").join(scores, on="application_id")

    with pytest.raises(AgentFailedError, match="FileNotFoundError"):
        run(only(failing))


def test_a_generator_that_fails_halfway_is_the_agents_failure() -> None:
    @mao.agent(name="applications")
    def halfway() -> Iterator[Application]:
        yield Application(application_id="0", amount=1)
        raise OSError("gone")

    with pytest.raises(AgentFailedError, match="OSError"):
        run(only(score, entry=halfway))


def test_agents_never_call_agents() -> None:
    helpers = {"score": score}

    @mao.agent
    def reaching(applications: mao.LazyFrame[Application]) -> mao.LazyFrame[Score]:
        return helpers["score"](applications)

    with pytest.raises(AgentCallError):
        run(only(reaching))


def test_models_that_escaped_validation_are_caught_at_the_boundary(local_store: StateStore) -> None:
    @mao.agent
    def sloppy(applications: Application) -> Score:
        return Score.model_construct(application_id=applications.application_id, score=float("nan"))

    assert refused(local_store, only(sloppy))["score: ge 0"]["count"] == 3


# -- what an agent may read ----------------------------------------------------------------------------------------------------------


def test_a_tampered_upstream_is_never_computed_on(local_store: StateStore) -> None:
    result = run(CREDIT, store=local_store, workflow="day")
    file = local_store.objects.local / result.seals["score"].path
    data = bytearray(file.read_bytes())
    data[20] ^= 1
    file.write_bytes(data)
    attempt = local_store.open_attempt(
        pipeline="credit", attempt="again", run_id="again", plan=["decision"], entry="applications", workflow_key="day"
    )
    with pytest.raises(TamperedError) as caught:
        run_agent(local_store, decision, attempt)
    assert [check.name for check in caught.value.checks if not check.passed] == ["pinned_base"]


def test_a_snapshot_sealed_under_another_contract_is_refused_when_it_is_pinned(local_store: StateStore) -> None:
    """Across code locations nobody compared the two contracts at load."""
    run(CREDIT, store=local_store, workflow="day")

    class Score(BaseModel):
        application_id: Annotated[str, mao.Key]
        score: str

    @mao.agent
    def elsewhere(score: mao.LazyFrame[Score]) -> mao.LazyFrame[Decision]:
        return score.select("application_id", approved=True)

    attempt = local_store.open_attempt(
        pipeline="credit", attempt="other", run_id="other", plan=["elsewhere"], entry="applications", workflow_key="day"
    )
    with pytest.raises(IncompatibleContractError, match="score") as caught:
        run_agent(local_store, elsewhere, attempt)
    assert [check.name for check in caught.value.checks if not check.passed] == ["input_score"]


def test_time_and_randomness_come_from_the_context_and_are_in_the_seal(local_store: StateStore) -> None:
    @mao.agent
    def dated(ctx: mao.AgentContext, applications: Application) -> Score:
        assert ctx.workflow_id == "credit/day"
        return Score(application_id=applications.application_id, score=ctx.random(applications.application_id).random())

    sealed = run(only(dated), store=local_store, workflow="day").seals["dated"]
    attempt = local_store.open_attempt(
        pipeline="credit", attempt=sealed.attempt, run_id=sealed.run_id, plan=sealed.plan, entry="applications", workflow_key="day"
    )
    again = run_agent(local_store, dated, attempt)
    assert again.reused
    assert (again.seal, attempt.now, attempt.seed("dated")) == (sealed, sealed.now, sealed.seed)


def test_resources_come_by_name(tmp_path: Path) -> None:
    @mao.agent
    def logged(applications: Application, *, journal: list[str]) -> Score:
        journal.append(applications.application_id)
        return Score(application_id=applications.application_id, score=0.1)

    journal: list[str] = []
    run(only(logged), resources={"journal": journal})
    assert journal == ["0", "1", "2"]
