"""`audit`: all that is known of a decision, for people who were not there."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from dagster_mao.cli._app import HOME, Json, Root, Storage, app, me
from dagster_mao.cli._print import cell, grid, misused, plain, print_json, print_rows, status, terminal
from dagster_mao.cli._where import open_store, placed, project
from dagster_mao.errors import StoreError
from dagster_mao.home import is_home
from dagster_mao.review.dossier import ROWS, Disclosure, Dossier, Evidence, as_json, dossier, finding_text, with_urls
from dagster_mao.state.store import StateStore


@app.command("audit", epilog="Example: dagster-mao audit credit/2026-03-03 --record 417")
def audit_command(
    workflow: Annotated[str, typer.Argument(help="A workflow id, <pipeline>/<key>.")],
    record: Annotated[str | None, typer.Option(metavar="KEY", help="Only the record with this key.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option(help="The HTML file to write; one beside it has the JSON.", show_default=False)] = None,
    unmask: Annotated[bool, typer.Option("--unmask", help="Show personal fields. Recorded in the workflow's log, with --why.")] = False,
    why: Annotated[str | None, typer.Option(help="With --unmask: what they are needed for.", show_default=False)] = None,
    by: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --unmask: who is to see them; else this terminal's user.", show_default=False)
    ] = None,
    rows: Annotated[int, typer.Option(min=0, help="Records of a version, and calls, to show.")] = ROWS,
    url: Annotated[str | None, typer.Option(help="Address of Dagster's UI, for links to the runs.", show_default=False)] = None,
    dagster_home: Annotated[
        str | None, typer.Option(help=f"Dagster home to ask about runs and checks; else ${HOME}, else pyproject.toml.", show_default=False)
    ] = None,
    json_: Json = False,
    root: Root = None,
    storage_option: Storage = None,
) -> None:
    """Write the dossier of a workflow, or of one record: what came in, what every agent read and said, by which code, and if it is intact.

    One HTML page that needs no network, and the same as JSON; with --json only that, printed. Exits with 1 if something is not as it was
    sealed.
    """
    if unmask != (why is not None) or (by and not unmask):
        misused("--unmask takes --why, what the personal fields are needed for; --why and --by go with --unmask")
    if json_ and out:
        misused("--json prints, and --out writes both: choose one")
    store = open_store(root, storage_option)
    disclosure = Disclosure(by or me(), why) if why else None
    evidence = _evidence(store, workflow, dagster_home)
    told = dossier(store, workflow, record=record, disclosure=disclosure, evidence=evidence and with_urls(evidence, url), rows=rows)
    if json_:
        print_json(as_json(told))
    else:
        _print(told, _written(told, out or Path(_name(told))))
    raise typer.Exit(0 if told.is_intact else 1)


def _evidence(store: StateStore, workflow: str, dagster_home: str | None) -> Evidence | None:
    """What Dagster knows; None when there is no event log to ask."""
    configured, where = project()
    home = dagster_home or os.environ.get(HOME) or placed(configured.get("dagster_home"), where)
    if not home or (not dagster_home and not is_home(Path(home).expanduser())):
        return None
    with status("reading Dagster's event log"):
        from dagster_mao.dagster.anchors import opened
        from dagster_mao.dagster.evidence import evidence

        with opened(home) as instance:
            return evidence(instance, store, workflow, home)


def _name(told: Dossier) -> str:
    about = told.workflow_id if told.record is None else f"{told.workflow_id}-{told.record}"
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", about).strip("-.") + ".html"


def _written(told: Dossier, file: Path) -> list[Path]:
    from pydantic_core import to_json

    from dagster_mao.review.page import as_html  # imports jinja2, which no other command needs

    facts = to_json(as_json(told), indent=1, inf_nan_mode="strings", bytes_mode="base64", fallback=str)
    try:
        file.write_text(as_html(told), encoding="utf-8")
        file.with_suffix(".json").write_bytes(facts)
    except OSError as error:
        raise StoreError(f"{file} cannot be written: {error.strerror}", fix="name another file by --out") from error
    return [file, file.with_suffix(".json")]


def _print(told: Dossier, files: list[Path]) -> None:
    console = terminal()
    about = f", record {plain(told.record)}" if told.record is not None else ""
    console.print(Text(f"{plain(told.workflow_id)}{about}", style="bold"))
    if not told.decided:
        console.print("Nothing is in effect: no attempt has completed, or what it did was undone.")
    for version in told.decided if told.record is None else [v for v in told.versions if v.is_effective]:
        console.print()
        read = ", ".join(f"{parent.agent}@{parent.version}" for parent in version.seal.parents) or "nothing: it is the entry"
        console.print(Text(plain(f"{version.seal.agent} @{version.seal.version}, from {read}"), style="bold"))
        print_rows(console, list(version.said[: 3 if told.record is None else None]))
    if refused := [one for one in told.refused if one.status == "open"]:
        table = grid("in quarantine", "record", "broke")
        for one in refused[:10]:
            table.add_row(cell(one.seal.agent), cell(one.record), cell(", ".join(one.rules)))
        console.print(table)
    for note in told.notes:
        console.print(Text(f"Note: {plain(note)}", style="dim"), soft_wrap=True)
    _print_verdict(told)
    console.print(Text(f"Written to {' and '.join(plain(file) for file in files)}"), soft_wrap=True)


def _print_verdict(told: Dossier) -> None:
    console = terminal()
    report = told.verification
    for finding in report.findings:
        console.print(Text(plain(finding_text(finding)), style="red"), soft_wrap=True)
    compared = f", and {report.anchored:,} anchors of Dagster's event log" if report.anchors_compared else ""
    if told.is_intact:
        console.print(Text(f"Untouched since: {report.versions:,} versions, {report.files:,} files{compared}.", style="green"))
    else:
        console.print(Text("This is not what was sealed.", style="red"))
