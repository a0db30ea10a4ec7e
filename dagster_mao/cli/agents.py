"""`agents list` and `diff`: which versions of agents have sealed, and what changed from one to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.text import Text

from dagster_mao.cli._app import Json, Root, Storage, app
from dagster_mao.cli._print import cell, grid, misused, plain, print_json, short, terminal
from dagster_mao.cli._where import open_store
from dagster_mao.cli.contract import print_changes
from dagster_mao.errors import UnknownVersionError
from dagster_mao.review.registry import AgentVersion, agent_diff, agent_versions

commands = typer.Typer(no_args_is_help=True)
app.add_typer(commands, name="agents", help="Agents: the versions that have sealed, since when, and what changed from one to the next.")


@commands.command("list", epilog="Example: dagster-mao agents list credit/score")
def list_command(
    name: Annotated[str | None, typer.Argument(metavar="PIPELINE[/AGENT]", help="Only these.", show_default=False)] = None,
    json_: Json = False,
    root: Root = None,
    storage_option: Storage = None,
) -> None:
    """List the agents by version: code, contract, model, owners, since when, and how many state versions each has made."""
    pipeline, _, agent = (name or "").partition("/")
    found = agent_versions(open_store(root, storage_option), pipeline or None, agent or None)
    if json_:
        print_json([one.facts for one in found])
        return
    console = terminal()
    table = grid("agent", "code", "contract", "model", "owners", "since (UTC)", "sealed", "id", numbers=("sealed",))
    for one in found:
        contract, since = f"{one.first.contract} v{one.first.contract_version}", f"{one.first.sealed_at:%Y-%m-%d %H:%M}"
        code = one.first.agent_version.removeprefix("sha256:")
        told = [f"{one.pipeline}/{one.agent}", code, contract, one.first.model, ", ".join(one.owners) or None, since, f"{one.seals:,}"]
        table.add_row(*map(cell, [*told, one.registration and one.registration[:8]]))
    console.print(table if found else "Nothing was sealed here yet.")


@commands.command("diff", epilog="Example: dagster-mao agents diff credit/score")
def diff_command(
    name: Annotated[str, typer.Argument(metavar="PIPELINE/AGENT", help="The agent.")],
    before: Annotated[str | None, typer.Argument(help="Id of the version to start from; the last but one.", show_default=False)] = None,
    after: Annotated[str | None, typer.Argument(help="Id of the version to compare; the last.", show_default=False)] = None,
    json_: Json = False,
    root: Root = None,
    storage_option: Storage = None,
) -> None:
    """Say what changed from one version of an agent to another: code, contract, policy, model, owners, readers.

    Exits with 0 when they are the same, with 1 when they differ.
    """
    pipeline, slash, agent = name.partition("/")
    if not slash:
        misused(f"{name!r} names no agent: write PIPELINE/AGENT")
    found = agent_versions(open_store(root, storage_option), pipeline, agent)
    if len(found) < 2 and before is None:
        raise UnknownVersionError("It has sealed in one version only", agent=name, fix="there is nothing to compare")
    sides = [found[-2] if before is None else _chosen(found, before), found[-1] if after is None else _chosen(found, after)]
    told = agent_diff(*sides)
    if json_:
        contract = [dataclasses.asdict(change) for change in told.contract]
        print_json({"before": sides[0].facts, "after": sides[1].facts, "declared": told.declared, "contract": contract})
    else:
        _print(sides, told.declared)
        print_changes(terminal(), told.contract)
    raise typer.Exit(1 if told.declared or told.contract else 0)


def _chosen(found: Sequence[AgentVersion], name: str) -> AgentVersion:
    meant = [one for one in found if one.registration and one.registration.startswith(name)]
    if len(meant) != 1:
        there = ", ".join(one.registration[:8] for one in found if one.registration) or "none that is registered"
        raise UnknownVersionError(f"{len(meant)} versions of it have an id that begins with {name!r}", fix=f"there are {there}")
    return meant[0]


def _print(sides: Sequence[AgentVersion], declared: object) -> None:
    console = terminal()
    for sign, one in zip("-+", sides, strict=True):
        since = f"{one.first.sealed_at:%Y-%m-%d %H:%M}"
        console.print(Text(plain(f"{sign} {one.pipeline}/{one.agent}, since {one.first.reference}, {since} UTC"), style="bold"))
    if isinstance(declared, dict) and declared:
        table = grid("what", "from", "to")
        for what, (was, now) in declared.items():
            table.add_row(cell(what), cell(short(was)), cell(short(now)))
        console.print(table)
    elif not declared:
        console.print("It declares the same.")
