"""Contracts and agents that ask a model, as people would write them."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

import dagster_mao as mao

PROMPT = "Summarise the article in two sentences."


class Article(BaseModel):
    article_id: Annotated[str, mao.Key]
    author: Annotated[str, mao.Personal]
    text: str


class Summary(BaseModel):
    """What an article says."""

    article_id: Annotated[str, mao.Key]
    summary: str = Field(max_length=80)
    stars: int = Field(ge=1, le=5)
    from_fallback: Annotated[bool, mao.FromFallback] = False


AUTHOR = "Ada Lovelace"
ARTICLES = [Article(article_id=f"a{n}", author=AUTHOR, text=f"article number {n}") for n in range(4)]
GOOD = {"summary": "It says something.", "stars": 4}
BAD = {"summary": "It says something secret.", "stars": 9}


@mao.agent
def articles() -> list[Article]:
    return ARTICLES


@mao.agent(model="gpt-4o-mini", policy=mao.Policy(timeout=30, retries=3, token_limit="100000/minute"))
async def summary(articles: Article, *, llm: mao.LLM) -> Summary:
    return await llm.ask(Summary, "Summarise the article in two sentences.", articles)


@mao.agent(name="summary", model="gpt-4o-mini", policy=mao.Policy(timeout=30, retries=3))
def summary_sync(articles: Article, *, llm: mao.LLM) -> Summary:
    return llm.ask_sync(Summary, PROMPT, articles)


@mao.agent(name="summary", model="gpt-4o-mini", policy=mao.Policy(timeout=60, isolate=True))
def summary_isolated(articles: Article, *, llm: mao.LLM) -> Summary:
    return llm.ask_sync(Summary, PROMPT, articles)


def pipeline(agent: mao.Agent = summary) -> mao.Pipeline:
    return mao.Pipeline("press", entry=articles, agents=[agent])
