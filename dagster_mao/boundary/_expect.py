"""The agent's expectations about its batch, judged between the output contract and the seal; the findings as checks, and as a page."""

from __future__ import annotations

import hashlib
from typing import Any

from dagster_mao.agent import Agent
from dagster_mao.boundary._checks import Check
from dagster_mao.expectations import Finding, report
from dagster_mao.state import Attempt, Seal, Staged, StateStore
from dagster_mao.state.objects import safe_name

REPORT = "report"


def expected(store: StateStore, agent: Agent, attempt: Attempt, batch: Staged, rows: int) -> list[Check]:
    """A check per expectation, each with the path of the page that shows them all; none for an agent without a suite."""
    if not agent.suite:
        return []
    previous = _previous(store, agent, attempt) if agent.suite.compares else None
    findings = agent.suite.judge(batch.scan(), store.read(previous) if previous else None)
    told = {"previous": previous.reference} if previous else {}
    page = _page(agent, attempt, batch, rows, told, findings)
    path = f"reports/{attempt.pipeline}/{agent.name}/{safe_name(attempt.workflow_key)}/{_name(batch, page)}.html"
    store.objects.put_if_absent(path, page)
    shown = {REPORT: store.objects.url(path)}
    extra = [{**shown, **told} if one.previous else shown for one in agent.suite.expectations]
    return [Check(f.name, f.passed, f.description, {**f.metadata, **more}, f.severity) for f, more in zip(findings, extra, strict=True)]


def _previous(store: StateStore, agent: Agent, attempt: Attempt) -> Seal | None:
    """The version before: this workflow's when the attempt began, else that of the workflow that was sealed last before it."""
    return attempt.previous(agent.name) or store.sealed_before(attempt.now, attempt.pipeline, agent.name, other_than=attempt.workflow_id)


def _page(agent: Agent, attempt: Attempt, batch: Staged, rows: int, told: dict[str, Any], findings: list[Finding]) -> bytes:
    facts = {"workflow": attempt.workflow_id, "attempt": attempt.id, "sha256": batch.digest, "records": f"{rows:,}"}
    named = {"compared with" if name == "previous" else name: value for name, value in {**facts, **told}.items()}
    return report(f"What {agent.name} was expected to seal", named, findings).encode()


def _name(batch: Staged, page: bytes) -> str:
    # Named by the page too: the same batch may be judged again, against another suite or another version before.
    return f"{batch.digest[:32]}-{hashlib.sha256(page).hexdigest()[:16]}"
