"""Quarantine of records that nobody expects: no text, no calendar, other names; shares to the last record; the same bytes every time."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
from typing import Annotated, Any

import pandas
import polars as pl
import pytest
from arro3.core import Table
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

import dagster_mao as mao
from dagster_mao.boundary import run_agent
from dagster_mao.errors import AgentFailedError, BatchRefusedError
from dagster_mao.run import run
from dagster_mao.state import StateStore
from dagster_mao.state.verify import verify

SECRET = "Tricia-McMillan"
ANY = mao.Quarantine(max_share=1)


class Loan(BaseModel):
    loan_id: Annotated[str, mao.Key]
    amount: float = Field(gt=0)


@mao.agent(quarantine=ANY)
def loans() -> list[Loan]:
    return []


def batch(*amounts: Any) -> list[dict[str, Any]]:
    return [{"loan_id": str(n), "amount": amount} for n, amount in enumerate(amounts)]


@pytest.mark.parametrize("bad", [28, 29, 30])
def test_a_share_is_meant_to_the_last_record(local_store: StateStore, bad: int) -> None:
    """0.29 * 100 is a little less than 29."""

    @mao.agent(quarantine=mao.Quarantine(max_share=0.29))
    def loans() -> list[Loan]:
        return []

    pipeline, records = mao.Pipeline("credit", entry=loans), batch(*[-1] * bad, *[1] * (100 - bad))
    if bad > 29:
        with pytest.raises(BatchRefusedError, match="30 of 100 records"):
            run(pipeline, records, store=local_store)
    else:
        assert run(pipeline, records, store=local_store).seals["loans"].quarantined == bad


@pytest.mark.parametrize(("share", "bad", "passes"), [(0, 0, True), (0, 1, False), (1, 4, True)])
def test_the_ends_of_the_share(local_store: StateStore, share: float, bad: int, passes: bool) -> None:
    @mao.agent(quarantine=mao.Quarantine(max_share=share))
    def loans() -> list[Loan]:
        return []

    pipeline, records = mao.Pipeline("credit", entry=loans), batch(*[-1] * bad, *[1] * (4 - bad))
    if passes:
        assert run(pipeline, records, store=local_store).seals["loans"].quarantined == bad
        assert run(pipeline, [], store=local_store).seals["loans"].row_count == 0
    else:
        with pytest.raises(BatchRefusedError):
            run(pipeline, records, store=local_store)


class Untold:
    def __repr__(self) -> str:
        raise RuntimeError("no text")


def endless() -> list[Any]:
    record: list[Any] = []
    record.append(record)
    return record


ODD = [
    {"loan_id": "\ud800", "amount": 1},
    {"loan_id": "text", "amount": "\udfff"},
    {"loan_id": 10**5000, "amount": 1},
    {"loan_id": "long", "amount": -(10**5000)},
    {"loan_id": Untold(), "amount": 1},
    {"loan_id": "endless", "amount": endless()},
    {"loan_id": "bytes", "amount": b"\xff\x00"},
    {"loan_id": "../../etc/'\"\\;\u202e\n\x00", "amount": -1},
    {"loan_id": "", "amount": float("nan")},
    {("a", 1): 2, "loan_id": "tuple", "amount": -1},
    {"amount": 1},
    "no record",
    None,
]


def test_whatever_came_in_is_kept_and_the_good_records_go_on(local_store: StateStore) -> None:
    result = run(mao.Pipeline("credit", entry=loans), [*ODD, {"loan_id": "good", "amount": 1}], store=local_store)
    seal = result.seals["loans"]
    held = local_store.quarantine(seal)
    assert (seal.row_count, seal.quarantined, held.height) == (1, len(ODD), len(ODD))
    assert {"text", "long", "endless", "bytes", "../../etc/'\"\\;\u202e\n\x00", "", "tuple"} <= set(held["record"])
    assert held.filter(pl.col("rules").list.len() == 0).is_empty()
    assert [json.loads(text) for column in ("values", "masked") for text in held[column]]
    assert json.loads(held.filter(record="text")["values"].item()) == {"loan_id": "text", "amount": "\\udfff"}
    long = json.loads(held.filter(record="long")["values"].item())["amount"]
    assert int(long, 16) == -(10**5000)
    assert verify(local_store).good


def test_without_a_quarantine_whatever_came_in_is_refused_and_told_as_json(local_store: StateStore) -> None:
    @mao.agent(name="loans")
    def strict() -> list[Loan]:
        return []

    for record in ODD:
        with pytest.raises(BatchRefusedError) as refused:
            run(mao.Pipeline("credit", entry=strict), [record], store=local_store)
        assert json.dumps([check.metadata for check in refused.value.checks], ensure_ascii=False).encode()


class Numbered(BaseModel):
    number: Annotated[int, mao.Key] = Field(validation_alias=AliasChoices("no", "nr"))
    amount: float = Field(gt=0)


class Named(BaseModel):
    model_config = ConfigDict(str_strip_whitespace=True, str_to_lower=True)

    count: Annotated[str, mao.Key]  # a method of text, too
    amount: float = Field(gt=0)


DOUBLED: list[tuple[type[BaseModel], list[Any], list[str | None]]] = [
    (Numbered, [{"nr": "7 ", "amount": -1}, {"no": 7.0, "amount": -1}, {"number": 7, "amount": 1}, "no record"], ["7", "7", "7", None]),
    (Named, [{"count": " A", "amount": -1}, {"count": "a", "amount": 1}, "no record"], ["a", "a", None]),
]


@pytest.mark.parametrize(("model", "records", "held"), DOUBLED)
def test_a_key_that_comes_twice_is_known_however_it_is_written(
    local_store: StateStore, model: Any, records: list[Any], held: list[str | None]
) -> None:
    @mao.agent(quarantine=ANY)
    def cases() -> list[model]:
        return records

    seal = run(mao.Pipeline("credit", entry=cases), store=local_store).seals["cases"]
    assert seal.row_count == 0
    assert sorted(local_store.quarantine(seal)["record"], key=str) == sorted(held, key=str)


class Telltale:
    def __str__(self) -> str:
        raise ValueError(SECRET)


class Loose(BaseModel):
    loan_id: Annotated[str, mao.Key]
    anything: Annotated[Any, mao.Personal] = None


@pytest.mark.parametrize(
    ("value", "rule"),
    [
        (SECRET.encode() + b"\xff", "anything: holds bytes that are no UTF-8"),
        (Telltale(), "anything: has no text (ValueError)"),
        ({SECRET: Telltale()}, "anything: has no text (ValueError)"),
        (Untold(), "anything: has no text (RuntimeError)"),
    ],
)
def test_what_cannot_be_written_says_why_and_no_value(local_store: StateStore, value: Any, rule: str) -> None:
    @mao.agent(quarantine=ANY)
    def loose() -> list[Loose]:
        return [Loose.model_construct(loan_id="1", anything=value)]

    result = run(mao.Pipeline("credit", entry=loose), store=local_store)
    (row,) = local_store.quarantine(result.seals["loose"]).to_dicts()
    assert (row["rules"], json.loads(row["masked"])) == ([rule], {"loan_id": "1", "anything": "***"})
    assert SECRET not in str(result.checks)


class Dated(BaseModel):
    loan_id: Annotated[str, mao.Key]
    day: dt.date
    days: list[dt.date] = []


def test_dates_that_python_has_not_are_kept_as_text(local_store: StateStore) -> None:
    @mao.agent(quarantine=ANY)
    def dated() -> mao.DataFrame[Dated]:
        days = pl.Series("day", [0, 0, 5_000_000], dtype=pl.Int32).cast(pl.Date)
        lists = pl.Series("days", [[0], [5_000_000], [0]], dtype=pl.List(pl.Int32)).cast(pl.List(pl.Date))
        return pl.DataFrame({"loan_id": ["a", "b", "c"]}).with_columns(days, lists)

    seal = run(mao.Pipeline("credit", entry=dated), store=local_store).seals["dated"]
    held = {row["record"]: json.loads(row["values"]) for row in local_store.quarantine(seal).iter_rows(named=True)}
    assert (seal.row_count, sorted(held)) == (1, ["b", "c"])
    assert (held["b"]["days"], held["c"]["day"]) == (["+15659-07-15"], "+15659-07-15")


class Swapped(BaseModel):
    """One field's alias is the name of the other."""

    loan_id: Annotated[str, mao.Key] = Field(alias="id")
    name: Annotated[str, mao.Personal] = Field(alias="city")
    city: str = Field(alias="name")
    amount: float = Field(gt=0, alias="sum")


