"""`replay`: one agent run again on what it saw at a version, with today's code."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from dagster_mao.cli._app import Database, Json, Root, Storage, app
from dagster_mao.cli._print import cell, counted, grid, misused, plain, print_json, status, terminal
from dagster_mao.cli._where import load_pipeline, open_store, resources_of, store_to_write
from dagster_mao.cli.look import difference_as_json, print_difference
from dagster_mao.review.calls import told_of
from dagster_mao.review.history import parse_reference, sealed
from dagster_mao.review.replay import Replay, replay


@app.command("replay", epilog="Example: dagster-mao replay credit/2026-01-01@4")
def replay_command(
    reference: Annotated[str, typer.Argument(metavar="WORKFLOW@N", help="The version; with --agent also WORKFLOW@TIME, or WORKFLOW.")],
    agent: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of a workflow now or at a moment, this agent's version.", show_default=False)
    ] = None,
    live: Annotated[bool, typer.Option("--live", help="Ask models and services anew; else answers from then are all there is.")] = False,
    limit: Annotated[int | None, typer.Option(min=0, help="Differing records to list; 0 for all. 20 for people, all in JSON.")] = None,
    pipeline: Annotated[
        str | None, typer.Option(metavar="MODULE:ATTRIBUTE", help="The pipeline, else as in pyproject.toml.", show_default=False)
    ] = None,
    definitions: Annotated[
        str | None,
        typer.Option(metavar="MODULE:ATTRIBUTE", help="Dagster definitions with its resources, else as there.", show_default=False),
    ] = None,
    json_: Json = False,
    root: Root = None,
    storage_option: Storage = None,
    database: Database = None,
) -> None:
    """Run one agent again on exactly what it saw, with today's code, and compare the records. Nothing is sealed, kept or done to the world.

    Exits with 0 when the records are the same, with 1 when they differ. Fields marked personal are masked.
    """
    if agent is None and not isinstance(parse_reference(reference)[1], int):
        misused(f"{reference!r} names no version: write WORKFLOW@N, or name an --agent")
    open_store(root, storage_option)  # which says where there is no state
    store = store_to_write(root, storage_option, database)
    seal = sealed(store, reference, agent=agent)
    own = load_pipeline(pipeline, seal.workflow_id)
    names = own.node(seal.agent).resources
    most = (0 if json_ else 20) if limit is None else limit
    with status(f"running {seal.agent} again"), resources_of(names, definitions, f"Running {seal.agent}") as resources:
        found = replay(store, own, seal, resources=resources, live=live, limit=most or None)
    if json_:
        print_json(_as_json(found))
    else:
        _print(terminal(), found)
    raise typer.Exit(0 if found.same else 1)


def _as_json(found: Replay) -> dict[str, Any]:
    return {
        "same": found.same,
        "frozen": found.frozen,
        **difference_as_json(found.difference),
        "effects": [effect._asdict() for effect in found.effects],
        "calls": found.calls.model_dump(),
        "checks": [{"name": one.name, "passed": one.passed, "description": one.description} for one in found.checks],
    }


def _print(console: Console, found: Replay) -> None:
    then, now = found.seal, found.made
    print_difference(found.difference, right=f"{now.agent} again, {now.row_count:,} records, by today's code")
    for what, counts in {
        "in quarantine": (then.quarantined, now.quarantined),
        "waiting for another run": (then.deferred or 0, now.deferred or 0),
    }.items():
        if counts[0] != counts[1]:
            console.print(f"Records {what}: {counts[0]:,} then, {counts[1]:,} now.")
    for check in found.checks:
        if not check.passed:
            console.print(Text(plain(f"{check.name}: {check.description}"), style="yellow"), soft_wrap=True)
    if found.effects:
        console.print("These effects would have been had; none was:")
        table = grid("effect", "times", numbers=("times",))
        for name, times in Counter(effect.name for effect in found.effects).items():
            table.add_row(cell(name), cell(times))
        console.print(table)
    how = "frozen: nobody was asked" if found.frozen else "live"
    told = f"Calls ({how}): {told_of(found.calls)}. {counted(len(found.effects), 'effect')}; nothing was sealed."
    console.print(Text(plain(told), style="dim"), soft_wrap=True)
