"""The verdict of a contract is pydantic's verdict, row by row, on models and frames that nobody thought of."""

import datetime as dt
import decimal
import enum
import math
import re
import uuid
from typing import Annotated, Any, Literal, Optional

import polars as pl
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, NaiveDatetime, ValidationError, create_model

from dagster_mao.contract import Contract
from dagster_mao.errors import ContractDefinitionError


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue\n"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 9


def no_sevens(value: Any) -> Any:
    if "7" in str(value):
        raise ValueError("seven")
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
    "\u2028",
    "\x00",
    "😀",
    "👨‍👩‍👧",
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
    1.7976931348623157e308,
    1e20,
    -1.0,
    1.0,
    3.0,
]
AWKWARD_INTS = [0, 1, -1, 2**63 - 1, -(2**63), 2**53 + 1, 6, 7, 10]

texts = st.sampled_from(AWKWARD_TEXT) | st.text(max_size=4)
floats = st.sampled_from(AWKWARD_FLOATS) | st.floats(width=64) | st.floats(-2, 2)
ints = st.sampled_from(AWKWARD_INTS) | st.integers(-(2**63), 2**63 - 1) | st.integers(-12, 12)
days = st.dates() | st.just(dt.date(2020, 1, 1))
clocks = st.datetimes() | st.just(dt.datetime(2020, 1, 1))  # noqa: DTZ001 - naive ones are the point
instants = clocks.map(lambda d: d.replace(tzinfo=dt.timezone.utc))
uuids = st.uuids().flatmap(
    lambda u: st.sampled_from(
        [str(u), u.hex, str(u).upper(), f"{{{u}}}", u.urn, u.urn.upper(), f"{u}\n", f" {u}", str(u)[:-1], f"{{{u.hex}}}", "-" + u.hex]
    )
)


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


@st.composite
def scalars(draw: Any) -> tuple[Any, st.SearchStrategy[Any]]:
    """An annotation, and values of its column's type, good ones and bad ones."""
    kind = draw(
        st.sampled_from(
            ["int", "float", "str", "bool", "bytes", "date", "naive", "aware", "decimal", "uuid", "literal", "enum", "validated"]
        )
    )
    if kind == "int":
        limits = draw(bounded(st.integers(-10, 10))) | draw(st.sampled_from([{}, {}, {"multiple_of": 3}]))
        return Annotated[int, Field(**limits)], ints
    if kind == "float":
        limits = draw(bounded(st.sampled_from([-1.0, 0, 0.3, 0.7, 1, 2.5, 1e300])))
        limits |= draw(st.sampled_from([{}, {}, {"allow_inf_nan": False}, {"multiple_of": 0.1}, {"multiple_of": 2}]))
        return Annotated[float, Field(**limits)], floats
    if kind == "str":
        limits = draw(lengths()) | draw(st.sampled_from([{}] + [{"pattern": p} for p in PATTERNS]))
        return Annotated[str, Field(**limits)], texts
    if kind == "bool":
        return bool, st.booleans()
    if kind == "bytes":
        return Annotated[bytes, Field(**draw(lengths()))], st.binary(max_size=5) | st.just("é".encode())
    if kind == "date":
        return Annotated[dt.date, Field(**draw(bounded(st.dates() | st.just(dt.date(2020, 1, 1)))))], days
    if kind == "naive":
        return Annotated[NaiveDatetime, Field(**draw(bounded(clocks)))], clocks
    if kind == "aware":
        return Annotated[draw(st.sampled_from([AwareDatetime, dt.datetime])), Field(**draw(bounded(instants)))], instants
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
        return Annotated[decimal.Decimal, Field(**limits)], st.decimals(-30, 30, places=places)
    if kind == "uuid":
        return uuid.UUID, uuids
    if kind == "literal":
        return draw(st.sampled_from([Literal["a", "a\n", ""], Literal[1, 7], Literal["x", None]])), None
    if kind == "enum":
        return draw(st.sampled_from([Colour, Level])), None
    return draw(st.sampled_from([(Annotated[int, AfterValidator(no_sevens)], ints), (Annotated[str, AfterValidator(no_sevens)], texts)]))


