"""An OpenAI-compatible endpoint: one request, one reply, and what its errors mean. The only module that imports its client."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncGenerator, Mapping
from typing import Any
from urllib.parse import urlsplit

import httpx2
import openai
from pydantic import BaseModel, Field, ValidationError

from dagster_mao.errors import LLMRequestError
from dagster_mao.gateway import TransientError, retry_after
from dagster_mao.integrations._conversation import Reply

_PATH = "/chat/completions"
_TRANSIENT = {408, 409, 425, 429}
_UNPAID = {"insufficient_quota", "billing_not_active", "billing_hard_limit_reached"}  # 429s that waiting does not mend
_WORD = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


class TooManyRequestsError(TransientError):
    """The endpoint answered 429: its own rate limit."""

    tells_no_values = True


class EndpointUnavailableError(TransientError):
    """No answer: the endpoint has an error of its own, or cannot be reached, or was silent for too long, or the connection was cut."""

    tells_no_values = True


class GarbledReplyError(TransientError):
    """What came back is no reply of the protocol."""

    tells_no_values = True


class Endpoint:
    """Where the requests go. `timeout`: seconds of silence after which one is given up."""

    def __init__(self, base_url: str, api_key: str, timeout: float) -> None:
        self._url, self._host, self._timeout = base_url, urlsplit(base_url).hostname or "the endpoint", timeout
        # The library would else look into the environment, and send what it finds there to any URL.
        self._key = api_key or "none"
        self._sync: openai.OpenAI | None = None
        self._lock = threading.Lock()
        self._clients: dict[asyncio.AbstractEventLoop, openai.AsyncOpenAI] = {}
        self._closers: dict[asyncio.AbstractEventLoop, AsyncGenerator[None]] = {}

    def post(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Reply:
        """The reply to one request, made once. Raises `TransientError` for what may go well next time, `LLMRequestError` for the rest."""
        with self._lock:
            client = self._sync = self._sync or openai.OpenAI(**self._settings())
        # Raised when the library's error is out of sight: its text, and what it holds, quote what was sent, or the key.
        try:
            response = client.post(_PATH, cast_to=httpx2.Response, body=dict(body), options={"headers": dict(headers)})
        except openai.OpenAIError as error:
            failed = self._explained(error)
        else:
            return self._read(response)
        raise failed

    async def apost(self, body: Mapping[str, Any], headers: Mapping[str, str]) -> Reply:
        """As `post`, awaited; cancelled, it ends the request."""
        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        if client is None:
            client = self._clients[loop] = openai.AsyncOpenAI(**self._settings())
            self._closers[loop] = self._closing(loop, client)
            await anext(self._closers[loop])
        try:
            response = await client.post(_PATH, cast_to=httpx2.Response, body=dict(body), options={"headers": dict(headers)})
        except openai.OpenAIError as error:
            failed = self._explained(error)
        else:
            return self._read(response)
        raise failed

    async def _closing(self, loop: asyncio.AbstractEventLoop, client: openai.AsyncOpenAI) -> AsyncGenerator[None]:
        """A loop that ends closes the generators that have not ended, and so the client whose connections belong to it."""
        try:
            yield
        finally:
            del self._clients[loop], self._closers[loop]
            await client.close()

    def close(self) -> None:
        """Closes the connections of `post`; those of `apost` close with their event loop."""
        with self._lock:
            client, self._sync = self._sync, None
        if client is not None:
            client.close()

    def _settings(self) -> dict[str, Any]:
        # Tries are the gateway's: the library's own would be made behind its back, and not be counted.
        return {"base_url": self._url, "api_key": self._key, "timeout": self._timeout, "max_retries": 0}

    def _explained(self, error: openai.OpenAIError) -> Exception:
        """An error of the library, by what can be done about it."""
        if isinstance(error, openai.APIStatusError):
            status, code = error.status_code, str(error.code or error.type or "")
            told = f"{self._host} answered {status}" + (f" {code}" if _WORD.fullmatch(code) else "")
            if code in _UNPAID or (status not in _TRANSIENT and status < 500):
                return LLMRequestError(told, status=status, fix=_fix(status, code))
            kind = TooManyRequestsError if status == 429 else EndpointUnavailableError
            return kind(told, retry_after=retry_after(error))
        if isinstance(error, openai.APITimeoutError):
            return EndpointUnavailableError(f"{self._host} was silent for {self._timeout:g} seconds")
        if isinstance(error, openai.APIConnectionError):
            why = type(error.__cause__ or error).__name__
            return EndpointUnavailableError(f"{self._host} cannot be reached, or the connection was cut ({why})")
        return GarbledReplyError(f"{self._host} sent no reply of the protocol ({type(error).__name__})")

    def _read(self, response: httpx2.Response) -> Reply:
        try:
            completion = _Completion.model_validate_json(response.content)
        except ValidationError as error:
            why = ", ".join(dict.fromkeys(one["type"] for one in error.errors(include_url=False, include_input=False)))
        else:
            return completion.reply
        raise GarbledReplyError(f"{self._host} sent no reply of the protocol ({why})")


def _fix(status: int, code: str) -> str:
    if code in _UNPAID or status == 402:
        return "see to the account at the endpoint: it has nothing left to spend"
    if status in (401, 403):
        return 'give a key that is good for this endpoint and model: api_key=dg.EnvVar("…")'
    if status == 404:
        return "check `base_url` (it ends before /chat/completions) and the name of the model"
    if status == 413 or code == "context_length_exceeded":
        return "ask about less at once: it is more than the model takes"
    return "ask in another way: another `output_mode`, strict=False, temperature=None, or `parameters` that the model knows"


# -- the protocol, as far as it is read --------------------------------------------------------------------------------------------------


class _Function(BaseModel):
    arguments: str


class _ToolCall(BaseModel):
    function: _Function


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Completion(BaseModel):
    model: str | None = None
    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None

    @property
    def reply(self) -> Reply:
        choice, used = self.choices[0], self.usage or _Usage()
        calls = choice.message.tool_calls or []
        return Reply(
            text=calls[0].function.arguments if calls else choice.message.content or "",
            model=self.model,
            input_tokens=used.prompt_tokens or 0,
            output_tokens=used.completion_tokens or 0,
            cut=choice.finish_reason == "length",
            refused=bool(choice.message.refusal) or choice.finish_reason == "content_filter",
        )
