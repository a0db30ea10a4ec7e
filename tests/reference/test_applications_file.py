"""Files as they come in from elsewhere: what is wrong with them must reach the entry's check, or be said in one sentence."""

import polars as pl
import pytest

import dagster_mao as mao
from assets.contracts import PROTECTED, Application
from assets.pipeline import credit
from dagster_mao.contract import Contract
from resources.applications import OUTCOME, ApplicationsFile
from resources.core_bank import CoreBank

SHIPPED = "data/german_credit.csv"


def test_the_shipped_file_keeps_the_contract_and_hides_its_outcome():
    frame = ApplicationsFile(path=SHIPPED).read()
    assert Contract.of(Application).check(frame).passed
    assert frame.height == 1000
    assert OUTCOME not in frame.columns
    assert set(PROTECTED) <= set(frame.columns)
    assert frame["application_id"][[0, 999]].to_list() == ["app-0001", "app-1000"]


def test_known_outcomes_belong_to_the_same_ids():
    outcomes = ApplicationsFile(path=SHIPPED).outcomes()
    assert outcomes.group_by("outcome").len().sort("outcome").rows() == [("bad", 300), ("good", 700)]


def test_each_day_has_its_file_where_the_path_says_so(tmp_path):
    (tmp_path / "2026-01-02.csv").write_text("application_id,credit_amount\nb7,100\n")
    file = ApplicationsFile(path=str(tmp_path / "{day}.csv"))
    assert file.read(day="2026-01-02")["application_id"].to_list() == ["b7"]
    with pytest.raises(mao.InvalidRecordsError, match=r"2026-01-03\.csv"):
        file.read(day="2026-01-03")


def test_an_empty_file_is_no_batch(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    with pytest.raises(mao.InvalidRecordsError, match="header"):
        ApplicationsFile(path=str(tmp_path / "empty.csv")).read()


def test_a_day_without_applications_is_an_empty_batch(tmp_path):
    (tmp_path / "quiet.csv").write_text(pl.read_csv(SHIPPED).clear().write_csv())
    frame = ApplicationsFile(path=str(tmp_path / "quiet.csv")).read()
    assert frame.height == 0
    assert Contract.of(Application).check(frame).passed


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda frame: frame.drop("credit_amount"), "credit_amount"),
        (lambda frame: frame.with_columns(pl.col("credit_amount").cast(pl.String).replace("1169", "a lot")), "credit_amount"),
        (lambda frame: frame.with_columns(pl.col("duration_in_month") * 0), "duration_in_month"),
        (lambda frame: frame.with_columns(application_id=pl.lit("twice")), "application_id"),
    ],
    ids=["missing column", "text in a number column", "bound broken", "duplicate keys"],
)
def test_a_spoilt_file_is_refused_by_the_contract_with_the_field_named(tmp_path, spoil, reason):
    spoil(pl.read_csv(SHIPPED)).write_csv(tmp_path / "spoilt.csv")
    verdict = Contract.of(Application).check(ApplicationsFile(path=str(tmp_path / "spoilt.csv")).read())
    assert {failure.field for failure in verdict.failures} == {reason}


def test_one_bad_record_is_no_bad_file(tmp_path):
    """The file to try the quarantine with: three of its forty applications break the contract, one in a personal field."""
    rows = ApplicationsFile(path="data/day_with_errors.csv").records()
    bank = CoreBank(path=str(tmp_path / "bank.db"))
    result = mao.run(credit, rows, resources={"core_bank": bank, "applications_file": ApplicationsFile(path=SHIPPED)})
    entry = result.seals["applications"]
    refused = result.store.quarantine(entry).select("record", "rules").rows()
    assert sorted(refused) == [
        ("app-0007", ["credit_amount: int_parsing"]),
        ("app-0018", ["duration_in_month: not null"]),
        ("app-0031", ["age_in_years: ge 18"]),
    ]
    assert (entry.row_count, result["approval"].height) == (37, 37)
    assert "-36" not in str(result.checks)


@pytest.mark.parametrize("spoil", [lambda frame: frame.drop("purpose"), lambda frame: frame.with_columns(notes=pl.lit("?"))])
def test_wrong_columns_refuse_the_file(tmp_path, spoil):
    spoil(pl.read_csv(SHIPPED)).write_csv(tmp_path / "wrong.csv")
    with pytest.raises(mao.InvalidRecordsError, match=r"column too many or too few: '(purpose|notes)'"):
        ApplicationsFile(path=str(tmp_path / "wrong.csv")).records()


def test_a_day_without_applications_has_no_records(tmp_path):
    (tmp_path / "quiet.csv").write_text(pl.read_csv(SHIPPED).clear().write_csv())
    assert ApplicationsFile(path=str(tmp_path / "quiet.csv")).records() == []
