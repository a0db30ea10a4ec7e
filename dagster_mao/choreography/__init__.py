"""Choreography: agents that start by themselves when what they read is sealed. The state log is the bus.

No Dagster here: its sensors call `tick` (of an inbox, `cut`) and its runs `run_batch` (`run_inbox`); in plain Python, `drain` does all of
it. Importing this room imports SQLAlchemy.
"""

from dagster_mao.choreography._batches import LEASE, Batch, BatchTakenError, abandon
from dagster_mao.choreography._deliveries import redeliver, tick
from dagster_mao.choreography._drain import Drained, drain, enter
from dagster_mao.choreography._due import Due, Subscriber, due, subscribers
from dagster_mao.choreography._inbox import Intake, Submitted, cut, intake_workflow, run_inbox, submit, take
from dagster_mao.choreography._lag import STUCK_AFTER, Stuck, SubscriberState, lag
from dagster_mao.choreography._launching import attempts_of, done_of, held, redeliver_batch, workflows_of
from dagster_mao.choreography._run import Delivered, run_batch

__all__ = [
    "LEASE",
    "STUCK_AFTER",
    "Batch",
    "BatchTakenError",
    "Delivered",
    "Drained",
    "Due",
    "Intake",
    "Stuck",
    "Submitted",
    "Subscriber",
    "SubscriberState",
    "abandon",
    "attempts_of",
    "cut",
    "done_of",
    "drain",
    "due",
    "enter",
    "held",
    "intake_workflow",
    "lag",
    "redeliver",
    "redeliver_batch",
    "run_batch",
    "run_inbox",
    "submit",
    "subscribers",
    "take",
    "tick",
    "workflows_of",
]
