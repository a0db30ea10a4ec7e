"""`dagster-mao quarantine`, as people and programs use it: on a project with a pipeline of its own."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import dagster as dg
import pytest
from pydantic import BaseModel, Field
from typer.testing import CliRunner

import dagster_mao as mao
from dagster_mao.cli import app
from dagster_mao.dagster import build_assets, build_chain_checks
from dagster_mao.dagster.anchors import read_anchors
from dagster_mao.review.quarantine import accounts, refusals
from dagster_mao.state.verify import verify

SECRET = "Agrajag"
MARKUP_KEY = "[red]1\x1b[31m"
DAY = "loans/2026-01-02"
MODULE = """
from typing import Annotated

import dagster as dg
from pydantic import BaseModel, Field

import dagster_mao as mao

HALF = mao.Quarantine(max_share=0.9)


class Application(BaseModel):
    application_id: Annotated[str, mao.Key]
    name: Annotated[str, mao.Personal]
    amount: int = Field(gt=0)
    purpose: str = "any"
    urgent: bool = False


class Small(BaseModel):
    application_id: Annotated[str, mao.Key]
    amount: int = Field(le=100)


class Score(BaseModel):
    application_id: Annotated[str, mao.Key]
    score: int


@mao.agent(quarantine=HALF)
def applications() -> list[Application]:
    raise AssertionError("a correction asks nobody for the day's applications again")


@mao.agent(quarantine=HALF)
def score(applications: Small) -> Score:
    return Score(application_id=applications.application_id, score=applications.amount)


@mao.agent
def decision(score: Score) -> Score:
    return score


loans = mao.Pipeline(
    "loans", entry=applications, agents=[score, decision], partitions_def=dg.DailyPartitionsDefinition(start_date="2026-01-01")
)
other = mao.Pipeline("other", entry=applications)
"""


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    """A project that names its pipeline and its root, as the working directory; 80 columns."""
    with working_in(tmp_path) as project:
        yield project


@pytest.fixture(scope="module")
def sealed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which a good and a bad application were sealed, to be copied."""
    with working_in(tmp_path_factory.mktemp("sealed")) as project:
        seal(project, 7, -1)
    return project


@pytest.fixture
def copied(sealed: Path, project: Path) -> Path:
    """The same project, as if the test had sealed it."""
    shutil.copytree(sealed / "state", project / "state")
    return project


@contextmanager
def working_in(folder: Path) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as monkeypatch:
        yield from _project(folder, monkeypatch)


