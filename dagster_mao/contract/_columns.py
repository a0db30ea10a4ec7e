"""A contract as the user interface shows it: one line per column."""

from __future__ import annotations

from typing import Any, NamedTuple

from dagster_mao.contract._contract import Contract
from dagster_mao.contract._types import Type, dtype_text, spell


class Column(NamedTuple):
    """One column of a contract: its name, type, description, constraints in words, whether it may be null, and whether it is personal."""

    name: str
    type: str
    description: str | None
    constraints: list[str]
    nullable: bool
    personal: bool


def columns(contract: Contract[Any]) -> list[Column]:
    """The contract's columns in order, for a column schema."""
    return [
        Column(f.name, dtype_text(f.type.dtype), f.description, _words(contract, f.name, f.type), f.type.nullable, f.personal)
        for f in contract.fields
    ]


def _words(contract: Contract[Any], name: str, node: Type) -> list[str]:
    words = ["unique"] if name == contract.key else []
    words += [spell(constraint, value) for constraint, value in node.constraints.items()]
    words += [f"items: {spell(c, v)}" for c, v in (node.item.constraints.items() if node.item else ())]
    words += [f"{member.name}: {spell(c, v)}" for member in node.fields for c, v in member.type.constraints.items()]
    return words if node.exact else [*words, "validated by pydantic"]
