"""What does a suite cost? CPU seconds over 100 000 and 1 000 000 records of 10 columns, against Great Expectations over the whole frame.

    python benchmarks/expectations.py [--rows 100000 1000000] [--skip-naive]

The suite is a typical one: ten expectations, two of them about drift. `suite` is all that a step pays for it after the import: reading the
columns that are asked about from the staged snapshot, the values of the version before, and GX. `naive` is what tutorials do: the whole
frame to pandas, its list column included, and validate. The import is paid once per process.
"""

from __future__ import annotations

import argparse
import io
import resource
import tempfile
import time
from contextlib import redirect_stderr
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
from pydantic import BaseModel

import dagster_mao as mao
from dagster_mao.contract import Contract
from dagster_mao.expectations import Expectations, Suite


class Decision(BaseModel):
    application_id: Annotated[str, mao.Key]
    score: float
    amount: int
    income: float | None
    months: int
    rate: float
    grade: str
    purpose: str
    approved: bool
    reasons: list[str]


def _one(kind: str, severity: str = "critical", **arguments: Any) -> dict[str, Any]:
    return {"type": f"expect_{kind}", "kwargs": arguments, "severity": severity}


SUITE = [
    _one("table_row_count_to_be_between", min_value={"$PARAMETER": "previous_row_count * 0.5"}),
    _one("column_mean_to_be_between", column="score", min_value=580, max_value=620),
    _one("column_median_to_be_between", column="amount", min_value=500, max_value=20_000),
    _one("column_stdev_to_be_between", column="score", max_value=100),
    _one(
        "column_quantile_values_to_be_between",
        column="amount",
        quantile_ranges={"quantiles": [0.05, 0.95], "value_ranges": [[0, 2_000], [0, 20_000]]},
    ),
    _one("column_mean_to_be_between", column="approved", min_value=0.4, max_value=0.8),
    _one("column_values_to_not_be_null", column="income", mostly=0.9),
    _one("column_values_to_be_between", column="rate", min_value=0.01, max_value=0.99, mostly=0.9),
    _one("column_distinct_values_to_be_in_set", column="grade", value_set=["low", "medium", "high"]),
    _one("column_pair_values_a_to_be_greater_than_b", column_A="amount", column_B="months"),
]
DRIFT = [
    _one(
        "column_kl_divergence_to_be_less_than",
        "warning",
        column=name,
        partition_object={"$PARAMETER": f"previous_partition_{name}"},
        threshold=0.1,
    )
    for name in ("score", "purpose")
]


def batch(rows: int) -> pl.DataFrame:
    """Ten columns, among them a key, a nullable number and a list."""
    random = np.random.default_rng(0)
    frame = pl.DataFrame(
        {
            "application_id": [f"app-{n:08d}" for n in range(rows)],
            "score": random.normal(600, 50, rows),
            "amount": random.integers(100, 20_000, rows),
            "income": random.normal(4_000, 500, rows),
            "months": random.integers(1, 73, rows),
            "rate": random.random(rows),
            "grade": random.choice(["low", "medium", "high"], rows),
            "purpose": random.choice(["car", "furniture", "education", "repairs"], rows),
            "approved": random.random(rows) < 0.6,
        }
    )
    income = pl.when(pl.col("rate") > 0.02).then("income")
    return frame.with_columns(income=income, reasons=pl.concat_list("grade", "purpose"))


def suite(path: Path) -> list[bool]:
    """As a step does it: the batch and the version before are Parquet files."""
    made = Suite.of(Expectations([*SUITE, *DRIFT]), Contract.of(Decision), agent="approval", home=Path())
    return [finding.passed for finding in made.judge(pl.scan_parquet(path), pl.scan_parquet(path))]


def naive(path: Path) -> list[bool]:
    """As tutorials do it, without the drift, for which they have nothing to compare with."""
    import great_expectations as gx
    import pandas as pd
    from great_expectations.expectations.expectation_configuration import ExpectationConfiguration

    frame = pd.DataFrame(pl.read_parquet(path).to_dict(as_series=False))
    asset = gx.get_context(mode="ephemeral").data_sources.add_pandas("all").add_dataframe_asset("all")
    validated = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": frame})
    expectations = [ExpectationConfiguration(type=one["type"], kwargs=one["kwargs"]).to_domain_obj() for one in SUITE[1:]]
    with redirect_stderr(io.StringIO()):  # it draws progress bars
        results = validated.validate(gx.ExpectationSuite("all", expectations=expectations)).results
    return [bool(result.success) for result in results]


def cpu(work: Any, *arguments: Any) -> float:
    """CPU seconds, of all threads."""
    started = time.process_time()
    passed = work(*arguments)
    assert all(passed), passed
    return time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--skip-naive", action="store_true", help="it takes 2 GB at 1 000 000 records")
    options = parser.parse_args()
    started = time.process_time()
    import great_expectations  # noqa: F401

    print(f"import great_expectations: {time.process_time() - started:.1f} CPU s")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "warm.parquet"
        batch(1_000).write_parquet(path)
        suite(path)  # what is imported at first use
        print(f"{'records':>10} {'':<28} {'CPU s':>7} {'peak MB':>9}")
        for rows in options.rows:
            path = Path(folder) / f"{rows}.parquet"
            batch(rows).write_parquet(path)
            runs = [("suite (12 expectations)", lambda path=path: min(cpu(suite, path) for _ in range(3)))]
            runs += [] if options.skip_naive else [("naive (9 of them)", lambda path=path: cpu(naive, path))]
            for name, measure in runs:
                seconds = measure()
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
                print(f"{rows:>10,} {name:<28} {seconds:>7.2f} {peak:>9,.0f}", flush=True)


if __name__ == "__main__":
    main()
