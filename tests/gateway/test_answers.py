"""What is kept is known again, once, under the same key and fingerprint, on SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import pytest

from dagster_mao.gateway import Answers, CallRecord, idempotency_key
from dagster_mao.gateway._shared import SharedStore

WEEK = 7 * 86400.0


def answers(shared: SharedStore, **changed: Any) -> Answers:
    given: dict[str, Any] = {
        "pipeline": "credit",
        "workflow_id": "credit/2026-01-01",
        "agent": "scores",
        "fingerprint": "v1",
        "attempt": "attempt-1",
        "run_id": "run-1",
        "keep": WEEK,
    }
    return Answers(shared, **{**given, **changed})


def key(n: object, agent: str = "scores") -> str:
    return idempotency_key("credit/2026-01-01", 0, agent, f"app-{n}", "digest")


def told(**changed: Any) -> CallRecord:
    return CallRecord(1, time.time(), 0.25, "answered", model="m", input_tokens=7, output_tokens=3, cost=0.1, breaker="closed")._replace(
        **changed
    )


def test_what_was_kept_is_known_to_the_next_step(shared: SharedStore) -> None:
    said = told()
    with answers(shared) as first:
        first.keep(key(1), "app-1", b"\x00one", said)
    with answers(shared, attempt="attempt-2", run_id="run-2") as second:
        known = second.known([key(1), key(2)])
    assert known == {key(1): (b"\x00one", said, "attempt-1", "run-1")}


def test_tasks_and_threads_keep_at_once(shared: SharedStore) -> None:
    with answers(shared) as kept:

        async def tasks() -> None:
            await asyncio.gather(*[kept.akeep(key(n), f"app-{n}", b"%d" % n, told()) for n in range(100)])

        threads = [threading.Thread(target=kept.keep, args=(key(n), f"app-{n}", b"%d" % n, told())) for n in range(100, 140)]
        for thread in threads:
            thread.start()
        asyncio.run(tasks())
        for thread in threads:
            thread.join()
    with answers(shared) as again:
        known = again.known([key(n) for n in range(140)])
    assert {k: a.value for k, a in known.items()} == {key(n): b"%d" % n for n in range(140)}


@pytest.mark.parametrize("other", [{"fingerprint": "v2"}, {"workflow_id": "credit/2026-01-02"}, {"agent": "frauds"}, {"fresh": True}])
def test_another_agent_version_or_a_fresh_run_is_not_answered(shared: SharedStore, other: dict[str, Any]) -> None:
    with answers(shared) as first:
        first.keep(key(1), "app-1", b"one", told())
    with answers(shared, **other) as second:
        assert second.known([key(1)]) == {}
