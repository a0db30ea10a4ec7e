"""An agent as a Dagster asset: one asset per agent, its boundary as blocking checks in the same op, its seal as the materialisation."""

import warnings
from collections.abc import Iterator
from typing import Any

import dagster as dg

from dagster_mao.agent import Agent, Judge
from dagster_mao.boundary import BREAKER, OUTPUT, PINNED_BASE, Outcome, check_names, run_agent
from dagster_mao.configuration import config_digest
from dagster_mao.correlation import Whose, WorkflowLog
from dagster_mao.dagster.policies import POLICIES
from dagster_mao.dagster.quarantine import data_version, of_quarantine, quarantine_key
from dagster_mao.dagster.ranges import check_backfills, over_partitions
from dagster_mao.dagster.resources import STATE_STORE
from dagster_mao.dagster.runs import (
    AGENT_TAG,
    ENTRY_TAG,
    PIPELINE_TAG,
    PLAN_TAG,
    WAITS_FOR_TAG,
    is_fresh,
    is_started,
    only_partition,
    open_attempt,
    workflow_tags,
)
from dagster_mao.dagster.saga import build_request_hook, with_effects
from dagster_mao.dagster.telling import UNPINNED, failure, of_asset, paid_in_vain, result, verdicts, without_values
from dagster_mao.dagster.translator import AgentTranslator
from dagster_mao.errors import (
    AgentCallError,
    BatchRefusedError,
    BreakerOpenError,
    IncompatibleContractError,
    InvalidRecordsError,
    MaoError,
    WiringError,
)
from dagster_mao.pipeline import ExternalEntry, Pipeline
from dagster_mao.state import StateStore

IO_MANAGER = "state_io_manager"
"""The resource key of the IO manager that loads agents' snapshots for plain assets."""

# What a second try in the same run cannot mend.
_FINAL = (*UNPINNED, AgentCallError, BatchRefusedError, BreakerOpenError, IncompatibleContractError, InvalidRecordsError, WiringError)
_RECORDS = "records"


def build_assets(
    pipeline: Pipeline, *, translator: AgentTranslator | None = None, backfill_policy: dg.BackfillPolicy | None = None
) -> list[dg.AssetsDefinition]:
    """One asset per agent, the entry first. Raises `WiringError` when the translator changed a key."""
    return [build_asset(pipeline, agent, translator=translator, backfill_policy=backfill_policy) for agent in pipeline.order]


def build_asset(
    pipeline: Pipeline, agent: str, *, translator: AgentTranslator | None = None, backfill_policy: dg.BackfillPolicy | None = None
) -> dg.AssetsDefinition:
    """The asset of one agent, with its boundary checks; by the entry's name, of the entry. With a quarantine, two assets by one op.

    An existing asset as entry is loaded by its own IO manager, like any input of any asset, and sealed as the entry.

    With a `backfill_policy`, a run may be over a range of partitions, which one step does for all agents of the pipeline in the run: each
    partition is a workflow of its own, and fails for itself. Give all agents of a pipeline the same. Raises `WiringError` where an agent
    has a pool, or the pipeline no partitions.

    It requires the resources `state_store` (`StateStoreResource`), `policies` (`PolicyOverrides`), `state_io_manager` (`StateIOManager`,
    for plain downstream assets) and those that the agent takes as keyword-only parameters.
    """
    one = pipeline.node(agent)
    if backfill_policy is not None:
        check_backfills(pipeline)
    key, translator = dg.AssetKey([pipeline.name, agent]), translator or AgentTranslator()
    spec = _named(translator.get_asset_spec(one, pipeline), key, agent)
    source = dg.AssetKey(one.asset_key) if isinstance(one, ExternalEntry) else None
    deps = [source] if source else [dg.AssetKey([pipeline.name, read.upstream]) for read in one.inputs]

    specs = [spec.merge_attributes(deps=deps)]
    if one.quarantine is not None:
        aside = _named(translator.get_quarantine_spec(one, pipeline), quarantine_key(pipeline.name, agent), agent)
        # Below its agent: whatever is selected downstream of the agent then has the whole op, which has no parts.
        specs.append(aside.merge_attributes(deps=[key]))

    is_subscriber = pipeline.mode != "orchestration" and agent != pipeline.entry_name

    def materialize(context: dg.AssetExecutionContext, **inputs: Any) -> Iterator[Any]:
        if is_subscriber and not is_started(context.instance, context.run, pipeline.name, agent):
            key = _partition(context, one)
            log = context.log if key is None else WorkflowLog(context.log, Whose(f"{pipeline.name}/{key}", agent))
            log.info(f"{agent} is not started here: its sensor does, once all that it reads is sealed.")
        elif backfill_policy is not None and not context.has_partition_key:
            yield from over_partitions(context, pipeline, one, inputs.get(_RECORDS))
        else:
            yield from _selected(context, _materialize(context, pipeline, one, inputs.get(_RECORDS)))

    wrap = dg.multi_asset(
        name=op_name(pipeline.name, agent),
        specs=[one_of_them.with_io_manager_key(IO_MANAGER) for one_of_them in specs],
        ins={_RECORDS: dg.AssetIn(source)} if source else {},
        check_specs=boundary_check_specs(pipeline, agent),
        # The step of a run over many partitions does them for all agents.
        required_resource_keys={STATE_STORE, POLICIES, *(pipeline.resources if backfill_policy else one.all_resources)},
        pool=one.pool,
        # Then a step may go without outputs: what the sensors start is left to them, and what is told of many partitions is told by events.
        can_subset=is_subscriber or backfill_policy is not None,
        hooks={build_request_hook(pipeline)} if (with_effects(pipeline) if backfill_policy else agent in with_effects(pipeline)) else None,
        backfill_policy=backfill_policy,
        op_tags=_op_tags(pipeline, one),
    )
    return wrap(materialize)


