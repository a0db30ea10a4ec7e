"""What is read back equals what was sealed, type for type: through columns, and through a snapshot in a store."""

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import fractions
import ipaddress
import math
import pathlib
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import (
    AnyUrl,
    Base64Bytes,
    Base64Str,
    BaseModel,
    ByteSize,
    ConfigDict,
    Field,
    Json,
    NaiveDatetime,
    PlainValidator,
    PostgresDsn,
    RootModel,
    Secret,
    SecretBytes,
    SecretStr,
    computed_field,
    create_model,
)

import dagster_mao as mao
from dagster_mao.contract import Contract
from dagster_mao.contract._values import same
from dagster_mao.errors import BatchRefusedError, InvalidRecordsError
from dagster_mao.run import run
from dagster_mao.state import StateStore


class Pair(NamedTuple):
    a: int
    b: str


class Mixed(enum.Enum):
    ONE = 1
    A = "a"


class Text(str, enum.Enum):
    A = "a"


@dataclasses.dataclass
class Point:
    x: int
    wait: dt.timedelta


class Ids(RootModel[list[int]]):
    pass


class MaybeId(RootModel[int | None]):
    pass


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    wait: dt.timedelta


class Tree(BaseModel):
    n: int
    kids: list["Tree"] = []


class Open(BaseModel):
    model_config = ConfigDict(extra="allow")
    a: int


class Part(BaseModel):
    data: bytes


class Plain(BaseModel):
    number: float
    data: bytes
    amount: decimal.Decimal
    at: dt.datetime
    day: dt.date
    text: str
    nested: list[Part]


HOUR = dt.timedelta(hours=1)
String, Int64 = pl.String, pl.Int64


def entries(key: Any, value: Any) -> pl.DataType:
    return pl.List(pl.Struct({"key": key, "value": value}))


