"""Operators change policies by a resource: what cannot be is said at load, what was in force is in the seal and on the asset."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import dagster as dg
import pytest
from pydantic import BaseModel

import dagster_mao as mao
from dagster_mao.dagster import StateStoreResource, build_definitions
from dagster_mao.dagster.runs import is_fresh
from dagster_mao.overrides import changes_of
from tests.dagster import shop


class Item(BaseModel):
    item_id: Annotated[str, mao.Key]


class Answer(BaseModel):
    item_id: Annotated[str, mao.Key]
    asked: int


class Other:
    """The other side: fails so many times per item, then answers with how often it was asked."""

    def __init__(self, failures: int = 0) -> None:
        self.failures, self.asked = failures, dict[str, int]()

    def ask(self, item: str) -> int:
        self.asked[item] = self.asked.get(item, 0) + 1
        if self.asked[item] <= self.failures:
            raise ConnectionError(item)
        return self.asked[item]


@mao.agent
def entry() -> list[Item]:
    return [Item(item_id="a"), Item(item_id="b")]


@mao.agent(policy=mao.Policy(retries=2, retry_within=30.0, breaker=mao.Breaker(fail_max=20)))
def asking(entry: Item, *, other: Other) -> Answer:
    mao.usage(input_tokens=10, output_tokens=2, cost=0.5)
    return Answer(item_id=entry.item_id, asked=other.ask(entry.item_id))


@mao.agent
def below(asking: Answer) -> Answer:
    return asking


@mao.agent
def totals(entry: mao.LazyFrame[Item]) -> mao.LazyFrame[Item]:
    return entry


@mao.agent
async def eager(entry: Item) -> Item:
    return entry


PIPELINE = mao.Pipeline("shop", entry=entry, agents=[asking, below])


def definitions(folder: Path, other: Other, pipeline: mao.Pipeline = PIPELINE, **overrides: Any) -> dg.Definitions:
    policies = {"policies": mao.PolicyOverrides(overrides=overrides)} if overrides else {}
    store = StateStoreResource(root=str(folder / "state"))
    return build_definitions(
        pipeline, resources={"state_store": store, "other": dg.ResourceDefinition.hardcoded_resource(other), **policies}
    )


def run(instance: dg.DagsterInstance, defs: dg.Definitions, **options: Any) -> Any:
    return defs.resolve_job_def("shop_job").execute_in_process(instance=instance, raise_on_error=False, **options)


def shown(result: Any, agent: str = "asking") -> dict[str, Any]:
    (event,) = [e for e in result.get_asset_materialization_events() if e.asset_key.path[-1] == agent]
    return {name: value.value for name, value in event.materialization.metadata.items()}


# -- at load ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"askin": {"timeout": 1}}, "did you mean 'asking'"),
        ({"shop.askin": {"timeout": 1}}, "did you mean 'asking'"),
        ({"asking": {"timeuot": 1}}, "timeout"),
        ({"*": {"retries": -1}}, "retries"),
        ({"asking": {"rate_limit": "often"}}, "rate_limit"),
        ({"asking": {"breaker": {"fail_maxx": 1}}}, "fail_max"),
        ({"asking": {"transient": ["OSError"]}}, "transient"),
        ({"totals": {"breaker": {}, "when_open": "defer"}}, "not called record by record"),
        ({"eager": {"isolate": True, "timeout": 1}}, "it is async"),
    ],
)
def test_an_override_that_cannot_be_is_refused_when_the_code_location_loads(tmp_path: Path, overrides: Any, told: str) -> None:
    pipeline = mao.Pipeline("shop", entry=entry, agents=[asking, below, totals, eager])
    with pytest.raises(mao.WiringError, match=told):
        definitions(tmp_path, Other(), pipeline, **overrides)


def test_names_of_other_pipelines_are_theirs_and_ones_own_may_be_qualified() -> None:
    told = {"other.agent": {"nonsense": 1}, "*": {"retries": 1}, "shop.*": {"retry_within": 5.0}, "shop.asking": {"timeout": 3}}
    assert changes_of(PIPELINE, told) == {"*": {"retries": 1, "retry_within": 5.0}, "asking": {"timeout": 3}}


@pytest.mark.parametrize(
    ("told", "agents"),
    [
        ("true", {"entry", "asking", "below"}),
        ("asking", {"asking"}),
        (" below , shop.asking", {"asking", "below"}),
        ("other.agent", set()),
        ("false", set()),
        ("", set()),
    ],
)
def test_the_tag_of_a_fresh_run(told: str, agents: set[str]) -> None:
    assert {agent for agent in PIPELINE.agents if is_fresh({"mao/fresh": told}, PIPELINE, agent)} == agents
    assert not is_fresh({}, PIPELINE, "asking")


def test_a_fresh_tag_that_names_nobody_is_an_error() -> None:
    with pytest.raises(mao.WiringError, match="did you mean 'asking'"):
        is_fresh({"mao/fresh": "askng"}, PIPELINE, "below")


# -- in a run --------------------------------------------------------------------------------------------------------------------------


def test_the_numbers_of_the_calls_are_on_the_materialisation_zeros_too(tmp_path: Path) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        result = run(instance, definitions(tmp_path, Other(failures=1)))
    told = shown(result)
    assert {name: told[f"mao/{name}"] for name in ("calls", "tries", "error_rate", "input_tokens", "output_tokens", "cost")} == {
        "calls": 2,
        "tries": 4,
        "error_rate": 0.5,
        "input_tokens": 40,
        "output_tokens": 8,
        "cost": 2.0,
    }
    assert 0 < told["mao/call_p50_seconds"] <= told["mao/call_p95_seconds"] <= told["mao/call_p99_seconds"]
    zeros = ("fallbacks", "deferred", "calls_reused", "calls_refused")
    assert [told[f"mao/{name}"] for name in zeros] == [0] * 4
    assert "mao/policy" not in told
    plain = shown(result, "below")
    assert (plain["mao/calls"], plain["mao/error_rate"], plain["mao/cost"]) == (2, 0.0, 0.0)
    rows = StateStoreResource(root=str(tmp_path / "state")).store().calls("shop", "asking").collect()
    assert sorted(rows["outcome"]) == ["answered"] * 2 + ["failed"] * 2


def test_an_override_is_in_force_and_in_the_seal_and_on_the_asset(tmp_path: Path) -> None:
    other = Other(failures=1)
    with dg.DagsterInstance.ephemeral() as instance:
        result = run(instance, definitions(tmp_path, other, asking={"retries": 0}))
        assert not result.success
        assert set(other.asked.values()) == {1}
        failed = result.filter_events(lambda event: event.event_type_value == "ASSET_OBSERVATION")
        (observed,) = [event.event_specific_data.asset_observation for event in failed]
        assert (observed.asset_key.path[-1], observed.metadata["mao/error_rate"].value) == ("asking", 1.0)
        assert "No version was sealed" in observed.description
        result = run(instance, definitions(tmp_path, other, **{"*": {"retries": 1}, "asking": {"retries": 2, "timeout": 60}}))
    assert result.success
    store = StateStoreResource(root=str(tmp_path / "state")).store()
    seals = {seal.agent: seal for workflow in store.workflows() for seal in store.seals(workflow) if seal.run_id == result.run_id}
    assert seals["asking"].policy is not None
    assert (json.loads(seals["asking"].policy)["timeout"], shown(result)["mao/policy"]["timeout"]) == (60, 60)
    assert json.loads(str(seals["below"].policy))["retries"] == 1


def test_the_launchpad_takes_an_override_for_one_run_null_included(tmp_path: Path) -> None:
    """Dagster fails on a null in a mapping of anything; so the resource says that values may be null."""
    other = Other(failures=1)
    defs = definitions(tmp_path, other)
    given = {"resources": {"policies": {"config": {"overrides": {"asking": {"retries": 0, "breaker": None}}}}}}
    with dg.DagsterInstance.ephemeral() as instance:
        assert not run(instance, defs, run_config=given).success
        assert set(other.asked.values()) == {1}
        other.failures = 0
        result = run(instance, defs, run_config=given)
    assert result.success
    assert (shown(result)["mao/policy"]["retries"], shown(result)["mao/policy"]["breaker"]) == (0, None)
    (check,) = [c for c in result.get_asset_check_evaluations() if c.check_name == "breaker"]
    assert check.passed


def test_an_override_in_the_launchpad_that_cannot_be_fails_the_step_and_says_why(tmp_path: Path) -> None:
    given = {"resources": {"policies": {"config": {"overrides": {"asking": {"retries": "many"}}}}}}
    with dg.DagsterInstance.ephemeral() as instance:
        result = run(instance, definitions(tmp_path, Other()), run_config=given)
    told = result.failure_data_for_node("shop__entry").user_failure_data.description
    assert "'retries'" in told or "`retries`" in told
    assert "asking" in told


def test_a_breaker_by_an_override_alone_yields_no_check_that_was_not_declared(tmp_path: Path) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        result = run(instance, definitions(tmp_path, Other(), below={"breaker": {"fail_max": 2}}))
    assert result.success
    assert [c.asset_key.path[-1] for c in result.get_asset_check_evaluations() if c.check_name == "breaker"] == ["asking"]


def test_a_fresh_run_asks_again_those_that_it_names(tmp_path: Path) -> None:
    other = Other()
    defs = definitions(tmp_path, other)
    with dg.DagsterInstance.ephemeral() as instance:
        assert run(instance, defs, tags={"mao/workflow": "w"}).success
        result = run(instance, defs, tags={"mao/workflow": "w"})
        assert shown(result)["mao/calls_reused"] == 2
        assert set(other.asked.values()) == {1}
        assert run(instance, defs, tags={"mao/workflow": "w", "mao/fresh": "asking"}).success
    assert set(other.asked.values()) == {2}


def test_a_fresh_run_that_fails_and_is_executed_again_does_not_pay_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The UI copies the tags to the re-execution: read as "ask all of them again" they would pay for "a" a second time."""
    monkeypatch.setenv("SHOP_FOLDER", str(tmp_path))
    monkeypatch.setenv("SHOP_STATE", str(tmp_path / "state"))
    job = dg.reconstructable(shop.shop_job)
    (tmp_path / "home").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "home")) as instance:
        assert dg.execute_job(job, instance=instance, tags={"mao/workflow": "w"}).success
        assert shop.asked() == "ab"
        (tmp_path / "down").touch()
        tags = {"mao/workflow": "w", "mao/fresh": "true"}
        failed = dg.execute_job(job, instance=instance, tags=tags)
        assert (failed.success, shop.asked()) == (False, "abab")
        (tmp_path / "down").unlink()
        again = dg.ReexecutionOptions.from_failure(failed.run_id, instance)
        done = dg.execute_job(job, instance=instance, reexecution_options=again, tags=tags)
    assert (done.success, shop.asked()) == (True, "ababb")


def test_without_dagster_policies_and_fresh_are_taken_as_well(tmp_path: Path) -> None:
    store, other = mao.StateStore(tmp_path / "state"), Other(failures=1)
    with pytest.raises(mao.AgentFailedError):
        mao.run(PIPELINE, store=store, workflow="w", resources={"other": other}, policies={"*": {"retries": 0}})
    given: dict[str, Any] = {"store": store, "workflow": "w", "resources": {"other": other}}
    assert mao.run(PIPELINE, **given)["asking"]["asked"].to_list() == [2, 2]
    assert mao.run(PIPELINE, **given)["asking"]["asked"].to_list() == [2, 2]
    assert mao.run(PIPELINE, **given, fresh=["below"])["asking"]["asked"].to_list() == [2, 2]
    assert mao.run(PIPELINE, **given, fresh=True)["asking"]["asked"].to_list() == [3, 3]
    with pytest.raises(mao.WiringError, match="did you mean 'asking'"):
        mao.run(PIPELINE, **given, fresh=["askng"])
    with pytest.raises(mao.WiringError, match="did you mean 'asking'"):
        mao.run(PIPELINE, **given, policies={"askng": {}})
