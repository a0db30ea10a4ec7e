"""Masking: what a contract marks `Personal` is never shown.

The seal carries the contract's description, so this needs none of the pipeline's code. What the description does not speak of is masked
too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dagster_mao.state.seal import Seal

MASK = "***"


def masked(seal: Seal, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a sealed snapshot, with its personal values (at any depth) replaced, nulls among them: that there is none can say a lot."""
    fields = fields_of(seal)
    return {name: hide(fields.get(name), value) for name, value in row.items()}


def fields_of(seal: Seal) -> dict[str, Mapping[str, Any]]:
    """The contract's fields by name, as the seal describes them; empty when it holds no description."""
    try:
        return _by_name(json.loads(seal.contract_schema))
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}


def hide(field: Mapping[str, Any] | None, value: Any) -> Any:
    """The value, masked where its field's description says so or there is no description."""
    if field is None or field.get("personal"):
        return MASK
    if isinstance(value, Mapping):
        inner = _by_name(field)
        return {name: hide(inner.get(name), part) for name, part in value.items()} if inner else MASK
    if isinstance(value, list):
        items = field.get("items")
        return [hide(items if isinstance(items, Mapping) else {}, part) for part in value]
    return value


def is_personal(field: Mapping[str, Any] | None) -> bool:
    """Whether nothing of the field may be shown."""
    return field is None or bool(field.get("personal"))


def _by_name(described: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {field["name"]: field for field in described.get("fields") or ()}
