"""`dagster-mao calls`, and what `history` and `show` say of calls, fallbacks and deferred records."""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from typer.testing import CliRunner

from dagster_mao.cli import app
from dagster_mao.state import CALLS_SCHEMA, DEFERRED_SCHEMA, CallSummary, Provenance, Seal, StateStore, staged
from tests.sealed import MARKUP_KEY, MONDAY, two_days

START = dt.datetime(2026, 1, 5, 9, tzinfo=dt.timezone.utc)


@pytest.fixture
def store(tmp_path: Path) -> StateStore:
    store = StateStore(tmp_path / "state")
    two_days(store)
    return store


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("DAGSTER_MAO_ROOT", "DAGSTER_MAO_DATABASE", "DAGSTER_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)


def call(*arguments: str | Path, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def log(store: StateStore, agent: str, *tries: dict[str, Any], workflow: str = MONDAY) -> None:
    rows = [
        {
            **dict.fromkeys(CALLS_SCHEMA.names()),
            **{"call": f"k{n}", "workflow_id": workflow, "epoch": 0, "agent": agent, "attempt": "first", "run_id": "run-first"},
            **{"number": 1, "started": START + dt.timedelta(seconds=n), "latency_seconds": 0.25, "outcome": "answered"},
            **{"input_tokens": 0, "output_tokens": 0, "cost": 0.0},
            **one,
        }
        for n, one in enumerate(tries)
    ]
    assert store.add_calls(workflow.partition("/")[0], agent, pl.DataFrame(rows, schema=CALLS_SCHEMA))


def test_calls_as_a_person_reads_them(store: StateStore) -> None:
    log(
        store,
        "score",
        {"record": MARKUP_KEY, "outcome": "failed", "error": "ConnectionError"},
        {"call": "k0", "number": 2, "record": MARKUP_KEY, "input_tokens": 1200, "output_tokens": 34, "cost": 0.002},
        {"record": "A2", "outcome": "refused", "number": 0, "error": "dagster_mao.errors.BreakerOpenError"},
    )
    out = call("calls", MONDAY, "--root", store.root)
    assert "\x1b" not in out
    lines = out.splitlines()
    assert all(len(line) <= 100 for line in lines[:-1])
    assert ["failed" in lines[1], "1,234" in lines[2] or "1234" in lines[2], "refused" in lines[3]] == [True] * 3
    assert lines[3].split()[-1] == "BreakerOpenError"
    assert lines[-1] == (
        "score: 1 call in 2 tries, of which 1 failed (50.0%); p50 250 ms, p95 250 ms, p99 250 ms; 1 refused by an open breaker; "
        "1,200 + 34 tokens; cost 0.002."
    )


def test_failed_ones_only_and_of_one_agent(store: StateStore) -> None:
    log(store, "score", {"record": "A1"}, {"record": "A2", "outcome": "timed_out"})
    log(store, "decision", {"record": "A9", "outcome": "failed"})
    out = call("calls", MONDAY, "--failed", "--root", store.root)
    assert ("A1" in out, "A2" in out, "A9" in out, "agent" in out) == (False, True, True, True)
    out = call("calls", MONDAY, "--agent", "score", "--root", store.root)
    assert ("A1" in out, "A2" in out, "A9" in out) == (True, True, False)
    log(store, "application", {"record": "A1"})
    assert "None of them failed" in call("calls", MONDAY, "--agent", "application", "--failed", "--root", store.root)


def test_calls_of_one_version_are_those_of_its_run(store: StateStore) -> None:
    log(store, "score", {"record": "A1"}, {"record": "A2", "run_id": "run-second"})
    assert "A2" not in call("calls", f"{MONDAY}@1", "--root", store.root)
    assert "A1" not in call("calls", f"{MONDAY}@4", "--root", store.root)
    assert "No calls were made" in call("calls", f"{MONDAY}@5", "--root", store.root)


def test_calls_as_json(store: StateStore) -> None:
    log(store, "score", *({"record": f"A{n}"} for n in range(40)))
    told = json.loads(call("calls", MONDAY, "--json", "--root", store.root))
    assert (len(told["calls"]), told["summary"]["score"]["calls"], told["calls"][0]["record"]) == (40, 40, "A0")
    out = call("calls", MONDAY, "--root", store.root)
    assert "10 earlier rows not shown" in out
    assert ("A9" in out, "A10" in out) == (False, True)


def test_a_workflow_that_sealed_nothing_has_its_calls_and_one_that_is_not_there_none(store: StateStore) -> None:
    log(store, "score", {"record": "A1", "outcome": "failed"}, workflow="loans/lost")
    assert "A1" in call("calls", "loans/lost", "--root", store.root)
    assert "no such workflow" in call("calls", "loans/nowhere", "--root", store.root, code=1)
    assert "No calls were made" in call("calls", MONDAY, "--root", store.root)


# -- what history and show say ---------------------------------------------------------------------------------------------------------


def deferring(store: StateStore, *, personal: bool = False) -> Seal:
    """A version of which two records wait, one answer is the fallback's, and the policy was overridden."""
    opened = store.open_attempt(pipeline="loans", attempt="d", run_id="d", plan=["score"], entry="application", workflow_key="d")
    blank = dict.fromkeys(("contract_version", "contract_hash", "agent_version", "config", "library_version"), "1")
    provenance = Provenance(
        contract="Score",
        contract_schema=json.dumps({"fields": [{"name": "id", "personal": personal}]}),
        key="id",
        model=None,
        seed=1,
        latency_seconds=0.0,
        fallbacks=1,
        policy='{"retries": 0}',
        usage=CallSummary(calls=1, tries=1, answered=1, p50_seconds=0.5, p95_seconds=0.5, p99_seconds=0.5).model_dump_json(),
        **blank,
    )
    rest = pl.DataFrame([{"record": key, "agent": "score", "why": "loans.score"} for key in ("B7", "B8")], schema=DEFERRED_SCHEMA)
    rows = pl.DataFrame({"id": ["B1"]})
    with staged(store.objects, rows) as batch, staged(store.objects, rest) as waiting:
        sealed, _ = opened.seal(
            "score",
            batch,
            row_count=1,
            schema=rows.schema,
            parents=[],
            provenance=provenance,
            deferred=waiting,
            deferred_count=2,
        )
    return sealed


def test_history_says_how_many_wait(store: StateStore) -> None:
    assert "waits" not in call("history", "--root", store.root)
    sealed = deferring(store)
    out = call("history", sealed.workflow_id, "--root", store.root)
    assert all(len(line) <= 100 for line in out.splitlines()[:3])
    assert "waits" in out.splitlines()[1]
    assert "the next run asks for them" in " ".join(out.split())
    (told,) = json.loads(call("history", sealed.workflow_id, "--json", "--root", store.root))
    assert (told["deferred"], told["fallbacks"], told["usage"]["calls"], told["policy"]) == (2, 1, 1, {"retries": 0})


@pytest.mark.parametrize("personal", [False, True])
def test_show_names_what_waits_and_hides_personal_keys(store: StateStore, personal: bool) -> None:
    sealed = deferring(store, personal=personal)
    out = call("show", sealed.reference, "--root", store.root)
    assert ("B7" in out, "***" in out) == (not personal, personal)
    for told in ("1 of them by the fallback", "2 wait for the next run", "1 call; p50 500 ms", 'overridden: {"retries": 0}', "loans.score"):
        assert told in " ".join(out.split())
    told = json.loads(call("show", sealed.reference, "--json", "--root", store.root))
    assert [row["record"] for row in told["deferred_records"]] == (["***"] * 2 if personal else ["B7", "B8"])


# -- breakers --------------------------------------------------------------------------------------------------------------------------


def test_breakers_of_a_store_where_none_was_used(store: StateStore, tmp_path: Path) -> None:
    assert "No breaker has been used yet" in call("breakers", "list", "--root", store.root)
    assert json.loads(call("breakers", "list", "--json", "--root", store.root)) == []
    assert "No circuit breaker 'loans.score'" in call("breakers", "list", "loans.score", "--root", store.root, code=1)
    assert not (Path(store.root) / "shared.db").exists()
    assert "no shared database" in call("breakers", "list", "--root", tmp_path / "typo", code=1)
    assert "no shared database" in call("breakers", "list", "--database", tmp_path / "typo.db", code=1)
