"""An auditor's questions, each answered by one command, on a pipeline that was really run."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Annotated, Any

import dagster as dg
import polars as pl
import pytest
from pydantic import BaseModel, Field
from typer.testing import CliRunner

import dagster_mao as mao
from dagster_mao.cli import app
from dagster_mao.dagster import StateStoreResource
from dagster_mao.errors import AgentFailedError, StoreError
from dagster_mao.review.dossier import Disclosure, dossier
from dagster_mao.review.page import as_html
from dagster_mao.state.log import StateLog

SCRIPT = "<script>alert(1)</script>"
DAY_3 = "credit/2026-03-03"


class Application(BaseModel):
    application_id: Annotated[str, mao.Key]
    name: Annotated[str, mao.Personal]
    amount: int = Field(gt=0)
    purpose: str


class Score(BaseModel):
    application_id: Annotated[str, mao.Key]
    points: int


class Decision(BaseModel):
    application_id: Annotated[str, mao.Key]
    outcome: str
    why: str


@mao.agent(quarantine=mao.Quarantine(max_share=1))
def applications(*, brought: list[dict[str, Any]]) -> list[Application]:
    return brought  # type: ignore[return-value]


@mao.agent(model="scorecard-7", policy=mao.Policy(retries=1))
def score(applications: Application) -> Score:
    return Score(application_id=applications.application_id, points=700 - applications.amount // 10)


@mao.agent
def approval(score: Score) -> Decision:
    declined = score.points < 500
    return Decision(application_id=score.application_id, outcome="declined" if declined else "approved", why=f"{score.points} points")


credit = mao.Pipeline("credit", entry=applications, agents=[score, approval])
BROUGHT = [
    {"application_id": "416", "name": "Ada Lovelace", "amount": 1000, "purpose": "car"},
    {"application_id": "417", "name": "Grace Hopper", "amount": 9000, "purpose": SCRIPT},
    {"application_id": "418", "name": "Mary Somerville", "amount": -5, "purpose": "roof"},
]


def decide(store: mao.StateStore, brought: list[dict[str, Any]] = BROUGHT) -> None:
    mao.run(credit, store=store, workflow="2026-03-03", resources={"brought": brought})


@pytest.fixture
def store(tmp_path: Path) -> mao.StateStore:
    store = mao.StateStore(tmp_path / "state")
    decide(store)
    return store


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("DAGSTER_MAO_ROOT", "DAGSTER_MAO_DATABASE", "DAGSTER_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    (tmp_path / "desk").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "desk")


def audit(store: mao.StateStore, *arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["audit", DAY_3, "--root", store.root, *arguments])
    assert result.exit_code == code, result.output
    return result.output


def written() -> tuple[str, Any]:
    (page,) = Path.cwd().glob("*.html")
    return page.read_text(), json.loads(page.with_suffix(".json").read_text())


def test_why_was_417_declined_what_did_the_score_agent_see_and_has_anybody_touched_it_since(store: mao.StateStore) -> None:
    told = audit(store, "--record", "417")
    assert re.search(r"outcome\s+declined\s+why\s+-200 points", told)
    assert "score @1, from applications@0" in told
    assert re.search(r"amount\s+9000", told)
    assert "Untouched since: 3 versions" in told
    assert "Ada" not in told
    assert "416" not in told
    page, facts = written()
    (decided,) = [v for v in facts["versions"] if v["seal"]["agent"] == "approval"]
    assert decided["said"] == [{"application_id": "417", "outcome": "declined", "why": "-200 points"}]
    assert decided["reads"] == {f"{DAY_3}@1": [{"application_id": "417", "points": -200}]}
    (scored,) = [v for v in facts["versions"] if v["seal"]["agent"] == "score"]
    seen = {"application_id": "417", "name": "***", "amount": 9000, "purpose": SCRIPT}
    assert (scored["reads"], scored["seal"]["model"]) == ({f"{DAY_3}@0": [seen]}, "scorecard-7")
    made = [(call["agent"], call["record"], call["outcome"]) for call in facts["calls"]]
    assert made == [("applications", None, "answered"), ("score", "417", "answered"), ("approval", "417", "answered")]
    assert facts["verification"]["good"] is True
    assert scored["declared"]["policy"]["retries"] == 1
    assert "retries 1" in page
    assert "Everything is as it was sealed" in page


def test_the_page_needs_nothing_else_and_runs_nothing(store: mao.StateStore) -> None:
    audit(store)
    page, _ = written()
    assert SCRIPT not in page
    assert "&lt;script&gt;" in page
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=\"(?!#)", page), "something is loaded from elsewhere"
    assert re.findall(r'class="name">(\w+)<', page) == ["applications", "score", "approval"]
    assert len(re.findall(r'class="arrow"', page)) == 2
    targets = set(re.findall(r'id="([^"]+)"', page))
    assert {link for link in re.findall(r'href="#([^"]+)"', page) if not link.startswith("run-")} <= targets


def test_what_was_touched_is_told_and_does_not_hide_the_rest(store: mao.StateStore) -> None:
    seal = store.seals(DAY_3)[1]
    Path(store.root, seal.path).write_bytes(b"PAR1 something else PAR1")
    told = audit(store, "--record", "417", code=1)
    assert f"file changed: {DAY_3}@1" in told
    assert "This is not what was sealed." in told
    assert re.search(r"outcome\s+declined", told)
    page, facts = written()
    assert f"{DAY_3}@1 cannot be read (TamperedError)" in page
    assert [finding["kind"] for finding in facts["verification"]["findings"]] == ["file_changed"]


def test_personal_fields_are_masked_everywhere_unless_somebody_says_why(store: mao.StateStore) -> None:
    told = audit(store) + "".join(str(part) for part in written())
    for name in ("Grace", "Ada", "Mary"):
        assert name not in told
    audit(store, "--unmask", code=2)
    audit(store, "--why", "curiosity", code=2)
    assert [seal.kind for seal in store.seals(DAY_3)] == ["entry", "output", "output"]

    told = audit(store, "--record", "417", "--unmask", "--why", "complaint 12", "--by", "Hypatia", "--out", "shown.html")
    page = Path("shown.html").read_text()
    assert "Grace Hopper" in told
    assert "Grace Hopper" in page
    assert "Ada Lovelace" not in page
    assert "complaint 12" in page
    seal = store.seals(DAY_3)[-1]
    (row,) = store.disclosures(DAY_3).to_dicts()
    assert (seal.kind, seal.version, row["record"], row["by"], row["why"]) == ("disclosure", 3, "417", "Hypatia", "complaint 12")
    assert "Untouched since: 4 versions" in told, "the disclosure is sealed and chained like everything else"
    assert audit(store, "--out", "again.html").count("Grace") == 0
    assert "complaint 12" in Path("again.html").read_text()


def test_nothing_is_shown_that_could_not_be_recorded(store: mao.StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise StoreError("The log takes nothing")

    monkeypatch.setattr(StateLog, "append", refuse)
    with pytest.raises(StoreError, match="takes nothing"):
        dossier(store, DAY_3, disclosure=Disclosure("Hypatia", "complaint 12"))
    assert "Grace" not in audit(store, "--unmask", "--why", "complaint 12", code=1)
    assert not list(Path.cwd().iterdir())


def test_a_disclosure_changes_nothing_of_what_is_in_effect_and_holds_up_nobody(store: mao.StateStore) -> None:
    before = store.effective(DAY_3)
    attempt = store.open_attempt(
        pipeline="credit", attempt="b", run_id="b", plan=["score"], entry="applications", workflow_key="2026-03-03"
    )
    store.disclose(DAY_3, pl.DataFrame({"record": [None], "why": ["w"], "by": ["b"], "at": [before["score"].sealed_at]}))
    assert store.effective(DAY_3) == before
    assert attempt.pin("applications") == before["applications"]
    decide(store)
    assert store.effective(DAY_3)["approval"].version == 6


def test_a_record_that_only_the_quarantine_has_and_one_that_nobody_has(store: mao.StateStore) -> None:
    told = audit(store, "--record", "418")
    assert "applications" in told
    assert "amount: gt 0" in told
    page, facts = written()
    assert [one["status"] for one in facts["quarantine"]] == ["open"]
    assert "Mary" not in page
    assert "No version holds a record with this key" in audit(store, "--record", "4711", code=1)


def test_an_earlier_decision_is_kept_apart_from_the_one_in_effect(store: mao.StateStore) -> None:
    decide(store, [{**BROUGHT[1], "amount": 100}])
    told = audit(store, "--record", "417")
    assert "approved" in told
    assert "declined" not in told
    page, facts = written()
    assert [v["is_effective"] for v in facts["versions"]] == [False] * 3 + [True] * 3
    assert page.index("approved") < page.index("Versions that are not in effect") < page.index("declined")


def test_json_alone_writes_nothing(store: mao.StateStore) -> None:
    facts = json.loads(audit(store, "--json"))
    assert facts["workflow_id"] == DAY_3
    assert not list(Path.cwd().iterdir())
    audit(store, "--json", "--out", "x.html", code=2)


def test_dagster_says_who_ran_it_what_its_checks_said_and_whether_the_tail_was_cut(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    resource = StateStoreResource(root=str(tmp_path / "state"))
    day = dg.StaticPartitionsDefinition(["2026-03-03"])
    daily = mao.Pipeline("credit", entry=applications, agents=[score, approval], partitions_def=day)
    resources = {"state_store": resource, "brought": dg.ResourceDefinition.hardcoded_resource(BROUGHT)}
    defs = daily.build_definitions(resources=resources)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        run = defs.resolve_job_def("credit_job").execute_in_process(instance=instance, partition_key="2026-03-03", tags={"user": "Hypatia"})
    store = resource.store()
    told = audit(store, "--dagster-home", str(home), "--url", "http://127.0.0.1:3000/")
    assert "3 anchors of Dagster's event log" in told
    page, facts = written()
    assert [(r["run_id"], r["launched_by"], r["status"]) for r in facts["runs"]] == [(run.run_id, "Hypatia", "SUCCESS")]
    assert f'href="http://127.0.0.1:3000/runs/{run.run_id}"' in page
    verdicts = {(check["agent"], check["check"]): check["passed"] for check in facts["checks"]}
    assert verdicts["approval", "output"] is True
    assert verdicts["applications", "output"] is False
    shutil.rmtree(tmp_path / "state" / "state_log")
    decide(store)  # a history that was written anew, with all its digests
    assert "anchor differs" in audit(store, "--dagster-home", str(home), "--out", "b.html", code=1)


def test_the_job_writes_the_page_and_the_asset_leads_to_it(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    resource = StateStoreResource(root=str(tmp_path / "state"))
    decide(resource.store())
    resources = {"state_store": resource, "brought": dg.ResourceDefinition.hardcoded_resource(BROUGHT)}
    job = credit.build_definitions(resources=resources).resolve_job_def("credit_audit")

    def asked(instance: dg.DagsterInstance, **config: str) -> dg.ExecuteInProcessResult:
        run_config = {"ops": {"credit__audit": {"config": config}}}
        return job.execute_in_process(run_config, instance=instance, raise_on_error=False)

    with dg.DagsterInstance.from_config(str(home)) as instance:
        assert asked(instance, workflow=DAY_3, record="417").success
        observed = instance.fetch_observations(dg.AssetKey(["credit", "approval"]), limit=1).records[0].asset_observation
        assert observed is not None
        page = Path(str(observed.metadata["mao/dossier"].value))
        assert page.parent == home / "dossiers"
        assert page.stat().st_mode & 0o077 == 0
        assert "declined" in page.read_text()
        assert "| outcome | declined |" in str(observed.metadata["mao/dossier_summary"].value)
        assert "Grace" not in page.read_text() + str(observed.metadata)
        assert not asked(instance, workflow="other/1").success
        assert not asked(instance, workflow="credit/1999-01-01").success
        Path(resource.root, resource.store().seals(DAY_3)[1].path).write_bytes(b"PAR1")
        assert not asked(instance, workflow=DAY_3).success, "it is not what was sealed"


def test_what_was_undone_is_told(tmp_path: Path) -> None:
    @mao.agent(compensate=lambda undo: None)
    def offer(ctx: mao.AgentContext, score: Score) -> Score:
        ctx.effect("offer", lambda key: None)
        raise ValueError("no paper")

    lending = mao.Pipeline("credit", entry=applications, agents=[score, offer])
    store = mao.StateStore(tmp_path / "state")
    with pytest.raises(AgentFailedError):
        mao.run(lending, store=store, workflow="2026-03-03", resources={"brought": BROUGHT})
    told = dossier(store, DAY_3)
    assert [saga.state for saga in told.compensations] == ["compensated"]
    assert {"the attempt was ended", "the compensation ended: compensated"} <= {event.what for event in told.timeline()}
    page = as_html(told)
    assert "Nothing is in effect" in page
    assert "offer: done" in page