def _op_tags(pipeline: Pipeline, agent: Agent) -> dict[str, str]:
    tags = {PIPELINE_TAG: pipeline.name, AGENT_TAG: agent.name, ENTRY_TAG: pipeline.entry_name}
    if pipeline.mode == "hybrid" and agent.name == pipeline.entry_name:
        tags[PLAN_TAG] = ",".join(pipeline.plan)
    elif pipeline.mode != "orchestration" and agent.inputs:
        tags[WAITS_FOR_TAG] = ",".join(read.upstream for read in agent.inputs)
    return tags


def _selected(context: dg.AssetExecutionContext, told: Iterator[Any]) -> Iterator[Any]:
    """What was selected of what an op tells: Dagster takes no more."""
    keys, checks = context.selected_asset_keys, {(check.asset_key, check.name) for check in context.selected_asset_check_keys}
    for one in told:
        if isinstance(one, dg.MaterializeResult) and one.asset_key not in keys:
            continue
        if isinstance(one, dg.AssetCheckResult) and (one.asset_key, one.check_name) not in checks:
            continue
        yield one


def _named(spec: dg.AssetSpec, key: dg.AssetKey, agent: str) -> dg.AssetSpec:
    if spec.key != key:
        raise WiringError(
            f"The translator gave the asset the key {spec.key.to_user_string()!r}", agent=agent, fix=f"leave it {key.to_user_string()!r}"
        )
    return spec


def asset_keys(pipeline: Pipeline, agent: str) -> list[dg.AssetKey]:
    """What an agent's op materialises: its asset and, where it declares one, its quarantine."""
    own = [dg.AssetKey([pipeline.name, agent])]
    return own if pipeline.node(agent).quarantine is None else [*own, quarantine_key(pipeline.name, agent)]


def op_name(pipeline: str, agent: str) -> str:
    """The step key: unique in a code location, and what Dagster would have made of the asset key."""
    return f"{pipeline}__{agent}"


def boundary_check_specs(pipeline: Pipeline, agent: str) -> list[dg.AssetCheckSpec]:
    """The checks that an agent evaluates before anything is written; each but an expectation that only warns blocks what is downstream."""
    one = pipeline.node(agent)
    expected = {expectation.name: expectation for expectation in one.suite.expectations}
    judges = {judge.check: judge for judge in one.panel}
    names = [name for name in check_names(one) if name not in expected and name not in judges]
    return [
        *(
            # A breaker is not of a partition: how it stands shows in one place, whichever run or sensor told it last.
            check_spec(name, pipeline, agent, description=_described(name), blocking=True, partitioned=name != BREAKER)
            for name in names
        ),
        *(check_spec(name, pipeline, agent, description=e.description, blocking=e.severity == "error") for name, e in expected.items()),
        *(check_spec(name, pipeline, agent, description=_of_judge(j), blocking=j.severity == "error") for name, j in judges.items()),
    ]


