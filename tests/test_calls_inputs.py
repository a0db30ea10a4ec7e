"""What a call is about: the text that stands for a record's inputs, of which the idempotency key is made, and the records in chunks."""

from __future__ import annotations

import datetime as dt
import decimal
import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

import dagster_mao as mao
from dagster_mao.agent import agent
from dagster_mao.boundary import _inputs, _scratch
from dagster_mao.boundary._digest import digest, texts
from dagster_mao.boundary._inputs import Chunk, chunks
from dagster_mao.boundary._scratch import Scratch, Spool
from dagster_mao.contract import Contract
from dagster_mao.state import StateStore


class Part(BaseModel):
    name: str | None
    sizes: list[float]


class Everything(BaseModel):
    key: Annotated[str, mao.Key]
    number: int | None = None
    share: float = 0.0
    amount: decimal.Decimal = decimal.Decimal("0")
    at: dt.datetime = dt.datetime(2000, 1, 1, tzinfo=dt.timezone.utc)
    day: dt.date | None = None
    data: bytes = b""
    yes: bool = False
    tags: set[str] = set()
    prices: dict[str, int] = {}
    parts: list[Part | None] = []


CONTRACT = Contract.of(Everything)


def text_of(*records: Everything) -> list[str]:
    return texts(CONTRACT.to_frame(records).to_struct())


floats = st.floats(allow_nan=True)
parts = st.builds(Part, name=st.none() | st.text(max_size=3), sizes=st.lists(floats, max_size=2))
records = st.builds(
    Everything,
    key=st.text(max_size=3),
    number=st.none() | st.integers(-(2**63), 2**63 - 1),
    share=floats,
    amount=st.decimals(-99, 99, places=18),
    at=st.datetimes(timezones=st.sampled_from([dt.timezone.utc, dt.timezone(dt.timedelta(hours=2))])).filter(lambda at: 1 < at.year < 9999),
    day=st.none() | st.dates(),
    data=st.binary(max_size=3),
    yes=st.booleans(),
    tags=st.sets(st.text(max_size=2), max_size=3),
    prices=st.dictionaries(st.text(max_size=2), st.integers(0, 3), max_size=2),
    parts=st.lists(st.none() | parts, max_size=2),
)


@settings(deadline=None)
@given(records, records)
def test_two_records_have_one_text_only_if_their_rows_are_the_same(one: Everything, other: Everything) -> None:
    """NaN is NaN, 0.0 is not -0.0: what polars, which sealed it, takes for the same."""
    rows = CONTRACT.to_frame([one, other])
    alike = repr(rows.row(0)) == repr(rows.row(1))
    first, second = text_of(one, other)
    assert (first == second) == alike
    assert text_of(one) == [first]


AWKWARD: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"key": "a", "number": 1}, {"key": "a1"}),
    ({"key": "1:a"}, {"key": ":1a"}),
    ({"number": None}, {"number": 0}),
    ({"share": 0.0}, {"share": -0.0}),
    ({"share": float("inf")}, {"share": float("-inf")}),
    ({"share": 0.1}, {"share": 0.1 + 2**-56}),
    ({"amount": decimal.Decimal("0.1")}, {"amount": decimal.Decimal("0.100000000000000001")}),
    ({"at": dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc)}, {"at": dt.datetime(2020, 1, 1, 0, 0, 0, 1, tzinfo=dt.timezone.utc)}),
    ({"tags": {"ab"}}, {"tags": {"a", "b"}}),
    ({"prices": {"a": 1}}, {"prices": {"a": 1, "b": 1}}),
    ({"parts": [None]}, {"parts": []}),
    ({"parts": [None]}, {"parts": [Part(name=None, sizes=[])]}),
    ({"parts": [Part(name=None, sizes=[])]}, {"parts": [Part(name="", sizes=[])]}),
    ({"data": b"\x00"}, {"data": b""}),
    ({"data": b"00"}, {"data": b"\x00"}),
]


@pytest.mark.parametrize(("one", "other"), AWKWARD)
def test_what_is_nearly_the_same_is_something_else(one: dict[str, Any], other: dict[str, Any]) -> None:
    first, second = text_of(Everything(**{"key": "k", **one}), Everything(**{"key": "k", **other}))
    assert first != second


def test_one_moment_is_one_moment_in_every_zone() -> None:
    utc = dt.datetime(2020, 1, 1, 12, tzinfo=dt.timezone.utc)
    first, second = text_of(Everything(key="k", at=utc), Everything(key="k", at=utc.astimezone(dt.timezone(dt.timedelta(hours=5)))))
    assert first == second


FULL = Everything(
    key='"é"\n',
    number=-7,
    share=0.1,
    amount=decimal.Decimal("1.5"),
    day=dt.date(2024, 2, 29),
    data=b"\xff",
    yes=True,
    tags={"zulu", "alpha", "mike", "kilo"},
    prices={"b": 2, "a": 1},
    parts=[Part(name=None, sizes=[float("nan"), 1e300]), None],
)
TEXT = (
    '{5:"é"\n2:-73:0.120:1.50000000000000000015:9466848000000005:197822:ff4:true'
    "[4:5:alpha4:kilo4:mike4:zulu[2:{1:b1:2{1:a1:1[2:{-[2:3:NaN6:1e+300-"
)


