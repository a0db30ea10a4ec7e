"""The loan agents on a stage: sensors are ticked, and what they ask for is run, in this process, as the daemon would."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

import dagster_mao as mao
from dagster_mao.choreography import enter
from dagster_mao.dagster import StateStoreResource, build_definitions
from tests.choreography.loans import Ledger, batch, loans, sealed

EAGER = mao.MicroBatch(size=500, wait=0)


class Theatre:
    """`pipeline`: the loan agents in choreography, if not given."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance, pipeline: mao.Pipeline | None = None, **resources: Any) -> None:
        self.pipeline = pipeline or loans(micro_batch=EAGER)
        self.instance, self.ledger = instance, Ledger(folder)
        self.given = {
            "state_store": StateStoreResource(root=str(folder / "state")),
            "ledger": dg.ResourceDefinition.hardcoded_resource(self.ledger),
            **resources,
        }
        self.store = self.given["state_store"].store()
        self.defs = build_definitions(self.pipeline, resources=self.given)
        self.cursors: dict[str, str | None] = {}
        self.reasons: dict[str, str | None] = {}
        self.jobs: dict[str, str] = {}  # by run key

    def arrive(self, *workflows: str, amounts: Sequence[float] = ()) -> None:
        """Batches that were sealed somewhere else, by a process that is no run of Dagster's."""
        for workflow in workflows:
            enter(self.store, self.pipeline, batch(*amounts), workflow=workflow)

    def tick(self, name: str) -> list[dg.RunRequest]:
        """One tick of a sensor, by the name of its agent or its own."""
        sensors = {sensor.name: sensor for sensor in self.defs.sensors or ()}
        sensor: Any = sensors.get(name) or sensors[f"{self.pipeline.name}__{name}_sensor"]
        given = {key: self.given[key] for key in sensor.required_resource_keys if key in self.given}
        given |= {"policies": mao.PolicyOverrides()} if "policies" in sensor.required_resource_keys else {}
        with dg.build_sensor_context(instance=self.instance, cursor=self.cursors.get(sensor.name), resources=given) as context:
            told = sensor.evaluate_tick(context)
        self.cursors[sensor.name], self.reasons[name] = told.cursor, told.skip_message
        for event in told.asset_events:
            self.instance.report_runless_asset_event(event)
        requests = list(told.run_requests or ())
        self.jobs |= {str(request.run_key): sensor.job_name for request in requests}
        return requests

    def launch(self, request: dg.RunRequest) -> dg.ExecuteInProcessResult:
        """Runs what a sensor asked for."""
        job = self.defs.resolve_job_def(self.jobs[str(request.run_key)])
        known = {"dagster/run_key": str(request.run_key), **request.tags}
        return job.execute_in_process(
            request.run_config, instance=self.instance, tags=known, run_id=str(uuid.uuid4()), raise_on_error=False
        )

    def play(self) -> dict[str, list[dg.ExecuteInProcessResult]]:
        """Ticks all subscribers' sensors, and runs what they ask for, until they ask for nothing."""
        results: dict[str, list[dg.ExecuteInProcessResult]] = {}
        is_busy = True
        while is_busy:
            is_busy = False
            for agent in self.pipeline.order:
                if agent == self.pipeline.entry_name:
                    continue
                for request in self.tick(agent):
                    is_busy = True
                    results.setdefault(agent, []).append(self.launch(request))
        return results

    def sealed(self) -> Counter[str]:
        return sealed(self.store)

    def check(self, agent: str, name: str, partition: str | None = None) -> Any:
        """How a check stands."""
        key = dg.AssetCheckKey(dg.AssetKey([self.pipeline.name, agent]), name)
        found = self.instance.event_log_storage.get_asset_check_execution_history(key, limit=50)
        return next(r.event.dagster_event.asset_check_evaluation_data for r in found if r.partition == partition)

    def materializations(self, agent: str) -> list[Mapping[str, Any]]:
        """What was told of each, the newest first."""
        records = self.instance.fetch_materializations(dg.AssetKey([self.pipeline.name, agent]), limit=100).records
        return [{name: value.value for name, value in record.asset_materialization.metadata.items()} for record in records]
