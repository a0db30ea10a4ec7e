"""Calls as spans, as a collector receives them: a real server on loopback that speaks OTLP."""

from __future__ import annotations

import gzip
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Annotated, Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse
from pydantic import BaseModel

import dagster_mao as mao
from dagster_mao.errors import AgentFailedError
from tests.judged import COMPLAINTS, Asked, desk, polite
from tests.judged import SECRET as NAMES

SECRET = "Grace Hopper"


class Item(BaseModel):
    id: Annotated[str, mao.Key]
    name: Annotated[str, mao.Personal]
    amount: int


class Score(BaseModel):
    id: Annotated[str, mao.Key]
    points: int


ITEMS = [Item(id="a", name=SECRET, amount=1), Item(id="b", name=SECRET, amount=2)]


@mao.agent
def items() -> list[Item]:
    return ITEMS


def pipeline(*failing: str, retries: int = 0) -> mao.Pipeline:
    left = list(failing)

    @mao.agent(name="score", version="7", model="m-1", policy=mao.Policy(retries=retries, transient=(OSError,)))
    def score(items: Item) -> Score:
        if items.id in left:
            left.remove(items.id)
            raise OSError(SECRET)
        mao.usage(input_tokens=10, output_tokens=3, model="m-1-2026", cost=0.25)
        return Score(id=items.id, points=items.amount)

    return mao.Pipeline("loans", entry=items, agents=[score])


