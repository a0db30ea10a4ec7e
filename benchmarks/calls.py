"""What a call costs: a record-wise agent that does nothing, through its boundary, against calling the function and against pydantic alone.

    python benchmarks/calls.py [records ...]      # 10000 100000
    python benchmarks/calls.py --memory           # peak memory of 100 000 and 1 000 000 records

Microseconds per record of a whole step: it reads its pins, makes the models, calls, checks the outputs, seals the snapshot and logs the
calls. "a policy" has a circuit breaker, retries, a rate limit that never waits, and keeps each answer, all in SQLite. Medians over
interleaved repetitions. The floor of the same run: the function called directly on models that are there, and pydantic making the models
that go in and come out; ratios are of CPU time. Each step runs in a workflow of its own, so that no answer is known.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import multiprocessing
import resource
import statistics
import tempfile
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import polars as pl
from pydantic import BaseModel, Field

import dagster_mao as mao
from dagster_mao.boundary import Outcome, run_agent
from dagster_mao.gateway import Breaker, Gateway, Policy, shared_store
from dagster_mao.state import Attempt, StateStore

POLICY = Policy(retries=3, breaker=Breaker(), rate_limit="600000000/minute")
PARTS = {
    "retries": Policy(retries=3, keep_answers=0),
    "retries, breaker": Policy(retries=3, breaker=Breaker(), keep_answers=0),
    "retries, breaker, limit": Policy(retries=3, breaker=Breaker(), rate_limit="600000000/minute", keep_answers=0),
    "retries, breaker, limit, timeout": Policy(retries=3, breaker=Breaker(), rate_limit="600000000/minute", timeout=30, keep_answers=0),
}


class Application(BaseModel):
    application_id: Annotated[str, mao.Key]
    amount: float = Field(gt=0)
    months: int = Field(ge=1, le=120)
    purpose: str


class Score(BaseModel):
    application_id: Annotated[str, mao.Key]
    score: int = Field(ge=300, le=850)
    band: str


def score(applications: Application) -> Score:
    return Score(application_id=applications.application_id, score=500, band="poor")


async def score_async(applications: Application) -> Score:
    return Score(application_id=applications.application_id, score=500, band="poor")


@mao.agent
def applications() -> mao.LazyFrame[Application]:
    raise NotImplementedError


def rows(records: int) -> pl.DataFrame:
    return pl.select(
        application_id=pl.format("app-{}", pl.int_range(records)),
        amount=pl.lit(1000.0),
        months=pl.lit(12, pl.Int64),
        purpose=pl.lit("a car, used"),
    )


KINDS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "async, 16 in flight": (score_async, {}),
    "sync, in place": (score, {}),
    "sync, 16 threads": (score, {"concurrency": 16}),
}
WAYS = {"no policy": None, "a policy": POLICY}


# -- the boundary --------------------------------------------------------------------------------------------------------------------


class Cost(NamedTuple):
    """Seconds, by the clock and of CPU: other processes take less of the latter away."""

    wall: float
    cpu: float


def step(root: str, kind: str, policy: Policy | None, records: int) -> Cost:
    """What the agent's step takes; its entry is sealed before."""
    function, declared = KINDS[kind]
    agent = mao.agent(name="score", policy=policy, **declared)(function)
    pipeline = mao.Pipeline("benchmark", entry=applications, agents=[agent])
    store, run_id = StateStore(root), uuid.uuid4().hex
    for name, member in pipeline.agents.items():
        attempt = store.open_attempt(
            pipeline=pipeline.name, attempt=run_id, run_id=run_id, plan=pipeline.order, entry=pipeline.entry_name, workflow_key=run_id
        )
        given = rows(records) if name == pipeline.entry_name else None
        sealed: list[Outcome] = []
        cost = timed(partial(_run, sealed, store, member, attempt, given))
    assert sealed[0].seal.row_count == records
    return cost


def _run(outcomes: list[Outcome], store: StateStore, agent: mao.Agent, attempt: Attempt, given: Any) -> None:
    outcomes.append(run_agent(store, agent, attempt, records=given))


def directly(records: int) -> dict[str, Cost]:
    """The function alone, and for pydantic making what goes in and comes out."""
    given = rows(records).to_dicts()
    made = [Application.model_validate(one) for one in given]

    async def all_async() -> None:
        for one in made:
            await score_async(one)

    def validated() -> None:
        for one in given:
            Application.model_validate(one)
            Score.model_validate({"application_id": one["application_id"], "score": 500, "band": "poor"})

    return {
        "the function, async": timed(lambda: asyncio.run(all_async())),
        "the function": timed(lambda: [score(one) for one in made]),
        "pydantic, in and out": timed(validated),
    }


