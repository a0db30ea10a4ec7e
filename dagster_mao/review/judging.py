"""A judge as a predicate for `bisect`: asked, live, about each version that is looked at."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Mapping
from typing import Any

import polars as pl

from dagster_mao.agent import AgentContext, Judge, NoEffects
from dagster_mao.boundary import Judgement, asked_about
from dagster_mao.contract import Contract
from dagster_mao.errors import UnknownVersionError, WiringError
from dagster_mao.pipeline import Pipeline
from dagster_mao.state import Beside, Rehearsed, Seal, StateStore


class AskedJudge:
    """Whether a judge of an agent passes a version: today's judge, about the sample of that version, asked anew.

    Good is a version of whose judged records at least the judge's `min_share` pass. Each look costs calls, which are made under the judge's
    policy, and leaves nothing: no answer is kept, no call logged, no breaker shared. A judge may say something else the next time: let
    `bisect` ask several times (`repeat`). `judgements` are those of all looks.

    Raises `WiringError` when there is no such judge, or the version is another agent's, and `UnknownVersionError` when some of its sample
    could not be judged: then nobody knows whether it is good.
    """

    of_rows = True

    def __init__(self, pipeline: Pipeline, agent: str, judge: str, resources: Mapping[str, Any] | None = None) -> None:
        self._agent, self._resources = pipeline.node(agent), dict(resources or {})
        found = next((one for one in self._agent.panel if one.name == judge), None)
        if found is None:
            there = ", ".join(one.name for one in self._agent.panel) or "none"
            raise WiringError(f"Agent {agent!r} has no judge {judge!r}", agent=agent, field="judge", fix=f"there is {there}")
        self._judge: Judge = found
        self.name = f"judge {agent}.{judge}"
        self.judgements: list[Judgement] = []

    def __call__(self, store: StateStore, seal: Seal) -> bool:
        agent = self._agent
        if seal.agent != agent.name:
            what = f"{seal.reference} is by {seal.agent or 'nobody'}, whom {self.name} does not judge"
            raise WiringError(
                what, agent=seal.agent, field="agent", fix=f"look at the versions of {agent.name!r} only: agent={agent.name!r}"
            )
        rows = _as(agent.output, store, seal)
        parents = {one.agent: store.seal_at(one.workflow_id, one.version) for one in seal.parents}
        read = {one.upstream: _as(one.contract, store, parents[one.upstream]) for one in agent.inputs if one.upstream in self._judge.reads}
        with tempfile.TemporaryDirectory(prefix="dagster-mao-judge-") as folder:
            beside = Beside(store, folder)
            attempt = Rehearsed(beside, seal)
            context = AgentContext(
                workflow_id=seal.workflow_id,
                agent=agent.name,
                attempt=seal.attempt,
                run_id=seal.run_id,
                now=seal.now,
                seed=seal.seed,
                having=NoEffects(agent.name),
                log=logging.getLogger(f"dagster_mao.agent.{agent.name}"),
            )
            told = asked_about(beside, agent, self._judge, attempt, context, self._resources, rows, seal.row_count, read)
        self.judgements.append(told)
        if told.unjudged:
            why = ", ".join(sorted(set(told.unjudged.values())))
            raise UnknownVersionError(
                f"{len(told.unjudged)} records of {seal.reference} were not judged ({why})",
                agent=agent.name,
                workflow=seal.workflow_id,
                fix="bisect again when the judge answers",
            )
        return told.reached


def _as(contract: Contract[Any], store: StateStore, seal: Seal) -> pl.LazyFrame:
    """The rows of a version as rows of today's contract. Raises `IncompatibleContractError`."""
    return contract.upgrade(store.read(seal), json.loads(seal.contract_schema))
