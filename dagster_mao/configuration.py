"""What of the configuration of an agent's resources counts: it is part of a seal, and of what makes a kept answer the same answer."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from enum import Enum
from typing import Any

from pydantic import BaseModel, SecretBytes, SecretStr
from pydantic.fields import FieldInfo

# What a field that holds a secret is called. Only the end counts: `max_tokens` and `secret_name` are no secrets.
_SECRET = re.compile(
    r"(^|_)(api_?key|access_?key|secret_?key|private_?key|secret|password|passwd|passphrase|token|credentials?|dsn)$", re.IGNORECASE
)
_IN_MEMORY = re.compile(r" at 0x[0-9a-f]+")  # what an object without a text of its own is called: another in each process
_PASSWORD_IN_URL = re.compile(r"(?<=://)([^/@:\s]*):[^/@\s]*@")


def config_digest(resources: Mapping[str, Any]) -> str:
    """sha256 over what counts of the configuration of the resources that an agent is handed; empty for an agent that takes none.

    A resource may say what counts by a method `__mao_config__(self) -> dict`, JSON-able. Of other pydantic models (Dagster's configurable
    resources are such) all fields count but secrets: `SecretStr`, fields that are excluded or marked `dagster__is_secret`, those that are
    called `…_key`, `…token`, `password` and the like, and the passwords in URLs. Of any other object only its class.

    So a secret that was changed keeps the digest, and cannot be guessed from it.
    """
    if not resources:
        return ""
    told = {name: [type(resource).__qualname__, _counting(resource)] for name, resource in resources.items()}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _counting(resource: Any) -> Any:
    return _told(resource) if hasattr(resource, "__mao_config__") or isinstance(resource, BaseModel) else None


def _told(value: Any) -> Any:
    if isinstance(value, Enum):
        value = value.value
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return _PASSWORD_IN_URL.sub(r"\1@", value)
    if hasattr(value, "__mao_config__") and not isinstance(value, type):
        return _told(dict(value.__mao_config__()))
    if isinstance(value, BaseModel):
        counting = {name: getattr(value, name) for name, field in type(value).model_fields.items() if not _is_secret(name, field)}
        return {name: _told(one) for name, one in {**counting, **(value.model_extra or {})}.items()}
    if isinstance(value, Mapping):
        return {str(name): _told(one) for name, one in value.items() if not _SECRET.search(str(name))}
    if isinstance(value, (list, tuple)):
        return [_told(one) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(_told(one), sort_keys=True) for one in value)
    if isinstance(value, (SecretStr, SecretBytes)):
        return None
    text = str(value)  # of paths, dates and the like: what they are
    return type(value).__qualname__ if _IN_MEMORY.search(text) else _told(text)


def _is_secret(name: str, field: FieldInfo) -> bool:
    extra = field.json_schema_extra
    marked = isinstance(extra, Mapping) and bool(extra.get("dagster__is_secret"))
    return marked or bool(field.exclude) or _SECRET.search(name) is not None
