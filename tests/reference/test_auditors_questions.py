"""What an auditor asks about a decision of long ago, each answered by one command, on real applications."""

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

import dagster_mao as mao
from assets.contracts import PROTECTED
from assets.pipeline import credit
from dagster_mao.cli import app
from resources.applications import ApplicationsFile
from resources.core_bank import CoreBank

DAY, DECLINED = "credit/2026-03-03", "app-0406"
SHIPPED = ApplicationsFile(path="data/german_credit.csv")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Twenty applications of 3 March, and what was decided on them."""
    folder = tmp_path_factory.mktemp("audited")
    given = {"core_bank": CoreBank(path=str(folder / "bank.db")), "applications_file": SHIPPED}
    store = mao.StateStore(folder / "state")
    mao.run(credit, SHIPPED.read().slice(400, 20), resources=given, store=store, workflow="2026-03-03")
    return Path(store.root)


@pytest.fixture
def ask(root, tmp_path, monkeypatch):
    """One command, and what it prints; its answer is good unless another exit code is expected."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("DAGSTER_HOME", raising=False)

    def answer(*command, code=0, of=root):
        result = CliRunner().invoke(app, [*command, "--root", str(of)])
        assert result.exit_code == code, result.output
        return result.stdout

    return answer


def said(answer, agent):
    """The record as an agent said it, by field."""
    lines = iter(answer.splitlines())
    next(line for line in lines if agent in line and "@" in line)
    told = {}
    for line in lines:
        if not line.strip():
            break
        field, _, value = line.partition(" ")
        told[field] = value.strip()
    return told


def test_why_was_it_declined(ask):
    answer = ask("show", DAY, "--record", DECLINED)
    decision = said(answer, "approval")
    assert decision["outcome"] == "decline"
    assert said(answer, "risk_assessment")["grade"] == "high"
    assert '"status_of_existing_checking_account -' in decision["reasons"], "each reason with its points"


def test_what_did_the_score_agent_see(ask):
    """What it pinned, as the applicant had sent it; not who the applicant is."""
    answer = ask("step", DAY, "--agent", "credit_score", "--record", DECLINED)
    assert "saw applications, version 0 (1 of 20)" in answer
    seen = said(answer.replace("saw applications", "saw applications @0"), "saw applications")
    sent = SHIPPED.read().filter(application_id=DECLINED).row(0, named=True)
    assert {seen[field] for field in PROTECTED} == {"***"}
    assert {name: value for name, value in seen.items() if value != "***"} == {
        name: str(value) for name, value in sent.items() if seen[name] != "***"
    }
    assert seen.keys() == sent.keys()


def test_has_anybody_touched_it_since(ask):
    assert "All of this is as it was sealed." in ask("verify", DAY)


@pytest.mark.parametrize("agent", ["applications", "credit_score", "approval"])
def test_somebody_touched_a_file_and_which_one(ask, root, tmp_path, agent):
    """One bit, in the middle of what one agent had sealed; the file is as long as it was."""
    copy = shutil.copytree(root, tmp_path / "touched")
    (file,) = (copy / "tables" / "credit" / agent).rglob("_version=*/*.parquet")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    answer = ask("verify", DAY, of=copy, code=1)
    assert "1 finding: this is not what was sealed." in answer
    assert file.name in answer
    assert "This is not what was sealed." in ask("audit", DAY, "--out", str(tmp_path / "told.html"), of=copy, code=1)


def test_all_of_it_on_one_page(ask, tmp_path):
    page = tmp_path / "406.html"
    answer = ask("audit", DAY, "--record", DECLINED, "--out", str(page))
    assert said(answer, "approval")["outcome"] == "decline"
    assert "approval @5, from risk_assessment@4, fraud_detection@3" in answer
    assert "Untouched since: 6 versions, 6 files." in answer
    html = page.read_text()
    assert all(name in html for name in (DECLINED, *credit.order))
    assert not any(other in html for other in ("app-0405", "app-0407")), "a dossier of one record is of nobody else"


def test_which_release_of_which_agent_decided(ask):
    lines = {line.split()[0]: line for line in ask("agents", "list", "credit").splitlines()}
    assert {f"credit/{name}" for name in credit.order} < lines.keys()
    assert "Risk v1" in lines["credit/risk_assessment"]
    registered = lines["credit/approval"].split()[-1]
    assert registered in ask("show", f"{DAY}@5"), "the version names the release that made it"


def test_would_it_be_declined_today(ask):
    """By today's code, on what was seen then. At the bank nothing happens."""
    answer = ask("replay", f"{DAY}@5")
    assert "The records are the same." in answer
    assert "none was" in answer
