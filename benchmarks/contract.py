"""What a contract costs: valid records, invalid ones and their reasons, from one batch.

    python benchmarks/contract.py [rows ...] [--repeat 5] [--without gx]

A batch of 10 columns under 15 rules, key uniqueness among them, 1 % of it broken, given to: `Contract.sift` and `Contract.check`;
dataframely alone (`filter`: valid rows, and of the invalid ones the rules and their counts); pydantic row by row; Great Expectations, on
the same rules as expectations (counts only: it parts no batch). Prints CPU seconds, the best of the repetitions, and ratios to dataframely.
Run it pinned to one core (`taskset -c 0`), or threads that wait for each other are counted too. dataframely and Great Expectations are no
dependencies of ours: `pip install dataframely great-expectations`; what is not there is left out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Annotated, Literal

import polars as pl
from pydantic import BaseModel, Field, ValidationError

from dagster_mao.contract import Contract, Key


class Application(BaseModel):
    application_id: Annotated[str, Key] = Field(min_length=8, max_length=12)
    purpose: Literal["car", "education", "house", "repairs"]
    country: str = Field(pattern="^[A-Z]{2}$")
    amount: int = Field(gt=0, le=1_000_000)
    months: int = Field(ge=6, le=120)
    age: int = Field(ge=18, le=120)
    income: float = Field(ge=0)
    share: float = Field(ge=0, le=1)
    employed: bool
    remarks: str | None = Field(max_length=40)


CONTRACT = Contract.of(Application)


def applications(rows: int) -> pl.DataFrame:
    """A seeded batch, every hundredth record broken in one column or another, the key among them."""
    n = pl.int_range(rows)
    h = n.hash(seed=7)
    bad = [(n % 100 == 37) & ((n // 100) % 8 == i) for i in range(8)]
    spoilt = lambda i, value, good: pl.when(bad[i]).then(value).otherwise(good)  # noqa: E731
    return pl.select(
        application_id=pl.format("A{}", spoilt(0, n - 1, n).cast(pl.String).str.zfill(9)),
        purpose=spoilt(1, pl.lit("boat"), pl.lit(pl.Series(["car", "education", "house", "repairs"])).gather(h % 4)),
        country=spoilt(2, pl.lit("de\n"), pl.lit(pl.Series(["DE", "FR", "PL", "NL"])).gather((h // 5) % 4)),
        amount=spoilt(3, pl.lit(0), 1 + (h % 900_000).cast(pl.Int64)),
        months=spoilt(4, pl.lit(3), 6 + (h % 100).cast(pl.Int64)),
        age=spoilt(5, pl.lit(None, dtype=pl.Int64), 18 + (h % 60).cast(pl.Int64)),
        income=spoilt(6, pl.lit(float("nan")), (h % 90_000).cast(pl.Float64) / 7),
        share=spoilt(7, pl.lit(1.5), (h % 1000).cast(pl.Float64) / 1000),
        employed=h % 3 == 0,
        remarks=pl.when(h % 5 == 0).then(pl.lit("called twice, " + "x" * 20)),
    )


def sifted(frame: pl.DataFrame) -> tuple[int, int]:
    parted = CONTRACT.sift(frame)
    return parted.valid.collect().height, parted.broken.height


def checked(frame: pl.DataFrame) -> tuple[int, int]:
    verdict = CONTRACT.check(frame)
    return verdict.rows - verdict.failed_rows, verdict.failed_rows


def row_by_row(frame: pl.DataFrame) -> tuple[int, int]:
    valid, broken, keys = [], [], set[str]()
    for position, row in enumerate(frame.iter_rows(named=True)):
        try:
            model = Application.model_validate(row)
        except ValidationError as error:
            broken.append((position, row, [(e["loc"], e["type"]) for e in error.errors(include_url=False)]))
            continue
        if model.application_id in keys:
            broken.append((position, row, [(("application_id",), "unique")]))
        keys.add(model.application_id)
        valid.append(row)
    made = pl.DataFrame(valid, schema=CONTRACT.schema)
    return made.height, len(broken)


def dataframely_alone() -> Callable[[pl.DataFrame], tuple[int, int]]:
    import dataframely as dy

    class Applications(dy.Schema):
        application_id = dy.String(nullable=False, min_length=8, max_length=12, primary_key=True)
        purpose = dy.String(nullable=False, check=lambda c: c.is_in(["car", "education", "house", "repairs"]))
        country = dy.String(nullable=False, regex="^[A-Z]{2}$")
        amount = dy.Int64(nullable=False, min_exclusive=0, max=1_000_000)
        months = dy.Int64(nullable=False, min=6, max=120)
        age = dy.Int64(nullable=False, min=18, max=120)
        income = dy.Float64(nullable=False, min=0)
        share = dy.Float64(nullable=False, min=0, max=1)
        employed = dy.Bool(nullable=False)
        remarks = dy.String(nullable=True, max_length=40)

    def filtered(frame: pl.DataFrame) -> tuple[int, int]:
        valid, failure = Applications.filter(frame)
        failure.counts()
        details = failure.details()
        return valid.height, details.height

    return filtered


def great_expectations_alone() -> Callable[[pl.DataFrame], tuple[int, int]]:
    import great_expectations as gx
    from great_expectations import expectations as gxe

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    batch = context.data_sources.add_pandas("memory").add_dataframe_asset("batch").add_batch_definition_whole_dataframe("all")
    between, present = gxe.ExpectColumnValuesToBeBetween, gxe.ExpectColumnValuesToNotBeNull
    suite = gx.ExpectationSuite(
        "applications",
        [present(column=name) for name in CONTRACT.schema if name != "remarks"]
        + [
            gxe.ExpectColumnValuesToBeUnique(column="application_id"),
            gxe.ExpectColumnValueLengthsToBeBetween(column="application_id", min_value=8, max_value=12),
            gxe.ExpectColumnValuesToBeInSet(column="purpose", value_set=["car", "education", "house", "repairs"]),
            gxe.ExpectColumnValuesToMatchRegex(column="country", regex="^[A-Z]{2}$"),
            between(column="amount", min_value=0, max_value=1_000_000, strict_min=True),
            between(column="months", min_value=6, max_value=120),
            between(column="age", min_value=18, max_value=120),
            between(column="income", min_value=0),
            between(column="share", min_value=0, max_value=1),
            gxe.ExpectColumnValueLengthsToBeBetween(column="remarks", max_value=40),
        ],
    )

    def validated(frame: pl.DataFrame) -> tuple[int, int]:
        result = batch.get_batch({"dataframe": frame.to_pandas()}).validate(suite)
        broken = sum(r.result.get("unexpected_count", 0) for r in result.results)
        return frame.height - broken, broken

    return validated


def cpu_seconds(work: Callable[[pl.DataFrame], tuple[int, int]], frame: pl.DataFrame, repeat: int) -> tuple[float, tuple[int, int]]:
    best, found = float("inf"), (0, 0)
    for _ in range(repeat):
        started = time.process_time()
        found = work(frame)
        best = min(best, time.process_time() - started)
    return best, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", type=int, default=[100_000, 1_000_000])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--without", action="append", default=[], choices=["pydantic", "gx"], help="leave out what takes long")
    options = parser.parse_args()
    engines: dict[str, Callable[[pl.DataFrame], tuple[int, int]]] = {}
    if find_spec("dataframely"):
        engines["dataframely, filter"] = dataframely_alone()
    engines |= {"Contract.sift": sifted, "Contract.check": checked}
    if "pydantic" not in options.without:
        engines["pydantic, row by row"] = row_by_row
    if "gx" not in options.without and find_spec("great_expectations") and find_spec("pandas"):
        engines["Great Expectations"] = great_expectations_alone()
    print(f"{'rows':>10}  {'engine':<22} {'CPU s':>8} {'x dataframely':>14} {'valid':>10} {'broken':>8}")
    for rows in options.rows:
        frame = applications(rows).rechunk()
        cpu_seconds(sifted, frame, 1)  # warms up
        first: float | None = None
        for name, engine in engines.items():
            slow = engine in (row_by_row,) or name.startswith("Great")
            seconds, (valid, broken) = cpu_seconds(engine, frame, 1 if slow else options.repeat)
            first = first or seconds
            ratio = f"{seconds / first:>14.2f}" if "dataframely, filter" in engines else f"{'-':>14}"
            print(f"{rows:>10,}  {name:<22} {seconds:>8.3f} {ratio} {valid:>10,} {broken:>8,}", flush=True)


if __name__ == "__main__":
    main()
