"""What the call log says of a model's calls, and that none is paid twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

import dagster_mao as mao
from dagster_mao.gateway import shared_store
from tests.gateway.test_token_limit import counted
from tests.integrations.articles import ARTICLES, BAD, GOOD, PROMPT, Article, Summary, pipeline, summary_sync
from tests.integrations.llm_server import KEY, LLMServer, answer, hang, slow, status

PRICES = {"input_price": 2.0, "output_price": 10.0}


def llm_at(server: LLMServer, **settings: Any) -> mao.LLM:
    return mao.LLM(**{"base_url": server.url, "api_key": KEY, **PRICES, **settings})


def summary_with(policy: mao.Policy, **declared: Any) -> mao.Agent:
    @mao.agent(name="summary", model="gpt-4o-mini", policy=policy, **declared)
    async def other(articles: Article, *, llm: mao.LLM) -> Summary:
        return await llm.ask(Summary, PROMPT, articles)

    return other


def rows(root: Path) -> list[dict[str, Any]]:
    return mao.StateStore(root).calls("press", "summary").sort("started", "number").collect().to_dicts()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr("dagster_mao.gateway._retry.FIRST_WAIT", 0.01)
    monkeypatch.setattr("dagster_mao.gateway._retry.LONGEST_WAIT", 0.01)


@pytest.mark.parametrize("agent", [None, summary_sync])
def test_every_try_is_logged_with_what_it_used(server, tmp_path, agent):
    """Malformed answers are paid for: in the try in which they came, also if that try then fails."""
    server.then(answer(BAD, tokens=(1000, 20)), status(500), answer(BAD, tokens=(1000, 20)), answer(GOOD, tokens=(2000, 30)))
    mao.run(pipeline(agent) if agent else pipeline(), ARTICLES[:1], store=mao.StateStore(tmp_path), resources={"llm": llm_at(server)})
    first, second = rows(tmp_path)
    assert (first["outcome"], first["number"], first["input_tokens"], first["output_tokens"]) == ("failed", 1, 1000, 20)
    assert first["error"].endswith("EndpointUnavailableError")
    assert first["cost"] == pytest.approx((1000 * 2 + 20 * 10) / 1e6)
    assert (second["outcome"], second["number"], second["input_tokens"], second["output_tokens"]) == ("answered", 2, 3000, 50)
    assert second["cost"] == pytest.approx((3000 * 2 + 50 * 10) / 1e6)
    assert {one["model"] for one in (first, second)} == {"gpt-4o-mini-2026"}
    assert {one["record"] for one in (first, second)} == {"a0"}


def test_a_try_that_times_out_after_a_malformed_answer_was_paid_too(server, tmp_path):
    server.then(answer(BAD, tokens=(1000, 20)), hang)
    pipe = pipeline(summary_with(mao.Policy(timeout=5.0)))
    with pytest.raises(mao.AgentFailedError):
        mao.run(pipe, ARTICLES[:1], store=mao.StateStore(tmp_path), resources={"llm": llm_at(server)})
    (only,) = rows(tmp_path)
    assert (only["outcome"], only["input_tokens"]) == ("timed_out", 1000)


def test_the_key_of_a_call_is_sent_without_the_author_doing_anything(server, tmp_path):
    """The same in every try of a call, another for each record and for each turn, and joined to the call log by its beginning."""
    server.then(status(500), answer(BAD))
    server.otherwise = lambda _: answer(GOOD)
    mao.run(
        pipeline(summary_with(mao.Policy(retries=2), concurrency=1)),
        ARTICLES[:2],
        store=mao.StateStore(tmp_path),
        resources={"llm": llm_at(server)},
    )
    failed, malformed, corrected, other = (request.headers["idempotency-key"] for request in server.requests)
    assert failed == malformed
    assert len({malformed, corrected, other}) == 3
    calls = {one["record"]: one["call"] for one in rows(tmp_path)}
    assert [key.split("-")[0] for key in (malformed, corrected, other)] == [calls["a0"], calls["a0"], calls["a1"]]


def test_what_was_answered_is_not_asked_again_whatever_the_key_of_the_endpoint(server, tmp_path):
    """The last record fails for good: the next run asks for that one only, with the same idempotency key."""
    store = mao.StateStore(tmp_path)

    def one_fails(request: Any) -> Any:
        return slow(0.2, status(400)) if "number 3" in request.last else answer(GOOD)

    def run(**settings: Any) -> mao.Result:
        return mao.run(pipeline(), ARTICLES, store=store, workflow="w", resources={"llm": llm_at(server, **settings)})

    server.otherwise = one_fails
    with pytest.raises(mao.AgentFailedError):
        run()
    assert len(server.requests) == 4
    (refused,) = (request for request in server.requests if "number 3" in request.last)
    server.otherwise = lambda _: answer(GOOD)
    assert len(run(api_key="sk-test-rotated").records("summary")) == 4
    assert len(server.requests) == 5
    last = server.requests[-1]
    assert last.headers["idempotency-key"] == refused.headers["idempotency-key"]
    assert last.headers["authorization"] == "Bearer sk-test-rotated"
    run(input_price=9.0, timeout=5, corrections=0)
    assert len(server.requests) == 5
    run(temperature=0.5)  # another question
    assert len(server.requests) == 9


def test_a_record_that_a_model_cannot_answer_is_set_aside(server, tmp_path):
    store = mao.StateStore(tmp_path)
    server.otherwise = lambda request: answer(BAD) if "number 1" in request.text else answer(GOOD)
    agent = summary_with(mao.Policy(retries=1), quarantine=mao.Quarantine(max_share=0.5))
    result = mao.run(pipeline(agent), ARTICLES, store=store, resources={"llm": llm_at(server, corrections=1)})
    assert [one.article_id for one in result.records("summary")] == ["a0", "a2", "a3"]
    assert result.seals["summary"].quarantined == 1
    assert "execute: MalformedAnswerError" in str(store.quarantine(result.seals["summary"]).to_dicts())
    assert len(server.requests) == 3 + 2  # malformed to the end is not tried again


def cheaper(articles: Article) -> Summary:
    return Summary(article_id=articles.article_id, summary=articles.text[:40], stars=1)


def test_a_fallback_answers_where_no_model_does(server, tmp_path):
    server.otherwise = lambda request: status(401) if "number 1" in request.text else answer({**GOOD, "from_fallback": True})
    agent = summary_with(mao.Policy(fallback=cheaper))
    result = mao.run(pipeline(agent), ARTICLES, store=mao.StateStore(tmp_path), resources={"llm": llm_at(server)})
    assert [one.from_fallback for one in result.records("summary")] == [False, True, False, False]


def test_frozen_answers_are_calls_that_used_nothing(server, tmp_path):
    server.otherwise = lambda _: answer(GOOD)
    recorder = llm_at(server, frozen=str(tmp_path / "frozen"), record=True)
    mao.run(pipeline(), ARTICLES, store=mao.StateStore(tmp_path / "live"), resources={"llm": recorder})
    mao.run(pipeline(), ARTICLES, store=mao.StateStore(tmp_path / "offline"), resources={"llm": mao.LLM(frozen=str(tmp_path / "frozen"))})
    live, offline = (pl.DataFrame(rows(tmp_path / name)) for name in ("live", "offline"))
    assert (live["input_tokens"].sum(), offline["input_tokens"].sum(), offline["cost"].sum()) == (400, 0, 0.0)
    assert offline["outcome"].to_list() == ["answered"] * 4


def test_a_call_in_a_child_process_is_told_and_has_its_key(server, tmp_path):
    from tests.integrations.articles import summary_isolated

    server.then(answer(BAD), answer(GOOD))
    mao.run(pipeline(summary_isolated), ARTICLES[:1], store=mao.StateStore(tmp_path), resources={"llm": llm_at(server)})
    (only,) = rows(tmp_path)
    assert (only["outcome"], only["input_tokens"], only["model"]) == ("answered", 200, "gpt-4o-mini-2026")
    assert {request.headers["idempotency-key"].split("-")[0] for request in server.requests} == {only["call"]}


def test_the_tokens_of_every_turn_count_in_the_token_limit(server, tmp_path):
    server.then(answer(BAD, tokens=(1000, 20)), answer(GOOD, tokens=(2000, 30)))
    store = mao.StateStore(tmp_path)
    agent = summary_with(mao.Policy(token_limit="100000/hour", tokens_per_call=500))
    mao.run(pipeline(agent), ARTICLES[:1], store=store, resources={"llm": llm_at(server)})
    assert counted(shared_store(str(store.database)), "tokens of press.summary") == 3050
