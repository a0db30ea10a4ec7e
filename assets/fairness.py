"""Do the decisions treat protected groups alike, and were they right? Both read sealed snapshots, pinned by the run, and change nothing."""

import warnings

import dagster as dg
import polars as pl

from assets.contracts import PROTECTED
from assets.pipeline import by_two, credit, days
from resources.applications import ApplicationsFile

warnings.filterwarnings("ignore", category=dg.PreviewWarning)  # that partitioned checks are new is no news to those who load this

FOUR_FIFTHS = 0.8
SMALLEST_GROUP = 30  # applications; below that a ratio says more about chance than about the decisions

APPLICATIONS, APPROVAL = dg.AssetKey([credit.name, "applications"]), dg.AssetKey([credit.name, "approval"])


def approval_rates(applications: pl.LazyFrame, decisions: pl.LazyFrame) -> pl.DataFrame:
    """For each group of each protected attribute: applications, share approved, and that share against the best group's."""
    age = pl.when(pl.col("age_in_years") <= 25).then(pl.lit("25 or younger")).otherwise(pl.lit("over 25"))
    groups = (
        applications.with_columns(age_in_years=age)
        .unpivot(PROTECTED, index="application_id", variable_name="attribute", value_name="group")
        .join(decisions.select("application_id", approved=pl.col("outcome") == "approve"), on="application_id", validate="m:1")
        .group_by("attribute", "group")
        .agg(applications=pl.len(), rate=pl.col("approved").mean())
        .with_columns(large=pl.col("applications") >= SMALLEST_GROUP)
    )
    best = pl.col("rate").filter(pl.col("large")).max().over("attribute")
    return groups.with_columns(impact_ratio=pl.when("large").then(pl.col("rate") / best)).drop("large").sort("attribute", "rate").collect()


@dg.asset_check(asset=APPROVAL, additional_ins={"applications": dg.AssetIn(APPLICATIONS)}, partitions_def=days)
def four_fifths(approval: pl.LazyFrame, applications: pl.LazyFrame) -> dg.AssetCheckResult:
    """No protected group is approved at less than four fifths of the best one's rate. A finding is a question, not a verdict."""
    rates = approval_rates(applications, approval)
    low = rates.filter(pl.col("impact_ratio") < FOUR_FIFTHS)
    return dg.AssetCheckResult(
        passed=low.is_empty(),
        severity=dg.AssetCheckSeverity.WARN,
        description="; ".join(f"{row['attribute']} {row['group']!r}: {row['impact_ratio']:.2f}" for row in low.to_dicts()) or None,
        metadata={"rates": dg.MetadataValue.md(markdown(rates)), "smallest_group": SMALLEST_GROUP},
    )


def against_outcomes(decisions: pl.LazyFrame, outcomes: pl.DataFrame) -> pl.DataFrame:
    """For each decision: how many of these applicants paid back (`good`) and how many did not (`bad`)."""
    known = decisions.collect().join(outcomes, on="application_id", how="left", validate="1:1")
    counts = known.group_by("outcome").agg(
        good=(pl.col("outcome_right") == "good").sum(), bad=(pl.col("outcome_right") == "bad").sum(), applications=pl.len()
    )
    return (
        pl.DataFrame({"outcome": ["approve", "refer", "decline"]})
        .join(counts, on="outcome", how="left", maintain_order="left")
        .fill_null(0)
    )


@dg.asset(
    key_prefix=credit.name,
    group_name=credit.name,
    partitions_def=days,
    owners=["team:credit"],
    kinds={"report"},
    automation_condition=dg.AutomationCondition.eager(),
    freshness_policy=by_two,
    ins={"approval": dg.AssetIn(APPROVAL)},
)
def decision_report(
    context: dg.AssetExecutionContext, approval: pl.LazyFrame, applications_file: ApplicationsFile
) -> dg.MaterializeResult[None]:
    """The decisions compared with what became of the applicants: confusion matrix, accuracy, and the share of bad loans avoided."""
    table = against_outcomes(approval, applications_file.outcomes(context.partition_key))
    return dg.MaterializeResult(metadata={"decisions": dg.MetadataValue.md(markdown(table)), **scores(table)})


def scores(table: pl.DataFrame) -> dict[str, float]:
    """`accuracy` among the applications decided without a person, their `automatic_share`, and the `bad_rate` among the approved."""
    count = {row["outcome"]: row for row in table.to_dicts()}
    right, decided = count["approve"]["good"] + count["decline"]["bad"], count["approve"]["applications"] + count["decline"]["applications"]
    return {
        "accuracy": right / max(decided, 1),
        "automatic_share": decided / max(table["applications"].sum(), 1),
        "bad_rate": count["approve"]["bad"] / max(count["approve"]["applications"], 1),
    }


def markdown(table: pl.DataFrame) -> str:
    """A table as the Dagster UI renders it."""
    cells = [[f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value) for value in row] for row in table.rows()]
    lines = [table.columns, ["---"] * table.width, *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