def _project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in ("DAGSTER_MAO_ROOT", "DAGSTER_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "loans_of_quarantine.py").write_text(MODULE)
    (tmp_path / "pyproject.toml").write_text(
        '[tool.dagster-mao]\nroot = "state"\ndagster_home = "home"\n'
        'pipelines = ["loans_of_quarantine:other", "loans_of_quarantine:loans"]\n'
    )
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("loans_of_quarantine", None)


def pipeline(project: Path) -> mao.Pipeline:
    sys.path.insert(0, str(project))
    import loans_of_quarantine

    loans: mao.Pipeline = loans_of_quarantine.loans
    return loans


def seal(project: Path, *amounts: Any, keys: list[str] | None = None) -> mao.StateStore:
    store = mao.StateStore(project / "state")
    names = keys or [str(n) for n in range(len(amounts))]
    records = [{"application_id": key, "name": SECRET, "amount": amount} for key, amount in zip(names, amounts, strict=True)]
    mao.run(pipeline(project), records, store=store, workflow="2026-01-02")
    return store


def call(*arguments: str | Path, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["quarantine", *(str(argument) for argument in arguments)])
    assert result.exit_code == code, result.output
    assert SECRET not in result.output
    return result


def told(result: Any) -> Any:
    return json.loads(result.stdout)


# list -------------------------------------------------------------------------------------------------------------------------------


def test_list_for_people(project: Path) -> None:
    seal(project, 7, -1, "a lot", 5000, keys=["0", MARKUP_KEY, "2", "3"])
    out = call("list").stdout
    assert [line for line in out.splitlines() if line.startswith("loans/")] == [DAY]
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "[red]1\\x1b[31m" in out
    assert "amount: gt 0" in out
    assert "3 records open." in out
    assert f"dagster-mao quarantine show '{DAY}@0'" in out


def test_list_for_programs_and_by_agent(project: Path) -> None:
    seal(project, 7, -1, "a lot", 5000)
    rows = told(call("list", DAY, "--json"))
    assert [(row["version"], row["agent"], row["record"], row["status"]) for row in rows] == [
        (0, "applications", "1", "open"),
        (0, "applications", "2", "open"),
        (1, "score", "3", "open"),
    ]
    assert rows[1]["values"] == {"application_id": "2", "name": "***", "amount": "a lot"}
    assert [row["agent"] for row in told(call("list", "--agent", "score", "--json"))] == ["score"]


def test_list_says_what_it_does_not_show(project: Path) -> None:
    seal(project, 7, -1, -2)
    call("discard", f"{DAY}@0", "--record", "1", "--why", "withdrawn", "--by", "ford")
    seal(project, 7, -1, -3)
    out = call("list").stdout
    assert "1 record open." in out
    assert "1 superseded" in out
    assert "discarded" in out
    statuses = {(row["version"], row["record"]): row["status"] for row in told(call("list", "--all", "--json"))}
    assert statuses == {(0, "1"): "discarded", (0, "2"): "superseded", (4, "1"): "discarded", (4, "2"): "open"}
    assert "superseded" in call("list", "--all").stdout


def test_list_of_nothing_and_of_nowhere(project: Path) -> None:
    call("list", code=1)
    seal(project, 7)
    assert call("list").stdout == "No record is open.\n"
    assert "did you mean 'loans/2026-01-02'" in call("list", "loans/2026-01-03", code=1).stderr


# show -------------------------------------------------------------------------------------------------------------------------------


def test_show(project: Path) -> None:
    seal(project, 7, -1, "a lot")
    out = call("show", f"{DAY}@0").stdout
    assert "3 came in = 1 sealed + 2 in quarantine + 0 discarded" in out
    assert "***" in out
    assert "a lot" in out
    one = call("show", f"{DAY}@0", "--record", "1").stdout
    assert "a lot" not in one
    rows = told(call("show", f"{DAY}@0", "--json"))
    assert (rows["came_in"], rows["balanced"], len(rows["records"])) == (3, True, 2)
    for reference, code, said in (("@9", 1, "No version 9"), ("", 2, "write WORKFLOW@N")):
        assert said in call("show", f"{DAY}{reference}", code=code).stderr
    assert "no such record" in call("show", f"{DAY}@0", "--record", "0", code=1).stderr


class Person(BaseModel):
    name: Annotated[str, mao.Key, mao.Personal]
    amount: int = Field(gt=0)


@mao.agent(quarantine=mao.Quarantine(max_share=1))
def people() -> list[Person]:
    return []


def test_records_whose_key_is_personal_are_named_by_their_digest(project: Path) -> None:
    store = mao.StateStore(project / "state")
    mao.run(mao.Pipeline("people", entry=people), [{"name": SECRET, "amount": -1}], store=store, workflow="day")
    (row,) = told(call("list", "--json"))
    assert row["record"] == "***"
    digest = row["digest"][:12]
    for command in (["list"], ["show", "people/day@0"]):
        assert digest in call(*command).stdout
    call("discard", "people/day@0", "--record", digest, "--why", "no customer")
    assert call("list").stdout.startswith("No record is open.")


# discard ----------------------------------------------------------------------------------------------------------------------------


def test_discard(project: Path) -> None:
    store = seal(project, 7, -1, -2)
    out = call("discard", f"{DAY}@0", "--record", "1", "--why", "withdrawn", "--by", "ford").stdout
    assert f"Discarded 1 record of {DAY}, at applications@0. The decision is {DAY}@3." in out
    assert "discarded: withdrawn (ford, " in call("show", f"{DAY}@0", "--record", "1").stdout
    assert "1 record of" in call("discard", f"{DAY}@0", "--all", "--why", "old").stdout
    assert "Nothing is left to discard." in call("discard", f"{DAY}@0", "--all", "--why", "old").stdout
    assert accounts(store, store.seal_at(DAY, 0)).discarded == 2


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--record", "1"], 2),
        (["--why", "x"], 2),
        (["--record", "1", "--all", "--why", "x"], 2),
        (["--record", "1", "--why", " "], 2),
        (["--record", "0", "--why", "x"], 1),
    ],
)
def test_discard_takes_no_less_and_no_more(copied: Path, arguments: list[str], code: int) -> None:
    call("discard", f"{DAY}@0", *arguments, code=code)
    assert len(mao.StateStore(copied / "state").seals(DAY)) == 3


