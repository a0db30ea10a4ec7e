"""The command line, as people and programs use it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from typer.testing import CliRunner

from dagster_mao.cli import app
from dagster_mao.state import Seal, StateStore
from tests.sealed import MARKUP_KEY, MONDAY, NESTED_SECRET, PIPELINE, SECRET, TUESDAY, applications, seal_attempt, two_days

PROMISED = [
    *("workflow_id", "version", "kind", "agent", "attempt", "epoch", "parents", "digest", "seal_digest", "previous_digest"),
    *("row_count", "quarantined", "contract", "agent_version", "config", "run_id", "sealed_at", "table", "uri"),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli") / "state"
    two_days(StateStore(root))
    return root


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory and an environment that name no store; 80 columns."""
    for name in ("DAGSTER_MAO_ROOT", "DAGSTER_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    folder = tmp_path / "nowhere"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def call(*arguments: str | Path, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def told(result: Any) -> Any:
    return json.loads(result.stdout)


def materialise(seals: list[Seal], home: Path) -> None:
    """Leaves in a Dagster home what runs that sealed these would have left."""
    home.mkdir(exist_ok=True)
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    with dg.DagsterInstance.from_config(str(home)) as instance:
        for seal in seals:
            metadata = {"mao/seal_digest": seal.seal_digest, "mao/state_version": seal.reference, "dagster/uri": seal.uri}
            instance.report_runless_asset_event(dg.AssetMaterialization([PIPELINE, seal.agent], metadata=metadata))


# history --------------------------------------------------------------------------------------------------------------------------


def test_history_for_people(root: Path) -> None:
    out = call("history", "--root", root).stdout
    assert [line for line in out.splitlines() if line.startswith("loans/")] == [MONDAY, TUESDAY]
    assert all(len(line) <= 80 for line in out.splitlines())
    assert "decision" in out


def test_history_as_json(root: Path) -> None:
    versions = told(call("history", MONDAY, "--json", "--root", root))
    assert [version["version"] for version in versions] == list(range(6))
    assert all(list(version)[: len(PROMISED)] == PROMISED for version in versions)
    assert versions[1]["parents"][0]["digest"] == versions[0]["digest"]
    assert versions[3]["previous_digest"] == versions[2]["seal_digest"]
    assert len(told(call("history", "--json", "--root", root))) == 9


def test_history_says_what_it_leaves_out(root: Path) -> None:
    out = call("history", MONDAY, "--limit", "2", "--root", root).stdout
    assert "4 older versions are not shown; --limit 0 shows all." in out
    assert [version["version"] for version in told(call("history", MONDAY, "--limit", "2", "--json", "--root", root))] == [4, 5]


# show -----------------------------------------------------------------------------------------------------------------------------


def test_show_a_workflow(root: Path) -> None:
    out = call("show", MONDAY, "--root", root).stdout
    assert f"dagster-mao show '{MONDAY}@5'" in out
    state = told(call("show", MONDAY, "--json", "--root", root))
    assert [(version["agent"], version["version"]) for version in state["versions"]] == [("application", 3), ("score", 4), ("decision", 5)]
    assert (state["workflow_id"], state["head"]) == (MONDAY, 5)


def test_show_a_workflow_without_a_completed_attempt(tmp_path: Path) -> None:
    store = StateStore(tmp_path / "state")
    seal_attempt(store, "day", "first", applications(1.0), only=["application"])
    assert "No attempt has completed" in call("show", "loans/day", "--root", store.root).stdout
    assert told(call("show", "loans/day", "--json", "--root", store.root))["versions"] == []


def test_show_a_version(root: Path) -> None:
    out = call("show", f"{MONDAY}@4", "--root", root).stdout
    assert f"{MONDAY}@4: score" in out
    assert f"application {MONDAY}@3" in out
    version = told(call("show", f"{MONDAY}@4", "--rows", "1", "--json", "--root", root))
    assert list(version)[: len(PROMISED)] == PROMISED
    assert version["records"] == [{"id": MARKUP_KEY, "score": 100}]
    assert version["contract_schema"]["name"] == "Score"


def test_show_one_agents_version(root: Path) -> None:
    assert told(call("show", MONDAY, "--agent", "score", "--json", "--root", root))["version"] == 4
    assert "it has application, score, decision" in call("show", MONDAY, "--agent", "scores", "--root", root, code=1).stderr
    assert "is by score, not by decision" in call("show", f"{MONDAY}@4", "--agent", "decision", "--root", root, code=1).stderr


def test_show_a_record_through_all_agents(root: Path) -> None:
    found = told(call("show", MONDAY, "--record", "A2", "--json", "--root", root))
    assert [(version["agent"], version["records"]) for version in found["versions"]][1:] == [
        ("score", [{"id": "A2", "score": 950}]),
        ("decision", [{"id": "A2", "approved": True}]),
    ]
    assert "score  950" in call("show", MONDAY, "--record", "A2", "--root", root).stdout
    assert "score  950" not in call("show", f"{MONDAY}@1", "--record", "A2", "--root", root).stdout
    assert "No record with this key" in call("show", MONDAY, "--record", "A3", "--root", root, code=1).stderr


def test_not_a_number_is_json(root: Path) -> None:
    (_, second) = told(call("show", f"{TUESDAY}@0", "--json", "--root", root))["records"]
    assert second["amount"] == "NaN"


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", f"{MONDAY}@0"],
        ["show", f"{MONDAY}@0", "--json"],
        ["show", MONDAY, "--record", "A2"],
        ["show", f"{MONDAY}@3", "--record", MARKUP_KEY, "--json"],
        ["diff", f"{MONDAY}@0", f"{MONDAY}@3"],
        ["diff", f"{MONDAY}@0", f"{MONDAY}@3", "--json"],
    ],
)
def test_personal_values_are_never_printed(root: Path, arguments: list[str]) -> None:
    result = CliRunner().invoke(app, [*arguments, "--root", str(root)])
    assert SECRET not in result.output
    assert NESTED_SECRET not in result.output
    assert result.output


