"""Checks of what is stored, which can be run from the UI at any time.

Chain integrity: does the store still hold what was sealed? Accounted: is every record that came to a boundary in one place, once?
Compensated: was everything undone that failed attempts did?
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import dagster as dg

from dagster_mao.dagster.anchors import STATE_VERSION, read_anchors
from dagster_mao.dagster.assets import check_spec
from dagster_mao.dagster.quarantine import quarantine_key
from dagster_mao.dagster.resources import STATE_STORE
from dagster_mao.dagster.saga import COMPENSATED, undone_verdict, with_effects
from dagster_mao.errors import UnknownVersionError
from dagster_mao.pipeline import Pipeline
from dagster_mao.review.quarantine import Account, accounts
from dagster_mao.saga import sagas
from dagster_mao.state import Seal, StateStore
from dagster_mao.state.verify import Finding, Report, verify

CHAIN_INTEGRITY, CHAIN_INTEGRITY_ALL = "chain_integrity", "chain_integrity_all"
ACCOUNTED, ACCOUNTED_ALL = "accounted", "accounted_all"
COMPENSATED_ALL = "compensated_all"
LAG = "lag"
"""The check of an agent that starts by itself: is somebody looking for it, and does nothing wait in vain?"""

_OF_ALL = {CHAIN_INTEGRITY_ALL, ACCOUNTED_ALL, COMPENSATED_ALL}
_CHAIN = "Are the snapshots, the chain of seals and Dagster's event log still what they were when this agent's output was sealed?"
_UNDONE = "Was everything undone that attempts did which failed, or were superseded? As the journal of effects has it."
_ACCOUNTS = "Is every record that came in sealed, in quarantine, discarded or deferred, and in one place only? Recounted from the store."


def build_chain_checks(pipeline: Pipeline) -> list[dg.AssetChecksDefinition]:
    """`chain_integrity` of every agent, `accounted` of every quarantine and of agents whose records may be deferred, `compensated` of

    agents with effects, in one step. A step costs seconds, a check milliseconds.

    They are of the workflow that the newest materialisation belongs to. On a partitioned pipeline they are of the partition's workflow and
    run with it; as the UI does not execute partitioned checks alone, there are `chain_integrity_all` and its like, which it does:
    of all partitions at once.
    """
    if pipeline.partitions_def is None:
        return [_stored_checks(pipeline, CHAIN_INTEGRITY, ACCOUNTED, COMPENSATED)]
    return [
        _stored_checks(pipeline, CHAIN_INTEGRITY, ACCOUNTED, COMPENSATED, of_partition=True),
        _stored_checks(pipeline, CHAIN_INTEGRITY_ALL, ACCOUNTED_ALL, COMPENSATED_ALL),
    ]


def checks_of_all(pipeline: Pipeline) -> list[dg.AssetCheckKey]:
    """Those that go through all partitions, and have no place in the run of one."""
    return [key for made in build_chain_checks(pipeline) for key in made.check_keys if key.name in _OF_ALL]


def _stored_checks(
    pipeline: Pipeline, chain: str, account: str, compensated: str, *, of_partition: bool = False
) -> dg.AssetChecksDefinition:
    def stored(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        if of_partition and not context.has_partition_key:
            # Dagster fails on the result of a partitioned check in a run without a partition ("Execute all" makes one).
            context.log.warning(f"{chain} is of one partition, and this run has none; {chain}_all is of all of them.")
            return
        store = getattr(context.resources, STATE_STORE).store()
        for key in sorted(context.selected_asset_check_keys):
            if key.name == compensated:
                of_one = f"{pipeline.name}/{context.partition_key}" if of_partition else None  # also of such as sealed nothing
                verdict = _undone(store, pipeline, key.asset_key, of_one)
                yield dg.AssetCheckResult(check_name=key.name, asset_key=key.asset_key, **verdict)
                continue
            where = workflows(context, key.asset_key)
            if key.name == account:
                verdict = _accounted(store, accounted[key.asset_key], where)
            else:
                verdict = _verdict(store, context.instance, key.asset_key, where)
            yield dg.AssetCheckResult(check_name=key.name, asset_key=key.asset_key, **verdict)

    def workflows(context: dg.AssetCheckExecutionContext, key: dg.AssetKey) -> list[str]:
        if of_partition:
            return [f"{pipeline.name}/{context.partition_key}"]
        if pipeline.partitions_def is None:
            return _newest(context.instance, key)
        return [f"{pipeline.name}/{partition}" for partition in sorted(context.instance.get_materialized_partitions(key))]

    of_all = "" if of_partition or pipeline.partitions_def is None else "Of all partitions: "
    accounted = accounted_agents(pipeline)
    common: dict[str, Any] = {"blocking": False, "partitioned": of_partition}
    wrap = dg.multi_asset_check(
        name=f"{pipeline.name}__{chain}",
        specs=[
            *(check_spec(chain, pipeline, agent, description=f"{of_all}{_CHAIN}", **common) for agent in pipeline.order),
            *(check_spec(account, pipeline, key.path[-1], description=f"{of_all}{_ACCOUNTS}", **common) for key in accounted),
            *(check_spec(compensated, pipeline, agent, description=f"{of_all}{_UNDONE}", **common) for agent in with_effects(pipeline)),
        ],
        required_resource_keys={STATE_STORE},
        can_subset=True,
    )
    return wrap(stored)


def _undone(store: StateStore, pipeline: Pipeline, key: dg.AssetKey, workflow: str | None) -> dict[str, Any]:
    passed, severity, told, metadata = undone_verdict(sagas(store, pipeline.name, workflow), key.path[-1])
    return {"passed": passed, "severity": severity, "description": told, "metadata": metadata}


def accounted_agents(pipeline: Pipeline) -> dict[dg.AssetKey, str]:
    """Whose records are accounted for, by the asset that says so: the quarantine, else, where records may be deferred, the agent's own."""
    waiting: set[str] = set()
    found = {}
    for name, agent in pipeline.agents.items():
        if (agent.policy is not None and agent.policy.when_open == "defer") or any(read.upstream in waiting for read in agent.inputs):
            waiting.add(name)
        if agent.quarantine is not None:
            found[quarantine_key(pipeline.name, name)] = name
        elif name in waiting and agent.output.key in [read.contract.key for read in agent.inputs if read.contract.key]:
            found[dg.AssetKey([pipeline.name, name])] = name
    return found


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


