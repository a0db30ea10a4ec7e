"""What looking back costs: the first bad of 10 000 versions, against looking at all; one record among 1 000 000 of five agents, against a
plain scan of the same files; `verify`, against sha256sum of them.

    python benchmarks/review.py [--versions 10000] [--records 1000000] [--keep FOLDER] [--large]     # --large: without the bisection

The history is seeded: an entry and a decision per workflow, 100 applications each; from one version on another release of the agent
approves what one rule forbids. It is written many seals at a time, in files as compaction would leave them, because 20 000 seals take half
an hour; rows and digests are those of real seals. The five agents are sealed as they always are. Prints seconds by the wall and of CPU,
and what was read: versions, files, megabytes. A cold process is one that is started for it, interpreter and imports included; the files
are in the page cache in all cases. Medians of five.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import polars as pl
from deltalake import CommitProperties, Transaction
from pydantic import BaseModel, Field

import dagster_mao as mao
from dagster_mao.review import Bisection, as_of, bisect
from dagster_mao.review.history import with_record
from dagster_mao.state import Provenance, Seal, StateStore, staged
from dagster_mao.state.log import SCHEMA
from dagster_mao.state.objects import Objects
from dagster_mao.state.projection import Projection
from dagster_mao.state.verify import verify

PIPELINE, RULE = "lending", "amount <= 15000 or not approved"
APPLICATIONS, AT_A_TIME = 100, 1000
LARGE, AGENTS = "large/day", ["entry", "score", "income", "risk", "approval"]


class Decision(BaseModel):
    id: Annotated[str, mao.Key]
    amount: int
    score: int = Field(ge=300, le=850)
    approved: bool


def provenance(agent: str, version: str) -> Provenance:
    fields = [{"name": name, "personal": False} for name in Decision.model_fields]
    return Provenance(
        contract="Decision",
        contract_version="1",
        contract_hash="c" * 64,
        contract_schema=json.dumps({"name": "Decision", "version": "1", "fields": fields}),
        key="id",
        agent_version=version,
        config="",
        model=None,
        seed=0,
        latency_seconds=0.0,
        library_version="bench",
    )


def applications(number: int) -> pl.DataFrame:
    """The first one is always too large to be approved."""
    chance = random.Random(number)
    amounts = [20_000, *(chance.randrange(500, 18_000) for _ in range(APPLICATIONS - 1))]
    scores = [chance.randrange(300, 850) for _ in amounts]
    return pl.DataFrame({"id": [f"app-{number:05}-{n:03}" for n in range(APPLICATIONS)], "amount": amounts, "score": scores})


def decided(frame: pl.DataFrame, *, good: bool) -> pl.DataFrame:
    worthy = pl.col("score") >= 300
    return frame.with_columns(approved=worthy & (pl.col("amount") <= 15_000) if good else worthy)


def seed(store: StateStore, versions: int, first_bad: int) -> None:
    """Writes the history, `AT_A_TIME` workflows in one commit of the log."""
    template = _template(store)
    for start in range(0, versions, AT_A_TIME):
        seals = [seal for n in range(start, min(start + AT_A_TIME, versions)) for seal in _workflow(store, template, n, n < first_bad)]
        table = store._log.open() or store._log._create()
        last = {seal.workflow_id: seal.version for seal in seals}
        transactions = [Transaction(workflow, version) for workflow, version in last.items()]
        table.create_write_transaction(
            [store._log._write(pl.DataFrame([seal.model_dump() for seal in seals], schema=SCHEMA), new=True)],
            "append",
            table.schema(),
            commit_properties=CommitProperties(app_transactions=transactions),
        )


def _template(store: StateStore) -> Seal:
    attempt = store.open_attempt(pipeline="template", attempt="t", run_id="t", plan=["entry"], entry="entry", workflow_key="t")
    frame = applications(0)
    with staged(store.objects, frame) as batch:
        told = provenance("entry", "1")
        return attempt.seal("entry", batch, row_count=1, schema=frame.schema, parents=[], provenance=told)[0]


def _workflow(store: StateStore, template: Seal, number: int, good: bool) -> list[Seal]:
    workflow, entry = f"{PIPELINE}/{number:05}", applications(number)
    common = {
        "workflow_id": workflow,
        "pipeline": PIPELINE,
        "plan": ("entry", "approval"),
        "run_id": f"run-{number}",
        "attempt": f"run-{number}",
    }
    at = template.sealed_at.__class__.now(template.sealed_at.tzinfo)
    first = _sealed(store, template, entry, {**common, "agent": "entry", "sealed_at": at})
    release = "1.4.0" if good else "1.5.0"
    told = {"agent": "approval", "kind": "output", "version": 1, "parents": (first.as_parent,), "agent_version": release}
    second = {**common, **told, "previous_digest": first.seal_digest, "sealed_at": at}
    return [first, _sealed(store, template, decided(entry, good=good), second)]


def _sealed(store: StateStore, template: Seal, frame: pl.DataFrame, row: dict[str, Any]) -> Seal:
    buffer = io.BytesIO()
    frame.write_parquet(buffer, compression="zstd")
    data = buffer.getvalue()
    digest = hashlib.sha256(data).hexdigest()
    path = f"tables/{PIPELINE}/{row['agent']}/{row['workflow_id'].replace('/', '%2F')}/{digest}.parquet"
    file = Path(store.root) / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    of_file = {"path": path, "digest": digest, "size_bytes": len(data), "row_count": frame.height}
    return template.model_copy(update={**row, **of_file}).signed()


class Reads:
    """What is read of snapshots while it is entered."""

    def __enter__(self) -> Reads:
        self.files = self.bytes = 0
        self._get = get = Objects.get

        def counted(objects: Objects, path: str) -> bytes:
            data = get(objects, path)
            if path.startswith("tables/"):
                self.files, self.bytes = self.files + 1, self.bytes + len(data)
            return data

        Objects.get = counted  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        Objects.get = self._get  # type: ignore[method-assign]


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    result = run()
    return result, time.perf_counter() - wall, time.process_time() - cpu


def small(rows: pl.LazyFrame) -> bool:
    return bool(rows.select(((pl.col("amount") <= 15_000) | ~pl.col("approved")).all()).collect().item())


def bisects(store: StateStore, versions: int, first_bad: int) -> None:
    print(f"\nThe first bad of {versions:,} versions (ceil(log2({versions - 1})) = {math.ceil(math.log2(versions - 1))})")
    print(f"{'':<28} {'looks: ends':>11} {'between':>8} {'files':>6} {'MB':>7} {'wall s':>8} {'CPU s':>7}")
    ways: list[tuple[str, Any, dict[str, Any]]] = [
        ("expression", RULE, {}),
        ("function", small, {}),
        ("expression, 20 spot checks", RULE, {"spot_checks": 20}),
        ("expression, --linear", RULE, {"linear": True}),
    ]
    for name, good, options in ways:
        with Reads() as reads:
            found, wall, cpu = timed(lambda good=good, options=options: bisect(store, PIPELINE, good, agent="approval", **options))
        assert isinstance(found, Bisection)
        assert found.first_bad is not None
        assert found.first_bad.workflow_id == f"{PIPELINE}/{first_bad:05}", found.first_bad.reference
        assert ("approval", "code", "1.4.0", "1.5.0") in [(one.agent, one.what, one.before, one.after) for one in found.changes]
        between = found.searched + found.spot_checked
        print(f"{name:<28} {found.ends:>11} {between:>8,} {reads.files:>6,} {reads.bytes / 1e6:>7.2f} {wall:>8.2f} {cpu:>7.2f}", flush=True)
    states, wall, cpu = timed(lambda: as_of(store, PIPELINE))
    print(f"as_of all {len(states):,} workflows: {wall:.2f} s, {cpu:.2f} CPU s")


def seal_large(store: StateStore, records: int) -> None:
    n = pl.int_range(records)
    frame = pl.select(pl.format("app-{}", n).alias("id"), *((n * field % 997).alias(f"f{field}") for field in range(9)))
    attempt = store.open_attempt(pipeline="large", attempt="a", run_id="a", plan=AGENTS, entry="entry", workflow_key="day")
    for agent in AGENTS:
        rows = frame.sample(fraction=1.0, shuffle=True, seed=len(agent))
        with staged(store.objects, rows) as batch:
            attempt.seal(agent, batch, row_count=records, schema=rows.schema, parents=[], provenance=provenance(agent, "1"))


def large(store: StateStore, records: int) -> None:
    """One record through five agents, and all of their bytes; each beside what it cannot be quicker than."""
    key, seals = f"app-{records // 2}", list(store.effective(LARGE).values())
    files = [str(Path(store.root) / str(seal.path)) for seal in seals]
    size = sum(seal.size_bytes for seal in seals) / 1e6
    scan = "import polars as pl, sys; [pl.scan_parquet(f).filter(pl.col('id') == sys.argv[1]).collect() for f in sys.argv[2:]]"
    command = [str(Path(sys.executable).with_name("dagster-mao"))]
    found = {
        "one record: plain polars scans": lambda: [pl.scan_parquet(file).filter(pl.col("id") == key).collect() for file in files],
        "one record: with_record": lambda: with_record(store, seals, key),
        "  cold: python -c plain polars scans": lambda: process([sys.executable, "-c", scan, key, *files]),
        "  cold: dagster-mao show --record": lambda: process([*command, "show", LARGE, "--record", key, "--root", store.root]),
        "  cold: dagster-mao history": lambda: process([*command, "history", LARGE, "--root", store.root]),
        "all bytes: hashlib": lambda: [hashlib.sha256(Path(file).read_bytes()).digest() for file in files],
        "all bytes: verify": lambda: verify(store, LARGE),
        "  cold: sha256sum": lambda: process(["sha256sum", *files]),
        "  cold: dagster-mao verify": lambda: process([*command, "verify", LARGE, "--root", store.root]),
    }
    assert len(with_record(store, seals, key)) == len(AGENTS)
    assert verify(store, LARGE).good
    print(f"\n{records:,} records x {len(AGENTS)} agents ({size:.0f} MB){'':10} {'wall s':>8} {'CPU s':>7} {'MB/s, wall':>11} {'CPU':>6}")
    for name, run in found.items():
        walls, cpus = zip(*(spent(run) for _ in range(5)), strict=True)
        wall, cpu = statistics.median(walls), statistics.median(cpus)
        print(f"{name:<44} {wall:>8.2f} {cpu:>7.2f} {size / wall:>11,.0f} {size / cpu:>6,.0f}", flush=True)


def process(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def spent(run: Callable[[], Any]) -> tuple[float, float]:
    """Seconds by the wall and of CPU, of this process and of those that it waited for."""
    before, started = os.times(), time.perf_counter()
    run()
    now = os.times()
    return time.perf_counter() - started, sum(now[:4]) - sum(before[:4])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--versions", type=int, default=10_000)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--keep", help="the folder of the store, which then stays, and is used again")
    parser.add_argument("--large", action="store_true", help="only the record among 1 000 000, and verify")
    options = parser.parse_args()
    setattr(Projection, "admit", lambda *_: None)  # noqa: B010  the tables are for other readers
    setattr(Projection, "add", lambda *_: None)  # noqa: B010
    first_bad = options.versions * 7 // 10
    with nullcontext(options.keep) if options.keep else tempfile.TemporaryDirectory() as folder:
        store = StateStore(folder)
        if not options.large:
            if not store.workflows(PIPELINE):
                _, wall, _ = timed(lambda: seed(store, options.versions, first_bad))
                print(f"seeded {2 * options.versions:,} versions in {wall:.0f} s", flush=True)
            bisects(store, options.versions, first_bad)
        if LARGE not in store.workflows("large"):
            seal_large(store, options.records)
        large(store, options.records)


if __name__ == "__main__":
    main()
