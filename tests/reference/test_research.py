"""The README's first code block is a program that runs, in plain Python and in Dagster."""

import os
import re
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

import dagster_mao as mao
from examples.research import Research, Topic, analysis, llm, pipeline, topics
from tests.integrations.llm_server import KEY, LLMServer, answer

SOURCE = Path("examples/research.py").read_text()


@mao.agent(name="research")
def doubtful(ctx: mao.AgentContext, topics: Topic) -> Research:
    """Findings that their own author does not trust."""
    return Research(topic=topics.topic, findings=["maybe"], confidence_score=0.7, sources=["hearsay"], timestamp=ctx.now)


def test_the_readme_shows_the_file():
    block = re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL).group(1)
    assert SOURCE.count(block) == 1
    assert block.startswith("import os\n")
    assert "mao.Pipeline(" in block


def test_it_runs_in_plain_python(tmp_path):
    result = mao.run(pipeline, store=mao.StateStore(tmp_path), resources={"llm": llm})
    assert [record.topic for record in result.records("analysis")] == ["race conditions", "cascading failures"]
    assert {agent: seal.version for agent, seal in result.seals.items()} == {"topics": 0, "research": 1, "analysis": 2}


def test_it_asks_an_endpoint_that_the_environment_names():
    found = {"findings": ["asked live"], "confidence_score": 0.9, "sources": ["a model"]}
    with LLMServer(otherwise=lambda _: answer(found)) as server:
        environment = {**os.environ, "RESEARCH_URL": server.url, "RESEARCH_KEY": KEY}
        done = subprocess.run([sys.executable, "examples/research.py"], capture_output=True, text=True, check=False, env=environment)
    assert "conclusion='asked live (sources: 1)'" in done.stdout, done.stderr
    assert {request.headers["authorization"] for request in server.requests} == {f"Bearer {KEY}"}


def test_an_analysis_does_not_stand_on_weak_research(tmp_path):
    store = mao.StateStore(tmp_path)
    with pytest.raises(mao.BatchRefusedError) as refused:
        mao.run(mao.Pipeline("research", entry=topics, agents=[doubtful, analysis]), store=store, workflow="w")
    assert [check.name for check in refused.value.checks if not check.passed] == ["input_research"]
    assert [seal.agent for seal in store.seals("research/w")] == ["topics", "research"]


def test_it_runs_in_dagster_unpartitioned(tmp_path):
    defs = pipeline.build_definitions(resources={"llm": llm, "state_store": mao.StateStoreResource(root=str(tmp_path))})
    with dg.instance_for_test() as instance:
        result = defs.resolve_job_def("research_job").execute_in_process(instance=instance)
    assert all(check.passed for check in result.get_asset_check_evaluations())
    (workflow,) = mao.StateStore(tmp_path).workflows("research")
    assert workflow.startswith("research/")
