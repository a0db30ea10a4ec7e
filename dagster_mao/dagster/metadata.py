"""What the UI tells: of an agent when the code location loads, of a state version when it is sealed, of a check when it is evaluated."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dagster as dg

from dagster_mao.advice import advise
from dagster_mao.agent import Agent, Input
from dagster_mao.boundary import REPORT, VERDICTS, Check
from dagster_mao.contract import Contract, columns, compare
from dagster_mao.dagster.anchors import SEAL_DIGEST, STATE_VERSION
from dagster_mao.pipeline import Pipeline
from dagster_mao.review.contract import Consumer, asked, page
from dagster_mao.review.deferred import waiting
from dagster_mao.state import CallSummary, Parent, Seal, StateStore

PERSONAL_TAG = "personal"
_DEFERRED_SHOWN = 20


def column_schema(contract: Contract[Any]) -> dg.TableSchema:
    """The contract as the UI's column schema: types, descriptions, constraints; personal fields, whole or in part, are tagged."""
    return dg.TableSchema(
        columns=[
            dg.TableColumn(
                name=column.name,
                type=column.type,
                description="\n".join([*([column.description] if column.description else []), *column.parts]) or None,
                constraints=dg.TableColumnConstraints(
                    nullable=column.nullable,
                    unique=column.name == contract.key,
                    other=[told for told in column.constraints if told != "unique"],
                ),
                tags={PERSONAL_TAG: ""} if column.personal else {PERSONAL_TAG: "in_part"} if column.personal_part else {},
            )
            for column in columns(contract)
        ]
    )


def column_lineage(pipeline: Pipeline, agent: Agent) -> dg.TableColumnLineage | None:
    """From which columns an agent's columns may come; None for the entry.

    An agent is a closed box, so the sound answer is given: the key comes from the keys, any other column from any column that the
    agent declares to read. What an agent does not declare cannot have been used: that is what reviewers look for.
    """
    if agent.is_entry:
        return None
    read = [
        (dg.TableColumnDep(dg.AssetKey([pipeline.name, bound.upstream]), name), name == bound.contract.key)
        for bound in agent.inputs
        for name in bound.contract.schema
    ]
    keys = [dep for dep, is_key in read if is_key]
    rest = [dep for dep, is_key in read if not is_key] or keys
    return dg.TableColumnLineage({name: (keys if name == agent.output.key and keys else rest) for name in agent.output.schema})


def of_agent(pipeline: Pipeline, agent: Agent) -> dict[str, Any]:
    """What is known before anything ran."""
    contract = agent.output
    return {
        "dagster/column_schema": column_schema(contract),
        "dagster/table_name": f"{pipeline.name}.{agent.name}",
        "mao/contract": _contract(contract.name, contract.version),
        "mao/contract_hash": contract.hash,
        "mao/contract_page": dg.MetadataValue.md(page(contract.describe(), consumers(pipeline, agent))),
        **({} if agent.readers is None else {"mao/readers": dg.MetadataValue.text(", ".join(agent.readers) or "nobody")}),
        **{f"mao/input_{i.upstream}": dg.MetadataValue.md(_reading(pipeline, i)) for i in agent.inputs},
    }


def of_pattern(pipeline: Pipeline) -> dict[str, Any]:
    """How the pipeline is coordinated, and which pattern its declaration asks for: of its jobs."""
    advice = advise(pipeline)
    return {
        "mao/mode": dg.MetadataValue.text(pipeline.mode),
        "mao/advice": dg.MetadataValue.md(advice.as_markdown()),
        "mao/agents": advice.agents,
        "mao/connections": dg.MetadataValue.text(f"{advice.connections} of {advice.possible} possible"),
    }


def consumers(pipeline: Pipeline, agent: Agent) -> list[Consumer]:
    """Who reads the agent's output, as what, and what they ask beyond."""
    promised = agent.output.describe()
    return [
        Consumer(
            name,
            _contract(i.contract.name, i.contract.version),
            tuple(i.contract.schema),
            tuple(compare(promised, i.contract.describe())),
        )
        for name in pipeline.downstreams(agent.name)
        for i in pipeline.node(name).inputs
        if i.upstream == agent.name
    ]


