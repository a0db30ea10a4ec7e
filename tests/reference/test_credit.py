"""The credit pipeline in plain Python, on a slice of the real applications."""

import asyncio
from typing import get_args

import polars as pl
import pytest
from pydantic import PrivateAttr

import dagster_mao as mao
from assets import contracts
from assets.agents import SCORECARD, credit_score
from assets.contracts import PROTECTED, Application, CreditFile
from assets.fairness import against_outcomes, scores
from assets.pipeline import credit
from dagster_mao.contract import Contract
from dagster_mao.saga import Saga, unfinished
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


def test_a_second_attempt_asks_for_nothing_that_was_done(bank, tmp_path):
    store = mao.StateStore(tmp_path / "state")
    for _ in range(2):
        decide(SHIPPED.read().head(10), bank, store=store, workflow="2026-01-01")
    assert len(store.seals("credit/2026-01-01")) == 12
    assert [(kind, repeated, cancelled) for kind, _, _, repeated, cancelled in bank.totals()] == [
        (kind, 0, 0) for kind in ("inquiry", "reservation", "offer")
    ]


class LostLine(CoreBank):
    """Does what it is asked for, and when it is the third offer, nobody hears that it did."""

    _offers: int = PrivateAttr(default=0)

    def post(self, key, kind, application_id, amount=0, *, epoch=0):
        done = super().post(key, kind, application_id, amount, epoch=epoch)
        self._offers += kind == "offer"
        if self._offers == 3:
            raise ConnectionError
        return done


def test_a_failed_attempt_leaves_nothing_at_the_bank_and_the_next_one_works(bank, tmp_path):
    store = mao.StateStore(tmp_path / "state")
    with pytest.raises(mao.AgentFailedError) as failed:
        decide(SHIPPED.read().head(10), LostLine(path=bank.path), store=store, workflow="2026-01-01")
    assert failed.value.compensation.state == "compensated"
    assert sum(cancelled for *_, cancelled in bank.totals()) > 10, "inquiries, and a reservation at least"
    assert sum(stand for _, stand, *_ in bank.totals()) == 0
    approved = decide(SHIPPED.read().head(10), bank, store=store, workflow="2026-01-01")["approval"].filter(outcome="approve").height
    assert {kind: stand for kind, stand, *_ in bank.totals()} == {"inquiry": 10, "reservation": approved, "offer": approved}


def test_what_is_changed_undoes_what_it_supersedes(bank, tmp_path):
    """Late data: one application asks for more; its old reservation and offer are cancelled, the others stand untouched."""
    store, frame = mao.StateStore(tmp_path / "state"), SHIPPED.read().head(10)
    first = decide(frame, bank, store=store, workflow="2026-01-01")["approval"].filter(outcome="approve")
    one = first["application_id"][0]
    more = frame.with_columns(credit_amount=pl.col("credit_amount") + pl.when(application_id=one).then(1).otherwise(0))
    second = decide(more, bank, store=store, workflow="2026-01-01")["approval"].filter(outcome="approve")
    (due,) = unfinished(store, "credit")  # as the sensor does it
    saga = Saga(store, credit, due.workflow_id, due.attempt, superseded_by=due.superseded_by, resources={"core_bank": bank})
    assert saga.run().state == "compensated"
    totals = {kind: (stand, amount, cancelled) for kind, stand, amount, _, cancelled in bank.totals()}
    assert totals["reservation"] == (second.height, second["credit_amount"].sum(), 1)
    assert totals["offer"] == (second.height, second["credit_amount"].sum(), 1)


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
