"""The verdict of a contract is pydantic's verdict, row by row, on models and frames that nobody thought of."""

import dataclasses
import datetime as dt
import decimal
import enum
import ipaddress
import itertools
import json
import math
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import polars as pl
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import (
    AfterValidator,
    AnyUrl,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    FutureDatetime,
    NaiveDatetime,
    PastDate,
    PlainValidator,
    RootModel,
    SecretStr,
    StringConstraints,
    ValidationError,
    WrapValidator,
    create_model,
    model_validator,
)

from dagster_mao.contract import Contract
from dagster_mao.errors import ContractDefinitionError


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue\n"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 9


class Mixed(enum.Enum):
    ONE = 1
    A = "a"


class Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")
    n: int
    name: str = Field("x", alias="Name", max_length=2)


class Tree(BaseModel):
    n: Annotated[int, Field(ge=0)]
    kids: list["Tree"] = []


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = Field(le=9)


class Dog(BaseModel):
    kind: Literal["dog"]
    name: str


@dataclasses.dataclass
class Point:
    x: Annotated[int, Field(ge=0)]
    y: float


class Points(RootModel[list[Annotated[int, Field(ge=0)]]]):
    pass


def no_sevens(value: Any) -> Any:
    if "7" in str(value):
        raise ValueError("seven")
    return value


def wrapped(value: Any, handler: Callable[[Any], Any]) -> Any:
    return 0 if value == -1 else handler(value)


def plain(value: Any) -> int:
    if not isinstance(value, int):
        raise ValueError("no int")
    return value


AWKWARD_TEXT = [
    "",
    "a",
    "a\n",
    "\na",
    "aa",
    " a ",
    "é",
    "e\u0301",
    "É",
    "ß",
    "İ",
    "\u2028",
    "\x00",
    "😀",
    "👨‍👩‍👧",
    "\U0001d538",
    "1",
    "\u0661",
    "x",
    "a\r\n",
    "\ufeffa",
    "A",
    "red",
    "blue",
    "blue\n",
]
PATTERNS = ["^a+$", "a", r"^\d+$", "^$", "(?i)é", r"\bx\b", r"^[a-z]{1,3}\n?$", "(?m)^a$", "^.$", r"\Aa\z", r"^\w+$", r"[^a]", r"\s"]
AWKWARD_FLOATS = [
    math.nan,
    math.inf,
    -math.inf,
    0.0,
    -0.0,
    0.7,
    0.7000000000000001,
    0.1 + 0.2,
    5e-324,
    2.2250738585072014e-308,
    1.7976931348623157e308,
    1e20,
    -1.0,
    1.0,
    3.0,
]
AWKWARD_INTS = [0, 1, -1, 2**63 - 1, -(2**63), 2**53 + 1, 6, 7, 10]
EDGES = [dt.datetime.min, dt.datetime.max, dt.datetime(2020, 1, 1), dt.datetime(1970, 1, 1), dt.datetime(1969, 12, 31, 23, 59, 59, 999999)]  # noqa: DTZ001, DTZ901

texts = st.sampled_from(AWKWARD_TEXT) | st.text(max_size=4)
floats = st.sampled_from(AWKWARD_FLOATS) | st.floats(width=64) | st.floats(-2, 2)
ints = st.sampled_from(AWKWARD_INTS) | st.integers(-(2**63), 2**63 - 1) | st.integers(-12, 12)
days = st.dates() | st.sampled_from([dt.date(2020, 1, 1), dt.date.min, dt.date.max])
clocks = st.datetimes() | st.sampled_from(EDGES)
instants = clocks.map(lambda d: d.replace(tzinfo=dt.timezone.utc))
spans = st.timedeltas(dt.timedelta(-3), dt.timedelta(3)) | st.just(dt.timedelta(1))
uuids = st.uuids().flatmap(
    lambda u: st.sampled_from(
        [str(u), u.hex, str(u).upper(), f"{{{u}}}", u.urn, u.urn.upper(), f"{u}\n", f" {u}", str(u)[:-1], f"{{{u.hex}}}", "-" + u.hex]
    )
)
documents = st.recursive(
    st.none() | st.booleans() | ints | floats | texts, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3)
)


class NoValue(Exception):
    """A column's value that stands for no value of Python's, so that there is nothing for pydantic to accept."""


