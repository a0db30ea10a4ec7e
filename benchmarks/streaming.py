"""Does a frame-wise pipeline larger than memory stream? Peak memory of entry, agent, checks and seals, against the size of the frame.

    python benchmarks/streaming.py [--records 20000000]

The entry scans Parquet files, the agent works on the LazyFrame; nothing collects a whole frame. What grows with the batch is the check that
keys are unique and conserved: it holds the keys, and nothing else.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import polars as pl
from boundary import Application, Income, applications, income

import dagster_mao as mao
from dagster_mao.run import run
from dagster_mao.state import StateStore

_PART = 1_000_000
_FOLDER = tempfile.mkdtemp(prefix="streaming-")


@mao.agent(name="applications")
def scanned() -> mao.LazyFrame[Application]:
    return pl.scan_parquet(f"{_FOLDER}/part-*.parquet")


PIPELINE = mao.Pipeline("streaming", entry=scanned, agents=[income])


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=20_000_000)
    options = parser.parse_args()
    part = applications(_PART)
    parts = max(1, options.records // _PART)
    for number in range(parts):
        ids = pl.format("{}-{}", pl.lit(number), pl.col("application_id"))
        part.with_columns(application_id=ids).write_parquet(f"{_FOLDER}/part-{number:04}.parquet")
    frame_mb, before, started = parts * part.estimated_size("mb"), peak_mb(), time.perf_counter()
    result = run(PIPELINE, store=StateStore(Path(_FOLDER) / "state"))
    print(f"{parts * _PART:,} records: a frame of {frame_mb:,.0f} MB in memory")
    print(f"peak memory {peak_mb():,.0f} MB ({before:,.0f} MB before the run), {time.perf_counter() - started:.0f} s")
    print(f"sealed {result.seals['income'].row_count:,} records of {Income.__name__}")


if __name__ == "__main__":
    main()
