"""The four-fifths rule on numbers that can be done in the head, and both watchers on sealed snapshots."""

import dagster as dg
import polars as pl
import pytest

from assets.fairness import against_outcomes, approval_rates, markdown, scores
from definitions import build

MEN, WOMEN = "male : single", "female : divorced/separated/married"


def batch(men_approved, women_approved, each=50):
    """`each` men and women, so many of each approved; all of one age and origin."""
    rows = [
        {"application_id": f"{sex[0]}{n}", "personal_status_and_sex": sex, "age_in_years": 40, "foreign_worker": "yes", "ok": n < approved}
        for sex, approved in ((MEN, men_approved), (WOMEN, women_approved))
        for n in range(each)
    ]
    frame = pl.LazyFrame(rows)
    outcome = pl.when("ok").then(pl.lit("approve")).otherwise(pl.lit("decline"))
    return frame.drop("ok"), frame.select("application_id", outcome=outcome)


def ratio(rates, group):
    return rates.filter(group=group)["impact_ratio"].item()


def test_the_ratio_is_against_the_best_group():
    rates = approval_rates(*batch(men_approved=40, women_approved=30))
    assert ratio(rates, MEN) == 1
    assert ratio(rates, WOMEN) == pytest.approx(0.75)
    assert ratio(rates, "over 25") == 1


def test_a_group_too_small_to_judge_is_reported_without_a_ratio():
    rates = approval_rates(*batch(men_approved=20, women_approved=1, each=20))
    assert rates.filter(group=WOMEN)["rate"].item() == pytest.approx(0.05)
    assert ratio(rates, WOMEN) is None


def test_a_batch_in_which_nobody_is_approved_is_no_finding():
    rates = approval_rates(*batch(0, 0))
    assert rates.filter(pl.col("impact_ratio") < 0.8).is_empty()


def test_the_report_counts_referrals_apart():
    decisions = pl.LazyFrame({"application_id": ["a", "b", "c", "d"], "outcome": ["approve", "approve", "decline", "refer"]})
    outcomes = pl.DataFrame({"application_id": ["a", "b", "c", "d"], "outcome": ["good", "bad", "bad", "good"]})
    table = against_outcomes(decisions, outcomes)
    assert table.rows() == [("approve", 1, 1, 2), ("refer", 1, 0, 1), ("decline", 0, 1, 1)]
    assert scores(table) == {"accuracy": pytest.approx(2 / 3), "automatic_share": 0.75, "bad_rate": 0.5}
    assert scores(table.clear().vstack(table.with_columns(pl.col(pl.UInt32) * 0)))["accuracy"] == 0


def test_tables_are_markdown():
    table = pl.DataFrame({"a": [1], "b": [0.123], "c": pl.Series([None], dtype=pl.Float64)})
    assert markdown(table) == "| a | b | c |\n| --- | --- | --- |\n| 1 | 0.12 |  |"


def test_both_run_on_what_the_agents_sealed(tmp_path):
    """One run of the job on a small day: agents, the check and the report, all in Dagster."""
    pl.read_csv("data/german_credit.csv").head(120).write_csv(tmp_path / "small.csv")
    defs = build(state=str(tmp_path / "state"), applications=str(tmp_path / "small.csv"), bank=str(tmp_path / "bank.db"))
    with dg.instance_for_test() as instance:
        result = defs.resolve_implicit_global_asset_job_def().execute_in_process(instance=instance, partition_key="2026-01-02")
    checks = {check.check_name: check for check in result.get_asset_check_evaluations()}
    rows = checks["four_fifths"].metadata["rates"].value.splitlines()
    assert sum(int(row.split("|")[3]) for row in rows[2:]) == 3 * 120
    report = result.asset_materializations_for_node("credit__decision_report")[0]
    assert report.metadata["accuracy"].value > 0.5
