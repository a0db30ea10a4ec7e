"""What an agent declares of itself, as JSON can say it: what the registry keeps, and the versions that it made name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dagster_mao.agent._agent import Agent


def registration(agent: Agent) -> dict[str, Any]:
    """Code version, contracts, owners, policies, model and who may read it. Nothing in it changes between two runs of the same code."""
    return {
        "name": agent.name,
        "description": agent.description,
        "owners": list(agent.owners),
        "agent_version": agent.agent_version,
        "model": agent.model,
        "contract": {
            "name": agent.output.name,
            "version": agent.output.version,
            "hash": agent.output.hash,
            "schema": agent.output.describe(),
        },
        "reads": {
            read.upstream: {"contract": read.contract.name, "version": read.contract.version, "hash": read.contract.hash}
            for read in agent.inputs
        },
        "readers": None if agent.readers is None else list(agent.readers),
        "policy": agent.policy.describe() if agent.policy else None,
        "quarantine": {"max_share": agent.quarantine.max_share} if agent.quarantine else None,
        "effects": agent.effects,
        "undo_policy": agent.undo_policy.describe() if agent.undo_policy else None,
        "irreversible_because": agent.irreversible_because,
        # Left out where there are none, so that other agents are what they were before there were judges.
        **({"judges": {judge.name: judge.describe() for judge in agent.panel}} if agent.panel else {}),
    }