@dataclasses.dataclass(frozen=True)
class Kind:
    """An annotation; values of its column, good ones and bad ones; and what each of them stands for, for pydantic to judge.

    How a value is read is told here a second time, in the plainest way, and not asked of the contract.
    """

    annotation: Any
    values: st.SearchStrategy[Any] = dataclasses.field(repr=False)
    read: Callable[[Any], Any] = dataclasses.field(default=lambda value: value, repr=False)


def from_json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise NoValue from None


def tree_read(value: dict[str, Any]) -> dict[str, Any]:
    """A model in itself is JSON text."""
    return {"n": value["n"], "kids": None if value["kids"] is None else from_json(value["kids"])}


def as_json(values: st.SearchStrategy[Any]) -> st.SearchStrategy[str]:
    return values.map(json.dumps) | values.map(json.dumps) | documents.map(json.dumps) | st.sampled_from(["", "{", "nul", "[1,]", "NaN"])


@st.composite
def bounded(draw: Any, values: st.SearchStrategy[Any]) -> dict[str, Any]:
    low, high = sorted([draw(values), draw(values)])
    limits: dict[str, Any] = {}
    if draw(st.booleans()):
        limits[draw(st.sampled_from(["gt", "ge"]))] = low
    if draw(st.booleans()) and low < high:
        limits[draw(st.sampled_from(["lt", "le"]))] = high
    return limits


@st.composite
def lengths(draw: Any) -> dict[str, Any]:
    limits = {"min_length": draw(st.integers(0, 2)), "max_length": draw(st.integers(2, 4))}
    return {k: v for k, v in limits.items() if draw(st.booleans())}


NUMBERS = ["int", "float", "bool", "decimal"]
TIMES = ["date", "naive", "aware", "timedelta", "time"]
WORDS = ["str", "bytes", "uuid", "literal", "enum", "text"]
SCALARS = [*NUMBERS, *TIMES, *WORDS, "validated"]
SHAPES = ["json", "model", "dataclass", "root", "list", "set", "dict"]