def test_keys_are_printed_and_never_interpreted(root: Path) -> None:
    """Neither rich's markup nor the terminal's escape sequences; the key can be typed in as it is."""
    out = call("show", f"{MONDAY}@4", "--root", root).stdout
    assert "[red]A/../1'\\x1b[31m" in out
    assert "\x1b" not in out
    assert "\x1b" not in call("show", "[bold]\x1b[2J@0", "--root", root, code=1).stderr
    assert told(call("show", f"{MONDAY}@4", "--record", MARKUP_KEY, "--json", "--root", root))["records"] == [
        {"id": MARKUP_KEY, "score": 100}
    ]


# diff -----------------------------------------------------------------------------------------------------------------------------


def test_diff_exits_as_diff_does(root: Path) -> None:
    out = call("diff", f"{MONDAY}@0", f"{MONDAY}@3", "--root", root, code=1).stdout
    assert "1 added, 1 removed, 1 changed, 1 the same" in out
    assert "9500" in out
    assert "The records are the same." in call("diff", f"{MONDAY}@0", f"{MONDAY}@0", "--root", root).stdout


def test_diff_as_json(root: Path) -> None:
    found = told(call("diff", f"{MONDAY}@0", f"{MONDAY}@3", "--json", "--root", root, code=1))
    assert (found["equal"], found["added"], found["removed"], found["changed"], found["same"]) == (False, 1, 1, 1, 1)
    assert found["records"][0] == {"key": "A2", "change": "changed", "fields": {"amount": [9000.0, 9500.0]}}
    assert found["circumstances"]["agent_version"] == ["1", "2"]
    assert (found["left"]["version"], found["right"]["version"]) == (0, 3)


def test_diff_says_what_it_leaves_out(root: Path) -> None:
    assert "2 more; --limit 0 shows all." in call("diff", f"{MONDAY}@0", f"{MONDAY}@3", "--limit", "1", "--root", root, code=1).stdout


