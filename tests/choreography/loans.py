"""A pipeline with a join, in whatever mode, whose agents note every execution in a file: what was done twice shows."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import polars as pl
from pydantic import BaseModel, Field

import dagster_mao as mao
from dagster_mao.choreography import enter
from dagster_mao.pipeline import Mode
from dagster_mao.state import Seal, StateStore


class Application(BaseModel):
    id: Annotated[str, mao.Key]
    name: Annotated[str, mao.Personal] = "Grace Hopper"
    amount: float = Field(gt=0)


class Score(BaseModel):
    id: Annotated[str, mao.Key]
    score: float


class Income(BaseModel):
    id: Annotated[str, mao.Key]
    income: float


class Risk(BaseModel):
    id: Annotated[str, mao.Key]
    risk: float


class Decision(BaseModel):
    id: Annotated[str, mao.Key]
    approved: bool


class Notice(BaseModel):
    id: Annotated[str, mao.Key]
    text: str


class Ledger:
    """A file with a line per execution, whole lines whoever writes at once. A file beside it lists which executions are to fail."""

    def __init__(self, folder: Path | str) -> None:
        self._file, self._bad = Path(folder) / "executions", Path(folder) / "failing"

    def __mao_config__(self) -> dict[str, Any]:
        return {}

    def note(self, agent: str, workflow: str) -> None:
        with self._file.open("ab", buffering=0) as file:
            file.write(f"{agent} {workflow}\n".encode())
        if self._bad.exists() and f"{agent} {workflow}" in self._bad.read_text().splitlines():
            raise ValueError("the bureau knows no such person")

    def fail(self, *lines: str) -> None:
        self._bad.write_text("\n".join(lines))

    @property
    def executions(self) -> Counter[str]:
        return Counter(self._file.read_text().splitlines()) if self._file.exists() else Counter()


@mao.agent(quarantine=mao.Quarantine(max_share=1))
def applications() -> list[Application]:
    return []


@mao.agent
def score(ctx: mao.AgentContext, applications: mao.LazyFrame[Application], *, ledger: Ledger) -> mao.LazyFrame[Score]:
    ledger.note("score", ctx.workflow_id)
    return applications.select("id", score="amount")


@mao.agent
def income(ctx: mao.AgentContext, applications: mao.LazyFrame[Application], *, ledger: Ledger) -> mao.LazyFrame[Income]:
    ledger.note("income", ctx.workflow_id)
    return applications.select("id", income="amount")


@mao.agent
def risk(ctx: mao.AgentContext, score: mao.LazyFrame[Score], income: mao.LazyFrame[Income], *, ledger: Ledger) -> mao.LazyFrame[Risk]:
    ledger.note("risk", ctx.workflow_id)
    return score.join(income, on="id").select("id", risk=pl.col("score") / pl.col("income"))


@mao.agent
def approval(
    ctx: mao.AgentContext, risk: mao.LazyFrame[Risk], applications: mao.LazyFrame[Application], *, ledger: Ledger
) -> mao.LazyFrame[Decision]:
    ledger.note("approval", ctx.workflow_id)
    return risk.join(applications, on="id").select("id", approved=pl.col("amount") < 1000)


@mao.agent
def notify(ctx: mao.AgentContext, approval: mao.LazyFrame[Decision], *, ledger: Ledger) -> mao.LazyFrame[Notice]:
    ledger.note("notify", ctx.workflow_id)
    return approval.select("id", text=pl.col("approved").cast(pl.String))


AGENTS = (score, income, risk, approval)
NAMES = tuple(agent.name for agent in AGENTS)


def loans(mode: Mode = "choreography", *, agents: Sequence[Any] = AGENTS, **declared: Any) -> mao.Pipeline:
    return mao.Pipeline("loans", entry=applications, agents=list(agents), mode=mode, **declared)


def elsewhere() -> mao.Pipeline:
    """What another team runs, in another code location."""
    return mao.Pipeline("loans", listens={"approval": Decision}, agents=[notify], mode="choreography")


def batch(*amounts: float) -> list[dict[str, Any]]:
    return [{"id": f"A{place}", "amount": amount} for place, amount in enumerate(amounts or (100.0, 5000.0))]


def arrive(store: StateStore, *workflows: str, pipeline: mao.Pipeline | None = None, amounts: Sequence[float] = ()) -> list[Seal]:
    return [enter(store, pipeline or loans(), batch(*amounts), workflow=workflow) for workflow in workflows]


def sealed(store: StateStore) -> Counter[str]:
    """How often each agent sealed each workflow: as the ledger has it, so that both can be compared."""
    return Counter(f"{row['agent']} {row['workflow_id']}" for row in store.sealed("loans").iter_rows(named=True) if row["kind"] == "output")


def once(*workflows: str, agents: Sequence[str] = NAMES) -> Counter[str]:
    return Counter(f"{agent} loans/{workflow}" for agent in agents for workflow in workflows)


def kill_myself() -> None:
    os.kill(os.getpid(), 9)
