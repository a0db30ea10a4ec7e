"""From records to columns and back: exact, or refused by position and field, and never by value."""

import datetime as dt
import decimal
import enum
import math
import uuid
from collections.abc import Iterator
from typing import Annotated, Any

import polars as pl
import pytest
from pydantic import BaseModel, ConfigDict, Field, HttpUrl, NaiveDatetime, field_serializer

from dagster_mao.contract import Contract, Key
from dagster_mao.contract import _contract as contracts
from dagster_mao.errors import InvalidRecordsError


class Grade(enum.Enum):
    A = "a"


class Part(BaseModel):
    n: int
    of: decimal.Decimal = Field(decimal_places=2)


class Case(BaseModel):
    case_id: Annotated[str, Key]
    n: int = 1
    x: float = math.nan
    grade: Grade = Grade.A
    part: Part | None = None
    parts: list[Part] = []
    at: dt.datetime = dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc)
    clock: NaiveDatetime = dt.datetime(2020, 1, 1)  # noqa: DTZ001 - a wall clock's
    on: dt.date = dt.date(2020, 1, 1)
    amount: decimal.Decimal = Field(decimal.Decimal("1.50"), decimal_places=2)
    token: uuid.UUID = uuid.UUID(int=1)
    site: HttpUrl | None = None
    raw: bytes = b"\x00"

    @field_serializer("n")
    def shown(self, n: int) -> str:  # a serializer is for JSON, not for columns
        return "n" * n


CASE = Contract.of(Case)
FULL: dict[str, Any] = {"case_id": "é\n", "part": {"n": 2, "of": "0.10"}, "parts": [{"n": 3, "of": "1.00"}], "site": "https://example.org"}


def test_records_come_back_as_they_were() -> None:
    records = [Case(**FULL), Case(case_id="b"), Case(case_id="c", x=math.inf)]
    frame = CASE.to_frame(records)
    assert frame.schema == CASE.schema
    assert repr(list(CASE.from_frame(frame))) == repr(records).replace("datetime.timezone.utc", "zoneinfo.ZoneInfo(key='UTC')")


def test_mappings_are_validated_on_the_way() -> None:
    assert CASE.to_frame([FULL]).equals(CASE.to_frame([Case(**FULL)]))


def test_no_records_are_an_empty_frame() -> None:
    assert CASE.to_frame([]).equals(pl.DataFrame(schema=CASE.schema))
    assert list(CASE.from_frame(CASE.to_frame([]))) == []


def test_records_are_taken_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contracts, "CHUNK", 2)

    def stream() -> Iterator[Case]:
        for i in range(5):
            yield Case(case_id=str(i))

    assert CASE.to_frame(stream())["case_id"].to_list() == list("01234")
    with pytest.raises(InvalidRecordsError, match="record 3 "):
        CASE.to_frame([Case(case_id=str(i)) for i in range(3)] + [{"case_id": 5}])


def test_an_instant_of_another_zone_is_the_same_instant() -> None:
    east = dt.datetime(2020, 1, 1, 5, tzinfo=dt.timezone(dt.timedelta(hours=5)))
    assert CASE.to_frame([Case(case_id="a", at=east)])["at"].to_list() == [dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc)]


def test_aliases_name_records_and_fields_name_columns() -> None:
    class Aliased(BaseModel):
        model_config = ConfigDict(serialize_by_alias=True)
        number: int = Field(alias="Number", ge=0)

    contract = Contract.of(Aliased)
    assert contract.to_frame([{"Number": 1}, {"number": 2}, Aliased(Number=3)]).to_dict(as_series=False) == {"number": [1, 2, 3]}
    assert contract.check(pl.DataFrame({"number": [1]})).passed
    assert next(contract.from_frame(pl.DataFrame({"number": [1]}))).number == 1


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("n", 2.7, "is float, not int"),
        ("n", True, "is bool, not int"),
        ("n", "7", "is str, not int"),
        ("n", 2**63, "does not fit 64 bits"),
        ("x", "marker", "is str, not float"),
        ("case_id", 1, "is int, not str"),
        ("case_id", "marker\ud800", "does not fit the column type"),
        ("amount", decimal.Decimal("1.005"), "does not fit a decimal"),
        ("amount", decimal.Decimal("NaN"), "does not fit a decimal"),
        ("amount", decimal.Decimal("1e37"), "does not fit a decimal"),
        ("amount", 1.5, "is float, not Decimal"),
        ("at", dt.datetime(2020, 1, 1), "without a time zone"),  # noqa: DTZ001
        ("clock", dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc), "with a time zone"),
        ("on", dt.datetime(2020, 1, 1, 5), "is datetime, not date"),  # noqa: DTZ001
        ("token", "marker", "is str, not UUID"),
        ("part", Part.model_construct(n=2.5, of=decimal.Decimal(1)), "is float, not int"),
        ("parts", [Part(n=1, of=decimal.Decimal(1)), "marker"], "is str, not Part"),
        ("parts", "marker", "is str, not list"),
        ("raw", "marker", "is str, not bytes"),
    ],
)
def test_what_a_column_would_change_in_silence_is_refused(field: str, value: Any, why: str) -> None:
    """Models are not validated again, so a mutated one can hold anything."""
    broken = Case(case_id="b")
    setattr(broken, field, value)
    with pytest.raises(InvalidRecordsError, match=why) as refused:
        CASE.to_frame([Case(case_id="a"), broken])
    assert refused.value.field == field
    assert "record 1 " in str(refused.value)
    assert "marker" not in str(refused.value)


