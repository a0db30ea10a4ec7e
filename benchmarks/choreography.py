"""What choreography costs without any scheduler: versions drained, ticks against the length of the log, events taken in.

    python benchmarks/choreography.py [--versions 10000]     # a backlog drained in one process: versions a second, runs
    python benchmarks/choreography.py --ticks                # own part of a tick, at logs of 1 000 to 100 000 versions
    python benchmarks/choreography.py --inbox [--minutes 10] [--rate 50]

The agents do next to nothing, so that what is measured is ours. A tick is measured on a log as its own compaction leaves it (written in
bulk, since making 100 000 seals takes an hour), plus fifty seals that were made one by one; `CPU` is that of the process. Events come
from eight processes, at their time whether or not the one before was accepted; one process cuts and takes in, a workflow every few
seconds, another lets the agents react. It ends with what is in the stores, and with exit code 1 if an event is missing, or twice.
"""

from __future__ import annotations

import argparse
import datetime as dt
import multiprocessing
import os
import sqlite3
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import sqlalchemy as sa
from deltalake import CommitProperties, Transaction
from pydantic import BaseModel, Field

import dagster_mao as mao
from dagster_mao.choreography import cut, drain, enter, lag, run_batch, run_inbox, subscribers, tick
from dagster_mao.choreography._tables import INBOX, shared
from dagster_mao.state import Seal, StateStore
from dagster_mao.state.attempt import next_seal
from dagster_mao.state.log import SCHEMA, StateLog
from dagster_mao.state.verify import verify

WRITERS = 8
MARKS = (1_000, 10_000, 50_000, 100_000)
AT_ONCE = 10_000  # rows of a merged file


class Application(BaseModel):
    id: Annotated[str, mao.Key]
    amount: float = Field(gt=0)


class Verdict(BaseModel):
    id: Annotated[str, mao.Key]
    value: float


@mao.agent(quarantine=mao.Quarantine(max_share=1))
def applications() -> list[Application]:
    return []


def told(frame: mao.LazyFrame[Any]) -> Any:
    return frame.select("id", value=pl.col(frame.collect_schema().names()[1]))


@mao.agent
def score(applications: mao.LazyFrame[Application]) -> mao.LazyFrame[Verdict]:
    return told(applications)


@mao.agent
def income(applications: mao.LazyFrame[Application]) -> mao.LazyFrame[Verdict]:
    return told(applications)


@mao.agent
def risk(score: mao.LazyFrame[Verdict], income: mao.LazyFrame[Verdict]) -> mao.LazyFrame[Verdict]:
    return score.join(income, on="id").select("id", value=pl.col("value") + pl.col("value_right"))


@mao.agent
def approval(risk: mao.LazyFrame[Verdict]) -> mao.LazyFrame[Verdict]:
    return risk


PIPELINE = mao.Pipeline(
    "bench", entry=applications, agents=[score, income, risk, approval], mode="choreography", inbox=mao.MicroBatch(size=500, wait=5)
)
AGENTS = PIPELINE.order


# -- a backlog -----------------------------------------------------------------------------------------------------------------------


