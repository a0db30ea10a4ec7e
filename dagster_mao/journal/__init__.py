"""The journal: what agents are about to do to the world outside, what became of it, and who undoes it. SQL, no Dagster, no Delta.

Importing this imports no SQLAlchemy: only what needs the journal itself does.
"""

from typing import TYPE_CHECKING, Any

from dagster_mao.journal._effect import Effect, EffectState, NotDoneError, batch_key, effect_key, hidden

if TYPE_CHECKING:
    from dagster_mao.journal._calling import Calling, Chunk
    from dagster_mao.journal._journal import Journal
    from dagster_mao.journal._sagas import Sagas
    from dagster_mao.journal._step import Step

__all__ = ["Calling", "Chunk", "Effect", "EffectState", "Journal", "NotDoneError", "Sagas", "Step", "batch_key", "effect_key", "hidden"]

_OF_THE_DATABASE = {"Calling": "_calling", "Chunk": "_calling", "Journal": "_journal", "Sagas": "_sagas", "Step": "_step"}


def __getattr__(name: str) -> Any:
    if name not in _OF_THE_DATABASE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_OF_THE_DATABASE[name]}"), name)
