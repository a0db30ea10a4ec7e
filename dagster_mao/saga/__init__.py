"""The saga: undoing what a failed attempt did, in order, once, whatever dies meanwhile. Plain Python; knows nothing of Dagster."""

from dagster_mao.saga._saga import Concluded, Left, Plan, PlannedUndo, Saga, Undone
from dagster_mao.saga._unfinished import SagaState, UndoState, Unfinished, request, sagas, unfinished

__all__ = [
    "Concluded",
    "Left",
    "Plan",
    "PlannedUndo",
    "Saga",
    "SagaState",
    "UndoState",
    "Undone",
    "Unfinished",
    "request",
    "sagas",
    "unfinished",
]
