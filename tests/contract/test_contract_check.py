"""The verdict: rules, counts, samples, masks, columns, keys."""

import datetime as dt
import json
import math
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import pytest
from pydantic import BaseModel, Field, HttpUrl, field_validator, model_validator

from dagster_mao.contract import Contract, Key, Personal, RuleFailure
from dagster_mao.contract import _check as checking


class Contact(BaseModel):
    phone: Annotated[str, Personal]
    country: str = Field(min_length=2, max_length=2)


class Score(BaseModel):
    application_id: Annotated[str, Key]
    name: Annotated[str, Personal] = Field(max_length=5)
    score: int = Field(ge=300, le=850)
    confidence: float = Field(gt=0.7)
    contact: Contact | None = None
    sources: list[Annotated[str, Field(min_length=1)]] = []


SCORE = Contract.of(Score)
GOOD = {"application_id": "a", "name": "Ann", "score": 500, "confidence": 0.9, "contact": {"phone": "1", "country": "de"}, "sources": ["x"]}


def frame(*changes: dict[str, Any], contract: Contract[Any] = SCORE, good: dict[str, Any] = GOOD) -> pl.DataFrame:
    """One good row per change, each with a key of its own, changed."""
    rows = [{**good, "application_id": f"app-{i}", **change} for i, change in enumerate(changes)]
    return pl.DataFrame({n: pl.Series(n, [r[n] for r in rows], dtype=d) for n, d in contract.schema.items()})


def failures(contract: Contract[Any], batch: pl.DataFrame) -> dict[str, int]:
    return {f.rule: f.count for f in contract.check(batch).failures}


def test_a_good_batch_passes() -> None:
    verdict = SCORE.check(frame({}, {}, {}))
    assert verdict.passed
    assert (verdict.contract, verdict.rows, verdict.failed_rows, verdict.failures) == ("Score", 3, 0, ())


def test_an_empty_batch_passes_if_its_columns_are_right() -> None:
    assert SCORE.check(frame()).passed
    assert not SCORE.check(frame().drop("score")).passed


def test_every_broken_rule_is_named_counted_and_shown() -> None:
    verdict = SCORE.check(frame({}, {"score": 299}, {"score": 851, "confidence": math.nan}, {"score": None}, {"sources": ["", "a"]}))
    assert verdict.failed_rows == 4
    assert verdict.failures == (
        RuleFailure("score: not null", "score", 1, ({"application_id": "app-3", "score": None},)),
        RuleFailure("score: ge 300", "score", 1, ({"application_id": "app-1", "score": 299},)),
        RuleFailure("score: le 850", "score", 1, ({"application_id": "app-2", "score": 851},)),
        RuleFailure("confidence: gt 0.7", "confidence", 1, ({"application_id": "app-2", "confidence": "NaN"},)),
        RuleFailure("sources[]: min_length 1", "sources", 1, ({"application_id": "app-4", "sources": ["", "a"]},)),
    )


def test_samples_are_bounded() -> None:
    verdict = SCORE.check(frame(*[{"score": 1}] * 9), samples=2)
    assert verdict.failures[0].count == 9
    assert len(verdict.failures[0].samples) == 2


def test_personal_values_are_masked_wherever_they_are() -> None:
    verdict = SCORE.check(frame({"name": "Marker!", "contact": {"phone": "Marker!", "country": "d"}}))
    assert [f.samples[0] for f in verdict.failures] == [
        {"application_id": "app-0", "name": "***"},
        {"application_id": "app-0", "contact": {"phone": "***", "country": "d"}},
    ]
    assert "Marker" not in repr(verdict)


def test_a_personal_key_is_masked_too() -> None:
    class M(BaseModel):
        ssn: Annotated[str, Key, Personal]
        n: int = Field(ge=0)

    verdict = Contract.of(M).check(pl.DataFrame({"ssn": ["Marker", "Marker"], "n": [-1, 1]}))
    assert [f.samples for f in verdict.failures] == [({"ssn": "***", "n": -1},), ({"ssn": "***"},)]


def test_doubled_keys_are_all_suspect() -> None:
    verdict = SCORE.check(frame({"application_id": "x"}, {"application_id": "x", "score": 1}, {}))
    assert verdict.failed_rows == 2
    assert verdict.failures[-1] == RuleFailure("application_id: unique", "application_id", 2, ({"application_id": "x"},))


def test_a_null_key_is_null_not_doubled() -> None:
    assert failures(SCORE, frame({"application_id": None}, {"application_id": None})) == {"application_id: not null": 2}


