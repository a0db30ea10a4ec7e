"""One run over a range of partitions: each is a workflow and an attempt of its own, and fails for itself.

Dagster would tell the same of all partitions of a range, and start nothing below a step that failed for one of them. So one step does it
all, the first of the pipeline's in the run, and tells of each partition; the pipeline's other steps are skipped.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import dagster as dg
from dagster._core.storage.tags import ASSET_RESUME_RETRY_TAG, RESUME_RETRY_TAG

from dagster_mao.agent import Agent
from dagster_mao.boundary import Outcome, run_agent
from dagster_mao.configuration import config_digest
from dagster_mao.dagster.policies import POLICIES
from dagster_mao.dagster.resources import STATE_STORE
from dagster_mao.dagster.runs import WORKFLOWS_TAGGED, Joined, is_fresh, joined, open_joined, starting, workflow_tags
from dagster_mao.dagster.telling import Telling, untold
from dagster_mao.errors import BreakerOpenError, MaoError, PartitionsFailedError, StoreError, WiringError
from dagster_mao.pipeline import ExternalEntry, Pipeline
from dagster_mao.state import Seal, StateStore

# After these each of the others would fail as well, and have effects first.
_FOR_ALL = (StoreError, BreakerOpenError)
_SHOWN = 200  # rows of a table in the UI


def check_backfills(pipeline: Pipeline) -> None:
    """Raises `WiringError` for a pipeline that one run cannot take over a range of partitions."""
    field = "backfill_policy"
    if pipeline.partitions_def is None:
        raise WiringError(f"Pipeline {pipeline.name!r} has no partitions to be backfilled", field=field, fix="give it partitions_def=")
    for one in pipeline.agents.values():
        if one.pool is not None:
            what = f"A run over many partitions is one step, which cannot hold the pool {one.pool!r} for this agent only"
            fix = "limit its calls by its policy (rate_limit, concurrency), or leave out backfill_policy"
            raise WiringError(what, agent=one.name, field=field, fix=fix)


def over_partitions(context: dg.AssetExecutionContext, pipeline: Pipeline, agent: Agent, records: Any) -> Iterator[Any]:
    """The step of an agent in a run over a range of partitions: of the first one it does all agents, of the others nothing.

    A partition that fails fails alone, at its first agent that does, and the step fails at its end with all of them. Raises `dg.Failure`.
    """
    told = starting(context.instance, context.run, pipeline.name)
    here = [name for name in pipeline.order if name in told]
    if here[:1] != [agent.name]:
        context.log.info(f"A run over a range of partitions: the step of {here[0]} does {agent.name} too.")
        return
    yield from _Range(context, pipeline, here, records).run()


class _Range:
    """What one run does with a range of partitions. `here`: the agents that it set out to run, in order."""

    def __init__(self, context: dg.AssetExecutionContext, pipeline: Pipeline, here: Sequence[str], records: Any) -> None:
        self._context, self._pipeline, self._records = context, pipeline, records
        self._store: StateStore = getattr(context.resources, STATE_STORE).store()
        self._policies = getattr(context.resources, POLICIES).of(pipeline)
        self._joined: Joined = joined(context.instance, context.run, pipeline.name)
        tags = context.run.tags
        self._goes_on = "true" in (tags.get(RESUME_RETRY_TAG), tags.get(ASSET_RESUME_RETRY_TAG))
        # What is re-executed from a failure is whatever the attempt has not sealed yet, whichever steps Dagster has chosen.
        names = [name for name in pipeline.order if name in self._joined.plan] if self._goes_on else here
        self._agents = [pipeline.node(name) for name in names]
        self._fresh = {name: is_fresh(tags, pipeline, name) for name in names}
        self._resources = {one.name: {name: getattr(context.resources, name) for name in one.all_resources} for one in self._agents}
        self._tellings = {one.name: Telling(context, self._store, pipeline, one) for one in self._agents}
        self._failed = dict[str, tuple[str, str]]()

    def run(self) -> Iterator[Any]:
        keys = list(self._context.partition_keys)
        self._tell_workflows(keys)
        untold = self._untold(keys) if self._goes_on else {}
        for place, key in enumerate(keys):
            error = yield from self._workflow(key, untold)
            if isinstance(error, _FOR_ALL):
                why = ("", f"not begun: {type(error).__name__}")
                self._failed |= dict.fromkeys(keys[place + 1 :], why)
                break
        if self._failed:
            raise self._failure(len(keys))

    def _workflow(self, key: str, untold: Mapping[str, Seal]) -> Generator[Any, None, MaoError | None]:
        """One partition, up to its first agent that fails; returns the error, or None."""
        for agent in self._agents:
            telling = self._tellings[agent.name]
            try:
                outcome = self._step(key, agent)
            except MaoError as error:
                self._failed[key] = (agent.name, type(error).__name__)
                yield from telling.failed(f"{self._pipeline.name}/{key}", error)
                return error
            if outcome is not None:
                yield from telling.sealed(outcome)
            elif (seal := untold.get(f"{agent.name} {key}")) is not None:
                yield from telling.sealed(Outcome(seal, (), reused=True))
        return None

    def _step(self, key: str, agent: Agent) -> Outcome | None:
        """What came of one agent; None where this attempt has sealed it before."""
        attempt = open_joined(self._store, self._joined, pipeline=self._pipeline.name, partition_key=key)
        if self._goes_on and attempt.own(agent.name) is not None:
            return None
        resources = self._resources[agent.name]
        return run_agent(
            self._store,
            agent,
            attempt,
            resources=resources,
            config_digest=config_digest(agent.own_resources(resources)),
            partition_key=key,
            records=self._of_partition(agent, key),
            policies=self._policies,
            fresh=self._fresh[agent.name],
            log=self._context.log,
        )

    def _of_partition(self, agent: Agent, key: str) -> Any:
        """The rows of an existing asset as the entry. IO managers load a range as a dict by partition key."""
        if not isinstance(agent, ExternalEntry):
            return None
        if not isinstance(self._records, Mapping) or key not in self._records:
            found = type(self._records).__name__
            what = f"The asset {'/'.join(agent.asset_key)} came as {found}, in which its partitions cannot be told apart"
            fix = "give it an IO manager that loads a dict by partition key, or backfill with a run each"
            raise WiringError(what, agent=agent.name, fix=fix)
        return self._records[key]

    def _untold(self, keys: Sequence[str]) -> dict[str, Seal]:
        """By agent and partition, what was sealed by a run of this attempt that died before it told."""
        workflows = [f"{self._pipeline.name}/{key}" for key in keys]
        found = (seal for one in self._agents for seal in untold(self._context.instance, self._store, self._pipeline, one, workflows))
        return {f"{seal.agent} {seal.workflow_id.removeprefix(f'{self._pipeline.name}/')}": seal for seal in found}

    def _tell_workflows(self, keys: Sequence[str]) -> None:
        """As tags of the run; in its log where they are more than its tags."""
        workflows = [f"{self._pipeline.name}/{key}" for key in keys]
        self._context.instance.add_run_tags(self._context.run.run_id, workflow_tags(workflows))
        if len(workflows) > WORKFLOWS_TAGGED:
            self._context.log.info(f"{len(workflows)} workflows: {', '.join(workflows)}")

    def _failure(self, count: int) -> dg.Failure:
        partitions = {key: f"{agent}: {why}" if agent else why for key, (agent, why) in self._failed.items()}
        error = PartitionsFailedError(partitions, count=count, pipeline=self._pipeline.name)
        rows = [dg.TableRecord({"partition": key, "agent": agent, "why": why}) for key, (agent, why) in self._failed.items()]
        schema = dg.TableSchema([dg.TableColumn(name) for name in ("partition", "agent", "why")])
        failure = dg.Failure(
            str(error),
            metadata={
                "failed": dg.MetadataValue.table(rows[:_SHOWN], schema=schema),
                "failed_partitions": dg.MetadataValue.json(list(self._failed)),
                "failed_count": len(self._failed),
                "completed_count": count - len(self._failed),
            },
            allow_retries=False,
        )
        failure.__cause__ = error
        return failure
