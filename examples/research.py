"""A research agent, and an analysis that refuses to stand on weak research.

Run it in plain Python, or with `dagster dev -f examples/research.py`.
"""

from datetime import datetime
from typing import Annotated

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


@mao.agent
def research(ctx: mao.AgentContext, topics: Topic) -> Research:
    """Here you would search and call a model."""
    finding = f"{topics.topic} start in shared infrastructure, not in models"
    return Research(topic=topics.topic, findings=[finding], confidence_score=0.82, sources=["the article"], timestamp=ctx.now)


@mao.agent
def analysis(research: TrustedResearch) -> Analysis:
    """Runs only if every record of the research is trusted."""
    return Analysis(topic=research.topic, conclusion=f"{research.findings[0]} ({len(research.sources)} source)")


pipeline = mao.Pipeline("research", entry=topics, agents=[research, analysis])
defs = pipeline.build_definitions(resources={"state_store": mao.StateStoreResource(root=".mao/state")})  # that is all of Dagster

if __name__ == "__main__":
    result = mao.run(pipeline)
    for record in result.records("analysis"):
        print(record)
    for agent, seal in result.seals.items():
        print(seal.reference, agent, seal.row_count, "rows", seal.digest[:12])
