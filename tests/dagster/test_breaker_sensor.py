"""Breakers in the UI between runs: each opening and closing is told once, on the assets concerned; alerts are made until that worked."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import dagster as dg
import pytest
from pydantic import BaseModel

import dagster_mao as mao
from dagster_mao.dagster import BreakerAlert, StateStoreResource, build_breaker_sensor, build_definitions
from dagster_mao.gateway import Breaker, shared_store
from dagster_mao.gateway._breaker import SharedBreaker, close_breaker, open_breaker, reset_breaker

BUREAU = Breaker(fail_max=1, reset_timeout=600, name="bureau")
OWN = Breaker(fail_max=1, reset_timeout=600)


class Item(BaseModel):
    item_id: Annotated[str, mao.Key]


@mao.agent
def entry() -> list[Item]:
    return [Item(item_id="a")]


@mao.agent(policy=mao.Policy(breaker=BUREAU))
def first(entry: Item) -> Item:
    return entry


@mao.agent(policy=mao.Policy(breaker=BUREAU))
def second(entry: Item) -> Item:
    return entry


@mao.agent(policy=mao.Policy(breaker=OWN))
def third(entry: Item) -> Item:
    return entry


@mao.agent
def unguarded(entry: Item) -> Item:
    return entry


PIPELINE = mao.Pipeline("shop", entry=entry, agents=[first, second, third, unguarded], partitions_def=dg.StaticPartitionsDefinition(["a"]))


class Desk:
    """The sensor, tick by tick, and what it left in the event log."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance) -> None:
        self.store = StateStoreResource(root=str(folder / "state"))
        self.shared = shared_store(str(self.store.store().database))
        self.instance, self.cursor, self.reason = instance, None, ""
        self.alerts: list[BreakerAlert] = []
        self.failing = False

    def alert(self, alert: BreakerAlert) -> None:
        if self.failing:
            raise ConnectionError("https://hooks.example/secret")
        self.alerts.append(alert)

    def tick(self, **overrides: Any) -> list[tuple[str, bool]]:
        """What the daemon does; which assets were told to be good or not."""
        sensor = build_breaker_sensor(PIPELINE, self.alert)
        given = {"state_store": self.store, "policies": mao.PolicyOverrides(overrides=overrides)}
        context = dg.build_sensor_context(instance=self.instance, cursor=self.cursor, resources=given)
        ticked = sensor.evaluate_tick(context)
        self.cursor, self.reason = ticked.cursor, ticked.skip_message or ""
        for event in ticked.asset_events:
            self.instance.report_runless_asset_event(event)
        return [(event.asset_key.path[-1], event.passed) for event in ticked.asset_events]

    def breaker(self, name: str, declared: Breaker = BUREAU) -> SharedBreaker:
        return SharedBreaker(self.shared, name, declared)

    def fail(self, name: str, declared: Breaker = BUREAU) -> None:
        self.breaker(name, declared).admit().failed(ConnectionError("secret"))

    def latest(self, agent: str) -> Any:
        key = dg.AssetCheckKey(dg.AssetKey(["shop", agent]), "breaker")
        (found,) = self.instance.event_log_storage.get_latest_asset_check_execution_by_key([key]).values()
        return found.event.dagster_event.event_specific_data


@pytest.fixture
def desk(tmp_path: Path) -> Any:
    with dg.DagsterInstance.ephemeral() as instance:
        yield Desk(tmp_path, instance)


def test_an_opening_and_a_closing_are_told_once_on_all_assets_that_share_the_breaker(desk: Desk) -> None:
    assert desk.tick() == []
    desk.fail("bureau")
    assert desk.tick() == [("first", False), ("second", False)]
    found = desk.latest("second")
    assert found.description.startswith("Open since 20")
    assert "(ConnectionError): no call is made until" in found.description
    assert (found.metadata["breaker"].value, found.metadata["why"].value, found.partition) == ("bureau", "ConnectionError", None)
    assert desk.tick() == []
    assert "open: bureau" in desk.reason
    close_breaker(desk.shared, "bureau", why="it is back", by="ann")
    assert desk.tick() == [("first", True), ("second", True)]
    assert "by" in desk.latest("first").metadata
    assert desk.tick() == []
    assert [str(alert).partition(" is open since")[0] for alert in desk.alerts] == ["shop: first, second: the circuit breaker 'bureau'"]


def test_looking_makes_no_database(desk: Desk) -> None:
    assert desk.tick() == []
    assert not Path(desk.store.root, "shared.db").exists()


