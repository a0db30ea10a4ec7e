"""Chain integrity: does the store still hold what was sealed? A check of its own, so that it can be run from the UI at any time."""

from collections.abc import Iterator
from typing import Any

import dagster as dg

from dagster_mao.dagster.anchors import STATE_VERSION, read_anchors
from dagster_mao.dagster.assets import check_spec
from dagster_mao.dagster.resources import STATE_STORE
from dagster_mao.errors import UnknownVersionError
from dagster_mao.pipeline import Pipeline
from dagster_mao.state import StateStore
from dagster_mao.state.verify import Finding, Report, verify

CHAIN_INTEGRITY = "chain_integrity"
_DESCRIPTION = "Are the snapshots, the chain of seals and Dagster's event log still what they were when this agent's output was sealed?"


def build_chain_checks(pipeline: Pipeline) -> dg.AssetChecksDefinition:
    """One check per agent, in one step for all of them: a step of its own process costs seconds, the check milliseconds.

    On a partitioned pipeline a check is of the partition's workflow, else of the workflow that the agent's newest materialisation
    belongs to.
    """

    def chain_integrity(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        store = getattr(context.resources, STATE_STORE).store()
        for key in sorted(context.selected_asset_check_keys):
            workflow = f"{pipeline.name}/{context.partition_key}" if context.has_partition_key else _newest(context.instance, key.asset_key)
            yield dg.AssetCheckResult(
                check_name=CHAIN_INTEGRITY, asset_key=key.asset_key, **_verdict(store, context.instance, key.asset_key, workflow)
            )

    wrap = dg.multi_asset_check(
        name=f"{pipeline.name}__{CHAIN_INTEGRITY}",
        specs=[check_spec(CHAIN_INTEGRITY, pipeline, agent, description=_DESCRIPTION, blocking=False) for agent in pipeline.order],
        required_resource_keys={STATE_STORE},
        can_subset=True,
    )
    return wrap(chain_integrity)


def _newest(instance: dg.DagsterInstance, key: dg.AssetKey) -> str | None:
    event = instance.get_latest_materialization_event(key)
    if event is None or event.asset_materialization is None:
        return None
    told = event.asset_materialization.metadata.get(STATE_VERSION)
    return str(told.value).rpartition("@")[0] if told else None


def _verdict(store: StateStore, instance: dg.DagsterInstance, key: dg.AssetKey, workflow: str | None) -> dict[str, Any]:
    if workflow is None:
        return {"passed": True, "description": "Nothing was materialised yet."}
    anchors = read_anchors(instance, asset_keys=[key])
    try:
        report = verify(store, workflow, agent=key.path[-1], anchors=anchors)
    except UnknownVersionError:
        return {"passed": True, "description": f"Nothing was sealed yet in {workflow}."}
    what = f"{len(report.findings)} findings" if report.findings else f"{report.versions} versions are what was sealed"
    return {"passed": report.good, "description": f"{workflow}: {what}.", "metadata": _told(workflow, report)}


def _told(workflow: str, report: Report) -> dict[str, Any]:
    tables = {name: _table(found) for name, found in (("findings", report.findings), ("warnings", report.warnings)) if found}
    return {
        **tables,
        "mao/workflow": dg.MetadataValue.text(workflow),
        "versions": report.versions,
        "files": report.files,
        "anchored": report.anchored,
    }


def _table(findings: tuple[Finding, ...]) -> dg.TableMetadataValue:
    names = ("kind", "version", "file", "detail")
    rows = [
        dg.TableRecord({name: "" if (value := getattr(finding, name)) is None else str(value) for name in names}) for finding in findings
    ]
    return dg.MetadataValue.table(rows, schema=dg.TableSchema([dg.TableColumn(name) for name in names]))
