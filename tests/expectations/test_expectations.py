"""Suites judged by the real Great Expectations: verdicts, missing values, empty batches, the version before, what is shown of it all."""

import datetime as dt
import json
import logging
import re
import socket
import warnings
from decimal import Decimal
from pathlib import Path
from typing import Annotated

import great_expectations as gx
import great_expectations.expectations as gxe
import pandas as pd
import polars as pl
import pytest
from great_expectations.expectations.conditions import Column
from great_expectations.expectations.registry import list_registered_expectation_implementations
from pydantic import BaseModel

import dagster_mao as mao
from dagster_mao.contract import Contract
from dagster_mao.errors import WiringError
from dagster_mao.expectations import Expectations, Suite, _declared, _engine, report

SECRET = "Zaphod-Beeblebrox"
MEAN, BETWEEN, IN_SET = "expect_column_mean_to_be_between", "expect_column_values_to_be_between", "expect_column_values_to_be_in_set"


class Decision(BaseModel):
    application_id: Annotated[str, mao.Key]
    name: Annotated[str | None, mao.Personal] = SECRET
    age: Annotated[int, mao.Personal] = 424242
    score: float | None
    amount: int
    outcome: str
    reasons: list[str] = []


CONTRACT = Contract.of(Decision)


def batch(rows=100, **columns):
    """Awkward on purpose: a list column, personal values that would be seen anywhere, and more than is looked at."""
    made = {
        "application_id": [f"app-{n}" for n in range(rows)],
        "name": [f"{SECRET}-{n}" for n in range(rows)],
        "age": [424242 + n for n in range(rows)],
        "score": [float(n) for n in range(rows)],
        "amount": [100 + n for n in range(rows)],
        "outcome": ["approve" if n % 2 else "decline" for n in range(rows)],
        "reasons": [[f"{SECRET} in a list"] for _ in range(rows)],
    }
    return pl.DataFrame({**made, **columns}, schema=CONTRACT.schema)


def one(type, severity="critical", **kwargs):
    return {"type": type, "kwargs": kwargs, "severity": severity}


def judged(declared, frame=None, previous=None, home=Path(".")):
    suite = Suite.of(declared, CONTRACT, agent="approval", home=home)
    return suite.judge((batch() if frame is None else frame).lazy(), None if previous is None else previous.lazy())


def only(declared, frame=None, previous=None):
    (finding,) = judged([declared] if isinstance(declared, dict) else declared, frame, previous)
    return finding


def naive(frame, *expectations):
    """Great Expectations as its tutorials have it."""
    asset = gx.get_context(mode="ephemeral").data_sources.add_pandas("naive").add_dataframe_asset("naive")
    found = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": pd.DataFrame(frame.to_dict(as_series=False))})
    return found.validate(gx.ExpectationSuite("naive", expectations=list(expectations))).success


# -- verdicts ------------------------------------------------------------------------------------------------------------------------


def test_verdicts_and_observed_values_are_gxs_in_the_order_of_declaration():
    findings = judged(
        [
            one(MEAN, column="score", min_value=49, max_value=50),
            one(BETWEEN, column="amount", max_value=150, mostly=0.6),
            one("expect_table_row_count_to_be_between", "warning", max_value=10),
            one(
                "expect_column_quantile_values_to_be_between",
                column="amount",
                quantile_ranges={"quantiles": [0.5], "value_ranges": [[0, 1]]},
            ),
            one("expect_column_pair_values_a_to_be_greater_than_b", column_A="amount", column_B="score"),
            one("expect_column_distinct_values_to_equal_set", column="outcome", value_set=["approve", "decline"]),
        ]
    )
    assert [f.passed for f in findings] == [True, False, False, False, True, True]
    assert findings[0].metadata["observed_value"] == 49.5
    between = findings[1].metadata
    assert (between["element_count"], between["unexpected_count"], between["unexpected_percent"]) == (100, 49, 49.0)
    assert between["reasons"] == [{"rule": BETWEEN, "field": "amount", "count": 49, "samples": [{"amount": n} for n in range(151, 156)]}]
    assert (findings[2].severity, findings[2].metadata["observed_value"]) == ("warn", 100)
    assert isinstance(findings[3].metadata["observed_value_0.5"], (int, float))  # a number of its own, so that Dagster plots it


