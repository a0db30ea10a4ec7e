"""A research agent that asks a language model, and an analysis that refuses to stand on weak research.

Run it in plain Python, or with `dagster dev -f examples/research.py`. It takes its answers from the folder `research_answers` (they were
written by hand); with RESEARCH_URL and RESEARCH_KEY in the environment it asks that endpoint instead.
"""

import os
from datetime import datetime
from pathlib import Path
from typing import Annotated

import dagster as dg
from pydantic import BaseModel, Field

import dagster_mao as mao


class Topic(BaseModel):
    topic: Annotated[str, mao.Key]


class Research(Topic):
    findings: list[str]
    confidence_score: float = Field(ge=0, le=1)
    sources: list[str] = Field(min_length=1)
    timestamp: datetime


class TrustedResearch(Research):
    confidence_score: float = Field(gt=0.7)  # asks for more than `research` promises: held to it at the boundary


class Analysis(Topic):
    conclusion: str


@mao.agent
def topics() -> list[Topic]:
    """What is to be looked into."""
    return [Topic(topic="race conditions"), Topic(topic="cascading failures")]


@mao.agent(model="gpt-4o-mini", policy=mao.Policy(timeout=60, retries=3))
async def research(ctx: mao.AgentContext, topics: Topic, *, llm: mao.LLM) -> Research:
    """The model fills in the rest; the topic and the time are not its to change."""
    prompt = "Say what is known about the topic, from which sources, and how confident you are."
    return await llm.ask(Research, prompt, topics, given={"timestamp": ctx.now})


@mao.agent(judges=[mao.Judge("modest", rubric="The conclusion claims no more than its sources carry.", model="gpt-4o-mini")])
def analysis(research: TrustedResearch) -> Analysis:
    """Runs only if every record of the research is trusted."""
    return Analysis(topic=research.topic, conclusion=f"{research.findings[0]} (sources: {len(research.sources)})")


pipeline = mao.Pipeline("research", entry=topics, agents=[research, analysis])
if "RESEARCH_URL" in os.environ:  # any OpenAI-compatible endpoint
    llm = mao.LLM(base_url=os.environ["RESEARCH_URL"], api_key=dg.EnvVar("RESEARCH_KEY"))
else:  # frozen answers: no key, no network
    llm = mao.LLM(frozen=str(Path(__file__).with_name("research_answers")))
resources = {"llm": llm, "state_store": mao.StateStoreResource(root=".mao/state")}
defs = pipeline.build_definitions(resources=resources)  # that is all of Dagster

if __name__ == "__main__":
    result = mao.run(pipeline, resources={"llm": llm})
    for record in result.records("analysis"):
        print(record)
    for agent, seal in result.seals.items():
        print(seal.reference, agent, seal.row_count, "rows", seal.digest[:12])
