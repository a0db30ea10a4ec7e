"""`dagster-mao breakers`, as people and programs use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dagster_mao.cli import app
from dagster_mao.errors import BreakerOpenError
from dagster_mao.gateway import Breaker
from dagster_mao.gateway._breaker import SharedBreaker, breakers
from dagster_mao.gateway._shared import SharedStore

MARKUP = "[red]bank\x1b[31m"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project that names nothing, as the working directory; 120 columns."""
    for name in ("DAGSTER_MAO_ROOT", "DAGSTER_MAO_DATABASE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    (tmp_path / "pyproject.toml").write_text("[tool.dagster-mao]\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def use(shared: SharedStore, *, failures: int = 5) -> SharedStore:
    """A store where `credit.approval` has failed, and another breaker has not."""
    approval = SharedBreaker(shared, "credit.approval", Breaker())
    for _ in range(failures):
        approval.admit().failed(TimeoutError("secret-4711"))
    SharedBreaker(shared, MARKUP, Breaker()).admit()
    return shared


def call(*arguments: str | Path, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["breakers", *(str(argument) for argument in arguments)])
    assert result.exit_code == code, result.output
    assert "4711" not in result.output
    assert "\x1b" not in result.output
    return result


def test_list(shared: SharedStore) -> None:
    use(shared)
    said = call("list", "--database", shared.url).output
    (line,) = [line for line in said.splitlines() if line.startswith("credit.approval")]
    assert "open" in line
    assert "5 of 5" in line
    assert "in 30 s" in line or "in 29 s" in line or "in 28 s" in line
    assert "TimeoutError" in line
    assert "2 breakers, 1 not closed." in said
    told = json.loads(call("list", "--json", "--database", shared.url).stdout)
    assert [(row["name"], row["state"], row["failures"], row["fail_max"]) for row in told] == [
        (MARKUP, "closed", 0, 5),
        ("credit.approval", "open", 5, 5),
    ]
    assert told[1]["since"].endswith("Z")
    assert [row["name"] for row in json.loads(call("list", "--open", "--json", "--database", shared.url).stdout)] == ["credit.approval"]


def test_open_close_and_reset_reach_the_callers_and_are_kept(shared: SharedStore) -> None:
    use(shared, failures=1)
    where = ("--database", shared.url, "--by", "ford")
    said = call("open", "credit.approval", "--why", "maintenance", *where).output
    assert "until `dagster-mao breakers close 'credit.approval'`" in said
    with pytest.raises(BreakerOpenError, match="maintenance"):
        SharedBreaker(shared, "credit.approval", Breaker()).admit()
    assert "when closed" in call("list", "--database", shared.url).output
    assert json.loads(call("open", "credit.approval", "--why", "x", "--for", "60", "--json", *where).stdout)["retry_after"] == 60
    assert json.loads(call("close", "credit.approval", "--why", "done", "--json", *where).stdout)["state"] == "closed"
    assert not SharedBreaker(shared, "credit.approval", Breaker()).admit().is_probe
    call("reset", "credit.approval", "--why", "gone", *where)
    assert [state.name for state in breakers(shared)] == [MARKUP]
    told = json.loads(call("list", "credit.approval", "--json", "--database", shared.url).stdout)
    assert told["breakers"] == []
    events = [(event["event"], event["why"], event["by"]) for event in told["events"]]
    assert events == [("reset", "gone", "ford"), ("closed", "done", "ford"), ("open", "x", "ford"), ("open", "maintenance", "ford")]
    assert "maintenance" in call("list", "credit.approval", "--database", shared.url).output


def test_wrong_usage(shared: SharedStore) -> None:
    use(shared)
    where = ("--database", shared.url)
    assert "No circuit breaker 'no such'" in call("close", "no such", "--why", "x", *where, code=1).output
    assert "No circuit breaker 'no such'" in call("list", "no such", *where, code=1).output
    call("close", "credit.approval", *where, code=2)
    call("close", "credit.approval", "--why", " ", *where, code=2)
    call("open", "credit.approval", "--why", "x", "--for", "-1", *where, code=2)
    call("open", "credit.approval", "--why", "x", "--for", "nan", *where, code=2)


def test_no_database(project: Path) -> None:
    assert "No shared database is named" in call("list", code=1).output
    assert "There is no shared database at" in call("list", "--database", project / "none.db", code=1).output
    assert not (project / "none.db").exists()


def test_a_password_is_never_shown() -> None:
    url = "postgresql://ford:hunter2@127.0.0.1:1/towel?password=hunter2"
    said = call("list", "--database", url, code=1).output
    assert "cannot be used" in said
    assert "ford" in said
    assert "hunter2" not in said
    assert "hunter2" not in call("list", "--database", "postgres:hunter2://@@[", code=1).output


def test_where_the_database_is(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options before the environment before pyproject.toml before the local root; a path in pyproject.toml counts from that file."""
    names = ("option", "environment", "configured", "root")
    for name in names:
        file = project / name / "shared.db" if name == "root" else project / f"{name}.db"
        SharedBreaker(SharedStore(file), name, Breaker()).admit()
    below = project / "below"
    below.mkdir()
    monkeypatch.chdir(below)
    (project / "pyproject.toml").write_text('[tool.dagster-mao]\nroot = "root"\n')
    assert _found() == "root"
    for url in ("configured.db", "sqlite:///configured.db"):
        (project / "pyproject.toml").write_text(f'[tool.dagster-mao]\nroot = "root"\ndatabase = "{url}"\n')
        assert _found() == "configured"
    monkeypatch.setenv("DAGSTER_MAO_DATABASE", f"sqlite:///{project / 'environment.db'}")
    assert _found() == "environment"
    assert _found("--database", project / "option.db") == "option"


def _found(*arguments: str | Path) -> str:
    (row,) = json.loads(call("list", "--json", *arguments).stdout)
    return str(row["name"])
