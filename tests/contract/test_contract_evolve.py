"""What changed between two versions of a contract, and reading what was sealed under an older one."""

from __future__ import annotations

import datetime as dt
import decimal
import json
import uuid
from typing import Annotated, Any, Literal

import polars as pl
import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, create_model, model_validator

from dagster_mao.contract import Contract, Key, Personal, evolution
from dagster_mao.errors import IncompatibleContractError
from tests.contract.pairs import Spec, contract_of, frame_of, pairs, valid, varied

RELAXED = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
WRITERS, READERS, UNPROVEN, HARMLESS = "breaking for writers", "breaking for readers", "unproven", "harmless"


def described(**fields: Any) -> dict[str, Any]:
    given: dict[str, Any] = {name: one if isinstance(one, tuple) else (one, ...) for name, one in fields.items()}
    return json.loads(json.dumps(Contract(create_model("M", **given)).describe()))  # as a seal has it


def changes(old: Any, new: Any) -> list[tuple[str, str]]:
    return [(c.field, c.kind) for c in evolution(described(a=old), described(a=new))]


def limited(kind: Any, **limits: Any) -> Any:
    return Annotated[kind, Field(**limits)]


class Inner(BaseModel):
    n: int
    s: str = "none"


class Wider(BaseModel):
    n: int
    s: str = "none"
    t: float = 0.5
    u: list[int] = Field(default_factory=list)


class Demanding(BaseModel):
    n: int
    s: str
    t: float


class Narrower(BaseModel):
    n: int


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (int, int, []),
        (limited(int, ge=0), limited(int, ge=5), [("a", WRITERS)]),
        (limited(int, ge=5), limited(int, ge=0), [("a", READERS)]),
        (limited(int, ge=0, le=5), limited(int, ge=1, le=6), [("a", WRITERS), ("a", READERS)]),
        (limited(int, gt=0), limited(int, ge=1), [("a", HARMLESS)]),
        (limited(str, max_length=5), limited(str, max_length=3), [("a", WRITERS)]),
        (limited(str, max_length=3), limited(str, max_length=5), [("a", READERS)]),
        (Literal["a", "b"], Literal["a", "b", "c"], [("a", READERS)]),
        (Literal["a", "b"], Literal["a"], [("a", WRITERS)]),
        (int | None, int, [("a", WRITERS)]),
        (int, int | None, [("a", READERS)]),
        (int, str, [("a", WRITERS), ("a", READERS)]),
        (float, int, [("a", WRITERS), ("a", READERS)]),
        (list[limited(int, ge=0)], list[limited(int, ge=1)], [("a[]", WRITERS)]),
        (list[int], limited(list[int], min_length=1), [("a", WRITERS)]),
        (Inner, Wider, [("a.t", HARMLESS), ("a.u", HARMLESS)]),
        (Wider, Inner, [("a.t", HARMLESS), ("a.u", HARMLESS)]),
        (Inner, Demanding, [("a.t", WRITERS), ("a.s", HARMLESS)]),
        (Demanding, Narrower, [("a.s", READERS), ("a.t", READERS)]),
        (list[Inner], list[Demanding], [("a[].t", WRITERS), ("a[].s", HARMLESS)]),
        (str, limited(str, pattern="^a"), [("a", UNPROVEN)]),
        (int, Annotated[int, AfterValidator(abs)], [("a", UNPROVEN)]),
        (Annotated[int, AfterValidator(abs)], int, [("a", UNPROVEN)]),
        (Annotated[limited(int, ge=0), BeforeValidator(abs)], limited(int, ge=0), [("a", UNPROVEN)]),
        (int, Annotated[int, Personal], [("a", HARMLESS)]),
        (Annotated[int, Personal], int, [("a", HARMLESS)]),
        (int, limited(int, description="how many"), [("a", HARMLESS)]),
    ],
)
def test_the_changes(old: Any, new: Any, expected: list[tuple[str, str]]) -> None:
    assert sorted(changes(old, new)) == sorted(expected)


