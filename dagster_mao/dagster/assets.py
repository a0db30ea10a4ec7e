"""An agent as a Dagster asset: one asset per agent, its boundary as blocking checks in the same op, its seal as the materialisation."""

import warnings
from collections.abc import Iterator
from typing import Any

import dagster as dg
from pydantic import ValidationError

from dagster_mao.agent import Agent
from dagster_mao.boundary import BREAKER, OUTPUT, PINNED_BASE, Check, Outcome, check_names, run_agent
from dagster_mao.configuration import config_digest
from dagster_mao.dagster.metadata import of_calls, of_check, of_deferred, of_seal
from dagster_mao.dagster.policies import POLICIES
from dagster_mao.dagster.quarantine import data_version, of_quarantine, quarantine_key
from dagster_mao.dagster.resources import STATE_STORE
from dagster_mao.dagster.runs import AGENT_TAG, ENTRY_TAG, PIPELINE_TAG, is_fresh, only_partition, open_attempt
from dagster_mao.dagster.saga import build_request_hook, with_effects
from dagster_mao.dagster.translator import AgentTranslator
from dagster_mao.errors import (
    AgentCallError,
    BatchRefusedError,
    BreakerOpenError,
    FencedError,
    IncompatibleContractError,
    InvalidRecordsError,
    MaoError,
    PinError,
    StaleStateError,
    TamperedError,
    WiringError,
)
from dagster_mao.pipeline import ExternalEntry, Pipeline
from dagster_mao.review.calls import told_of
from dagster_mao.state import CallSummary, StateStore

IO_MANAGER = "state_io_manager"
"""The resource key of the IO manager that loads agents' snapshots for plain assets."""

_UNPINNED = (FencedError, PinError, StaleStateError, TamperedError)
# What a second try in the same run cannot mend.
_FINAL = (*_UNPINNED, AgentCallError, BatchRefusedError, BreakerOpenError, IncompatibleContractError, InvalidRecordsError, WiringError)
_RECORDS = "records"


def build_assets(pipeline: Pipeline, *, translator: AgentTranslator | None = None) -> list[dg.AssetsDefinition]:
    """One asset per agent, the entry first. Raises `WiringError` when the translator changed a key."""
    return [build_asset(pipeline, agent, translator=translator) for agent in pipeline.order]


def build_asset(pipeline: Pipeline, agent: str, *, translator: AgentTranslator | None = None) -> dg.AssetsDefinition:
    """The asset of one agent, with its boundary checks; by the entry's name, of the entry. With a quarantine, two assets by one op.

    An existing asset as entry is loaded by its own IO manager, like any input of any asset, and sealed as the entry.

    It requires the resources `state_store` (`StateStoreResource`), `policies` (`PolicyOverrides`), `state_io_manager` (`StateIOManager`,
    for plain downstream assets) and those that the agent takes as keyword-only parameters.
    """
    one = pipeline.node(agent)
    key, translator = dg.AssetKey([pipeline.name, agent]), translator or AgentTranslator()
    spec = _named(translator.get_asset_spec(one, pipeline), key, agent)
    source = dg.AssetKey(one.asset_key) if isinstance(one, ExternalEntry) else None
    deps = [source] if source else [dg.AssetKey([pipeline.name, read.upstream]) for read in one.inputs]

    specs = [spec.merge_attributes(deps=deps)]
    if one.quarantine is not None:
        aside = _named(translator.get_quarantine_spec(one, pipeline), quarantine_key(pipeline.name, agent), agent)
        # Below its agent: whatever is selected downstream of the agent then has the whole op, which has no parts.
        specs.append(aside.merge_attributes(deps=[key]))

    def materialize(context: dg.AssetExecutionContext, **inputs: Any) -> Iterator[Any]:
        yield from _materialize(context, pipeline, one, inputs.get(_RECORDS))

    wrap = dg.multi_asset(
        name=op_name(pipeline.name, agent),
        specs=[one_of_them.with_io_manager_key(IO_MANAGER) for one_of_them in specs],
        ins={_RECORDS: dg.AssetIn(source)} if source else {},
        check_specs=boundary_check_specs(pipeline, agent),
        required_resource_keys={STATE_STORE, POLICIES, *one.resources},
        pool=one.pool,
        hooks={build_request_hook(pipeline)} if agent in with_effects(pipeline) else None,
        op_tags={PIPELINE_TAG: pipeline.name, AGENT_TAG: agent, ENTRY_TAG: pipeline.entry_name},
    )
    return wrap(materialize)


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
    names = [name for name in check_names(one) if name not in expected]
    return [
        *(
            # A breaker is not of a partition: how it stands shows in one place, whichever run or sensor told it last.
            check_spec(name, pipeline, agent, description=_described(name), blocking=True, partitioned=name != BREAKER)
            for name in names
        ),
        *(check_spec(name, pipeline, agent, description=e.description, blocking=e.severity == "error") for name, e in expected.items()),
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
        if isinstance(error, _UNPINNED) and not error.checks:
            error.checks = (Check(PINNED_BASE, False, str(error)),)
        yield from (_result(key, check) for check in error.checks)
        if error.calls is not None and error.calls != CallSummary():
            # Nothing is materialised: what was paid for is told all the same, where the UI plots it.
            told, partition = f"No version was sealed: {told_of(error.calls)}.", _partition(context, agent)
            yield dg.AssetObservation(key, told, partition=partition, metadata=of_calls(error.calls))
        if not isinstance(error, _FINAL):
            raise without_values(error) from error.__cause__
        raise _failure(error) from without_values(error)
    yield from (_result(key, check) for check in outcome.checks)
    yield dg.MaterializeResult(
        asset_key=key,
        metadata=of_deferred(_store(context), outcome.seal) | of_seal(outcome.seal, pipeline, reused=outcome.reused, calls=outcome.calls),
        data_version=dg.DataVersion(outcome.seal.digest),
    )
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
    resources = {name: getattr(context.resources, name) for name in agent.resources}
    return run_agent(
        store,
        agent,
        attempt,
        resources=resources,
        config_digest=config_digest(resources),
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


def without_values(error: MaoError) -> MaoError:
    """The error with the values that pydantic quotes taken out of its causes: Dagster writes the whole chain to its event log.

    Where it happened and which rule was broken stays. What an agent's own code puts into the text of its errors was withheld before, where
    there is personal data.
    """
    links: list[tuple[BaseException, BaseException]] = []
    link: BaseException = error
    while (cause := link.__cause__ or (None if link.__suppress_context__ else link.__context__)) is not None:
        links.append((link, cause))
        link = cause
    for outer, inner in links:
        if isinstance(inner, ValidationError):
            told = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['type']}" for one in inner.errors(include_input=False))
            outer.__cause__ = ValueError(f"{inner.error_count()} validation errors for {inner.title}: {told}").with_traceback(
                inner.__traceback__
            )
    return error


def _result(key: dg.AssetKey, check: Check) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        passed=check.passed,
        check_name=check.name,
        asset_key=key,
        severity=dg.AssetCheckSeverity.WARN if check.severity == "warn" else dg.AssetCheckSeverity.ERROR,
        description=check.description,
        metadata=of_check(check),
    )


def _failure(error: MaoError) -> dg.Failure:
    told = {f"{check.name}: {name}": value for check in error.checks if not check.passed for name, value in of_check(check).items()}
    paid = {} if error.calls is None else of_calls(error.calls)
    return dg.Failure(str(error), metadata=told | paid, allow_retries=False)