class Collector:
    """What came, decoded."""

    def __init__(self) -> None:
        self.spans: list[dict[str, Any]] = []
        self.status = 200

    def take(self, body: bytes) -> None:
        request = ExportTraceServiceRequest.FromString(body)
        for group in request.resource_spans:
            of = {one.key: _value(one.value) for one in group.resource.attributes}
            for scope in group.scope_spans:
                for span in scope.spans:
                    told = {one.key: _value(one.value) for one in span.attributes}
                    seconds = (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9
                    names = {"name": span.name, "trace": span.trace_id, "id": span.span_id, "parent": span.parent_span_id}
                    self.spans.append(
                        {
                            **names,
                            "status": span.status.code,
                            "seconds": seconds,
                            "service": of["service.name"],
                            "about": of.get("mao.state_version"),
                            **told,
                        }
                    )

    def of(self, agent: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The root of the agent's trace, and its calls in the order of their records and tries."""
        own = [span for span in self.spans if span["gen_ai.agent.name"] == agent]
        (root,) = [span for span in own if not span["parent"]]
        calls = [span for span in own if span["parent"]]
        assert {(span["trace"], span["parent"]) for span in calls} <= {(root["trace"], root["id"])}
        return root, sorted(calls, key=lambda span: (span.get("mao.record", ""), span["mao.try"]))


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(one) for one in value.array_value.values] if kind == "array_value" else getattr(value, kind)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    told = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if told.status == 200:
                told.take(gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body)
            self.send_response(told.status)
            self.send_header("content-type", "application/x-protobuf")
            self.end_headers()
            self.wfile.write(ExportTraceServiceResponse().SerializeToString())

        def log_message(self, *_: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.delenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", raising=False)
    yield told
    server.shutdown()
    thread.join()
    server.server_close()


def test_every_try_is_a_span_of_the_step_that_says_which_version_it_made(local_store: mao.StateStore, collector: Collector) -> None:
    result = mao.run(pipeline("b", retries=1), store=local_store, workflow="1")
    root, calls = collector.of("score")
    assert (root["name"], root["gen_ai.operation.name"], root["service"]) == ("invoke_agent score", "invoke_agent", "dagster-mao")
    assert (root["mao.state_version"], root["mao.version"], root["mao.reads"]) == ("loans/1@1", 1, ["items@0"])
    assert (root["gen_ai.usage.input_tokens"], root["mao.records"], root["mao.tries"]) == (20, 2, 3)
    assert [(c["mao.record"], c["mao.try"], c["mao.outcome"]) for c in calls] == [
        ("a", 1, "answered"),
        ("b", 1, "failed"),
        ("b", 2, "answered"),
    ]
    assert {span["about"] for span in [root, *calls]} == {"loans/1@1"}, "by which MLflow finds the trace"
    seal = result.seals["score"]
    for call in calls:
        assert (call["mao.workflow"], call["mao.run"], call["mao.state_version"]) == ("loans/1", seal.run_id, "loans/1@1")
        assert call["gen_ai.agent.version"] == "7"
        assert call["seconds"] >= 0
    answered, failed = calls[0], calls[1]
    assert (answered["name"], answered["gen_ai.operation.name"]) == ("chat m-1-2026", "chat")
    assert (answered["gen_ai.usage.input_tokens"], answered["gen_ai.usage.output_tokens"], answered["mao.cost"]) == (10, 3, 0.25)
    assert (failed["status"], answered["status"]) == (2, 0)
    assert "OSError" in failed["error.type"]
    assert SECRET not in str(collector.spans)
    assert not [name for span in collector.spans for name in span if name.endswith(".messages")], "content is the operator's to ask for"


def test_content_is_told_where_it_is_asked_for_and_personal_fields_never(
    local_store: mao.StateStore, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "true")
    mao.run(pipeline(), store=local_store, workflow="1")
    _, (call, _other) = collector.of("score")
    (asked,), (said,) = json.loads(call["gen_ai.input.messages"]), json.loads(call["gen_ai.output.messages"])
    assert (asked["role"], said["role"]) == ("user", "assistant")
    assert json.loads(asked["parts"][0]["content"]) == {"items": {"id": "a", "name": "***", "amount": 1}}
    assert json.loads(said["parts"][0]["content"]) == {"id": "a", "points": 1}
    assert SECRET not in str(collector.spans)


def test_a_step_that_seals_nothing_is_traced_too(local_store: mao.StateStore, collector: Collector) -> None:
    with pytest.raises(AgentFailedError):
        mao.run(pipeline("a"), store=local_store, workflow="1")
    root, calls = collector.of("score")
    assert (root["status"], root["error.type"]) == (2, "AgentFailedError")
    assert "mao.state_version" not in root
    assert [call["mao.outcome"] for call in calls if call["mao.record"] == "a"] == ["failed"]


def test_a_collector_that_refuses_fails_nothing_and_is_told(
    local_store: mao.StateStore, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    collector.status = 400
    with caplog.at_level(logging.WARNING, "dagster_mao.traces"):
        result = mao.run(pipeline(), store=local_store, workflow="1")
    assert result.seals["score"].version == 1
    assert "the collector does not take them" in caplog.text


def test_a_provider_of_the_process_gets_the_spans(local_store: mao.StateStore) -> None:
    code = f"""
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
kept, provider = InMemorySpanExporter(), TracerProvider()
provider.add_span_processor(SimpleSpanProcessor(kept))
trace.set_tracer_provider(provider)
import dagster_mao as mao
from tests.test_traces import pipeline
with trace.get_tracer("mine").start_as_current_span("mine") as mine:
    mao.run(pipeline(), store=mao.StateStore({local_store.root!r}), workflow="1")
spans = kept.get_finished_spans()
print(len(spans), len({{span.context.trace_id for span in spans}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.split() == ["6", "1"], done.stderr  # items: a step and a call; score: a step and two; mine


def test_without_an_exporter_nothing_is_imported(tmp_path: Path) -> None:
    code = f"""
import sys
import dagster_mao as mao
from pydantic import BaseModel

class One(BaseModel):
    n: int

def one() -> One:
    return One(n=1)

mao.run(mao.Pipeline("p", entry=mao.agent(one)), store=mao.StateStore({str(tmp_path)!r}))
print(sorted(name for name in sys.modules if name.startswith("opentelemetry")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout.strip() == "[]", done.stderr


def test_votes_of_judges_are_spans_of_the_version_that_they_judged(
    local_store: mao.StateStore, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their reasons are not told: they may quote what they were sent."""
    monkeypatch.setenv("OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT", "true")
    ask = Asked(lambda record, time: record != "c1")
    result = mao.run(desk(polite(ask, send_personal=True)), COMPLAINTS[:2], store=local_store, workflow="1")
    root, votes = collector.of("replies.polite")
    assert (root["mao.state_version"], root["gen_ai.usage.input_tokens"]) == (result.seals["replies"].reference, 300)
    assert [vote["mao.record"] for vote in votes] == ["c0", "c1", "c1"]
    assert {vote["gen_ai.request.model"] for vote in votes} == {"small-judge"}
    told = json.dumps([root, *votes], default=str)
    assert "polite." not in told
    assert NAMES not in told