def test_a_superseded_version_is_not_decided_on(project: Path) -> None:
    seal(project, 7, -1)
    seal(project, 7, -1)
    for command in (["discard", "--why", "x"], ["resubmit", "--set", "amount=1"]):
        said = call(command[0], f"{DAY}@0", "--record", "1", *command[1:], code=1).stderr
        assert f"applications is at {DAY}@3 now" in said


# resubmit ---------------------------------------------------------------------------------------------------------------------------


def entry(store: mao.StateStore) -> dict[str, Any]:
    return {row["application_id"]: row for row in store.read(store.effective(DAY)["applications"]).collect().to_dicts()}


def test_resubmit_by_fields(project: Path) -> None:
    store = seal(project, 7, -1, "a lot")
    changes = ["--set", "amount=12", "--set", "purpose=12", "--set", "urgent=true"]
    out = call("resubmit", f"{DAY}@0", "--record", "1", *changes, "--by", "ford").stdout
    assert entry(store)["1"] == {"application_id": "1", "name": SECRET, "amount": 12, "purpose": "12", "urgent": True}
    assert f"Sealed {DAY}@3, a new entry with 1 record corrected: 2 sealed, 1 in quarantine." in out
    assert "there is no Dagster home at" in out
    assert "without applications: score, decision." in " ".join(out.split())
    assert "--partition '2026-01-02' --select 'loans/score,loans/score_quarantine,loans/decision'" in out


@pytest.mark.parametrize("name", ["fixed.jsonl", "fixed.csv"])
def test_resubmit_from_a_file(project: Path, name: str) -> None:
    store = seal(project, 7, -1, "a lot", 5000)
    lines = {
        "fixed.jsonl": '{"application_id": "1", "amount": 1}\n\n{"application_id": "2", "amount": 2, "urgent": true}\n',
        "fixed.csv": "\ufeffapplication_id,amount,urgent\r\n1,1,\r\n2,2,true\r\n",
    }
    (project / name).write_text(lines[name], encoding="utf-8")
    call("resubmit", f"{DAY}@0", "--from", name)
    assert {key: (row["amount"], row["urgent"]) for key, row in entry(store).items()} == {
        "0": (7, False),
        "3": (5000, False),
        "1": (1, False),
        "2": (2, True),
    }
    assert [row["record"] for row in told(call("list", "--json"))] == ["3"]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.jsonl", '{"application_id": "1", "amount": 1}\n{"amount', "a.jsonl: Line 2 is no JSON"),
        ("a.jsonl", "[1, 2]", "no JSON object"),
        ("a.jsonl", '{"amount": 1}', "line 1: the record has no application_id"),
        ("a.jsonl", "\n", "holds no record"),
        ("a.jsonl", '{"application_id": "1"}\n{"application_id": "1"}', "a second record by this application_id"),
        ("a.jsonl", '{"application_id": "1", "amuont": 1}', "has no field 'amuont'"),
        ("a.jsonl", '{"application_id": "0", "amount": 1}', "no such record in quarantine"),
        ("a.jsonl", '{"application_id": "1", "amount": -5}', "breaks Application: amount: gt 0"),
        ("a.csv", "application_id,amount\n1,2,3\n", "Line 2 has 3 cells, the header has 2"),
        ("a.csv", "application_id,application_id\n1,2\n", "names a column twice"),
        ("a.csv", 'application_id,amount\n1,"2\n', "no CSV"),
        ("a.csv", "amount\n2\n", "the record has no application_id"),
        ("a.csv", "application_id,amount\n1,much\n", "amount: int_parsing"),
    ],
)
def test_bad_corrections_are_refused_and_nothing_is_sealed(copied: Path, name: str, text: str, told: str) -> None:
    (copied / name).write_text(text)
    assert told in call("resubmit", f"{DAY}@0", "--from", name, code=1).stderr
    assert len(mao.StateStore(copied / "state").seals(DAY)) == 3