def test_what_changed_is_told() -> None:
    old = described(a=limited(int, ge=300), b=str, c=(int, 3), d=Annotated[str, Personal])
    new = described(a=limited(int, ge=400, le=850), d=str, e=(float, 0.5), f=float)
    assert [(c.field, c.kind, c.detail) for c in evolution(old, new)] == [
        ("b", READERS, "removed; no default for readers by the old contract"),
        ("c", HARMLESS, "removed; default 3 for readers by the old contract"),
        ("a", WRITERS, "ge 300 became ge 400; le 850, new"),
        ("d", HARMLESS, "is no longer personal: what was masked is shown"),
        ("e", HARMLESS, "added, float; default 0.5 for what was written before"),
        ("f", WRITERS, "added, float; no default for what was written before"),
    ]


def test_another_key() -> None:
    old, new = described(a=Annotated[str, Key], b=str), described(a=str, b=Annotated[str, Key])
    assert [(c.field, c.kind) for c in evolution(old, new)] == [("b", WRITERS), ("a", READERS)]


def test_a_validator_that_reads_the_same_is_unproven_all_the_same() -> None:
    """Its code may have changed, and no description holds code."""
    checked = Annotated[int, AfterValidator(abs)]
    assert ("a", UNPROVEN) in [(c.field, c.kind) for c in evolution(described(a=checked), described(a=checked, b=(int, 1)))]


def test_validators_over_the_record_are_unproven_with_a_field_validator_beside_them() -> None:
    class Judged(BaseModel):
        a: Annotated[int, AfterValidator(abs)]

        @model_validator(mode="after")
        def judge(self) -> Judged:
            return self

    new = Contract.of(Judged).describe()
    assert ("Judged", UNPROVEN) in [(c.field, c.kind) for c in evolution(described(a=int), new)]


def test_behind_a_validator_that_repairs_nothing_is_harmless() -> None:
    """Old rows hold -5, which `abs` made good: a bound that reads wider refuses them."""
    old, new = Annotated[limited(int, ge=1), BeforeValidator(abs)], limited(int, ge=0)
    assert Contract(create_model("M", a=(old, ...))).check(pl.DataFrame({"a": [-5]})).passed
    assert not Contract(create_model("M", a=(new, ...))).check(pl.DataFrame({"a": [-5]})).passed
    assert changes(old, new) == [("a", UNPROVEN)]


def test_words_of_another_release_are_unproven() -> None:
    old = described(a=int)
    new = json.loads(json.dumps(old))
    new["fields"][0]["choices"] = [{"type": "int"}]
    assert [(c.field, c.kind) for c in evolution(old, new)] == [("a", UNPROVEN)]
    other = json.loads(json.dumps(old).replace('"type": "int"', '"type": "currency"'))
    assert [(c.field, c.kind) for c in evolution(old, other)] == [("a", UNPROVEN)]


# --- reading -----------------------------------------------------------------------------------------------------------------------------


class Was(BaseModel):
    id: Annotated[str, Key]
    score: int = Field(ge=0)
    inner: Inner
    many: list[Inner]
    maybe: Inner | None
    gone: str


class Colour(BaseModel):
    name: str = "red"


class Is(BaseModel):
    """In another order, with a default of every sort."""

    maybe: Wider | None
    score: int = Field(ge=0)
    id: Annotated[str, Key]
    many: list[Wider]
    inner: Wider
    note: str | None = None
    kind: Literal["new", "old"] = "old"
    since: dt.datetime = dt.datetime(2026, 1, 1, tzinfo=dt.timezone(dt.timedelta(hours=1)))
    day: dt.date = dt.date(2026, 1, 1)
    amount: decimal.Decimal = Field(default=decimal.Decimal("1.50"), decimal_places=2)
    token: uuid.UUID = uuid.UUID(int=7)
    raw: bytes = b"\x00\xff"
    tags: list[str] = ["a", "b"]
    colour: Colour = Colour()
    none: Colour | None = None
    empty: list[Colour] = Field(default_factory=list)


