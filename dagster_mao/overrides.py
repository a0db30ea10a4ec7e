"""What operators change of agents' policies, and whose answers they want anew: checked against the pipeline before anything is called."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from dagster_mao.agent import check_judge_policy, check_policy
from dagster_mao.boundary import EVERY, in_force, judge_policy
from dagster_mao.errors import WiringError
from dagster_mao.pipeline import Pipeline


def changes_of(pipeline: Pipeline, overrides: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The changes by agent of a pipeline, by `agent.judge`, and "*", of overrides by these, with `pipeline.` before them or without.

    Raises `WiringError` for an agent or a field that there is not, and for values that make no policy, or none
    for that agent.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, changes in overrides.items():
        if (agent := _own(pipeline, name)) is not None:
            if not isinstance(changes, Mapping):
                raise WiringError(f"{changes!r} changes no policy", agent=name, field="policies", fix="give fields of it: {'timeout': 10}")
            found.setdefault(agent, {}).update(changes)
    for agent, declared in pipeline.agents.items() if found else ():
        check_policy(declared, in_force(declared.policy, found, agent))
        for judge in declared.panel:
            check_judge_policy(declared, judge, judge_policy(declared, judge, found))
    return found


def _own(pipeline: Pipeline, name: str) -> str | None:
    """The agent that a name means, or the judge, as `agent.judge`: None for one that is said to be of another pipeline.

    Raises `WiringError` for one that there is not.
    """
    before, dot, after = name.rpartition(".")
    agent = pipeline.agents.get(before.removeprefix(f"{pipeline.name}."))
    if agent is not None and agent.panel and before != pipeline.name:
        if after not in (judges := [judge.name for judge in agent.panel]):
            fix = f"it has {', '.join(judges)}"
            raise WiringError(f"Agent {agent.name!r} has no judge {after!r}", agent=agent.name, field="policies", fix=fix)
        return f"{agent.name}.{after}"
    if dot and before != pipeline.name:
        return None
    return after if after == EVERY else pipeline.node(after).name


def fresh_agents(pipeline: Pipeline, names: Iterable[str]) -> frozenset[str]:
    """The agents whose kept answers are not to be used, of names as overrides take them. Raises `WiringError` for one that there is not."""
    meant = {_own(pipeline, name) for name in names}
    return frozenset(pipeline.agents) if EVERY in meant else frozenset(name for name in meant if name is not None)
