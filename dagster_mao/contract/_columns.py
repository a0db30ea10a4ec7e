"""A contract as people read it: one line per column for a column schema, one line per field, at any depth, for a page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dagster_mao.contract._contract import Contract
from dagster_mao.contract._masking import MASK
from dagster_mao.contract._types import Field, Type, dtype_text, spell

VALIDATED = "validated by pydantic"


class Column(NamedTuple):
    """One column of a contract: its name, type, description, constraints in words, whether it may be null, and whether it is personal.

    `parts` are its members that are personal or described ("street: personal; with the number"), `personal_part` whether one is personal.
    """

    name: str
    type: str
    description: str | None
    constraints: list[str]
    nullable: bool
    personal: bool
    parts: tuple[str, ...] = ()
    personal_part: bool = False


def columns(contract: Contract[Any]) -> list[Column]:
    """The contract's columns in order, for a column schema."""
    return [_column(f, unique=f.name == contract.key) for f in contract.fields]


def _column(field: Field, *, unique: bool) -> Column:
    words = (["unique"] if unique else []) + list(_words(field.type))
    parts = list(_parts(field.type, ""))
    told = tuple(f"{path}: {'; '.join(said)}" for path, part in parts if (said := _said(part)))
    return Column(
        field.name,
        dtype_text(field.type.dtype),
        field.description,
        words,
        field.type.nullable,
        field.personal,
        told,
        any(p.personal for _, p in parts),
    )


def _words(node: Type) -> Iterator[str]:
    yield from (spell(name, value) for name, value in node.constraints.items())
    for path, inner in _inner(node, ""):
        yield from (f"{path}: {spell(name, value)}" for name, value in inner.constraints.items())
        if inner.nullable:
            yield f"{path}: may be null"
        if not inner.exact:
            yield f"{path}: {VALIDATED}"
    if not node.exact:
        yield VALIDATED


def _inner(node: Type, path: str) -> Iterator[tuple[str, Type]]:
    if node.item is not None:
        yield path + "items", node.item
        yield from _inner(node.item, path + "items.")
    for member in node.fields:
        yield path + member.name, member.type
        yield from _inner(member.type, path + member.name + ".")


def _parts(node: Type, path: str) -> Iterator[tuple[str, Field]]:
    if node.item is not None:
        yield from _parts(node.item, path + "items.")
    for member in node.fields:
        yield path + member.name, member
        yield from _parts(member.type, path + member.name + ".")


def _said(part: Field) -> list[str]:
    return [*(["personal"] if part.personal else []), *([part.description] if part.description else [])]


class Line(NamedTuple):
    """One field of a described contract, at the path `field` ("home.street", "sources[].name").

    `constraints` are in words; `default` is its JSON value as text, None for a required field.
    """

    field: str
    type: str
    nullable: bool
    constraints: tuple[str, ...]
    key: bool
    personal: bool
    default: str | None
    description: str | None


def lines(described: Mapping[str, Any]) -> list[Line]:
    """The fields of a contract as `Contract.describe()` gives them, each before what is in it. Words that are missing are left out."""
    return [line for f in described.get("fields", ()) for line in _lines(f, f["name"], described.get("key") == f["name"])]


def _lines(field: Mapping[str, Any], path: str, key: bool = False, personal: bool = False) -> Iterator[Line]:
    personal = personal or bool(field.get("personal"))
    words = ([VALIDATED] if field.get("validators") else []) + ([field["type"]] if field.get("type", "str") not in _IN_THE_COLUMN else [])
    default = None if "default" not in field else MASK if personal and field["default"] not in (None, [], {}) else repr(field["default"])
    yield Line(
        path,
        type_text(field),
        bool(field.get("nullable")),
        (*(spell(name, value) for name, value in field.get("constraints", {}).items()), *words),
        key,
        personal,
        default,
        field.get("description"),
    )
    yield from _inside(field, path, personal)


# Types that the column's says.
_IN_THE_COLUMN = {"str", "int", "float", "bool", "bytes", "date", "datetime", "decimal", "model", "list", "enum", "entry"}


def _inside(node: Mapping[str, Any], path: str, personal: bool) -> Iterator[Line]:
    for member in node.get("fields", ()):
        yield from _lines(member, f"{path}.{member['name']}", personal=personal)
    if isinstance(item := node.get("items"), Mapping):
        if item.get("constraints") or item.get("nullable") or item.get("validators"):
            yield from _lines(item, path + "[]", personal=personal)
        else:
            yield from _inside(item, path + "[]", personal)


def type_text(node: Mapping[str, Any]) -> str:
    """The column's type without what is said of its members anyway."""
    if node.get("fields"):
        return "Struct"
    return f"List({type_text(node['items'])})" if "items" in node else str(node.get("dtype", ""))