# verify ---------------------------------------------------------------------------------------------------------------------------


def test_verify_says_what_was_not_compared(root: Path) -> None:
    out = call("verify", "--root", root).stdout
    assert "Looked at 9 versions of 2 workflows" in out
    assert "Not compared with Dagster's event log: no Dagster home is named" in out
    anchors = told(call("verify", "--json", "--root", root))["anchors"]
    assert (anchors["compared"], anchors["dagster_home"]) == (False, None)


def test_verify_names_workflow_version_and_file(root: Path, tmp_path: Path) -> None:
    store = StateStore(shutil.copytree(root, tmp_path / "state"))
    seal = store.seal_at(MONDAY, 4)
    Path(store.root, seal.path).unlink()
    out = call("verify", "--root", store.root, code=1).stdout
    assert f"file_missing  {MONDAY}@4: the snapshot is gone" in out
    assert seal.path in out
    assert "1 finding: this is not what was sealed." in out
    report = told(call("verify", MONDAY, "--json", "--root", store.root, code=1))
    assert report["findings"] == [
        {"kind": "file_missing", "workflow": MONDAY, "version": 4, "file": seal.path, "detail": "the snapshot is gone"},
    ]
    assert not report["good"]


def test_verify_compares_with_dagsters_event_log(root: Path, tmp_path: Path) -> None:
    store, home = StateStore(root), tmp_path / "home"
    seals = [*store.seals(MONDAY), *store.seals(TUESDAY)]
    materialise(seals[:-1], home)
    out = call("verify", "--root", root, "--dagster-home", home).stdout
    assert f"unanchored  {TUESDAY}: not in Dagster's event log: version 2" in out
    assert "8 anchored, 1 unanchored" in out
    lost = seals[-1].model_copy(update={"version": 3})
    materialise([lost], home)
    report = told(call("verify", "--root", root, "--dagster-home", home, "--json", code=1))
    assert [(finding["kind"], finding["version"]) for finding in report["findings"]] == [("anchor_missing", 3)]
    assert report["anchors"] == {
        **{"dagster_home": str(home), "compared": True, "not_compared_because": None},
        **{"anchored": 8, "unanchored": 1, "foreign": {}},
    }


def test_verify_tells_a_damaged_log_without_a_traceback(root: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(root, tmp_path / "state"))
    newest = max((damaged / "state_log/_delta_log").glob("*.json")).name.partition(".")[0]
    for file in (damaged / "state_log/_delta_log").glob(f"{newest}.*"):
        file.write_text("{")
    out = call("verify", "--root", damaged, code=1).stdout
    assert "log_unreadable  the state log" in out
    for command in (["history"], ["show", MONDAY], ["diff", f"{MONDAY}@0", f"{MONDAY}@1"]):
        stderr = call(*command, "--root", damaged, code=1).stderr
        assert stderr.startswith("error: ")
        assert stderr.count("\n") == 1


def test_a_log_file_that_was_cut_short(root: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(root, tmp_path / "state"))
    materialise(StateStore(root).seals(MONDAY), tmp_path / "home")
    file = min((damaged / "state_log").glob("*.parquet"))
    file.write_bytes(file.read_bytes()[:2000])
    out = call("verify", "--root", damaged, "--dagster-home", tmp_path / "home", code=1).stdout
    assert "log_unreadable  the state log: a file of the state log cannot be read" in out
    assert f"state_log/{file.name}" in out
    assert "error: " in call("history", "--root", damaged, code=1).stderr


def test_verify_looks_into_a_store_that_lost_its_log(root: Path, tmp_path: Path) -> None:
    robbed = Path(shutil.copytree(root, tmp_path / "state"))
    shutil.rmtree(robbed / "state_log")
    assert "table_unsealed" in call("verify", "--root", robbed, code=1).stdout
    assert "There is no state" in call("history", "--root", robbed, code=1).stderr