def test_gxs_own_objects_a_suite_and_a_file_say_the_same(tmp_path):
    """A suite that exists goes through its file and comes out the same."""
    expectations = [
        gxe.ExpectColumnMeanToBeBetween(column="score", min_value=60, severity="warning"),
        gxe.ExpectColumnMaxToBeBetween(column="amount", max_value=1, row_condition=Column("outcome") == "approve"),
        gxe.ExpectTableRowCountToBeBetween(min_value={"$PARAMETER": "previous_row_count * 2"}),
    ]
    suite = gx.ExpectationSuite("approval", expectations=expectations)
    (tmp_path / "suite.json").write_text(json.dumps(suite.to_json_dict()))
    found = [judged(form, previous=batch(60), home=tmp_path) for form in (expectations, suite, "suite.json", tmp_path / "suite.json")]
    assert [[f.name, f.passed, f.severity] for f in found[0]] == [
        ["expect_column_mean_to_be_between__score", False, "warn"],
        ["expect_column_max_to_be_between__amount", False, "error"],
        ["expect_table_row_count_to_be_between", False, "error"],
    ]
    assert found[0][1].metadata["observed_value"] == 199  # of the approved ones
    shown = [[(f.name, f.passed, f.severity, f.description, f.metadata.get("observed_value")) for f in findings] for findings in found]
    assert shown[1:] == shown[:1] * 3


def test_a_custom_expectation_is_taken_as_an_object():
    class ExpectColumnMaxToBeAnswer(gxe.ExpectColumnMaxToBeBetween):
        min_value: float = 42
        max_value: float = 42

    finding = only([ExpectColumnMaxToBeAnswer(column="score")], batch(43))
    assert (finding.name, finding.passed) == ("expect_column_max_to_be_answer__score", True)


def test_wrong_arguments_are_told_before_the_agent_runs():
    suite = Suite.of([one(MEAN, column="score", minimum=1)], CONTRACT, agent="approval", home=Path("."))
    with pytest.raises(WiringError, match="minimum") as raised:
        suite.prepare()
    assert (raised.value.agent, raised.value.field) == ("approval", "score")


def test_an_expectation_that_raises_fails_its_check_by_the_exceptions_name_alone():
    finding = only(one("expect_column_sum_to_be_between", column="name", max_value=1))
    assert not finding.passed
    assert finding.metadata["exception"] == "TypeError"
    assert SECRET not in json.dumps(finding.metadata) + finding.description


def test_when_gx_finds_nothing_at_all_every_check_says_so(monkeypatch):
    monkeypatch.setattr("great_expectations.validator.validator.Validator.graph_validate", lambda *_, **__: int(SECRET))
    findings = judged([one(MEAN, column="score"), one(MEAN, column="amount")])
    assert [(f.passed, f.metadata["exception"]) for f in findings] == [(False, "ValueError")] * 2
    assert SECRET not in str(findings)


def test_polars_works_out_what_gx_cannot_look_at():
    declared = Expectations(
        [
            one(MEAN, column="approved", min_value=0.4, max_value=0.6),
            one("expect_column_max_to_be_between", column="reasons_count", max_value=0),
        ],
        columns={"approved": pl.col("outcome") == "approve", "reasons_count": pl.col("reasons").list.len()},
    )
    share, count = judged(declared)
    assert (share.passed, share.metadata["observed_value"]) == (True, 0.5)
    assert (count.passed, count.metadata["observed_value"]) == (False, 1)