@st.composite
def scalars(draw: Any, kind: str | None = None) -> Kind:
    kind = kind or draw(st.sampled_from(SCALARS))
    if kind == "int":
        limits = draw(bounded(st.integers(-10, 10) | st.sampled_from([2**63 - 1, -(2**63), 2**70, -(2**70)]))) | draw(
            st.sampled_from([{}, {}, {"multiple_of": 3}])
        )
        return Kind(Annotated[int, Field(**limits)], ints)
    if kind == "float":
        limits = draw(bounded(st.sampled_from([-1.0, 0, 0.3, 0.7, 1, 2.5, 5e-324, 1e300])))
        limits |= draw(st.sampled_from([{}, {}, {"allow_inf_nan": False}, {"multiple_of": 0.1}, {"multiple_of": 2}]))
        return Kind(Annotated[float, Field(**limits)], floats)
    if kind == "str":
        limits = draw(lengths()) | draw(st.sampled_from([{}] * len(PATTERNS) + [{"pattern": p} for p in PATTERNS]))
        words = draw(st.sampled_from([{}, {}, {"strip_whitespace": True}, {"to_upper": True}]))
        return Kind(Annotated[str, StringConstraints(**limits, **words)], texts)
    if kind == "bool":
        return Kind(bool, st.booleans())
    if kind == "bytes":
        return Kind(Annotated[bytes, Field(**draw(lengths()))], st.binary(max_size=5) | st.just("é".encode()))
    if kind == "date":
        return Kind(draw(st.sampled_from([PastDate, Annotated[dt.date, Field(**draw(bounded(days)))]])), days)
    if kind == "naive":
        return Kind(Annotated[NaiveDatetime, Field(**draw(bounded(clocks)))], clocks)
    if kind == "aware":
        plain_or_not = draw(st.sampled_from([AwareDatetime, dt.datetime]))
        future = Annotated[FutureDatetime, AwareDatetime]
        return Kind(draw(st.sampled_from([future, Annotated[plain_or_not, Field(**draw(bounded(instants)))]])), instants)
    if kind == "timedelta":
        limits = draw(bounded(spans | st.sampled_from([dt.timedelta.min, dt.timedelta.max])))
        microseconds = ints | spans.map(lambda v: v // dt.timedelta(microseconds=1))
        return Kind(Annotated[dt.timedelta, Field(**limits)], microseconds, lambda v: dt.timedelta(microseconds=v))
    if kind == "time":
        limits = draw(st.sampled_from([{}, {"ge": dt.time(12)}]))
        odd = st.sampled_from(["", "25:00", "12:00:00+02:00", "10", "12:00:00.0000001", "10:00Z\n"])
        return Kind(Annotated[dt.time, Field(**limits)], st.times().map(str) | odd)
    if kind == "decimal":
        limits = draw(bounded(st.decimals(-20, 20, places=2))) | draw(
            st.sampled_from(
                [
                    {"decimal_places": 2},
                    {"max_digits": 3, "decimal_places": 2},
                    {},
                    {"max_digits": 3},
                    {"decimal_places": 0, "max_digits": 1},
                ]
            )
        )
        places = min(limits.get("decimal_places", 3), 3)
        return Kind(Annotated[decimal.Decimal, Field(**limits)], st.decimals(-30, 30, places=places))
    if kind == "uuid":
        return Kind(uuid.UUID, uuids)
    if kind == "literal":
        words = st.sampled_from(["a", "a\n", "", "b"])
        return draw(st.sampled_from([Kind(Literal["a", "a\n", ""], words), Kind(Literal[1, 7], ints), Kind(Literal["x", None], texts)]))
    if kind == "enum":
        return draw(st.sampled_from([Kind(Colour, texts), Kind(Level, ints)]))
    if kind == "text":
        addresses = st.ip_addresses(v=4).map(str) | st.sampled_from(["1.2.3.4\n", "", "1.2.3", "::1"])
        urls = st.sampled_from(["https://a.b", "https://a.b\n", "no url", "", "http://é.de", "x:y"])
        paths = texts | st.just("/a/../b")
        secret = Kind(Annotated[SecretStr, Field(min_length=2)], texts)
        return draw(st.sampled_from([Kind(ipaddress.IPv4Address, addresses), Kind(AnyUrl, urls), Kind(Path, paths), secret]))
    validated = [
        Kind(Annotated[int, AfterValidator(no_sevens)], ints),
        Kind(Annotated[str, BeforeValidator(no_sevens)], texts),
        Kind(Annotated[int, WrapValidator(wrapped), Field(ge=0)], ints),
        Kind(Annotated[int, PlainValidator(plain)], ints),
    ]
    return draw(st.sampled_from(validated))


@st.composite
def texts_of_json(draw: Any) -> Kind:
    """What no column type fits."""
    leaf = st.fixed_dictionaries({"n": ints})
    trees = st.recursive(leaf, lambda kids: st.fixed_dictionaries({"n": ints, "kids": st.lists(kids, max_size=2)}), max_leaves=3)
    pets = st.fixed_dictionaries({"kind": st.sampled_from(["cat", "dog"])}, optional={"lives": ints, "name": texts})
    return draw(
        st.sampled_from(
            [
                Kind(int | str, as_json(ints | texts), from_json),
                Kind(int | float | None, as_json(ints | floats), from_json),
                Kind(Any, as_json(documents), from_json),
                Kind(tuple[int, str], as_json(st.tuples(ints, texts)), from_json),
                Kind(list[int | str], as_json(st.lists(ints | texts, max_size=3)), from_json),
                Kind(dict[str, Any], as_json(st.dictionaries(texts, documents, max_size=2)), from_json),
                Kind(Annotated[Cat | Dog, Field(discriminator="kind")], as_json(pets), from_json),
                Kind(Tree, st.fixed_dictionaries({"n": ints, "kids": as_json(st.lists(trees, max_size=2))}), tree_read),
                Kind(Mixed, as_json(st.sampled_from([1, "a", 2])), from_json),
                Kind(set[tuple[int, ...]], as_json(st.lists(st.lists(ints, max_size=2), max_size=2)), from_json),
            ]
        )
    )


@st.composite
def kinds(draw: Any, shape: str | None = None) -> Kind:
    """Of a shape, or of a scalar, or of any. What contains JSON text is JSON text itself, and has cases of its own above."""
    shape = shape or draw(st.sampled_from([*SCALARS, *SHAPES]))
    if shape in SCALARS:
        kind = draw(scalars(shape))
    elif shape == "json":
        kind = draw(texts_of_json())
    elif shape == "model":
        kind = draw(models())
    elif shape == "dataclass":
        kind = Kind(Point, st.fixed_dictionaries({"x": ints, "y": floats}))
    elif shape == "root":
        kind = Kind(Points, st.lists(ints, max_size=3))
    elif shape == "list":
        item = draw(scalars() | models())
        kind = Kind(
            Annotated[list[item.annotation], Field(**draw(lengths()))],
            st.lists(st.none() | item.values | item.values, max_size=5),
            lambda values: [read(item, v) for v in values],
        )
    elif shape == "set":
        item = draw(scalars().filter(lambda k: k.read is Kind.read and "decimal" not in str(k.annotation)))
        member = draw(st.sampled_from([item.annotation, Optional[item.annotation]]))  # noqa: UP045
        values = st.lists(item.values, max_size=4) | item.values.map(lambda value: [value, None])
        kind = Kind(
            Annotated[draw(st.sampled_from([set, frozenset]))[member], Field(**draw(lengths()))],
            values | values.map(in_order) | st.lists(st.none() | item.values, max_size=3).map(in_order),
            sorted_set,
        )
    elif shape == "dict":
        key, item = draw(scalars().filter(lambda k: k.annotation is not Any)), draw(scalars() | models())
        entries = st.fixed_dictionaries({"key": key.values, "value": st.none() | item.values | item.values})
        kind = Kind(
            Annotated[dict[key.annotation, item.annotation], Field(**draw(lengths()))],
            st.lists(entries, max_size=4) | entries.map(lambda entry: [entry, entry]) | st.lists(st.none() | entries, max_size=3),
            lambda values: entries_read(values, key, item),
        )
    if draw(st.booleans()):
        kind = dataclasses.replace(kind, annotation=Optional[kind.annotation])  # noqa: UP045 - a generated annotation may not know `|`
    return dataclasses.replace(kind, values=st.integers(0, 7).flatmap(lambda n: kind.values if n else st.none()))


@st.composite
def models(draw: Any) -> Kind:
    inside = {"x": draw(kinds(draw(st.sampled_from(SCALARS)))), "y": draw(kinds(draw(st.sampled_from([*SCALARS, "json"]))))}
    model = create_model("Nested", **{name: (kind.annotation, ...) for name, kind in inside.items()})  # type: ignore[call-overload]
    values = st.fixed_dictionaries({name: kind.values for name, kind in inside.items()})
    return Kind(model, values, lambda value: {name: read(kind, value[name]) for name, kind in inside.items()})


def read(kind: Kind, value: Any) -> Any:
    return None if value is None else kind.read(value)


def rank(value: Any) -> Any:
    return (0,) if value is None else (1, math.isnan(value), value) if isinstance(value, float) else (1, value)


def in_order(values: list[Any]) -> list[Any]:
    once = {repr(rank(v)): v for v in values}
    return sorted(once.values(), key=rank)


def sorted_set(values: list[Any]) -> list[Any]:
    """A set is written in one way only."""
    for one, other in itertools.pairwise(values):
        if other is None or (one is not None and not one < other and not (other != other and one == one)):  # noqa: PLR0124 - NaN
            raise NoValue
    return values


def entries_read(entries: list[Any], key: Kind, item: Kind) -> dict[Any, Any]:
    if None in entries:
        raise NoValue
    made = {read(key, e["key"]): read(item, e["value"]) for e in entries}
    if len({json.dumps(e["key"], default=str) for e in entries}) < len(entries) or len(made) < len(entries):
        raise NoValue
    return made


def whole_record(model: type[BaseModel], how: str) -> type[BaseModel]:
    """The model with a validator over the record; it refuses where the first field's text has a 7."""

    def before(cls: Any, record: Any) -> Any:
        no_sevens(record.get("f0"))
        return record

    def after(self: Any) -> Any:
        no_sevens(self.f0)
        return self

    check = model_validator(mode="before")(classmethod(before)) if how == "before" else model_validator(mode="after")(after)
    return create_model("Whole", __base__=model, __validators__={"whole": check})


Batch = tuple[type[BaseModel], list[dict[str, Any]], dict[str, Kind]]


@st.composite
def batches(draw: Any, shape: str | None = None) -> Batch:
    """A model and rows for it: one field of the shape, or several of any."""
    specs = {"f0": draw(kinds(shape))} if shape else {f"f{i}": draw(kinds()) for i in range(draw(st.integers(2, 3)))}
    config = draw(
        st.sampled_from(
            [
                ConfigDict(),
                ConfigDict(),
                ConfigDict(str_max_length=2),
                ConfigDict(allow_inf_nan=False),
                ConfigDict(strict=True),
                ConfigDict(extra="forbid"),
                ConfigDict(str_strip_whitespace=True),
            ]
        )
    )
    aliased = draw(st.booleans())
    definitions: dict[str, Any] = {name: (kind.annotation, Field(alias=name.upper()) if aliased else ...) for name, kind in specs.items()}
    model = create_model("Generated", __config__=config, **definitions)
    how = draw(st.sampled_from(["", "", "", "before", "after"]))
    rows = draw(st.lists(st.fixed_dictionaries({name: kind.values for name, kind in specs.items()}), min_size=1, max_size=8))
    return (whole_record(model, how) if how else model), rows, specs


def accepted(model: type[BaseModel], row: dict[str, Any], specs: dict[str, Kind]) -> bool:
    try:
        model.model_validate({name: read(specs[name], v) for name, v in row.items()}, strict=False, by_name=True, by_alias=False)
    except (ValidationError, NoValue):
        return False
    return True


def settled(model: type[BaseModel], one: BaseModel) -> bool:
    """Whether pydantic itself takes what it made. With to_upper and a pattern of small letters it does not."""
    try:
        return repr(model.model_validate(vars(one), by_name=True, by_alias=False)) == repr(one)
    except ValidationError:
        return False


def compiled(model: type[BaseModel]) -> Contract[Any]:
    try:
        return Contract(model)
    except ContractDefinitionError as error:
        # gt 0, lt 1 over int: the strategy does not look, the contract does.
        assume("admit nothing" not in error.what)
        raise


def framed(contract: Contract[Any], rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame({name: pl.Series(name, [row[name] for row in rows], dtype=dtype) for name, dtype in contract.schema.items()})


GENERATED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much])


