"""The five agents of the credit pipeline decide the same in all three modes, through Dagster."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

import dagster_mao as mao
from assets.agents import Approval, applications, credit_score, fraud_detection, income_verification, risk_assessment
from assets.contracts import CreditFile, CreditScore, Decision, FraudSignals, Risk
from resources.applications import ApplicationsFile
from resources.core_bank import CoreBank
from tests.dagster.theatre import EAGER, Theatre

DAY = "2026-01-01"
DAYS = dg.DailyPartitionsDefinition(start_date=DAY, end_date="2026-01-03")
WITH_EFFECTS = [credit_score, income_verification, fraud_detection, risk_assessment, Approval]

# What they do, as plain functions: agents never call agents.
SCORES, DECIDES = credit_score._function, partial(Approval.execute.__wrapped__, None)


class Nothing:
    """Stands in for the context and the bank: nothing is done."""

    def effect(self, *_: Any, **__: Any) -> Any:
        async def done() -> None: ...

        return done()


@mao.agent(name="credit_score", version="1")
async def scored(applications: CreditFile) -> CreditScore:
    return await SCORES(Nothing(), applications, core_bank=None)  # type: ignore[no-any-return]


class Decided(mao.Agent):
    name = "approval"
    version = "1"

    def execute(self, risk_assessment: Risk, fraud_detection: FraudSignals) -> Decision:
        class Quiet:
            def effect(self, *_: Any, **__: Any) -> None: ...

        return DECIDES(Quiet(), risk_assessment, fraud_detection, core_bank=None)  # type: ignore[arg-type]


def credit(mode: Any, agents: list[Any]) -> mao.Pipeline:
    return mao.Pipeline("credit", entry=applications, agents=agents, mode=mode, partitions_def=DAYS, micro_batch=EAGER)


def decided(folder: Path, mode: Any, agents: list[Any]) -> pl.DataFrame:
    """What the pipeline's job and, where there are any, its sensors come to."""
    folder.mkdir()
    file = folder / "applications.csv"
    file.write_text("".join(Path("data/german_credit.csv").read_text().splitlines(keepends=True)[:26]))
    given: dict[str, Any] = {
        "applications_file": ApplicationsFile(path=str(file)),
        "core_bank": CoreBank(path=str(folder / "bank.db")),
    }
    with dg.DagsterInstance.ephemeral() as instance:
        theatre = Theatre(folder, instance, credit(mode, agents), **given)
        assert theatre.defs.resolve_job_def("credit_job").execute_in_process(instance=instance, partition_key=DAY).success
        if mode != "orchestration":
            results = theatre.play()
            assert results.keys() == {"credit_score", "income_verification", "fraud_detection", "risk_assessment", "approval"}
        state = theatre.store.effective(f"credit/{DAY}")
        assert len(state) == 6
        return theatre.store.read(state["approval"]).collect().sort("application_id")


def test_the_five_agents_decide_the_same_in_all_modes(tmp_path: Path) -> None:
    orchestrated = decided(tmp_path / "orchestration", "orchestration", WITH_EFFECTS)
    assert orchestrated.height == 25
    assert orchestrated["outcome"].n_unique() > 1
    assert decided(tmp_path / "hybrid", "hybrid", WITH_EFFECTS).equals(orchestrated)
    without_effects = [scored, income_verification, fraud_detection, risk_assessment, Decided]
    assert decided(tmp_path / "choreography", "choreography", without_effects).equals(orchestrated)


def test_with_their_effects_they_are_refused_in_plain_choreography() -> None:
    with pytest.raises(mao.WiringError, match="side effects"):
        credit("choreography", WITH_EFFECTS)