def test_raw_input_is_masked_by_the_field_that_a_name_means(local_store: StateStore) -> None:
    @mao.agent(quarantine=ANY)
    def swapped() -> list[Swapped]:
        return []

    raw = {"id": "1", "city": SECRET, "name": "Bath", "sum": -1, "sum.note": SECRET}
    result = run(mao.Pipeline("credit", entry=swapped), [raw], store=local_store)
    (row,) = local_store.quarantine(result.seals["swapped"]).to_dicts()
    assert json.loads(row["values"]) == raw
    # A name that may be either field's is masked; the others are called as their columns are.
    assert json.loads(row["masked"]) == {"loan_id": "1", "city": "***", "name": "***", "amount": -1, "sum.note": "***"}
    assert SECRET not in str(result.checks)


class Person(BaseModel):
    name: Annotated[str, mao.Personal]
    post_code: str

    @model_validator(mode="after")
    def known(self) -> Person:
        if self.post_code == "unknown":
            raise ValueError(self.name)
        return self


class Household(BaseModel):
    name: str = "the household's own, which is not personal"
    head: Person


class Decision(BaseModel):
    loan_id: Annotated[str, mao.Key]
    record: dict[str, Any] = {}
    household: Household | None = None
    phones: Annotated[dict[str, int], mao.Personal] = {}
    limits: dict[str, int] = {}


