"""Contracts over time and in front of people: an old snapshot under a newer contract, the page of a contract, its export."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import dagster as dg
import jsonschema
import pytest
import yaml
from open_data_contract_standard.model import OpenDataContractStandard
from pydantic import AfterValidator, BaseModel, Field, PastDate
from typer.testing import CliRunner

import dagster_mao as mao
from dagster_mao.boundary import run_agent
from dagster_mao.cli import app
from dagster_mao.contract import Contract, columns, lines
from dagster_mao.dagster.metadata import column_schema, of_agent
from dagster_mao.errors import BatchRefusedError, IncompatibleContractError
from dagster_mao.review.contract import Consumer, page
from dagster_mao.state import Seal, StateStore

SECRET = "Zaphod-Beeblebrox"  # a personal default: filled in, never shown
DAY = "loans/day"


class Address(BaseModel):
    street: Annotated[str, mao.Personal] = Field(description="With the number.")
    zip_code: str = Field(pattern=r"^\d{5}$")


class Application(BaseModel):
    """A loan | application as it came in."""

    application_id: Annotated[str, mao.Key] = Field(min_length=1)
    name: Annotated[str, mao.Personal] = SECRET
    income: float = Field(ge=0, allow_inf_nan=False, description="Per year | in EUR.")
    homes: list[Address] = Field(default_factory=list, max_length=3)
    kind: Literal["new", "old"] = "new"
    since: PastDate | None = None


class Score(BaseModel):
    application_id: Annotated[str, mao.Key]
    score: int = Field(ge=300, le=850)


class GoodScore(Score):
    score: Annotated[int, Field(ge=400), AfterValidator(abs)]


class Decision(BaseModel):
    application_id: Annotated[str, mao.Key]
    why: str


class ScoreV2(BaseModel):
    """With a field that the first version did not have."""

    __contract_version__ = "2"
    application_id: Annotated[str, mao.Key]
    score: int = Field(ge=350, le=850)
    reason: str = "not recorded then"


class ScoreV3(ScoreV2):
    reason: str


ScoreV2.__name__ = ScoreV3.__name__ = "Score"


@mao.agent
def applications() -> list[Application]:
    return [Application(application_id=n, income=50, homes=[Address(street="Elm 1", zip_code="12345")]) for n in ("a", "b")]


@mao.agent
def score(applications: Application) -> Score:
    return Score(application_id=applications.application_id, score=500)


@mao.agent
def decision(score: GoodScore) -> Decision:
    return Decision(application_id=score.application_id, why="good")


LOANS = mao.Pipeline("loans", entry=applications, agents=[score, decision])


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StateStore:
    store = StateStore(tmp_path_factory.mktemp("pages") / "state")
    mao.run(LOANS, store=store, workflow="day")
    return store


def call(store: StateStore, *arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, [*arguments, "--root", store.root], env={"COLUMNS": "120", "NO_COLOR": "1"})
    assert result.exit_code == code, result.output
    assert SECRET not in result.output
    return result.output if code == 2 else result.stdout


# --- an old snapshot under a newer contract ----------------------------------------------------------------------------------------------


def reading(store: StateStore, contract: type[BaseModel], run_id: str) -> Seal:
    """Lets an agent read the score that was sealed before, under another version of the score's contract."""

    def later(score: Any) -> Any:
        return Decision(application_id=score.application_id, why=score.reason)

    later.__annotations__ = {"score": contract, "return": Decision}
    attempt = store.open_attempt(pipeline="loans", attempt=run_id, run_id=run_id, plan=["later"], entry="applications", workflow_key="day")
    return run_agent(store, mao.agent(later), attempt).seal


def test_an_old_snapshot_is_read_under_a_newer_compatible_contract(tmp_path: Path) -> None:
    fresh = StateStore(tmp_path / "state")
    mao.run(LOANS, store=fresh, workflow="day")
    sealed = reading(fresh, ScoreV2, "later")
    assert [row["why"] for row in fresh.read(sealed).collect().to_dicts()] == ["not recorded then"] * 2


def test_an_incompatible_one_is_refused_with_the_field_and_the_reason(store: StateStore) -> None:
    with pytest.raises(IncompatibleContractError) as refused:
        reading(store, ScoreV3, "too-late")
    assert refused.value.what == f"{DAY}@1: what was sealed under Score v1 cannot be read as Score v2: missing, and it has no default"
    assert (refused.value.agent, refused.value.workflow, refused.value.field) == ("later", DAY, "reason")
    assert str(refused.value.fix).startswith("materialise score again under the new contract, or give 'reason' of Score a default")
    assert [check.name for check in refused.value.checks if not check.passed] == ["input_score"]


def test_rows_that_break_the_newer_contract_are_refused_by_its_rules(store: StateStore) -> None:
    class Strict(ScoreV2):
        score: int = Field(ge=600, le=850)

    with pytest.raises(BatchRefusedError) as refused:
        reading(store, Strict, "strict")
    assert [reason["rule"] for check in refused.value.checks if not check.passed for reason in check.metadata["reasons"]] == [
        "score: ge 600"
    ]


