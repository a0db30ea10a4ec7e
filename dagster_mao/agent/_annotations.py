"""Reading annotations: which contract, in which shape; written as objects or as strings."""

from __future__ import annotations

import collections.abc
import contextlib
import re
import types
import typing
from typing import Any, NamedTuple

from pydantic import BaseModel

from dagster_mao.agent._declared import Shape
from dagster_mao.contract import DataFrame, LazyFrame


class Annotation(NamedTuple):
    """An annotation as read: `many` is a collection of records (only an entry returns one)."""

    shape: Shape
    model: type[BaseModel]
    optional: bool = False
    many: bool = False


def shape_of(annotation: Any) -> Annotation | None:
    if _is_model(annotation):
        return Annotation(Shape.RECORD, annotation)
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is None or not arguments or not _is_model(arguments[0]):
        return None
    if origin is LazyFrame:
        return Annotation(Shape.LAZYFRAME, arguments[0])
    if origin is DataFrame:
        return Annotation(Shape.DATAFRAME, arguments[0])
    if isinstance(origin, type) and issubclass(origin, collections.abc.Iterable) and not issubclass(origin, collections.abc.Mapping):
        return Annotation(Shape.RECORD, arguments[0], many=True)
    return None


def _is_model(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)


def closure(function: Any) -> dict[str, Any]:
    names, cells = getattr(getattr(function, "__code__", None), "co_freevars", ()), getattr(function, "__closure__", None) or ()
    found = {}
    for name, cell in zip(names, cells, strict=False):
        with contextlib.suppress(ValueError):  # not bound yet
            found[name] = cell.cell_contents
    return found


def locals_named_by(function: Any, frame: types.FrameType) -> dict[str, Any]:
    """The locals of the defining function that annotations written as strings name: a string makes no closure variable."""
    if frame.f_locals is frame.f_globals:
        return {}
    texts = [text for text in getattr(function, "__annotations__", {}).values() if isinstance(text, str)]
    words = {word for text in texts for word in re.findall(r"[^\W\d]\w*", text)}
    return {name: value for name, value in frame.f_locals.items() if name in words}
