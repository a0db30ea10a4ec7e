"""The code location: the credit pipeline, the assets that watch over it, and what it reaches out to."""

import os
from pathlib import Path

import dagster as dg

import dagster_mao as mao
from assets import fairness
from assets.pipeline import Punctual, credit
from resources.applications import ApplicationsFile
from resources.core_bank import CoreBank
from sensors import credit_reports

HERE = Path(__file__).resolve().parent
STATE = os.environ.get("DAGSTER_MAO_ROOT", str(HERE / ".mao" / "state"))
APPLICATIONS = os.environ.get("CREDIT_APPLICATIONS", str(HERE / "data" / "german_credit.csv"))
BANK = os.environ.get("CREDIT_CORE_BANK", str(HERE / ".mao" / "core_bank.db"))


def build(state: str, applications: str, bank: str) -> dg.Definitions:
    """Everything Dagster needs: `state` is where agents' outputs are sealed, the others are paths (`applications` may say `{day}`)."""
    resources = {
        "state_store": mao.StateStoreResource(root=state),
        "applications_file": ApplicationsFile(path=applications),
        "core_bank": CoreBank(path=bank),
    }
    watchers = dg.Definitions(
        assets=[fairness.decision_report],
        asset_checks=[fairness.four_fifths],
        sensors=[credit_reports],
        # The steps are short: starting a process for each would take longer than their work.
        executor=dg.in_process_executor,
    )
    return dg.Definitions.merge(credit.build_definitions(resources=resources, translator=Punctual(), scheduled=True), watchers)


defs = build(STATE, APPLICATIONS, BANK)
