"""`dagster-mao submit` and `dagster-mao choreography`, as people and programs use it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import dagster_mao as mao
from dagster_mao.choreography import cut, drain, take, tick
from dagster_mao.choreography._tables import shared
from dagster_mao.cli import app
from dagster_mao.state import StateStore
from tests.choreography.loans import Ledger, arrive, elsewhere, loans

PIPELINE = loans(inbox=mao.MicroBatch(size=1000, wait=0))
WITH_ELSEWHERE = loans("hybrid", elsewhere=["letter"])
NAMED_ELSEWHERE = "tests.test_cli_choreography:WITH_ELSEWHERE"
EVENTS = [{"id": f"A{number}", "amount": 100.0 + number} for number in range(3)]


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StateStore:
    """A project in the working directory that names a store, in which there is nothing yet."""
    for name in ("DAGSTER_MAO_ROOT", "DAGSTER_MAO_DATABASE", "DAGSTER_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    lines = ["[tool.dagster-mao]", 'root = "state"', 'pipelines = ["tests.test_cli_choreography:PIPELINE"]', ""]
    (tmp_path / "pyproject.toml").write_text("\n".join(lines))
    return StateStore(tmp_path / "state")


def call(*arguments: str, code: int = 0, given: str | bytes | None = None) -> Any:
    result = CliRunner().invoke(app, list(arguments), input=given)
    assert result.exit_code == code, result.output
    return result


def waiting(store: StateStore) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for batch in cut(store, PIPELINE):
        with take(store, PIPELINE, batch.run_key, run_id="look") as intake:
            found += [one if isinstance(one, dict) else one.model_dump() for one in intake.records]
    return found


def jsonl(records: list[Any]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_json_lines_are_submitted_once(store: StateStore, tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text(jsonl(EVENTS).rstrip("\n"))  # the last line has no end
    assert "3 events accepted, 0 duplicates, 0 refused" in call("submit", "loans", "events.jsonl").output
    told = json.loads(call("submit", "loans", "-", "--json", given=jsonl([*EVENTS, {"id": "B", "amount": 1}])).stdout)
    assert told == {"accepted": 1, "duplicates": 3, "refused": []}
    assert [one["id"] for one in waiting(store)] == ["A0", "A1", "A2", "B"]


def test_a_table_is_submitted_and_its_empty_cells_are_left_out(store: StateStore, tmp_path: Path) -> None:
    (tmp_path / "events.csv").write_bytes('\ufeffid,name,amount\r\nA,,100\r\n"B\nC",Zoë,-5\r\n'.encode())
    assert "2 events accepted" in call("submit", "tests.test_cli_choreography:PIPELINE", "events.csv").output
    assert "2 duplicates" in call("submit", "loans", "-", "--format", "csv", given=(tmp_path / "events.csv").read_bytes()).output
    first, second = waiting(store)
    assert first == {"id": "A", "name": "Grace Hopper", "amount": 100.0}  # the contract's default
    assert second == {"id": "B\nC", "name": "Zoë", "amount": "-5"}  # for the quarantine


def test_a_line_that_is_refused_holds_up_no_other(store: StateStore, tmp_path: Path) -> None:
    lines = ['{"id": "A", "amount": 1}', "", "{not json: Lovelace}", '{"amount": 1, "name": "Lovelace"}', '{"id": "B", "amount": 2}', "[1]"]
    lines += ['{"id": "A", "amount": 9, "name": "Lovelace"}', '{"id": "C", "amount": "x"}']
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + "\n")
    told = call("submit", "loans", "events.jsonl", code=1).output
    assert "3 events accepted, 0 duplicates, 4 refused" in told
    assert "line 3: it is no JSON" in told
    assert "line 4: it has no key, 'id'" in told
    assert "line 6: it is no record but list" in told
    assert "line 7: another one, submitted with it, has its key" in told
    assert "Lovelace" not in told
    refused = json.loads(call("submit", "loans", "events.jsonl", "--json", code=1).stdout)["refused"]
    assert [one["line"] for one in refused] == [3, 4, 6, 7]
    assert {one["id"] for one in waiting(store)} == {"A", "B", "C"}


def test_a_table_that_is_broken_is_taken_up_to_there(store: StateStore) -> None:
    told = call("submit", "loans", "-", "--format", "csv", given=b'id,amount\nA,1\nB,2,3\nC,3\n\xff\xfe,4\nD,1\n"E,1\n', code=1).output
    assert "3 events accepted, 0 duplicates, 3 refused" in told
    assert "line 3: it has more cells than the heading" in told
    assert "line 5: it cannot be written as JSON" in told
    assert "line 7: it cannot be read as CSV, nor what follows" in told


def test_what_is_piped_in_slowly_is_accepted_as_it_comes(store: StateStore) -> None:
    code = "from dagster_mao.cli import app; app(['submit', 'loans', '-'])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert child.stdin is not None
    child.stdin.write(jsonl(EVENTS[:1]).encode() + b'{"id": "A1", ')
    child.stdin.flush()
    deadline = time.monotonic() + 240
    while not cut(store, PIPELINE):  # before the pipe is closed
        assert child.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    child.stdin.write(b'"amount": 1}\n')
    out, _ = child.communicate(timeout=120)
    assert b"2 events accepted" in out


def test_what_is_wrong_is_said(store: StateStore, tmp_path: Path) -> None:
    assert "No pipeline 'lones' is named; there is loans" in call("submit", "lones", "-", code=1, given="").output
    assert "cannot be read" in call("submit", "loans", "nowhere.jsonl", code=1).output
    assert "has no inbox" in call("submit", "tests.test_cli_choreography:WITHOUT", "-", code=1, given=jsonl(EVENTS)).output
    (tmp_path / "pyproject.toml").unlink()
    assert "No pipeline 'loans' is named; none is named" in call("submit", "loans", "-", code=1, given="").output
    assert "No state store is named" in call("submit", "tests.test_cli_choreography:PIPELINE", "-", code=1, given="").output
    assert not (tmp_path / "state").exists()


# -- how subscribers stand -----------------------------------------------------------------------------------------------------------


def state_of(agent: str, *options: str, code: int = 0) -> dict[str, Any]:
    told = json.loads(call("choreography", "loans", "--json", *options, code=code).stdout)
    assert told["is_healthy"] is (code == 0)
    (found,) = (one for one in told["subscribers"] if one["agent"] == agent)
    return dict(found)


def test_subscribers_are_shown_as_they_stand(store: StateStore, tmp_path: Path) -> None:
    call("submit", "loans", "-", given=jsonl(EVENTS))
    told = call("choreography", "loans").output
    assert "applications (inbox)    3" in told
    assert "Nobody is dead, and nothing is stuck." in told
    assert drain(store, PIPELINE, resources={"ledger": Ledger(tmp_path)}).count("done") == 5
    assert state_of("applications")["due"] == state_of("approval")["due"] == 0
    assert [one for one in call("choreography", "loans", "--agent", "risk").output.splitlines() if "approval" in one] == []


def test_what_is_stuck_is_told_until_it_is_tried_again(store: StateStore, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    ledger.fail("income loans/w1")
    arrive(store, "w1", "w2")
    drain(store, PIPELINE, resources={"ledger": ledger})
    told = call("choreography", "loans", code=1).output
    assert "risk: 1 stuck join" in told
    assert "loans/w1 lacks income since" in told
    assert "income failed (AgentFailedError)" in told
    assert "income has given up 1: 1 by AgentFailedError" in told
    assert "Nobody is dead" not in told
    assert "Grace" not in told
    assert state_of("risk", code=1)["stuck"][0]["missing"] == ["income"]
    ledger.fail()
    assert "0 failed deliveries to be tried again" in call("choreography", "loans", "--redeliver", "--workflow", "loans/w2", code=1).output
    assert "0 failed deliveries" in call("choreography", "loans", "--redeliver", "--agent", "risk", code=1).output
    assert "1 failed delivery to be tried again" in call("choreography", "loans", "--redeliver").output
    drain(store, PIPELINE, resources={"ledger": ledger})
    assert state_of("income")["failed"] == 0


def test_the_dead_are_told(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    arrive(store, "w1")
    with shared(store).transaction() as connection:
        now = shared(store).now(connection)
    with monkeypatch.context() as patched:
        patched.setattr(shared(store), "_clock", lambda: now - 120)
        tick(store, PIPELINE, "score", every=5.0)
    told = call("choreography", "loans", code=1).output
    assert "2 min ago, every 5 s: DEAD" in told
    assert told.count("DEAD") == 1
    assert state_of("score", code=1)["is_dead"] is True


def test_agents_of_other_code_locations_are_shown_with_the_others(store: StateStore, tmp_path: Path) -> None:
    file = tmp_path / "pyproject.toml"
    file.write_text(file.read_text().replace('PIPELINE"', 'ELSEWHERE", "tests.test_cli_choreography:PIPELINE"'))
    told = json.loads(call("choreography", "loans", "--json").stdout)["subscribers"]
    assert [one["agent"] for one in told] == ["notify", "applications", "score", "income", "risk", "approval"]
    assert "1 event accepted" in call("submit", "loans", "-", given=jsonl(EVENTS[:1])).output  # into the one that has an inbox


def test_nobody_starts_by_himself_in_orchestration(store: StateStore) -> None:
    assert "its mode is orchestration" in call("choreography", "tests.test_cli_choreography:ORCHESTRATED").output
    assert "has no subscriber 'scores'" in call("choreography", "loans", "--agent", "scores", code=2).output
    assert "--workflow goes with --redeliver" in call("choreography", "loans", "--workflow", "loans/w1", code=2).output


# -- which pattern -------------------------------------------------------------------------------------------------------------------


def test_which_pattern_suits_is_told_with_the_reasons(store: StateStore) -> None:
    told = call("advise", "loans", code=1).output
    assert "loans: orchestration, it is declared as choreography" in told
    assert "  4 agents have 3 of 6 possible connections" in told
    assert '  mode="orchestration" on the pipeline: it is choreography' in told
    (advice,) = json.loads(call("advise", "tests.test_cli_choreography:ORCHESTRATED", "--json").stdout)
    assert (advice["pattern"], advice["declared"], advice["possible"]) == ("orchestration", "orchestration", 6)


WITHOUT, ORCHESTRATED, ELSEWHERE = loans(), loans("orchestration"), elsewhere()


def test_an_agent_of_another_code_location_is_shown_as_never_seen(store: StateStore, tmp_path: Path) -> None:
    call("choreography", NAMED_ELSEWHERE)
    told = call("choreography", NAMED_ELSEWHERE, "--agent", "letter").output
    assert "letter (elsewhere)" in told
    assert "never seen" in told
    arrive(store, "w1", pipeline=WITH_ELSEWHERE)
    drain(store, WITH_ELSEWHERE, resources={"ledger": Ledger(tmp_path)})
    told = call("choreography", NAMED_ELSEWHERE, "--stuck-after", "0", code=1).output
    assert "never seen: DEAD" in told
    assert "'letter'" in call("choreography", NAMED_ELSEWHERE, "--agent", "letter", "--redeliver", code=2).output, (
        "its own location does that"
    )