def test_files_that_are_none(copied: Path) -> None:
    (copied / "latin.csv").write_bytes("application_id,purpose\n1,Möbel\n".encode("latin-1"))
    assert "is not UTF-8" in call("resubmit", f"{DAY}@0", "--from", "latin.csv", code=1).stderr
    assert "cannot be read" in call("resubmit", f"{DAY}@0", "--from", "absent.csv", code=1).stderr
    call("resubmit", f"{DAY}@0", "--from", "records.xlsx", code=2)
    for wrong in (["--set", "amount=1"], ["--record", "1"], ["--record", "1", "--set", "amount"], ["--record", "1", "--set", "=1"]):
        call("resubmit", f"{DAY}@0", *wrong, code=2)


@pytest.mark.parametrize(
    ("place", "code", "told"),
    [
        ("loans_of_quarantine:absent", 1, "cannot be imported: AttributeError"),
        ("no_such_module:loans", 1, "cannot be imported: ModuleNotFoundError"),
        ("loans_of_quarantine:HALF", 1, "is a Quarantine, not a mao.Pipeline"),
        ("loans_of_quarantine:other", 1, "No pipeline that is named has this workflow; there is other"),
        ("loans_of_quarantine", 2, "module:attribute"),
    ],
)
def test_a_pipeline_that_cannot_be_had(copied: Path, place: str, code: int, told: str) -> None:
    said = call("resubmit", f"{DAY}@0", "--record", "1", "--set", "amount=1", "--pipeline", place, code=code).stderr
    assert told in " ".join(said.replace("│", "").split())


def test_a_project_that_names_no_pipeline(copied: Path) -> None:
    (copied / "pyproject.toml").write_text('[tool.dagster-mao]\nroot = "state"\n')
    said = call("resubmit", f"{DAY}@0", "--record", "1", "--set", "amount=1", code=1).stderr
    assert "--pipeline module:attribute" in said


def test_somebody_who_resubmits_at_the_same_moment_is_told_what_to_do(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seal(project, 7, -1, -2)
    honest = mao.StateStore.open_attempt

    def late(self: mao.StateStore, **options: Any) -> Any:
        monkeypatch.setattr(mao.StateStore, "open_attempt", honest)
        mao.resubmit(pipeline(project), mao.StateStore(project / "state"), DAY, {"1": {"amount": 1}})
        return honest(self, **options)

    monkeypatch.setattr(mao.StateStore, "open_attempt", late)
    said = call("resubmit", f"{DAY}@0", "--record", "2", "--set", "amount=2", code=1).stderr
    assert "Another entry was sealed" in said
    assert "resubmit what is left" in said


def test_the_corrected_record_is_decided_when_dagster_materialises_the_agents(project: Path) -> None:
    """The whole way: a day with bad records, a correction on the command line, the agents again in the partition, not the entry."""
    store = seal(project, 7, -1, "a lot", 5000)
    (project / "home").mkdir()
    (project / "home" / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    assert "knows of it" in call("resubmit", f"{DAY}@0", "--record", "1", "--set", "amount=3").stdout
    call("resubmit", f"{DAY}@1", "--record", "3", "--set", "amount=50")
    loans = pipeline(project)
    state = mao.StateStoreResource(root=str(project / "state"))
    given = {"state_store": state, "state_io_manager": mao.StateIOManager(state_store=state), "policies": mao.PolicyOverrides()}
    below = ["score", "score_quarantine", "decision"]
    with dg.DagsterInstance.from_config(str(project / "home")) as instance:
        known = instance.get_latest_materialization_event(dg.AssetKey(["loans", "applications"]))
        assert known.asset_materialization.partition == "2026-01-02"
        assert known.asset_materialization.metadata["mao/state_version"].value == f"{DAY}@5"
        result = dg.materialize(
            [*build_assets(loans), *build_chain_checks(loans)],
            instance=instance,
            resources=given,
            partition_key="2026-01-02",
            selection=[dg.AssetKey(["loans", name]) for name in below],
        )
        anchors = read_anchors(instance, ["loans"])
    assert result.success
    checks = {(e.asset_key.path[-1], e.check_name): e.passed for e in result.get_asset_check_evaluations()}
    assert checks["score_quarantine", "accounted"]
    effective = store.effective(DAY)
    assert sorted(store.read(effective["decision"]).collect()["application_id"]) == ["0", "1", "3"]
    assert [parent.version for parent in effective["score"].parents] == [5]
    assert all(accounts(store, one).balanced for one in effective.values())
    assert [(refusal.key, refusal.status) for refusal in refusals(store, DAY)] == [("2", "open")]
    report = verify(store, DAY, anchors=anchors)
    assert report.good
    assert report.anchored == 4
