"""`judges`: what judges said, version by version, and vote by vote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from dagster_mao.cli._app import Json, Root, Storage, app
from dagster_mao.cli._print import cell, counted, grid, plain, print_json, terminal
from dagster_mao.cli._where import open_store
from dagster_mao.errors import UnknownVersionError
from dagster_mao.review.history import resolve
from dagster_mao.review.verdicts import Judged, judged, votes

_SHOWN = 30


@app.command("judges", epilog="Example: dagster-mao judges research/2026-01-01@2")
def judges_command(
    reference: Annotated[str, typer.Argument(metavar="WORKFLOW[@N]", help="The scores of all versions, or the votes on one.")],
    agent: Annotated[str | None, typer.Option(metavar="NAME", help="Show only what was said of this agent.", show_default=False)] = None,
    judge: Annotated[str | None, typer.Option(metavar="NAME", help="Show only what this judge said.", show_default=False)] = None,
    record: Annotated[str | None, typer.Option(metavar="KEY", help="Of one version: the votes on this record.", show_default=False)] = None,
    limit: Annotated[
        int | None, typer.Option(min=0, help=f"Votes to list; 0 for all. {_SHOWN} for people, all in JSON.", show_default=False)
    ] = None,
    json_: Json = False,
    root: Root = None,
    storage_option: Storage = None,
) -> None:
    """Show what judges said of an agent's versions: the score and the share that passed; with @N, every vote and its reason.

    Fields marked personal are masked, and the reasons of judges that were sent some.
    """
    store = open_store(root, storage_option)
    workflow, when = resolve(store, reference)
    seals = [store.seal_at(workflow, when)] if isinstance(when, int) else store.seals(workflow, as_of=when)
    found = judged(seals, agent=agent, judge=judge)
    if not found:
        raise UnknownVersionError("No judge said anything of it", workflow=workflow, fix="declare one: @mao.agent(judges=[mao.Judge(…)])")
    rows: list[dict[str, Any]] = []
    if isinstance(when, int):
        rows = [row for row in votes(store, seals[0], record=record) if judge in (None, row["judge"])]
    most = (0 if json_ else _SHOWN) if limit is None else limit
    shown = rows[:most] if most else rows
    if json_:
        told = [{"reference": one.seal.reference, "agent": one.seal.agent, "judge": one.judge, **one.numbers} for one in found]
        print_json({"workflow_id": workflow, "judged": told, "votes": shown})
        return
    _print(terminal(), found)
    if shown:
        _print_votes(terminal(), shown)
    if len(shown) < len(rows):
        terminal().print(Text(f"{counted(len(rows) - len(shown), 'vote')} not shown; --limit 0 shows all.", style="dim"))


def _print(console: Console, found: Sequence[Judged]) -> None:
    table = grid(
        "version", "judge", "score", "passed", "judged", "cost", "model", "asked as", numbers=("score", "passed", "judged", "cost")
    )
    for one in found:
        told = one.numbers
        score = None if told["score"] is None else f"{told['score']:.3f}"
        share = None if told["share_passed"] is None else f"{told['share_passed']:.1%}"
        judged_of = f"{told['judged']:,} of {told['judged'] + told['not_judged']:,}"
        cost = f"{told['cost']:.6g}" if told["cost"] else None
        name = f"{one.seal.agent}.{one.judge}"
        version = told["version"].removeprefix("sha256:")[:8]
        table.add_row(*map(cell, (f"@{one.seal.version}", name, score, share, judged_of, cost, told["model"], version)))
    console.print(table)


def _print_votes(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    table = grid("judge", "record", "vote", "passed", "score", "reason", numbers=("vote", "score"))
    for row in rows:
        passed = (
            Text("not judged", style="yellow")
            if row["passed"] is None
            else Text("yes" if row["passed"] else "no", style=_STYLE[row["passed"]])
        )
        said = row["unjudged"] if row["passed"] is None else plain(row["reason"])
        table.add_row(cell(row["judge"]), cell(row["record"]), cell(row["vote"]), passed, cell(row["score"]), cell(said))
    console.print(table)


_STYLE = {True: "green", False: "red"}