def old_rows() -> pl.DataFrame:
    inner = [{"n": 1, "s": "x"}, {"n": 2, "s": "y"}]
    rows = {"id": ["A", "B"], "score": [1, 2], "inner": inner, "many": [inner, []], "maybe": [None, inner[0]], "gone": ["p", "q"]}
    return pl.DataFrame(rows, schema=Contract.of(Was).schema)


def recorded(model: type[BaseModel]) -> dict[str, Any]:
    return json.loads(json.dumps(Contract.of(model).describe()))


def test_an_old_snapshot_is_read_under_a_newer_contract() -> None:
    contract = Contract.of(Is)
    read = contract.upgrade(old_rows().lazy(), recorded(Was)).collect()
    assert read.schema == contract.schema
    assert contract.check(read, exact=True).passed
    assert list(contract.from_frame(read)) == [
        Is(
            id=row["id"],
            score=row["score"],
            inner=Wider(**row["inner"]),
            many=[Wider(**one) for one in row["many"]],
            maybe=row["maybe"] and Wider(**row["maybe"]),
        )
        for row in old_rows().to_dicts()
    ]


def test_an_empty_snapshot_and_one_without_a_common_column_keep_their_height() -> None:
    contract = Contract(create_model("Defaults", x=(int, 1), y=(list[int], [])))
    for height in (0, 3):
        rows = pl.LazyFrame({"a": list(range(height))}, schema={"a": pl.Int64})
        assert contract.upgrade(rows, described(a=int)).collect().rows() == [(1, [])] * height


def test_the_same_contract_reads_its_rows_as_they_are() -> None:
    rows = old_rows()
    assert Contract.of(Was).upgrade(rows.lazy(), recorded(Was)).collect().equals(rows)


@pytest.mark.parametrize(
    ("old", "new", "field", "reason"),
    [
        ({"a": int}, {"a": int, "b": int}, "b", "missing, and it has no default"),
        ({"a": int}, {"a": int, "b": int | None}, "b", "missing, and it has no default"),
        ({"a": int}, {"a": int, "b": (str, Field(default_factory=lambda: str(uuid.uuid4())))}, "b", "missing, and it has no default"),
        ({"a": int}, {"a": int, "b": (limited(int, ge=1), 0)}, "b", "missing, and its own field refuses its default"),
        ({"a": int}, {"a": int, "b": (int, None)}, "b", "missing, and its own field refuses its default"),
        ({"a": Inner}, {"a": Demanding}, "a.t", "missing, and it has no default"),
        ({"a": list[Inner]}, {"a": list[Demanding]}, "a[].t", "missing, and it has no default"),
        ({"a": int}, {"a": float}, "a", "is Int64 for the producer, Float64 for the consumer"),
        ({"a": limited(int, le=1)}, {"a": limited(int, ge=2)}, "a", "ge 2; the producer promises le 1"),
    ],
)
def test_an_incompatible_snapshot_is_refused_with_field_and_reason(
    old: dict[str, Any], new: dict[str, Any], field: str, reason: str
) -> None:
    given: dict[str, Any] = {name: one if isinstance(one, tuple) else (one, ...) for name, one in new.items()}
    contract = Contract(create_model("Reader", **given))
    with pytest.raises(IncompatibleContractError, match="cannot be read as Reader") as refused:
        contract.upgrade(pl.LazyFrame(schema={"a": pl.Int64}), described(**old))
    assert refused.value.field == field
    assert refused.value.what.endswith(reason)
    assert refused.value.fix


