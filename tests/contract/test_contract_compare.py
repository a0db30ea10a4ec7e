"""Whether a producer can satisfy a consumer, known before any data is there."""

import datetime as dt
import decimal
import enum
import math
from typing import Annotated, Any, Literal

import polars as pl
import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    Field,
    FutureDate,
    NaiveDatetime,
    PastDate,
    StringConstraints,
    create_model,
    model_validator,
)

from dagster_mao.contract import Contract, Key, compare
from tests.contract.pairs import Spec, accepted, contract_of, frame_of, scalars, specs


class Verdict(enum.Enum):
    YES = "yes"
    NO = "no"


class Inner(BaseModel):
    n: int = Field(ge=0, le=10)
    s: str


class InnerHigh(BaseModel):
    n: int = Field(ge=20)
    s: str


class InnerLess(BaseModel):
    """Reads one field of two."""

    n: int = Field(ge=21)


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
INSTANT = dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc)
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
        (Annotated[limited(int, ge=0), BeforeValidator(abs)], limited(int, ge=0), UNPROVEN),
        (Annotated[limited(int, ge=0), BeforeValidator(abs)], limited(int, lt=0), UNPROVEN),
        (limited(int, lt=0), Annotated[limited(int, gt=0), BeforeValidator(abs)], UNPROVEN),
        (Annotated[str, StringConstraints(max_length=1, strip_whitespace=True)], limited(str, max_length=1), UNPROVEN),
        (Annotated[str, StringConstraints(strip_whitespace=True)], str, FINE),
        (limited(str, pattern="^a"), Annotated[limited(str, pattern="^a"), AfterValidator(lambda v: v)], UNPROVEN),
        (PastDate, PastDate | None, FINE),
        (PastDate, Annotated[PastDate, AfterValidator(lambda v: v)], UNPROVEN),
        (FutureDate, FutureDate | None, UNPROVEN),
        (limited(float, ge=0, le=math.inf), limited(float, allow_inf_nan=False), STRICTER),
        (limited(int, ge=1, le=2), Literal[1, 2], FINE),
        (limited(int, ge=1, le=3, multiple_of=3), limited(int, ge=3), FINE),
        (limited(int, ge=1, le=5), limited(int, multiple_of=6), CONTRADICTION),
        (limited(AwareDatetime, ge=INSTANT), limited(AwareDatetime, ge=INSTANT.replace(tzinfo=None)), UNPROVEN),
        (limited(dt.timedelta, ge=dt.timedelta(1)), limited(dt.timedelta, ge=dt.timedelta(2)), STRICTER),
        (limited(dt.time, ge=dt.time(9)), limited(dt.time, ge=dt.time(8)), FINE),
        (dict[str, limited(int, ge=0)], dict[str, limited(int, ge=1)], STRICTER),
        (set[int], list[int], FINE),
        (list[int], set[int], STRICTER),
        (int | str, int | str | None, UNPROVEN),
        (InnerHigh, InnerLess, STRICTER),
        (list[InnerHigh], list[InnerLess], STRICTER),
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


def test_validators_over_the_record_are_unproven_beside_a_field_that_pydantic_judges_as_well() -> None:
    class Judged(BaseModel):
        a: PastDate

        @model_validator(mode="after")
        def judge(self) -> "Judged":
            return self

    assert [(d.field, d.kind) for d in compare(described(PastDate), Contract.of(Judged).describe())] == [("Judged", "unproven")]


def test_behind_a_validator_that_repairs_the_record_no_bound_is_promised() -> None:
    class Repaired(BaseModel):
        a: int = Field(ge=0)

        @model_validator(mode="before")
        @classmethod
        def repair(cls, given: Any) -> Any:
            return {"a": abs(given["a"])}

    assert Contract.of(Repaired).check(pl.DataFrame({"a": [-1]})).passed
    assert [d.kind for d in compare(Contract.of(Repaired).describe(), described(limited(int, ge=0)))] == ["unproven"]


def test_a_default_does_not_hide_a_field_that_is_missing() -> None:
    consumer = create_model("C", a=(int, ...), c=(int, 1))
    assert [(d.field, d.kind) for d in compare(described(int), Contract(consumer).describe())] == [("c", "contradiction")]


RELAXED = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


@st.composite
def fields(draw: Any, validators: bool = True) -> tuple[Spec, Spec]:
    """A producer's field and a consumer's, of one kind: a scalar, a list of it, or a nested model with it."""
    kind = draw(st.sampled_from(["int", "int", "int", "str", "str", "float", "bool", "date", "decimal"]))
    one, other = draw(scalars(kind, validators)), draw(scalars(kind, validators))
    shape = draw(st.sampled_from(["scalar", "scalar", "list", "struct", "any"]))
    if shape == "any":
        return draw(specs(1, validators, (kind,))), draw(specs(1, validators, (kind,)))
    return _shaped(shape, one), _shaped(shape, other)


def _shaped(shape: str, spec: Spec) -> Spec:
    if shape == "list":
        return Spec("list", list[spec.annotation], item=spec)  # type: ignore[name-defined]
    return Spec("struct", contract_of({"x": spec}, "Inner").model, members={"x": spec}) if shape == "struct" else spec


def passing(values: list[Any], producer: Contract[Any], consumer: Contract[Any]) -> list[Any]:
    """Of the producer's values, those that the consumer takes when it reads them."""
    if any(d.detail.startswith("is ") or d.detail.startswith("missing") for d in compare(producer.describe(), consumer.describe())):
        return []  # no column of the one is a column of the other
    rows = frame_of(producer, [{"f": value} for value in values])
    read = consumer.upgrade(rows.lazy(), producer.describe()).collect()
    return [value for i, value in enumerate(values) if consumer.check(read[i : i + 1]).passed]


@RELAXED
@given(fields())
def test_what_the_consumer_may_refuse_is_told_before(pair: tuple[Spec, Spec]) -> None:
    producer, consumer = (contract_of({"f": spec}) for spec in pair)
    values = accepted(pair[0])
    assume(values)
    told = {d.kind for d in compare(producer.describe(), consumer.describe())}
    event(f"{sorted(told)}")
    if not told:
        assert passing(values, producer, consumer) == values


@RELAXED
@given(fields())
def test_of_a_contradiction_nothing_passes(pair: tuple[Spec, Spec]) -> None:
    """But null and the empty list, which are in both however far apart the values are."""
    producer, consumer = (contract_of({"f": spec}) for spec in pair)
    told = compare(producer.describe(), consumer.describe())
    if any(d.kind == "contradiction" and not d.detail.startswith(("is ", "missing")) for d in told):
        values = [v for v in accepted(pair[0]) if not _empty(v)]
        compatible = Contract(consumer.model)
        rows = frame_of(producer, [{"f": value} for value in values])
        assert not [i for i in range(rows.height) if compatible.check(rows[i : i + 1]).passed]


def _empty(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_empty(v) for v in value.values())
    return value is None or (isinstance(value, list) and (not value or any(v is None for v in value)))


@RELAXED
@given(fields(validators=False))
def test_what_is_called_stricter_refuses_something(pair: tuple[Spec, Spec]) -> None:
    producer, consumer = (contract_of({"f": spec}) for spec in pair)
    values = accepted(pair[0])
    told = [d.kind for d in compare(producer.describe(), consumer.describe())]
    assume(values and "contradiction" not in told)
    if "stricter" in told:
        assert len(passing(values, producer, consumer)) < len(values)
