"""Late data: a past partition's entry is sealed again, and Dagster shows that what was decided from the one before is out of date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest

from dagster_mao.choreography import enter
from dagster_mao.dagster import StateStoreResource
from dagster_mao.dagster.quarantine import report
from tests.choreography.loans import batch, loans, once
from tests.dagster.loans import definitions, write
from tests.dagster.theatre import EAGER, Theatre

DAYS = dg.DailyPartitionsDefinition(start_date="2026-01-05", end_date="2026-01-08")
MONDAY, TUESDAY = "2026-01-05", "2026-01-06"
READERS = ("credit_score", "verified_income")


def stale(defs: dg.Definitions, instance: dg.DagsterInstance, agent: str, day: str) -> StaleStatus:
    graph: Any = defs.resolve_asset_graph()
    resolver = CachingStaleStatusResolver(instance, graph, LoadingContextForTest(instance))
    return resolver.get_status(dg.AssetKey(["loans", agent]), day)


def test_a_new_entry_of_a_past_day_makes_what_reads_it_stale_until_it_has_run_again(tmp_path: Path) -> None:
    defs = definitions(tmp_path, partitions_def=DAYS)
    job = defs.resolve_job_def("loans_job")
    with dg.DagsterInstance.ephemeral() as instance:
        write(tmp_path, days={MONDAY: [700.0], TUESDAY: [620.0]})
        for day in (MONDAY, TUESDAY):
            assert job.execute_in_process(instance=instance, partition_key=day).success
        assert {stale(defs, instance, agent, MONDAY) for agent in READERS} == {StaleStatus.FRESH}
        write(tmp_path, days={MONDAY: [700.0, 650.0], TUESDAY: [620.0]})
        entry = [dg.AssetKey(["loans", "applications"])]
        whole = defs.resolve_implicit_global_asset_job_def()
        assert whole.execute_in_process(instance=instance, partition_key=MONDAY, asset_selection=entry).success
        for agent in READERS:
            told = {day: stale(defs, instance, agent, day) for day in (MONDAY, TUESDAY)}
            assert told == {MONDAY: StaleStatus.STALE, TUESDAY: StaleStatus.FRESH}, agent
        assert job.execute_in_process(instance=instance, partition_key=MONDAY).success
        assert {stale(defs, instance, agent, MONDAY) for agent in READERS} == {StaleStatus.FRESH}
    store = StateStoreResource(root=str(tmp_path / "state")).store()
    entries = [seal.version for seal in store.seals(f"loans/{MONDAY}") if seal.kind == "entry"]
    assert entries[0] == 0, "the workflow keeps all its entries"
    assert len(entries) == 3


def test_in_choreography_late_data_is_decided_by_itself_and_stale_meanwhile(tmp_path: Path) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        theatre = Theatre(tmp_path, instance, loans(micro_batch=EAGER, partitions_def=DAYS))
        entry = theatre.defs.resolve_job_def("loans_job")
        assert entry.execute_in_process(instance=instance, partition_key=MONDAY).success
        theatre.play()
        assert stale(theatre.defs, instance, "approval", MONDAY) == StaleStatus.FRESH
        late = batch(100.0, 200.0, 300.0)
        seal = enter(theatre.store, theatre.pipeline, late, workflow=MONDAY)
        report(instance, theatre.pipeline, theatre.store, seal)
        assert stale(theatre.defs, instance, "score", MONDAY) == StaleStatus.STALE
        theatre.play()
        assert stale(theatre.defs, instance, "score", MONDAY) == StaleStatus.FRESH
        assert stale(theatre.defs, instance, "approval", MONDAY) == StaleStatus.FRESH
        assert theatre.sealed() == once(MONDAY) + once(MONDAY), "each entry is decided once"
        assert theatre.store.effective(f"loans/{MONDAY}")["approval"].row_count == 3
