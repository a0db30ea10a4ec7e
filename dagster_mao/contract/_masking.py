"""Masking by a contract's description: what it marks `Personal` is never shown, and what it does not speak of is masked too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dagster_mao.contract._types import Field, Type

MASK = "***"


def hide(field: Mapping[str, Any] | None, value: Any) -> Any:
    """The value, masked where its field's description says so or there is no description.

    What does not have the described shape is masked whole if anything in the description is personal: it may be what stands there.
    """
    if field is None or field.get("personal"):
        return MASK
    fields, items = by_name(field), field.get("items")
    if isinstance(value, Mapping) and fields:
        return {name: hide(fields.get(name), part) for name, part in value.items()}
    if isinstance(value, list) and isinstance(items, Mapping):
        return [hide(items, part) for part in value]
    if isinstance(value, Mapping) or (value is not None and has_personal(field)):
        return MASK
    return value


def by_field(fields: Sequence[Field], record: Mapping[str, Any]) -> dict[str, Any]:
    """What came in, under the names of the fields instead of their aliases, at any depth.

    A name that is one field's and another's alias may hold the value of either: it is masked.
    """
    told: dict[str, Any] = {}
    for name, value in record.items():
        meant = [field for field in fields if name in (field.name, field.alias)]
        if len(meant) > 1:
            told[name] = MASK
        elif meant and (name == meant[0].name or meant[0].name not in record):
            told[meant[0].name] = _by_field(meant[0].type, value)
        else:
            told[name] = value
    return told


def _by_field(node: Type, value: Any) -> Any:
    if isinstance(value, Mapping) and node.fields:
        return by_field(node.fields, value)
    if isinstance(value, list) and node.item is not None:
        return [_by_field(node.item, part) for part in value]
    return value


def by_name(described: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The fields of a description by name."""
    return {field["name"]: field for field in described.get("fields") or ()}


def has_personal(described: Mapping[str, Any]) -> bool:
    """Whether anything in a description (of a contract, of a field) is personal, at any depth."""
    return bool(described.get("personal")) or any(has_personal(part) for part in _parts(described).values())


def unmarked_personal(producer: Mapping[str, Any], consumer: Mapping[str, Any], path: str = "") -> list[str]:
    """Where the consumer reads what the producer marks personal, and does not mark it: paths as in `contact.phone`, `lines[].name`."""
    if consumer.get("personal"):
        return []
    if producer.get("personal"):
        return [path]
    theirs, ours = _parts(producer), _parts(consumer)
    return [found for name in ours if name in theirs for found in unmarked_personal(theirs[name], ours[name], _joined(path, name))]


def _parts(described: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """What a description holds: fields by name, what a list is made of, what a union chooses from."""
    choices = {f"[{number}]": choice for number, choice in enumerate(described.get("choices") or ())}
    items = {"[]": described["items"]} if isinstance(described.get("items"), Mapping) else {}
    return {**by_name(described), **items, **choices}


def _joined(path: str, name: str) -> str:
    return name if not path else path + ("[]" if name.startswith("[") else f".{name}")