def test_a_breaker_that_is_open_when_the_sensor_first_runs_is_told(desk: Desk) -> None:
    desk.fail("shop.third", OWN)
    assert desk.tick() == [("third", False)]
    assert [alert.agents for alert in desk.alerts] == [("third",)]
    assert desk.tick() == []


def test_what_happened_between_two_ticks_is_told_in_its_order(desk: Desk) -> None:
    desk.tick()
    desk.fail("bureau")
    close_breaker(desk.shared, "bureau", why="mended", by="ann")
    desk.fail("bureau")
    assert desk.tick() == [("first", False), ("second", False), ("first", True), ("second", True), ("first", False), ("second", False)]
    assert len(desk.alerts) == 2
    assert not desk.latest("first").passed


def test_a_probe_that_fails_is_no_second_opening_and_one_that_goes_well_closes(desk: Desk) -> None:
    quick = Breaker(fail_max=1, reset_timeout=0.001, name="bureau")
    desk.tick()
    desk.fail("bureau", quick)
    while True:  # until the probe is let through
        try:
            desk.fail("bureau", quick)
            break
        except mao.BreakerOpenError:
            pass
    assert desk.tick() == [("first", False), ("second", False)]
    while True:
        try:
            desk.breaker("bureau", quick).admit().succeeded()
            break
        except mao.BreakerOpenError:
            pass
    assert desk.tick() == [("first", True), ("second", True)]
    assert len(desk.alerts) == 1


def test_a_step_that_asked_no_breaker_does_not_make_an_open_one_look_closed(desk: Desk) -> None:
    """Its answers were all kept, so its check passed."""
    desk.fail("bureau")
    desk.tick()
    passed = dg.AssetCheckEvaluation(asset_key=dg.AssetKey(["shop", "first"]), check_name="breaker", passed=True)
    desk.instance.report_runless_asset_event(passed)
    assert desk.tick() == [("first", False)]
    assert desk.tick() == []
    assert len(desk.alerts) == 1
    close_breaker(desk.shared, "bureau", why="mended", by="ann")
    assert desk.tick() == [("first", True), ("second", True)]
    desk.instance.report_runless_asset_event(passed)
    assert desk.tick() == []


def test_opened_by_hand_it_says_by_whom_and_reset_it_is_closed(desk: Desk) -> None:
    desk.breaker("bureau").admit()
    desk.tick()
    open_breaker(desk.shared, "bureau", why="the bureau asked for it", by="ann")
    assert desk.tick() == [("first", False), ("second", False)]
    assert "the bureau asked for it, by ann): no call is made until a person closes it" in desk.latest("first").description
    reset_breaker(desk.shared, "bureau", why="gone", by="ann")
    assert desk.tick() == [("first", True), ("second", True)]


def test_an_alert_that_fails_is_made_at_the_next_tick_and_tells_no_secret(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    """The naive sensor raises, which tells everything again, or swallows, which loses the alert."""
    desk.tick()
    desk.fail("bureau")
    desk.failing = True
    assert len(desk.tick()) == 2
    assert desk.tick() == []
    assert "1 alerts wait" in desk.reason
    desk.fail("shop.third", OWN)
    desk.tick()
    assert "hooks.example" not in desk.reason + str(desk.cursor) + caplog.text
    desk.failing = False
    assert desk.tick() == []
    assert [alert.breaker for alert in desk.alerts] == ["bureau", "shop.third"]
    desk.tick()
    assert len(desk.alerts) == 2


def test_a_database_that_is_another_one_is_looked_at_anew(desk: Desk, tmp_path: Path) -> None:
    desk.fail("bureau")
    close_breaker(desk.shared, "bureau", why="mended", by="ann")
    desk.tick()
    desk.store = StateStoreResource(root=str(tmp_path / "other"))
    desk.shared = shared_store(str(desk.store.store().database))
    desk.fail("bureau")
    assert desk.tick() == [("first", False), ("second", False)]
    desk.cursor = "garbage"
    assert desk.tick() == [("first", False), ("second", False)]


def test_without_a_database_there_is_nothing_to_look_at(desk: Desk) -> None:
    desk.store = StateStoreResource(root="s3://bucket/prefix")
    assert desk.tick() == []
    assert "No shared database" in desk.reason


def test_it_is_part_of_the_definitions_where_there_is_a_breaker_and_runs_by_itself(tmp_path: Path) -> None:
    given = {"state_store": StateStoreResource(root=str(tmp_path))}
    (sensor,) = build_definitions(PIPELINE, resources=given).sensors or ()
    assert (sensor.name, sensor.default_status) == ("shop_breakers", dg.DefaultSensorStatus.RUNNING)
    assert not build_definitions(mao.Pipeline("plain", entry=entry, agents=[unguarded]), resources=given).sensors
