"""What a model may be as a contract, and what a contract says of itself."""

import datetime as dt
import decimal
import enum
import json
import pickle
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Callable, Iterable
from typing import Annotated, Any, ClassVar, Literal, Optional, get_args, get_origin, get_type_hints

import polars as pl
import pytest
from annotated_types import Interval
from pydantic import (
    UUID4,
    AfterValidator,
    AwareDatetime,
    BaseModel,
    ConfigDict,
    Field,
    HttpUrl,
    NaiveDatetime,
    PastDate,
    RootModel,
    conint,
    create_model,
    model_validator,
)

from dagster_mao.contract import Column, Contract, DataFrame, FromFallback, Key, LazyFrame, Personal, columns
from dagster_mao.errors import ContractDefinitionError


class Address(BaseModel):
    street: Annotated[str, Personal]
    zip_code: str = Field(pattern=r"^\d{5}$")


class Applicant(BaseModel):
    """One applicant."""

    applicant_id: Annotated[str, Key]
    name: Annotated[str, Personal] = Field(min_length=1, description="as on the passport")
    aliases: list[Annotated[str, Personal]]
    age: int | None = Field(ge=18, le=120)
    income: float = Field(ge=0)
    home: Address


def test_the_key_and_the_personal_fields_are_read_from_the_annotations() -> None:
    contract = Contract.of(Applicant)
    assert contract.key == "applicant_id"
    assert contract.personal == {"name", "aliases"}
    assert contract.field("home").type.fields[0].personal


def test_a_model_has_one_contract() -> None:
    assert Contract.of(Applicant) is Contract.of(Applicant)
    assert pickle.loads(pickle.dumps(Contract.of(Applicant))) is Contract.of(Applicant)  # noqa: S301 - our own bytes


def test_markers_survive_pickling_as_themselves() -> None:
    assert pickle.loads(pickle.dumps((Key, Personal, FromFallback))) == (Key, Personal, FromFallback)  # noqa: S301 - our own bytes


def test_what_the_fallback_answered_is_said_in_the_description_and_demands_nothing() -> None:
    plain, marked = (Contract(create_model("M", said=(annotation, False))) for annotation in (bool, Annotated[bool, FromFallback]))
    assert (plain.from_fallback, marked.from_fallback) == (None, "said")
    assert marked.describe() == {**plain.describe(), "from_fallback": "said"}
    assert marked.hash == plain.hash


def test_the_frame_annotations_carry_their_model_and_are_nothing_at_run_time() -> None:
    def execute(a: "LazyFrame[Applicant]") -> "DataFrame[Applicant]": ...  # type: ignore[empty-body]

    hints = get_type_hints(execute)
    assert get_origin(hints["a"]) is LazyFrame
    assert get_origin(hints["return"]) is DataFrame
    assert get_args(hints["a"]) == (Applicant,)
    with pytest.raises(TypeError, match=r"make a polars\.LazyFrame"):
        LazyFrame()  # type: ignore[operator]


def test_the_schema_is_exact() -> None:
    class Everything(BaseModel):
        a: dt.datetime
        b: NaiveDatetime
        c: AwareDatetime
        d: dt.date
        e: decimal.Decimal = Field(decimal_places=2)
        f: decimal.Decimal
        g: uuid.UUID
        h: bytes
        i: Literal[1, 2]
        j: Optional[conint(ge=5)]  # type: ignore[valid-type]  # noqa: UP045
        k: tuple[float, ...]
        m: list[Address]

    assert Contract.of(Everything).schema == pl.Schema(
        {
            "a": pl.Datetime("us", "UTC"),
            "b": pl.Datetime("us"),
            "c": pl.Datetime("us", "UTC"),
            "d": pl.Date,
            "e": pl.Decimal(38, 2),
            "f": pl.Decimal(38, 18),
            "g": pl.String,
            "h": pl.Binary,
            "i": pl.Int64,
            "j": pl.Int64,
            "k": pl.List(pl.Float64),
            "m": pl.List(pl.Struct({"street": pl.String, "zip_code": pl.String})),
        }
    )


