"""What effects cost: the journal of a step that has one per record, against the same step without; and the undoing of ten agents.

    python benchmarks/saga.py [records ...]       # 10000 100000
    python benchmarks/saga.py --undo [records]    # ten agents with 100 000 effects each are undone
    python benchmarks/saga.py --in-flight [workflows]    # a tick of the compensation sensor while 10 000 hybrid workflows go on

CPU microseconds per record of a whole step: it reads its pins, makes the models, calls, has an effect that does nothing, checks the outputs
and seals; by the clock too. The floor of the same run is the same step without the effect. "commits" counts those of the journal. Medians
over interleaved repetitions, on SQLite. Workflows in flight are written in bulk, as copies of one whose first agent has sealed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import dagster as dg
import polars as pl
import sqlalchemy as sa
from calls import Application, Cost, Score, applications, rows, timed
from deltalake import CommitProperties, Transaction

import dagster_mao as mao
from dagster_mao.boundary import run_agent
from dagster_mao.choreography import enter, run_batch, tick
from dagster_mao.dagster import StateStoreResource
from dagster_mao.dagster.reconciling import build_compensation_sensor
from dagster_mao.journal import Journal, journal_of
from dagster_mao.journal._tables import PAGES, STEPS
from dagster_mao.saga import Saga
from dagster_mao.state import Seal, StateStore
from dagster_mao.state.attempt import next_seal
from dagster_mao.state.log import SCHEMA, StateLog

AGENTS = 10


def _scored(application: Application) -> Score:
    return Score(application_id=application.application_id, score=500, band="poor")


def in_place(ctx: mao.AgentContext, applications: Application) -> Score:
    return _scored(applications)


def in_place_with_effects(ctx: mao.AgentContext, applications: Application) -> Score:
    ctx.effect("nothing", lambda effect: None)
    return _scored(applications)


async def as_tasks(ctx: mao.AgentContext, applications: Application) -> Score:
    return _scored(applications)


async def as_tasks_with_effects(ctx: mao.AgentContext, applications: Application) -> Score:
    async def nothing(effect: mao.Effect) -> None:
        pass

    await ctx.effect("nothing", nothing)
    return _scored(applications)


def by_frame(ctx: mao.AgentContext, applications: mao.DataFrame[Application]) -> mao.DataFrame[Score]:
    return applications.select("application_id", score=pl.lit(500, pl.Int64), band=pl.lit("poor"))


def by_frame_with_effects(ctx: mao.AgentContext, applications: mao.DataFrame[Application]) -> mao.DataFrame[Score]:
    ctx.effects("nothing", lambda effect: None, applications, key="application_id")
    return by_frame(ctx, applications)


def in_batches_with_effects(ctx: mao.AgentContext, applications: mao.DataFrame[Application]) -> mao.DataFrame[Score]:
    ctx.effects("nothing", lambda effects: [None] * len(effects), applications, key="application_id", in_batches_of=1000)
    return by_frame(ctx, applications)


Function = Callable[..., Any]
MODES: dict[str, tuple[Function, Function, dict[str, Any]]] = {
    "in place": (in_place, in_place_with_effects, {}),
    "16 threads": (in_place, in_place_with_effects, {"concurrency": 16}),
    "16 tasks": (as_tasks, as_tasks_with_effects, {}),
    "frame": (by_frame, by_frame_with_effects, {}),
    "frame, 1 000 at a time": (by_frame, in_batches_with_effects, {}),
}


def undo_nothing(undo: mao.Undo) -> None:
    for _ in undo.effects:
        pass


# -- the journal ---------------------------------------------------------------------------------------------------------------------


def step(function: Function, declared: dict[str, Any], records: int, *, effects: bool) -> tuple[Cost, int]:
    """What the agent's step takes, and how often it commits to the journal; its entry is sealed before."""
    agent = mao.agent(name="score", policy=mao.Policy(keep_answers=0), compensate=undo_nothing if effects else None, **declared)(function)
    pipeline = mao.Pipeline("benchmark", entry=applications, agents=[agent])
    commits, write = list[int](), Journal.write

    def counted(*args: Any, **kwargs: Any) -> bool:
        commits.append(1)
        return write(*args, **kwargs)

    with tempfile.TemporaryDirectory() as folder:
        store, run_id = StateStore(folder), uuid.uuid4().hex
        Journal.write = counted  # type: ignore[method-assign]
        try:
            for name, member in pipeline.agents.items():
                attempt = store.open_attempt(
                    pipeline=pipeline.name, attempt=run_id, run_id=run_id, plan=pipeline.order, entry="applications", workflow_key="day"
                )
                cost = timed(partial(run_agent, store, member, attempt, records=rows(records) if name == "applications" else None))
        finally:
            Journal.write = write  # type: ignore[method-assign]
    return cost, len(commits)


def measure(records: int, repetitions: int) -> None:
    told: dict[str, list[tuple[Cost, Cost, int]]] = {}
    for _ in range(repetitions):
        for name, (without, with_effects, declared) in MODES.items():
            floor, _ = step(without, declared, records, effects=False)
            cost, commits = step(with_effects, declared, records, effects=True)
            told.setdefault(name, []).append((floor, cost, commits))
    names = ("without", "with", "ratio", "an effect", "clock, with", "commits")
    print(f"{f'{records:,} records, CPU us each':32}" + "".join(f"{name:>13}" for name in names))
    for name, each in told.items():
        floor_us, cost_us = (statistics.median(one[at].cpu for one in each) / records * 1e6 for at in (0, 1))  # type: ignore[union-attr]
        wall = statistics.median(one[1].wall for one in each) / records * 1e6
        commits = statistics.median(one[2] for one in each)
        ratio = cost_us / floor_us
        print(f"  {name:30}{floor_us:13.1f}{cost_us:13.1f}{ratio:13.2f}{cost_us - floor_us:13.1f}{wall:13.1f}{commits:13.0f}", flush=True)