def test_a_consumer_reads_less_of_a_nested_model_too(tmp_path: Path) -> None:
    """What its contract does not name never reaches it, at any depth: the street is personal."""

    class Zip(BaseModel):
        zip_code: str

    class Region(BaseModel):
        application_id: Annotated[str, mao.Key]
        homes: list[Zip]

    def region(applications: Any) -> Any:
        return Decision(application_id=applications.application_id, why=str(applications.homes))

    region.__annotations__ = {"applications": Region, "return": Decision}
    store = StateStore(tmp_path / "state")
    result = mao.run(mao.Pipeline("loans", entry=applications, agents=[mao.agent(region)]), store=store, workflow="day")
    assert result["region"]["why"].to_list() == ["[Zip(zip_code='12345')]"] * 2


# --- in the UI ---------------------------------------------------------------------------------------------------------------------------


def test_what_a_consumer_asks_beyond_is_on_the_asset() -> None:
    told = of_agent(LOANS, LOANS.node("decision"))["mao/input_score"]
    assert isinstance(told, dg.MarkdownMetadataValue)
    lines_ = told.value.splitlines()
    assert lines_[0] == "Score v1, read as GoodScore v1"
    assert lines_[2].startswith("- **stricter** `score`: ge 400; the producer promises ge 300, le 850")
    assert lines_[3].startswith("- *unproven* `score`: ")
    assert of_agent(LOANS, LOANS.node("score"))["mao/input_applications"].value.endswith("Asks nothing beyond what is promised.")


def test_the_page_of_a_contract_names_fields_marks_and_consumers() -> None:
    told = of_agent(LOANS, LOANS.node("score"))["mao/contract_page"].value
    assert told.splitlines()[0] == "**Score v1**"
    assert "| `application_id` | String | no | **key** |  |  |" in told
    assert "| `score` | Int64 | no | `ge 300`, `le 850` |  |  |" in told
    assert "- **decision** as GoodScore v1: `application_id`, `score`" in told
    assert "  - **stricter** `score`" in told
    entry = of_agent(LOANS, LOANS.node("applications"))["mao/contract_page"].value
    assert SECRET not in entry
    assert "A loan \\| application as it came in." in entry
    assert "| `name` | String | no | **personal** | `***` |  |" in entry
    assert "| `homes[].street` | String | no | **personal** |  | With the number. |" in entry


def test_nothing_in_a_description_is_markup() -> None:
    description = Contract.of(Score).describe() | {"description": "<b>x</b> | [a](b)\n# `y`"}
    told = page(description, [Consumer("decision")])
    assert told.splitlines()[0] == r"**Score v1**: \<b\>x\</b\> \| \[a\](b) \# \`y\`"


def test_the_column_schema_knows_what_is_inside() -> None:
    shown = {column.name: column for column in column_schema(Contract.of(Application)).columns}
    assert shown["homes"].description == "items.street: personal; With the number."
    assert dict(shown["homes"].tags) == {"personal": "in_part"}
    assert dict(shown["name"].tags) == {"personal": ""}
    assert shown["homes"].constraints.other == ["max_length 3", r"items.zip_code: pattern ^\d{5}$"]
    assert shown["since"].constraints.other == ["in the past", "validated by pydantic"]
    assert shown["application_id"].constraints.unique


def test_deep_fields_are_told_by_their_paths() -> None:
    class Room(BaseModel):
        sizes: list[Annotated[float, Field(gt=0)] | None]

    class House(BaseModel):
        rooms: list[Room]

    (column,) = columns(Contract.of(House))
    assert column.constraints == ["items.sizes.items: gt 0", "items.sizes.items: may be null"]
    assert [(line.field, line.type, line.nullable) for line in lines(Contract.of(House).describe())] == [
        ("rooms", "List(Struct)", False),
        ("rooms[].sizes", "List(Float64)", False),
        ("rooms[].sizes[]", "Float64", True),
    ]


# --- on the command line -----------------------------------------------------------------------------------------------------------------


def test_show_a_contract(store: StateStore) -> None:
    out = call(store, "show", f"{DAY}@0", "--contract")
    assert "A loan | application as it came in." in out
    rows = {line.split()[0]: " ".join(line.split()) for line in out.splitlines() if line}
    assert rows["application_id"] == "application_id String key; min_length 1"
    assert rows["name"] == "name String personal; default ***"
    assert rows["homes[].street"] == "homes[].street String personal With the number."
    assert "Read by: score" in out
    assert [line for line in call(store, "show", DAY, "--contract").splitlines() if line.startswith("Read by")] == [
        "Read by: score",
        "Read by: decision",
        "Read by: nobody in this workflow",
    ]


def test_show_a_contract_as_json(store: StateStore) -> None:
    told = json.loads(call(store, "show", DAY, "--agent", "score", "--contract", "--json"))
    assert (told["agent"], told["version"], told["contract"], told["consumers"]) == ("score", 1, "Score", ["decision"])
    assert [field["name"] for field in told["contract_schema"]["fields"]] == ["application_id", "score"]
    assert [one["agent"] for one in json.loads(call(store, "show", DAY, "--contract", "--json"))] == ["applications", "score", "decision"]


