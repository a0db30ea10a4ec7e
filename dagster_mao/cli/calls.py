"""`calls`: what the agents' calls came to, try by try."""

from __future__ import annotations

from typing import Annotated, Any

import polars as pl
import typer
from rich.console import Console
from rich.text import Text

from dagster_mao.cli._app import AsOf, Json, Root, Storage, app
from dagster_mao.cli._print import cell, counted, grid, plain, print_json, terminal
from dagster_mao.cli._where import open_store, when_of
from dagster_mao.review.calls import UNANSWERED, calls, told_of
from dagster_mao.review.history import parse_reference
from dagster_mao.state import CallSummary

_SHOWN = 30
_STYLES = {"failed": "red", "timed_out": "red", "refused": "yellow", "fallback": "yellow", "reused": "dim"}


@app.command("calls", epilog="Example: dagster-mao calls credit/2026-01-01 --agent credit_score --failed")
def calls_command(
    reference: Annotated[str, typer.Argument(metavar="WORKFLOW[@N]", help="A workflow, or the run of one version; also WORKFLOW@TIME.")],
    agent: Annotated[str | None, typer.Option(metavar="NAME", help="Show only this agent's calls.", show_default=False)] = None,
    failed: Annotated[bool, typer.Option("--failed", help="Show only tries that failed, timed out or were refused.")] = False,
    limit: Annotated[
        int | None, typer.Option(min=0, help=f"Newest tries to list; 0 for all. {_SHOWN} for people, all in JSON.", show_default=False)
    ] = None,
    as_of: AsOf = None,
    json_: Json = False,
    root: Root = None,
    storage_option: Storage = None,
) -> None:
    """List the calls of a workflow's agents, oldest first, and what they came to: also those of steps that failed."""
    store = open_store(root, storage_option, damaged=True)  # a workflow's first step may have failed: there are calls, and no seal
    workflow, when = parse_reference(reference)
    when = when_of(when, as_of)
    found = calls(store, workflow, when, agent=agent)
    summaries = {name: CallSummary.of(rows) for (name,), rows in found.group_by("agent", maintain_order=True)}
    chosen = found.filter(pl.col("outcome").is_in(UNANSWERED)) if failed else found
    most = (0 if json_ else _SHOWN) if limit is None else limit
    shown = chosen.tail(most) if most else chosen
    if json_:
        came_to = {str(name): summary.model_dump() for name, summary in summaries.items()}
        told = {"version": when, "as_of": None} if isinstance(when, int) else {"version": None, "as_of": when}
        print_json({"workflow_id": workflow, **told, "summary": came_to, "calls": shown.to_dicts()})
        return
    console = terminal()
    if shown.height:
        _print_calls(console, shown)
    if shown.height < chosen.height:
        console.print(Text(f"{counted(chosen.height - shown.height, 'earlier row')} not shown; --limit 0 shows all.", style="dim"))
    for name, summary in summaries.items():
        console.print(Text.assemble((plain(name), "bold"), f": {told_of(summary)}."), soft_wrap=True)
    if not summaries:
        console.print("No calls were made.")
    elif failed and not chosen.height:
        console.print("None of them failed.")


def _print_calls(console: Console, rows: pl.DataFrame) -> None:
    headings = ["started (UTC)", *(["agent"] if rows["agent"].n_unique() > 1 else []), "record", "try", "outcome", "seconds", "tokens"]
    table = grid(*headings, "error", numbers=("try", "seconds", "tokens"))
    for row in rows.iter_rows(named=True):
        told: dict[str, Any] = {
            "started (UTC)": f"{row['started']:%m-%d %H:%M:%S}",
            "agent": row["agent"],
            "record": row["record"],
            "try": row["number"] or None,
            "outcome": Text(plain(row["outcome"]).replace("_", " "), style=_STYLES.get(row["outcome"], "")),
            "seconds": f"{row['latency_seconds']:.3f}" if row["number"] else None,
            "tokens": tokens if (tokens := row["input_tokens"] + row["output_tokens"]) else None,
            "error": row["error"].rpartition(".")[2] if row["error"] else None,
        }
        table.add_row(*(value if isinstance(value := told[name], Text) else cell(value) for name in headings), cell(told["error"]))
    console.print(table)
