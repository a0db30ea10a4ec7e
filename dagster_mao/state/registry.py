"""The registry: what agents declared of themselves when they sealed. A file per declaration, called after its digest, never changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from dagster_mao.errors import ReaderRefusedError, TamperedError
from dagster_mao.state.objects import Objects
from dagster_mao.state.seal import Seal

_known: set[tuple[str, str]] = set()  # by root and path: what this process has seen there need not be looked for again


def registration_path(pipeline: str, agent: str, digest: str) -> str:
    """Where a declaration lies, relative to the store's root."""
    return f"registry/{pipeline}/{agent}/{digest}.json"


def register(objects: Objects, pipeline: str, agent: str, told: Mapping[str, Any]) -> str:
    """Keeps a declaration, durably, unless it is there; its digest."""
    content = json.dumps(told, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    digest = hashlib.sha256(content).hexdigest()
    path = registration_path(pipeline, agent, digest)
    if (objects.root, path) not in _known:
        if not objects.exists(path):
            objects.put_if_absent(path, content)
        _known.add((objects.root, path))
    return digest


def refuse_reader(seal: Seal, *names: str) -> None:
    """Raises `ReaderRefusedError` where an agent named who may read it, and whoever goes by these names is not among them."""
    if seal.readers is not None and not set(names) & set(seal.readers):
        raise ReaderRefusedError(
            f"{names[0]!r} may not read {seal.agent!r}, which is for {', '.join(seal.readers) or 'nobody'}",
            agent=names[0],
            workflow=seal.workflow_id,
            fix=f"let {seal.agent!r} name it in `readers`, and seal again; what was sealed before keeps the readers that it had",
        )


def registered(objects: Objects, seal: Seal) -> dict[str, Any] | None:
    """What the agent of a seal had declared; None of seals older than the registry. Raises `TamperedError` where it was changed."""
    if seal.registration is None:
        return None
    path = registration_path(seal.pipeline, seal.agent, seal.registration)
    content = objects.get(path)
    if hashlib.sha256(content).hexdigest() != seal.registration:
        raise TamperedError(f"{path} is not what was registered", agent=seal.agent, workflow=seal.workflow_id)
    told: dict[str, Any] = json.loads(content)
    return told
