"""Calls as OpenTelemetry spans: one trace per step, one span per try, after the step has ended and its version is known.

Attributes are the GenAI semantic conventions' (https://opentelemetry.io/docs/specs/semconv/gen-ai/), and `mao.*` for what they have no word
for. Nothing is imported, and nothing done, unless somebody exports spans: by the standard's environment variables, or by a tracer provider
of its own in this process.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import polars as pl

from dagster_mao.agent import Agent
from dagster_mao.contract import Contract, by_name, hide
from dagster_mao.state import Attempt, Seal, StateStore

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, Tracer

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_CONTENT = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
_SDK = "opentelemetry.sdk.trace"
_AT_A_TIME = 500  # spans of one export
_WITH_CONTENT = 10_000  # calls of a step of which content is told: it is looked up among the step's records

logger = logging.getLogger("dagster_mao.traces")


def is_traced() -> bool:
    """Whether anybody wants spans."""
    if os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    return any(os.environ.get(name) for name in _ENDPOINTS) or _given_provider() is not None


class Traced(NamedTuple):
    """A step that has ended: `rows` of `CALLS_SCHEMA`, what it `read` by upstream, when it `began` (seconds), the class of its `error`."""

    agent: Agent
    attempt: Attempt
    seal: Seal | None
    rows: pl.LazyFrame
    read: Mapping[str, pl.LazyFrame]
    began: float
    error: str | None


def trace_step(store: StateStore, step: Traced) -> None:
    """Exports the calls of a step.

    What cannot be exported is told in the log, and fails nothing. Without content, unless
    `OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT` is "true": then with records, personal fields masked.
    """
    name = step.agent.name
    common = _of_step(step.agent, step.attempt, step.seal)
    try:
        with _sink({key: value for key, value in common.items() if key.startswith("mao.")}) as (tracer, export):
            said = {name: store.read(step.seal)} if step.seal else {}
            _send(tracer, export, step._replace(read={**step.read, **said}), common)
    except ImportError:
        logger.warning("spans are asked for by $%s, and no exporter is installed: pip install 'dagster-mao[otel]'", _ENDPOINTS[0])
    except Exception as failed:  # whatever a collector, a proxy or somebody's provider raises
        logger.warning("the calls of %s were not traced: %s", name, type(failed).__name__)


def _send(tracer: Tracer, export: Callable[[], bool], step: Traced, common: Mapping[str, Any]) -> None:
    from opentelemetry.trace import set_span_in_context

    agent, made = step.agent, step.rows.collect(engine="streaming")
    about = {**common, **_of_records(step.seal, made)}
    root = tracer.start_span(f"invoke_agent {agent.name}", start_time=_ns(step.began), attributes=about)
    if step.error is not None:
        _failed(root, step.error)
    within, content = set_span_in_context(root), _Content(agent, made, step.read)
    ended = step.began
    for started in range(0, made.height, _AT_A_TIME):
        for call in made.slice(started, _AT_A_TIME).iter_rows(named=True):
            span = tracer.start_span(
                f"chat {call['model']}" if call["model"] else f"call {agent.name}",
                context=within,
                start_time=_ns(call["started"].timestamp()),
                attributes={**common, **_of_call(call), **content.of(call["record"], answered=call["outcome"] in ("answered", "reused"))},
            )
            if call["outcome"] in ("failed", "timed_out", "refused"):
                _failed(span, call["error"] or call["outcome"])
            until = call["started"].timestamp() + (call["latency_seconds"] or 0.0)
            ended = max(ended, until)
            span.end(_ns(until))
        if not export():
            logger.warning("the calls of %s were traced in part only: the collector does not take them", agent.name)
            return
    root.end(_ns(max(ended, step.seal.sealed_at.timestamp() if step.seal else ended)))
    if not export():
        logger.warning("the trace of %s has no root: the collector does not take it", agent.name)


def _of_step(agent: Agent, attempt: Attempt, seal: Seal | None) -> dict[str, Any]:
    """What all spans of a step have in common. The workflow is the session: what many traces have in common."""
    told = {
        "gen_ai.agent.name": agent.name,
        "gen_ai.agent.id": f"{attempt.pipeline}/{agent.name}",
        "gen_ai.agent.version": agent.agent_version,
        "gen_ai.agent.description": agent.description,
        "gen_ai.conversation.id": attempt.workflow_id,
        "session.id": attempt.workflow_id,
        "mao.workflow": attempt.workflow_id,
        "mao.attempt": attempt.id,
        "mao.run": attempt.run_id,
        "mao.epoch": attempt.epoch,
        "mao.state_version": seal.reference if seal else None,
        "mao.version": seal.version if seal else None,
    }
    return {name: value for name, value in told.items() if value is not None}


def _of_records(seal: Seal | None, made: pl.DataFrame) -> dict[str, Any]:
    told: dict[str, Any] = {"gen_ai.operation.name": "invoke_agent", "mao.tries": made.height}
    told |= {f"gen_ai.usage.{name}": int(made[name].sum()) for name in ("input_tokens", "output_tokens")}
    if seal is not None:
        told |= {"mao.records": seal.row_count, "mao.reads": [f"{p.agent}@{p.version}" for p in seal.parents], "mao.digest": seal.digest}
    return told


def _of_call(call: Mapping[str, Any]) -> dict[str, Any]:
    told = {
        "gen_ai.operation.name": "chat" if call["model"] else "execute_tool",
        "gen_ai.request.model": call["model"],
        "gen_ai.usage.input_tokens": call["input_tokens"],
        "gen_ai.usage.output_tokens": call["output_tokens"],
        "mao.call": call["call"],
        "mao.record": call["record"],
        "mao.try": call["number"],
        "mao.outcome": call["outcome"],
        "mao.cost": call["cost"],
        "mao.breaker": call["breaker"],
    }
    return {name: value for name, value in told.items() if value is not None}


class _Content:
    """By record, what went in and what came out, as messages; nothing where it is not asked for, or where records have no key to go by."""

    def __init__(self, agent: Agent, made: pl.DataFrame, read: Mapping[str, pl.LazyFrame]) -> None:
        self._inputs: dict[str, dict[str, Any]] = {}
        self._output: dict[str, Any] = {}
        if os.environ.get(_CONTENT, "").lower() != "true" or made.height > _WITH_CONTENT:
            return
        records = made["record"].drop_nulls().unique()
        for wanted in agent.inputs:
            for key, row in _rows(wanted.contract, read.get(wanted.upstream), records):
                self._inputs.setdefault(key, {})[wanted.upstream] = row
        self._output = dict(_rows(agent.output, read.get(agent.name), records))

    def of(self, record: str | None, *, answered: bool) -> dict[str, str]:
        if record is None:
            return {}
        told = {"gen_ai.input.messages": _messages("user", self._inputs.get(record))}
        if answered:
            told["gen_ai.output.messages"] = _messages("assistant", self._output.get(record))
        return {name: value for name, value in told.items() if value}


def _rows(contract: Contract[Any], frame: pl.LazyFrame | None, records: pl.Series) -> Iterator[tuple[str, dict[str, Any]]]:
    if frame is None or contract.key is None or records.is_empty():
        return
    described = by_name(contract.describe())
    key = pl.col(contract.key).cast(pl.String)
    for row in frame.filter(key.is_in(records.implode())).with_columns(mao_key=key).collect(engine="streaming").iter_rows(named=True):
        yield row.pop("mao_key"), {name: hide(described.get(name), value) for name, value in row.items()}


def _messages(role: str, content: Any) -> str:
    if not content:
        return ""
    parts = [{"type": "text", "content": json.dumps(content, default=str, ensure_ascii=False)}]
    return json.dumps([{"role": role, "parts": parts}], ensure_ascii=False)


def _failed(span: Span, error: str) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute("error.type", error)
    span.set_status(Status(StatusCode.ERROR, error))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)


# -- where spans go ------------------------------------------------------------------------------------------------------------------


def _given_provider() -> Any:
    """The provider that the process has set up for itself; None where it has none."""
    if _SDK not in sys.modules:
        return None
    from opentelemetry import trace

    provider = trace.get_tracer_provider()
    return provider if isinstance(provider, sys.modules[_SDK].TracerProvider) else None


@contextmanager
def _sink(about: Mapping[str, Any]) -> Iterator[tuple[Tracer, Callable[[], bool]]]:
    """A tracer, and what sends the spans that have ended and says whether they arrived.

    What the step is `about` is told of the resource too, by which some collectors (MLflow, as tags of a trace) look for traces.
    """
    if (given := _given_provider()) is not None:
        yield given.get_tracer("dagster_mao"), given.force_flush
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider

    # No thread of its own, which would neither survive a fork nor say whether anything arrived.
    ended = _Ended(OTLPSpanExporter())
    resource = Resource.create({"service.name": os.environ.get("OTEL_SERVICE_NAME", "dagster-mao"), **about})
    provider = TracerProvider(shutdown_on_exit=False, resource=resource)
    provider.add_span_processor(ended)  # type: ignore[arg-type]  # it has all that is called of one
    try:
        yield provider.get_tracer("dagster_mao"), ended.send
    finally:
        ended.shutdown()


class _Ended:
    """A span processor that keeps what has ended until it is sent."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._spans: list[ReadableSpan] = []

    def on_start(self, span: Any, parent_context: Any = None) -> None:
        """Nothing to do."""

    def _on_ending(self, span: Any) -> None:
        """Nothing to do."""

    def on_end(self, span: ReadableSpan) -> None:
        """Keeps it."""
        self._spans.append(span)

    def send(self) -> bool:
        """Whether the collector took what has ended since."""
        from opentelemetry.sdk.trace.export import SpanExportResult

        spans: Sequence[ReadableSpan] = self._spans
        self._spans = []
        return not spans or self._exporter.export(spans) is SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        """Closes the connection."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """As `send`."""
        return self.send()
