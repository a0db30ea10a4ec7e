"""`step`: through a workflow, version by version."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from dagster_mao.cli._app import AsOf, Json, Root, Storage, app
from dagster_mao.cli._print import cell, counted, moment, plain, print_json, print_rows, sheet, terminal
from dagster_mao.cli._where import open_store, when_of
from dagster_mao.cli.look import difference_as_json, print_circumstances, print_records_of
from dagster_mao.errors import UnknownVersionError
from dagster_mao.review.history import facts, history, resolve
from dagster_mao.review.walk import Scene, chosen, scene
from dagster_mao.state import Seal

_KEYS = "n next, p previous, q quit"


@app.command("step", epilog="Example: dagster-mao step credit/2026-01-01 --record app-0417")
def step_command(
    reference: Annotated[str, typer.Argument(metavar="WORKFLOW[@N]", help="A workflow; with @N from this version on.")],
    agent: Annotated[str | None, typer.Option(metavar="NAME", help="Only this agent's versions.", show_default=False)] = None,
    record: Annotated[str | None, typer.Option(metavar="KEY", help="Only the record with this key.", show_default=False)] = None,
    rows: Annotated[int, typer.Option(min=0, help="Records to show of each version.")] = 3,
    as_of: AsOf = None,
    json_: Json = False,
    root: Root = None,
    storage_option: Storage = None,
) -> None:
    """Walk through a workflow version by version: what each agent saw, what it said, and what had changed since it said so before.

    On a terminal a key at a time, else all in sequence. Fields marked personal are masked.
    """
    store = open_store(root, storage_option)
    workflow, named = resolve(store, reference)
    when = when_of(None if isinstance(named, int) else named, as_of)
    seals = history(store, workflow, as_of=when)
    shown = chosen(seals, agent)
    start = next((place for place, seal in enumerate(shown) if seal.version >= named), len(shown)) if isinstance(named, int) else 0
    if start >= len(shown):
        there = ", ".join(dict.fromkeys(seal.agent for seal in seals if seal.agent)) or "nothing"
        raise UnknownVersionError("There is no version to step to", agent=agent, workflow=workflow, fix=f"it has versions by {there}")

    def look(place: int) -> Scene:
        return scene(store, seals, shown, place, record=record, rows=rows)

    if json_:
        print_json([_as_json(look(place)) for place in range(start, len(shown))])
        return
    console = terminal()
    if sys.stdin.isatty() and sys.stdout.isatty():
        step_through(console, look, start, len(shown), typer.getchar)
        return
    for place in range(start, len(shown)):
        _print(console, look(place))


def step_through(console: Console, look: Callable[[int], Scene], start: int, count: int, read_key: Callable[[], str]) -> None:
    """One version at a time, as keys say."""
    place, shown = start, -1
    while True:
        if place != shown:
            _print(console, look(place))
            shown = place
        console.print(Text(f"[{place + 1}/{count}] {_KEYS}", style="dim"))
        try:
            key = read_key()
        except (EOFError, KeyboardInterrupt):
            return
        if key in ("q", "\x03", "\x04", "\x1b"):
            return
        if key in ("n", " ", "\r", "\n", "\x1b[C", "\x1b[B"):
            place = min(place + 1, count - 1)
        elif key in ("p", "\x1b[D", "\x1b[A"):
            place = max(place - 1, 0)


# -- telling -------------------------------------------------------------------------------------------------------------------------


def _as_json(found: Scene) -> dict[str, Any]:
    return {
        **facts(found.seal),
        "inputs": [{"agent": seal.agent, "reference": seal.reference, "records": rows} for seal, rows in found.inputs],
        "records": found.output,
        "previous": found.previous and found.previous.reference,
        "difference": found.difference and difference_as_json(found.difference),
    }


def _print(console: Console, found: Scene) -> None:
    seal = found.seal
    console.rule(Text(plain(f"{seal.reference}  {seal.agent or seal.kind}"), style="bold"), align="left")
    facts_ = sheet()
    told = {
        "sealed (UTC)": f"{moment(seal)}, attempt {seal.attempt[:8]}, run {seal.run_id[:8]}",
        "code version": seal.agent_version,
        "contract": f"{seal.contract} v{seal.contract_version}" if seal.contract else "",
        "model": seal.model,
        "records": f"{seal.row_count:,}" + (f", {seal.quarantined:,} in quarantine" if seal.quarantined else "") if seal.path else "",
    }
    for name, value in told.items():
        if value:
            facts_.add_row(Text(name, style="dim"), cell(value))
    console.print(facts_)
    for parent, rows in found.inputs:
        _print_side(console, f"saw {parent.agent}, version {parent.version}", rows, parent)
    if seal.path:
        _print_side(console, "said", found.output, seal)
    _print_difference(console, found)


def _print_side(console: Console, what: str, rows: Sequence[Any], seal: Seal) -> None:
    more = f" ({len(rows):,} of {seal.row_count:,})" if len(rows) < seal.row_count else ""
    console.print(Text(plain(f"{what}{more}"), style="cyan"))
    print_rows(console, rows)


def _print_difference(console: Console, found: Scene) -> None:
    if found.previous is None:
        return
    if found.difference is None:
        console.print(Text(f"It cannot be compared with version {found.previous.version}: other keys.", style="dim"))
        return
    difference = found.difference
    counts = f"{difference.added:,} added, {difference.removed:,} removed, {difference.changed:,} changed, {difference.same:,} the same"
    since = f"since version {found.previous.version}, by {found.previous.agent} too"
    told = f"{counted(difference.same, 'record')}, all the same" if difference.equal else counts
    console.print(Text(plain(f"{since}: {told}"), style="cyan"))
    print_records_of(console, difference)
    print_circumstances(console, difference)
