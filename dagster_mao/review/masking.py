"""Masking: what a contract marks `Personal` is never shown.

The seal carries the contract's description, so this needs none of the pipeline's code. What the description does not speak of is masked
too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from dagster_mao.contract import MASK, by_name, hide
from dagster_mao.state.seal import Seal

__all__ = ["MASK", "fields_of", "hide", "is_personal", "masked"]


def masked(seal: Seal, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of a sealed snapshot, with its personal values (at any depth) replaced, nulls among them: that there is none can say a lot."""
    fields = fields_of(seal)
    return {name: hide(fields.get(name), value) for name, value in row.items()}


def fields_of(seal: Seal) -> dict[str, Mapping[str, Any]]:
    """The contract's fields by name, as the seal describes them; empty when it holds no description."""
    try:
        return by_name(json.loads(seal.contract_schema))
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}


def is_personal(field: Mapping[str, Any] | None) -> bool:
    """Whether nothing of the field may be shown."""
    return field is None or bool(field.get("personal"))
