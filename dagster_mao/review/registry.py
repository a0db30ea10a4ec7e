"""The versions of agents, as their seals name them: since when, how many versions each made, and what changed from one to the next."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import polars as pl

from dagster_mao.contract import Change
from dagster_mao.errors import UnknownVersionError
from dagster_mao.review.contract import contract_changes
from dagster_mao.state import Seal, StateStore

_NAMED_BY = ("pipeline", "agent", "registration", "agent_version", "contract_hash", "model")
_LEFT_OUT = ("contract", "name")  # the contract has its own changes


@dataclass(frozen=True)
class AgentVersion:
    """What an agent was when it sealed. `declared` is what it said of itself then; None of seals from before there was a registry.

    `first` and `last` are the seals that name it first and last, `seals` counts them all.
    """

    pipeline: str
    agent: str
    registration: str | None
    first: Seal = field(repr=False)
    last_sealed: dt.datetime
    seals: int
    declared: Mapping[str, Any] | None = field(repr=False)

    @property
    def owners(self) -> tuple[str, ...]:
        return tuple((self.declared or {}).get("owners", ()))

    @property
    def facts(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return {
            "pipeline": self.pipeline,
            "agent": self.agent,
            "registration": self.registration,
            "agent_version": self.first.agent_version,
            "contract": self.first.contract,
            "contract_version": self.first.contract_version,
            "contract_hash": self.first.contract_hash,
            "model": self.first.model,
            "first_sealed": self.first.reference,
            "first_sealed_at": self.first.sealed_at,
            "last_sealed_at": self.last_sealed,
            "seals": self.seals,
            "declared": self.declared,
        }


@dataclass(frozen=True)
class AgentDifference:
    """From one version of an agent to another: `declared` maps what it says otherwise to its two values, `contract` is what changed in its

    output contract.
    """

    before: AgentVersion
    after: AgentVersion
    declared: Mapping[str, tuple[Any, Any]]
    contract: tuple[Change, ...]


def agent_versions(store: StateStore, pipeline: str | None = None, agent: str | None = None) -> list[AgentVersion]:
    """The versions of all agents, or of some, by agent and in the order of their first seals.

    Raises `UnknownVersionError` where nothing by this name was sealed, `TamperedError` where a declaration is not what was registered.
    """
    rows = store.log().filter(pl.col("kind").is_in(["entry", "output"]))
    for name, wanted in (("pipeline", pipeline), ("agent", agent)):
        rows = rows if wanted is None else rows.filter(pl.col(name) == wanted)
    first = pl.struct("workflow_id", "version").sort_by("sealed_at", "workflow_id", "version").first()
    grouped = rows.group_by(*_NAMED_BY).agg(first=first, since=pl.col("sealed_at").min(), last=pl.col("sealed_at").max(), seals=pl.len())
    found = store.collect(grouped.sort("pipeline", "agent", "since"))
    if found.is_empty() and (pipeline or agent):
        what = "/".join(name for name in (pipeline, agent) if name)
        raise UnknownVersionError(f"Nothing was sealed by {what}", fix="`dagster-mao agents list` lists who sealed")
    seals = store.seals_of({row["first"]["workflow_id"] for row in found.iter_rows(named=True)})
    return [_version(store, seals[row["first"]["workflow_id"]][row["first"]["version"]], row) for row in found.iter_rows(named=True)]


def _version(store: StateStore, first: Seal, row: Mapping[str, Any]) -> AgentVersion:
    return AgentVersion(row["pipeline"], row["agent"], row["registration"], first, row["last"], row["seals"], store.registered(first))


def agent_diff(before: AgentVersion, after: AgentVersion) -> AgentDifference:
    """What is said otherwise by the later one. What was not registered is compared by what the seals say."""
    sides = [_flat(one.declared or {"agent_version": one.first.agent_version, "model": one.first.model}) for one in (before, after)]
    names = [name for name in dict.fromkeys([*sides[0], *sides[1]]) if name not in _LEFT_OUT]
    changed = {name: (sides[0].get(name), sides[1].get(name)) for name in names if sides[0].get(name) != sides[1].get(name)}
    return AgentDifference(before, after, changed, contract_changes(before.first, after.first))


def _flat(declared: Mapping[str, Any]) -> dict[str, Any]:
    """With the fields of policies and the like under names of their own: policy.timeout."""
    flat: dict[str, Any] = {}
    for name, value in declared.items():
        if name == "judges":  # each with fields of its own
            flat |= {f"{name}.{judge}.{part}": told for judge, one in value.items() for part, told in one.items()}
        elif isinstance(value, Mapping) and name not in _LEFT_OUT:
            flat |= {f"{name}.{part}": told for part, told in value.items()}
        else:
            flat[name] = value
    return flat
