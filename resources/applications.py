"""The file of the day's loan applications."""

from typing import Any

import dagster as dg
import polars as pl
from polars.exceptions import NoDataError

import dagster_mao as mao
from assets.contracts import Application
from dagster_mao.contract import Contract

OUTCOME = "creditability"
SCHEMA = Contract.of(Application).schema
TEXT = {name: dtype for name, dtype in SCHEMA.items() if dtype == pl.String}


class ApplicationsFile(dg.ConfigurableResource):
    """A CSV file of loan applications, one for each day if the path says `{day}`.

    Text is read as text and numbers are inferred from the whole file, never forced: what is not as the contract says is for the entry's
    check to refuse, with its reasons. Without a column `application_id`, an application's id is its position.
    """

    path: str

    def read(self, day: str | None = None) -> pl.DataFrame:
        """The applications as they came in, without their outcome.

        Raises: mao.InvalidRecordsError when the file is missing, empty or no CSV.
        """
        return self._read(day).drop(OUTCOME, strict=False)

    def records(self, day: str | None = None) -> list[Any]:
        """The same, one by one, for the contract to judge each by itself: one bad record is no bad file.

        Raises: mao.InvalidRecordsError as `read` does, and when the columns are not the contract's.
        """
        frame = self.read(day)
        if wrong := sorted(set(frame.columns) ^ set(SCHEMA)):
            what = f"{self.path} has a column too many or too few: {wrong[0]!r}"
            raise mao.InvalidRecordsError(
                what, field=wrong[0], fix=f"bring the columns of {Application.__name__}, and {OUTCOME!r} if known"
            )
        return frame.to_dicts()

    def outcomes(self, day: str | None = None) -> pl.DataFrame:
        """Application id and `outcome`, good or bad: what only became known years later.

        Raises: mao.InvalidRecordsError as `read` does, and when the file does not tell.
        """
        frame = self._read(day)
        if OUTCOME not in frame.columns:
            what = f"{self.path} does not say how its loans turned out"
            raise mao.InvalidRecordsError(what, field=OUTCOME, fix="report on days whose outcomes are known")
        return frame.select("application_id", outcome=OUTCOME)

    def _read(self, day: str | None) -> pl.DataFrame:
        path = self.path.replace("{day}", day or "")
        try:
            frame = pl.read_csv(path, schema_overrides=TEXT, infer_schema_length=None)
        except (OSError, NoDataError, pl.exceptions.ComputeError) as error:
            what = f"No applications can be read from {path} ({type(error).__name__})"
            raise mao.InvalidRecordsError(what, fix="hand in a CSV file with a header") from error
        if frame.is_empty():  # a quiet day: nothing to infer a type from
            frame = frame.cast({name: dtype for name, dtype in SCHEMA.items() if name in frame.columns})
        if "application_id" not in frame.columns:
            frame = frame.with_row_index("position", offset=1).select(
                pl.format("app-{}", pl.col("position").cast(pl.String).str.zfill(4)).alias("application_id"), pl.exclude("position")
            )
        return frame
