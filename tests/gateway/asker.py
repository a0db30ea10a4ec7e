"""A step that asks a paid service for each record and keeps its answers, in a process that dies where it is told to; and the service."""

from __future__ import annotations

import asyncio
import http.client
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from dagster_mao.gateway import Answers, CallRecord, idempotency_key
from dagster_mao.gateway._shared import SharedStore

BEFORE_CALL, BEFORE_KEEP, AFTER_KEEP = "before the call", "after the answer, before it is kept", "after it is kept"
IN_FLIGHT = {"sync": 1, "threads": 4, "async": 16}


@dataclass(frozen=True)
class Script:
    """What a step does: for each of `records`, one call. It dies at `point` of its call number `at`, if one is named."""

    database: str
    service: int  # its port
    kept: Path  # where it notes each key that was kept: what it believes to be safe
    way: str = "sync"
    engine: str = "ours"
    workflow: str = "credit/2026-01-01"
    fingerprint: str = "v1"
    records: int = 40
    point: str | None = None
    at: int = 0

    @property
    def keys(self) -> list[str]:
        return [idempotency_key(self.workflow, 0, "scores", f"app-{n}", "digest") for n in range(self.records)]


# -- in the process ------------------------------------------------------------------------------------------------------------------


def step(script: Script) -> int:
    """The number of calls that it made."""
    kept = ENGINES[script.engine](
        SharedStore(script.database),
        pipeline="credit",
        workflow_id=script.workflow,
        agent="scores",
        fingerprint=script.fingerprint,
        attempt="attempt",
        run_id=str(os.getpid()),
        keep=86400.0,
    )
    known = kept.known(script.keys)
    todo = [key for key in script.keys if key not in known]
    asked = Asked(script, kept)
    if script.way == "async":
        asyncio.run(asked.together(todo))
    elif script.way == "threads":
        with ThreadPoolExecutor(IN_FLIGHT["threads"]) as pool:
            list(pool.map(asked.one, todo))
    else:
        for key in todo:
            asked.one(key)
    kept.close()
    return len(todo)


class Asked:
    def __init__(self, script: Script, kept: Answers) -> None:
        self._script, self._kept, self._points = script, kept, Counter[str]()
        self._notes = os.open(script.kept, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def one(self, key: str) -> None:
        self._reached(BEFORE_CALL)
        connection = http.client.HTTPConnection("127.0.0.1", self._script.service)
        connection.request("POST", "/", headers={"Idempotency-Key": key})
        value = connection.getresponse().read()
        connection.close()
        self._reached(BEFORE_KEEP)
        self._kept.keep(key, None, value, _told())
        self._safe(key)

    async def together(self, keys: Sequence[str]) -> None:
        room = asyncio.Semaphore(IN_FLIGHT["async"])

        async def one(key: str) -> None:
            async with room:
                self._reached(BEFORE_CALL)
                reader, writer = await asyncio.open_connection("127.0.0.1", self._script.service)
                writer.write(f"POST / HTTP/1.0\r\nIdempotency-Key: {key}\r\n\r\n".encode())
                value = (await reader.read()).partition(b"\r\n\r\n")[2]
                writer.close()
                self._reached(BEFORE_KEEP)
                await self._kept.akeep(key, None, value, _told())
                self._safe(key)

        await asyncio.gather(*[one(key) for key in keys])

    def _safe(self, key: str) -> None:
        os.write(self._notes, f"{key}\n".encode())
        self._reached(AFTER_KEEP)

    def _reached(self, point: str) -> None:
        self._points[point] += 1
        if point == self._script.point and self._points[point] == self._script.at:
            os.kill(os.getpid(), signal.SIGKILL)


def _told() -> CallRecord:
    return CallRecord(1, time.time(), 0.0, "answered")


# -- naive engines -------------------------------------------------------------------------------------------------------------------


class InMemory(Answers):
    """Answers are kept in memory and written at the end of the step."""

    flush_at = 10**9

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self._buffer: list[Any] = []
        self._filling = threading.Lock()

    def keep(self, *row: Any) -> None:
        with self._filling:
            self._buffer.append(row)
            if len(self._buffer) >= self.flush_at:
                self._flush()

    async def akeep(self, *row: Any) -> None:
        self.keep(*row)

    def _flush(self) -> None:
        for row in self._buffer:
            super().keep(*row)
        self._buffer.clear()

    def close(self) -> None:
        self._flush()
        super().close()


class ByBatch(InMemory):
    """One commit for eight answers."""

    flush_at = 8


ENGINES: dict[str, type[Answers]] = {"ours": Answers, "in memory": InMemory, "by batch": ByBatch}


# -- the service ---------------------------------------------------------------------------------------------------------------------


class Service:
    """Counts what it was asked, by idempotency key. What comes after `hold_after` calls waits for its answer until `let_go`."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.hanging: set[str] = set()
        self.hold_after: int | None = None
        self._lock = threading.Lock()
        self._go = threading.Event()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                answer = service._asked(self.headers["Idempotency-Key"])
                try:
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(answer)))
                    self.end_headers()
                    self.wfile.write(answer)
                except OSError:  # whoever asked is dead
                    self.close_connection = True

            def log_message(self, *_: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

        self.server = Server(("127.0.0.1", 0), Handler)

    def _asked(self, key: str) -> bytes:
        with self._lock:
            self.calls[key] += 1
            holds = self.hold_after is not None and self.calls.total() > self.hold_after
            if holds:
                self.hanging.add(key)
        if holds:
            self._go.wait(120)
        return f"answer {self.calls[key]} to {key}".encode()

    def let_go(self) -> None:
        self.hold_after = None
        self._go.set()

    @property
    def port(self) -> int:
        return int(self.server.server_address[1])


@contextmanager
def serving() -> Iterator[Service]:
    service = Service()
    thread = threading.Thread(target=service.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield service
    service.let_go()
    service.server.shutdown()
    thread.join()
    service.server.server_close()
