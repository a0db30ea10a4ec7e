"""A loan pipeline with awkward records, importable by name so that step processes and Dagster's command line can load it.

Everything that a test wants to change goes through the `desk` resource: a folder with `applications.json`; while it holds a file `outage`,
the scoring agent is down.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import dagster as dg
import polars as pl
from pydantic import BaseModel, Field

from dagster_mao.agent import Agent, AgentContext, agent
from dagster_mao.contract import Key, LazyFrame, Personal
from dagster_mao.dagster import StateIOManager, StateStoreResource, build_definitions
from dagster_mao.pipeline import Pipeline

AWKWARD = ["A/../1", 'B "quoted"', "Ç-3"]


class Application(BaseModel):
    application_id: Annotated[str, Key]
    name: Annotated[str, Personal] = Field(description="As on the passport.", max_length=40)
    income: float = Field(ge=0)


class Score(BaseModel):
    application_id: Annotated[str, Key]
    score: int = Field(ge=300, le=850, description="Higher is safer.")


class Income(BaseModel):
    application_id: Annotated[str, Key]
    name: Annotated[str, Personal]
    monthly: float


class Decided(BaseModel):
    application_id: Annotated[str, Key]
    approved: bool


class GoodScore(Score):
    score: int = Field(ge=400)


class Desk(dg.ConfigurableResource):
    folder: str

    def applications(self, day: str | None) -> list[dict[str, Any]]:
        records = json.loads((Path(self.folder) / "applications.json").read_text())
        return records[day] if isinstance(records, dict) else records

    @property
    def outage(self) -> bool:
        return (Path(self.folder) / "outage").exists()


@agent(owners=["team:lending"], kinds=["python"], tags={"domain": "credit"})
def applications(ctx: AgentContext, *, desk: Desk) -> list[Application]:
    """The applications of the day."""
    return [Application.model_construct(**record) for record in desk.applications(ctx.partition_key)]


@agent(version="7")
def credit_score(applications: Application, *, desk: Desk) -> Score:
    """Scores by income alone, which nobody should."""
    if desk.outage:
        raise ConnectionError("the bureau is down")
    return Score.model_construct(application_id=applications.application_id, score=int(applications.income))


@agent
def verified_income(applications: LazyFrame[Application]) -> LazyFrame[Income]:
    return applications.select("application_id", "name", monthly=pl.col("income") / 12)


class Approval(Agent):
    """Approves what scored well."""

    name = "approval"

    def execute(self, credit_score: GoodScore, verified_income: Income) -> Decided:
        return Decided(application_id=credit_score.application_id, approved=verified_income.monthly > 50)


AGENTS = [credit_score, verified_income, Approval]


def pipeline(name: str = "loans", **changes: Any) -> Pipeline:
    return Pipeline(name, **{"entry": applications, "agents": AGENTS, "owners": ["team:risk"], **changes})


def definitions(folder: Path, *, translator: Any = None, backfill_policy: Any = None, **changes: Any) -> dg.Definitions:
    return build_definitions(pipeline(**changes), resources=resources(folder), translator=translator, backfill_policy=backfill_policy)


def resources(folder: Path) -> dict[str, Any]:
    return {"desk": Desk(folder=str(folder)), "state_store": StateStoreResource(root=str(folder / "state"))}


def write(folder: Path, *incomes: float, days: dict[str, list[float]] | None = None) -> None:
    """Puts applications with these incomes on the desk; by partition with `days`."""

    def records(values: Any) -> list[dict[str, Any]]:
        return [{"application_id": key, "name": f"Name of {key}", "income": value} for key, value in zip(AWKWARD, values, strict=False)]

    told = {day: records(values) for day, values in days.items()} if days else records(incomes)
    (folder / "applications.json").write_text(json.dumps(told))


def state_io_manager(folder: Path) -> StateIOManager:
    return StateIOManager(state_store=StateStoreResource(root=str(folder / "state")))


def _job(executor: dg.ExecutorDefinition, *, backfill_policy: dg.BackfillPolicy | None = None, **changes: Any) -> dg.JobDefinition:
    # Dagster keeps a reconstructed job for the whole process, so where it works must not be fixed when it is made.
    given = {"desk": Desk(folder=dg.EnvVar("LOANS_FOLDER")), "state_store": StateStoreResource(root=dg.EnvVar("LOANS_STATE"))}
    defs = build_definitions(pipeline(**changes), resources=given, backfill_policy=backfill_policy)
    return dg.Definitions.merge(defs, dg.Definitions(executor=executor)).resolve_job_def("loans_job")


def loans_job() -> dg.JobDefinition:
    """The asset job on the folders that LOANS_FOLDER and LOANS_STATE name, in this process."""
    return _job(dg.in_process_executor)


def loans_job_in_processes() -> dg.JobDefinition:
    """The same, every step in a process of its own."""
    imported = {"forkserver": {"preload_modules": ["tests.dagster.loans"]}}  # once, instead of by each step
    return _job(dg.multiprocess_executor.configured({"max_concurrent": 2, "start_method": imported}))


def main(home: str) -> None:
    """Runs `loans_job_in_processes` in the instance of this folder."""
    with dg.DagsterInstance.local_temp(home) as instance:
        dg.execute_job(dg.reconstructable(loans_job_in_processes), instance)


def loans_job_over_ranges() -> dg.JobDefinition:
    """The same on three days, of which one run may take several."""
    days = dg.DailyPartitionsDefinition(start_date="2026-01-05", end_date="2026-01-08")
    return _job(dg.in_process_executor, backfill_policy=dg.BackfillPolicy.single_run(), partitions_def=days)
