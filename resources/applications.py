"""The file of the day's loan applications."""

import dagster as dg
import polars as pl
from polars.exceptions import NoDataError

import dagster_mao as mao

OUTCOME = "creditability"


class ApplicationsFile(dg.ConfigurableResource):
    """A CSV file of loan applications, one for each day if the path says `{day}`.

    Types are inferred from the whole file and never forced: what is not as the contract says is for the entry's check to refuse, with
    its reasons. An application without an `application_id` gets one from its position.
    """

    path: str

    def read(self, day: str | None = None) -> pl.DataFrame:
        """The applications as they came in, without their outcome.

        Raises: mao.InvalidRecordsError when the file is missing, empty or no CSV.
        """
        return self._read(day).drop(OUTCOME, strict=False)

    def outcomes(self, day: str | None = None) -> pl.DataFrame:
        """Application id and `outcome`, good or bad: what only became known years later.

        Raises: mao.InvalidRecordsError as `read` does, and when the file does not tell.
        """
        frame = self._read(day)
        if OUTCOME not in frame.columns:
            raise mao.InvalidRecordsError(f"{self.path} does not say how its loans turned out", field=OUTCOME, fix="report on days that are known")
        return frame.select("application_id", outcome=OUTCOME)

    def _read(self, day: str | None) -> pl.DataFrame:
        path = self.path.replace("{day}", day or "")
        try:
            frame = pl.read_csv(path, infer_schema_length=None)
        except (OSError, NoDataError, pl.exceptions.ComputeError) as error:
            raise mao.InvalidRecordsError(
                f"no applications can be read from {path}: {error}", fix="hand in a CSV file with a header"
            ) from error
        if "application_id" not in frame.columns:
            frame = frame.with_row_index("position", offset=1).select(
                pl.format("app-{}", pl.col("position").cast(pl.String).str.zfill(4)).alias("application_id"), pl.exclude("position")
            )
        return frame