@st.composite
def fields(draw: Any, depth: int = 1) -> tuple[Any, st.SearchStrategy[Any]]:
    annotation, values = draw(scalars())
    if values is None:
        values = ints if annotation in (Level, Literal[1, 7]) else texts
    if depth and draw(st.integers(0, 4)) == 0:
        member, member_values = draw(fields(depth=0))
        other, other_values = draw(fields(depth=0))
        annotation = create_model("Nested", x=(member, ...), y=(other, ...))
        values = st.fixed_dictionaries({"x": member_values, "y": other_values})
    if depth and draw(st.integers(0, 4)) == 0:
        annotation, values = Annotated[list[annotation], Field(**draw(lengths()))], st.lists(values, max_size=5)
    if draw(st.booleans()):
        annotation = Optional[annotation]  # noqa: UP045 - a generated annotation may not know `|`
    return annotation, st.none() | values | values | values


@st.composite
def batches(draw: Any) -> tuple[type[BaseModel], list[dict[str, Any]]]:
    specs = {f"f{i}": draw(fields()) for i in range(draw(st.integers(1, 3)))}
    config = draw(
        st.sampled_from(
            [ConfigDict(), ConfigDict(), ConfigDict(str_max_length=2), ConfigDict(allow_inf_nan=False), ConfigDict(strict=True)]
        )
    )
    definitions: dict[str, Any] = {name: (annotation, ...) for name, (annotation, _) in specs.items()}
    model = create_model("Generated", __config__=config, **definitions)
    rows = draw(st.lists(st.fixed_dictionaries({name: values for name, (_, values) in specs.items()}), min_size=1, max_size=5))
    return model, rows


def accepted(model: type[BaseModel], row: dict[str, Any]) -> bool:
    try:
        model.model_validate(row, strict=False, by_name=True)
    except ValidationError:
        return False
    return True


def compiled(model: type[BaseModel]) -> Contract[Any]:
    try:
        return Contract(model)
    except ContractDefinitionError as error:
        # gt 0, lt 1 over int: the strategy does not look, the contract does.
        assume("admit nothing" not in error.what)
        raise


def framed(contract: Contract[Any], rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame({name: pl.Series(name, [row[name] for row in rows], dtype=dtype) for name, dtype in contract.schema.items()})


@settings(
    max_examples=120,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(batches())
def test_the_verdict_is_pydantics(batch: tuple[type[BaseModel], list[dict[str, Any]]]) -> None:
    model, rows = batch
    contract = compiled(model)
    frame = framed(contract, rows)
    # pydantic judges what the column holds: the text of a UUID, the value of an Enum.
    expected = [accepted(model, row) for row in frame.to_dicts()]
    for i, good in enumerate(expected):
        verdict = contract.check(frame[i : i + 1])
        assert verdict.passed == good, (rows[i], verdict)
    assert contract.check(frame).failed_rows == expected.count(False)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(batches())
def test_what_passes_can_be_read_back_as_models_and_written_again(batch: tuple[type[BaseModel], list[dict[str, Any]]]) -> None:
    model, rows = batch
    contract = compiled(model)
    frame = framed(contract, rows)
    good = [i for i, row in enumerate(frame.to_dicts()) if accepted(model, row)]
    kept = frame[good]
    again = contract.to_frame(contract.from_frame(kept))
    assert again.schema == contract.schema
    assert normal(again) == normal(kept)


def normal(frame: pl.DataFrame) -> str:
    """The rows as text, in which NaN equals itself and the spellings of a UUID are one."""
    return re.sub(r"urn:uuid:|[{}-]", "", repr(frame.to_dicts()).lower())


def test_a_naive_engine_would_not_pass_this() -> None:
    """Raw polars lets NaN pass a lower bound, which is why bounds on floats look for it."""
    assert pl.select(pl.lit(math.nan) > 0.7).item() is True
    with pytest.raises(ValidationError):
        create_model("M", x=(Annotated[float, Field(gt=0.7)], ...))(x=math.nan)