@pytest.mark.parametrize(
    "annotation",
    [
        Annotated[int, Field(ge=2, le=9)],
        Annotated[int, Interval(ge=2, le=9)],
        Annotated[int, Field(gt=0), Field(ge=2), Field(le=9)],
        conint(ge=2, le=9),
    ],
)
def test_a_constraint_is_found_wherever_it_sits(annotation: Any) -> None:
    """The traps: grouped metadata, constraints inside Optional, constraints of list items."""
    limits = lambda a: {r.name.split(": ")[1] for r in Contract(create_model("M", x=(a, ...))).rules}  # noqa: E731
    assert {"ge 2", "le 9"} <= limits(annotation)
    assert {"ge 2", "le 9"} <= limits(Optional[annotation])  # noqa: UP045
    assert {"ge 2", "le 9"} <= limits(list[annotation])


class TwoKeys(BaseModel):
    a: Annotated[str, Key]
    b: Annotated[str, Key]


class TwoAnswers(BaseModel):
    a: Annotated[bool, FromFallback]
    b: Annotated[bool, FromFallback]


class PerhapsAnAnswer(BaseModel):
    a: Annotated[bool | None, FromFallback] = None


class AnswerInWords(BaseModel):
    a: Annotated[str, FromFallback]


class OptionalKey(BaseModel):
    a: Annotated[str | None, Key]


class FloatKey(BaseModel):
    a: Annotated[float, Key]


class Odd:
    """No data: pydantic can only say whether it is one."""


class HoldsOdd(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    a: list[Odd]


def field(annotation: Any) -> type[BaseModel]:
    return create_model("M", a=(annotation, ...))


@pytest.mark.parametrize(
    ("model", "name", "what"),
    [
        (TwoKeys, "b", "two keys"),
        (TwoAnswers, "b", "both say what the fallback answered"),
        (PerhapsAnAnswer, "a", "no bool"),
        (AnswerInWords, "a", "no bool"),
        (OptionalKey, "a", "its key is optional"),
        (FloatKey, "a", "its key is of type float"),
        (HoldsOdd, "a[]", "no Delta column"),
        (RootModel[int], None, "no model with fields"),
        (create_model("Empty"), None, "has no fields"),
        (field(Callable[[], int]), "a", "no Delta column"),
        (field(type[int]), "a", "no Delta column"),
        (field(Iterable[int]), "a", "no Delta column"),
        (field(dict[str, Annotated[int, Field(ge=5, le=3)]]), "a[].value", "admit nothing"),
        (field(Annotated[dt.timedelta, Field(gt=dt.timedelta(1), lt=dt.timedelta(1))]), "a", "admit nothing"),
        (field(Annotated[dt.timedelta, Field(ge=dt.timedelta.max)]), "a", "fits 64 bits"),
        (field(Annotated[int, Field(ge=5, le=3)]), "a", "admit nothing"),
        (field(Annotated[int, Field(gt=0, lt=1)]), "a", "admit nothing"),
        (field(Annotated[float, Field(gt=1, le=1)]), "a", "admit nothing"),
        (field(Annotated[int, Field(ge=2**63)]), "a", "fits 64 bits"),
        (field(Annotated[str, Field(min_length=3, max_length=2)]), "a", "admit nothing"),
        (field(Annotated[dt.date, Field(gt=dt.date(2020, 1, 2), le=dt.date(2020, 1, 1))]), "a", "admit nothing"),
        (field(Annotated[decimal.Decimal, Field(decimal_places=50)]), "a", "38 digits"),
    ],
)
def test_a_model_that_is_no_contract_is_refused_with_field_and_fix(model: type[BaseModel], name: str | None, what: str) -> None:
    with pytest.raises(ContractDefinitionError, match=what) as refused:
        Contract(model)
    assert refused.value.field == name
    assert refused.value.fix


@pytest.mark.parametrize("thing", [int, BaseModel, "Applicant", dict])
def test_only_a_model_is_a_contract(thing: Any) -> None:
    with pytest.raises(ContractDefinitionError, match="no contract"):
        Contract.of(thing)


def test_a_contract_describes_itself_in_json() -> None:
    described = json.loads(json.dumps(Contract.of(Applicant).describe()))
    assert (described["name"], described["version"], described["key"], described["validators"]) == ("Applicant", "1", "applicant_id", False)
    assert described["fields"][1] == {
        "name": "name",
        "type": "str",
        "dtype": "String",
        "nullable": False,
        "constraints": {"min_length": 1},
        "validators": False,
        "personal": True,
        "description": "as on the passport",
    }
    assert described["fields"][5]["fields"][1]["constraints"] == {"pattern": r"^\d{5}$"}


def test_the_hash_is_pinned() -> None:
    """If this changes, every snapshot sealed so far is under another contract than it says. No release of a library may do that."""
    assert Contract.of(Applicant).hash == "c15ef8eec9f5de0fcd56452496ff387df0a7f5d60b81c6cd8202e0f35a54985a"


class Grade(enum.Enum):
    A = "a"
    B = "b"


class Line(BaseModel):
    n: int = Field(ge=0, multiple_of=3)
    of: decimal.Decimal | None = Field(None, max_digits=5, decimal_places=2)


class Sealed(BaseModel):
    """Of everything that a contract could say in the first release."""

    model_config = ConfigDict(extra="forbid", str_max_length=50)
    sealed_id: Annotated[int, Key]
    name: Annotated[str, Personal] = Field(min_length=1, pattern="^[A-Z]")
    score: float = Field(gt=0.7, le=1, allow_inf_nan=False)
    flag: bool = True
    raw: bytes = Field(b"", max_length=9)
    day: dt.date = Field(ge=dt.date(2020, 1, 1))
    born: PastDate
    at: AwareDatetime
    clock: NaiveDatetime = Field(lt=dt.datetime(2030, 1, 1))  # noqa: DTZ001
    amount: decimal.Decimal
    token: uuid.UUID
    fourth: UUID4
    site: HttpUrl | None
    grade: Grade
    kind: Literal["x", "y", None]
    even: Annotated[int, AfterValidator(lambda v: v)]
    mixed: uuid.UUID | str
    lines: list[Line] = Field([], max_length=7)
    points: tuple[float, ...]

    @model_validator(mode="after")
    def whole(self) -> "Sealed":
        return self


def test_what_could_be_said_from_the_first_release_on_keeps_its_hash() -> None:
    assert Contract.of(Sealed).hash == "90bb0e8053b0b479679c1d4e12e1de116e82b4e21fa10f967d78129c2edb3932"


def test_the_hash_is_the_same_in_another_process() -> None:
    code = """
        from pydantic import BaseModel, Field
        from typing import Literal
        from dagster_mao.contract import Contract
        class M(BaseModel):
            a: Literal["x", "y", "z"]
            b: float = Field(ge=0)
        print(Contract.of(M).hash)
    """
    hashes = {
        subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env={"PYTHONHASHSEED": seed}, check=True, capture_output=True).stdout
        for seed in "12"
    }
    assert len(hashes) == 1