def assert_the_verdict_is_pydantics(batch: Batch) -> None:
    model, rows, specs = batch
    contract = compiled(model)
    frame = framed(contract, rows)
    # pydantic judges what the column holds: the text of a UUID, the value of an Enum.
    expected = [accepted(model, row, specs) for row in frame.to_dicts()]
    good = [i for i, fine in enumerate(expected) if fine]
    for i, fine in enumerate(expected):
        verdict = contract.check(frame[i : i + 1])
        assert verdict.passed == fine, (rows[i], verdict)
    verdict, sifted = contract.check(frame), contract.sift(frame)
    assert sifted.verdict == verdict
    assert verdict.failed_rows == len(rows) - len(good)
    assert sifted.broken["_row"].to_list() == [i for i in range(len(rows)) if i not in good]
    assert sifted.valid.collect().equals(frame[good])
    assert all(len(rules) for rules in sifted.broken["_rules"])
    told = [rule for rules in sifted.broken["_rules"] for rule in rules]
    assert {failure.rule: failure.count for failure in verdict.failures} == {rule: told.count(rule) for rule in told}


@pytest.mark.parametrize("shape", [*SCALARS, *SHAPES])
def test_the_verdict_is_pydantics(shape: str) -> None:
    @settings(GENERATED, max_examples=30 if shape in SCALARS else 60)
    @given(batches(shape))
    def judged(batch: Batch) -> None:
        assert_the_verdict_is_pydantics(batch)

    judged()


