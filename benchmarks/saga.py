"""What effects cost: the journal of a step that has one per record, against the same step without; and the undoing of ten agents.

    python benchmarks/saga.py [records ...]       # 10000 100000
    python benchmarks/saga.py --undo [records]    # ten agents with 100 000 effects each are undone

CPU microseconds per record of a whole step: it reads its pins, makes the models, calls, has an effect that does nothing, checks the outputs
and seals; by the clock too. The floor of the same run is the same step without the effect. "commits" counts those of the journal. Medians
over interleaved repetitions, on SQLite.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import uuid
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import polars as pl
from calls import Application, Cost, Score, applications, rows, timed

import dagster_mao as mao
from dagster_mao.boundary import run_agent
from dagster_mao.journal import Journal
from dagster_mao.saga import Saga
from dagster_mao.state import StateStore

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=int, nargs="*")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--undo", action="store_true")
    options = parser.parse_args()
    for records in options.records or ([100_000] if options.undo else [10_000, 100_000]):
        if options.undo:
            undo(records)
        else:
            measure(records, options.repetitions)


if __name__ == "__main__":
    main()
