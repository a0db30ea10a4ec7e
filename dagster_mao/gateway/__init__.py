"""The gateway: what every call of an agent passes through. No Dagster, no Delta in this room."""

from dagster_mao.gateway._gateway import Gateway, shared_store
from dagster_mao.gateway._policy import Breaker, Policy, TransientError, parse_rate

__all__ = ["Breaker", "Gateway", "Policy", "TransientError", "parse_rate", "shared_store"]
