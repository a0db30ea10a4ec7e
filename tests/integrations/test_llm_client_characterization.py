"""What the design stands on in the client library (openai): the next release says here what is no longer true."""

from __future__ import annotations

import asyncio
import logging

import pytest

import dagster_mao as mao
from dagster_mao.integrations._endpoint import Endpoint
from tests.integrations.llm_server import KEY, LLMServer, answer, status

BODY = {"model": "m", "messages": [{"role": "user", "content": "a personal prompt"}]}


def endpoint(server: LLMServer, key: str = KEY) -> Endpoint:
    return Endpoint(server.url, key, 30.0)


@pytest.mark.parametrize("sync", [True, False])
def test_its_own_retries_are_off_even_where_the_endpoint_asks_for_them(server, sync):
    """Tries are the gateway's: counted, limited, and seen by the breaker."""
    server.then(status(503, headers={"x-should-retry": "true", "retry-after-ms": "1"}))
    with pytest.raises(mao.TransientError) as failed:
        endpoint(server).post(BODY, {}) if sync else asyncio.run(endpoint(server).apost(BODY, {}))
    assert failed.value.retry_after == 0.001
    assert len(server.requests) == 1


def test_what_is_in_the_environment_goes_to_no_endpoint(server, monkeypatch):
    """The library takes keys from there when it is given none."""
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, "sk-of-somebody-else")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:1/v1")
    server.otherwise = lambda _: answer("{}")
    endpoint(server, key="").post(BODY, {})
    endpoint(server).post(BODY, {})
    assert [request.headers["authorization"] for request in server.requests] == ["Bearer none", f"Bearer {KEY}"]
    assert not any("sk-of-somebody-else" in str(request.headers) for request in server.requests)


@pytest.mark.parametrize("sync", [True, False])
def test_its_logs_hold_neither_prompts_nor_keys(server, caplog, sync):
    """Before 3.20 the bodies of requests were in its debug log."""
    caplog.set_level(logging.DEBUG)
    server.then(answer("{}"), status(400))
    for _ in range(2):
        try:
            endpoint(server).post(BODY, {}) if sync else asyncio.run(endpoint(server).apost(BODY, {}))
        except mao.LLMRequestError:
            assert "personal" not in caplog.text
    assert "openai" in caplog.text
    assert "personal" not in caplog.text
    assert KEY not in caplog.text


def test_an_error_of_the_library_quotes_what_it_was_sent(server):
    """Which is why ours is raised without it."""
    import openai

    server.then(status(400))
    with pytest.raises(openai.BadRequestError, match="a personal prompt with Bearer sk-test"):
        openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0).post("/chat/completions", cast_to=object, body=BODY)