def test_keys_whose_hashes_collide_are_not_doubled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes only prove that keys differ. With a hash that always collides, the keys themselves decide."""
    monkeypatch.setattr(pl.Expr, "hash", lambda self, *_: self.is_null())
    assert SCORE.check(frame({}, {}, {})).passed
    assert failures(SCORE, frame({"application_id": "x"}, {"application_id": "x"}, {})) == {"application_id: unique": 2}


def test_missing_and_mistyped_columns_are_named_and_the_rest_is_judged_all_the_same() -> None:
    batch = frame({"confidence": 0.1}, {}).drop("name").with_columns(pl.col("score").cast(pl.String))
    verdict = SCORE.check(batch)
    assert failures(SCORE, batch) == {
        "schema: column 'name' missing": 2,
        "schema: column 'score' is String, not Int64": 2,
        "confidence: gt 0.7": 1,
    }
    assert verdict.failed_rows == 2


@pytest.mark.parametrize("dtype", [pl.Int32, pl.UInt64, pl.Float64, pl.Int128])
def test_a_type_that_would_need_a_cast_is_another_type(dtype: Any) -> None:
    assert f"schema: column 'score' is {dtype()}, not Int64" in failures(SCORE, frame({}).with_columns(pl.col("score").cast(dtype)))


def test_an_all_null_column_is_any_type_where_null_is_allowed() -> None:
    assert SCORE.check(frame({}).with_columns(contact=None)).passed
    assert failures(SCORE, frame({}).with_columns(score=None)) == {"schema: column 'score' is Null, not Int64": 1, "score: not null": 1}


def test_unknown_columns_matter_only_where_the_frame_must_be_exact() -> None:
    batch = frame({}).with_columns(other=1)
    assert SCORE.check(batch).passed
    assert [f.rule for f in SCORE.check(batch, exact=True).failures] == ["schema: unexpected column 'other'"]


def test_a_passing_batch_is_one_streaming_query(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    frame({}, {}).write_parquet(tmp_path / "batch.parquet")
    collected = []
    collect = pl.LazyFrame.collect
    monkeypatch.setattr(pl.LazyFrame, "collect", lambda self, **how: collected.append(how) or collect(self, **how))
    assert SCORE.check(pl.scan_parquet(tmp_path / "batch.parquet")).passed
    assert collected == [{"engine": "streaming"}]


def test_a_year_that_python_does_not_have_breaks_a_rule_and_nothing_else() -> None:
    class Event(BaseModel):
        at: dt.datetime
        on: list[dt.date]

    far = pl.Series([2**61], dtype=pl.Int64).cast(pl.Datetime("us", "UTC"))
    days = pl.Series([[3_000_000]], dtype=pl.List(pl.Int32)).cast(pl.List(pl.Date))
    verdict = Contract.of(Event).check(pl.DataFrame({"at": far, "on": days}))
    assert [f.rule for f in verdict.failures] == ["at: year 1 to 9999", "on[]: year 1 to 9999"]
    assert json.dumps([f.samples for f in verdict.failures])


class Judged(BaseModel):
    application_id: Annotated[str, Key]
    low: int = Field(ge=0)
    high: int
    site: HttpUrl | None = None

    @field_validator("low")
    @classmethod
    def even(cls, value: int) -> int:
        if value % 2:
            raise ValueError(f"{value} is odd")
        return value


class Ordered(Judged):
    @model_validator(mode="after")
    def ordered(self) -> "Ordered":
        if self.low > self.high:
            raise ValueError(f"{self.low} > {self.high}")
        return self


JUDGED = {"application_id": "", "low": 0, "high": 9, "site": None}


def test_validators_judge_the_columns_they_need() -> None:
    contract = Contract.of(Judged)
    assert [j.columns for j in contract.judges] == [("low",), ("site",)]
    batch = frame({}, {"low": 3}, {"low": -2}, {"low": None}, {"site": "no url"}, {"high": None, "low": 1}, contract=contract, good=JUDGED)
    assert failures(contract, batch) == {
        "high: not null": 1,
        "low: validator": 2,
        "low: ge 0": 1,
        "low: not null": 1,
        "site: url_parsing": 1,
    }
    assert contract.check(batch).failed_rows == 5
    assert contract.check(batch[:1]).passed


def test_a_validator_over_the_record_sees_the_record() -> None:
    contract = Contract.of(Ordered)
    batch = frame({}, {"low": 10, "high": 3}, {"low": 3}, contract=contract, good=JUDGED)
    assert failures(contract, batch) == {"record: validator": 1, "low: validator": 1}
    assert contract.check(batch).failures[0].samples == ({"application_id": "app-1"},)


def test_a_validator_that_looks_at_other_fields_gets_them() -> None:
    class Later(BaseModel):
        first: int
        second: int

        @field_validator("second")
        @classmethod
        def later(cls, value: int, info: Any) -> int:
            if value < info.data["first"]:
                raise ValueError("earlier")
            return value

    assert failures(Contract.of(Later), pl.DataFrame({"first": [1, 5], "second": [2, 2]})) == {"second: validator": 1}


def test_a_before_validator_may_mend_what_the_type_would_refuse() -> None:
    class Mended(BaseModel):
        n: int = Field(ge=0)

        @field_validator("n", mode="before")
        @classmethod
        def positive(cls, value: int) -> int:
            return abs(value)

    assert Contract.of(Mended).check(pl.DataFrame({"n": [-5]})).passed


def test_a_validator_that_crashes_refuses_its_record_without_telling_the_value() -> None:
    class Crash(BaseModel):
        n: int

        @field_validator("n")
        @classmethod
        def crash(cls, value: int) -> int:
            raise KeyError(f"secret {value}")

    verdict = Contract.of(Crash).check(pl.DataFrame({"n": [5]}), samples=0)
    assert [f.rule for f in verdict.failures] == ["n: KeyError"]
    assert "secret" not in repr(verdict)


def test_judging_counts_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "CHUNK", 3)
    contract = Contract.of(Judged)
    verdict = contract.check(frame(*[{"low": i} for i in range(10)], contract=contract, good=JUDGED), samples=2)
    assert (verdict.failed_rows, verdict.failures[0].count) == (5, 5)
    assert [s["low"] for s in verdict.failures[0].samples] == [1, 3]


def test_a_trailing_newline_is_seen() -> None:
    class Code(BaseModel):
        code: str = Field(pattern="^a$")

    assert failures(Contract.of(Code), pl.DataFrame({"code": ["a", "a\n"]})) == {"code: pattern ^a$": 1}
