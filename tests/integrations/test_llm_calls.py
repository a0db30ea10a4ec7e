"""An endpoint that misbehaves, and what the gateway makes of it: in whole pipelines, over HTTP."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest

import dagster_mao as mao
from tests.integrations.articles import ARTICLES, AUTHOR, GOOD, PROMPT, Article, Summary, articles, pipeline, summary, summary_sync
from tests.integrations.llm_server import KEY, LLMServer, Request, answer, cut, garbage, half, hang, retry_after_date, slow, status

AGENTS = [summary, summary_sync]


def run(server: LLMServer, agent: mao.Agent = summary, records: Any = None, **settings: Any) -> mao.Result:
    llm = mao.LLM(**{"model": "not this one", "base_url": server.url, "api_key": KEY, **settings})
    return mao.run(pipeline(agent), records or ARTICLES[:1], resources={"llm": llm})


def with_policy(policy: mao.Policy, *, sync: bool = False, **declared: Any) -> mao.Agent:
    """The agent under another policy."""
    if sync:

        @mao.agent(name="summary", model="gpt-4o-mini", policy=policy, **declared)
        def other_sync(articles: Article, *, llm: mao.LLM) -> Summary:
            return llm.ask_sync(Summary, PROMPT, articles)

        return other_sync

    @mao.agent(name="summary", model="gpt-4o-mini", policy=policy, **declared)
    async def other(articles: Article, *, llm: mao.LLM) -> Summary:
        return await llm.ask(Summary, PROMPT, articles)

    return other


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Retries wait as long as they are asked to, and not longer."""
    monkeypatch.setattr("dagster_mao.gateway._retry.FIRST_WAIT", 0.01)
    monkeypatch.setattr("dagster_mao.gateway._retry.LONGEST_WAIT", 0.01)


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize(
    "trouble",
    [
        pytest.param(status(429, "rate_limit_exceeded", headers={"Retry-After": "0"}), id="429"),
        pytest.param(status(500), id="500"),
        pytest.param(status(503, headers={"Retry-After": "0.01"}), id="503"),
        pytest.param(status(408), id="408"),
        pytest.param(garbage(), id="html"),
        pytest.param(garbage(b"{", "application/json"), id="no json"),
        pytest.param(garbage(b'{"choices": []}', "application/json"), id="no choices"),
        pytest.param(garbage(b"\xff\xfe", "application/json"), id="no text"),
        pytest.param(half, id="half"),
        pytest.param(cut, id="cut"),
    ],
)
def test_what_may_pass_is_tried_again(server, agent, trouble):
    server.then(trouble, trouble, answer(GOOD))
    assert run(server, agent).records("summary") == [Summary(article_id="a0", **GOOD)]
    assert len(server.requests) == 3
    assert len({str(request.body) for request in server.requests}) == 1


@pytest.mark.parametrize("headers", [{"Retry-After": "3600"}, retry_after_date(3600)])
def test_an_endpoint_that_asks_to_wait_is_not_asked_before(server, headers):
    """It would come back after the two minutes that all tries may take: so it is not asked again."""
    server.then(status(429, headers=headers))
    with pytest.raises(mao.AgentFailedError) as failed:
        run(server)
    assert len(server.requests) == 1
    assert "TooManyRequestsError" in str(failed.value)


@pytest.mark.parametrize("sync", [False, True])
def test_an_endpoint_that_is_slow_is_waited_for_and_one_that_hangs_is_not(server, sync):
    server.then(slow(0.2, answer(GOOD)))
    assert run(server, with_policy(mao.Policy(timeout=60), sync=sync))
    server.then(hang)
    with pytest.raises(mao.AgentFailedError) as failed:
        run(server, with_policy(mao.Policy(timeout=3), sync=sync), timeout=60.0)  # time enough to get as far as the server
    assert "CallTimeoutError" in str(failed.value)
    if not sync:
        until(lambda: server.hung_up)  # a coroutine is cancelled, and its request with it


@pytest.mark.parametrize("agent", AGENTS)
def test_silence_is_ended_by_the_resource_too(server, agent):
    """What is left in a thread after its timeout ends at last."""
    server.then(hang, answer(GOOD))
    assert run(server, agent, timeout=2)
    until(lambda: server.hung_up)