def test_the_hash_follows_the_demands_and_nothing_else() -> None:
    def model(doc: str, **changes: Any) -> str:
        limits: dict[str, Any] = {"ge": 0, **changes}
        return Contract(create_model("M", __doc__=doc, a=(Annotated[float, Field(description=doc, title=doc, **limits)], ...))).hash

    assert model("one") == model("two") == model("one", ge=0.0)
    assert len({model("one"), model("one", ge=1), model("one", le=9), model("one", allow_inf_nan=False)}) == 4


def test_the_version_is_declared_on_the_model_and_part_of_the_hash() -> None:
    class Base(BaseModel):
        a: int

    class Second(Base):
        __contract_version__: ClassVar[str] = "2"

    Second.__name__ = "Base"
    assert (Contract.of(Base).version, Contract.of(Second).version) == ("1", "2")
    assert Contract.of(Base).hash != Contract.of(Second).hash


def test_the_columns_say_what_a_reader_needs() -> None:
    shown = {c.name: c for c in columns(Contract.of(Applicant))}
    assert shown["applicant_id"] == Column("applicant_id", "String", None, ["unique"], False, False)
    assert shown["name"] == Column("name", "String", "as on the passport", ["min_length 1"], False, True)
    assert shown["age"] == Column("age", "Int64", None, ["ge 18", "le 120"], True, False)
    assert shown["home"].constraints == [r"zip_code: pattern ^\d{5}$"]
