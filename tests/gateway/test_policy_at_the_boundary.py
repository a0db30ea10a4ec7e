"""What an agent's policy does to a run: the platform's timeouts, retries, limits and breakers, whatever the agent's author wrote."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import dagster as dg
import pytest
from pydantic import BaseModel

import dagster_mao as mao
from dagster_mao.dagster import StateStoreResource
from dagster_mao.gateway import parse_rate, shared_store
from dagster_mao.state import StateStore


class Item(BaseModel):
    item_id: Annotated[str, mao.Key]


class Answer(BaseModel):
    item_id: Annotated[str, mao.Key]
    tries: int


class Flaky:
    """Another side that fails as it is told to: `failures` by item, then answers."""

    def __init__(self, **failures: int) -> None:
        self.failures, self.asked = failures, dict[str, int]()

    def ask(self, item: str, error: type[Exception] = ConnectionError) -> int:
        self.asked[item] = self.asked.get(item, 0) + 1
        if self.failures.get(item, 0) >= self.asked[item]:
            raise error(item)
        return self.asked[item]


def items(count: int) -> list[Item]:
    return [Item(item_id=f"i{n}") for n in range(count)]


@mao.agent
def entry() -> list[Item]:
    return []


def run(store: StateStore, agent: Any, count: int = 3, **resources: Any) -> mao.Result:
    return mao.run(mao.Pipeline("shop", entry=entry, agents=[agent]), items(count), store=store, resources=resources)


def asking(is_async: bool, **declared: Any) -> Any:
    """An agent that asks the other side, sync or async."""

    def sync(entry: Item, *, other: Flaky) -> Answer:
        return Answer(item_id=entry.item_id, tries=other.ask(entry.item_id))

    async def asynchronous(entry: Item, *, other: Flaky) -> Answer:
        await asyncio.sleep(0)
        return Answer(item_id=entry.item_id, tries=other.ask(entry.item_id))

    return mao.agent(name="asking", **declared)(asynchronous if is_async else sync)


QUICK = {"retry_within": 20.0}
both = pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])


@both
def test_without_a_policy_the_first_error_fails_the_batch(local_store: StateStore, is_async: bool) -> None:
    with pytest.raises(mao.AgentFailedError, match="ConnectionError on record 'i1'"):
        run(local_store, asking(is_async), other=Flaky(i1=1))


@both
def test_transient_errors_are_tried_again_and_others_are_not(local_store: StateStore, is_async: bool) -> None:
    agent = asking(is_async, policy=mao.Policy(retries=2, **QUICK))
    result = run(local_store, agent, other=Flaky(i1=2))
    assert result["asking"]["tries"].to_list() == [1, 3, 1]
    other = Flaky(i1=3)
    with pytest.raises(mao.AgentFailedError, match="ConnectionError on record 'i1'"):
        run(local_store, agent, other=other)
    assert other.asked["i1"] == 3
    picky = asking(is_async, policy=mao.Policy(retries=2, transient=(mao.TransientError,), **QUICK))
    other = Flaky(i1=1)
    with pytest.raises(mao.AgentFailedError):
        run(local_store, picky, other=other)
    assert other.asked["i1"] == 1


def test_a_call_that_hangs_ends_in_time_and_the_others_are_not_lost(local_store: StateStore) -> None:
    cancelled = []

    @mao.agent(policy=mao.Policy(timeout=0.2))
    async def hanging(entry: Item) -> Answer:
        try:
            if entry.item_id == "i1":
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(entry.item_id)
            raise
        return Answer(item_id=entry.item_id, tries=1)

    with pytest.raises(mao.AgentFailedError, match="CallTimeoutError on record 'i1'") as caught:
        run(local_store, hanging)
    assert isinstance(caught.value.__cause__, mao.CallTimeoutError)
    assert cancelled == ["i1"]


def test_a_thread_that_goes_on_after_its_timeout_is_told(local_store: StateStore, caplog: pytest.LogCaptureFixture) -> None:
    released = threading.Event()

    @mao.agent(policy=mao.Policy(timeout=0.2))
    def stuck(entry: Item) -> Answer:
        released.wait(60)
        return Answer(item_id=entry.item_id, tries=1)

    with pytest.raises(mao.AgentFailedError, match="CallTimeoutError on record 'i0'"):
        run(local_store, stuck)
    assert "go on after their timeout" in caplog.text
    released.set()


@both
def test_the_breaker_opens_in_the_middle_of_a_batch_and_nothing_more_is_asked(local_store: StateStore, is_async: bool) -> None:
    policy = mao.Policy(breaker=mao.Breaker(fail_max=2, reset_timeout=600), retries=5, retry_within=60)
    other = Flaky(i0=99)
    with pytest.raises(mao.BreakerOpenError) as caught:
        run(local_store, asking(is_async, policy=policy, concurrency=1), other=other)
    assert other.asked == {"i0": 2}
    assert (caught.value.agent, "shop.asking" in str(caught.value), "ConnectionError" in str(caught.value)) == ("asking", True, True)
    healthy = Flaky()
    with pytest.raises(mao.BreakerOpenError):  # another run: the state outlives the step
        run(local_store, asking(is_async, policy=policy), other=healthy)
    assert not healthy.asked
    assert [seal.agent for workflow in local_store.workflows() for seal in local_store.seals(workflow)] == ["entry", "entry"]


def test_another_process_meets_the_open_breaker(local_store: StateStore) -> None:
    policy = mao.Policy(breaker=mao.Breaker(fail_max=1, reset_timeout=600, name="bureau"))
    with pytest.raises(mao.AgentFailedError):
        run(local_store, asking(False, policy=policy), other=Flaky(i0=1))
    code = (
        "import sys; from dagster_mao.gateway import Breaker, shared_store; from dagster_mao.gateway._breaker import SharedBreaker\n"
        "SharedBreaker(shared_store(sys.argv[1]), 'bureau', Breaker(fail_max=1, reset_timeout=600)).admit()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(local_store.database)], capture_output=True, text=True, check=False, cwd=Path.cwd()
    )
    assert "BreakerOpenError" in done.stderr


def test_after_its_time_a_probe_closes_the_breaker(local_store: StateStore) -> None:
    policy = mao.Policy(breaker=mao.Breaker(fail_max=1, reset_timeout=0.3))
    agent, other = asking(False, policy=policy), Flaky(i0=1)
    with pytest.raises(mao.AgentFailedError):
        run(local_store, agent, other=other)
    deadline = time.monotonic() + 30
    while True:
        try:
            assert run(local_store, agent, other=other)["asking"].height == 3
            break
        except mao.BreakerOpenError:
            assert time.monotonic() < deadline


def test_a_rate_limit_holds_over_the_calls_of_a_run(local_store: StateStore) -> None:
    """Four calls at two per second cannot be over sooner than a second after the first."""
    at: list[float] = []

    @mao.agent(policy=mao.Policy(rate_limit="2/second"))
    def limited(entry: Item) -> Answer:
        at.append(time.monotonic())
        return Answer(item_id=entry.item_id, tries=1)

    run(local_store, limited, count=4)
    assert at[2] - at[0] >= 0.9
    assert at[3] - at[1] >= 0.9


def test_an_open_breaker_ends_the_step_in_dagster_without_a_second_try(tmp_path: Path) -> None:
    policy = mao.Policy(breaker=mao.Breaker(fail_max=1, reset_timeout=600))
    root = str(tmp_path / "state")
    with pytest.raises(mao.AgentFailedError):
        run(StateStore(root), asking(False, policy=policy), other=Flaky(i0=1))
    other = Flaky()
    agent = asking(False, policy=policy)

    @mao.agent(name="entry")
    def three() -> list[Item]:
        return items(3)

    pipeline = mao.Pipeline("shop", entry=three, agents=[agent])
    defs = pipeline.build_definitions(
        resources={"state_store": StateStoreResource(root=root), "other": dg.ResourceDefinition.hardcoded_resource(other)}
    )
    with dg.DagsterInstance.ephemeral() as instance:
        result = defs.resolve_job_def("shop_job").execute_in_process(instance=instance, raise_on_error=False)
    assert not other.asked
    failure = result.failure_data_for_node("shop__asking")
    assert failure is not None
    assert "ConnectionError" in str(failure.user_failure_data.description)
    assert not [e for e in result.all_events if e.event_type_value == "STEP_UP_FOR_RETRY"]
    (check,) = [e for e in result.get_asset_check_evaluations() if e.check_name == "breaker"]
    assert (check.passed, check.metadata["breaker"].value, check.metadata["why"].value) == (False, "shop.asking", "ConnectionError")


def test_a_breaker_that_let_all_calls_through_is_a_passed_check(local_store: StateStore) -> None:
    result = run(local_store, asking(False, policy=mao.Policy(breaker=mao.Breaker())), other=Flaky())
    assert [(check.name, check.passed) for check in result.checks["asking"]] == [
        ("pinned_base", True),
        ("input_entry", True),
        ("breaker", True),
        ("output", True),
    ]


def test_an_isolated_agent_runs_in_one_child_process_under_dagster_too(tmp_path: Path) -> None:
    from tests.gateway.isolated import pipeline

    root = str(tmp_path / "state")
    defs = pipeline.build_definitions(resources={"state_store": StateStoreResource(root=root)})
    with dg.DagsterInstance.ephemeral() as instance:
        assert defs.resolve_job_def("isolation_job").execute_in_process(instance=instance).success
    store = StateStore(root)
    (workflow,) = store.workflows()
    processes = set(store.read(store.effective(workflow)["isolated"]).collect()["process"])
    assert len(processes) == 1
    assert os.getpid() not in processes


def test_what_is_shared_needs_a_database() -> None:
    store = StateStore("s3://bucket/prefix", {})
    assert store.database is None
    assert StateStore("s3://bucket/prefix", database="postgresql://db/mao").database == "postgresql://db/mao"


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"retries": -1}, "retries"),
        ({"rate_limit": "60 a minute"}, "rate_limit"),
        ({"rate_limit": "0/minute"}, "rate_limit"),
        ({"isolate": True}, "isolate"),
    ],
)
def test_a_policy_that_cannot_be_is_refused(wrong: dict[str, Any], field: str) -> None:
    with pytest.raises(mao.WiringError) as caught:
        mao.Policy(**wrong)
    assert caught.value.field == field


def test_a_breaker_that_cannot_be_is_refused() -> None:
    for wrong in ({"fail_max": 0}, {"fail_max": 2.5}, {"reset_timeout": -1}):
        with pytest.raises(mao.WiringError):
            mao.Breaker(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (mao.Policy(breaker=mao.Breaker(name="bureau")), mao.Policy(breaker=mao.Breaker(fail_max=2, name="bureau"))),
        (mao.Policy(rate_limit="60/minute", rate_key="bureau"), mao.Policy(rate_limit="1/second", rate_key="bureau")),
        (mao.Policy(token_limit="60/minute", rate_key="bureau"), mao.Policy(token_limit="1/second", rate_key="bureau")),
    ],
)
def test_agents_that_share_must_declare_alike(one: mao.Policy, other: mao.Policy) -> None:
    @mao.agent(policy=one)
    def first(entry: Item) -> Answer:
        return Answer(item_id=entry.item_id, tries=1)

    @mao.agent(policy=other)
    def second(entry: Item) -> Answer:
        return Answer(item_id=entry.item_id, tries=1)

    with pytest.raises(mao.WiringError, match="'bureau' and declare it differently"):
        mao.Pipeline("shop", entry=entry, agents=[first, second])


def test_rates() -> None:
    assert [parse_rate(text) for text in ("60/minute", "5 / second", "1/day")] == [(60, 60.0), (5, 1.0), (1, 86400.0)]


def test_one_store_per_process(tmp_path: Path) -> None:
    assert shared_store(str(tmp_path / "a.db")) is shared_store(str(tmp_path / "a.db"))
