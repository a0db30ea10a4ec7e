"""Lines of a log say which workflow they are about, whoever writes them and in whichever thread."""

import logging
import threading
from contextvars import copy_context
from pathlib import Path

import pytest

import dagster_mao as mao
from dagster_mao.correlation import Whose, WorkflowLog, about
from dagster_mao.state import StateStore
from tests.shop import Run, Side, batch, pricing, shop

LOGGER = logging.getLogger("tests.correlation")
AWKWARD = Whose("shop/50% off %s", "pricing", "0123456789")


def test_a_line_begins_with_what_it_is_about_and_its_record_says_so_too(caplog: pytest.LogCaptureFixture) -> None:
    """Naive: a prefix before a format, which takes the workflow's own % for places of arguments."""
    log = WorkflowLog(LOGGER, AWKWARD)
    log.warning("%s of %d", "one", 2)
    log.warning("100 %")
    log.warning("mine", extra={"agent": "another", "table": 3})
    told = "shop/50% off %s, pricing, attempt 01234567: "
    assert [record.getMessage() for record in caplog.records] == [f"{told}one of 2", f"{told}100 %", f"{told}mine"]
    shown = [(r.workflow, r.agent, r.attempt) for r in caplog.records]  # type: ignore[attr-defined]
    assert shown == [tuple(AWKWARD), tuple(AWKWARD), (AWKWARD.workflow, "another", AWKWARD.attempt)]
    assert {record.filename for record in caplog.records} == {"test_correlation.py"}, "who logs is found, not the adapter"


def test_what_is_not_logged_costs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Costly:
        def __str__(self) -> str:
            raise AssertionError("it was written out")

    with caplog.at_level(logging.WARNING):
        WorkflowLog(LOGGER, AWKWARD).info(Costly())
        WorkflowLog(LOGGER, AWKWARD).info("%s", Costly())
    assert not caplog.records


def test_without_a_workflow_a_line_is_what_it_was(caplog: pytest.LogCaptureFixture) -> None:
    WorkflowLog(LOGGER).warning("%s", "plain")
    assert [record.getMessage() for record in caplog.records] == ["plain"]


def test_a_thread_that_is_started_with_the_context_is_about_the_same(caplog: pytest.LogCaptureFixture) -> None:
    log = WorkflowLog(LOGGER)
    with about("shop/day", "pricing"):
        with about("shop/other"):
            log.warning("inner")
        thread = threading.Thread(target=copy_context().run, args=(log.warning, "elsewhere"))
    thread.start()
    thread.join()
    log.warning("after")
    assert [record.getMessage() for record in caplog.records] == ["shop/other: inner", "shop/day, pricing: elsewhere", "after"]


@pytest.mark.parametrize("way", ["async", "sync", "threads"])
def test_what_goes_wrong_beside_a_step_is_told_with_its_workflow(
    local_store: StateStore, way: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The calls table cannot be written, by a thread of its own; and a timeout leaves a call behind, in a thread of its own."""
    leave = threading.Event()
    side = Side(lambda item, time: leave.wait(60) if item == "i0" and time == 1 else 1)
    policy = mao.Policy(timeout=1.0, retries=5) if way != "async" else mao.Policy()
    run = Run(local_store, shop(pricing(way, policy=policy, version="1")), "0123456789")
    run.enter(batch(3))
    (Path(local_store.root) / "tables" / "shop" / "pricing_calls").write_text("in the way")
    run.step("pricing", resources={"side": side if way != "async" else Side()})
    leave.set()
    told = [record.getMessage() for record in caplog.records if record.name.startswith("dagster_mao")]
    assert all(line.startswith("shop/day, pricing, attempt 01234567: ") for line in told)
    assert any("calls were not logged" in line for line in told)
    assert any("go on after their timeout" in line for line in told) is (way != "async")
