"""`dagster-mao compensate`, as people and programs use it."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from typer.testing import CliRunner

from dagster_mao.cli import app
from tests.dagster.test_saga import StubbornBank
from tests.journal.bank import Bank
from tests.journal.world import DAY, World, act_of, expected

AMOUNTS = {"A1": 100, "A2": 200}
CODE = """
import dagster as dg
from tests.journal.bank import Bank
from tests.dagster.test_saga import StubbornBank

bank = {bank}({path!r})
defs = dg.Definitions(resources={{"bank": dg.ResourceDefinition.hardcoded_resource(bank)}})
"""


class Project:
    """A project with its pyproject.toml, code and state, in which attempts fail."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.world = World(folder / "state", Bank(folder / "bank.db"))
        (folder / "home").mkdir()
        (folder / "home" / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
        self.code("Bank")
        table = {"root": "state", "dagster_home": "home", "definitions": f"{name}:defs"}
        lines = [f'{key} = "{value}"' for key, value in table.items()] + ['pipelines = ["tests.journal.world:PIPELINE"]']
        (folder / "pyproject.toml").write_text("\n".join(["[tool.dagster-mao]", *lines, ""]))

    def code(self, bank: str) -> None:
        (self.folder / f"{self.name}.py").write_text(CODE.format(bank=bank, path=str(self.folder / "bank.db")))

    def forget(self) -> None:
        """As another process: the code that was loaded is not."""
        del sys.modules[self.name]
        importlib.invalidate_caches()

    def fail(self, attempt: str) -> None:
        def act(effects: Any, record: str, bank: Any) -> None:
            if record == "A2":
                raise ValueError(record)
            act_of("approval")(effects, record, bank)

        with pytest.raises(ValueError, match="A2"):
            self.world.attempt(attempt, AMOUNTS, approval=act)

    @property
    def standing(self) -> dict[tuple[str, str], int]:
        return self.world.bank.standing()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Project:
    for name in ("DAGSTER_MAO_ROOT", "DAGSTER_MAO_DATABASE", "DAGSTER_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.chdir(tmp_path)
    return Project(tmp_path, f"code_of_{abs(hash(request.node.name))}")


def call(*arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["compensate", *arguments])
    assert result.exit_code == code, result.output
    assert "4711" not in result.output
    return result


def test_a_failed_attempt_is_undone_by_hand_and_dagster_is_told(project: Project) -> None:
    project.fail("one")
    plan = call(DAY, "--dry-run").output
    assert plan.index("approval") < plan.index("inquiry")
    assert "Nothing was changed" in plan
    assert len(project.standing) == 4
    assert "waits" in call("--status", code=1).output
    assert "compensated" in call(DAY).output
    assert project.standing == {}
    assert "compensated" in call("--status").output
    (told,) = json.loads(call(DAY, "--status", "--json").stdout)["compensations"]
    assert (told["attempt"], told["state"], told["left"]) == ("one", "compensated", [])
    with dg.DagsterInstance.from_config(str(project.folder / "home")) as instance:
        (observed,) = instance.fetch_observations(dg.AssetKey(["loans", "approval"]), limit=5).records
        assert "its effects were undone" in observed.event_log_entry.asset_observation.description
    assert "nothing to be compensated" in call(DAY, code=1).output


def test_what_another_code_location_has_is_left_to_it_and_said(project: Project) -> None:
    project.fail("one")
    first, second = (("--pipeline", f"tests.saga.test_locations:{name}") for name in ("FIRST", "SECOND"))
    plan = call(DAY, *first, "--dry-run").output
    assert "undone in another code location" in plan
    assert "undone, after others" in plan
    said = call(DAY, *first, code=1).output
    assert "handed over" in said
    assert "left: approval (pending)" in said
    assert "code locations that have these agents" in said
    assert len(project.standing) == 4
    assert "running" in call("--status", code=1).output
    assert "left: inquiry (pending)" in call(DAY, *second, code=1).output
    assert "compensated" in call(DAY, *first).output
    assert project.standing == {}


def test_what_is_left_is_said_until_it_is_tried_again(project: Project) -> None:
    project.fail("one")
    project.code(StubbornBank.__name__)
    said = call(DAY, code=1).output
    assert "incomplete" in said
    assert "approval (ConnectionError)" in said
    assert "ConnectionError" in call("--status", code=1).output
    assert "--resume" in call(DAY, code=1).output
    assert len(project.standing) == 4
    assert "incomplete" in call(DAY, "--resume", code=1).output, "it is tried again, and fails again"
    (left,) = json.loads(call(DAY, "--status", "--json", code=1).stdout)["compensations"]
    assert [(undo["agent"], undo["tries"]) for undo in left["undos"]] == [("approval", 2), ("inquiry", 2)]

    project.code(Bank.__name__)
    project.forget()
    (mended,) = json.loads(call(DAY, "--resume", "--json").stdout)
    assert (mended["state"], mended["left"]) == ("compensated", [])
    assert project.standing == {}
    assert "compensated" in call("--status").output
    assert "nothing to be compensated" in call(DAY, "--resume", code=1).output


def test_a_completed_attempt_is_left_alone(project: Project) -> None:
    project.world.attempt("one", AMOUNTS)
    assert "nothing to be compensated" in call(DAY, code=1).output
    assert "void" in call(DAY, "--attempt", "one").output
    assert project.standing == expected(AMOUNTS)
    assert "nothing is to be" in call("--status").output


def test_wrong_usage(project: Project) -> None:
    project.fail("one")
    call(code=2)
    (project.folder / "pyproject.toml").write_text('[tool.dagster-mao]\nroot = "state"\npipelines = ["tests.journal.world:PIPELINE"]\n')
    assert "definitions" in call(DAY, code=1).output
    assert len(project.standing) == 4
