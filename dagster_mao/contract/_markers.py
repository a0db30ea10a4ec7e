"""What a user writes in annotations: the markers of a field, and the generics that say "a frame of these models"."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import polars as pl

M = TypeVar("M")


class Marker:
    """A word said about a field inside `Annotated[...]`. pydantic carries it along and gives it no meaning of its own."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __repr__(self) -> str:
        return f"mao.{self._name}"

    def __reduce__(self) -> str:
        # Markers are compared by identity, so a pickled one must come back as the same object.
        return self._name


Key = Marker("Key")
"""The field that identifies a record in its batch: `Annotated[str, mao.Key]`. At most one per contract, str or int, unique."""

Personal = Marker("Personal")
"""A field whose values appear in no log, check, report or error: `Annotated[str, mao.Personal]`."""

FromFallback = Marker("FromFallback")
"""The field that says whether an agent's fallback answered: `from_fallback: Annotated[bool, mao.FromFallback] = False`. The platform sets
it; what `execute` puts there does not count."""


if TYPE_CHECKING:
    # To a type checker `mao.LazyFrame[M]` is the polars frame that the agent receives and returns. The other member of the union is there
    # to carry M; deriving from Any, it takes nothing away.
    class _Of(Any, Generic[M]):  # type: ignore[misc]
        pass

    LazyFrame: TypeAlias = pl.LazyFrame | _Of[M]
    DataFrame: TypeAlias = pl.DataFrame | _Of[M]
else:

    class LazyFrame(Generic[M]):
        """Annotation of a frame-wise agent: a `pl.LazyFrame` with the columns of model M. At run time a plain `pl.LazyFrame`."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            raise TypeError("mao.LazyFrame is an annotation; make a polars.LazyFrame and return that")

    class DataFrame(Generic[M]):
        """Annotation of a frame-wise agent: a `pl.DataFrame` with the columns of model M. At run time a plain `pl.DataFrame`."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            raise TypeError("mao.DataFrame is an annotation; make a polars.DataFrame and return that")
