"""The credit pipeline in plain Python, on a slice of the real applications."""

import asyncio
from typing import get_args

import polars as pl
import pytest

import dagster_mao as mao
from assets import contracts
from assets.agents import SCORECARD, credit_score
from assets.contracts import PROTECTED, Application, CreditFile
from assets.fairness import against_outcomes, scores
from assets.pipeline import credit
from dagster_mao.contract import Contract
from resources.applications import ApplicationsFile
from resources.core_bank import CoreBank

SHIPPED = ApplicationsFile(path="data/german_credit.csv")


@pytest.fixture
def bank(tmp_path):
    return CoreBank(path=str(tmp_path / "bank.db"))


def decide(frame, bank, **options):
    return mao.run(credit, frame, resources={"core_bank": bank, "applications_file": SHIPPED}, **options)


def test_decisions_are_sensible_against_known_outcomes(bank):
    result = decide(SHIPPED.read().head(200), bank)
    figures = scores(against_outcomes(result["approval"].lazy(), SHIPPED.outcomes()))
    assert figures["accuracy"] > 0.70  # 0.70 is what approving everyone gets
    assert figures["bad_rate"] < 0.20  # 0.30 of all did not pay back
    assert figures["automatic_share"] > 0.75


def test_every_approval_has_its_effects_and_nothing_else_has(bank):
    result = decide(SHIPPED.read().head(40), bank)
    approved = result["approval"].filter(outcome="approve")
    assert approved.height > 0
    amount = approved["credit_amount"].sum()
    assert bank.totals() == [
        ("inquiry", 40, 0, 0, 0),
        ("reservation", approved.height, amount, 0, 0),
        ("offer", approved.height, amount, 0, 0),
    ]


def test_a_second_attempt_asks_again_and_nothing_takes_effect_twice(bank, tmp_path):
    store = mao.StateStore(tmp_path / "state")
    for _ in range(2):
        decide(SHIPPED.read().head(10), bank, store=store, workflow="2026-01-01")
    assert len(store.seals("credit/2026-01-01")) == 12
    assert all(taken == repeated for _, taken, _, repeated, _ in bank.totals())


def test_no_agent_is_handed_a_protected_attribute():
    read = {field for agent in credit.agents.values() for one in agent.inputs for field in one.contract.schema}
    assert not read & set(PROTECTED)
    assert set(PROTECTED) < Contract.of(Application).personal


def test_another_sex_age_and_origin_change_no_decision(bank, tmp_path):
    frame = SHIPPED.read().head(40)
    turned = frame.with_columns(
        personal_status_and_sex=pl.lit("female : divorced/separated/married"),
        age_in_years=pl.lit(19, pl.Int64),
        foreign_worker=pl.lit("no"),
    )
    before, after = decide(frame, bank), decide(turned, CoreBank(path=str(tmp_path / "other.db")))
    assert before["approval"].equals(after["approval"])


def test_a_quiet_day_is_decided_too(bank):
    assert decide(SHIPPED.read().clear(), bank)["approval"].height == 0


def test_the_scorecard_names_only_values_that_the_contract_admits():
    for attribute, points in SCORECARD.items():
        admitted = get_args(CreditFile.model_fields[attribute].annotation)
        if admitted:  # `property` is free text
            assert set(points) <= set(admitted)


async def score(bank, **changes):
    best = {
        "application_id": "a",
        "status_of_existing_checking_account": "no checking account",
        "credit_history": "critical account/ other credits existing (not at this bank)",
        "savings_account_and_bonds": "... >= 1000 DM",
        "present_employment_since": "4 <= ... < 7 years",
        "other_installment_plans": "none",
        "property": "real estate",
    }
    return await credit_score(mao.AgentContext.for_tests("credit_score"), contracts.CreditFile(**{**best, **changes}), core_bank=bank)


def test_the_score_is_a_sum_that_can_be_checked_by_hand(bank):
    scored = asyncio.run(score(bank, savings_account_and_bonds="... < 100 DM"))
    assert scored.score == 600 + 35 + 20 - 10 + 10 + 5 + 15
    assert "savings_account_and_bonds -10" in scored.reasons
