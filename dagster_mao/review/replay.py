"""Replay: one agent run again on exactly what it saw at a version, with today's code. It seals nothing and has no effects."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dagster_mao.agent import Agent
from dagster_mao.boundary import Check, Rehearsal, WouldBe, WouldHave, in_force, run_agent
from dagster_mao.configuration import config_digest
from dagster_mao.errors import UnknownVersionError
from dagster_mao.pipeline import Pipeline
from dagster_mao.review.diff import Difference, compared
from dagster_mao.review.history import sealed
from dagster_mao.state import Beside, CallSummary, Rehearsed, Seal, StateStore


@dataclass(frozen=True)
class Replay:
    """What today's code makes of what the agent saw then. `seal` is the version, `made` the row that it would be now; nobody else sees it.

    `difference` is from the one to the other, record by record. `effects` did not happen: they are what would have. `frozen`: nobody was
    asked.
    """

    seal: Seal
    made: Seal
    difference: Difference
    checks: tuple[Check, ...]
    effects: tuple[WouldHave, ...]
    calls: CallSummary
    frozen: bool

    @property
    def same(self) -> bool:
        """Whether the same records come out, and as many are kept out and wait."""
        kept_out = [(seal.quarantined, seal.deferred or 0) for seal in (self.seal, self.made)]
        return self.difference.equal and kept_out[0] == kept_out[1]


def replay(
    store: StateStore,
    pipeline: Pipeline,
    version: Seal | str,
    *,
    resources: Mapping[str, Any] | None = None,
    live: bool = False,
    limit: int | None = None,
    log: logging.Logger | None = None,
) -> Replay:
    """Runs the agent of a version again, on the versions that it read, with its time and seed, and compares what comes out with what was
    sealed. `limit` bounds the records that are listed.

    Nothing is sealed, journaled, kept, or told in the table of calls, and no file of the store is written: what a step writes goes into a
    folder that is thrown away. `ctx.effect` notes what would have happened, and returns nothing. Nobody is asked, unless `live`: what the
    agent asks is answered by what was kept then, and what is missing is an `AnswerNotFrozenError`. Those are the answers that the shared
    database keeps, of an agent whose policy keeps some; they are answers of one code version, so that after a change they are missing. An
    agent whose resources all have `__mao_frozen__`, as `mao.LLM` has, is run, and its resources answer from what they froze. An agent
    without such a policy is run. Live, breakers and limits count from zero, and are not shared.

    Raises `UnknownVersionError` for a version that read nothing, and what `run_agent` raises where today's code refuses the batch.
    """
    seal = sealed(store, version) if isinstance(version, str) else version
    if seal.kind not in ("entry", "output") or not seal.parents:
        what = f"{seal.reference} is {'an entry' if seal.kind == 'entry' else f'a {seal.kind}'}: it was made from no version"
        raise UnknownVersionError(what, workflow=seal.workflow_id, fix="name a version of an agent that reads others")
    agent, given = pipeline.node(seal.agent), dict(resources or {})
    taken = agent.own_resources(given)
    twins = {name: _frozen(one) for name, one in given.items()} if not live else given
    effects = WouldBe(personal=_is_personal(agent))
    # What is thrown away is not on the store's disk: it may be another one, and is not to change.
    with tempfile.TemporaryDirectory(prefix="dagster-mao-replay-") as folder:
        beside = Beside(store, folder)
        attempt = Rehearsed(beside, seal)
        outcome = run_agent(
            beside,
            agent,
            attempt,
            resources=twins,
            config_digest=config_digest(taken),
            partition_key=attempt.workflow_key if pipeline.partitions_def is not None else None,
            policies={agent.name: {"isolate": False}} if agent.policy is not None and agent.policy.isolate else None,
            log=log,
            rehearsal=Rehearsal(effects, kept_in=store if not live and _takes_kept(agent, taken) else None),
        )
        difference = compared(seal, outcome.seal, store.read, beside.read_made, limit=limit)
    return Replay(seal, outcome.seal, difference, outcome.checks, effects.told, outcome.calls, frozen=not live)


def _takes_kept(agent: Agent, taken: Mapping[str, Any]) -> bool:
    """Whether its answers are the ones that were kept: whoever it asks cannot answer from what was frozen."""
    freezes = bool(taken) and all(hasattr(one, "__mao_frozen__") for one in taken.values())
    return in_force(agent.policy, {}, agent.name).keep_answers > 0 and not freezes


def _frozen(resource: Any) -> Any:
    return resource.__mao_frozen__() if hasattr(resource, "__mao_frozen__") else resource


def _is_personal(agent: Agent) -> bool:
    contracts = [agent.output, *(read.contract for read in agent.inputs)]
    return any(contract.key in contract.personal for contract in contracts if contract.key)
