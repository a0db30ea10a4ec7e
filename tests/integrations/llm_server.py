"""A local server that speaks the protocol of chat completions, and can be told to misbehave in every way that endpoints do."""

from __future__ import annotations

import json
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-test-0123456789abcdef"


@dataclass
class Request:
    """What came in, with headers in small letters."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def last(self) -> str:
        """The text of the last message."""
        return str(self.body["messages"][-1]["content"])

    @property
    def text(self) -> str:
        """The text of all messages."""
        return "\n".join(str(message.get("content")) for message in self.body["messages"])


Behaviour = Callable[["_Handler", Request], None]


def answer(
    content: Mapping[str, Any] | str, *, tokens: tuple[int, int] = (100, 10), finish: str = "stop", refusal: str | None = None
) -> Behaviour:
    """An answer, in the form that the request asks for: the arguments of a tool call, or a message."""

    def behave(handler: _Handler, request: Request) -> None:
        text = content if isinstance(content, str) else json.dumps(content)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if request.body.get("tools"):
            function = {"name": request.body["tools"][0]["function"]["name"], "arguments": text}
            message = {"role": "assistant", "content": None, "tool_calls": [{"id": "call_x", "type": "function", "function": function}]}
        if refusal:
            message = {"role": "assistant", "content": None, "refusal": refusal}
        handler.send_json(
            200,
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 1,
                "model": f"{request.body['model']}-2026",
                "choices": [{"index": 0, "message": message, "finish_reason": finish}],
                "usage": {"prompt_tokens": tokens[0], "completion_tokens": tokens[1], "total_tokens": sum(tokens)},
            },
        )

    return behave


def status(code: int, error: str = "server_error", *, headers: Mapping[str, str] | None = None) -> Behaviour:
    """An error, which quotes the prompt and the key as endpoints do."""

    def behave(handler: _Handler, request: Request) -> None:
        told = f"You sent {request.text} with {request.headers.get('authorization')}"
        handler.send_json(code, {"error": {"message": told, "type": error, "code": error, "param": None}}, headers)

    return behave


def retry_after_date(seconds: float) -> dict[str, str]:
    """Headers that ask to wait until a date, by a clock that is an hour slow."""
    now = time.time() - 3600
    return {"Date": formatdate(now, usegmt=True), "Retry-After": formatdate(now + seconds, usegmt=True)}


def garbage(body: bytes = b"<html>Bad gateway</html>", kind: str = "text/html") -> Behaviour:
    """200, and a body that is no completion."""
    return lambda handler, request: handler.send_bytes(200, body, kind)


def half(handler: _Handler, request: Request) -> None:
    """The beginning of an answer; then the connection is cut."""
    handler.send_response(200)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"id": "chatcmpl-1", "choices": [{"mess')
    handler.close_connection = True


def cut(handler: _Handler, request: Request) -> None:
    """Nothing; the connection is cut."""
    handler.close_connection = True


def hang(handler: _Handler, request: Request) -> None:
    """No answer, until the other side hangs up or the server ends."""
    while not handler.llm.ending.is_set():
        ready, _, _ = select.select([handler.connection], [], [], 0.05)
        if ready and not handler.connection.recv(1):
            handler.llm.hung_up.append(request)
            break
    handler.close_connection = True


def slow(seconds: float, then: Behaviour) -> Behaviour:
    """A late answer."""

    def behave(handler: _Handler, request: Request) -> None:
        handler.llm.ending.wait(seconds)
        then(handler, request)

    return behave


@dataclass
class LLMServer:
    """A server on loopback. It does what `script` says, request by request, then what `otherwise` says (of the request, if it is asked)."""

    otherwise: Callable[[Request], Behaviour] | None = None
    script: deque[Behaviour] = field(default_factory=deque)
    requests: list[Request] = field(default_factory=list)
    hung_up: list[Request] = field(default_factory=list)
    ending: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> LLMServer:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.llm = self
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def then(self, *behaviours: Behaviour) -> None:
        """Adds to the script."""
        self.script.extend(behaviours)

    def behaviour(self, request: Request) -> Behaviour:
        self.requests.append(request)
        try:
            return self.script.popleft()
        except IndexError:
            assert self.otherwise is not None, "a request that the test does not expect"
            return self.otherwise(request)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128
    llm: LLMServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def llm(self) -> LLMServer:
        assert isinstance(self.server, _Server)
        return self.server.llm

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        request = Request(self.path, {name.lower(): value for name, value in self.headers.items()}, body)
        self.llm.behaviour(request)(self, request)

    def send_json(self, code: int, body: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> None:
        self.send_bytes(code, json.dumps(body).encode(), "application/json", headers)

    def send_bytes(self, code: int, body: bytes, kind: str, headers: Mapping[str, str] | None = None) -> None:
        self.send_response_only(code)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass
