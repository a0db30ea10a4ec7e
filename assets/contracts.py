"""What the agents of the credit pipeline hand to each other.

An application carries three protected attributes. No agent may decide by them, so none of the narrower contracts through which the agents
read the application has them: what a contract does not name never reaches its agent.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

import dagster_mao as mao

PROTECTED = ("personal_status_and_sex", "age_in_years", "foreign_worker")

Id = Annotated[str, mao.Key, Field(min_length=1, description="Stable id of the loan application")]
Checking = Literal[
    "no checking account", "... >= 200 DM / salary assignments for at least 1 year", "0 <= ... < 200 DM", "... < 0 DM"
]  # fmt: skip
History = Literal[
    "critical account/ other credits existing (not at this bank)",
    "existing credits paid back duly till now",
    "delay in paying off in the past",
    "all credits at this bank paid back duly",
    "no credits taken/ all credits paid back duly",
]
Savings = Literal[
    "unknown/ no savings account", "... >= 1000 DM", "500 <= ... < 1000 DM", "100 <= ... < 500 DM", "... < 100 DM"
]  # fmt: skip
Employment = Literal["... >= 7 years", "4 <= ... < 7 years", "1 <= ... < 4 years", "... < 1 year", "unemployed"]
Amount = Annotated[int, Field(gt=0, description="Amount of the loan, DM")]
Months = Annotated[int, Field(ge=1, le=120, description="Duration of the loan, months")]
InstalmentClass = Annotated[
    int, Field(ge=1, le=4, description="Instalment's share of disposable income: 1 is >= 35 %, 2 is 25-35 %, 3 is 20-25 %, 4 is < 20 %")
]
Outcome = Literal["approve", "refer", "decline"]
Points = Annotated[int, Field(ge=300, le=850, description="600 is the average applicant; 20 points more double the odds of repayment")]


class Application(BaseModel):
    """A loan application as it came in. How it turned out is not part of it: nobody knew then."""

    application_id: Id
    status_of_existing_checking_account: Checking
    duration_in_month: Months
    credit_history: History
    purpose: str
    credit_amount: Amount
    savings_account_and_bonds: Savings
    present_employment_since: Employment
    installment_rate_in_percentage_of_disposable_income: InstalmentClass
    personal_status_and_sex: Annotated[str, mao.Personal]
    other_debtors_or_guarantors: str
    present_residence_since: int
    property: str
    age_in_years: Annotated[int, mao.Personal, Field(ge=18, le=120)]
    other_installment_plans: Literal["none", "bank", "stores"]
    housing: str
    number_of_existing_credits_at_this_bank: Annotated[int, Field(ge=0)]
    job: str
    number_of_people_being_liable_to_provide_maintenance_for: int
    telephone: Annotated[str, mao.Personal]
    foreign_worker: Annotated[str, mao.Personal]


class CreditFile(BaseModel):
    """What the score agent reads of an application."""

    application_id: Id
    status_of_existing_checking_account: Checking
    credit_history: History
    savings_account_and_bonds: Savings
    present_employment_since: Employment
    other_installment_plans: Literal["none", "bank", "stores"]
    property: str


class LoanTerms(BaseModel):
    """What the income agent reads of an application."""

    application_id: Id
    credit_amount: Amount
    duration_in_month: Months
    installment_rate_in_percentage_of_disposable_income: InstalmentClass


class Claims(BaseModel):
    """What the fraud agent reads of an application: claims that can contradict each other."""

    application_id: Id
    credit_amount: Amount
    credit_history: History
    present_employment_since: Employment
    number_of_existing_credits_at_this_bank: int
    property: str
    savings_account_and_bonds: Savings


class CreditScore(BaseModel):
    """Points for how the applicant has handled money so far."""

    application_id: Id
    score: Points
    reasons: Annotated[list[str], Field(description="Each attribute that moved the score, with its points")]


class VerifiedIncome(BaseModel):
    """The terms of the loan and the income that the declared burden implies."""

    application_id: Id
    credit_amount: Amount
    duration_in_month: Months
    monthly_instalment: Annotated[float, Field(gt=0, description="DM a month, without interest")]
    disposable_income: Annotated[float, Field(gt=0, description="DM a month, from the instalment and its declared share")]


class FraudSignals(BaseModel):
    """Contradictions in the application. They are no proof: a person looks at them."""

    application_id: Id
    signals: list[str]


class Risk(BaseModel):
    """The score, moved by the terms of this loan, and the grade that follows."""

    application_id: Id
    credit_amount: Amount
    points: Annotated[int, Field(ge=200, le=950)]
    grade: Literal["low", "medium", "high"]
    reasons: list[str]


class Decision(BaseModel):
    """What becomes of the application; `refer` hands it to a person."""

    application_id: Id
    outcome: Outcome
    credit_amount: Amount
    reasons: list[str]