KINDS: list[tuple[Any, Any, list[Any]]] = [
    (dt.time, String, [dt.time(1), dt.time(1, 2, 3, 4), dt.time(1, tzinfo=dt.timezone(2 * HOUR))]),
    (dt.timedelta, Int64, [HOUR, dt.timedelta(-1, 3, 4), dt.timedelta.resolution]),
    (ipaddress.IPv6Address, String, [ipaddress.ip_address("::1")]),
    (ipaddress.IPv4Network, String, [ipaddress.ip_network("1.2.3.0/24")]),
    (pathlib.Path, String, [pathlib.Path("/a b/é")]),
    (AnyUrl, String, [AnyUrl("x://a")]),
    (PostgresDsn, String, [PostgresDsn("postgres://u:p@h/db")]),
    (re.Pattern[str], String, [re.compile("^a$")]),
    (complex, String, [1 + 2j]),
    (fractions.Fraction, String, [fractions.Fraction(1, 3)]),
    (ByteSize, Int64, [ByteSize(1024)]),
    (SecretStr, String, [SecretStr("hush\n")]),
    (SecretBytes, pl.Binary, [SecretBytes(b"\xff")]),
    (Secret[int], Int64, [Secret[int](5)]),
    (Annotated[SecretStr, Field(min_length=3)], String, [SecretStr("hush")]),
    (set[int], pl.List(Int64), [{3, 1, 2**62}, set()]),
    (frozenset[str | None], pl.List(String), [frozenset({"b", None, "a"})]),
    (set[tuple[int, str]], String, [{(2, "b"), (1, "a")}]),
    (dict[str, int], entries(String, Int64), [{"b": 1, "a": 2}, {}]),
    (dict[uuid.UUID, Cat], entries(String, pl.Struct({"kind": String, "lives": Int64})), [{uuid.UUID(int=1): Cat(lives=9)}]),
    (dict[str, set[int]], entries(String, pl.List(Int64)), [{"a": {2, 1}}]),
    (dict[str, Any], String, [{"a": [1, {"b": 2.5, "c": None}]}]),
    (Mapping[int, float], entries(Int64, pl.Float64), [{1: math.inf}]),
    (collections.Counter[str], entries(String, Int64), [collections.Counter("aab")]),
    (collections.OrderedDict[str, int], entries(String, Int64), [collections.OrderedDict(b=1, a=2)]),
    (collections.defaultdict[str, int], entries(String, Int64), [collections.defaultdict(int, a=1)]),
    (collections.deque[int], pl.List(Int64), [collections.deque([2, 1])]),
    (Sequence[int], pl.List(Int64), [[2, 1]]),
    (tuple[float, float], pl.List(pl.Float64), [(1.0, 2.0)]),
    (tuple[int, str], String, [(1, "a")]),
    (Pair, String, [Pair(1, "a")]),
    (Any, String, [1, "1", None, [1, {"a": 2.5}], True, 10**30]),
    (int | str, String, [1, "1"]),
    (int | float | None, String, [1, 1.0, None, math.nan]),
    (Annotated[Cat | Dog, Field(discriminator="kind")], String, [Cat(lives=9), Dog(wait=HOUR)]),
    (Literal[1, "a"], String, [1, "a"]),
    (Mixed, String, [Mixed.ONE, Mixed.A]),
    (Text, String, [Text.A]),
    (Ids, pl.List(Int64), [Ids([1, 2])]),
    (MaybeId, Int64, [MaybeId(None), MaybeId(1)]),
    (Point, pl.Struct({"x": Int64, "wait": Int64}), [Point(1, HOUR)]),
    (Tree, pl.Struct({"n": Int64, "kids": String}), [Tree(n=1, kids=[Tree(n=2, kids=[Tree(n=3)])])]),
    (Open, pl.Struct({"a": Int64, "model_extra": String}), [Open(a=1), Open(a=1, b=[1], c={"x": "y"})]),
    (Annotated[int, PlainValidator(lambda v: v)], Int64, [1]),
    (Annotated[int, mao.Personal] | None, Int64, [None, 2**63 - 1]),
    (dt.datetime, pl.Datetime("us", "UTC"), [dt.datetime(9999, 12, 31, 23, 59, 59, 999999, dt.timezone.utc)]),
    (NaiveDatetime, pl.Datetime("us"), [dt.datetime.min]),  # noqa: DTZ901
    (decimal.Decimal, pl.Decimal(38, 18), [decimal.Decimal("-12345678901234567890.000000000000000001")]),
    (list[list[float]], pl.List(pl.List(pl.Float64)), [[[5e-324, -0.0], []]]),
]
IDS = [str(annotation).replace("typing.", "")[:60] for annotation, _, _ in KINDS]


def model_of(annotation: Any) -> type[BaseModel]:
    return create_model("M", a=(annotation, ...))


@pytest.mark.parametrize(("annotation", "dtype", "values"), KINDS, ids=IDS)
def test_every_type_has_a_column_and_comes_back_as_it_was(annotation: Any, dtype: Any, values: list[Any]) -> None:
    contract = Contract(model_of(annotation))
    assert contract.schema == pl.Schema({"a": dtype})
    records = [contract.model(a=value) for value in values]
    frame = contract.to_frame(records)
    assert contract.check(frame).passed
    assert same(list(contract.from_frame(frame)), records)


@pytest.mark.parametrize(("annotation", "dtype", "values"), KINDS, ids=IDS)
def test_a_record_comes_back_from_its_json_as_it_was(annotation: Any, dtype: Any, values: list[Any]) -> None:
    """pydantic's own JSON loses secrets, bytes and infinities, and the difference between a date and its text."""
    contract = Contract(model_of(annotation))
    for value in values:
        record = contract.model(a=value)
        assert same(contract.load(contract.dump(record)), record)


@given(st.floats(), st.binary(), st.decimals(-(10**19), 10**19, places=18), st.datetimes(timezones=st.just(dt.timezone.utc)), st.text())
def test_numbers_bytes_times_and_texts_come_back_from_json(
    number: float, data: bytes, amount: decimal.Decimal, at: dt.datetime, text: str
) -> None:
    contract = Contract.of(Plain)
    record = Plain(number=number, data=data, amount=amount, at=at, day=at.date(), text=text, nested=[{"data": data}])
    assert same(contract.load(contract.dump(record)), record)