def test_a_dagster_home_that_is_none(root: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for by name it is an error; where the environment merely mentions it, it is what was not compared. Never is it made."""
    assert "No Dagster instance" in call("verify", "--root", root, "--dagster-home", nowhere / "home", code=1).stderr
    monkeypatch.setenv("DAGSTER_HOME", str(nowhere / "home"))
    assert "there is no Dagster history at" in call("verify", "--root", root).stdout
    assert list(nowhere.iterdir()) == []


# where the state is ---------------------------------------------------------------------------------------------------------------


def test_the_state_is_found_by_option_environment_and_project(root: Path, nowhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    below = nowhere / "src/deep"
    below.mkdir(parents=True)
    (nowhere / "src/pyproject.toml").write_text("[project]\nname = 'a part of it'\n")
    (nowhere / "pyproject.toml").write_text(f"[tool.dagster-mao]\nroot = {os.path.relpath(root, nowhere)!r}\ndagster_home = 'home'\n")
    monkeypatch.chdir(below)
    assert len(told(call("history", "--json"))) == 9
    materialise(StateStore(root).seals(MONDAY), nowhere / "home")
    assert told(call("verify", "--json"))["anchors"]["anchored"] == 6
    monkeypatch.setenv("DAGSTER_MAO_ROOT", str(nowhere / "of the environment"))
    assert "of the environment (named by $DAGSTER_MAO_ROOT)" in call("history", code=1).stderr
    assert len(told(call("history", "--json", "--root", root))) == 9


def test_without_a_store_nothing_is_created(nowhere: Path) -> None:
    assert "No state store is named" in call("history", code=1).stderr
    for command in (["history"], ["show", "a/b"], ["diff", "a/b@0", "a/b@1"], ["verify"]):
        assert "There is no state at" in call(*command, "--root", nowhere / "absent", code=1).stderr
    assert list(nowhere.iterdir()) == []


def test_a_root_that_is_a_file(nowhere: Path) -> None:
    (nowhere / "file").write_text("")
    assert "is a file" in call("verify", "--root", nowhere / "file", code=1).stderr


def test_a_project_file_that_is_no_toml(nowhere: Path) -> None:
    (nowhere / "pyproject.toml").write_text("[")
    assert "pyproject.toml cannot be read" in call("history", code=1).stderr


# usage ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["diff", "a/b", "a/b@1"],
        ["diff", "a/b@1"],
        ["show"],
        ["history", "--limit", "-1"],
        ["history", "--storage-option", "novalue"],
    ],
)
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    call(*arguments, code=2)


def test_unknown_things_exit_with_1(root: Path) -> None:
    assert f"did you mean '{MONDAY}'" in call("history", "loans/2026-01-5", "--root", root, code=1).stderr
    assert "no such workflow" in call("diff", "x@0", f"{MONDAY}@1", "--root", root, code=1).stderr
    assert "it has versions 0 to 5" in call("show", f"{MONDAY}@9", "--root", root, code=1).stderr
    assert "Nothing was sealed" in call("verify", "loans/never", "--root", root, code=1).stderr


@pytest.mark.parametrize("command", ["history", "show", "diff", "verify"])
def test_every_help_has_an_example(command: str) -> None:
    assert f"Example: dagster-mao {command}" in call(command, "--help").stdout


@pytest.mark.parametrize("arguments", [["history", MONDAY, "--json"], ["verify", MONDAY, "--json"], ["audit", MONDAY, "--json"]])
def test_the_installed_command(root: Path, nowhere: Path, arguments: list[str]) -> None:
    """In a process of its own: finds its state by the environment, and does not load Dagster where there is no history of it to ask."""
    paths = {"DAGSTER_MAO_ROOT": str(root), "DAGSTER_HOME": str(nowhere / "home"), "PYTHONPATH": str(Path(__file__).parents[1])}
    code = "import sys; from dagster_mao.cli import app; app(standalone_mode=False); sys.exit(3 if 'dagster' in sys.modules else 0)"
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env={**os.environ, **paths}, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    if arguments[0] == "history":
        assert [version["version"] for version in json.loads(done.stdout)] == list(range(6))