def _accounted(store: StateStore, agent: str, workflows: Sequence[str]) -> dict[str, Any]:
    found = [accounts(store, seal) for workflow in workflows if (seal := _counted(store, workflow, agent)) is not None]
    if not found:
        return {"passed": True, "description": "Nothing was sealed yet."}
    wrong = [account for account in found if not account.balanced]
    where = found[0].seal.reference if len(found) == 1 else f"{len(found)} workflows"
    sums = {
        name: sum(getattr(account, name) for account in found) for name in ("came_in", "sealed", "quarantined", "discarded", "deferred")
    }
    counted = f"{sums['came_in']:,} came in = {sums['sealed']:,} sealed + {sums['quarantined']:,} quarantined"
    deferred = f" + {sums['deferred']:,} deferred" if sums["deferred"] else ""
    told = f"{where}: {counted} + {sums['discarded']:,} discarded{deferred}."
    if wrong:
        told = f"{where}: the numbers do not add up. {_what_is_wrong(wrong[0])}"
    tables = {"wrong": _wrong_table(wrong)} if wrong else {}
    named = dg.MetadataValue.text(", ".join(account.seal.reference for account in found))
    return {"passed": not wrong, "description": told, "metadata": {**tables, **sums, STATE_VERSION: named}}


def _counted(store: StateStore, workflow: str, agent: str) -> Seal | None:
    """The version that counts: the effective one, or, before any attempt completed, the newest."""
    own = [seal for seal in store.seals(workflow) if seal.agent == agent and seal.path]
    return store.effective(workflow).get(agent) or next(reversed(own), None)


_SAID = {
    "neither": "neither sealed nor in quarantine nor deferred",
    "both": "in two of these places: sealed, in quarantine, deferred",
    "doubled": "sealed more than once",
    "never_came_in": "not among those that came in",
}


def _what_is_wrong(account: Account) -> str:
    if account.wrong_counts:
        return "; ".join(f"{count:,} record{'s' if count > 1 else ''} {_SAID[kind]}" for kind, count in account.wrong_counts.items()) + "."
    seal, held = account.seal, account.quarantined + account.discarded
    said = f"{seal.row_count:,} sealed, {seal.quarantined:,} set aside and {seal.deferred or 0:,} deferred"
    return f"The seal says {said}; there are {account.sealed:,}, {held:,} and {account.deferred:,}."


def _wrong_table(accounts: Sequence[Account]) -> dg.TableMetadataValue:
    rows: list[dict[str, str | int]] = [
        {"version": one.seal.reference, "what": _SAID[kind], "count": count, "records": ", ".join(str(key) for key in one.wrong[kind])}
        for one in accounts
        for kind, count in one.wrong_counts.items()
    ] or [{"version": one.seal.reference, "what": _what_is_wrong(one), "count": 0, "records": ""} for one in accounts]
    schema = dg.TableSchema([dg.TableColumn(name, "int" if name == "count" else "string") for name in rows[0]])
    return dg.MetadataValue.table([dg.TableRecord(row) for row in rows], schema=schema)


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
