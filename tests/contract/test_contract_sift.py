"""Parting a batch: the good records, the broken ones with their reasons, and those that cannot even be rows."""

import datetime as dt
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import pytest
from pydantic import BaseModel, Field, SecretStr, ValidationError, field_validator, model_validator

from dagster_mao.contract import Contract, Key, Personal, Refused
from dagster_mao.contract import _check as checking
from dagster_mao.contract import _contract as contracts


class Claim(BaseModel):
    claim_id: Annotated[str, Key]
    holder: Annotated[str, Personal] = Field(max_length=5)
    amount: float = Field(gt=0.7)
    parts: list[Annotated[int, Field(ge=0)]] = []


class Judged(Claim):
    @field_validator("holder")
    @classmethod
    def no_x(cls, value: str) -> str:
        if "x" in value:
            raise ValueError(f"{value} has an x")
        return value

    @model_validator(mode="after")
    def covered(self) -> "Judged":
        if self.amount < sum(self.parts):
            raise ValueError(f"{self.amount} is less")
        return self


CLAIM, JUDGED = Contract.of(Claim), Contract.of(Judged)
GOOD = {"holder": "Ann", "amount": 9.0, "parts": [1]}


def batch(*changes: dict[str, Any]) -> pl.DataFrame:
    rows = [{"claim_id": f"c{i}", **GOOD, **change} for i, change in enumerate(changes)]
    return pl.DataFrame(rows, schema=CLAIM.schema)


BATCH = batch(
    {}, {"amount": math.nan}, {"claim_id": "d"}, {"holder": "too long", "amount": -1.0}, {"claim_id": "d"}, {}, {"parts": [3, None]}
)


def broken(contract: Contract[Any], frame: pl.DataFrame) -> list[tuple[int, list[str]]]:
    return [(row["_row"], row["_rules"]) for row in contract.sift(frame).broken.select("_row", "_rules").iter_rows(named=True)]


def test_each_record_is_on_one_side_and_the_broken_ones_say_why() -> None:
    sifted = CLAIM.sift(BATCH)
    assert sifted.valid.collect().equals(BATCH[[0, 5]])
    assert sifted.broken.select(CLAIM.schema.names()).equals(BATCH[[1, 2, 3, 4, 6]], null_equal=True)
    assert sifted.broken.columns == [*CLAIM.schema, "_row", "_rules"]
    assert sifted.broken.schema["_rules"] == pl.List(pl.String)
    assert broken(CLAIM, BATCH) == [
        (1, ["amount: gt 0.7"]),
        (2, ["claim_id: unique"]),
        (3, ["amount: gt 0.7", "holder: max_length 5"]),
        (4, ["claim_id: unique"]),
        (6, ["parts[]: not null"]),
    ]


@pytest.mark.parametrize("contract", [CLAIM, JUDGED])
@pytest.mark.parametrize("rows", [BATCH, BATCH[:1], BATCH[:0], BATCH[1:2], BATCH[[2, 4]]])
@pytest.mark.parametrize("lazy", [True, False])
def test_the_verdict_is_the_one_of_check(contract: Contract[Any], rows: pl.DataFrame, lazy: bool) -> None:
    sifted = contract.sift(rows.lazy() if lazy else rows, samples=2)
    assert sifted.verdict == contract.check(rows, samples=2)
    assert sifted.broken.height == sifted.verdict.failed_rows
    assert sifted.valid.collect().height + sifted.broken.height == rows.height
    assert sifted.valid.collect_schema() == contract.schema


def test_what_pydantic_alone_can_say_has_the_same_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "CHUNK", 2)
    rows = batch({}, {"parts": [10]}, {"claim_id": "d", "holder": "x"}, {}, {"claim_id": "d"}, {"holder": None}, {"holder": "Bob"})
    assert broken(JUDGED, rows) == [
        (1, ["record: validator"]),
        (2, ["claim_id: unique", "holder: validator"]),
        (4, ["claim_id: unique"]),
        (5, ["holder: not null"]),
    ]
    assert JUDGED.sift(rows).valid.collect().equals(rows[[0, 3, 6]])


def test_a_year_that_python_does_not_have_is_set_apart_unread() -> None:
    class Event(BaseModel):
        at: dt.datetime
        n: int

        @field_validator("n")
        @classmethod
        def small(cls, n: int) -> int:
            assert n < 9
            return n

    far = pl.Series([2**61, 0, 2**60, 0], dtype=pl.Int64).cast(pl.Datetime("us", "UTC"))
    rows = pl.DataFrame({"at": far, "n": [1, 9, 2, 1]})
    assert broken(Contract.of(Event), rows) == [(0, ["at: year 1 to 9999"]), (1, ["n: validator"]), (2, ["at: year 1 to 9999"])]


