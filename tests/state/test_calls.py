"""The tables of calls: what steps tell of their calls, appended by many processes, read by any Delta reader."""

from __future__ import annotations

import datetime as dt
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from deltalake import DeltaTable, write_deltalake
from scenario import AWKWARD_KEY, complete

from dagster_mao.errors import StoreError
from dagster_mao.state import CALLS_SCHEMA, CallSummary, StateStore
from dagster_mao.state.calls import CallsTable
from dagster_mao.state.verify import verify
from tests.stores import on_every_store

START = dt.datetime(2026, 1, 1, 12, tzinfo=dt.timezone.utc)


def calls(*outcomes: str, run: str = "run-1", workflow: str = "credit/day", **columns: Any) -> pl.DataFrame:
    """One call per outcome, with one try each."""
    told = [
        {
            **dict.fromkeys(CALLS_SCHEMA.names()),
            **{"call": f"key-{n}", "workflow_id": workflow, "epoch": 0, "agent": "score", "attempt": run, "run_id": run},
            **{"record": f"A{n}", "number": 0 if outcome in ("refused", "reused", "fallback") else 1},
            **{"started": START + dt.timedelta(seconds=n, microseconds=1), "latency_seconds": float(n), "outcome": outcome},
            **{"input_tokens": 10, "output_tokens": 1, "cost": 0.5},
            **columns,
        }
        for n, outcome in enumerate(outcomes)
    ]
    return pl.DataFrame(told, schema=CALLS_SCHEMA)


def delta(store: StateStore) -> pl.LazyFrame:
    return pl.scan_delta(store.objects.url("tables/credit/score_calls"), storage_options=store.objects.storage_options or None)


@on_every_store
def test_any_delta_reader_sees_the_calls_of_all_workflows(store: StateStore) -> None:
    one, other = calls("answered", "failed"), calls("refused", run="run-2", workflow=f"credit/{AWKWARD_KEY}")
    assert store.add_calls("credit", "score", one)
    assert store.add_calls("credit", "score", other.lazy())
    read = delta(store).collect()
    assert read.schema == CALLS_SCHEMA
    assert read.sort("run_id", "call").equals(pl.concat([one, other]))
    assert store.calls("credit", "score").collect().sort("run_id", "call").equals(read.sort("run_id", "call"))
    assert store.calls("credit", "score", f"credit/{AWKWARD_KEY}").collect().equals(other)
    assert store.callers("credit") == ["score"]
    assert delta(store).filter(pl.col("workflow_id") == f"credit/{AWKWARD_KEY}").collect().equals(other)


def test_a_reader_that_asks_for_a_time_misses_no_call(local_store: StateStore) -> None:
    """Delta's statistics end at milliseconds: the largest, cut off, would be before the call."""
    local_store.add_calls("credit", "score", calls("answered"))
    assert delta(local_store).filter(pl.col("started") > START).collect().height == 1
    assert delta(local_store).filter(pl.col("started") > START + dt.timedelta(minutes=1)).collect().height == 0


def test_a_table_that_nobody_wrote_is_empty_and_reading_makes_none(store: StateStore) -> None:
    assert store.calls("credit", "score").collect().schema == CALLS_SCHEMA
    assert store.calls("credit", "score", "credit/day").collect().is_empty()
    assert store.callers("credit") == []
    assert not list(store.objects.list("tables"))
    assert store.add_calls("credit", "score", calls())
    assert not list(store.objects.list("tables"))


