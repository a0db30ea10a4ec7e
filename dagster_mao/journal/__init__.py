"""The journal: what agents are about to do to the world outside, what became of it, and who undoes it. SQL, no Dagster, no Delta.

Importing this imports no SQLAlchemy: only what needs the journal itself does.
"""

from typing import TYPE_CHECKING, Any

from dagster_mao.errors import WiringError
from dagster_mao.gateway import shared_store
from dagster_mao.journal._effect import Effect, EffectState, NotDoneError, batch_key, effect_key, hidden

if TYPE_CHECKING:
    from dagster_mao.journal._calling import Calling, Chunk
    from dagster_mao.journal._journal import Journal
    from dagster_mao.journal._sagas import Sagas
    from dagster_mao.journal._step import Step

__all__ = [
    "Calling",
    "Chunk",
    "Effect",
    "EffectState",
    "Journal",
    "NotDoneError",
    "Sagas",
    "Step",
    "batch_key",
    "effect_key",
    "hidden",
    "journal_of",
]

_OF_THE_DATABASE = {"Calling": "_calling", "Chunk": "_calling", "Journal": "_journal", "Sagas": "_sagas", "Step": "_step"}


def journal_of(database: str | None) -> "Journal":
    """The journal in a store's database. Raises `WiringError` where it has none."""
    if database is None:
        raise WiringError(
            "Effects are journaled in an SQL database, and none is named",
            field="database",
            fix="give the state store a database: `postgresql://user@host/database`, or, for one host, the path of an SQLite file",
        )
    from dagster_mao.journal._journal import Journal

    return Journal(shared_store(database))


def __getattr__(name: str) -> Any:
    if name not in _OF_THE_DATABASE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_OF_THE_DATABASE[name]}"), name)
