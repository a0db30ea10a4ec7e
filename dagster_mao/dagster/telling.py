"""What a step tells Dagster of a workflow: checks, the materialisation, or why there is none."""

from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import dagster as dg
from pydantic import ValidationError

from dagster_mao.agent import Agent
from dagster_mao.boundary import PINNED_BASE, Check, Outcome
from dagster_mao.correlation import Whose, WorkflowLog
from dagster_mao.dagster.anchors import SEAL_DIGEST
from dagster_mao.dagster.metadata import of_calls, of_check, of_deferred, of_seal
from dagster_mao.dagster.quarantine import data_version, of_quarantine, quarantine_key
from dagster_mao.errors import FencedError, MaoError, PinError, StaleStateError, TamperedError
from dagster_mao.pipeline import Pipeline
from dagster_mao.review.calls import told_of
from dagster_mao.state import CallSummary, Seal, StateStore

UNPINNED = (FencedError, PinError, StaleStateError, TamperedError)
_SHOWN = 200  # rows of a table in the UI
_NO_EVENT = "NULL"  # as Dagster writes it
_TRACES = 5  # errors of a run whose stack traces are told
_CLOCKS = 60.0  # seconds by which those of a sealer and of Dagster may differ


def result(key: dg.AssetKey, check: Check) -> dg.AssetCheckResult:
    """A boundary check as the result that a step yields."""
    return dg.AssetCheckResult(
        passed=check.passed,
        check_name=check.name,
        asset_key=key,
        severity=_severity(check),
        description=check.description,
        metadata=of_check(check),
    )


def failure(error: MaoError) -> dg.Failure:
    """The error as the end of a step that is not to be tried again."""
    told = {f"{check.name}: {name}": value for check in error.checks if not check.passed for name, value in of_check(check).items()}
    paid = {} if error.calls is None else of_calls(error.calls)
    return dg.Failure(str(error), metadata=told | paid, allow_retries=False)


def verdicts(error: MaoError) -> tuple[Check, ...]:
    """The checks that were reached before the error, the one that it is about included."""
    if isinstance(error, UNPINNED) and not error.checks:
        return (Check(PINNED_BASE, False, str(error)),)
    return error.checks


def paid_in_vain(key: dg.AssetKey, error: MaoError, partition: str | None) -> Iterator[dg.AssetObservation]:
    """What the calls of a step came to that sealed nothing: nothing is materialised, and the UI plots it all the same."""
    if error.calls is not None and error.calls != CallSummary():
        told = f"No version was sealed: {told_of(error.calls)}."
        yield dg.AssetObservation(key, told, partition=partition, metadata=of_calls(error.calls))


def of_asset(store: StateStore, pipeline: Pipeline, outcome: Outcome) -> dict[str, Any]:
    """The metadata of an agent's materialisation."""
    return of_deferred(store, outcome.seal) | of_seal(outcome.seal, pipeline, reused=outcome.reused, calls=outcome.calls)


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


class Failed(NamedTuple):
    """A workflow of which nothing was sealed, and why: a sentence."""

    workflow_id: str
    why: str


