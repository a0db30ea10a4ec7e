"""What Dagster shows where an open breaker deferred records, or the fallback answered: nothing is lost, nothing looks whole that is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import dagster as dg
import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

import dagster_mao as mao
from dagster_mao.cli import app
from dagster_mao.dagster import StateStoreResource, build_definitions
from dagster_mao.gateway import shared_store
from dagster_mao.gateway._breaker import close_breaker

DAYS = dg.StaticPartitionsDefinition(["monday", "tuesday"])
OPENS = mao.Breaker(fail_max=1, reset_timeout=600)


class Item(BaseModel):
    item_id: Annotated[str, mao.Key]


class PersonalItem(BaseModel):
    item_id: Annotated[str, mao.Key, mao.Personal]


class Answer(BaseModel):
    item_id: Annotated[str, mao.Key]
    from_fallback: Annotated[bool, mao.FromFallback] = False


class Desk:
    """The other side: down from the third item on while `down`."""

    down = True

    def ask(self, item: str) -> None:
        if self.down and item >= "i2":
            raise ConnectionError(item)


@mao.agent
def entry() -> list[Item]:
    return [Item(item_id=f"i{n}") for n in range(5)]


def by_hand(entry: Item) -> Answer:
    return Answer(item_id=entry.item_id)


def pipeline(**declared: Any) -> mao.Pipeline:
    @mao.agent(**declared)
    def asking(entry: Item, *, desk: Any) -> Answer:
        desk.ask(entry.item_id)
        return Answer(item_id=entry.item_id)

    @mao.agent
    def below(asking: Answer) -> Answer:
        return asking

    return mao.Pipeline("shop", entry=entry, agents=[asking, below], partitions_def=DAYS)


DEFERRING: dict[str, Any] = {"policy": mao.Policy(breaker=OPENS, when_open="defer"), "quarantine": mao.Quarantine(max_share=0.5)}


@pytest.fixture
def instance() -> Any:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def run(instance: dg.DagsterInstance, folder: Path, of: mao.Pipeline, desk: Desk, day: str = "monday") -> Any:
    given = {"state_store": StateStoreResource(root=str(folder / "state")), "desk": dg.ResourceDefinition.hardcoded_resource(desk)}
    job = build_definitions(of, resources=given).resolve_job_def("shop_job")
    return job.execute_in_process(instance=instance, partition_key=day, raise_on_error=False)


def shown(result: Any, agent: str) -> dict[str, Any]:
    (event,) = [e for e in result.get_asset_materialization_events() if e.asset_key.path[-1] == agent]
    return dict(event.materialization.metadata)


def check(result: Any, agent: str, name: str) -> Any:
    (found,) = [e for e in result.get_asset_check_evaluations() if (e.asset_key.path[-1], e.check_name) == (agent, name)]
    return found


def close(folder: Path) -> None:
    close_breaker(shared_store(str(folder / "state" / "shared.db")), "shop.asking", why="it is back", by="ann")


def test_deferred_records_are_shown_accounted_for_and_completed_by_the_next_run(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    desk, shop = Desk(), pipeline(**DEFERRING)
    result = run(instance, tmp_path, shop, desk)
    assert result.success
    told = shown(result, "asking")
    # i2 is set aside: its call was made and failed, which opened the breaker for i3 and i4.
    assert (told["dagster/row_count"].value, told["mao/quarantined"].value, told["mao/deferred"].value) == (2, 1, 2)
    assert [row.data["record"] for row in told["mao/deferred_records"].records] == ["i3", "i4"]
    assert {row.data["agent"] for row in told["mao/deferred_records"].records} == {"asking"}
    assert told["mao/calls_refused"].value == 2
    breaker = check(result, "asking", "breaker")
    assert (breaker.passed, breaker.severity, breaker.partition) == (False, dg.AssetCheckSeverity.WARN, None)
    accounted = check(result, "asking_quarantine", "accounted")
    assert accounted.passed
    assert "5 came in = 2 sealed + 1 quarantined + 0 discarded + 2 deferred" in accounted.description
    carried = shown(result, "below")
    assert (carried["dagster/row_count"].value, carried["mao/deferred"].value) == (2, 2)
    below = check(result, "below", "accounted")
    assert (below.passed, "4 came in = 2 sealed + 0 quarantined + 0 discarded + 2 deferred" in below.description) == (True, True)

    desk.down = False
    close(tmp_path)
    result = run(instance, tmp_path, shop, desk)
    told = shown(result, "asking")
    assert (told["dagster/row_count"].value, told["mao/deferred"].value, told["mao/calls_reused"].value) == (5, 0, 2)
    assert "mao/deferred_records" not in told
    assert check(result, "asking", "breaker").passed
    assert check(result, "below", "accounted").passed


def test_a_version_whose_records_wait_is_told_on_the_command_line(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    run(instance, tmp_path, pipeline(**DEFERRING), Desk())
    root = str(tmp_path / "state")

    def call(*arguments: str) -> Any:
        return json.loads(CliRunner().invoke(app, [*arguments, "--json", "--root", root]).stdout)

    version = next(seal for seal in call("history", "shop/monday") if seal["agent"] == "asking")
    assert (version["deferred"], version["usage"]["refused"]) == (2, 2)
    told = call("show", f"shop/monday@{version['version']}")
    assert [row["record"] for row in told["deferred_records"]] == ["i3", "i4"]
    rows = call("calls", "shop/monday", "--agent", "asking")["calls"]
    assert sorted((row["record"], row["outcome"]) for row in rows) == [
        *(("i0", "answered"), ("i1", "answered"), ("i2", "failed"), ("i3", "refused"), ("i4", "refused"))
    ]


def test_answers_of_the_fallback_are_shown(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    result = run(instance, tmp_path, pipeline(policy=mao.Policy(breaker=OPENS, fallback=by_hand)), Desk())
    assert result.success
    told = shown(result, "asking")
    assert (told["dagster/row_count"].value, told["mao/fallbacks"].value, told["mao/deferred"].value) == (5, 3, 0)
    breaker = check(result, "asking", "breaker")
    assert (breaker.passed, breaker.severity) == (False, dg.AssetCheckSeverity.WARN)


def test_where_all_wait_the_step_fails_and_says_what_its_calls_came_to(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    shop, desk = pipeline(policy=mao.Policy(breaker=OPENS)), Desk()
    assert not run(instance, tmp_path, shop, desk).success
    result = run(instance, tmp_path, shop, desk, "tuesday")
    told = result.failure_data_for_node("shop__asking").user_failure_data.metadata
    assert (told["mao/calls"].value, told["mao/calls_refused"].value >= 1) == (0, True)
    assert check(result, "asking", "breaker").severity == dg.AssetCheckSeverity.ERROR


def test_a_personal_key_of_a_deferred_record_is_masked(instance: dg.DagsterInstance, tmp_path: Path) -> None:
    @mao.agent(name="entry")
    def personal() -> list[PersonalItem]:
        return [PersonalItem(item_id=f"i{n}") for n in range(5)]

    @mao.agent(policy=DEFERRING["policy"], quarantine=DEFERRING["quarantine"])
    def asking(entry: PersonalItem, *, desk: Any) -> PersonalItem:
        desk.ask(entry.item_id)
        return entry

    shop = mao.Pipeline("shop", entry=personal, agents=[asking], partitions_def=DAYS)
    result = run(instance, tmp_path, shop, Desk())
    told = shown(result, "asking")
    assert [row.data["record"] for row in told["mao/deferred_records"].records] == ["***", "***"]
    store = StateStoreResource(root=str(tmp_path / "state")).store()
    assert store.calls("shop", "asking").collect()["record"].to_list() == [None] * 5