def test_a_commit_whose_acknowledgement_was_lost_is_there_once(local_store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The naive append, tried again, has every row twice."""
    rows, real, lost = calls("answered", "failed"), DeltaTable.create_write_transaction, []

    def forgetful(*args: Any, **options: Any) -> None:
        real(*args, **options)
        if not lost:
            lost.append(True)
            raise FileNotFoundError("no answer came")

    monkeypatch.setattr(DeltaTable, "create_write_transaction", forgetful)
    assert local_store.add_calls("credit", "score", rows)
    assert lost
    assert delta(local_store).collect().height == 2
    naive = local_store.objects.url("naive")
    for _ in range(2):
        write_deltalake(naive, rows, mode="append")
    assert pl.scan_delta(naive).collect().height == 4


def test_calls_that_the_next_step_tells_again_are_counted_once(local_store: StateStore) -> None:
    killed, own = calls("answered", "failed"), calls("answered", run="run-2")
    local_store.add_calls("credit", "score", killed)
    local_store.add_calls("credit", "score", pl.concat([killed, own]))
    assert local_store.calls("credit", "score").collect().height == 3


def test_a_disk_that_refuses_is_told_and_fails_nothing(
    local_store: StateStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise StoreError("no space left")

    monkeypatch.setattr(CallsTable, "_add", full)
    assert not local_store.add_calls("credit", "score", calls("answered"))
    assert "tables/credit/score_calls" in caplog.text


def test_rows_of_another_schema_are_refused_by_name(local_store: StateStore) -> None:
    with pytest.raises(pl.exceptions.PolarsError, match="outcome"):
        local_store.add_calls("credit", "score", calls("answered").drop("outcome"))


def test_the_table_is_as_the_agents_own(local_store: StateStore) -> None:
    local_store.add_calls("credit", "score", calls("answered"))
    held = DeltaTable(local_store.objects.url("tables/credit/score_calls")).metadata().configuration
    assert held["delta.appendOnly"] == "true"
    assert held["delta.checkpointInterval"] == "5"


def test_the_calls_are_no_finding_of_verify(local_store: StateStore) -> None:
    complete(local_store, "run-1")
    local_store.add_calls("credit", "score", calls("answered"))
    assert verify(local_store).good
    write_deltalake(local_store.objects.url("tables/credit/alien"), pl.DataFrame({"n": [1]}))
    assert not verify(local_store).good


# -- many processes ------------------------------------------------------------------------------------------------------------------

_WRITER = """
import sys
from dagster_mao.state import StateStore
from tests.stores import on_every_store
from tests.state.test_calls import calls
store, name, count = StateStore(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for n in range(count):
    assert store.add_calls("credit", "score", calls("answered", "failed", run=f"{name}-{n}"))
    print(f"{name}-{n}", flush=True)
"""


def _writer(store: StateStore, name: str, count: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), str(Path(__file__).parent)])}
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, store.root, name, str(count)], stdout=subprocess.PIPE, text=True, env=environment
    )


def test_eight_processes_lose_and_double_nothing(local_store: StateStore) -> None:
    writers = [_writer(local_store, f"w{n}", 10) for n in range(8)]
    assert [writer.wait(240) for writer in writers] == [0] * 8
    for writer in writers:
        assert writer.stdout
        writer.stdout.close()
    read = delta(local_store).collect()
    assert (read.height, read["run_id"].n_unique()) == (160, 80)


def test_what_was_acknowledged_survives_the_death_of_the_process(local_store: StateStore) -> None:
    writer = _writer(local_store, "w", 10_000)
    assert writer.stdout
    acknowledged = [writer.stdout.readline().strip() for _ in range(12)]
    os.kill(writer.pid, signal.SIGKILL)
    acknowledged += writer.stdout.read().split()
    writer.wait()
    writer.stdout.close()
    assert set(acknowledged) <= set(delta(local_store).collect()["run_id"])
    assert local_store.add_calls("credit", "score", calls("answered", run="after"))
    read = delta(local_store).collect()
    assert set(read.filter(pl.col("run_id") != "after").group_by("run_id").len()["len"]) == {2}


# -- what calls came to --------------------------------------------------------------------------------------------------------------


def test_what_calls_came_to() -> None:
    first = calls("failed", "answered", "answered", "timed_out", "refused", "reused", "fallback")
    again = calls("answered").with_columns(number=pl.lit(2, pl.Int64), latency_seconds=pl.lit(9.0))
    assert CallSummary.of(pl.concat([first, again])) == CallSummary(
        calls=4,
        tries=5,
        answered=3,
        reused=1,
        failed=1,
        refused=1,
        timed_out=1,
        fallbacks=1,
        error_rate=0.4,
        p50_seconds=2.0,
        p95_seconds=7.8,
        p99_seconds=8.76,
        input_tokens=80,
        output_tokens=8,
        cost=4.0,
    )


def test_one_call_in_two_runs_is_two() -> None:
    assert CallSummary.of(pl.concat([calls("failed"), calls("answered", run="run-2")]).lazy()).calls == 2


def test_no_calls_come_to_nothing() -> None:
    nothing = CallSummary.of(calls())
    assert nothing == CallSummary()
    assert json.loads(nothing.model_dump_json())["p50_seconds"] is None
    assert CallSummary.of(calls("reused", "refused")).error_rate == 0.0
