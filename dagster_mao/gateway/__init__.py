"""The gateway: what every call of an agent passes through. No Dagster, no Delta in this room."""

from typing import TYPE_CHECKING, Any

from dagster_mao.gateway._gateway import Gateway, shared_store
from dagster_mao.gateway._key import CallKeys, idempotency_key
from dagster_mao.gateway._meter import Meter, enforces_nothing
from dagster_mao.gateway._policy import Breaker, Policy, TransientError, parse_rate
from dagster_mao.gateway._record import CallOutcome, CallRecord, overheard, total, usage
from dagster_mao.gateway._retry import retry_after

if TYPE_CHECKING:
    from dagster_mao.gateway._answers import Answer, Answers, Unlogged
    from dagster_mao.gateway._shared import read_only

__all__ = [
    "Answer",
    "Answers",
    "Breaker",
    "CallKeys",
    "CallOutcome",
    "CallRecord",
    "Gateway",
    "Meter",
    "Policy",
    "TransientError",
    "Unlogged",
    "enforces_nothing",
    "idempotency_key",
    "overheard",
    "parse_rate",
    "read_only",
    "retry_after",
    "shared_store",
    "total",
    "usage",
]


def __getattr__(name: str) -> Any:
    if name in ("Answer", "Answers", "Unlogged"):  # they need SQLAlchemy, which steps import that keep answers
        from dagster_mao.gateway import _answers

        return getattr(_answers, name)
    if name == "read_only":
        from dagster_mao.gateway import _shared

        return _shared.read_only
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
