"""The resource under Dagster: its key comes from the environment, and stays there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
import pytest

import dagster_mao as mao
from tests.integrations.articles import AUTHOR, GOOD, pipeline
from tests.integrations.llm_server import KEY, LLMServer, answer, status

ROTATED = "sk-test-rotated-9876543210"


@pytest.fixture
def home(tmp_path) -> Path:
    """Where Dagster's instance and the state lie."""
    for name in ("dagster", "state"):
        (tmp_path / name).mkdir()
    return tmp_path


def run(server: LLMServer, home: Path, **settings: Any) -> Any:
    """One run of the job, on an instance that keeps its history."""
    llm = mao.LLM(base_url=server.url, api_key=dg.EnvVar("PRESS_KEY"), **settings)
    store = mao.StateStoreResource(root=str(home / "state"))
    defs = pipeline().build_definitions(resources={"llm": llm, "state_store": store})
    with dg.instance_for_test(temp_dir=str(home / "dagster")) as instance:
        result = defs.resolve_job_def("press_job").execute_in_process(instance=instance, raise_on_error=False)
        told = [record.event_log_entry.to_json() for record in instance.get_records_for_run(result.run_id).records]
        # Compressed, so that no search of the files would find anything in it.
        told.append(str(instance.get_job_snapshot(instance.get_run_by_id(result.run_id).job_snapshot_id)))
    return result, "\n".join(told)


def config(home: Path, result: Any) -> str:
    """The digest of the configuration in the seal of a run."""
    store = mao.StateStore(home / "state")
    seals = [seal for workflow in store.workflows("press") for seal in store.seals(workflow)]
    (sealed,) = [seal for seal in seals if seal.agent == "summary" and seal.run_id == result.run_id]
    assert sealed.model == "gpt-4o-mini"
    return sealed.config


def nowhere(home: Path, secret: str) -> bool:
    return not [path for path in home.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]


def test_the_key_comes_from_the_environment_and_is_kept_nowhere(server, home, monkeypatch, capfd):
    monkeypatch.setenv("PRESS_KEY", KEY)
    server.otherwise = lambda _: answer(GOOD)
    result, events = run(server, home)
    assert result.success
    assert {request.headers["authorization"] for request in server.requests} == {f"Bearer {KEY}"}
    first = config(home, result)
    assert len(first) == 64
    assert KEY not in events
    assert KEY not in "".join(capfd.readouterr())
    assert nowhere(home, KEY)
    assert not nowhere(home, "gpt-4o-mini")  # it would be found

    monkeypatch.setenv("PRESS_KEY", ROTATED)
    result, _ = run(server, home)
    assert result.success
    assert server.requests[-1].headers["authorization"] == f"Bearer {ROTATED}"
    assert config(home, result) == first
    result, _ = run(server, home, temperature=0.5)
    assert config(home, result) != first


@pytest.mark.parametrize("trouble", [status(401), status(400), answer({"summary": AUTHOR, "stars": 9})])
def test_a_run_that_fails_tells_neither_key_nor_personal_data(server, home, monkeypatch, capfd, trouble):
    monkeypatch.setenv("PRESS_KEY", KEY)
    server.otherwise = lambda _: trouble
    result, events = run(server, home, send_personal=True)
    assert not result.success
    shown = events + "".join(capfd.readouterr())
    assert "LLMRequestError" in shown or "MalformedAnswerError" in shown
    assert KEY not in shown
    assert nowhere(home, KEY)
    assert AUTHOR not in shown


def test_a_key_that_is_written_down_is_warned_of_and_marked_as_a_secret_for_the_ui():
    """Dagster's page of a resource shows its configuration, but for fields that are marked so; its snapshots of jobs have all of it."""
    with pytest.warns(UserWarning, match="Dagster's snapshots of jobs keep it") as warned:
        dg.Definitions(resources={"llm": mao.LLM(api_key=KEY)}, jobs=[_job()]).resolve_job_def("job")
    assert KEY not in str(warned[0].message)
    fields = mao.LLM.to_config_schema().as_field().config_type.fields
    assert {name for name, field in fields.items() if field.is_secret} == {"api_key"}


def _job() -> dg.JobDefinition:
    @dg.op(required_resource_keys={"llm"})
    def ask() -> None: ...

    @dg.job
    def job() -> None:
        ask()

    return job


def test_a_key_that_is_not_set_fails_with_its_name(server, home, monkeypatch):
    monkeypatch.delenv("PRESS_KEY", raising=False)
    with pytest.raises(Exception, match="PRESS_KEY"):
        run(server, home)
    assert not server.requests
