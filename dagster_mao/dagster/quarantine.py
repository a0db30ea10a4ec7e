"""The quarantine as an asset beside its agent's: what it shows, and what it is called."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from dagster_mao.agent import Agent
from dagster_mao.contract import field_of
from dagster_mao.dagster.anchors import STATE_VERSION
from dagster_mao.dagster.metadata import of_seal, reasons_table
from dagster_mao.pipeline import Pipeline
from dagster_mao.review.quarantine import Refusal, refusals_of
from dagster_mao.state import QUARANTINE_SCHEMA, QUARANTINE_SUFFIX, Seal, StateStore

QUARANTINE_OF = "mao/quarantine_of"
"""Metadata of a quarantine's spec: whose it is. The IO manager reads it, because an agent may have any name."""

_NOTHING = hashlib.sha256(b"").hexdigest()  # the data version of a quarantine without a file
_SHOWN, _SAMPLES = 20, 3
_DESCRIBED = {
    "record": "The record's key as text; null where it has none",
    "side": "Which side of the boundary refused it: input or output",
    "upstream": "Whose records the input contract is about; null on the output side",
    "rules": "The rules that it broke",
    "values": "What came in, as JSON; personal fields are not masked",
    "masked": "What came in, as JSON; personal fields are masked",
    "digest": "sha256 of the values: the same refusal met again",
    "attempt": "The run that set out to seal the batch",
}


def quarantine_key(pipeline: str, agent: str) -> dg.AssetKey:
    return dg.AssetKey([pipeline, f"{agent}{QUARANTINE_SUFFIX}"])


def column_schema() -> dg.TableSchema:
    """The columns of every quarantine."""
    return dg.TableSchema([dg.TableColumn(name, str(dtype), _DESCRIBED[name]) for name, dtype in QUARANTINE_SCHEMA.items()])


def of_quarantining(pipeline: Pipeline, agent: Agent) -> dict[str, Any]:
    """What is known of a quarantine before anything ran."""
    return {
        QUARANTINE_OF: agent.name,
        "dagster/column_schema": column_schema(),
        "dagster/table_name": f"{pipeline.name}.{agent.name}{QUARANTINE_SUFFIX}",
        **_limit(agent),
    }


def of_quarantine(store: StateStore, seal: Seal, pipeline: Pipeline) -> dict[str, Any]:
    """What a state version keeps in quarantine, masked. It carries no seal digest: the agent's materialisation is the anchor."""
    found = refusals_of(store, seal)
    came_in = seal.row_count + seal.quarantined + (seal.deferred or 0)
    return {
        STATE_VERSION: dg.MetadataValue.text(seal.reference),
        "mao/quarantined": seal.quarantined,
        "mao/quarantined_share": seal.quarantined / came_in if came_in else 0.0,
        "mao/came_in": came_in,
        **_limit(pipeline.node(seal.agent)),
        **({"mao/rules": reasons_table(_by_rule(found)), "mao/records": _records(found[:_SHOWN])} if found else {}),
        "mao/digest": dg.MetadataValue.text(seal.quarantine_digest or _NOTHING),
        "mao/workflow": dg.MetadataValue.text(seal.workflow_id),
        "mao/attempt": dg.MetadataValue.dagster_run(seal.attempt),
        "dagster/row_count": len(found),
        "dagster/column_schema": column_schema(),
        "dagster/table_name": f"{seal.pipeline}.{seal.agent}{QUARANTINE_SUFFIX}",
        "dagster/uri": f"{seal.uri}{QUARANTINE_SUFFIX}",
    }


def data_version(seal: Seal) -> dg.DataVersion:
    return dg.DataVersion(seal.quarantine_digest or _NOTHING)


def report(instance: dg.DagsterInstance, pipeline: Pipeline, store: StateStore, seal: Seal) -> None:
    """Tells Dagster of a version that was sealed outside of a run: the UI shows it, and the event log anchors it."""
    partition = seal.workflow_id.removeprefix(f"{pipeline.name}/") if pipeline.partitions_def else None
    nobodys = {name: dg.MetadataValue.text(f"{seal.attempt} (not a run)") for name in ("mao/attempt", "mao/sealed_by")}
    told = [(dg.AssetKey([pipeline.name, seal.agent]), of_seal(seal, pipeline, reused=False) | nobodys, seal.digest)]
    if pipeline.node(seal.agent).quarantine is not None:
        aside = of_quarantine(store, seal, pipeline) | {"mao/attempt": nobodys["mao/attempt"]}
        told.append((quarantine_key(pipeline.name, seal.agent), aside, data_version(seal).value))
    for key, metadata, digest in told:
        tags = {"dagster/data_version": digest, "dagster/data_version_is_user_provided": "true", "dagster/code_version": seal.agent_version}
        instance.report_runless_asset_event(dg.AssetMaterialization(key, metadata=metadata, partition=partition, tags=tags))


def _limit(agent: Agent) -> dict[str, Any]:
    return {"mao/max_share": float(agent.quarantine.max_share)} if agent.quarantine else {}


def _by_rule(found: Sequence[Refusal]) -> list[Mapping[str, Any]]:
    """Rule, field, number of refusals and the first of these, most frequent first."""
    broken: dict[str, list[Refusal]] = {}
    for refusal in found:
        for rule in refusal.rules:
            broken.setdefault(rule, []).append(refusal)
    ordered = sorted(broken.items(), key=lambda item: -len(item[1]))
    return [{"rule": rule, "field": _field(rule, rows), "count": len(rows), "samples": _samples(rule, rows)} for rule, rows in ordered]


def _field(rule: str, rows: Sequence[Refusal]) -> str:
    """The field that a rule is about, if it is among what came in; a rule may be about the record as a whole."""
    name = field_of(rule)
    return name if any(name in row.values for row in rows) else ""


def _samples(rule: str, rows: Sequence[Refusal]) -> list[dict[str, Any]]:
    name = field_of(rule)
    return [{"record": row.record, **({name: row.values[name]} if name in row.values else {})} for row in rows[:_SAMPLES]]


def _about(refusal: Refusal) -> Mapping[str, Any]:
    """What the broken rules are about, for a table that fits the page; all of it where they are about the record as a whole."""
    return {name: value for name, value in refusal.values.items() if refusal.is_about(name)} or refusal.values


def _records(found: Sequence[Refusal]) -> dg.TableMetadataValue:
    names = ("record", "side", "upstream", "rules", "values")
    rows = [
        {
            **{name: getattr(refusal, name) or "" for name in names[:3]},
            "rules": "\n".join(refusal.rules),
            "values": json.dumps(_about(refusal), ensure_ascii=False),
        }
        for refusal in found
    ]
    return dg.MetadataValue.table([dg.TableRecord(row) for row in rows], schema=dg.TableSchema([dg.TableColumn(n) for n in names]))
