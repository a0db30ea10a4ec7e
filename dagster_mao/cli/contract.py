"""`show --contract`: what an agent promised in a version, who reads it, and what changed since another version. Also for `diff`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

from dagster_mao.cli._print import cell, grid, misused, plain, print_json, terminal
from dagster_mao.contract import Change, lines
from dagster_mao.errors import MaoError
from dagster_mao.review.contract import Consumer, consumers, contract_changes, described
from dagster_mao.review.odcs import odcs
from dagster_mao.state.seal import Seal


def show_contracts(seals: Sequence[Seal], workflow: Sequence[Seal], *, whole: bool, as_json: bool) -> None:
    """The contracts of these versions; `workflow` is all that was sealed there, which says who reads them."""
    if not seals:
        raise MaoError("No attempt has completed, so the workflow has no effective state", fix="name a version: WORKFLOW@N")
    if as_json:
        told = [_as_json(seal, consumers(seal, workflow)) for seal in seals]
        print_json(told if whole else told[0])
        return
    console = terminal()
    for seal in seals:
        _print_contract(console, seal, consumers(seal, workflow))


def show_changes(old: Seal, new: Seal, *, as_json: bool) -> None:
    """What changed from one contract to another. Exits with 1 when something is breaking for writers or readers."""
    for seal in (old, new):
        _required(seal)
    changes = contract_changes(old, new)
    if as_json:
        sides = [{"reference": seal.reference, **_identity(seal)} for seal in (old, new)]
        print_json({"from": sides[0], "to": sides[1], "changes": [dataclasses.asdict(change) for change in changes]})
    else:
        console = terminal()
        for sign, seal in (("-", old), ("+", new)):
            told = f"{sign} {seal.reference}: {seal.agent}, {seal.contract} v{seal.contract_version} ({seal.contract_hash[:12]})"
            console.print(Text(plain(told), style="bold"))
        if not print_changes(console, changes):
            console.print("The contracts demand the same.")
    raise typer.Exit(int(any(change.kind.startswith("breaking") for change in changes)))


def print_changes(console: Console, changes: Sequence[Change]) -> bool:
    """The changes as a table, if there are any."""
    if not changes:
        return False
    table = grid("contract field", "change", "what")
    for change in changes:
        style = "red" if change.kind.startswith("breaking") else "yellow" if change.kind == "unproven" else ""
        table.add_row(cell(change.field), Text(change.kind, style=style), cell(change.detail))
    console.print(table)
    return True


def export(seals: Sequence[Seal]) -> None:
    """One contract as YAML of the Open Data Contract Standard."""
    if len(seals) != 1:
        misused("a file of the standard holds one contract: name a version, WORKFLOW@N, or an --agent")
    typer.echo(odcs(seals[0]), nl=False)


def _as_json(seal: Seal, readers: Sequence[Consumer]) -> dict[str, Any]:
    told = {"workflow_id": seal.workflow_id, "version": seal.version, "agent": seal.agent, **_identity(seal)}
    return {**told, "contract_schema": described(seal), "consumers": [reader.agent for reader in readers]}


def _identity(seal: Seal) -> dict[str, str]:
    return {"contract": seal.contract, "contract_version": seal.contract_version, "contract_hash": seal.contract_hash}


def _required(seal: Seal) -> dict[str, Any]:
    description = described(seal)
    if description is None:
        raise MaoError(f"{seal.reference} is a {seal.kind} and has no contract", workflow=seal.workflow_id)
    return description


def _print_contract(console: Console, seal: Seal, readers: Sequence[Consumer]) -> None:
    description = _required(seal)
    console.print(Text(plain(f"{seal.reference}: {seal.agent}, {seal.contract} v{seal.contract_version}"), style="bold"))
    if description.get("description"):
        console.print(Text(plain(" ".join(description["description"].split()))))
    table = grid("field", "type", "rules", "description")
    for line in lines(description):
        marks = [word for word, true in (("key", line.key), ("personal", line.personal), ("may be null", line.nullable)) if true]
        default = [] if line.default is None else [f"default {line.default}"]
        rules = "; ".join([*marks, *line.constraints, *default])
        table.add_row(cell(line.field), cell(line.type), cell(rules), cell(line.description or ""))
    console.print(table)
    if description.get("modes"):
        console.print("Validators judge the record as a whole.")
    told = ", ".join(reader.agent for reader in readers) or "nobody in this workflow"
    console.print(Text(plain(f"Read by: {told}"), style="dim"))
    console.print(Text(plain(f"Hash: {seal.contract_hash}"), style="dim"), soft_wrap=True)
    console.print()
