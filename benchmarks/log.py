"""Does the state log stay healthy by itself? Append, open and read of a version, from 10 to 10 000 seals.

    python benchmarks/log.py [--seals 10000] [--log-only]

Every seal is a real one (snapshot, commit, table) of one record, in workflows of an entry and five agents. Prints medians before each
mark, and the ratio to the first mark: a log that decays shows a growing ratio. What does grow is the agents' tables, by one file a seal,
and Delta reads the list of a table's files to add to it: some 10 microseconds a file.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
import uuid

import polars as pl

from dagster_mao.state import Provenance, Seal, StateStore, staged
from dagster_mao.state.projection import Projection

_MARKS = (10, 100, 1_000, 3_000, 10_000, 30_000)
_WINDOW = 50
_AGENTS = 6  # an entry and five agents, each with a table of its own
_SCHEMA = pl.Schema({"n": pl.Int64})
_PROVENANCE = Provenance(
    contract="Any",
    contract_version="1",
    contract_hash="",
    contract_schema="{}",
    key=None,
    agent_version="1",
    config="",
    model=None,
    seed=0,
    latency_seconds=0.0,
    library_version="",
)


def seal(store: StateStore, number: int) -> tuple[Seal, float]:
    """Seals one record; returns the seal and the seconds from joining the attempt to the acknowledged seal."""
    workflow, agent, run = f"workflow-{number // _AGENTS}", f"agent_{number % _AGENTS}", uuid.uuid4().hex
    started = time.perf_counter()
    attempt = store.open_attempt(pipeline="bench", attempt=run, run_id=run, plan=[agent], entry=agent, workflow_key=workflow)
    with staged(store.objects, pl.DataFrame({"n": [number]})) as batch:
        sealed, _ = attempt.seal(agent, batch, row_count=1, schema=_SCHEMA, parents=[], provenance=_PROVENANCE)
    return sealed, time.perf_counter() - started


def timed_read(store: StateStore, sealed: Seal) -> tuple[float, float]:
    """Seconds to open the log, and to find one version in it and read its verified rows."""
    started = time.perf_counter()
    store.exists()
    opened = time.perf_counter()
    store.read(store.seal_at(sealed.workflow_id, sealed.version)).collect()
    return opened - started, time.perf_counter() - opened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seals", type=int, default=10_000)
    parser.add_argument("--log-only", action="store_true", help="leave the agents' tables alone: what the log itself costs")
    options = parser.parse_args()
    if options.log_only:
        setattr(Projection, "admit", lambda *_: None)  # noqa: B010
        setattr(Projection, "add", lambda *_: None)  # noqa: B010
    first: list[float] | None = None
    appends: list[float] = []
    made: list[Seal] = []
    print(f"{'seals':>7} {'seal ms':>9} {'open ms':>9} {'read ms':>9}   ratio to the first mark        log files")
    with tempfile.TemporaryDirectory() as folder:
        store = StateStore(folder)
        for number in range(options.seals):
            sealed, seconds = seal(store, number)
            made.append(sealed)
            appends.append(seconds)
            if number + 1 in _MARKS:
                reads = [timed_read(store, made[-1 - (n * 7) % len(made)]) for n in range(min(_WINDOW, len(made)))]
                now = [statistics.median(appends[-_WINDOW:]), *(statistics.median(column) for column in zip(*reads, strict=True))]
                first = first or now
                ratios = "  ".join(f"{mine / before:5.2f}" for mine, before in zip(now, first, strict=True))
                files = len(os.listdir(f"{folder}/state_log/_delta_log"))
                print(f"{number + 1:>7,} " + " ".join(f"{value * 1000:>9.1f}" for value in now) + f"   {ratios}   {files:>14}", flush=True)


if __name__ == "__main__":
    main()
