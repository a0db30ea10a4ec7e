"""Contracts as they were sealed: what an agent promised, who read it, and what changed from one version to the next.

A seal holds the description of its agent's output contract, so this needs none of the pipeline's code.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dagster_mao.contract import Change, Difference, Line, evolution, lines
from dagster_mao.state.seal import Seal


@dataclass(frozen=True)
class Consumer:
    """An agent that reads a contract. A pipeline knows as what (`contract`), which `fields` and what it `asks` beyond; a seal does not."""

    agent: str
    contract: str | None = None
    fields: tuple[str, ...] = ()
    asks: tuple[Difference, ...] = ()


def described(seal: Seal) -> dict[str, Any] | None:
    """The description that the seal holds; None when it holds none (a fence)."""
    try:
        found = json.loads(seal.contract_schema)
        return found if lines(found) else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None


def consumers(seal: Seal, workflow: Iterable[Seal]) -> list[Consumer]:
    """The agents whose seals in the workflow name the seal's agent among their parents, in the order they were sealed first."""
    readers = (one.agent for one in workflow if any(parent.agent == seal.agent for parent in one.parents))
    return [Consumer(agent) for agent in dict.fromkeys(readers)]


def contract_changes(left: Seal, right: Seal) -> tuple[Change, ...]:
    """What changed from the left seal's contract to the right one's. Descriptions that cannot be read prove nothing, and it says so."""
    if left.contract_schema == right.contract_schema:
        return ()
    try:
        return evolution(json.loads(left.contract_schema), json.loads(right.contract_schema))
    except (ValueError, TypeError, KeyError, AttributeError):
        return (Change(right.contract, "unproven", "the description in a seal cannot be read"),)


def page(description: Mapping[str, Any], readers: Sequence[Consumer]) -> str:
    """The contract as a page of Markdown: what it is for, its fields, who reads it and what they ask beyond."""
    title = f"**{_text(description['name'])} v{_text(description['version'])}**"
    about = f": {_text(description['description'])}" if description.get("description") else ""
    table = ["| field | type | null | rules | default | description |", "|---|---|---|---|---|---|", *map(_row, lines(description))]
    judged = ["", "Validators judge the record as a whole."] if description.get("modes") else []
    return "\n".join([title + about, "", *table, *judged, "", *_read_by(readers)])


def asked(found: Sequence[Difference]) -> str:
    """What a consumer asks beyond a producer's promise, as a list of Markdown."""
    if not found:
        return "Asks nothing beyond what is promised."
    return "\n".join(f"- {_WORDS[one.kind]} {_code(one.field)}: {_text(one.detail)}" for one in found)


_WORDS = {"stricter": "**stricter**", "unproven": "*unproven*", "contradiction": "**contradiction**"}


def _row(line: Line) -> str:
    marks = [*(["**key**"] if line.key else []), *(["**personal**"] if line.personal else [])]
    rules = ", ".join([*marks, *map(_code, line.constraints)])
    null, default = "yes" if line.nullable else "no", "" if line.default is None else _code(line.default)
    return f"| {_code(line.field)} | {_text(line.type)} | {null} | {rules} | {default} | {_text(line.description or '')} |"


def _read_by(readers: Sequence[Consumer]) -> list[str]:
    if not readers:
        return ["Nobody reads it."]
    told = ["Read by:", ""]
    for reader in readers:
        how = f" as {_text(reader.contract)}" if reader.contract else ""
        told.append(f"- **{_text(reader.agent)}**{how}" + (f": {', '.join(map(_code, reader.fields))}" if reader.fields else ""))
        told += [f"  {line}" for line in asked(reader.asks).splitlines()] if reader.asks else []
    return told


def _text(value: str) -> str:
    """Text in which nothing is markup."""
    flat = " ".join(str(value).split())
    return "".join(f"\\{char}" if char in "\\`*_|[]<>#" else char for char in flat)


def _code(value: str) -> str:
    flat = " ".join(str(value).split()).replace("`", "'").replace("|", "\\|")
    return f"`{flat}`"
