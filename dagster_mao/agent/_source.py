"""What an agent's version is a hash of: sources, code, settings; and which names its code loads."""

from __future__ import annotations

import datetime as dt
import functools
import json
import linecache
import types
from collections.abc import Iterator
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from dagster_mao.agent._annotations import closure


def names_loaded(function: types.FunctionType) -> Iterator[Any]:
    held = closure(function)
    for code in _codes(function.__code__):
        for name in _globals_of(code):
            if name in function.__globals__:
                yield function.__globals__[name]
        for name in code.co_freevars:
            if name in held:
                yield held[name]


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


@functools.lru_cache(maxsize=1024)
def _globals_of(code: types.CodeType) -> frozenset[str]:
    # Not co_names: those are attributes too, and `record.credit_score` names no agent.
    import dis

    return frozenset(str(i.argval) for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))


def source_of(function: types.FunctionType) -> bytes:
    """The source of the function's module; of a session without files (python -c, a prompt) the function's code itself."""
    linecache.checkcache(function.__code__.co_filename)
    lines = linecache.getlines(function.__code__.co_filename, function.__globals__)
    if lines:
        return "".join(lines).replace("\r\n", "\n").encode()
    return "\n".join(_fingerprint(code) for code in _codes(function.__code__)).encode()


def _fingerprint(code: types.CodeType) -> str:
    constants = [sorted(map(repr, c)) if isinstance(c, frozenset) else repr(c) for c in code.co_consts if not isinstance(c, types.CodeType)]
    return json.dumps([code.co_name, code.co_code.hex(), code.co_names, code.co_varnames, constants])


def canonical(settings: dict[str, Any]) -> bytes:
    return json.dumps(settings, sort_keys=True, default=_plain).encode() if settings else b""


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(map(repr, value))
    if isinstance(value, (Path, dt.date, dt.timedelta)):
        return str(value)
    return f"{type(value).__module__}.{type(value).__qualname__}"  # never its repr: addresses differ from process to process
