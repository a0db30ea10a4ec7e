"""The README's first code block is a program that runs, in plain Python and in Dagster."""

import re
from pathlib import Path

import dagster as dg
import pytest

import dagster_mao as mao
from examples.research import Research, Topic, analysis, pipeline, topics

SOURCE = Path("examples/research.py").read_text()


@mao.agent(name="research")
def doubtful(ctx: mao.AgentContext, topics: Topic) -> Research:
    """Findings that their own author does not trust."""
    return Research(topic=topics.topic, findings=["maybe"], confidence_score=0.7, sources=["hearsay"], timestamp=ctx.now)


def test_the_readme_shows_the_file():
    block = re.search(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL).group(1)
    assert SOURCE.count(block) == 1
    assert block.startswith("from datetime import datetime\n")
    assert "mao.Pipeline(" in block


def test_it_runs_in_plain_python(tmp_path):
    result = mao.run(pipeline, store=mao.StateStore(tmp_path))
    assert [record.topic for record in result.records("analysis")] == ["race conditions", "cascading failures"]
    assert {agent: seal.version for agent, seal in result.seals.items()} == {"topics": 0, "research": 1, "analysis": 2}


def test_an_analysis_does_not_stand_on_weak_research(tmp_path):
    store = mao.StateStore(tmp_path)
    with pytest.raises(mao.BatchRefusedError) as refused:
        mao.run(mao.Pipeline("research", entry=topics, agents=[doubtful, analysis]), store=store, workflow="w")
    assert [check.name for check in refused.value.checks if not check.passed] == ["input_research"]
    assert [seal.agent for seal in store.seals("research/w")] == ["topics", "research"]


def test_it_runs_in_dagster_unpartitioned(tmp_path):
    defs = pipeline.build_definitions(resources={"state_store": mao.StateStoreResource(root=str(tmp_path))})
    with dg.instance_for_test() as instance:
        result = defs.resolve_job_def("research_job").execute_in_process(instance=instance)
    assert all(check.passed for check in result.get_asset_check_evaluations())
    (workflow,) = mao.StateStore(tmp_path).workflows("research")
    assert workflow.startswith("research/")