@settings(GENERATED, max_examples=100)
@given(batches())
def test_the_verdict_on_records_of_many_fields_is_pydantics(batch: Batch) -> None:
    assert_the_verdict_is_pydantics(batch)


@pytest.mark.parametrize("shape", [*SCALARS, *SHAPES])
def test_what_passes_can_be_read_back_as_models_and_written_again(shape: str) -> None:
    @settings(GENERATED, max_examples=20)
    @given(batches(shape))
    def read_back(batch: Batch) -> None:
        model, rows, specs = batch
        contract = compiled(model)
        frame = framed(contract, rows)
        models = list(contract.from_frame(frame.filter(pl.Series([accepted(model, row, specs) for row in frame.to_dicts()]))))
        models = [one for one in models if settled(model, one)]
        again = contract.to_frame(models)
        assert again.schema == contract.schema
        assert repr(list(contract.from_frame(again))) == repr(models)

    read_back()


# --- engines that would not pass this ----------------------------------------------------------------------------------------------------


def one_column(annotation: Any) -> type[BaseModel]:
    return create_model("M", x=(annotation, ...))


def raw_polars(model: type[BaseModel], frame: pl.DataFrame) -> list[bool]:
    """The engine that one writes first: constraints as comparisons, in polars' own meaning, and only null is no value."""
    (info,) = model.model_fields.values()
    kept = [pl.col("x").is_not_null()]
    for limit in info.metadata:
        if (gt := getattr(limit, "gt", None)) is not None:
            kept.append(pl.col("x") > gt)
        if (length := getattr(limit, "max_length", None)) is not None:
            kept.append(pl.col("x").str.len_bytes() <= length)
    return frame.select(pl.all_horizontal(kept)).to_series().to_list()