def test_expectations_about_which_columns_there_are_see_all_of_them():
    assert only(one("expect_table_columns_to_match_ordered_list", column_list=list(CONTRACT.schema))).passed
    assert only(one("expect_table_column_count_to_equal", value=len(CONTRACT.schema))).passed
    assert only(one("expect_column_to_exist", column="reasons")).passed
    assert not only(one("expect_table_columns_to_match_set", column_set=["score"])).passed


def test_only_the_columns_that_are_asked_about_are_read(monkeypatch):
    seen = []
    convert = _engine.as_pandas
    monkeypatch.setattr(_engine, "as_pandas", lambda frame, codes: seen.append(frame.columns) or convert(frame, codes))
    judged(
        [
            one(MEAN, column="score"),
            gxe.ExpectColumnMeanToBeBetween(column="amount", row_condition=Column("outcome") == "approve"),
        ]
    )
    assert seen == [["score", "amount", "outcome"]]


@pytest.mark.parametrize(
    ("kind", "kwargs"),
    [
        (IN_SET, {"value_set": ["a", "b"]}),
        ("expect_column_values_to_not_be_in_set", {"value_set": ["b"]}),
        ("expect_column_distinct_values_to_be_in_set", {"value_set": ["a"]}),
        ("expect_column_distinct_values_to_contain_set", {"value_set": ["z"]}),
        ("expect_column_distinct_values_to_equal_set", {"value_set": ["a", "b", ""]}),
        ("expect_column_unique_value_count_to_be_between", {"min_value": 3, "max_value": 3}),
        ("expect_column_proportion_of_unique_values_to_be_between", {"max_value": 0.5}),
        (
            "expect_column_kl_divergence_to_be_less_than",
            {"partition_object": {"values": ["a", "b", ""], "weights": [0.4, 0.3, 0.3]}, "threshold": 1},
        ),
        ("expect_column_values_to_not_be_null", {"mostly": 0.5}),
        ("expect_column_values_to_be_null", {"mostly": 0.5}),
        ("expect_column_proportion_of_non_null_values_to_be_between", {"min_value": 0.5}),
    ],
)
def test_text_that_goes_by_codes_is_judged_as_text(kind, kwargs, monkeypatch):
    """Codes make it ten times cheaper, and change nothing."""
    frame = batch(120, outcome=["a", "b", "", None] * 30)
    by_codes = only([one(kind, column="outcome", **kwargs)], frame)
    monkeypatch.setattr("dagster_mao.expectations._suite._BY_CODES", set())
    as_text = only([one(kind, column="outcome", **kwargs)], frame)
    assert (by_codes.passed, by_codes.metadata) == (as_text.passed, as_text.metadata)


def test_every_scalar_type_reaches_gx_with_its_values():
    class Wide(BaseModel):
        k: Annotated[str, mao.Key]
        day: dt.date
        at: dt.datetime
        price: Decimal
        big: int | None
        flag: bool | None
        took: dt.timedelta
        alarm: dt.time
        raw: bytes

    contract = Contract.of(Wide)
    noon = dt.datetime(2026, 1, 2, 12, tzinfo=dt.timezone.utc)
    same = {"at": noon, "price": Decimal("2.5"), "flag": True, "took": dt.timedelta(1), "alarm": dt.time(7), "raw": b"x"}
    frame = contract.to_frame(
        [
            Wide(k="a", day=dt.date(2026, 1, 2), big=2**60 + 1, **same),
            Wide(k="b", day=dt.date(2026, 1, 3), big=None, **{**same, "flag": None}),
        ]
    )
    declared = [
        gxe.ExpectColumnMaxToBeBetween(column="day", max_value=dt.datetime(2026, 1, 3)),  # noqa: DTZ001
        gxe.ExpectColumnMinToBeBetween(column="at", min_value=noon),
        gxe.ExpectColumnSumToBeBetween(column="price", min_value=5, max_value=5),
        gxe.ExpectColumnValuesToBeInSet(column="big", value_set=[2**60 + 1], mostly=0.5),  # a float would hold 2**60
        gxe.ExpectColumnValuesToBeInSet(column="flag", value_set=[True], mostly=0.5),
        gxe.ExpectColumnUniqueValueCountToBeBetween(column="took", max_value=1),
        gxe.ExpectColumnUniqueValueCountToBeBetween(column="alarm", max_value=1),
        gxe.ExpectColumnUniqueValueCountToBeBetween(column="raw", max_value=1),
    ]
    findings = Suite.of(declared, contract, agent="wide", home=Path(".")).judge(frame.lazy())
    assert {f.name: f.description for f in findings if not f.passed} == {}