UNMADE: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"household": {"head": {"name": SECRET, "post_code": "unknown"}}}, {"household": "***"}),
    ({"household": {"head": SECRET}}, {"household": "***"}),
    ({"phones": {SECRET: "x"}}, {"phones": "***"}),
    ({"limits": {"day": "x"}}, {"limits.day": "x"}),
    ({"limits": 5}, {"limits": 5}),
    ({"limits": 10**5000}, {"limits": hex(10**5000)}),
]


@pytest.mark.parametrize(("made", "masked"), UNMADE)
def test_what_an_agent_could_not_make_is_masked_at_any_depth(local_store: StateStore, made: dict[str, Any], masked: dict[str, Any]) -> None:
    @mao.agent(quarantine=ANY)
    def decision(loans: Loan) -> Decision:
        return Decision(loan_id=loans.loan_id, **made)

    result = run(mao.Pipeline("credit", entry=loans, agents=[decision]), batch(1), store=local_store)
    (row,) = local_store.quarantine(result.seals["decision"]).to_dicts()
    assert json.loads(row["masked"]) == masked
    assert SECRET not in row["masked"] + str(result.checks)


def test_running_again_seals_the_same_quarantine_in_whatever_order_the_calls_end(store: StateStore) -> None:
    waits = [0, 1, 2, 3]  # turns of the event loop; backwards the second time

    class Score(BaseModel):
        loan_id: Annotated[str, mao.Key]
        score: int = Field(le=1)

    @mao.agent(quarantine=ANY)
    async def score(loans: Loan) -> Score:
        for _ in range(waits[int(loans.loan_id)]):
            await asyncio.sleep(0)
        return Score(loan_id=loans.loan_id, score=int(loans.amount))

    pipeline, versions = mao.Pipeline("credit", entry=loans, agents=[score]), []
    for run_id in ("root", "again"):
        for name in pipeline.order:
            attempt = store.open_attempt(
                pipeline="credit",
                attempt="root",
                run_id=run_id,
                lineage=["root", run_id],
                plan=pipeline.order,
                entry="loans",
                workflow_key="a",
            )
            outcome = run_agent(store, pipeline.node(name), attempt, records=batch(1, 2, 3, 4) if name == "loans" else None)
            versions.append((name, outcome.seal.version, outcome.reused))
        waits.reverse()
    assert versions == [("loans", 0, False), ("score", 1, False), ("loans", 0, True), ("score", 1, True)]
    assert store.quarantine(outcome.seal)["record"].to_list() == ["1", "2", "3"]
    assert verify(store).good


