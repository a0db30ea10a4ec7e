"""Choreography: agents that start by themselves when what they read is sealed. The state log is the bus.

No Dagster here: its sensors call `tick` and its runs `run_batch`; in plain Python, `drain` does both. Importing this room imports
SQLAlchemy.
"""

from dagster_mao.choreography._batches import LEASE, Batch, BatchTakenError, abandon
from dagster_mao.choreography._deliveries import redeliver, tick
from dagster_mao.choreography._due import Due, Subscriber, due, subscribers
from dagster_mao.choreography._run import Delivered, Drained, drain, enter, run_batch

__all__ = [
    "LEASE",
    "Batch",
    "BatchTakenError",
    "Delivered",
    "Drained",
    "Due",
    "Subscriber",
    "abandon",
    "drain",
    "due",
    "enter",
    "redeliver",
    "run_batch",
    "subscribers",
    "tick",
]
