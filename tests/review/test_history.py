"""History: facts, references, records."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dagster_mao.errors import TamperedError, UnknownVersionError
from dagster_mao.review import MASK, facts, history, masked, parse_reference, records, resolve
from dagster_mao.review.history import with_record
from dagster_mao.state import StateStore
from tests.sealed import MARKUP_KEY, MONDAY, NESTED_SECRET, PIPELINE, SECRET, TUESDAY, applications, seal_attempt, two_days

PROMISED = [
    *("workflow_id", "version", "kind", "agent", "attempt", "epoch", "parents", "digest", "seal_digest", "previous_digest"),
    *("row_count", "quarantined", "contract", "agent_version", "config", "run_id", "sealed_at", "table", "uri"),
]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StateStore:
    store = StateStore(tmp_path_factory.mktemp("history"))
    two_days(store)
    return store


def test_facts_start_with_what_programs_rely_on(store: StateStore) -> None:
    told = facts(store.seal_at(MONDAY, 1))
    assert list(told)[: len(PROMISED)] == PROMISED
    json.dumps(told)
    assert told["parents"] == [
        {"agent": "application", "workflow_id": MONDAY, "version": 0, "digest": store.seal_at(MONDAY, 0).digest},
    ]


def test_history_of_all_is_in_the_order_of_sealing(store: StateStore) -> None:
    assert [seal.reference for seal in history(store)] == [*(f"{MONDAY}@{n}" for n in range(6)), *(f"{TUESDAY}@{n}" for n in range(3))]
    assert [seal.version for seal in history(store, TUESDAY)] == [0, 1, 2]


def test_an_unknown_workflow_is_an_error_that_names_its_likes(store: StateStore) -> None:
    with pytest.raises(UnknownVersionError, match=f"did you mean .*{MONDAY}"):
        history(store, "loans/2026-01-5")
    with pytest.raises(UnknownVersionError, match="no such workflow"):
        history(store, "x")


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("loans/a", ("loans/a", None)),
        ("loans/a@3", ("loans/a", 3)),
        ("loans/a@b@3", ("loans/a@b", 3)),
        ("loans/a@b", ("loans/a@b", None)),
        ("loans/a@3@", ("loans/a@3", None)),
        ("loans/a@-1", ("loans/a@-1", None)),
        ("loans/a\n@2", ("loans/a\n", 2)),
    ],
)
def test_references(text: str, parsed: tuple[str, int | None]) -> None:
    assert parse_reference(text) == parsed


def test_a_workflow_whose_name_ends_like_a_version(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    seal_attempt(store, "v@2", "first", applications(1.0))
    assert resolve(store, f"{PIPELINE}/v@2") == (f"{PIPELINE}/v@2", None)
    assert resolve(store, f"{PIPELINE}/v@2@1") == (f"{PIPELINE}/v@2", 1)
    seal_attempt(store, "v", "first", applications(1.0))
    assert resolve(store, f"{PIPELINE}/v@2") == (f"{PIPELINE}/v", 2)
    assert resolve(store, f"{PIPELINE}/v@2@") == (f"{PIPELINE}/v@2", None)


def test_records_are_masked_at_any_depth(store: StateStore) -> None:
    rows = records(store, store.seal_at(MONDAY, 0))
    assert rows[0] == {"id": MARKUP_KEY, "name": MASK, "amount": 1000.0, "contact": {"phone": MASK, "city": "Arlington"}}
    assert SECRET not in repr(rows)
    assert NESTED_SECRET not in repr(rows)


def test_a_personal_null_is_masked_too(store: StateStore) -> None:
    assert masked(store.seal_at(MONDAY, 0), {"id": "A2", "name": None})["name"] == MASK


@pytest.mark.parametrize("described", ["", "null", "[]", "{}", '{"fields": [{}]}', '{"fields": 3}', "{"])
def test_without_a_description_everything_is_masked(store: StateStore, described: str) -> None:
    seal = store.seal_at(MONDAY, 0).model_copy(update={"contract_schema": described})
    assert masked(seal, {"id": "A2", "contact": {"city": "x"}}) == {"id": MASK, "contact": MASK}


def test_items_of_lists_are_masked(store: StateStore) -> None:
    item = {"fields": [{"name": "phone", "personal": True}, {"name": "kind", "personal": False}]}
    schema = {"fields": [{"name": "phones", "personal": False, "items": item}]}
    seal = store.seal_at(MONDAY, 0).model_copy(update={"contract_schema": json.dumps(schema)})
    assert masked(seal, {"phones": [{"phone": "1", "kind": "work"}, None]}) == {"phones": [{"phone": MASK, "kind": "work"}, None]}


def test_one_record_by_its_key(store: StateStore) -> None:
    assert [row["score"] for row in records(store, store.seal_at(MONDAY, 4), key="A2")] == [950]
    assert records(store, store.seal_at(MONDAY, 4), key="a2") == []
    found = with_record(store, list(store.effective(MONDAY).values()), MARKUP_KEY)
    assert [(seal.agent, len(rows)) for seal, rows in found] == [("application", 1), ("score", 1), ("decision", 1)]


def test_a_record_that_is_nowhere_is_an_error(store: StateStore) -> None:
    with pytest.raises(UnknownVersionError, match="No record with this key"):
        with_record(store, store.seals(MONDAY), "A99")


def test_a_fence_has_no_records(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    seal_attempt(store, "d", "first", applications(1.0))
    fence = store.fence(f"{PIPELINE}/d", attempt="first", run_id="operator")
    assert records(store, fence) == []
    with pytest.raises(UnknownVersionError, match="has a key"):
        with_record(store, [fence], "A1")


def test_changed_bytes_are_refused_rather_than_shown(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    (entry, *_) = seal_attempt(store, "d", "first", applications(1.0))
    file = tmp_path / entry.path
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(TamperedError):
        records(store, entry)
