"""An agent's `pool` is Dagster's: over all runs of an instance, so many of its steps at a time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import dagster as dg
import pytest
from pydantic import BaseModel

import dagster_mao as mao
from dagster_mao.dagster import StateStoreResource
from tests.gateway.crew import SECONDS, until


class Item(BaseModel):
    item_id: Annotated[str, mao.Key]


class Meeting:
    """Where the steps of two runs may meet: each waits for the other until that one is there too, or waits for its place in the pool."""

    def __init__(self, instance: dg.DagsterInstance) -> None:
        self._instance, self._changed = instance, threading.Condition()
        self._inside = self.came = self.most = 0

    def attend(self) -> None:
        with self._changed:
            self._inside += 1
            self.came += 1
            self.most = max(self.most, self._inside)
        until(lambda: self.came == 2 or self._has_more_than_places())
        with self._changed:
            self._inside -= 1

    def _has_more_than_places(self) -> bool:
        # Two that come at the same moment are both "assigned" the last place, and one of them does not get it: it is not among the pending.
        queue = self._instance.event_log_storage.get_concurrency_info("bureau")
        return len(queue.pending_steps) > queue.slot_count


@mao.agent
def entry() -> list[Item]:
    return [Item(item_id="a")]


@mao.agent(pool="bureau")
def asking(entry: Item, *, meeting: Meeting) -> Item:
    meeting.attend()
    return entry


pipeline = mao.Pipeline("shop", entry=entry, agents=[asking])


@pytest.mark.parametrize(("limit", "most"), [(1, 1), (2, 2), (None, 2)], ids=["one", "two", "unlimited"])
def test_a_pool_limits_the_steps_of_all_runs_together(tmp_path: Path, limit: int | None, most: int) -> None:
    """Without a limit a pool is a name."""
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        if limit is not None:
            instance.event_log_storage.set_concurrency_slots("bureau", limit)
        meeting = Meeting(instance)
        store = StateStoreResource(root=str(tmp_path / "state"))
        defs = pipeline.build_definitions(resources={"state_store": store, "meeting": dg.ResourceDefinition.hardcoded_resource(meeting)})
        job = defs.resolve_job_def("shop_job")
        with ThreadPoolExecutor(2) as pool:
            runs = [pool.submit(job.execute_in_process, instance=instance) for _ in range(2)]
            assert all(run.result(2 * SECONDS).success for run in runs)
    assert (meeting.came, meeting.most) == (2, most)
