"""`compensate`: what failed attempts have done is undone, by hand; or what would be, or what was."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from dagster_mao.cli._app import HOME, Database, Json, Root, Storage, app, me
from dagster_mao.cli._print import cell, grid, misused, plain, print_json, status, terminal
from dagster_mao.cli._where import load_pipeline, open_shared, open_store, placed, project, resources_of
from dagster_mao.errors import PinError
from dagster_mao.home import is_home
from dagster_mao.pipeline import Pipeline
from dagster_mao.state import StateStore

if TYPE_CHECKING:
    from dagster_mao.saga import Concluded, Plan, SagaState, Unfinished

_STYLES = {"compensated": "green", "done": "green", "incomplete": "red", "handed_over": "yellow", "failed": "red"}
_WOULD = {"here": "undone", "later": "undone, after others", "elsewhere": "undone in another code location"}
_OPEN = ("requested", "running", "incomplete")
_RESUME = "--resume tries again what is left"
_ELSEWHERE = "what is left is undone by the code locations that have these agents, and then here"


@app.command("compensate", epilog="Example: dagster-mao compensate credit/2026-01-01 --dry-run")
def compensate_command(
    workflow: Annotated[str | None, typer.Argument(help="A workflow id; with --status all when left out.", show_default=False)] = None,
    attempt: Annotated[
        str | None, typer.Option(metavar="RUN", help="The attempt: its root run. The one that did not finish.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be undone, in which order.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Try again what an incomplete compensation left.")] = False,
    status_: Annotated[bool, typer.Option("--status", help="Only show how compensations stand; exit with 1 if something is left.")] = False,
    pipeline: Annotated[
        str | None, typer.Option(metavar="MODULE:ATTRIBUTE", help="The pipeline, else as in pyproject.toml.", show_default=False)
    ] = None,
    definitions: Annotated[
        str | None,
        typer.Option(metavar="MODULE:ATTRIBUTE", help="Dagster definitions with its resources, else as there.", show_default=False),
    ] = None,
    dagster_home: Annotated[str | None, typer.Option(metavar="FOLDER", help="The Dagster that is told of it.", show_default=False)] = None,
    json_: Json = False,
    root: Root = None,
    storage_option: Storage = None,
    database: Database = None,
) -> None:
    """Undo what a failed attempt has done, in reverse order. An attempt that still runs is ended by it; a completed one is left alone.

    Killed or failed, it goes on when it is called again. Where Dagster's sensor runs it does the same by itself.
    """
    shared = open_shared(database, root, unused=True)
    opened = open_store(root, storage_option, damaged=True)  # the first step may have failed: there are effects, and no seal
    store = StateStore(opened.root, opened.objects.storage_options, database=shared.url)
    if status_:
        _status(store, workflow, json_)
        return
    if workflow is None:
        misused("Name the workflow; only --status goes without")
    own = load_pipeline(pipeline, workflow)
    found = _to_compensate(store, own, workflow, attempt, resume=resume)
    if dry_run:
        from dagster_mao.saga import Saga

        _print_plans([Saga(store, own, workflow, one, superseded_by=by).plan() for one, by in found], json_)
        return
    ended = _compensated(store, own, workflow, found, definitions, dagster_home)
    if json_:
        print_json([{"workflow_id": workflow, "attempt": one, "superseded_by": by, **_as_json(end)} for one, by, end in ended])
    else:
        _print_ended(terminal(), workflow, ended)
    if any(end.state in ("compensation_incomplete", "handed_over") for *_, end in ended):
        raise typer.Exit(1)


# -- what there is -------------------------------------------------------------------------------------------------------------------


def _to_compensate(store: StateStore, pipeline: Pipeline, workflow: str, attempt: str | None, *, resume: bool) -> list[tuple[str, str]]:
    """The attempts, each with the later one that superseded it ("" where all of it is undone). Raises `PinError` where there is none."""
    from dagster_mao.saga import unfinished

    if attempt is not None:
        return [(attempt, "")]
    found = [one for one in unfinished(store, pipeline.name) if one.workflow_id == workflow]
    taken = [one for one in found if resume or one.state != "incomplete"]
    if not taken:
        what = "Its compensation is incomplete" if found else "There is nothing to be compensated"
        raise PinError(what, workflow=workflow, fix=_RESUME if found else "`dagster-mao compensate --status` shows what there was")
    return [(one.attempt, one.superseded_by) for one in taken]


def _status(store: StateStore, workflow: str | None, json_: bool) -> None:
    from dagster_mao.saga import sagas, unfinished

    names = [workflow.partition("/")[0]] if workflow else _pipelines(store)
    states = [state for name in names for state in sagas(store, name, workflow)]
    known = {(state.workflow_id, state.attempt, state.superseded_by) for state in states}
    waiting = [
        one
        for name in names
        for one in unfinished(store, name)
        if workflow in (None, one.workflow_id) and (one.kind == "late" or (one.workflow_id, one.attempt, one.superseded_by) not in known)
    ]
    if json_:
        print_json({"compensations": states, "waiting": waiting})
    else:
        _print_status(terminal(), states, waiting)
    if waiting or any(state.state in _OPEN for state in states):
        raise typer.Exit(1)


def _pipelines(store: StateStore) -> list[str]:
    """Those that ever began: an attempt may have had effects and sealed nothing."""
    return list(store.objects.folders("attempts"))


# -- undoing -------------------------------------------------------------------------------------------------------------------------


def _compensated(
    store: StateStore,
    pipeline: Pipeline,
    workflow: str,
    found: Sequence[tuple[str, str]],
    definitions: str | None,
    dagster_home: str | None,
) -> list[tuple[str, str, Concluded]]:
    from dagster_mao.saga import Saga

    ended = []
    with status("loading Dagster and the definitions"), _resources(pipeline, definitions) as resources:
        for attempt, by in found:
            owner = f"{me()}@{socket.gethostname()}"
            saga = Saga(
                store, pipeline, workflow, attempt, superseded_by=by, resources=resources, owner=f"{owner}:{os.getpid()}", why="by hand"
            )
            ended.append((attempt, by, saga.run()))
        _tell_dagster(store, pipeline, workflow, ended, owner, dagster_home)
    return ended


@contextmanager
def _resources(pipeline: Pipeline, definitions: str | None) -> Iterator[dict[str, Any]]:
    """The resources that undoing takes, as the code location makes them. Raises `WiringError` where it is not known."""
    from dagster_mao.dagster.saga import undo_resources

    with resources_of(undo_resources(pipeline), definitions, "Undoing") as resources:
        yield resources


def _tell_dagster(
    store: StateStore,
    pipeline: Pipeline,
    workflow: str,
    ended: Sequence[tuple[str, str, Concluded]],
    owner: str,
    dagster_home: str | None,
) -> None:
    """Shows it on the assets, where there is a Dagster to tell. What was done stands whether Dagster knows or not."""
    configured, where = project()
    home = dagster_home or os.environ.get(HOME) or placed(configured.get("dagster_home"), where)
    if not home or not is_home(Path(home).expanduser()):
        return
    from dagster_mao.dagster.anchors import opened
    from dagster_mao.dagster.saga import report
    from dagster_mao.dagster.stopping import stop

    try:
        with opened(home) as instance:
            for attempt, by, concluded in ended:
                if not by and concluded.state != "void":
                    stop(instance, store, workflow, attempt, logging.getLogger("dagster_mao.saga"))
                report(instance, pipeline, store, workflow, attempt, by, concluded, by=owner)
    except Exception as error:  # an event log that is down must not look like a failure to undo
        typer.echo(f"Dagster at {home} could not be told ({type(error).__name__}): its UI does not show this.", err=True)


# -- printing ------------------------------------------------------------------------------------------------------------------------


def _as_json(concluded: Concluded) -> dict[str, Any]:
    left = [{"agent": one.agent, "state": one.state, "error": one.error} for one in concluded.left]
    return {"state": concluded.state, "left": left, "kept": concluded.kept, "version": concluded.version}


def _print_plans(plans: Sequence[Plan], json_: bool) -> None:
    if json_:
        print_json(plans)
        return
    console = terminal()
    for plan in plans:
        console.print(Text(f"{plain(plan.workflow_id)}, attempt {plain(plan.attempt)}", style="bold"), soft_wrap=True)
        if plan.state == "void":
            console.print("It has completed: nothing would be undone.")
            continue
        table = grid("agent", "effects", "may have happened", "would be", numbers=("effects", "may have happened"))
        for step in plan.steps:
            would = "kept: it cannot be undone" if step.kept else _WOULD[step.where]
            table.add_row(cell(step.agent), cell(step.done), cell(step.unknown), cell(would))
        console.print(table if plan.steps else "It had no effects.")
    console.print(Text("Nothing was changed.", style="dim"))


def _print_ended(console: Console, workflow: str, ended: Sequence[tuple[str, str, Concluded]]) -> None:
    for attempt, by, concluded in ended:
        what = f"{workflow}, attempt {attempt}{f', superseded by {by}' if by else ''}"
        state = concluded.state.removeprefix("compensation_")
        console.print(Text.assemble(plain(what), ": ", (state.replace("_", " "), _STYLES.get(state, "dim"))), soft_wrap=True)
        for one in concluded.left:
            console.print(Text(f"  left: {plain(one.agent)} ({plain(one.error or one.state)})"), soft_wrap=True)
        for agent in concluded.kept:
            console.print(Text(f"  stays: what {plain(agent)} did cannot be undone"), soft_wrap=True)
        if concluded.version:
            console.print(Text(f"  {plain(concluded.version)} says so", style="dim"), soft_wrap=True)
    if any(concluded.left for *_, concluded in ended):
        handed_over = all(concluded.state == "handed_over" for *_, concluded in ended if concluded.left)
        console.print(Text(_ELSEWHERE if handed_over else _RESUME, style="dim"))


def _print_status(console: Console, states: Sequence[SagaState], waiting: Sequence[Unfinished]) -> None:
    if not states and not waiting:
        console.print("Nothing was compensated, and nothing is to be.")
        return
    table = grid("asked (UTC)", "workflow", "attempt", "state", "undone", "left", "why", numbers=("undone",))
    for state in states:
        left = ", ".join(f"{one.agent} ({one.error or one.state})" for one in state.left)
        undone, why = (
            sum(undo.effects for undo in state.undos),
            f"superseded by {state.superseded_by}" if state.superseded_by else state.why,
        )
        shown = Text(state.state, style=_STYLES.get(state.state, "yellow" if state.state in _OPEN else "dim"))
        asked = f"{state.asked:%Y-%m-%d %H:%M:%S}"
        table.add_row(cell(asked), cell(state.workflow_id), cell(state.attempt), shown, cell(undone), cell(left or None), cell(why))
    for one in waiting:
        what = {"late": "an effect came late", "superseded": "superseded"}.get(one.kind, "did not complete, or goes on")
        shown = Text("waits", style="yellow")
        asked = f"{one.last:%Y-%m-%d %H:%M:%S}"
        table.add_row(cell(asked), cell(one.workflow_id), cell(one.attempt), shown, cell(None), cell(", ".join(one.agents)), cell(what))
    console.print(table)
