"""The five agents of the credit pipeline, and the entry that brings the day's applications in.

The scorecard is a sum of points that a person can check by hand. They are the log odds of repayment in the data (20 points double them),
rounded to fives, for attributes that a bank may use.
"""

import asyncio

import polars as pl

import dagster_mao as mao
from assets.contracts import (
    Application,
    Claims,
    CreditFile,
    CreditScore,
    Decision,
    FraudSignals,
    LoanTerms,
    Outcome,
    Risk,
    VerifiedIncome,
)
from resources.applications import ApplicationsFile
from resources.core_bank import CoreBank

APPROVE_FROM, DECLINE_BELOW = 600, 575

SCORECARD: dict[str, dict[str, int]] = {
    "status_of_existing_checking_account": {
        "no checking account": 35,
        "... >= 200 DM / salary assignments for at least 1 year": 10,
        "0 <= ... < 200 DM": -10,
        "... < 0 DM": -25,
    },
    "credit_history": {
        "critical account/ other credits existing (not at this bank)": 20,  # holds in this data: these borrowers paid back best
        "all credits at this bank paid back duly": -35,
        "no credits taken/ all credits paid back duly": -40,
    },
    "savings_account_and_bonds": {
        "unknown/ no savings account": 20,
        "... >= 1000 DM": 30,
        "500 <= ... < 1000 DM": 20,
        "100 <= ... < 500 DM": -5,
        "... < 100 DM": -10,
    },
    "present_employment_since": {"... >= 7 years": 5, "4 <= ... < 7 years": 10, "... < 1 year": -15, "unemployed": -10},
    "other_installment_plans": {"none": 5, "bank": -15, "stores": -15},
    "property": {"real estate": 15, "unknown / no property": -15},
}


@mao.agent(owners=["team:credit"], kinds=["csv"], quarantine=mao.Quarantine(max_share=0.1))
def applications(ctx: mao.AgentContext, *, applications_file: ApplicationsFile) -> list[Application]:
    """The day's loan applications, as they came in. What breaks the contract waits in quarantine; the others are decided."""
    return applications_file.records(day=ctx.partition_key)


def cancel(undo: mao.Undo, *, core_bank: CoreBank) -> None:
    """Takes back what a failed attempt did, or may have done, at the bank. From then on the bank refuses what comes late."""
    for effect in undo.effects:
        core_bank.cancel(effect.key, undo.epoch)


@mao.agent(version="1", owners=["team:credit"], kinds=["python"], compensate=cancel)
async def credit_score(ctx: mao.AgentContext, applications: CreditFile, *, core_bank: CoreBank) -> CreditScore:
    """Scores how the applicant has handled money so far. Places a credit inquiry, which other banks can see."""

    async def inquire(effect: mao.Effect) -> bool:
        return await asyncio.to_thread(core_bank.post, effect.key, "inquiry", applications.application_id, epoch=effect.epoch)

    await ctx.effect("inquiry", inquire, compares_epoch=True)
    points = {name: values.get(getattr(applications, name), 0) for name, values in SCORECARD.items()}
    return CreditScore(
        application_id=applications.application_id,
        score=600 + sum(points.values()),
        reasons=[f"{name} {value:+d}" for name, value in points.items() if value],
    )


@mao.agent(version="1", owners=["team:credit"], kinds=["polars"])
def income_verification(applications: mao.LazyFrame[LoanTerms]) -> mao.LazyFrame[VerifiedIncome]:
    """Works out the instalment, and the income that the declared burden implies (the middle of its class)."""
    share = pl.col("installment_rate_in_percentage_of_disposable_income").replace_strict({1: 0.40, 2: 0.30, 3: 0.225, 4: 0.15})
    return applications.with_columns(monthly_instalment=pl.col("credit_amount") / pl.col("duration_in_month")).select(
        "application_id",
        "credit_amount",
        "duration_in_month",
        "monthly_instalment",
        disposable_income=pl.col("monthly_instalment") / share,
    )


@mao.agent(version="1", owners=["team:fraud"], kinds=["polars"])
def fraud_detection(applications: mao.LazyFrame[Claims]) -> mao.LazyFrame[FraudSignals]:
    """Looks for claims that do not go together."""
    amount, history = pl.col("credit_amount"), pl.col("credit_history")
    no_property = pl.col("property") == "unknown / no property"
    signals = {
        "says it took no credits, has several here": history.str.starts_with("no credits taken")
        & (pl.col("number_of_existing_credits_at_this_bank") > 1),
        "large loan without employment": (pl.col("present_employment_since") == "unemployed") & (amount > 4000),
        "large loan without property or savings": no_property & (pl.col("savings_account_and_bonds") == "... < 100 DM") & (amount > 5000),
    }
    found = pl.concat_list([pl.when(condition).then(pl.lit(name)) for name, condition in signals.items()])
    return applications.select("application_id", signals=found.list.drop_nulls())


@mao.agent(version="1", owners=["team:credit"], kinds=["python"])
def risk_assessment(credit_score: CreditScore, income_verification: VerifiedIncome) -> Risk:
    """Moves the score by the terms of this loan, and grades it."""
    months, amount = income_verification.duration_in_month, income_verification.credit_amount
    terms = {
        f"{months} months": 15 if months <= 12 else 0 if months <= 24 else -15 if months <= 36 else -25,
        f"{amount} DM": -15 if amount > 8000 else 0,
    }
    points = credit_score.score + sum(terms.values())
    return Risk(
        application_id=credit_score.application_id,
        credit_amount=amount,
        points=points,
        grade="low" if points >= APPROVE_FROM else "medium" if points >= DECLINE_BELOW else "high",
        reasons=[*credit_score.reasons, *(f"{name} {value:+d}" for name, value in terms.items() if value)],
    )


class Approval(mao.Agent):
    """Decides. An approval reserves the funds and drafts the offer; what is doubtful goes to a person."""

    version = "1"
    owners = ["team:credit"]
    kinds = ["python"]
    # About the day as a whole. They warn: what is refused here has had its effects already.
    expectations = mao.Expectations("expectations/approval.json", columns={"approved": pl.col("outcome") == "approve"})

    def execute(self, ctx: mao.AgentContext, risk_assessment: Risk, fraud_detection: FraudSignals, *, core_bank: CoreBank) -> Decision:
        risk = risk_assessment
        outcome: Outcome = "approve"
        if risk.grade == "high":
            outcome = "decline"
        elif risk.grade == "medium" or fraud_detection.signals:
            outcome = "refer"

        def post(effect: mao.Effect) -> bool:
            return core_bank.post(effect.key, effect.name, risk.application_id, risk.credit_amount, epoch=effect.epoch)

        if outcome == "approve":
            ctx.effect("reservation", post, compares_epoch=True)
            ctx.effect("offer", post, compares_epoch=True)
        return Decision(
            application_id=risk.application_id,
            outcome=outcome,
            credit_amount=risk.credit_amount,
            reasons=[*risk.reasons, *fraud_detection.signals],
        )

    def compensate(self, undo: mao.Undo, *, core_bank: CoreBank) -> None:
        cancel(undo, core_bank=core_bank)