def test_what_changed_between_two_versions_of_a_contract(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "state")
    mao.run(LOANS, store=store, workflow="day")

    @mao.agent(name="score")
    def scored(applications: Application) -> ScoreV2:
        return ScoreV2(application_id=applications.application_id, score=500)

    mao.run(mao.Pipeline("loans", entry=applications, agents=[scored]), store=store, workflow="next")
    out = call(store, "show", "loans/next@1", "--contract", "--against", f"{DAY}@1", code=1)
    assert "breaking for writers  ge 300 became ge 350" in out
    assert "harmless" in out
    told = json.loads(call(store, "show", "loans/next@1", "--contract", "--against", f"{DAY}@1", "--json", code=1))
    assert told["changes"] == [
        {"field": "score", "kind": "breaking for writers", "detail": "ge 300 became ge 350"},
        {"field": "reason", "kind": "harmless", "detail": "added, str; default 'not recorded then' for what was written before"},
    ]
    assert (told["from"]["contract_version"], told["to"]["contract_version"]) == ("1", "2")
    assert "The contracts demand the same." in call(store, "show", f"{DAY}@1", "--contract", "--against", f"{DAY}@1")
    assert "breaking for writers  ge 300 became ge 350" in call(store, "diff", f"{DAY}@1", "loans/next@1", code=1)
    assert json.loads(call(store, "diff", f"{DAY}@1", "loans/next@1", "--json", code=1))["contract"] == told["changes"]
    assert json.loads(call(store, "diff", f"{DAY}@0", "loans/next@0", "--json", code=0))["contract"] == []


@pytest.mark.parametrize(
    "options",
    [
        [DAY, "--odcs"],
        [f"{DAY}@0", "--against", f"{DAY}@1"],
        [DAY, "--contract", "--odcs"],
        [DAY, "--contract", "--against", f"{DAY}@1"],
        [f"{DAY}@0", "--contract", "--against", DAY],
        [f"{DAY}@0", "--contract", "--record", "a"],
        [f"{DAY}@0", "--contract", "--odcs", "--json"],
    ],
)
def test_wrong_usage_is_told(store: StateStore, options: list[str]) -> None:
    call(store, "show", *options, code=2)


# --- as an Open Data Contract ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported(store: StateStore) -> dict[int, dict[str, Any]]:
    return {n: yaml.safe_load(call(store, "show", f"{DAY}@{n}", "--contract", "--odcs")) for n in range(3)}


def test_an_export_is_what_the_standard_says(exported: dict[int, dict[str, Any]]) -> None:
    schema = json.loads(Path(importlib.import_module("open_data_contract_standard").__path__[0], "schema.json").read_text())
    for contract in exported.values():
        jsonschema.Draft201909Validator(schema).validate(contract)
        OpenDataContractStandard.model_validate(contract)


def test_an_export_says_what_the_contract_says(exported: dict[int, dict[str, Any]]) -> None:
    contract = exported[0]
    (table,) = contract["schema"]
    assert (contract["id"], contract["version"], contract["name"]) == ("loans.applications", "1", "Application")
    assert contract["description"]["purpose"] == "A loan | application as it came in."
    fields = {field["name"]: field for field in table["properties"]}
    assert fields["application_id"] == {
        **{"name": "application_id", "physicalType": "string", "logicalType": "string", "logicalTypeOptions": {"minLength": 1}},
        **{"required": True, "unique": True, "primaryKey": True, "primaryKeyPosition": 1},
    }
    assert (fields["name"]["classification"], fields["name"]["tags"], "customProperties" in fields["name"]) == (
        "confidential",
        ["personal"],
        False,
    )
    assert fields["income"]["logicalTypeOptions"] == {"minimum": 0}
    assert fields["income"]["quality"] == [{"type": "text", "description": "finite"}]
    assert [fields[name]["customProperties"] for name in ("kind", "since")] == [
        [{"property": "default", "value": '"new"'}],
        [{"property": "default", "value": "null"}],
    ]
    assert fields["kind"]["enum"] == [{"value": "new"}, {"value": "old"}]
    assert (fields["since"]["logicalType"], fields["since"]["required"]) == ("date", False)
    assert fields["since"]["quality"] == [{"type": "text", "description": "in the past"}]
    assert fields["homes"]["logicalTypeOptions"] == {"maxItems": 3}
    street, zip_code = fields["homes"]["items"]["properties"]
    assert (street["classification"], street["description"]) == ("confidential", "With the number.")
    assert zip_code["logicalTypeOptions"] == {"pattern": r"^\d{5}$"}


def test_without_the_extra_it_is_said_how_to_get_it(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "open_data_contract_standard.model", None)
    result = CliRunner().invoke(app, ["show", f"{DAY}@0", "--contract", "--odcs", "--root", store.root])
    assert (result.exit_code, "pip install 'dagster-mao[odcs]'" in result.stderr) == (1, True)


def test_the_extra_is_not_imported_before_it_is_asked_for() -> None:
    code = "import sys, dagster_mao.cli; print('open_data_contract_standard' in ' '.join(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
