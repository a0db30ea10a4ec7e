"""Diff: record by record on the key, and the circumstances."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from dagster_mao.errors import MaoError
from dagster_mao.review import MASK, Difference, diff
from dagster_mao.state import Provenance, Seal, StateStore, staged
from tests.sealed import MONDAY, NESTED_SECRET, SECRET, two_days


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StateStore:
    store = StateStore(tmp_path_factory.mktemp("diff"))
    two_days(store)
    return store


def between(store: StateStore, left: int, right: int, limit: int | None = None) -> Difference:
    return diff(store, store.seal_at(MONDAY, left), store.seal_at(MONDAY, right), limit=limit)


def seal_frames(
    store: StateStore, *frames: pl.DataFrame, key: str | None, personal: Sequence[str] = (), personals: Sequence[Sequence[str]] = ()
) -> list[Seal]:
    """Each frame as an entry of its own attempt at one workflow."""
    seals = []
    for number, frame in enumerate(frames):
        attempt = store.open_attempt(pipeline="p", attempt=str(number), run_id="r", plan=("a",), entry="a", workflow_key="w")
        marked = personals[number] if personals else personal
        schema: Mapping[str, Any] = {"fields": [{"name": name, "personal": name in marked} for name in frame.columns]}
        told = {"contract": "C", "contract_version": "1", "contract_hash": "", "contract_schema": json.dumps(schema), "key": key}
        made = {"agent_version": "1", "config": "", "model": None, "seed": 0, "latency_seconds": 0.0, "library_version": "0"}
        with staged(store.objects, frame) as batch:
            seal, _ = attempt.seal(
                "a", batch, row_count=frame.height, schema=frame.schema, parents=[], provenance=Provenance.model_validate({**told, **made})
            )
        seals.append(seal)
    return seals


def test_added_removed_and_changed_by_key(store: StateStore) -> None:
    found = between(store, 0, 3)
    assert (found.added, found.removed, found.changed, found.same) == (1, 1, 1, 1)
    assert [(record.key, record.change, dict(record.fields)) for record in found.records] == [
        ("A2", "changed", {"amount": (9000.0, 9500.0)}),
        ("A3", "removed", {}),
        ("A4", "added", {}),
    ]
    assert found.by_field == {"amount": 1}
    assert not found.equal


def test_what_else_changed(store: StateStore) -> None:
    found = between(store, 1, 4)
    assert found.circumstances["agent_version"] == ("1", "2")
    assert found.circumstances["attempt"] == ("first", "second")
    assert found.circumstances["parent application"] == (f"{MONDAY}@0", f"{MONDAY}@3")
    assert found.circumstances["content of parent application"] == (store.seal_at(MONDAY, 0).digest, store.seal_at(MONDAY, 3).digest)
    assert "run_id" not in found.circumstances


def test_a_version_equals_itself(store: StateStore) -> None:
    found = between(store, 2, 2)
    assert found.equal
    assert (found.same, found.records, dict(found.circumstances)) == (3, (), {})


def test_a_limit_bounds_the_list_and_not_the_counts(store: StateStore) -> None:
    found = between(store, 0, 3, limit=1)
    assert (found.added, found.removed, found.changed) == (1, 1, 1)
    assert [record.key for record in found.records] == ["A2"]


def test_versions_of_different_agents_compare_by_their_key(store: StateStore) -> None:
    found = between(store, 0, 1)
    assert (found.added, found.removed, found.changed, found.same) == (0, 0, 0, 3)
    assert dict(found.columns) == {"name": "removed", "amount": "removed", "contact": "removed", "score": "added"}
    assert not found.equal
    assert found.circumstances["agent"] == ("application", "score")


@pytest.mark.parametrize("personals", [[["name"], []], [[], ["name"]]], ids=["left", "right"])
def test_what_one_side_calls_personal_is_masked_on_both(tmp_path: Path, personals: list[list[str]]) -> None:
    store = StateStore(tmp_path)
    frames = [pl.DataFrame({"id": ["A1"], "name": [name]}) for name in (SECRET, NESTED_SECRET)]
    left, right = seal_frames(store, *frames, key="id", personals=personals)
    (record,) = diff(store, left, right).records
    assert record.fields == {"name": (MASK, MASK)}


def test_a_personal_key_is_masked(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    frames = [pl.DataFrame({"name": [name]}) for name in (SECRET, NESTED_SECRET)]
    left, right = seal_frames(store, *frames, key="name", personal=["name"])
    assert [(record.key, record.change) for record in diff(store, left, right).records] == [(MASK, "added"), (MASK, "removed")]


def test_nan_and_null_equal_themselves_and_nothing_else(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    values = [float("nan"), None, float("nan"), 0.0, -0.0]
    others = [float("nan"), None, None, None, 0.0]
    frames = [pl.DataFrame({"id": range(5), "x": side}, schema_overrides={"id": pl.Int64, "x": pl.Float64}) for side in (values, others)]
    left, right = seal_frames(store, *frames, key="id")
    assert [record.key for record in diff(store, left, right).records] == [2, 3]


def test_nested_values_compare_whole(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    frames = [
        pl.DataFrame({"id": [1, 2], "tags": [["a"], tags], "where": [{"city": "x"}, {"city": city}]})
        for tags, city in ((["b"], "y"), (["b", None], "z"))
    ]
    left, right = seal_frames(store, *frames, key="id")
    found = diff(store, left, right)
    assert found.by_field == {"tags": 1, "where": 1}
    assert [record.key for record in found.records] == [2]


def test_fields_named_like_the_joins_own(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    columns = ["l", "r", "d0", "l0", "r0", "change", "key", "x_right"]
    frames = [pl.DataFrame({"id": [1], **{name: [value] for name in columns}}) for value in ("a", "b")]
    left, right = seal_frames(store, *frames, key="id")
    (record,) = diff(store, left, right).records
    assert record.fields == dict.fromkeys(columns, ("a", "b"))


def test_without_keys_rows_compare_in_order(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    left, right = seal_frames(store, pl.DataFrame({"n": [1]}), pl.DataFrame({"n": [2]}), key=None)
    (record,) = diff(store, left, right).records
    assert (record.key, record.fields) == (None, {"n": (1, 2)})


def test_empty_batches(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    empty = pl.DataFrame(schema={"id": pl.String, "n": pl.Int64})
    left, right = seal_frames(store, empty, pl.DataFrame({"id": ["A1"], "n": [1]}), key="id")
    assert diff(store, left, left).equal
    assert (diff(store, left, right).added, diff(store, right, left).removed) == (1, 1)


def test_other_keys_cannot_be_compared(store: StateStore, tmp_path: Path) -> None:
    other = store.seal_at(MONDAY, 0).model_copy(update={"key": None})
    with pytest.raises(MaoError, match=r"keyed by id, .* by nothing"):
        diff(store, store.seal_at(MONDAY, 0), other)


def test_a_fence_cannot_be_compared(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    (left,) = seal_frames(store, pl.DataFrame({"n": [1]}), key=None)
    with pytest.raises(MaoError, match="is a fence and has no records"):
        diff(store, left, store.fence("p/w", attempt="0", run_id="operator"))