def timed(does: Callable[[], object]) -> Cost:
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    does()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def measure(records: int, repetitions: int) -> None:
    costs: dict[str, list[Cost]] = {}
    for _ in range(repetitions):
        for name, cost in directly(records).items():
            costs.setdefault(name, []).append(cost)
        for kind in KINDS:
            for way, policy in WAYS.items():
                with tempfile.TemporaryDirectory() as folder:
                    costs.setdefault(f"{kind}; {way}", []).append(step(folder, kind, policy, records))
    wall = {name: statistics.median(cost.wall for cost in each) / records * 1e6 for name, each in costs.items()}
    cpu = {name: statistics.median(cost.cpu for cost in each) / records * 1e6 for name, each in costs.items()}
    print(f"{f'{records:,} records, microseconds each':40}{'clock':>10}{'CPU':>10}{'of pydantic':>14}{'the policy':>14}")
    for name, cost_of_one in cpu.items():
        without = cpu.get(f"{name.partition(';')[0]}; no policy") if name.endswith("a policy") else None
        times, added = cost_of_one / cpu["pydantic, in and out"], "" if without is None else f"{cost_of_one - without:14.1f}"
        print(f"  {name:38}{wall[name]:10.1f}{cost_of_one:10.1f}{times:14.1f}{added}")


# -- memory --------------------------------------------------------------------------------------------------------------------------


def peak(kind: str, records: int, way: str) -> tuple[float, float, float]:
    """Megabytes before and at the peak, and seconds, of one step in this process."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    with tempfile.TemporaryDirectory() as folder:
        taken = step(folder, kind, WAYS[way], records).wall
    return before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, taken


def memory(sizes: list[int]) -> None:
    print(f"{'peak memory of a step, its entry included':44}{'before':>10}{'peak':>10}{'seconds':>10}")
    for kind in ("async, 16 in flight", "sync, in place"):
        for records in sizes:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                before, most, taken = process.submit(peak, kind, records, "a policy").result()
            print(f"  {kind:24}{records:12,} records {before:10,.0f} MB{most:7,.0f} MB{taken:8,.0f} s", flush=True)


# -- the gateway alone ---------------------------------------------------------------------------------------------------------------


def per_call(function: Callable[..., Any], calls: int) -> float:
    return timed(lambda: [function(number) for number in range(calls)]).cpu / calls * 1e6


def per_async_call(function: Callable[..., Awaitable[Any]], calls: int) -> float:
    async def all_calls() -> None:
        for number in range(calls):
            await function(number)

    return timed(lambda: asyncio.run(all_calls())).cpu / calls * 1e6


def nothing(value: int) -> int:
    return value


async def nothing_async(value: int) -> int:
    return value


def gateway(calls: int) -> None:
    print(f"{'the gateway alone':44}{'async us':>10}{'sync us':>10}")
    for name, policy in PARTS.items():
        with tempfile.TemporaryDirectory() as folder:
            passed = Gateway(policy, "benchmark", f"{folder}/shared.db")
            a = per_async_call(lambda number, g=passed: g.acall(nothing_async, number), calls)  # type: ignore[misc]
            s = per_call(lambda number, g=passed: g.call(nothing, number), calls)  # type: ignore[misc]
        print(f"  {name:42}{a:10.1f}{s:10.1f}")


def refusals(calls: int) -> None:
    from dagster_mao.gateway._breaker import open_breaker

    with tempfile.TemporaryDirectory() as folder:
        database = str(Path(folder) / "shared.db")
        passed = Gateway(Policy(breaker=Breaker(), keep_answers=0), "benchmark", database)
        passed.call(nothing, 0)
        open_breaker(shared_store(database), "benchmark", why="measured", by="benchmark")
        passed = Gateway(Policy(breaker=Breaker(), keep_answers=0), "benchmark", database)  # it has not looked yet
        each = sorted(refused(passed, calls))
    median, late, first = each[len(each) // 2], each[len(each) * 99 // 100], each[-1]
    print(f"an open breaker refuses in {median:.0f} us, 99 of 100 in {late:.0f} us; {first:.0f} us at most, when it first looks")


def refused(passed: Gateway, calls: int) -> Iterator[float]:
    for number in range(calls):
        begun = time.perf_counter()
        with suppress(mao.BreakerOpenError):
            passed.call(nothing, number)
            raise AssertionError("it was let through")
        yield (time.perf_counter() - begun) * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=int, nargs="*")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--memory", action="store_true")
    options = parser.parse_args()
    if options.memory:
        memory(options.records or [100_000, 1_000_000])
        return
    for records in options.records or [10_000, 100_000]:
        measure(records, options.repetitions)
    gateway(20_000)
    refusals(20_000)


if __name__ == "__main__":
    main()
