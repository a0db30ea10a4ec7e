"""A pipeline as Dagster definitions: assets, checks, a job, the resources; a schedule and a sensor where there is a clock or a breaker."""

import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import Any

import dagster as dg

from dagster_mao.agent import check_asked
from dagster_mao.dagster.assets import IO_MANAGER, asset_keys, build_assets
from dagster_mao.dagster.audit import build_audit_job
from dagster_mao.dagster.breakers import BreakerAlert, build_breaker_sensor, guarded_agents
from dagster_mao.dagster.checks import LAG, build_chain_checks, checks_of_all
from dagster_mao.dagster.io_manager import StateIOManager
from dagster_mao.dagster.metadata import of_pattern
from dagster_mao.dagster.policies import POLICIES, PolicyOverrides
from dagster_mao.dagster.reconciling import build_compensation_sensor
from dagster_mao.dagster.resources import STATE_STORE, StateStoreResource
from dagster_mao.dagster.saga import build_compensation_job, undo_resources, with_effects
from dagster_mao.dagster.translator import AgentTranslator
from dagster_mao.errors import WiringError
from dagster_mao.pipeline import Pipeline

ROOT_VARIABLE, DATABASE_VARIABLE = "DAGSTER_MAO_ROOT", "DAGSTER_MAO_DATABASE"


def build_definitions(
    pipeline: Pipeline,
    *,
    resources: Mapping[str, Any] | None = None,
    translator: AgentTranslator | None = None,
    alert: Callable[[BreakerAlert], object] | None = None,
    scheduled: bool = False,
    backfill_policy: dg.BackfillPolicy | None = None,
) -> dg.Definitions:
    """Everything that Dagster needs to run, show and schedule a pipeline; merge it with other definitions as you like.

    `resources` holds those that the agents take, and `state_store` (`StateStoreResource`); without the latter the environment variable
    `DAGSTER_MAO_ROOT` names the root, and `DAGSTER_MAO_DATABASE` the shared database if there is one. `policies` (`PolicyOverrides`)
    changes agents' policies; without it there are none until somebody writes them in the launchpad. Raises `WiringError` when a resource is
    missing, or an override names what there is not.

    With `scheduled`, the schedule of a pipeline with partitions by time runs from the start; else it is switched on in the UI. By default a
    backfill makes a run per partition; with `backfill_policy=dg.BackfillPolicy.single_run()` one run takes them all (`build_asset`).

    Where an agent has a breaker, a sensor shows how it stands (`build_breaker_sensor`); `alert` is called for each that opens. Where an
    agent has effects, a sensor starts a job that compensates attempts which did not complete (`build_compensation_sensor`).

    The job `<pipeline>_audit` writes the dossier of a workflow (`build_audit_job`).
    """
    assets = build_assets(pipeline, translator=translator, backfill_policy=backfill_policy)
    job = build_job(pipeline) if pipeline.entry_name else None
    status = dg.DefaultScheduleStatus.RUNNING if scheduled else dg.DefaultScheduleStatus.STOPPED
    schedule = build_schedule(pipeline, job, default_status=status) if job else None
    sensors = [build_breaker_sensor(pipeline, alert)] if guarded_agents(pipeline) else []
    agent_jobs, checks = [], build_chain_checks(pipeline)
    if pipeline.mode != "orchestration":
        from dagster_mao.dagster import choreography, lag  # SQLAlchemy, which not every pipeline needs

        checks.append(lag.build_lag_checks(pipeline))
        sensors.append(lag.build_lag_sensor(pipeline))
        agent_jobs = choreography.build_agent_jobs(pipeline)
        sensors += choreography.build_subscriber_sensors(pipeline)
        if pipeline.inbox is not None:
            agent_jobs.append(choreography.build_inbox_job(pipeline))
            sensors.append(choreography.build_inbox_sensor(pipeline))
    elif pipeline.inbox is not None:
        fix = 'mode="choreography" or "hybrid", in which agents start by themselves'
        raise WiringError(f"Pipeline {pipeline.name!r} has an inbox, and nobody starts its agents", field="inbox", fix=fix)
    compensating = [build_compensation_job(pipeline)] if with_effects(pipeline) else []
    if compensating:
        sensors.append(build_compensation_sensor(pipeline))
    return dg.Definitions(
        assets=assets,
        asset_checks=checks,
        jobs=[*([job] if job else []), *agent_jobs, *compensating, build_audit_job(pipeline)],
        schedules=[schedule] if schedule else [],
        sensors=sensors,
        resources=_resources(pipeline, dict(resources or {})),
    )