# -- missing values ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", [None, float("nan")])
def test_missing_values_are_not_skipped_in_silence(missing):
    """GX looks at what is there: a column that is all but empty has a fine mean, and no value in it is out of bounds."""
    scores = [500.0] + [missing] * 99
    frame = batch(score=pl.Series(scores, dtype=pl.Float64, strict=False))
    mean, between = (
        gxe.ExpectColumnMeanToBeBetween(column="score", min_value=400),
        gxe.ExpectColumnValuesToBeBetween(column="score", min_value=400),
    )
    assert naive(frame.select("score"), mean, between)
    findings = judged([mean, between], frame)
    assert [f.passed for f in findings] == [False, False]
    assert [f.metadata["missing_count"] for f in findings] == [99, 99]
    assert findings[0].metadata["reasons"] == [{"rule": "missing values", "field": "score", "count": 99, "samples": []}]


def test_what_is_missing_counts_as_broken_against_mostly():
    frame = batch(score=[None] * 30 + [1.0] * 70)
    assert only(one(BETWEEN, column="score", min_value=1, mostly=0.7), frame).passed
    assert not only(one(BETWEEN, column="score", min_value=1, mostly=0.71), frame).passed


def test_a_suite_that_says_how_many_may_be_missing_has_said_it():
    frame = batch(score=[None] * 30 + [1.0] * 70)
    said = [one(MEAN, column="score", min_value=1), one("expect_column_values_to_not_be_null", column="score", mostly=0.7)]
    assert [f.passed for f in judged(said, frame)] == [True, True]
    said[1]["kwargs"]["mostly"] = 0.8
    assert [f.passed for f in judged(said, frame)] == [True, False]


def test_only_the_rows_of_the_condition_are_looked_at_for_what_is_missing():
    frame = batch(4, outcome=["approve", "approve", "decline", "decline"], score=[1.0, 1.0, 1.0, None])
    verdicts = {}
    for outcome in ("approve", "decline"):
        asked = {"row_condition": {"type": "comparison", "column": {"name": "outcome"}, "operator": "==", "parameter": outcome}}
        verdicts[outcome] = only(one(MEAN, column="score", min_value=1, **asked), frame).passed
    assert verdicts == {"approve": True, "decline": False}


def test_rows_that_a_pair_skips_count_as_broken_unless_it_says_which_it_ignores():
    frame = batch(2, score=[None, 1.0])
    declared = [one("expect_column_pair_values_to_be_equal", column_A="score", column_B="again")]
    columns = {"again": pl.col("score")}
    (finding,) = judged(Expectations(declared, columns), frame)
    assert (finding.passed, finding.metadata["missing_count"]) == (False, 1)
    declared[0]["kwargs"]["ignore_row_if"] = "both_values_are_missing"
    assert judged(Expectations(declared, columns), frame)[0].passed


def test_an_empty_batch_is_judged_by_its_rows_and_the_rest_is_said_to_be_skipped():
    assert naive(pl.DataFrame({"score": []}), gxe.ExpectColumnValuesToBeBetween(column="score", min_value=400))
    between, rows = judged(
        [one(BETWEEN, column="score", min_value=400), one("expect_table_row_count_to_be_between", min_value=1)], batch(0)
    )
    assert (between.passed, between.metadata["skipped"]) == (True, "the batch is empty")
    assert "element_count" not in between.metadata
    assert (rows.passed, rows.metadata["observed_value"]) == (False, 0)


# -- the version before --------------------------------------------------------------------------------------------------------------