@pytest.mark.parametrize("damaged", [b"", b"{", b"[]", b"null", b'{"a":"marker"}', b"{}", b'{"a":1,"b":{"marker":1}}', b"\xff"])
def test_json_that_is_no_record_is_refused_without_its_values(damaged: bytes) -> None:
    class Two(BaseModel):
        a: int
        b: dict[str, int]

    with pytest.raises(InvalidRecordsError) as refused:
        Contract.of(Two).load(damaged)
    assert "marker" not in str(refused.value)


@pytest.mark.parametrize("lives", ["nine", 2**63, "\ud800"])
def test_what_cannot_be_a_row_has_no_json(lives: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        Contract.of(Cat).dump(Cat.model_construct(kind="cat", lives=lives))


@pytest.mark.parametrize(
    ("annotation", "text", "value"),
    [(Json[list[int]], "[1]", [1]), (Base64Str, "YWJj", "abc"), (Base64Bytes, b"YWJj", b"abc")],
)
def test_what_is_parsed_is_kept_as_it_was_written(annotation: Any, text: Any, value: Any) -> None:
    contract = Contract(model_of(annotation))
    record = contract.model(a=text)
    assert record.a == value  # type: ignore[attr-defined]
    assert list(contract.from_frame(contract.to_frame([record]))) == [record]


@pytest.mark.parametrize(
    ("annotation", "value", "why"),
    [
        (dt.date | str, dt.date(2020, 1, 1), "is date and would be read back as str"),
        (uuid.UUID | str, uuid.UUID(int=1), "is UUID and would be read back as str"),
        (Any, (1, 2), "is tuple and would be read back as list"),
        (Any, decimal.Decimal(1), "is Decimal and would be read back as str"),
        (Any, len, "which JSON text cannot"),
        (Sequence[int], (1, 2), "is tuple and would be read back as list"),
        (MaybeId | None, MaybeId(None), "would be read back as None"),
        (dt.timedelta, dt.timedelta.max, "does not fit 64 bits"),
        (dt.datetime, dt.datetime(9999, 12, 31, 23, tzinfo=dt.timezone(-2 * HOUR)), "year 0 or 10000"),
        (set[int], {2**63}, "does not fit 64 bits"),
        (dict[str, float], {"a": "marker"}, "is str, not float"),
        (float, 2**53 + 1, "no float equals"),
    ],
)
def test_what_would_come_back_as_something_else_is_refused(annotation: Any, value: Any, why: str) -> None:
    contract = Contract(model_of(annotation))
    record = contract.model.model_construct(a=value)
    with pytest.raises(InvalidRecordsError, match=why) as refused:
        contract.to_frame([record])
    assert "marker" not in str(refused.value)
    assert contract.sift_records([record])[1][0].rules[0].startswith("a: ")


def test_secrets_are_personal_wherever_they_are() -> None:
    class Safe(BaseModel):
        pin: Secret[int]
        words: list[SecretStr]
        either: Tree | Annotated[str, mao.Personal]
        code: SecretStr = Field(min_length=9)

    contract = Contract.of(Safe)
    assert contract.personal == {"pin", "words", "either", "code"}
    (failure,) = contract.check(pl.DataFrame({"pin": [1], "words": [["Marker"]], "either": ['"Marker"'], "code": ["Marker"]})).failures
    assert (failure.rule, failure.samples) == ("code: min_length 9", ({"code": "***"},))
    assert "Marker" not in repr(failure)


def test_extra_fields_are_kept_in_a_column_of_their_own_or_refused() -> None:
    class Closed(BaseModel):
        model_config = ConfigDict(extra="forbid")
        a: int

    contract = Contract.of(Open)
    assert contract.schema == pl.Schema({"a": pl.Int64, "model_extra": pl.String})
    assert contract.personal == {"model_extra"}  # nobody has declared what is in it
    records = [Open(a=1, b="é"), Open(a=2)]
    frame = contract.to_frame(records)
    assert frame["model_extra"].to_list() == ['{"b":"é"}', None]
    assert list(contract.from_frame(frame)) == records
    for odd in ('{"a":2}', "[1]", "{"):
        assert contract.check(pl.DataFrame({"a": [1], "model_extra": [odd]})).failed_rows == 1
    assert [f.rule for f in Contract.of(Closed).check(pl.DataFrame({"a": [1], "b": [2]})).failures] == ["schema: unexpected column 'b'"]


def test_a_computed_field_is_no_column_and_is_computed_again() -> None:
    class Sum(BaseModel):
        a: int

        @computed_field  # type: ignore[prop-decorator]
        @property
        def double(self) -> int:
            return self.a * 2

    contract = Contract.of(Sum)
    assert contract.schema.names() == ["a"]
    assert next(contract.from_frame(contract.to_frame([{"a": 2}]))).double == 4


# --- through a snapshot ------------------------------------------------------------------------------------------------------------------

Everything = create_model(
    "Everything",
    record_id=(Annotated[int, mao.Key], ...),
    **{f"f{i}": (annotation | None, None) for i, (annotation, _, _) in enumerate(KINDS)},
)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(*(st.none() | st.sampled_from(values) for _, _, values in KINDS)), min_size=1, max_size=4))
def test_what_is_read_from_a_sealed_snapshot_is_what_was_sealed(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    @mao.agent
    def source() -> list[Everything]:  # type: ignore[valid-type]
        return []

    maybe = next(i for i, (annotation, _, _) in enumerate(KINDS) if annotation is MaybeId)
    records = [
        Everything(record_id=n, **{f"f{i}": v for i, v in enumerate(row) if not (i == maybe and v == MaybeId(None))})
        for n, row in enumerate(rows)
    ]
    store = StateStore(tmp_path_factory.mktemp("state"))
    result = run(mao.Pipeline("all", entry=source, agents=[]), records, store=store)
    sealed = store.read(result.seals["source"]).collect()
    contract = Contract.of(Everything)
    assert sealed.schema == contract.schema
    assert sealed.equals(contract.to_frame(records))
    assert same(list(contract.from_frame(sealed)), records)


@pytest.mark.parametrize(
    ("annotation", "series"),
    [
        (int, pl.Series([2.7])),
        (int, pl.Series(["7"])),
        (int, pl.Series([7], dtype=pl.UInt64)),
        (int, pl.Series([7], dtype=pl.Int32)),
        (float, pl.Series([7], dtype=pl.Int64)),
        (float, pl.Series([0.5], dtype=pl.Float32)),
        (dt.datetime, pl.Series([0], dtype=pl.Int64).cast(pl.Datetime("ns", "UTC"))),
        (dt.datetime, pl.Series([0], dtype=pl.Int64).cast(pl.Datetime("us"))),
        (dt.datetime, pl.Series([0], dtype=pl.Int64).cast(pl.Datetime("us", "Europe/Berlin"))),
        (dt.timedelta, pl.Series([HOUR])),
        (dt.time, pl.Series([dt.time(1)])),
        (Text, pl.Series(["a"], dtype=pl.Enum(["a"]))),
        (str, pl.Series(["a"], dtype=pl.Categorical)),
        (list[int], pl.Series([[1, 2]], dtype=pl.Array(pl.Int64, 2))),
        (decimal.Decimal, pl.Series([decimal.Decimal("1.5")], dtype=pl.Decimal(10, 2))),
        (dict[str, int], pl.Series([{"a": 1}])),
    ],
)
def test_a_column_of_another_type_is_refused_and_never_cast(annotation: Any, series: pl.Series, tmp_path: pathlib.Path) -> None:
    model = model_of(annotation)

    @mao.agent
    def source() -> mao.DataFrame[model]:  # type: ignore[valid-type]
        return series.alias("a").to_frame()

    with pytest.raises(BatchRefusedError, match="schema: column 'a' is "):
        run(mao.Pipeline("all", entry=source, agents=[]), store=StateStore(tmp_path / "state"))