def check_spec(
    name: str, pipeline: Pipeline, agent: str, *, description: str, blocking: bool, partitioned: bool = True
) -> dg.AssetCheckSpec:
    """A check of an agent's asset, partitioned like it: one without partitions would show the last partition's result for all of them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.PreviewWarning)
        return dg.AssetCheckSpec(
            name,
            asset=[pipeline.name, agent],
            description=description,
            blocking=blocking,
            partitions_def=pipeline.partitions_def if partitioned else None,
        )


def _of_judge(judge: Judge) -> str:
    who = (
        f"A judge's opinion ({judge.model or 'the model of the resource ' + repr(judge.llm)})"
        if judge.ask is None
        else "A function's opinion"
    )
    return f"{who} of at most {judge.sample:,} records. Do they keep the rubric? {str(judge.rubric).strip()}"


def _described(name: str) -> str:
    if name == PINNED_BASE:
        return "Are these the state versions that this attempt may read, and do they descend from one entry?"
    if name == BREAKER:
        return "Were all calls let through? An open circuit breaker refuses them, and says since when and why."
    if name == OUTPUT:
        return "Does every record that the agent returned keep the contract, and is there exactly one per record that it was given?"
    return f"Does every record of {name.removeprefix('input_')!r} keep what this agent asks of it?"


def _materialize(context: dg.AssetExecutionContext, pipeline: Pipeline, agent: Agent, records: Any) -> Iterator[Any]:
    key = dg.AssetKey([pipeline.name, agent.name])
    try:
        outcome = _run(context, pipeline, agent, records)
    except MaoError as error:
        error.checks = verdicts(error)
        yield from (result(key, check) for check in error.checks)
        yield from paid_in_vain(key, error, _partition(context, agent) if error.calls else None)
        if not isinstance(error, _FINAL):
            raise without_values(error) from error.__cause__
        raise failure(error) from without_values(error)
    yield from (result(key, check) for check in outcome.checks)
    metadata = of_asset(_store(context), pipeline, outcome)
    yield dg.MaterializeResult(asset_key=key, metadata=metadata, data_version=dg.DataVersion(outcome.seal.digest))
    if agent.quarantine is not None:
        # Also when there is nothing in it, so that its numbers over time have their zeros.
        yield dg.MaterializeResult(
            asset_key=quarantine_key(pipeline.name, agent.name),
            metadata=of_quarantine(_store(context), outcome.seal, pipeline),
            data_version=data_version(outcome.seal),
        )


def _run(context: dg.AssetExecutionContext, pipeline: Pipeline, agent: Agent, records: Any) -> Outcome:
    store, partition_key = _store(context), _partition(context, agent)
    policies = getattr(context.resources, POLICIES).of(pipeline)
    fresh = is_fresh(context.run.tags, pipeline, agent.name)
    attempt = open_attempt(store, context.instance, context.run, pipeline=pipeline.name, partition_key=partition_key)
    tags = workflow_tags([attempt.workflow_id])
    if not tags.keys() <= context.run.tags.keys():
        context.instance.add_run_tags(context.run.run_id, tags)
    resources = {name: getattr(context.resources, name) for name in agent.all_resources}
    return run_agent(
        store,
        agent,
        attempt,
        resources=resources,
        config_digest=config_digest(agent.own_resources(resources)),
        partition_key=partition_key,
        records=records,
        policies=policies,
        fresh=fresh,
        log=context.log,
    )


def _partition(context: dg.AssetExecutionContext, agent: Agent) -> str | None:
    partitioned = context.has_partition_key or context.has_partition_key_range
    return only_partition(context.partition_keys, agent.name) if partitioned else None


def _store(context: dg.AssetExecutionContext) -> StateStore:
    store: StateStore = getattr(context.resources, STATE_STORE).store()
    return store
