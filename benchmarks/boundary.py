"""What a boundary costs: five frame-wise agents with contracts, digests and seals, against raw zstd Parquet + fsync of the same frames.

    python benchmarks/boundary.py [records ...]

Both do the same polars work and write the same six frames; the floor validates nothing, hashes nothing, keeps no log. Prints medians over
interleaved repetitions, their ratio, and what a boundary costs beyond the floor.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import polars as pl
from pydantic import BaseModel, Field

import dagster_mao as mao
from dagster_mao.run import run
from dagster_mao.state import StateStore

_DATA = Path(__file__).parent.parent / "data" / "german_credit.csv"


class Application(BaseModel):
    application_id: Annotated[str, mao.Key] = Field(min_length=1, max_length=20)
    amount: int = Field(gt=0, le=1_000_000)
    months: int = Field(ge=1, le=120)
    rate: int = Field(ge=1, le=4)
    age: int = Field(ge=18, le=120)
    purpose: str = Field(min_length=1, max_length=80)
    housing: str = Field(min_length=1)
    job: str
    existing_credits: int = Field(ge=0, le=50)
    telephone: str


class Score(BaseModel):
    application_id: Annotated[str, mao.Key]
    score: int = Field(ge=300, le=850)
    band: str = Field(min_length=1, max_length=10)


class Income(BaseModel):
    application_id: Annotated[str, mao.Key]
    monthly_income: float = Field(gt=0)
    instalment: float = Field(gt=0)


class Fraud(BaseModel):
    application_id: Annotated[str, mao.Key]
    fraud_probability: float = Field(ge=0, le=1)


class Risk(BaseModel):
    application_id: Annotated[str, mao.Key]
    risk: float = Field(ge=0, le=1)
    instalment_share: float = Field(ge=0)


class Decision(BaseModel):
    application_id: Annotated[str, mao.Key]
    approved: bool
    reason: str = Field(min_length=1, max_length=40)


def _score(applications: pl.LazyFrame) -> pl.LazyFrame:
    points = (700 - pl.col("months") * 3 + pl.col("age") - pl.col("existing_credits") * 10).clip(300, 850).cast(pl.Int64)
    return applications.select("application_id", score=points).with_columns(
        band=pl.when(pl.col("score") > 650).then(pl.lit("good")).otherwise(pl.lit("poor"))
    )


def _income(applications: pl.LazyFrame) -> pl.LazyFrame:
    instalment = pl.col("amount") / pl.col("months")
    return applications.select("application_id", monthly_income=instalment * (pl.col("rate") + 1), instalment=instalment)


def _fraud(applications: pl.LazyFrame) -> pl.LazyFrame:
    return applications.select("application_id", fraud_probability=(pl.col("amount") / 1_000_000).clip(0.0, 1.0))


def _risk(score: pl.LazyFrame, income: pl.LazyFrame) -> pl.LazyFrame:
    return score.join(income, on="application_id", how="inner", maintain_order="left").select(
        "application_id", risk=1 - (pl.col("score") - 300) / 550, instalment_share=pl.col("instalment") / pl.col("monthly_income")
    )


def _decide(risk: pl.LazyFrame, fraud: pl.LazyFrame) -> pl.LazyFrame:
    approved = (pl.col("risk") < 0.5) & (pl.col("fraud_probability") < 0.1)
    return risk.join(fraud, on="application_id", how="inner", maintain_order="left").select(
        "application_id", approved=approved, reason=pl.when(approved).then(pl.lit("within limits")).otherwise(pl.lit("too risky"))
    )


@mao.agent
def score(applications: mao.LazyFrame[Application]) -> mao.LazyFrame[Score]:
    return _score(applications)


@mao.agent
def income(applications: mao.LazyFrame[Application]) -> mao.LazyFrame[Income]:
    return _income(applications)


@mao.agent
def fraud(applications: mao.LazyFrame[Application]) -> mao.LazyFrame[Fraud]:
    return _fraud(applications)


@mao.agent
def risk(score: mao.LazyFrame[Score], income: mao.LazyFrame[Income]) -> mao.LazyFrame[Risk]:
    return _risk(score, income)


@mao.agent
def decision(risk: mao.LazyFrame[Risk], fraud: mao.LazyFrame[Fraud]) -> mao.LazyFrame[Decision]:
    return _decide(risk, fraud)


PIPELINE = mao.Pipeline(
    "bench", entry=mao.ExternalEntry("applications", contract=Application), agents=[score, income, fraud, risk, decision]
)


def applications(records: int) -> pl.DataFrame:
    """Real applications, resampled with a seed."""
    real = pl.read_csv(_DATA).select(
        amount=pl.col("credit_amount"),
        months=pl.col("duration_in_month"),
        rate=pl.col("installment_rate_in_percentage_of_disposable_income"),
        age=pl.col("age_in_years"),
        purpose=pl.col("purpose"),
        housing=pl.col("housing"),
        job=pl.col("job"),
        existing_credits=pl.col("number_of_existing_credits_at_this_bank"),
        telephone=pl.col("telephone"),
    )
    sample = real.sample(records, with_replacement=True, seed=7)
    ids = pl.int_range(records, eager=True).cast(pl.String).str.zfill(9).alias("application_id")
    return sample.insert_column(0, ids).select(list(Application.model_fields))


def floor(frame: pl.DataFrame, folder: Path) -> None:
    """The same frames, each written and read back as the next stage's input."""

    def write(name: str, lazy: pl.LazyFrame) -> pl.LazyFrame:
        path = folder / f"{name}.parquet"
        lazy.sink_parquet(path, compression="zstd", sync_on_close="all")
        return pl.scan_parquet(path)

    entry = write("applications", frame.lazy())
    scored, earned, suspected = write("score", _score(entry)), write("income", _income(entry)), write("fraud", _fraud(entry))
    write("decision", _decide(write("risk", _risk(scored, earned)), suspected))


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="*", type=int, default=[1, 1_000, 100_000, 1_000_000])
    parser.add_argument("--repeat", type=int, default=7)
    options = parser.parse_args()
    boundaries = len(PIPELINE.order)
    print(f"{'records':>10} {'floor s':>9} {'sealed s':>9} {'ratio':>7} {'ms per boundary beyond the floor':>34}")
    for records in options.records:
        frame = applications(records)
        floors, sealed = [], []
        with tempfile.TemporaryDirectory() as folder:
            store = StateStore(f"{folder}/state")
            for turn in range(options.repeat + 1):
                one, other = timed(lambda f=frame, d=folder: floor(f, Path(d))), timed(lambda f=frame, s=store: run(PIPELINE, f, store=s))
                if turn:  # the first turn warms up
                    floors.append(one)
                    sealed.append(other)
        low, ours = statistics.median(floors), statistics.median(sealed)
        ratio = statistics.median(o / f for o, f in zip(sealed, floors, strict=True))
        print(f"{records:>10,} {low:>9.3f} {ours:>9.3f} {ratio:>7.2f} {(ours - low) / boundaries * 1000:>34.1f}")


if __name__ == "__main__":
    main()