DRIFT = [
    one("expect_table_row_count_to_be_between", min_value={"$PARAMETER": "previous_row_count * 0.5"}),
    one(
        MEAN,
        column="score",
        min_value={"$PARAMETER": "previous_mean_score - 2 * previous_stdev_score"},
        max_value={"$PARAMETER": "previous_max_score"},
    ),
    one(
        "expect_column_kl_divergence_to_be_less_than",
        column="score",
        partition_object={"$PARAMETER": "previous_partition_score"},
        threshold=0.2,
    ),
    one(
        "expect_column_kl_divergence_to_be_less_than",
        column="outcome",
        partition_object={"$PARAMETER": "previous_partition_outcome"},
        threshold=0.1,
    ),
]


def test_the_same_again_has_not_drifted():
    findings = judged(DRIFT, batch(), batch())
    assert [f.passed for f in findings] == [True] * 4
    assert findings[3].metadata["observed_value"] == 0
    assert findings[0].metadata["arguments"] == {"min_value": 50}  # what it was compared with


def test_drift_is_found_and_measured():
    drifted = batch(40, score=[200.0 + n for n in range(40)], outcome=["approve"] * 36 + ["decline"] * 4)
    findings = judged(DRIFT, drifted, batch())
    assert [f.passed for f in findings] == [False] * 4
    assert all(isinstance(f.metadata["observed_value"], (int, float)) for f in findings)


def test_negative_and_tiny_values_survive_gxs_expressions():
    before = batch(3, score=[-3e-7, -3e-7, -3e-7])
    bounds = {"min_value": {"$PARAMETER": "previous_mean_score * 1.1"}, "max_value": {"$PARAMETER": "previous_mean_score * 0.9"}}
    assert only(one(MEAN, column="score", **bounds), before, before).passed


@pytest.mark.parametrize(
    "expression", ["previous_mean_score *", "previous_partition_outcome * 2", "previous_mean_score previous_row_count"]
)
def test_an_expression_that_is_none_is_told_before_the_agent_runs(expression):
    suite = Suite.of([one(MEAN, column="score", min_value={"$PARAMETER": expression})], CONTRACT, agent="approval", home=Path("."))
    with pytest.raises(WiringError, match="no expression"):
        suite.prepare()


def test_an_expression_that_fails_on_the_values_fails_its_check_alone():
    by_nothing = one(MEAN, column="score", min_value={"$PARAMETER": "previous_mean_score / previous_min_score"})
    findings = judged([by_nothing, one(MEAN, column="score")], batch(), batch())
    assert [f.passed for f in findings] == [False, True]
    assert findings[0].metadata["exception"] == "ZeroDivisionError"


@pytest.mark.parametrize(
    ("previous", "reason"),
    [(None, "there is no previous version"), (batch(0), "previous_"), (batch().drop("score", "outcome"), "previous_")],
)
def test_without_a_version_to_compare_with_drift_is_skipped_and_says_so(previous, reason):
    findings = judged(DRIFT[1:], batch(), previous)
    assert [f.passed for f in findings] == [True] * 3
    assert all(reason in f.metadata["skipped"] and "Not judged" in f.description for f in findings)


@pytest.mark.parametrize("values", [list(range(100)), [1, 1, 1, 2, 2, 3], [5, 5, 5, 5, 5, 5, 5, 5, 5, 7, 9], [-1.5, 0.0, 0.25, 1e9]])
def test_the_bins_hold_what_gx_counts_in_them(values):
    """Else the same batch would have drifted from itself."""
    frame = batch(len(values) * 100, score=[float(value) for value in values] * 100)
    assert only(DRIFT[2], frame, frame).metadata["observed_value"] < 0.01


def test_a_column_that_was_constant_has_no_distribution_to_drift_from():
    assert "previous_partition_score" in only(DRIFT[2], batch(), batch(5, score=[1.0] * 5)).metadata["skipped"]


