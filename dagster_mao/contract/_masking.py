"""Masking by a contract's description: what it marks `Personal` is never shown, and what it does not speak of is masked too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MASK = "***"


def hide(field: Mapping[str, Any] | None, value: Any) -> Any:
    """The value, masked where its field's description says so or there is no description."""
    if field is None or field.get("personal"):
        return MASK
    if isinstance(value, Mapping):
        inner = by_name(field)
        return {name: hide(inner.get(name), part) for name, part in value.items()} if inner else MASK
    if isinstance(value, list):
        items = field.get("items")
        return [hide(items if isinstance(items, Mapping) else {}, part) for part in value]
    return value


def by_name(described: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The fields of a description by name."""
    return {field["name"]: field for field in described.get("fields") or ()}