def _reading(pipeline: Pipeline, read: Input) -> str:
    producer = pipeline.output_of(read.upstream)
    names = [f"{contract.name} v{contract.version}" for contract in (producer, read.contract)]
    return f"{names[0]}, read as {names[1]}\n\n{asked(compare(producer.describe(), read.contract.describe()))}"


def of_seal(seal: Seal, pipeline: Pipeline, *, reused: bool, calls: CallSummary | None = None) -> dict[str, Any]:
    """What the state log says of a state version. `calls` is what those of this step came to, where that is not what the seal says."""
    agent = pipeline.node(seal.agent)
    came_to = calls or (CallSummary.model_validate_json(seal.usage) if seal.usage else CallSummary())
    lineage = column_lineage(pipeline, agent)
    return {
        STATE_VERSION: dg.MetadataValue.text(seal.reference),
        SEAL_DIGEST: dg.MetadataValue.text(seal.seal_digest),
        "mao/previous_seal_digest": dg.MetadataValue.text(seal.previous_digest),
        "mao/digest": dg.MetadataValue.text(seal.digest),
        "mao/kind": seal.kind,
        "mao/parents": parents_table(seal.parents),
        "mao/workflow": dg.MetadataValue.text(seal.workflow_id),
        "mao/audit": dg.MetadataValue.text(f"dagster-mao audit {shlex.quote(seal.workflow_id)}"),
        "mao/attempt": dg.MetadataValue.dagster_run(seal.attempt),
        "mao/plan": dg.MetadataValue.text(", ".join(seal.plan)),
        "mao/base": seal.base,
        "mao/epoch": seal.epoch,
        "mao/now": dg.MetadataValue.timestamp(seal.now),
        "mao/seed": dg.MetadataValue.text(str(seal.seed)),  # more digits than the browser's numbers hold
        "mao/sealed_by": dg.MetadataValue.dagster_run(seal.run_id),
        "mao/sealed_at": dg.MetadataValue.timestamp(seal.sealed_at),
        "mao/reused": reused,
        "mao/quarantined": seal.quarantined,
        "mao/deferred": seal.deferred or 0,
        "mao/fallbacks": seal.fallbacks or 0,
        **of_calls(came_to),
        **of_judges(seal),
        **({"mao/policy": dg.MetadataValue.json(json.loads(seal.policy))} if seal.policy else {}),
        "mao/latency_seconds": seal.latency_seconds,
        "mao/size_bytes": seal.size_bytes,
        **({"mao/registration": dg.MetadataValue.text(seal.registration)} if seal.registration else {}),
        "mao/agent_version": dg.MetadataValue.text(seal.agent_version),
        "mao/contract": _contract(seal.contract, seal.contract_version),
        "mao/contract_hash": dg.MetadataValue.text(seal.contract_hash),
        "mao/config": dg.MetadataValue.text(seal.config),
        "mao/snapshot": dg.MetadataValue.path(seal.path),
        "mao/library_version": dg.MetadataValue.text(seal.library_version),
        "dagster/row_count": seal.row_count,
        "dagster/column_schema": column_schema(agent.output),
        "dagster/table_name": f"{seal.pipeline}.{seal.agent}",
        "dagster/uri": seal.uri,
        **({"dagster/column_lineage": lineage} if lineage else {}),
        **({"mao/model": seal.model} if seal.model else {}),
    }


def of_calls(came_to: CallSummary) -> dict[str, Any]:
    """What calls came to, as numbers that the UI plots: zeros too. Only percentiles of no calls are left out, which a zero would belie."""
    percentiles = {f"mao/call_{name}": value for name in ("p50_seconds", "p95_seconds", "p99_seconds") if (value := getattr(came_to, name))}
    return {
        "mao/calls": came_to.calls,
        "mao/tries": came_to.tries,
        "mao/calls_reused": came_to.reused,
        "mao/calls_refused": came_to.refused,
        "mao/error_rate": came_to.error_rate,
        **{name: float(value) for name, value in percentiles.items()},
        "mao/input_tokens": came_to.input_tokens,
        "mao/output_tokens": came_to.output_tokens,
        "mao/cost": came_to.cost,
    }