def test_values_worked_out_by_polars_can_be_compared_too():
    declared = Expectations(
        [one(MEAN, column="approved", min_value={"$PARAMETER": "previous_mean_approved"})], {"approved": pl.col("outcome") == "approve"}
    )
    assert judged(declared, batch(), batch())[0].passed
    assert not judged(declared, batch(outcome=["decline"] * 100), batch())[0].passed


# -- what is shown -------------------------------------------------------------------------------------------------------------------

PERSONAL = [
    one(IN_SET, column="name", value_set=["Trillian"]),
    one("expect_column_most_common_value_to_be_in_set", column="name", value_set=["Trillian"]),
    one("expect_column_distinct_values_to_be_in_set", column="name", value_set=["Trillian"]),
    one("expect_column_max_to_be_between", column="age", max_value=1),
    one("expect_column_quantile_values_to_be_between", column="age", quantile_ranges={"quantiles": [0.5], "value_ranges": [[0, 1]]}),
    one("expect_column_pair_values_a_to_be_greater_than_b", column_A="score", column_B="age"),
    one("expect_compound_columns_to_be_unique", column_list=["name", "outcome"]),
    one(MEAN, column="score", min_value={"$PARAMETER": "previous_min_age"}),
    one(
        "expect_column_kl_divergence_to_be_less_than",
        column="name",
        partition_object={"$PARAMETER": "previous_partition_name"},
        threshold=0.1,
    ),
    one("expect_column_values_to_match_regex", column="name", regex="^T"),
    one("expect_column_sum_to_be_between", column="name", max_value=1),
]


def test_personal_values_are_masked_in_findings_and_on_the_page():
    frame = batch(20, name=[f"{SECRET}-{n % 3}" for n in range(20)])
    findings = judged(PERSONAL, frame, frame)
    written = json.dumps([vars(f) for f in findings]) + report("Approval", {}, findings)
    assert SECRET not in written
    assert "42424" not in written
    assert findings[0].metadata["reasons"][0]["samples"] == [{"name": "***"}] * 5
    assert findings[3].metadata["observed_value"] == "***"
    assert findings[5].metadata["reasons"][0]["samples"][0]["age"] == "***"
    assert not any(f.passed for f in findings[:6])


def test_the_page_opens_offline_and_says_everything():
    findings = judged(
        [*DRIFT, one(BETWEEN, "info", column="amount", max_value=1), one(IN_SET, column="outcome", value_set=["<script>alert(1)</script>"])]
    )
    page = report("What approval was expected to seal", {"workflow": "credit/<b>", "records": "100"}, findings)
    assert not re.search(r"(?i)https?:|//|<script|<link|<img|@import|url\(", page)
    for told in ("credit/&lt;b&gt;", "there is no previous version", "1 warned", "1 failed", "4 not judged", "max_value = 1"):
        assert told in page


def test_nothing_is_logged_sent_or_left_behind(tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("it asked the network"))
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings():
        warnings.simplefilter("error")
        judged(PERSONAL, previous=batch())
    assert list(tmp_path.rglob("*")) == []
    assert capfd.readouterr() == ("", "")
    assert SECRET not in caplog.text
    assert "42424" not in caplog.text
    assert logging.getLogger("great_expectations").level == logging.NOTSET


def test_a_context_of_the_users_own_stays_the_current_one():
    from great_expectations.data_context.data_context.context_factory import project_manager

    own = gx.get_context(mode="ephemeral")
    judged([one(MEAN, column="score")])
    assert project_manager.get_current_project() is own


# -- what this stands on -------------------------------------------------------------------------------------------------------------


def test_the_files_of_gx_name_its_expectations(monkeypatch):
    """Wrong names are told at load without importing GX, by looking at which files it has."""
    registered = set(list_registered_expectation_implementations())
    monkeypatch.delitem(_declared.sys.modules, "great_expectations.expectations.registry")
    found = _declared.known_types()
    assert {name for name in registered if not name.endswith("_answer")} <= found
    assert len(found) > 50