def test_the_text_never_changes() -> None:
    """Another text is another intent: after a release of polars that writes otherwise, all that was charged would be charged again."""
    assert text_of(FULL) == [TEXT]


def test_every_process_says_the_same_under_every_hash_seed() -> None:
    code = "from tests.test_calls_inputs import *; import sys; sys.stdout.write(digest(text_of(FULL)[0]))"
    said = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
            cwd=Path.cwd(),
        ).stdout
        for seed in ("0", "1")
    }
    assert said == {digest(TEXT)}


# -- records, chunk by chunk -----------------------------------------------------------------------------------------------------------


class Left(BaseModel):
    left_id: Annotated[int, mao.Key]
    value: str


class Right(BaseModel):
    right_id: Annotated[int, mao.Key]
    value: str


class Rules(BaseModel):
    limit: float


class Both(BaseModel):
    left_id: Annotated[int, mao.Key]


@agent
def joined(left: Left, right: Right | None, rules: Rules) -> Both: ...


def frames(count: int) -> dict[str, pl.LazyFrame]:
    left = pl.LazyFrame({"left_id": range(count), "value": [f"l{n}" for n in range(count)]})
    right = pl.LazyFrame({"right_id": range(count), "value": [f"r{n}" for n in range(count)]}).filter(pl.col("right_id") % 3 != 0)
    return {"left": left, "right": right.reverse(), "rules": pl.LazyFrame({"limit": [0.5]})}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four records to a chunk, and more than nine rows go to the disk."""
    monkeypatch.setattr(_inputs, "CHUNK_RECORDS", 4)
    monkeypatch.setattr(_scratch, "KEPT_ROWS", 9)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("count", [0, 1, 4, 9, 10, 41])
def test_records_come_in_order_joined_by_key_however_many_there_are(local_store: StateStore, count: int) -> None:
    with Scratch(local_store) as scratch:
        found = list(chunks(joined.inputs, frames(count), scratch))
        assert [len(chunk.keys) for chunk in found] == [4] * (count // 4) + ([count % 4] if count % 4 else [])
        given = [values for chunk in found for values in chunk.values()]
    assert [values["left"].left_id for values in given] == list(range(count)) == [key for chunk in found for key in chunk.keys]
    assert [values["right"] for values in given] == [Right(right_id=n, value=f"r{n}") if n % 3 else None for n in range(count)]
    assert all(values["rules"] == Rules(limit=0.5) for values in given)
    assert [record for chunk in found for record in chunk.records] == [str(n) for n in range(count)]
    assert not list((local_store.objects.local / ".staging").glob("*"))  # type: ignore[operator]


def only(store: StateStore, of: dict[str, pl.LazyFrame]) -> Chunk:
    with Scratch(store) as scratch:
        (chunk,) = chunks(joined.inputs, of, scratch)
    return chunk


def test_some_of_the_records_and_their_rows(local_store: StateStore) -> None:
    chunk = only(local_store, frames(5))
    assert [values["left"].left_id for values in chunk.values([1, 3])] == [1, 3]
    assert chunk.row(3) == {"left": {"left_id": 3, "value": "l3"}, "right": None}


def test_every_input_counts_and_nothing_else_does(local_store: StateStore) -> None:
    before = only(local_store, frames(5)).inputs
    assert len(set(before)) == 5
    assert only(local_store, frames(7)).inputs[:5] == before
    shuffled = {**frames(5), "right": frames(5)["right"].sort("right_id")}
    assert only(local_store, shuffled).inputs == before
    other = frames(5)
    other["right"] = other["right"].with_columns(value=pl.when(pl.col("right_id") == 4).then(pl.lit("x")).otherwise("value"))
    changed = only(local_store, other).inputs
    assert [one == another for one, another in zip(before, changed, strict=True)] == [True, True, True, True, False]
    rules = only(local_store, {**frames(5), "rules": pl.LazyFrame({"limit": [0.6]})}).inputs
    assert not set(rules) & set(before)


def test_the_same_values_under_other_names_are_other_inputs(local_store: StateStore) -> None:
    @agent(ins={"right": "elsewhere"})
    def renamed(left: Left, right: Right | None, rules: Rules) -> Both: ...

    of = frames(5)
    with Scratch(local_store) as scratch:
        (chunk,) = chunks(renamed.inputs, {**of, "elsewhere": of["right"]}, scratch)
    assert not set(chunk.inputs) & set(only(local_store, of).inputs)


@pytest.mark.usefixtures("small")
def test_what_was_put_aside_comes_back_in_order(local_store: StateStore) -> None:
    schema = pl.Schema({"n": pl.Int64})
    with Scratch(local_store) as scratch:
        spool = Spool(scratch, schema)
        for start in range(0, 50, 7):
            spool.append(pl.DataFrame({"n": range(start, start + 7)}, schema=schema))
        assert spool.rows == 56
        assert len(list((local_store.objects.local / ".staging").glob("*/*"))) == 4  # type: ignore[operator]
        assert spool.scan().collect()["n"].to_list() == list(range(56))
        assert Spool(scratch, schema).scan().collect().schema == schema
    assert not list((local_store.objects.local / ".staging").glob("*"))  # type: ignore[operator]
