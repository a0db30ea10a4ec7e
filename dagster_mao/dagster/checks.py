"""Chain integrity: does the store still hold what was sealed? A check of its own, so that it can be run from the UI at any time."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import dagster as dg

from dagster_mao.dagster.anchors import STATE_VERSION, read_anchors
from dagster_mao.dagster.assets import check_spec
from dagster_mao.dagster.resources import STATE_STORE
from dagster_mao.errors import UnknownVersionError
from dagster_mao.pipeline import Pipeline
from dagster_mao.state import StateStore
from dagster_mao.state.verify import Finding, Report, verify

CHAIN_INTEGRITY, CHAIN_INTEGRITY_ALL = "chain_integrity", "chain_integrity_all"
_DESCRIPTION = "Are the snapshots, the chain of seals and Dagster's event log still what they were when this agent's output was sealed?"


def build_chain_checks(pipeline: Pipeline) -> list[dg.AssetChecksDefinition]:
    """One check per agent, in one step for all of them: a step of its own process costs seconds, the check milliseconds.

    The check is of the workflow that the agent's newest materialisation belongs to. On a partitioned pipeline it is of the partition's
    workflow and runs with it; because the UI does not execute partitioned checks alone, there is a second one, `chain_integrity_all`, which
    it does: of all partitions at once.
    """
    if pipeline.partitions_def is None:
        return [_chain_checks(pipeline, CHAIN_INTEGRITY, _DESCRIPTION)]
    return [
        _chain_checks(pipeline, CHAIN_INTEGRITY, _DESCRIPTION, of_partition=True),
        _chain_checks(pipeline, CHAIN_INTEGRITY_ALL, f"Of all partitions: {_DESCRIPTION}"),
    ]


def _chain_checks(pipeline: Pipeline, name: str, description: str, *, of_partition: bool = False) -> dg.AssetChecksDefinition:
    def chain_integrity(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        if of_partition and not context.has_partition_key:
            # Dagster fails on the result of a partitioned check in a run without a partition ("Execute all" makes one).
            context.log.warning(f"{name} is of one partition, and this run has none; {CHAIN_INTEGRITY_ALL} is of all of them.")
            return
        store = getattr(context.resources, STATE_STORE).store()
        for key in sorted(context.selected_asset_check_keys):
            yield dg.AssetCheckResult(
                check_name=name,
                asset_key=key.asset_key,
                **_verdict(store, context.instance, key.asset_key, workflows(context, key.asset_key)),
            )

    def workflows(context: dg.AssetCheckExecutionContext, key: dg.AssetKey) -> list[str]:
        if of_partition:
            return [f"{pipeline.name}/{context.partition_key}"]
        if pipeline.partitions_def is None:
            return _newest(context.instance, key)
        return [f"{pipeline.name}/{partition}" for partition in sorted(context.instance.get_materialized_partitions(key))]

    wrap = dg.multi_asset_check(
        name=f"{pipeline.name}__{name}",
        specs=[
            check_spec(name, pipeline, agent, description=description, blocking=False, partitioned=of_partition) for agent in pipeline.order
        ],
        required_resource_keys={STATE_STORE},
        can_subset=True,
    )
    return wrap(chain_integrity)


def _newest(instance: dg.DagsterInstance, key: dg.AssetKey) -> list[str]:
    event = instance.get_latest_materialization_event(key)
    if event is None or event.asset_materialization is None:
        return []
    told = event.asset_materialization.metadata.get(STATE_VERSION)
    return [str(told.value).rpartition("@")[0]] if told else []


def _verdict(store: StateStore, instance: dg.DagsterInstance, key: dg.AssetKey, workflows: Sequence[str]) -> dict[str, Any]:
    anchors = read_anchors(instance, asset_keys=[key])
    reports = dict[str, Report]()
    for workflow in workflows:
        with suppress(UnknownVersionError):  # neither sealed nor anchored
            reports[workflow] = verify(store, workflow, agent=key.path[-1], anchors=anchors)
    if not reports:
        return {"passed": True, "description": "Nothing was sealed yet."}
    findings = [found for report in reports.values() for found in report.findings]
    versions = sum(report.versions for report in reports.values())
    where = next(iter(reports)) if len(reports) == 1 else f"{len(reports)} workflows"
    what = f"{len(findings)} findings" if findings else f"{versions} versions are what was sealed"
    return {"passed": not findings, "description": f"{where}: {what}.", "metadata": _told(reports)}


def _told(reports: Mapping[str, Report]) -> dict[str, Any]:
    found = {kind: [one for report in reports.values() for one in getattr(report, kind)] for kind in ("findings", "warnings")}
    counts = {kind: sum(getattr(report, kind) for report in reports.values()) for kind in ("versions", "files", "anchored")}
    tables = {kind: _table(some) for kind, some in found.items() if some}
    return {**tables, **counts, "mao/workflow": dg.MetadataValue.text(", ".join(reports))}


def _table(findings: Sequence[Finding]) -> dg.TableMetadataValue:
    names = ("kind", "workflow", "version", "file", "detail")
    rows = [
        dg.TableRecord({name: "" if (value := getattr(finding, name)) is None else str(value) for name in names}) for finding in findings
    ]
    return dg.MetadataValue.table(rows, schema=dg.TableSchema([dg.TableColumn(name) for name in names]))