def test_what_is_set_aside_anew_is_a_new_version_though_the_good_records_are_the_same(local_store: StateStore) -> None:
    """A run that is executed again may meet other bad records: none of them may be lost."""
    pipeline, seals = mao.Pipeline("credit", entry=loans), []
    for run_id, bad in (("root", -1), ("again", -2)):
        attempt = local_store.open_attempt(
            pipeline="credit", attempt="root", run_id=run_id, lineage=["root", run_id], plan=["loans"], entry="loans", workflow_key="a"
        )
        seals.append(run_agent(local_store, pipeline.entry, attempt, records=batch(1, bad)).seal)
    assert [(seal.version, seal.digest == seals[0].digest) for seal in seals] == [(0, True), (1, True)]
    assert [json.loads(local_store.quarantine(seal)["values"].item())["amount"] for seal in seals] == [-1, -2]


EXTERNAL = mao.Pipeline("credit", entry=mao.ExternalEntry("raw/loans", contract=Loan, quarantine=ANY))


def test_an_existing_asset_as_entry_may_have_a_quarantine(local_store: StateStore) -> None:
    seal = run(EXTERNAL, batch(1, -1, 2), store=local_store).seals["loans"]
    assert (seal.row_count, seal.quarantined) == (2, 1)


@pytest.mark.parametrize("library", ["pandas", "arro3"])
def test_a_frame_of_another_library_is_not_taken_for_the_names_of_its_columns(local_store: StateStore, library: str) -> None:
    frame = pandas.DataFrame(batch(1.0, 2.0)) if library == "pandas" else Table.from_arrow(pl.DataFrame(batch(1.0, 2.0)))
    with pytest.raises(AgentFailedError, match="neither records nor a polars frame"):
        run(EXTERNAL, frame, store=local_store)


def test_records_that_are_missing_are_set_aside_in_the_order_of_their_keys(local_store: StateStore) -> None:
    """A streaming join keeps no order, and the same records are to be the same bytes."""

    @mao.agent(quarantine=ANY)
    def forgetful(loans: mao.LazyFrame[Loan]) -> mao.LazyFrame[Loan]:
        return loans.head(1)

    records = [{"loan_id": key, "amount": 1} for key in ("c", "b", "d", "a")]
    result = run(mao.Pipeline("credit", entry=loans, agents=[forgetful]), records, store=local_store)
    assert local_store.quarantine(result.seals["forgetful"])["record"].to_list() == ["a", "b", "d"]


def test_a_record_that_nobody_asked_for_refuses_the_batch_also_beside_one_that_is_missing(local_store: StateStore) -> None:
    """The missing one alone would be set aside, with a warning; a warning that comes later takes no error back."""

    @mao.agent(quarantine=ANY)
    def renaming(loans: mao.LazyFrame[Loan]) -> mao.LazyFrame[Loan]:
        return loans.with_columns(loan_id=pl.col("loan_id") + "-new")

    with pytest.raises(BatchRefusedError, match="never read") as refused:
        run(mao.Pipeline("credit", entry=loans, agents=[renaming]), batch(1, 2), store=local_store, workflow="day")
    assert [check.severity for check in refused.value.checks if not check.passed] == ["error"]
    assert [seal.agent for seal in local_store.seals("credit/day")] == ["loans"]
