"""What the gateway costs a call: an agent that does nothing, called directly and through policies, async and sync.

    python benchmarks/calls.py [--calls 20000]

Microseconds per call, one after the other, and how many times the direct call of the same run that is.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable
from typing import Any

from dagster_mao.gateway import Breaker, Gateway, Policy

POLICIES = {
    "retries": Policy(retries=3),
    "retries, breaker": Policy(retries=3, breaker=Breaker()),
    "retries, breaker, timeout": Policy(retries=3, breaker=Breaker(), timeout=30),
    "retries, breaker, timeout, limit": Policy(retries=3, breaker=Breaker(), timeout=30, rate_limit="6000000/minute"),
}


def nothing(value: int) -> int:
    return value


async def nothing_async(value: int) -> int:
    return value


def per_call(function: Callable[..., Any], calls: int) -> float:
    begun = time.perf_counter()
    for number in range(calls):
        function(number)
    return (time.perf_counter() - begun) / calls * 1e6


async def per_async_call(function: Callable[..., Awaitable[Any]], calls: int) -> float:
    begun = time.perf_counter()
    for number in range(calls):
        await function(number)
    return (time.perf_counter() - begun) / calls * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=20_000)
    calls = parser.parse_args().calls
    sync, asynchronous = per_call(nothing, calls), asyncio.run(per_async_call(nothing_async, calls))
    print(f"{'':34}{'async us':>10}{'times':>8}{'sync us':>10}{'times':>8}")
    print(f"{'directly':34}{asynchronous:10.2f}{1:8.0f}{sync:10.2f}{1:8.0f}")
    for name, policy in POLICIES.items():
        with tempfile.TemporaryDirectory() as folder:
            gateway = Gateway(policy, "benchmark", f"{folder}/shared.db")
            a = asyncio.run(per_async_call(lambda number, g=gateway: g.acall(nothing_async, number), calls))  # type: ignore[misc]
            s = per_call(lambda number, g=gateway: g.call(nothing, number), calls)  # type: ignore[misc]
        print(f"{name:34}{a:10.1f}{a / asynchronous:8.0f}{s:10.1f}{s / sync:8.0f}")


if __name__ == "__main__":
    main()