def of_deferred(store: StateStore, seal: Seal) -> dict[str, Any]:
    """The records that wait for the next run: the first of them, with whose call was not made and which breaker was open."""
    rows = [dg.TableRecord({name: value or "" for name, value in row.items()}) for row in waiting(store, seal, limit=_DEFERRED_SHOWN)]
    return {"mao/deferred_records": dg.MetadataValue.table(rows, schema=_strings("record", "agent", "why"))} if rows else {}


def parents_table(parents: Iterable[Parent]) -> dg.TableMetadataValue:
    rows = [dg.TableRecord({"agent": p.agent, "version": f"{p.workflow_id}@{p.version}", "digest": p.digest}) for p in parents]
    return dg.MetadataValue.table(rows, schema=_strings("agent", "version", "digest"))


def of_check(check: Check) -> dict[str, Any]:
    """A check's metadata; its reasons and parents as tables that can be read in the UI."""
    told = {name: _plain(value) for name, value in check.metadata.items() if name not in ("reasons", "parents", REPORT, VERDICTS)}
    file = check.metadata.get(REPORT)
    reasons, parents, verdicts = (check.metadata.get(name) for name in ("reasons", "parents", VERDICTS))
    return {
        **({"reasons": reasons_table(reasons)} if reasons else {}),
        **({VERDICTS: verdicts_table(verdicts)} if verdicts else {}),
        **({"parents": parents_table(map(Parent.model_validate, parents))} if parents else {}),
        **({REPORT: dg.MetadataValue.url(file) if "://" in file else dg.MetadataValue.path(file)} if file else {}),
        **told,
    }


def reasons_table(reasons: Sequence[Mapping[str, Any]]) -> dg.TableMetadataValue:
    """Which rule, on which field, how many records, and the first of them (masked by the contract already)."""
    rows = [
        dg.TableRecord(
            {
                "rule": str(reason["rule"]),
                "field": str(reason.get("field") or ""),
                "count": int(reason["count"]),
                "samples": "\n".join(json.dumps(sample, default=str, ensure_ascii=False) for sample in reason.get("samples", ())),
            }
        )
        for reason in reasons
    ]
    schema = dg.TableSchema(
        [dg.TableColumn(name, "int" if name == "count" else "string") for name in ("rule", "field", "count", "samples")]
    )
    return dg.MetadataValue.table(rows, schema=schema)


def verdicts_table(verdicts: Sequence[Mapping[str, Any]]) -> dg.TableMetadataValue:
    """Records that a judge did not pass, or did not judge (masked by the contract already)."""
    names = ("record", "votes", "score", "reason")
    rows = [dg.TableRecord({name: "" if row[name] is None else str(row[name]) for name in names}) for row in verdicts]
    return dg.MetadataValue.table(rows, schema=_strings(*names))


def of_judges(seal: Seal) -> dict[str, Any]:
    """What judges said of a version, as numbers that the UI plots: what could not be judged has no score."""
    judged: dict[str, dict[str, Any]] = json.loads(seal.judged) if seal.judged else {}
    told: dict[str, Any] = {}
    for name, one in judged.items():
        numbers = {word: float(one[word]) for word in ("score", "share_passed", "cost") if one.get(word) is not None}
        numbers |= {word: int(one[word]) for word in ("judged", "not_judged")}
        told |= {f"mao/judge_{name}_{word}": value for word, value in numbers.items()}
    return told


def _strings(*names: str) -> dg.TableSchema:
    return dg.TableSchema([dg.TableColumn(name) for name in names])


def _contract(name: str, version: str) -> str:
    return f"{name} v{version}"


def _plain(value: Any) -> Any:
    # Lists and dicts would be rendered by Dagster only when they are JSON all the way down.
    return dg.MetadataValue.json(json.loads(json.dumps(value, default=str))) if isinstance(value, (list, tuple, dict)) else value