def test_a_snapshot_with_another_key_is_refused() -> None:
    """By the new key its rows may be doubled or have none: nothing would tell what became of which."""
    recorded = Contract(create_model("Old", id=(Annotated[str, Key], ...), customer=(str, ...))).describe()
    contract = Contract(create_model("Reader", id=(str, ...), customer=(Annotated[str, Key], ...)))
    with pytest.raises(IncompatibleContractError, match="told apart by 'id', not by 'customer'") as refused:
        contract.upgrade(pl.LazyFrame(schema={"id": pl.String, "customer": pl.String}), recorded)
    assert (refused.value.field, refused.value.fix) == ("customer", "mark 'id' in Reader as mao.Key")


def test_narrower_bounds_are_for_the_rows_to_keep() -> None:
    contract = Contract(create_model("Reader", a=(limited(int, ge=5), ...)))
    read = contract.upgrade(pl.LazyFrame({"a": [4, 5]}), described(a=limited(int, ge=0)))
    assert [f.rule for f in contract.check(read).failures] == ["a: ge 5"]


def test_a_personal_default_is_filled_in_and_never_described() -> None:
    contract = Contract(create_model("Reader", a=(int, ...), b=(Annotated[str, Personal], "nobody-1815")))
    assert "nobody-1815" not in json.dumps(contract.describe())
    assert contract.upgrade(pl.LazyFrame({"a": [1]}), described(a=int)).collect().rows() == [(1, "nobody-1815")]
    (change,) = evolution(described(a=int), contract.describe())
    assert (change.field, change.kind, "nobody" in change.detail) == ("b", UNPROVEN, False)


def test_defaults_are_no_demand() -> None:
    """A default stands in for what is not there. It changes no verdict, so it is no part of the hash that says a batch was judged."""
    one, other = (Contract(create_model("M", a=(int, default))) for default in (1, 2))
    assert one.hash == other.hash == Contract(create_model("M", a=(int, ...))).hash


# --- for all pairs -----------------------------------------------------------------------------------------------------------------------


def writable(specs: dict[str, Spec]) -> tuple[Contract[Any], list[dict[str, Any]]]:
    """A contract, and the records that keep it: all that matter."""
    contract = contract_of(specs)
    records = [record for record in varied(specs) if valid(contract.model, record)]
    assume(records)
    return contract, records


def refused(contract: Contract[Any], sealed: pl.DataFrame, old: Contract[Any]) -> bool:
    try:
        read = contract.upgrade(sealed.lazy(), old.describe())
    except IncompatibleContractError:
        return True
    return not contract.check(read, exact=True).passed


@RELAXED
@given(pairs())
def test_what_is_not_breaking_for_writers_reads_all_that_was_sealed(pair: tuple[dict[str, Spec], dict[str, Spec]]) -> None:
    old, records = writable(pair[0])
    new = contract_of(pair[1])
    kinds = {c.kind for c in evolution(old.describe(), new.describe())}
    event(f"{sorted(kinds)}")
    if not kinds & {WRITERS, UNPROVEN}:
        assert not refused(new, frame_of(old, records), old)


@RELAXED
@given(pairs())
def test_what_is_not_breaking_for_readers_is_read_by_the_old_contract(pair: tuple[dict[str, Spec], dict[str, Spec]]) -> None:
    old = contract_of(pair[0])
    new, records = writable(pair[1])
    if not {c.kind for c in evolution(old.describe(), new.describe())} & {READERS, UNPROVEN}:
        assert not refused(old, frame_of(new, records), new)


@RELAXED
@given(pairs(validators=False))
def test_what_is_breaking_for_writers_has_a_witness(pair: tuple[dict[str, Spec], dict[str, Spec]]) -> None:
    """No cry of wolf: with nothing but bounds, lengths, members, nulls and fields, some batch that keeps the old breaks the new."""
    old, records = writable(pair[0])
    new = contract_of(pair[1])
    if WRITERS in {c.kind for c in evolution(old.describe(), new.describe())}:
        assert any(refused(new, frame_of(old, [record]), old) for record in records)
