"""`verify`: is everything still what it was when it was sealed?"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.text import Text

from dagster_mao.cli._app import HOME, Json, Root, Storage, app
from dagster_mao.cli._print import counted, plain, print_json, status, terminal
from dagster_mao.cli._where import open_store, placed, project
from dagster_mao.home import is_home
from dagster_mao.state.store import StateStore
from dagster_mao.state.verify import Anchor, Finding, Report, pipelines, verify


@app.command("verify", epilog="Example: dagster-mao verify --dagster-home .mao/dagster_home")
def verify_command(
    workflow: Annotated[str | None, typer.Argument(help="A workflow id; the whole store when left out.", show_default=False)] = None,
    dagster_home: Annotated[
        str | None,
        typer.Option(help=f"Dagster home whose event log to compare with; else ${HOME}, else pyproject.toml.", show_default=False),
    ] = None,
    json_: Json = False,
    root: Root = None,
    storage_option: Storage = None,
) -> None:
    """Recompute every digest, walk the chain, and compare it with Dagster's event log.

    Exits with 0 only if everything is as it was sealed. Versions that are sealed but not in the event log are a warning.
    """
    store = open_store(root, storage_option, damaged=True)
    home, anchors, told = _anchors(store, dagster_home)
    report = verify(store, workflow, anchors=anchors)
    if json_:
        print_json(_report_as_json(store, report, home, told))
    else:
        _print_report(store, report, told)
    raise typer.Exit(0 if report.good else 1)


def _anchors(store: StateStore, dagster_home: str | None) -> tuple[str | None, list[Anchor] | None, str]:
    """The Dagster home, its anchors (None when there is no event log to compare with), and a sentence on it."""
    configured, where = project()
    home = dagster_home or os.environ.get(HOME) or placed(configured.get("dagster_home"), where)
    if not home:
        return None, None, "no Dagster home is named (--dagster-home)"
    if not dagster_home and not is_home(Path(home).expanduser()):
        return home, None, f"there is no Dagster history at {home}"
    with status("reading Dagster's event log"):
        # Importing Dagster takes seconds: nothing but this needs it.
        from dagster_mao.dagster.anchors import opened, read_anchors

        with opened(home) as instance:
            return home, read_anchors(instance, pipelines(store)), home


def _report_as_json(store: StateStore, report: Report, home: str | None, told: str) -> dict[str, Any]:
    told_about = ("workflows", "versions", "files", "size_bytes", "tables")
    anchors = {"dagster_home": home, "compared": report.anchors_compared, "not_compared_because": None if report.anchors_compared else told}
    return {
        "good": report.good,
        "root": store.root,
        **{name: getattr(report, name) for name in told_about},
        "anchors": {**anchors, "anchored": report.anchored, "unanchored": report.unanchored, "foreign": dict(report.foreign)},
        "findings": [dataclasses.asdict(finding) for finding in report.findings],
        "warnings": [dataclasses.asdict(warning) for warning in report.warnings],
    }


def _print_report(store: StateStore, report: Report, told: str) -> None:
    console = terminal()
    for finding in report.findings:
        _print_finding(console, finding, "red")
    for warning in report.warnings:
        _print_finding(console, warning, "yellow")
    amount = f"{counted(report.files, 'snapshot')} ({decimal(report.size_bytes)}), {counted(report.tables, 'Delta table')}"
    looked_at = (
        f"Looked at {counted(report.versions, 'version')} of {counted(report.workflows, 'workflow')} at {store.root}: "
        f"{amount}, every row of the log and its link."
    )
    console.print(Text(plain(looked_at)), soft_wrap=True)
    if report.anchors_compared:
        compared = f"Compared with Dagster's event log at {told}: {report.anchored:,} anchored, {report.unanchored:,} unanchored."
    else:
        compared = (
            f"Not compared with Dagster's event log: {told}. "
            "A cut tail, or a history written anew with all its digests, can only be found with it."
        )
    console.print(Text(plain(compared)), soft_wrap=True)
    for place, count in report.foreign.items():
        console.print(Text(plain(f"{count:,} anchors there are of another store, at {place}: not compared.")), soft_wrap=True)
    if report.good:
        console.print(Text("All of this is as it was sealed.", style="green"))
    else:
        console.print(Text(f"{counted(len(report.findings), 'finding')}: this is not what was sealed.", style="red"))


def _print_finding(console: Console, finding: Finding, style: str) -> None:
    where = finding.workflow or "the state log"
    where += f"@{finding.version}" if finding.version is not None else ""
    console.print(Text.assemble((finding.kind, style), "  ", (plain(where), "bold"), f": {plain(finding.detail)}"), soft_wrap=True)
    if finding.file:
        console.print(Text(f"    {plain(finding.file)}", style="dim"), soft_wrap=True)