def test_a_good_batch_costs_what_its_check_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    collected = []
    collect = pl.LazyFrame.collect
    monkeypatch.setattr(pl.LazyFrame, "collect", lambda self, **how: collected.append(how) or collect(self, **how))
    sifted = CLAIM.sift(BATCH[:1].lazy())
    assert (len(collected), sifted.verdict.passed, sifted.broken.height) == (1, True, 0)


def test_a_batch_larger_than_memory_is_parted_in_a_stream(tmp_path: Path) -> None:
    BATCH.write_parquet(tmp_path / "batch.parquet")
    sifted = CLAIM.sift(pl.scan_parquet(tmp_path / "batch.parquet"))
    sifted.valid.sink_parquet(tmp_path / "valid.parquet")
    assert pl.read_parquet(tmp_path / "valid.parquet").equals(BATCH[[0, 5]])


@pytest.mark.parametrize(
    "spoil", [lambda f: f.drop("amount"), lambda f: f.with_columns(amount=pl.lit("7")), lambda f: f.with_columns(other=1)]
)
def test_where_the_columns_are_wrong_nothing_is_parted(spoil: Callable[[pl.DataFrame], pl.DataFrame]) -> None:
    sifted = CLAIM.sift(spoil(BATCH), exact=True)
    assert sifted.verdict == CLAIM.check(spoil(BATCH), exact=True)
    assert sifted.verdict.failures[0].rule.startswith("schema:")
    assert (sifted.valid.collect().height, sifted.broken.height) == (0, 0)
    assert sifted.broken.schema == CLAIM.sift(BATCH).broken.schema


def test_columns_beyond_the_contract_are_on_neither_side() -> None:
    sifted = CLAIM.sift(BATCH.with_columns(other=1))
    assert sifted.valid.collect_schema() == CLAIM.schema
    assert "other" not in sifted.broken.columns


# --- records ---------------------------------------------------------------------------------------------------------------------------


class Person(BaseModel):
    number: Annotated[int, Key, Field(alias="Number", ge=1)]
    name: Annotated[str, Personal]
    tags: list[str] = []


PERSON = Contract.of(Person)


def test_records_that_cannot_be_rows_are_set_apart_with_all_they_held() -> None:
    mutated = Person(Number=5, name="Eve")
    mutated.name = 7  # type: ignore[assignment]
    records = [Person(Number=1, name="Ann"), {"Number": 2, "name": "Bob"}, {"number": -3, "name": ["Marker"]}, mutated, "no record", {}]
    rows, refused = PERSON.sift_records(records)
    assert rows.equals(PERSON.to_frame(records[:2]))
    assert refused == [
        Refused(2, -3, ("name: string_type", "number: ge 1"), '{"number":-3,"name":["Marker"]}'),
        Refused(3, 5, ("name: is int, not str",), '{"number":5,"name":7,"tags":[]}'),
        Refused(4, None, ("record: str, not Person",), '"no record"'),
        Refused(5, None, ("name: missing", "number: missing"), "{}"),
    ]
    assert "Marker" not in repr(refused)


def test_positions_count_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contracts, "CHUNK", 2)
    rows, refused = PERSON.sift_records({"number": n, "name": "Ann"} for n in [1, 2, 0, 4, 5, 0])
    assert rows["number"].to_list() == [1, 2, 4, 5]
    assert [r.position for r in refused] == [2, 5]


def test_odd_values_are_kept_as_text() -> None:
    secret = {"number": 0, "name": SecretStr("hush"), "tags": {b"\xff", math.nan, 1 + 2j, object}}
    (refused,) = PERSON.sift_records([secret])[1]
    kept = json.loads(refused.values)
    assert kept["name"] == "hush"
    assert {"NaN", "_w==", "1+2j", "<class 'object'>"} <= set(kept["tags"])
    endless: dict[str, Any] = {"number": 1}
    endless["name"] = endless
    assert json.loads(PERSON.sift_records([endless])[1][0].values)
    assert json.loads(PERSON.sift_records([{"number": 1, "name": "\ud800"}])[1][0].values)


def test_a_dict_that_crashes_a_validator_is_a_refused_record() -> None:
    class Crash(BaseModel):
        n: int

        @field_validator("n")
        @classmethod
        def crash(cls, value: int) -> int:
            raise KeyError(f"secret {value}")

    assert Contract.of(Crash).sift_records([{"n": 1}])[1] == [Refused(0, None, ("record: KeyError",), '{"n":1}')]


def test_an_agents_own_error_is_told_in_the_names_of_the_rules() -> None:
    with pytest.raises(ValidationError) as raised:
        Judged(claim_id="a", holder="x", amount=math.nan, parts=[1, -1, None])
    assert JUDGED.rules_broken(raised.value) == ("amount: gt 0.7", "holder: validator", "parts[]: ge 0", "parts[]: not null")
    with pytest.raises(ValidationError) as raised:
        Person(Number=0, name=None)
    assert PERSON.rules_broken(raised.value) == ("name: not null", "number: ge 1")
