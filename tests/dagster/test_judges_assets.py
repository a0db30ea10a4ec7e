"""Judges in Dagster: a check of an asset with a history, numbers that the UI plots, and nothing personal in the event log."""

from __future__ import annotations

import dagster as dg
import pytest

import dagster_mao as mao
from dagster_mao.dagster import StateStoreResource, build_definitions
from dagster_mao.dagster.assets import boundary_check_specs
from tests.integrations.llm_server import KEY, LLMServer, answer
from tests.judged import SECRET, Asked, Reply, desk, polite, replies

KEY_OF = dg.AssetKey(["desk", "replies"])
GOOD = {"reason": "It says sorry.", "passed": True, "score": 0.9}
BAD = {"reason": "It blames the customer.", "passed": False, "score": 0.3}


@mao.agent
def sent(replies: Reply) -> Reply:
    return replies


def definitions(root, *judges, agents=(), **resources):
    pipeline = mao.Pipeline("desk", entry=desk().entry, agents=[replies(*judges), *agents])
    return build_definitions(pipeline, resources={"state_store": StateStoreResource(root=str(root)), **resources})


def execute(defs, instance):
    return defs.resolve_job_def("desk_job").execute_in_process(instance=instance, raise_on_error=False)


def evaluations(instance):
    """Of the judge's check, oldest first."""
    key = dg.AssetCheckKey(KEY_OF, "judge_polite")
    records = instance.event_log_storage.get_asset_check_execution_history(key, limit=10)
    return [record.event.dagster_event.asset_check_evaluation_data for record in reversed(records)]


def plotted(instance):
    """The judge's numbers, by version, oldest first."""
    materializations = [record.asset_materialization for record in reversed(instance.fetch_materializations(KEY_OF, limit=10).records)]
    return [{name: told.value for name, told in one.metadata.items() if name.startswith("mao/judge_")} for one in materializations]


def test_a_judge_is_a_check_with_a_history_and_its_score_is_plotted_over_versions(tmp_path, monkeypatch):
    monkeypatch.setenv("DESK_KEY", KEY)
    with LLMServer(otherwise=lambda _: answer(GOOD, tokens=(1000, 50))) as server, dg.instance_for_test() as instance:
        llm = mao.LLM(base_url=server.url, api_key=dg.EnvVar("DESK_KEY"), model="judge-mini", input_price=2.0)
        defs = definitions(tmp_path, polite(), llm=llm)
        assert execute(defs, instance).success
        server.otherwise = lambda _: answer(BAD, tokens=(1000, 50))
        assert execute(defs, instance).success  # the judge only warns
        good, bad = evaluations(instance)
        numbers = plotted(instance)
        told = "\n".join(entry.to_json() for run in instance.get_runs() for entry in instance.all_logs(run.run_id))
    assert (good.passed, bad.passed, bad.severity) == (True, False, dg.AssetCheckSeverity.WARN)
    assert good.metadata["score"].value == pytest.approx(0.9)
    assert bad.metadata["model"].value == "judge-mini-2026"
    assert [row.data["reason"] for row in bad.metadata["verdicts"].value.records] == [BAD["reason"]] * 5
    assert [one["mao/judge_polite_score"] for one in numbers] == pytest.approx([0.9, 0.3])
    assert [one["mao/judge_polite_share_passed"] for one in numbers] == [1.0, 0.0]
    assert [one["mao/judge_polite_judged"] for one in numbers] == [12, 12]
    assert numbers[0]["mao/judge_polite_cost"] == pytest.approx(12 * 1000 * 2 / 1e6)
    assert SECRET not in told
    assert KEY not in told


def test_one_that_blocks_leaves_nothing_behind_it_and_shows_why(tmp_path):
    judge = polite(Asked(lambda record, time: record != "c3"), severity="error", send_personal=True)
    with dg.instance_for_test() as instance:
        result = execute(definitions(tmp_path, judge, agents=[sent]), instance)
        (told,) = evaluations(instance)
        events = "\n".join(entry.to_json() for entry in instance.all_logs(result.run_id))
        assert plotted(instance) == []
        assert instance.get_latest_materialization_event(dg.AssetKey(["desk", "sent"])) is None
    assert not result.success
    assert (told.passed, told.severity) == (False, dg.AssetCheckSeverity.ERROR)
    (row,) = told.metadata["verdicts"].value.records
    assert (row.data["record"], row.data["reason"]) == ("c3", "***")  # it was sent names, and may have quoted one
    assert "Number c3" not in events


def test_the_check_is_declared_with_the_rubric_and_blocks_only_with_error():
    pipelines = [desk(polite(Asked(), severity=severity)) for severity in ("warn", "error")]
    specs = [spec for pipeline in pipelines for spec in boundary_check_specs(pipeline, "replies") if spec.name == "judge_polite"]
    assert [spec.blocking for spec in specs] == [False, True]
    assert "The reply is polite." in str(specs[0].description)


@pytest.mark.parametrize(
    ("resources", "what"), [({}, "Nobody provides the resource 'llm'"), ({"llm": "LLM()"}, "nothing says which model is asked")]
)
def test_a_judge_that_could_not_be_asked_fails_when_the_code_is_loaded(tmp_path, resources, what):
    with pytest.raises(mao.WiringError, match=what) as wrong:
        definitions(tmp_path, polite(), **{name: mao.LLM() for name in resources})
    assert wrong.value.agent == "replies"