def build_job(pipeline: Pipeline) -> Any:
    """The asset job `<pipeline>_job`: the entry, all agents and their checks, but for those that go through all partitions.

    Where agents start by themselves it is the entry alone.
    """
    agents = pipeline.order if pipeline.mode == "orchestration" else (pipeline.entry.name,)
    keys = [key for agent in agents for key in asset_keys(pipeline, agent)]
    own = dg.AssetSelection.assets(*keys)
    everywhere = checks_of_all(pipeline)
    if pipeline.inbox is not None:
        everywhere.append(dg.AssetCheckKey(dg.AssetKey([pipeline.name, pipeline.entry.name]), LAG))
    return dg.define_asset_job(
        f"{pipeline.name}_job",
        selection=own - dg.AssetSelection.checks(*everywhere) if everywhere else own,
        description=pipeline.description,
        metadata=of_pattern(pipeline),
    )


def build_schedule(pipeline: Pipeline, job: Any, *, default_status: dg.DefaultScheduleStatus = dg.DefaultScheduleStatus.STOPPED) -> Any:
    """The schedule `<pipeline>_schedule`, which runs the job on the partition that just ended; None without partitions by time.

    By default it is stopped until it is switched on in the UI.
    """
    if not isinstance(pipeline.partitions_def, dg.TimeWindowPartitionsDefinition):
        return None
    about = f"Decides each ended partition of {pipeline.name}."
    return dg.build_schedule_from_partitioned_job(job, name=f"{pipeline.name}_schedule", description=about, default_status=default_status)


def _resources(pipeline: Pipeline, given: dict[str, Any]) -> dict[str, Any]:
    if missing := [name for name in (*pipeline.resources, *undo_resources(pipeline)) if name not in given]:
        agent = next((one.name for one in pipeline.agents.values() if missing[0] in one.all_resources), None)
        raise WiringError(
            f"Nobody provides the resource {missing[0]!r}",
            agent=agent,
            field=missing[0],
            fix=f"build_definitions(resources={{{missing[0]!r}: …}})",
        )
    for one in pipeline.agents.values():
        for judge in one.panel:
            # Of what is put together only when a run begins, nothing is known yet: its step says it then.
            if all(isinstance(given.get(name), dg.ConfigurableResource) for name in judge.resources):
                check_asked(one, judge, given)
    store = given.get(STATE_STORE) or _store_at(_root())
    policies = given.get(POLICIES) or _no_overrides()
    if isinstance(policies, PolicyOverrides):
        policies.of(pipeline)
    return {IO_MANAGER: _io_manager(store), **given, STATE_STORE: store, POLICIES: policies}


# Definitions.merge takes a resource key twice only for the same object, and pipelines share these.


@lru_cache(maxsize=1)
def _no_overrides() -> PolicyOverrides:
    return PolicyOverrides()


@lru_cache(maxsize=32)
def _store_at(root: str) -> StateStoreResource:
    return StateStoreResource(root=root, database=os.environ.get(DATABASE_VARIABLE, ""))


_IO_MANAGERS: list[tuple[StateStoreResource, StateIOManager]] = []


def _io_manager(store: StateStoreResource) -> StateIOManager:
    for known, manager in _IO_MANAGERS:
        if known is store:
            return manager
    _IO_MANAGERS.append((store, StateIOManager(state_store=store)))
    return _IO_MANAGERS[-1][1]


def _root() -> str:
    root = os.environ.get(ROOT_VARIABLE)
    if not root:
        raise WiringError(
            "Where does the state lie?",
            field=STATE_STORE,
            fix=f"build_definitions(resources={{'{STATE_STORE}': StateStoreResource(root=…)}}), or set {ROOT_VARIABLE}",
        )
    return root
