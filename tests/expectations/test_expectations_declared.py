"""What an agent declares about its batch is read, named and checked at load, and nothing of Great Expectations is imported for it."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import polars as pl
import pytest
from pydantic import BaseModel

import dagster_mao as mao
from dagster_mao.contract import Contract
from dagster_mao.errors import WiringError
from dagster_mao.expectations import Expectations, Suite


class Address(BaseModel):
    street: Annotated[str, mao.Personal]
    country: str


class Decision(BaseModel):
    application_id: Annotated[str, mao.Key]
    name: Annotated[str, mao.Personal]
    score: float | None
    amount: int
    outcome: str
    reasons: list[str]
    address: Address


CONTRACT = Contract.of(Decision)
MEAN = "expect_column_mean_to_be_between"


def suite(declared, home=Path(".")):
    return Suite.of(declared, CONTRACT, agent="approval", home=home)


def one(type, severity="critical", meta=None, **kwargs):
    return {"type": type, "kwargs": kwargs, "severity": severity, "meta": meta or {}}


def test_names_are_readable_stable_and_legal():
    declared = [
        one(MEAN, column="score"),
        one(MEAN, column="score", min_value=1),
        one("expect_column_pair_values_a_to_be_greater_than_b", column_A="amount", column_B="score"),
        one("expect_table_row_count_to_be_between", min_value=1),
        one(MEAN, column="amount", meta={"name": "Mean amount (DM)"}),
        one(MEAN, column="amount", meta={"name": "output"}),
    ]
    assert [e.name for e in suite(declared).expectations] == [
        "expect_column_mean_to_be_between__score",
        "expect_column_mean_to_be_between__score__2",
        "expect_column_pair_values_a_to_be_greater_than_b__amount__score",
        "expect_table_row_count_to_be_between",
        "expect_Mean_amount_DM",
        "expect_output",  # not the name of the boundary's own check
    ]


def test_critical_blocks_and_the_others_warn():
    severities = ["critical", "warning", "info"]
    found = suite([one(MEAN, severity, column="score") for severity in severities]).expectations
    assert [(e.gx_severity, e.severity) for e in found] == [("critical", "error"), ("warning", "warn"), ("info", "warn")]


@pytest.mark.parametrize(
    ("declared", "says"),
    [
        ([one("expect_column_mean_to_be_betwen", column="score")], "did you mean 'expect_column_mean_to_be_between'"),
        ([one(MEAN, column="scor")], "did you mean 'score'"),
        ([one("expect_column_values_to_be_unique", column="reasons")], 'pl.col("reasons").list.len()'),
        ([one("expect_column_values_to_be_unique", column="address")], "struct.field"),
        ([one("expect_column_pair_values_to_be_equal", column_A="amount", column_B="no")], "'no'"),
        ([one("expect_compound_columns_to_be_unique", column_list=["amount", "no"])], "'no'"),
        ([one(MEAN, "fatal", column="score")], "critical (blocks), warning or info"),
        ([one(MEAN, column="score", min_value={"$PARAMETER": "previous_mean_scor"})], "previous_mean_<column>"),
        ([one(MEAN, column="score", min_value={"$PARAMETER": "last_year"})], "previous_row_count"),
        ([one(MEAN, column="score", min_value={"$PARAMETER": "previous_mean_outcome"})], "no number"),
        (
            [
                one(
                    "expect_column_quantile_values_to_be_between",
                    column="score",
                    quantile_ranges={"x": [{"$PARAMETER": "previous_row_count"}]},
                )
            ],
            "whole argument",
        ),
        ([one("unexpected_rows_expectation", unexpected_rows_query="select 1")], "queries a database"),
        ([{"expectation_type": MEAN, "kwargs": {"column": "score"}}], "GX 0.x"),
        ([{"type": MEAN, "kwargs": {"column": "score"}, "severty": "warning"}], "severty"),
        ([{"kwargs": {}}], "names no `type`"),
        ([object()], "expectation 1 is a object"),
        ({"type": MEAN}, "is a dict"),
        (7, "is a int"),
        ("no_such.json", "no_such.json"),
        (Expectations([], columns={"score": pl.col("amount")}), "named 'score'"),
        (Expectations([], columns={"twice": pl.col("nothing") * 2}), "ColumnNotFoundError"),
        (Expectations([], columns={"twice": 2}), "is a int"),
    ],
)
def test_what_is_wrong_is_said_at_load(declared, says):
    with pytest.raises(WiringError) as raised:
        suite(declared)
    assert says in str(raised.value)
    assert raised.value.agent == "approval"
    assert raised.value.field
    assert raised.value.fix


@pytest.mark.parametrize(("content", "says"), [("{", "is not JSON"), ("[]", "no list `expectations`"), ('{"expectations": 1}', "no list")])
def test_a_file_that_is_no_suite_is_said_at_load(tmp_path, content, says):
    (tmp_path / "suite.json").write_text(content)
    with pytest.raises(WiringError, match=says):
        suite("suite.json", tmp_path)


def test_a_pipeline_says_it_at_load_too():
    @mao.agent(expectations=[one(MEAN, column="scor")])
    def decisions() -> Decision:
        raise NotImplementedError

    with pytest.raises(WiringError, match="did you mean 'score'"):
        mao.Pipeline("credit", entry=decisions)


def test_what_looks_at_a_personal_column_is_personal():
    declared = Expectations(
        [
            one(MEAN, column="score"),
            one("expect_column_values_to_be_unique", column="name"),
            one(MEAN, column="score", row_condition='col("name") == "Zaphod"', condition_parser="great_expectations"),
            one("expect_column_unique_value_count_to_be_between", column="street"),
            one("expect_table_row_count_to_be_between", min_value={"$PARAMETER": "previous_unique_value_count_name"}),
        ],
        columns={"street": pl.col("address").struct.field("street")},
    )
    assert [e.personal for e in suite(declared).expectations] == [False, True, True, True, True]


def test_the_bytes_of_a_suite_file_count_in_the_agents_version(tmp_path, monkeypatch):
    module = tmp_path / "deciding.py"
    module.write_text(
        "from typing import Annotated\nimport dagster_mao as mao\nfrom pydantic import BaseModel\n"
        "class D(BaseModel):\n    k: Annotated[str, mao.Key]\n    score: float\n"
        '@mao.agent(expectations="suite.json")\ndef decisions() -> list[D]: ...\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    code = "import deciding; deciding.decisions.resolve(); print(deciding.decisions.agent_version)"
    versions = []
    for least in (1, 2):
        (tmp_path / "suite.json").write_text(json.dumps({"name": "s", "expectations": [one(MEAN, column="score", min_value=least)]}))
        versions.append(python(code, cwd=tmp_path))
    assert versions[0].startswith("sha256:")
    assert versions[0] != versions[1]


def test_the_import_is_light_and_so_are_agents_and_steps_without_the_need():
    """great_expectations takes seconds to import: neither the package, nor a declaration, nor a step without a suite pays."""
    code = """
import sys
from typing import Annotated
from pydantic import BaseModel
import dagster_mao as mao

class D(BaseModel):
    k: Annotated[str, mao.Key]
    score: float

@mao.agent
def plain() -> list[D]:
    return [D(k="a", score=1)]

@mao.agent(expectations=[{"type": "expect_column_mean_to_be_between", "kwargs": {"column": "score"}}])
def expecting(plain: D) -> D:
    return plain

pipeline = mao.Pipeline("p", entry=plain, agents=[expecting])
assert len(expecting.suite.expectations) == 1
mao.run(mao.Pipeline("q", entry=plain))
import dagster_mao.dagster
pipeline.build_definitions(resources={"state_store": mao.StateStoreResource(root="/nowhere")})
print(sorted({name.partition(".")[0] for name in sys.modules} & {"great_expectations", "pandas", "scipy", "altair"}))
"""
    assert python(code) == "[]"


def python(code: str, cwd: Path | None = None) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=cwd).stdout.strip()