# -- undoing -------------------------------------------------------------------------------------------------------------------------


def acting(number: int) -> mao.Agent:
    """An agent that has an effect for each record of the entry, and seals it."""

    def act(ctx: mao.AgentContext, applications: mao.DataFrame[Application]) -> mao.DataFrame[Score]:
        return in_batches_with_effects(ctx, applications)

    made: mao.Agent = mao.agent(name=f"agent_{number}", compensate=undo_nothing)(act)
    return made


@mao.agent
def last(agent_0: Score) -> Score:
    """Fails, when all others have sealed."""
    raise RuntimeError("told to fail")


def undo(records: int) -> None:
    """An attempt of ten agents with so many effects each, whose last agent fails, is undone."""
    pipeline = mao.Pipeline("benchmark", entry=applications, agents=[*(acting(number) for number in range(AGENTS)), last])
    with tempfile.TemporaryDirectory() as folder:
        store = StateStore(folder)

        def attempt() -> None:
            with suppress(mao.AgentFailedError):
                mao.run(pipeline, rows(records), store=store, workflow="day", compensate=False)

        acted = timed(attempt)
        assert len(store.seals("benchmark/day")) == AGENTS + 1
        saga = Saga(store, pipeline, "benchmark/day", store.seals("benchmark/day")[0].attempt)
        planned = timed(saga.plan)
        undone = timed(saga.run)
        (*_, newest) = store.seals("benchmark/day")
        assert newest.kind == "compensated"
    effects = AGENTS * records
    print(f"{AGENTS} agents x {records:,} effects{'':16}{'seconds':>10}{'CPU':>10}{'CPU us each':>14}")
    for name, cost in {"done": acted, "planned (a dry run)": planned, "undone": undone}.items():
        print(f"  {name:38}{cost.wall:10.1f}{cost.cpu:10.1f}{cost.cpu / effects * 1e6:14.1f}", flush=True)


# -- in flight -----------------------------------------------------------------------------------------------------------------------


def in_flight(workflows: int) -> None:
    """A tick that finds nothing to do: none of the attempts has failed, and none is through."""
    pipeline = mao.Pipeline("benchmark", entry=applications, agents=[acting(0), last], mode="hybrid", micro_batch=mao.MicroBatch(wait=0))
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as home, dg.DagsterInstance.local_temp(home) as instance:
        resource = StateStoreResource(root=folder)
        store = resource.store()
        enter(store, pipeline, rows(10), workflow="first")
        (batch,) = tick(store, pipeline, "agent_0")
        list(run_batch(store, pipeline, "agent_0", batch.run_key, run_id="first"))
        copy(store, store.seals("benchmark/first"), workflows)
        sensor, costs, told = build_compensation_sensor(pipeline), list[Cost](), set[str | None]()

        def look() -> None:
            with dg.build_sensor_context(instance=instance, resources={"state_store": resource}) as context:
                told.add(sensor.evaluate_tick(context).skip_message)

        look()
        costs = [timed(look) for _ in range(10)]
    wall, cpu = (statistics.median(getattr(cost, name) for cost in costs) * 1000 for name in ("wall", "cpu"))
    print(f"{workflows:,} workflows in flight, a tick of the compensation sensor: {wall:,.0f} ms, CPU {cpu:,.0f}")
    assert told == {f"{workflows + 1} attempts: its agents are at work, or are started when what they read is sealed"}


def copy(store: StateStore, like: Sequence[Seal], workflows: int) -> None:
    """The log as its own compaction would leave it, and a step with its pages for each."""
    rows, transactions, steps, pages = list[Seal](), list[Transaction](), list[dict[str, Any]](), list[dict[str, Any]]()
    journal = journal_of(store.database)
    with journal.reading() as connection:
        (step,) = connection.execute(sa.select(STEPS)).mappings()
        written = list(connection.execute(sa.select(PAGES)).mappings())
    for number in range(workflows):
        name, attempt, seals = f"benchmark/w{number:06}", uuid.uuid4().hex, list[Seal]()
        for one in like:
            own = {"workflow_id": name, "attempt": attempt, "parents": tuple(seal.as_parent for seal in seals)}
            row = one.model_dump(exclude={"version", "epoch", "previous_digest", "seal_digest"})
            seals.append(next_seal(seals, {**row, **own}))
        rows += seals
        transactions.append(Transaction(name, len(seals) - 1))
        steps.append({**step, "id": step["id"] + 1 + number, "workflow_id": name, "attempt": attempt})
        pages += [{**{key: page[key] for key in page if key != "id"}, "step": steps[-1]["id"]} for page in written]
    log = StateLog(store.objects)
    table = log.open()
    assert table is not None
    add = log._write(pl.DataFrame([seal.model_dump() for seal in rows], schema=SCHEMA), new=True, prefix=f"{table.version() + 1}-")
    table.create_write_transaction([add], "append", table.schema(), commit_properties=CommitProperties(app_transactions=transactions))
    with journal.writing("benchmark") as (connection, _):
        connection.execute(sa.insert(STEPS), steps)
        connection.execute(sa.insert(PAGES), pages)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=int, nargs="*")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--undo", action="store_true")
    parser.add_argument("--in-flight", action="store_true")
    options = parser.parse_args()
    if options.in_flight:
        for workflows in options.records or [10_000]:
            in_flight(workflows)
        return
    for records in options.records or ([100_000] if options.undo else [10_000, 100_000]):
        if options.undo:
            undo(records)
        else:
            measure(records, options.repetitions)


if __name__ == "__main__":
    main()