class Telling:
    """Tells of many workflows in one step, of each when it is through, as events of the agent's asset: a step's outputs come once.

    An agent's boundary checks are of one partition each; without partitions there is one result per run, of all its workflows.
    """

    def __init__(
        self, context: dg.OpExecutionContext | dg.AssetExecutionContext, store: StateStore, pipeline: Pipeline, agent: Agent
    ) -> None:
        self._context, self._store, self._pipeline, self.agent = context, store, pipeline, agent
        self._key = dg.AssetKey([pipeline.name, agent.name])
        self._checks: dict[str, list[tuple[str, Check]]] = {}  # by name, where they have no partition of their own
        self.failures: list[Failed] = []
        self.sealed_count = 0

    def sealed(self, outcome: Outcome) -> Iterator[Any]:
        """A version was sealed, by this run or by one that died before it told."""
        seal = outcome.seal
        self.sealed_count += 1
        partition = self._partition(seal.workflow_id)
        yield from self._evaluations(seal.workflow_id, outcome.checks)
        metadata = of_asset(self._store, self._pipeline, outcome)
        yield dg.AssetMaterialization(self._key, metadata=metadata, partition=partition, tags=self._tags(seal, seal.digest))
        if self.agent.quarantine is not None:
            aside = of_quarantine(self._store, seal, self._pipeline)
            key, version = quarantine_key(self._pipeline.name, self.agent.name), data_version(seal).value
            yield dg.AssetMaterialization(key, metadata=aside, partition=partition, tags=self._tags(seal, version))

    def failed(self, workflow_id: str, error: MaoError, *, again: str = "") -> Iterator[Any]:
        """Nothing was sealed. `again` says when it is tried again; without it, it counts as failed."""
        yield from self._evaluations(workflow_id, verdicts(error))
        yield from paid_in_vain(self._key, error, self._partition(workflow_id))
        if again:
            self._log(workflow_id).warning(f"{error} {again}")
            return
        self.failures.append(Failed(workflow_id, type(error).__name__))
        trace = without_values(error) if len(self.failures) <= _TRACES else None
        self._log(workflow_id).error(str(error), exc_info=trace)

    def given_up(self, workflow_id: str, why: str) -> None:
        """Nothing was sealed, and there is no error that says so."""
        self.failures.append(Failed(workflow_id, why))
        self._log(workflow_id).error(why)

    def summary(self) -> Iterator[dg.AssetCheckEvaluation]:
        """The checks of workflows that have no partition: one result each, of all of them."""
        for name, told in self._checks.items():
            bad = [(workflow, check) for workflow, check in told if not check.passed]
            workflow, worst = next(((w, c) for w, c in bad if c.severity == "error"), bad[0] if bad else told[-1])
            facts = of_check(worst)
            what = worst.description
            if len(told) > 1:
                what = f"{len(told) - len(bad)} of {len(told)} workflows passed. {workflow}: {worst.description}"
                facts |= {"workflows": len(told), "failed": failures_table([Failed(w, c.description) for w, c in bad])}
            yield dg.AssetCheckEvaluation(
                asset_key=self._key, check_name=name, passed=not bad, severity=_severity(worst), description=what, metadata=facts
            )
        self._checks.clear()

    def end(self, *, outcome: str = "the others were sealed") -> None:
        """Raises `dg.Failure` when a workflow failed: the run is seen, what was sealed stays so."""
        if self.failures:
            raise dg.Failure(
                f"{_counted(self.failures)} failed; {outcome}. {_named(self.failures)}",
                metadata={"failed": failures_table(self.failures), "failed_count": len(self.failures), "sealed_count": self.sealed_count},
                allow_retries=False,
            )

    def _log(self, workflow_id: str) -> WorkflowLog:
        return WorkflowLog(self._context.log, Whose(workflow_id, self.agent.name))

    def _partition(self, workflow_id: str) -> str | None:
        """None for what came in beside the partitions, as a batch of events does."""
        key = workflow_id.removeprefix(f"{self._pipeline.name}/")
        return key if key in self._partitions else None

    def _tags(self, seal: Seal, version: str) -> dict[str, str]:
        """What Dagster adds to the materialisation of a step's output, and tells by what is out of date: here each has its own parents."""
        told = {
            "dagster/data_version": version,
            "dagster/data_version_is_user_provided": "true",
            "dagster/code_version": seal.agent_version,
        }
        partition = self._partition(seal.workflow_id)
        for parent in seal.parents:
            key = dg.AssetKey([seal.pipeline, parent.agent])
            told[f"dagster/input_data_version/{key.to_user_string()}"] = parent.digest
            told[f"dagster/input_event_pointer/{key.to_user_string()}"] = self._pointer(key, partition, parent.digest)
        return told

    def _pointer(self, key: dg.AssetKey, partition: str | None, digest: str) -> str:
        """The event that told of a parent's version, by which Dagster knows of a partition whether something newer came."""
        if partition is None:
            return _NO_EVENT
        wanted = dg.AssetRecordsFilter(key, asset_partitions=[partition])
        for record in self._context.instance.fetch_materializations(wanted, limit=5).records:
            told = record.asset_materialization
            if told is not None and (told.tags or {}).get("dagster/data_version") == digest:
                return str(record.storage_id)
        return _NO_EVENT

    @cached_property
    def _partitions(self) -> frozenset[str]:
        declared = self._pipeline.partitions_def
        return frozenset(declared.get_partition_keys(dynamic_partitions_store=self._context.instance)) if declared else frozenset()

    def _evaluations(self, workflow_id: str, checks: Iterable[Check]) -> Iterator[dg.AssetCheckEvaluation]:
        partition = self._partition(workflow_id)
        for check in checks:
            if partition is None:
                self._checks.setdefault(check.name, []).append((workflow_id, check))
                continue
            yield dg.AssetCheckEvaluation(
                asset_key=self._key,
                check_name=check.name,
                passed=check.passed,
                severity=_severity(check),
                description=check.description,
                metadata=of_check(check),
                partition=partition,
            )


def untold(instance: dg.DagsterInstance, store: StateStore, pipeline: Pipeline, agent: Agent, workflows: Iterable[str]) -> list[Seal]:
    """The newest seals of an agent in these workflows of which Dagster was not told: whoever sealed them died first."""
    found = store.seals_of(workflows).values()
    own = [seal for seals in found for seal in [one for one in seals if one.agent == agent.name and one.path][-1:]]
    if not own:
        return []
    since = min(seal.sealed_at for seal in own).timestamp() - _CLOCKS
    wanted = dg.AssetRecordsFilter(dg.AssetKey([pipeline.name, agent.name]), after_timestamp=since)
    told, cursor, has_more = set[str](), None, True
    while has_more:
        page = instance.fetch_materializations(wanted, limit=1000, cursor=cursor)
        told |= {
            str(one.metadata[SEAL_DIGEST].value) for r in page.records if (one := r.asset_materialization) and SEAL_DIGEST in one.metadata
        }
        cursor, has_more = page.cursor, page.has_more
    return [seal for seal in own if seal.seal_digest not in told]


def failures_table(failures: Sequence[Failed]) -> dg.TableMetadataValue:
    """The first of them, as a table for the UI."""
    rows = [dg.TableRecord({"workflow": one.workflow_id, "why": one.why}) for one in failures[:_SHOWN]]
    return dg.MetadataValue.table(rows, schema=dg.TableSchema([dg.TableColumn("workflow"), dg.TableColumn("why")]))


def _counted(failures: Sequence[Failed]) -> str:
    return f"{len(failures)} workflow{'s' if len(failures) > 1 else ''}"


def _named(failures: Sequence[Failed]) -> str:
    told = "; ".join(f"{one.workflow_id} ({one.why})" for one in failures[:10])
    return f"{told}; and {len(failures) - 10} more" if len(failures) > 10 else told


def _severity(check: Check) -> dg.AssetCheckSeverity:
    return dg.AssetCheckSeverity.WARN if check.severity == "warn" else dg.AssetCheckSeverity.ERROR
