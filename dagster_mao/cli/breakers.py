"""`breakers list`, `open`, `close`, `reset`: the circuit breakers in the shared database, and what people decide on them."""

from __future__ import annotations

import dataclasses
import datetime as dt
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from dagster_mao.cli._app import DATABASE, By, Database, Json, Root, app, me
from dagster_mao.cli._print import cell, counted, grid, misused, plain, print_json, terminal
from dagster_mao.cli._where import open_shared
from dagster_mao.errors import UnknownBreakerError

if TYPE_CHECKING:
    from dagster_mao.gateway._breaker import BreakerEvent, BreakerState

commands = typer.Typer(no_args_is_help=True)
app.add_typer(commands, name="breakers", help="Circuit breakers: list, open, close or reset them.")

Name = Annotated[str, typer.Argument(help="The breaker: the agent's, as pipeline.agent, or the name that its policy gives.")]
Why = Annotated[str, typer.Option(metavar="TEXT", help="The reason; it is kept.")]

_STYLES = {"open": "red", "half-open": "yellow", "closed": "green"}
_FOUND = f"The database is found by --database, else ${DATABASE}, else \\[tool.dagster-mao], else it is shared.db in the local root."


@commands.command("list", epilog=_FOUND)
def list_command(
    name: Annotated[str | None, typer.Argument(help="Only this one, with its events.", show_default=False)] = None,
    open_: Annotated[bool, typer.Option("--open", help="Only those that are not closed.")] = False,
    json_: Json = False,
    database: Database = None,
    root: Root = None,
) -> None:
    """List the breakers that have been used: how each stands, since when, why, and when a call may be tried again."""
    from dagster_mao.gateway._breaker import breakers, events

    shared = open_shared(database, root, unused=True)
    found = breakers(shared)
    shown = [state for state in found if name in (None, state.name) and (not open_ or state.state != "closed")]
    told = events(shared, name) if name is not None else []
    if name is not None and not told and name not in {state.name for state in found}:
        raise UnknownBreakerError(f"No circuit breaker {name!r} was used with {shared.name}", fix="leave the name out to see what there is")
    if json_:
        rows = [dataclasses.asdict(state) for state in shown]
        print_json(rows if name is None else {"breakers": rows, "events": [dataclasses.asdict(event) for event in told]})
        return
    console = terminal()
    if shown:
        table = grid("breaker", "state", "failures", "since (UTC)", "next call", "why", numbers=("failures",))
        for state in shown:
            failures = f"{state.failures} of {state.fail_max}"
            cells = [cell(value) for value in (failures, _when(state.since), _next(state), _why(state))]
            table.add_row(cell(state.name), Text(state.state, style=_STYLES.get(state.state, "")), *cells)
        console.print(table)
    if told:
        console.print()
        console.print(_events_table(told))
    stopped = sum(state.state != "closed" for state in found)
    if name is None:
        console.print(f"{counted(len(found), 'breaker')}, {stopped or 'none'} not closed." if found else "No breaker has been used yet.")


@commands.command("open", epilog="Example: dagster-mao breakers open credit.approval --why 'the core bank is down for an hour' --for 3600")
def open_command(
    name: Name,
    why: Why,
    for_: Annotated[
        float | None,
        typer.Option("--for", metavar="SECONDS", help="Then a call may be tried; until it is closed when left out.", show_default=False),
    ] = None,
    by: By = None,
    json_: Json = False,
    database: Database = None,
    root: Root = None,
) -> None:
    """Open a breaker: no call is made, in any process, until it is closed by hand or the time is over."""
    from dagster_mao.gateway._breaker import open_breaker

    _reasoned(why)
    if for_ is not None and not 0 < for_ < 10**9:
        misused("--for takes seconds above 0")
    state = open_breaker(open_shared(database, root), name, why=why, by=by or me(), seconds=for_)
    until = f"for {for_:g} s" if for_ is not None else f"until `dagster-mao breakers close '{plain(name)}'`"
    _done(state, f"Opened {name}: no call is made {until}.", json_=json_)


@commands.command("close", epilog="Example: dagster-mao breakers close credit.approval --why 'the core bank is up again'")
def close_command(name: Name, why: Why, by: By = None, json_: Json = False, database: Database = None, root: Root = None) -> None:
    """Close a breaker: calls are made again at once, and its failures are forgotten."""
    from dagster_mao.gateway._breaker import close_breaker

    _reasoned(why)
    state = close_breaker(open_shared(database, root), name, why=why, by=by or me())
    _done(state, f"Closed {name}: calls are made again.", json_=json_)


@commands.command("reset", epilog="Example: dagster-mao breakers reset credit.old_agent --why 'the agent was removed'")
def reset_command(name: Name, why: Why, by: By = None, json_: Json = False, database: Database = None, root: Root = None) -> None:
    """Forget a breaker, as if it had never been used: it is off the list until its next call. Its events stay."""
    from dagster_mao.gateway._breaker import reset_breaker

    _reasoned(why)
    reset_breaker(open_shared(database, root), name, why=why, by=by or me())
    if json_:
        print_json({"name": name, "state": "reset"})
        return
    terminal().print(Text(plain(f"Reset {name}: it is closed, without a failure, when it is used next.")), soft_wrap=True)


def _reasoned(why: str) -> None:
    if not why.strip():
        misused("--why takes a reason")


def _done(state: BreakerState, told: str, *, json_: bool) -> None:
    if json_:
        print_json(dataclasses.asdict(state))
        return
    console = terminal()
    console.print(Text(plain(told)), soft_wrap=True)
    console.print(Text("Running processes follow within a second.", style="dim"), soft_wrap=True)


def _events_table(told: list[BreakerEvent]) -> Any:
    table = grid("at (UTC)", "event", "why", "by")
    for event in told:
        table.add_row(*(cell(value) for value in (_when(event.at), event.event, event.why, event.by or event.process)))
    return table


def _when(moment: dt.datetime | None) -> str | None:
    return None if moment is None else f"{moment:%Y-%m-%d %H:%M:%S}"


def _next(state: BreakerState) -> str | None:
    if state.state == "closed":
        return None
    if state.state == "half-open" and state.retry_after:
        return "a probe runs"
    if state.retry_after is None:
        return "when closed"
    return f"in {state.retry_after:.0f} s" if state.retry_after else "now, a probe"


def _why(state: BreakerState) -> str | None:
    return f"{state.why} ({state.by})" if state.by else state.why
