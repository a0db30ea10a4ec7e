"""The credit pipeline: which agents there are. Its graph is read from what they declare to read."""

import datetime as dt

import dagster as dg

import dagster_mao as mao
from assets.agents import Approval, applications, credit_score, fraud_detection, income_verification, risk_assessment

days = dg.DailyPartitionsDefinition(start_date="2026-01-01")

# The schedule starts at midnight (UTC) for the day that ended. At two, something must have been decided since.
by_two = dg.FreshnessPolicy.cron(deadline_cron="0 2 * * *", lower_bound_delta=dt.timedelta(hours=2))


class Punctual(mao.AgentTranslator):
    """The decisions are due each night; how the other agents are shown stays as it is."""

    def get_asset_spec(self, agent: mao.Agent, pipeline: mao.Pipeline) -> dg.AssetSpec:
        spec = super().get_asset_spec(agent, pipeline)
        return spec.replace_attributes(freshness_policy=by_two) if agent.name == "approval" else spec


credit = mao.Pipeline(
    "credit",
    description="Credit decisions for the day's loan applications",
    entry=applications,
    agents=[credit_score, income_verification, fraud_detection, risk_assessment, Approval],
    partitions_def=days,
)