def test_a_call_that_hangs_is_tried_again(server):
    server.then(hang, answer(GOOD))
    assert run(server, with_policy(mao.Policy(timeout=3, retries=1)))
    until(lambda: server.hung_up)


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize(
    ("code", "error", "fix"),
    [
        (401, "invalid_api_key", "give a key that is good"),
        (403, "denied", "give a key that is good"),
        (404, "model_not_found", "name of the model"),
        (400, "context_length_exceeded", "more than the model takes"),
        (400, "invalid_request_error", "output_mode"),
        (422, "words with values", "output_mode"),
        (429, "insufficient_quota", "nothing left to spend"),
    ],
)
def test_what_will_not_pass_is_not_tried_again(server, agent, code, error, fix):
    server.then(status(code, error))
    with pytest.raises(mao.MaoError) as failed:
        run(server, agent)
    assert len(server.requests) == 1
    told = "".join(traceback.format_exception(failed.value))
    assert f"LLMRequestError: 127.0.0.1 answered {code}" in told
    assert fix in told
    assert "words with values" not in told


@pytest.mark.parametrize("agent", AGENTS)
@pytest.mark.parametrize(
    "trouble",
    [
        status(401),
        status(400),
        status(500),
        status(429),
        garbage(),
        half,
        cut,
        answer("no JSON"),
        answer({"summary": AUTHOR, "stars": 9}),
        hang,
    ],
)
def test_neither_the_key_nor_personal_data_is_in_errors_and_logs(server, agent, trouble, caplog):
    caplog.set_level(logging.DEBUG)
    server.otherwise = lambda _: trouble
    with pytest.raises(mao.MaoError) as failed:
        run(server, agent, send_personal=True, timeout=0.5)
    links: list[BaseException | None] = [failed.value]
    while links[-1] is not None:
        links.append(links[-1].__cause__ or links[-1].__context__)  # also those that are not shown
    told = "".join(traceback.format_exception(failed.value)) + "".join(f"{type(link)} {link}" for link in links)
    for text in (told, caplog.text):
        assert KEY not in text
        assert AUTHOR not in text
    assert AUTHOR in server.requests[0].text  # it was sent


def test_the_model_that_the_agent_declares_is_asked(server):
    server.then(answer(GOOD))
    assert run(server).seals["summary"].model == "gpt-4o-mini"
    assert server.requests[0].body["model"] == "gpt-4o-mini"


def test_records_are_asked_about_concurrently(server):
    """Four at once: none is answered before all have come."""

    def together(request: Request) -> Any:
        def behave(handler: Any, request: Request) -> None:
            until(lambda: len(server.requests) == 4)
            answer(GOOD)(handler, request)

        return behave

    server.otherwise = together
    assert [one.article_id for one in run(server, records=ARTICLES).records("summary")] == ["a0", "a1", "a2", "a3"]


def test_any_other_client_works_inside_execute(server):
    """The plain client of the protocol, told to the gateway by hand."""
    import openai

    @mao.agent(name="summary", policy=mao.Policy(timeout=30, retries=1, transient=(openai.APIConnectionError, openai.InternalServerError)))
    async def by_hand(articles: Article) -> Summary:
        async with openai.AsyncOpenAI(base_url=server.url, api_key=KEY, max_retries=0) as client:
            reply = await client.chat.completions.create(model="m", messages=[{"role": "user", "content": articles.text}])
        assert reply.usage is not None
        mao.usage(model=reply.model, input_tokens=reply.usage.prompt_tokens, output_tokens=reply.usage.completion_tokens)
        return Summary(article_id=articles.article_id, summary=reply.choices[0].message.content or "", stars=3)

    server.then(status(500), half, answer("A summary."))
    pipe = mao.Pipeline("press", entry=articles, agents=[by_hand])
    with pytest.raises(mao.AgentFailedError):
        mao.run(pipe, ARTICLES[:1])
    assert mao.run(pipe, ARTICLES[:1]).records("summary")[0].summary == "A summary."
