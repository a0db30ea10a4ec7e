"""The credit pipeline: which agents there are. Its graph is read from what they declare to read."""

import dagster as dg

import dagster_mao as mao
from assets.agents import Approval, applications, credit_score, fraud_detection, income_verification, risk_assessment

days = dg.DailyPartitionsDefinition(start_date="2026-01-01")

credit = mao.Pipeline(
    "credit",
    description="Credit decisions for the day's loan applications",
    entry=applications,
    agents=[credit_score, income_verification, fraud_detection, risk_assessment, Approval],
    partitions_def=days,
)