def test_none_where_none_is_not_allowed_is_for_the_check_to_find() -> None:
    broken = Case(case_id="a")
    broken.n = None  # type: ignore[assignment]
    assert [f.rule for f in CASE.check(CASE.to_frame([broken])).failures] == ["n: not null"]


def test_a_refused_mapping_is_named_by_position_and_field_and_not_by_value() -> None:
    with pytest.raises(InvalidRecordsError, match="record 1 is no Case") as refused:
        CASE.to_frame([FULL, {**FULL, "part": {"n": "marker", "of": 1}}])
    assert refused.value.field == "part.n"
    assert "marker" not in str(refused.value)
    assert refused.value.__cause__ is None


@pytest.mark.parametrize("record", [Part(n=1, of=decimal.Decimal(1)), 5, None, ("a",)])
def test_what_is_no_record_is_refused(record: Any) -> None:
    with pytest.raises(InvalidRecordsError, match=f"record 0 is a {type(record).__name__}"):
        CASE.to_frame([record])


def test_rows_that_pydantic_refuses_are_named_by_position_and_field() -> None:
    frame = CASE.to_frame([FULL, {**FULL, "case_id": "b"}]).with_columns(grade=pl.Series(["a", "marker"]))
    with pytest.raises(InvalidRecordsError, match="record 1 is no Case") as refused:
        list(CASE.from_frame(frame))
    assert refused.value.field == "grade"
    assert "marker" not in str(refused.value)


def test_select_keeps_the_contracts_columns_in_order() -> None:
    class Narrow(BaseModel):
        n: int
        case_id: Annotated[str, Key]
        site: str | None

    narrow = Contract.of(Narrow).select(pl.LazyFrame({"case_id": ["a"], "x": [1.0], "site": [None], "n": [1]}))
    assert narrow.collect_schema() == pl.Schema({"n": pl.Int64, "case_id": pl.String, "site": pl.String})
    assert narrow.collect().rows() == [(1, "a", None)]


@pytest.mark.parametrize(
    ("columns", "what"), [({"case_id": ["a"]}, "column 'n' missing"), ({"case_id": ["a"], "n": ["1"]}, "column 'n' is String, not Int64")]
)
def test_select_refuses_what_it_would_have_to_cast(columns: dict[str, Any], what: str) -> None:
    class Narrow(BaseModel):
        n: int
        case_id: str

    with pytest.raises(InvalidRecordsError, match=what) as refused:
        Contract.of(Narrow).select(pl.LazyFrame(columns))
    assert refused.value.field == "n"


class TestPolars:
    """What polars does when it builds a column, and why each value is looked at before. If one of these fails, a guard may go."""

    def test_decimals_are_rounded(self) -> None:
        assert pl.Series([decimal.Decimal("1.005")], dtype=pl.Decimal(38, 2), strict=True).to_list() == [decimal.Decimal("1.00")]

    def test_numbers_inside_a_struct_are_truncated(self) -> None:
        assert pl.Series([{"x": 1}, {"x": 2.5}], dtype=pl.Struct({"x": pl.Int64}), strict=True).to_list() == [{"x": 1}, {"x": 2}]

    def test_a_naive_datetime_becomes_utc(self) -> None:
        naive = dt.datetime(2020, 1, 1)  # noqa: DTZ001
        assert pl.Series([naive], dtype=pl.Datetime("us", "UTC"), strict=True)[0].tzinfo is not None

    def test_true_becomes_one(self) -> None:
        assert pl.Series([2, True], dtype=pl.Int64, strict=True).to_list() == [2, 1]
