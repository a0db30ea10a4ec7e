"""The saga: undoing what a failed attempt did, in order, once, whatever dies meanwhile. Plain Python; knows nothing of Dagster."""

from dagster_mao.saga._saga import ABSENT_SECONDS, Concluded, Left, Plan, PlannedUndo, Saga, Turn, Undone
from dagster_mao.saga._unfinished import SagaState, UndoState, Unfinished, request, sagas, show_up, unfinished

__all__ = [
    "ABSENT_SECONDS",
    "Concluded",
    "Left",
    "Plan",
    "PlannedUndo",
    "Saga",
    "SagaState",
    "Turn",
    "UndoState",
    "Undone",
    "Unfinished",
    "request",
    "sagas",
    "show_up",
    "unfinished",
]