def regular_expressions_of_python(model: type[BaseModel], frame: pl.DataFrame) -> list[bool]:
    """As Great Expectations and many others match: with `re`, whose `$` is also before a newline at the end."""
    pattern = model.model_json_schema()["properties"]["x"]["pattern"]
    return [value is not None and re.search(pattern, value) is not None for value in frame["x"]]


def nulls_are_skipped(model: type[BaseModel], frame: pl.DataFrame) -> list[bool]:
    """As Great Expectations, and SQL's CHECK, have it: a rule says nothing about null, and nobody else does either."""
    (info,) = model.model_fields.values()
    return frame.select(~(pl.col("x") <= info.metadata[0].gt).fill_null(False)).to_series().to_list()


def always_finite(model: type[BaseModel], frame: pl.DataFrame) -> list[bool]:
    """As dataframely has it: infinity is no number."""
    return frame.select(pl.col("x").is_finite() & (pl.col("x") > 0.7)).to_series().to_list()


ABOVE = one_column(Annotated[float, Field(gt=0.7)])
SHORT = one_column(Annotated[str, Field(max_length=1)])
LETTERS = one_column(Annotated[str, Field(pattern="^[a-z]+$")])


@pytest.mark.parametrize(
    ("engine", "model", "value"),
    [
        (raw_polars, ABOVE, math.nan),
        (raw_polars, SHORT, "é"),
        (raw_polars, SHORT, "😀"),
        (regular_expressions_of_python, LETTERS, "a\n"),
        (nulls_are_skipped, ABOVE, None),
        (always_finite, ABOVE, math.inf),
    ],
)
def test_a_naive_engine_would_not_pass_this(engine: Callable[..., list[bool]], model: type[BaseModel], value: Any) -> None:
    frame = pl.DataFrame({"x": [value]}, schema=Contract(model).schema)
    (pydantics,) = [accepted(model, row, {"x": Kind(None, st.nothing())}) for row in frame.to_dicts()]
    assert engine(model, frame) == [not pydantics]
    assert Contract(model).check(frame).passed == pydantics


@pytest.mark.parametrize("dtype", [pl.Decimal(38, 0), pl.UInt64])
def test_an_engine_that_casts_first_lets_another_value_pass(dtype: Any) -> None:
    """2**63 is no Int64; a cast makes another number of it, or nothing, and neither is what came in."""
    frame = pl.DataFrame({"x": pl.Series([decimal.Decimal(2**63)], dtype=pl.Decimal(38, 0)).cast(dtype)})
    assert accepted(one_column(int), frame.to_dicts()[0], {"x": Kind(None, st.nothing())})
    assert frame.select(pl.col("x").cast(pl.Int64, strict=False)).item() != 2**63
    (failure, *_) = Contract(one_column(int)).check(frame).failures
    assert failure.rule.startswith("schema: column 'x' is ")


class Listed(BaseModel):
    x: frozenset[dt.date] | None
    y: int | None


def test_lists_are_judged_however_the_engine_cuts_the_batch() -> None:
    """polars 2.1 panics where `list.eval` is evaluated under `arg_true` and the engine cuts the batch; with two threads, at 3 rows."""
    first, again = dt.date(2020, 1, 1), [dt.date(2021, 1, 1)] * 2
    contract = compiled(Listed)
    for rows in range(2, 40):
        frame = pl.DataFrame({"x": [[first], again, *[[]] * (rows - 2)], "y": range(rows)}, schema=contract.schema)
        sifted = contract.sift(frame)
        assert sifted.broken["_row"].to_list() == [1]
        assert sifted.valid.collect().equals(frame.filter(pl.Series(range(rows)) != 1))
