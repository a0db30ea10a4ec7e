"""The gateway: what every call of an agent passes through. No Dagster, no Delta in this room."""

from dagster_mao.gateway._gateway import Gateway, shared_store
from dagster_mao.gateway._policy import Breaker, Policy, TransientError, parse_rate
from dagster_mao.gateway._record import CallOutcome, CallRecord, usage

__all__ = ["Breaker", "CallOutcome", "CallRecord", "Gateway", "Policy", "TransientError", "parse_rate", "shared_store", "usage"]
