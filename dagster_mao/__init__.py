"""Multi-agent pipelines on Dagster: agents as assets, outputs as sealed, versioned Delta snapshots, contracts as asset checks.

What a user writes is here: contracts are pydantic models whose fields carry `Key` and `Personal`, agents are made by `agent` or `Agent`,
a `Pipeline` wires them, `run` runs one without Dagster. The names of the Dagster side are imported when first asked for.
"""

from typing import TYPE_CHECKING, Any

from dagster_mao.advice import Advice, advise
from dagster_mao.agent import Agent, AgentContext, Judge, MicroBatch, Quarantine, Undo, Verdict, agent
from dagster_mao.contract import DataFrame, FromFallback, Key, LazyFrame, Personal
from dagster_mao.errors import (
    AgentCallError,
    AgentFailedError,
    AnswerNotFrozenError,
    BatchRefusedError,
    BreakerOpenError,
    CallProcessError,
    CallTimeoutError,
    ContractDefinitionError,
    EventsRefusedError,
    FencedError,
    IncompatibleContractError,
    InvalidRecordsError,
    LLMRequestError,
    MalformedAnswerError,
    MaoError,
    PartitionsFailedError,
    PinError,
    RateLimitError,
    ReaderRefusedError,
    StaleStateError,
    StoreError,
    TamperedError,
    UnknownBreakerError,
    UnknownVersionError,
    WiringError,
)
from dagster_mao.expectations import Expectations
from dagster_mao.gateway import Breaker, Policy, TransientError, usage
from dagster_mao.journal import Effect, NotDoneError
from dagster_mao.pipeline import ExternalEntry, Pipeline
from dagster_mao.resubmission import Resubmission, resubmit
from dagster_mao.review import as_of, bisect, replay
from dagster_mao.run import Result, run
from dagster_mao.state import Seal, StateStore

if TYPE_CHECKING:
    from dagster_mao.choreography import submit
    from dagster_mao.dagster import AgentTranslator, PolicyOverrides, StateIOManager, StateStoreResource, build_asset, build_definitions
    from dagster_mao.integrations.llm import LLM

__all__ = [
    "LLM",
    "Advice",
    "Agent",
    "AgentCallError",
    "AgentContext",
    "AgentFailedError",
    "AgentTranslator",
    "AnswerNotFrozenError",
    "BatchRefusedError",
    "Breaker",
    "BreakerOpenError",
    "CallProcessError",
    "CallTimeoutError",
    "ContractDefinitionError",
    "DataFrame",
    "Effect",
    "EventsRefusedError",
    "Expectations",
    "ExternalEntry",
    "FencedError",
    "FromFallback",
    "IncompatibleContractError",
    "InvalidRecordsError",
    "Judge",
    "Key",
    "LLMRequestError",
    "LazyFrame",
    "MalformedAnswerError",
    "MaoError",
    "MicroBatch",
    "NotDoneError",
    "PartitionsFailedError",
    "Personal",
    "PinError",
    "Pipeline",
    "Policy",
    "PolicyOverrides",
    "Quarantine",
    "RateLimitError",
    "ReaderRefusedError",
    "Resubmission",
    "Result",
    "Seal",
    "StaleStateError",
    "StateIOManager",
    "StateStore",
    "StateStoreResource",
    "StoreError",
    "TamperedError",
    "TransientError",
    "Undo",
    "UnknownBreakerError",
    "UnknownVersionError",
    "Verdict",
    "WiringError",
    "advise",
    "agent",
    "as_of",
    "bisect",
    "build_asset",
    "build_definitions",
    "replay",
    "resubmit",
    "run",
    "submit",
    "usage",
]

_DAGSTER_SIDE = frozenset(
    {"AgentTranslator", "PolicyOverrides", "StateIOManager", "StateStoreResource", "build_asset", "build_definitions"}
)


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from dagster_mao.integrations import llm

        return llm.LLM
    if name == "submit":
        from dagster_mao import choreography  # which imports SQLAlchemy

        return choreography.submit
    if name not in _DAGSTER_SIDE:
        raise AttributeError(f"module 'dagster_mao' has no attribute {name!r}")
    # Importing Dagster takes seconds, which a notebook or a test of agents need not pay.
    from dagster_mao import dagster

    return getattr(dagster, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