def backlog(versions: int) -> None:
    workflows = versions // (len(AGENTS) - 1)
    with tempfile.TemporaryDirectory() as folder:
        store = StateStore(folder)
        records = [{"id": f"A{number}", "amount": 1.0 + number} for number in range(10)]
        started = time.perf_counter()
        for number in range(workflows):
            enter(store, PIPELINE, records, workflow=f"w{number:05}")
        print(f"{workflows:,} workflows of 10 records entered in {time.perf_counter() - started:,.0f} s", flush=True)
        with measured() as spent:
            drained = drain(store, PIPELINE)
        done = drained.count("done")
        print(
            f"{done:,} versions drained in {drained.runs} runs: {spent['wall']:,.0f} s, {done / spent['wall']:,.1f} versions/s; "
            f"{spent['cpu'] / done * 1000:,.1f} ms CPU each"
        )
        assert done == workflows * (len(AGENTS) - 1)


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    spent: dict[str, float] = {}
    wall, cpu = time.perf_counter(), time.process_time()
    yield spent
    spent |= {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


# -- ticks ---------------------------------------------------------------------------------------------------------------------------


def ticks() -> None:
    print(f"{'versions':>9} {'workflows':>9}   {'idle':>18}   {'ten new':>18}   {'first look':>18}   {'lag, all':>18}   (ms: wall, CPU)")
    with tempfile.TemporaryDirectory() as folder:
        store, written = StateStore(folder), 0
        (first,) = [enter(store, PIPELINE, [{"id": "A", "amount": 1.0}], workflow="first")]
        for mark in MARKS:
            while written < mark:
                written += bulk(store, first, written)
            for number in range(50):  # the tail that no merge has reached yet
                enter(store, PIPELINE, [{"id": "A", "amount": 1.0}], workflow=f"tail-{mark}-{number}")
            look = several(lambda: tick(store, PIPELINE, "score", rebuild=True), 3)
            close(store)
            idle = several(lambda: tick(store, PIPELINE, "score"), 20)
            new = several(lambda: tick(store, PIPELINE, "score"), 10, before=lambda: ten(store))
            for one in subscribers(PIPELINE):
                tick(store, PIPELINE, one.agent)
            all_ = several(lambda: lag(store, PIPELINE), 3)
            workflows = written // len(AGENTS)
            shown = "   ".join(f"{wall:>8,.0f} {cpu:>9,.0f}" for wall, cpu in (idle, new, look, all_))
            print(f"{written:>9,} {workflows:>9,}   {shown}", flush=True)


def bulk(store: StateStore, like: Seal, start: int) -> int:
    """Workflows that are done, as a merged file of the log with them would be."""
    log = StateLog(store.objects)
    rows, transactions = list[Seal](), list[Transaction]()
    for number in range(AT_ONCE // len(AGENTS) if start else MARKS[0] // len(AGENTS)):
        name, seals = f"bench/{start:07}-{number:05}", list[Seal]()
        for agent in AGENTS:
            parents = tuple(seal.as_parent for seal in seals if seal.agent in {one.upstream for one in PIPELINE.inputs_of(agent)})
            kind = "output" if parents else "entry"
            same = {"workflow_id": name, "agent": agent, "kind": kind, "parents": parents, "sealed_at": dt.datetime.now(dt.timezone.utc)}
            row = like.model_dump(exclude={"version", "epoch", "previous_digest", "seal_digest"}) | same
            seals.append(next_seal(seals, row))
        rows += seals
        transactions.append(Transaction(name, len(seals) - 1))
    table = log.open()
    assert table is not None
    prefix = f"{table.version() + 1}-" if start else ""
    add = log._write(pl.DataFrame([seal.model_dump() for seal in rows], schema=SCHEMA), new=True, prefix=prefix)
    table.create_write_transaction([add], "append", table.schema(), commit_properties=CommitProperties(app_transactions=transactions))
    return len(rows)


def ten(store: StateStore) -> None:
    for _ in range(10):
        enter(store, PIPELINE, [{"id": "A", "amount": 1.0}], workflow=f"new-{time.time_ns()}")


def close(store: StateStore) -> None:
    """What was cut is as if it were done: whoever waits is not what is measured."""
    with shared(store).transaction() as connection:
        connection.execute(sa.text("UPDATE mao_batches SET is_open = 0"))
        connection.execute(sa.text("UPDATE mao_deliveries SET state = 'done'"))


def several(call: Callable[[], Any], times: int, before: Callable[[], None] = lambda: None) -> tuple[float, float]:
    """Median milliseconds, by the clock and by CPU."""
    found = []
    for _ in range(times):
        before()
        with measured() as spent:
            call()
        found.append((spent["wall"] * 1000, spent["cpu"] * 1000))
    return statistics.median(wall for wall, _ in found), statistics.median(cpu for _, cpu in found)


# -- events --------------------------------------------------------------------------------------------------------------------------


def write(folder: str, writer: int, rate: float, seconds: float, results: Any) -> None:
    """Submits its share of the events, each at its time. One in a hundred is bad, one in a hundred comes twice."""
    store, took, late = StateStore(folder), list[float](), 0.0
    mine = range(writer, int(rate * seconds), WRITERS)
    begin = time.time()
    for number in mine:
        due = begin + number / rate
        time.sleep(max(0.0, due - time.time()))
        event = {"id": f"A{number}", "amount": -1.0 if number % 100 == 7 else 1.0 + number}
        for _ in range(2 if number % 100 == 11 else 1):
            started = time.perf_counter()
            mao.submit(store, PIPELINE, event)
            took.append(time.perf_counter() - started)
        late = max(late, time.time() - due)
    results.put((took, late))


def take_in(folder: str, until: Any) -> None:
    store = StateStore(folder)
    while True:
        is_last = until.is_set()
        for batch in cut(store, PIPELINE, every=1.0):
            run_inbox(store, PIPELINE, batch.run_key, run_id=batch.run_key)
        with shared(store).reading() as connection:
            if is_last and not connection.scalar(sa.select(sa.func.count()).where(INBOX.c.is_open)):
                return
        time.sleep(1.0)


def react(folder: str, until: Any) -> None:
    store = StateStore(folder)
    while True:
        is_last, did = until.is_set(), 0
        for one in subscribers(PIPELINE):
            for batch in tick(store, PIPELINE, one.agent, every=1.0):
                did += len(list(run_batch(store, PIPELINE, one.agent, batch.run_key, run_id=batch.run_key)))
        if is_last and not did and not any(state.due for state in lag(store, PIPELINE)):
            return
        time.sleep(1.0)


def inbox(minutes: float, rate: float) -> int:
    processes = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        store, seconds = StateStore(folder), minutes * 60
        written, taken, results = processes.Event(), processes.Event(), processes.Queue()
        taker = processes.Process(target=take_in, args=(folder, written))
        reactor = processes.Process(target=react, args=(folder, taken))
        writers = [processes.Process(target=write, args=(folder, number, rate, seconds, results)) for number in range(WRITERS)]
        for one in (taker, reactor, *writers):
            one.start()
        backlog, told = [], []
        while any(one.is_alive() for one in writers):
            time.sleep(5.0)
            while not results.empty():
                told.append(results.get())
            with shared(store).reading() as connection:
                backlog.append(connection.scalar(sa.select(sa.func.count()).where(INBOX.c.is_open)) or 0)
        while len(told) < WRITERS:
            told.append(results.get())
        written.set()
        started = time.perf_counter()
        taker.join()
        left = time.perf_counter() - started
        taken.set()
        reactor.join()
        return report(store, int(rate * seconds), told, backlog, left)


def report(store: StateStore, events: int, told: list[tuple[list[float], float]], backlog: list[int], left: float) -> int:
    took = sorted(second for part, _ in told for second in part)
    median, most, longest = (took[int(len(took) * share) - 1] * 1000 for share in (0.5, 0.99, 1.0))
    print(f"{events:,} events of {WRITERS} writers; a submit: median {median:.1f} ms, 99 % {most:.1f} ms, longest {longest:,.0f} ms")
    print(f"the latest was accepted {max(late for _, late in told):.1f} s after its time; {max(backlog):,} in the inbox at most")
    print(f"{left:.1f} s from the last event to an empty inbox")
    keys, bad, waits, complete = list[str](), 0, list[float](), 0
    with shared(store).reading() as connection:
        arrived = dict(connection.execute(sa.select(INBOX.c.batch, sa.func.min(INBOX.c.at)).group_by(INBOX.c.batch)).all())
    workflows = store.workflows("bench")
    for workflow in workflows:
        entry = store.seals(workflow)[0]
        aside = store.quarantine(entry)["record"].to_list()
        keys, bad = [*keys, *store.read(entry).collect()["id"], *aside], bad + len(aside)
        waits.append(entry.sealed_at.timestamp() - arrived[workflow.removeprefix("bench/events-")])
        complete += store.effective(workflow).keys() == set(AGENTS)
    print(f"{len(workflows)} workflows, all agents sealed {complete}; {len(keys):,} events sealed, {bad:,} of them in quarantine")
    print(f"from a batch's first event to the seal: median {statistics.median(waits):.1f} s, longest {max(waits):.1f} s")
    is_whole = sorted(keys) == sorted(f"A{number}" for number in range(events))
    print("no event is missing, and none is there twice" if is_whole else "EVENTS ARE MISSING, OR THERE TWICE")
    return 0 if is_whole and complete == len(workflows) and is_sound(store) else 1


def is_sound(store: StateStore) -> bool:
    file, log = Path(str(store.database)), Path(store.root) / "state_log"
    with sqlite3.connect(file) as connection:
        (sound,) = connection.execute("PRAGMA integrity_check").fetchone()
    database = sum(one.stat().st_size for one in file.parent.glob(f"{file.name}*"))
    commits, files = len(os.listdir(log / "_delta_log")), len(list(log.glob("*.parquet")))
    findings = verify(store).findings
    print(f"database {database / 1e6:.1f} MB, integrity {sound}; log: {files} files, {commits} commits; verify: {len(findings)} findings")
    return sound == "ok" and not findings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=10_000)
    parser.add_argument("--ticks", action="store_true")
    parser.add_argument("--inbox", action="store_true")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rate", type=float, default=50)
    options = parser.parse_args()
    if options.inbox:
        sys.exit(inbox(options.minutes, options.rate))
    ticks() if options.ticks else backlog(options.versions)


if __name__ == "__main__":
    main()
