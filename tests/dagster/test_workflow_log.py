"""Whoever writes a line to Dagster's log, an agent, an undo, or this library, it says which workflow it is about."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import dagster as dg
import pytest
from pydantic import BaseModel

import dagster_mao as mao
from dagster_mao.dagster import StateStoreResource
from dagster_mao.dagster.saga import run_config
from tests.choreography.loans import loans
from tests.dagster.theatre import EAGER, Theatre

MONDAY = "2026-01-05"
DAYS = dg.DailyPartitionsDefinition("2026-01-01", end_date="2026-01-08")


class Item(BaseModel):
    item_id: Annotated[str, mao.Key]


@mao.agent
def items() -> list[Item]:
    return [Item(item_id=key) for key in "ab"]


class Shelf(mao.Agent):
    """Talks when it is called, and when it is undone."""

    def execute(self, ctx: mao.AgentContext, items: Item) -> Item:
        ctx.log.info("%d %% of a shelf", 50)
        ctx.effect("shelf", lambda effect: None)
        return items

    def compensate(self, undo: mao.Undo) -> None:
        undo.log.info("cleared")


@mao.agent
def clerk(ctx: mao.AgentContext, shelf: Item) -> Item:
    ctx.log.warning("about to fail")
    raise ConnectionError


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    (tmp_path / "home").mkdir()
    # What this library tells Python's own logs of is told in Dagster's too.
    managed = {"python_logs": {"managed_python_loggers": ["dagster_mao"]}}
    with dg.DagsterInstance.local_temp(str(tmp_path / "home"), overrides=managed) as instance:
        yield instance


def lines(instance: dg.DagsterInstance, run_id: str) -> list[str]:
    """What was logged in a run, other than by Dagster itself."""
    told = [entry.user_message for entry in instance.all_logs(run_id) if entry.dagster_event is None]
    return [line for line in told if not line.startswith(("Dependencies for step ", "Blocking asset check "))]


def test_lines_of_agents_undos_and_of_what_goes_wrong_beside_them(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    """Naive: `context.log` as it is. In a run over many workflows, and in the log of a process, nobody knows whose line it is."""
    records = list[logging.LogRecord]()

    @dg.logger
    def collecting(context: dg.InitLoggerContext) -> logging.Logger:
        logger = logging.Logger("collecting")
        handler = logging.Handler()
        handler.emit = records.append  # type: ignore[method-assign]
        logger.addHandler(handler)
        return logger

    pipeline = mao.Pipeline("shop", entry=items, agents=[Shelf, clerk], partitions_def=DAYS)
    made = pipeline.build_definitions(resources={"state_store": StateStoreResource(root=str(tmp_path / "state"))})
    defs = dg.Definitions.merge(made, dg.Definitions(executor=dg.in_process_executor, loggers={"collecting": collecting}))
    # The table of calls cannot be written: told by a thread of its own, to Python's log.
    (tmp_path / "state" / "tables" / "shop").mkdir(parents=True)
    (tmp_path / "state" / "tables" / "shop" / "shelf_calls").write_text("in the way")
    job, config = defs.resolve_job_def("shop_job"), {"loggers": {"collecting": {}}}
    failed = job.execute_in_process(config, instance=instance, partition_key=MONDAY, raise_on_error=False)
    assert not failed.success
    about = f"shop/{MONDAY}, shelf, attempt {failed.run_id[:8]}: "
    told = lines(instance, failed.run_id)
    assert told.count(f"{about}50 % of a shelf") == 2
    assert f"shop/{MONDAY}, clerk, attempt {failed.run_id[:8]}: about to fail" in told
    assert any(line.startswith(f"{about}calls were not logged") for line in told)
    assert [line for line in told if not line.startswith(f"shop/{MONDAY}, ")] == []
    of_shelf = {vars(r)["attempt"] for r in records if (vars(r).get("workflow"), vars(r).get("agent")) == (f"shop/{MONDAY}", "shelf")}
    assert of_shelf == {failed.run_id}

    undo = defs.resolve_job_def("shop_compensate")
    undone = undo.execute_in_process(run_config(f"shop/{MONDAY}", failed.run_id), instance=instance)
    told = lines(instance, undone.run_id)
    assert f"{about}cleared" in told
    assert [line for line in told if not line.startswith((f"shop/{MONDAY}, shelf, attempt", f"shop/{MONDAY}, attempt"))] == []


def test_lines_of_a_run_over_many_workflows(tmp_path: Path, instance: dg.DagsterInstance) -> None:
    theatre = Theatre(tmp_path, instance, loans(micro_batch=EAGER, partitions_def=DAYS))
    days = [MONDAY, "2026-01-06"]
    theatre.arrive(*days)
    theatre.ledger.fail(f"score loans/{MONDAY}")
    (request,) = theatre.tick("score")
    told = lines(instance, theatre.launch(request).run_id)
    assert [line.partition(": ")[0] for line in told] == [f"loans/{MONDAY}, score"]
    # In a run of an agent that is left to its sensor, too.
    job: Any = theatre.defs.resolve_implicit_global_asset_job_def()
    whole = job.execute_in_process(instance=instance, partition_key="2026-01-07")
    told = [line for line in lines(instance, whole.run_id) if "its sensor does" in line]
    assert {line.partition(": ")[0] for line in told} == {f"loans/2026-01-07, {agent}" for agent in ("score", "income")}
