"""Agents: named units of work with declared contracts. What a user writes; it knows nothing of Dagster, Delta or other agents.

A function becomes an agent by `@agent`, a class by deriving from `Agent`. Positional parameters are upstream agents (or, first, the
context), their annotations are the contracts; keyword-only parameters are resources.
"""

from dagster_mao.agent._agent import RESERVED_RESOURCES, Agent, FunctionAgent, agent
from dagster_mao.agent._declared import NAME, AgentContext, Input, Quarantine, Shape

__all__ = ["NAME", "RESERVED_RESOURCES", "Agent", "AgentContext", "FunctionAgent", "Input", "Quarantine", "Shape", "agent"]
