"""Whether a producer can satisfy a consumer, known before any data is there."""

import datetime as dt
import decimal
import enum
from typing import Annotated, Any, Literal

import pytest
from pydantic import AfterValidator, BaseModel, Field, NaiveDatetime, create_model, model_validator

from dagster_mao.contract import Contract, Key, compare


class Verdict(enum.Enum):
    YES = "yes"
    NO = "no"


class Inner(BaseModel):
    n: int = Field(ge=0, le=10)
    s: str


class InnerHigh(BaseModel):
    n: int = Field(ge=20)
    s: str


class InnerText(BaseModel):
    n: str
    s: str


def described(annotation: Any) -> dict[str, Any]:
    return Contract(create_model("M", a=(annotation, ...))).describe()


def kinds(producer: Any, consumer: Any) -> list[str]:
    return [d.kind for d in compare(described(producer), described(consumer))]


def limited(kind: Any, **limits: Any) -> Any:
    return Annotated[kind, Field(**limits)]


DAY = dt.date(2020, 1, 1)
FINE: list[str] = []
CONTRADICTION, STRICTER, UNPROVEN = ["contradiction"], ["stricter"], ["unproven"]


@pytest.mark.parametrize(
    ("producer", "consumer", "expected"),
    [
        (int, int, FINE),
        (int, float, CONTRADICTION),
        (int, str, CONTRADICTION),
        (dt.datetime, NaiveDatetime, CONTRADICTION),
        (limited(decimal.Decimal, decimal_places=2), limited(decimal.Decimal, decimal_places=3), CONTRADICTION),
        (int, int | None, FINE),
        (int | None, int, STRICTER),
        (limited(float, ge=0, le=1), limited(float, gt=0.7), STRICTER),
        (limited(float, le=0), limited(float, gt=1), CONTRADICTION),
        (limited(float, le=1), limited(float, gt=1), CONTRADICTION),
        (limited(float, le=1), limited(float, ge=1), STRICTER),
        (limited(float, ge=0, le=1), limited(float, ge=0, le=1), FINE),
        (limited(float, gt=0, lt=1), limited(float, ge=0, le=1), FINE),
        (limited(float, ge=0, le=1), limited(float, gt=0, lt=1), STRICTER),
        (float, limited(float, allow_inf_nan=False), STRICTER),
        (limited(float, ge=0, le=1), limited(float, allow_inf_nan=False), FINE),
        (limited(float, ge=0), limited(float, allow_inf_nan=False), STRICTER),
        (limited(int, gt=0), limited(int, ge=1), FINE),
        (limited(int, lt=3), limited(int, gt=2), CONTRADICTION),
        (limited(int, multiple_of=6), limited(int, multiple_of=3), FINE),
        (limited(int, multiple_of=3), limited(int, multiple_of=6), STRICTER),
        (limited(str, max_length=3), limited(str, max_length=5), FINE),
        (limited(str, max_length=5), limited(str, max_length=3), STRICTER),
        (limited(str, max_length=3), limited(str, min_length=4), CONTRADICTION),
        (str, limited(str, pattern="^a"), UNPROVEN),
        (limited(str, pattern="^a"), limited(str, pattern="^a"), FINE),
        (str, Literal["a", "b"], STRICTER),
        (Literal["a"], Literal["a", "b"], FINE),
        (Literal["a", "c"], Literal["a", "b"], STRICTER),
        (Literal["c"], Literal["a", "b"], CONTRADICTION),
        (Verdict, Literal["yes", "no"], FINE),
        (Literal["yes"], Verdict, FINE),
        (Literal["a"], str, FINE),
        (Literal["abcd"], limited(str, max_length=3), CONTRADICTION),
        (limited(str, min_length=3), Literal["a"], CONTRADICTION),
        (limited(int, ge=5), Literal[1, 2], CONTRADICTION),
        (Literal[1, 9], limited(int, ge=5), STRICTER),
        (limited(dt.date, le=DAY), limited(dt.date, gt=DAY), CONTRADICTION),
        (limited(decimal.Decimal, ge=decimal.Decimal("1.5")), limited(decimal.Decimal, le=1), CONTRADICTION),
        (Inner, InnerHigh, CONTRADICTION),
        (list[Inner], list[InnerText], CONTRADICTION),
        (list[limited(int, ge=0)], list[limited(int, ge=1)], STRICTER),
        (list[int], limited(list[int], min_length=1), STRICTER),
        (int, Annotated[int, AfterValidator(lambda v: v)], UNPROVEN),
        (Annotated[int, AfterValidator(lambda v: v)], int, FINE),
    ],
)
def test_the_cases(producer: Any, consumer: Any, expected: list[str]) -> None:
    assert kinds(producer, consumer) == expected


def test_a_missing_field_is_named_with_what_there_is() -> None:
    producer, consumer = create_model("P", a=(int, ...), b=(int, ...)), create_model("C", a=(int, ...), c=(int, ...))
    (difference,) = compare(Contract(producer).describe(), Contract(consumer).describe())
    assert (difference.field, difference.kind, difference.detail) == ("c", "contradiction", "missing: the producer has a, b")


def test_the_innermost_field_is_named() -> None:
    assert [d.field for d in compare(described(list[Inner]), described(list[InnerText]))] == ["a[].n"]
    assert [d.field for d in compare(described(Inner), described(InnerHigh))] == ["a.n"]


def test_a_consumer_may_read_less() -> None:
    wide, narrow = create_model("P", a=(int, ...), b=(int, ...)), create_model("C", b=(int, ...))
    assert compare(Contract(wide).describe(), Contract(narrow).describe()) == []


def test_a_key_of_the_consumers_own_must_be_unique() -> None:
    consumer = create_model("C", a=(Annotated[int, Key], ...))
    (difference,) = compare(described(int), Contract(consumer).describe())
    assert (difference.field, difference.kind) == ("a", "stricter")


def test_validators_over_the_record_are_unproven_unless_it_is_the_same_contract() -> None:
    class Judged(BaseModel):
        a: int

        @model_validator(mode="after")
        def judge(self) -> "Judged":
            return self

    judged = Contract.of(Judged).describe()
    assert [d.kind for d in compare(described(int), judged)] == ["unproven"]
    assert compare(judged, judged) == []
