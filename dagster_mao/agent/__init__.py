"""Agents: named units of work with declared contracts. What a user writes; it knows nothing of Dagster, Delta or other agents.

A function becomes an agent by `@agent`, a class by deriving from `Agent`. Positional parameters are upstream agents (or, first, the
context), their annotations are the contracts; keyword-only parameters are resources.
"""

from dagster_mao.agent._agent import RESERVED_RESOURCES, Agent, FunctionAgent, agent
from dagster_mao.agent._batching import MicroBatch
from dagster_mao.agent._declared import NAME, AgentContext, Input, Quarantine, Shape
from dagster_mao.agent._effects import EffectKind, NoEffects, Undo, call_compensate, check_pivots, is_async_undo
from dagster_mao.agent._fallback import Fallback, check_policy
from dagster_mao.agent._guard import current
from dagster_mao.agent._judge import Judge, Verdict, check_asked, check_judge_policy
from dagster_mao.agent._registration import registration

__all__ = [
    "NAME",
    "RESERVED_RESOURCES",
    "Agent",
    "AgentContext",
    "EffectKind",
    "Fallback",
    "FunctionAgent",
    "Input",
    "Judge",
    "MicroBatch",
    "NoEffects",
    "Quarantine",
    "Shape",
    "Undo",
    "Verdict",
    "agent",
    "call_compensate",
    "check_asked",
    "check_judge_policy",
    "check_pivots",
    "check_policy",
    "current",
    "is_async_undo",
    "registration",
]
