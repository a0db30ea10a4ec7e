"""The command line: what happened in a store, read without the pipeline's code. Nothing here writes to a store.

Exit codes: 0 good, 1 a bad answer (findings, differences, nothing by that name, a store that cannot be read), 2 wrong usage.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from polars.exceptions import PanicException
from pydantic_core import to_json
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

from dagster_mao.errors import MaoError, StoreError, UnknownVersionError
from dagster_mao.review.diff import Difference, diff
from dagster_mao.review.history import facts, history, known, parse_reference, records, resolve, with_record
from dagster_mao.state.seal import Seal
from dagster_mao.state.store import StateStore
from dagster_mao.state.verify import Anchor, Finding, Report, pipelines, verify

ROOT, HOME = "DAGSTER_MAO_ROOT", "DAGSTER_HOME"


class _Commands(TyperGroup):
    """Turns our own errors into one line and exit code 1. Anything else is a defect and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MaoError as error:
            typer.echo(f"error: {_plain(error)}", err=True)
            raise typer.Exit(1) from None
        except PanicException:  # how polars meets a Parquet file that was cut short; it has told the terminal already
            typer.echo("error: a file of the store is damaged. Fix: `dagster-mao verify` says which", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Commands,
    name="dagster-mao",
    help="Look into the state of multi-agent pipelines: which agent, which version, which input made this decision?",
    epilog=f"The state is found by --root, else ${ROOT}, else \\[tool.dagster-mao] in the nearest pyproject.toml upward.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,  # locals hold records
)

Root = Annotated[str | None, typer.Option("--root", help="Root of the state store: a folder or an object-store URI.", show_default=False)]
Storage = Annotated[
    list[str] | None,
    typer.Option("--storage-option", metavar="KEY=VALUE", help="Storage option for an object store; repeatable.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("history", epilog="Example: dagster-mao history credit/2026-01-01")
def history_command(
    workflow: Annotated[str | None, typer.Argument(help="A workflow id, <pipeline>/<key>; all when left out.", show_default=False)] = None,
    limit: Annotated[int | None, typer.Option(min=0, help="Newest versions to list; 0 for all. 50 for people, all in JSON.")] = None,
    json_: Json = False,
    root: Root = None,
    storage_option: Storage = None,
) -> None:
    """List the state versions of one workflow, or of all, oldest first."""
    store = _store(root, storage_option)
    seals = history(store, workflow)
    shown = _newest(seals, (0 if json_ else 50) if limit is None else limit)
    if json_:
        _print_json([facts(seal) for seal in shown])
        return
    console = _console()
    for name, chain in _grouped(shown).items():
        console.print(Text(_plain(name), style="bold"))
        console.print(_versions_table(chain))
    if len(shown) < len(seals):
        console.print(f"{len(seals) - len(shown)} older versions are not shown; --limit 0 shows all.")
    if not seals:
        console.print("Nothing was sealed here yet.")


@app.command("show", epilog="Example: dagster-mao show credit/2026-01-01@3 --record A17")
def show_command(
    reference: Annotated[str, typer.Argument(metavar="WORKFLOW[@N]", help="A workflow (its effective state), or one version of it.")],
    record: Annotated[str | None, typer.Option(metavar="KEY", help="Show the record with this key.", show_default=False)] = None,
    agent: Annotated[str | None, typer.Option(metavar="NAME", help="Show only this agent's version.", show_default=False)] = None,
    rows: Annotated[int, typer.Option(min=0, help="Records of a version to show.")] = 3,
    json_: Json = False,
    root: Root = None,
    storage_option: Storage = None,
) -> None:
    """Show a workflow's effective state, one version, or one record through all agents; personal fields masked."""
    store = _store(root, storage_option)
    workflow, version = resolve(store, reference)
    seals = _chosen(store, workflow, version, agent)
    whole = version is None and agent is None
    if record is not None:
        _show_records(workflow, with_record(store, seals, record), whole=whole, as_json=json_)
    elif whole:
        _show_effective(store, workflow, seals, as_json=json_)
    else:
        _show_records(workflow, [(seals[0], records(store, seals[0], limit=rows))], whole=False, as_json=json_)


@app.command("diff", epilog="Example: dagster-mao diff credit/2026-01-01@5 credit/2026-01-02@5")
def diff_command(
    left: Annotated[str, typer.Argument(metavar="A@N", help="The version to start from.")],
    right: Annotated[str, typer.Argument(metavar="B@M", help="The version to compare it with.")],
    limit: Annotated[int | None, typer.Option(min=0, help="Differing records to list; 0 for all. 20 for people, all in JSON.")] = None,
    json_: Json = False,
    root: Root = None,
    storage_option: Storage = None,
) -> None:
    """Compare two versions record by record, and say what else was different when they were made.

    Exits with 0 when the records are the same, with 1 when they differ. Fields marked personal are masked.
    """
    references = [_versioned(text) for text in (left, right)]
    store = _store(root, storage_option)
    seals = [_sealed(store, workflow, version) for workflow, version in references]
    most = (0 if json_ else 20) if limit is None else limit
    found = diff(store, *seals, limit=most or None)
    if json_:
        _print_json(_difference_as_json(found))
    else:
        _print_difference(found)
    raise typer.Exit(0 if found.equal else 1)


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
    store = _store(root, storage_option, damaged=True)
    home, anchors, told = _anchors(store, dagster_home)
    report = verify(store, workflow, anchors=anchors)
    if json_:
        _print_json(_report_as_json(store, report, home, told))
    else:
        _print_report(store, report, told)
    raise typer.Exit(0 if report.good else 1)


# Where things are -----------------------------------------------------------------------------------------------------------------


def _store(root: str | None, storage_option: Sequence[str] | None, *, damaged: bool = False) -> StateStore:
    """The store that options, environment and project say. Raises `StoreError` when there is no state in it; creates nothing.

    With `damaged`, a store that has lost its log is still one, to be looked into.
    """
    options = _options(storage_option)
    configured, where = _project()
    said = [(root, "--root"), (os.environ.get(ROOT), f"${ROOT}"), (_placed(configured.get("root"), where), str(where))]
    place, by = next(((place, by) for place, by in said if place), ("", ""))
    if not place:
        raise StoreError("No state store is named", fix=f"give --root, set {ROOT}, or put root under [tool.dagster-mao] in pyproject.toml")
    store = StateStore(place, {**configured.get("storage_options", {}), **options})
    if not any(_holds(store, folder) for folder in (("state_log", "tables") if damaged else ("state_log",))):
        raise StoreError(f"There is no state at {store.root} (named by {by})", fix="run the pipeline first, or name another root")
    return store


def _holds(store: StateStore, folder: str) -> bool:
    return next(iter(store.objects.list(folder)), None) is not None


def _options(pairs: Iterable[str] | None) -> dict[str, str]:
    options = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not (name and equals):
            _misused(f"--storage-option takes KEY=VALUE, not {pair!r}")
        options[name] = value
    return options


def _project() -> tuple[dict[str, Any], Path]:
    """[tool.dagster-mao] of the nearest pyproject.toml upward that has one, and that file."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        file = folder / "pyproject.toml"
        if file.is_file():
            try:
                table = _toml(file).get("tool", {}).get("dagster-mao")
            except (OSError, ValueError) as error:
                raise StoreError(f"{file} cannot be read: {error}", fix="mend it, or work with --root from another folder") from error
            if table is not None:
                return dict(table), file
    return {}, here / "pyproject.toml"


def _toml(file: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(file.read_text(encoding="utf-8"))


def _placed(place: str | None, file: Path) -> str | None:
    """A path of pyproject.toml counts from that file's folder."""
    return place if not place or "://" in place else str(file.parent / place)


def _anchors(store: StateStore, dagster_home: str | None) -> tuple[str | None, list[Anchor] | None, str]:
    """The Dagster home, its anchors (None when there is no event log to compare with), and a sentence on it."""
    configured, where = _project()
    home = dagster_home or os.environ.get(HOME) or _placed(configured.get("dagster_home"), where)
    if not home:
        return None, None, "no Dagster home is named (--dagster-home)"
    with _status("reading Dagster's event log"):
        # Importing Dagster takes seconds: nothing but this needs it.
        from dagster_mao.dagster.anchors import is_home, opened, read_anchors

        if not dagster_home and not is_home(Path(home).expanduser()):
            return home, None, f"there is no Dagster history at {home}"
        with opened(home) as instance:
            return home, read_anchors(instance, pipelines(store)), home


# What was asked for ---------------------------------------------------------------------------------------------------------------


def _chosen(store: StateStore, workflow: str, version: int | None, agent: str | None) -> list[Seal]:
    """The one version asked for, or the effective state (all agents, or the one asked for) in the order it was sealed."""
    if version is not None:
        seal = store.seal_at(workflow, version)
        if agent not in (None, seal.agent):
            raise UnknownVersionError(f"Version {version} is by {seal.agent}, not by {agent}", workflow=workflow)
        return [seal]
    state = store.effective(workflow)
    if agent is not None:
        if agent not in state:
            there = ", ".join(state) or "nothing: no attempt has completed"
            raise UnknownVersionError(
                "The effective state has no version by this agent", agent=agent, workflow=workflow, fix=f"it has {there}"
            )
        return [state[agent]]
    return sorted(state.values(), key=lambda seal: seal.version)


def _versioned(text: str) -> tuple[str, int]:
    workflow, version = parse_reference(text)
    if version is None:
        _misused(f"{text!r} names no version: write WORKFLOW@N")
    return workflow, version


def _sealed(store: StateStore, workflow: str, version: int) -> Seal:
    known(store, workflow)
    return store.seal_at(workflow, version)


def _misused(message: str) -> NoReturn:
    raise typer.BadParameter(_plain(message))


def _newest(seals: list[Seal], limit: int) -> list[Seal]:
    return seals[-limit:] if limit else seals


def _grouped(seals: Iterable[Seal]) -> dict[str, list[Seal]]:
    chains: dict[str, list[Seal]] = {}
    for seal in seals:
        chains.setdefault(seal.workflow_id, []).append(seal)
    return chains


# For machines ---------------------------------------------------------------------------------------------------------------------


def _print_json(value: Any) -> None:
    # Not through rich, which wraps. NaN is no JSON, and not all bytes are UTF-8.
    typer.echo(to_json(value, indent=2, ensure_ascii=True, inf_nan_mode="strings", bytes_mode="base64", fallback=str).decode())


def _difference_as_json(found: Difference) -> dict[str, Any]:
    rest = {name: getattr(found, name) for name in ("equal", "key", "added", "removed", "changed", "same", "by_field", "circumstances")}
    return {
        "left": facts(found.left),
        "right": facts(found.right),
        **rest,
        "columns": dict(found.columns),
        "records": [dataclasses.asdict(record) for record in found.records],
    }


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


# For people -----------------------------------------------------------------------------------------------------------------------


def _console(*, err: bool = False) -> Console:
    return Console(stderr=err, highlight=False, markup=False, emoji=False)


def _status(what: str) -> Any:
    return _console(err=True).status(what)


def _plain(value: Any) -> str:
    """Text that can do nothing to a terminal: what is not printable (escape sequences, line ends, reversed text) is written out."""
    text = value if isinstance(value, str) else str(value)
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _cell(value: Any) -> Text:
    """A value in a table. `Text` is not looked through for markup, so nothing in it is interpreted."""
    if value is None:
        return Text("-", style="dim")
    if isinstance(value, float):
        return Text(f"{value:.10g}")
    if isinstance(value, (dict, list)):
        value = json.dumps(value, default=str, ensure_ascii=False)
    return Text(_plain(value), overflow="fold")


_UNBROKEN = ("n", "rows", "digest", "sealed (UTC)")


def _table(*headings: str, numbers: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right" if heading in numbers else "left", overflow="fold", no_wrap=heading in _UNBROKEN)
    return table


def _sheet() -> Table:
    """One name and value a line; names are never broken."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def _versions_table(seals: Sequence[Seal]) -> Table:
    quarantined = any(seal.quarantined for seal in seals)
    headings = ["n", "agent", "from", "rows", *(["quarantined"] if quarantined else []), "attempt", "digest", "sealed (UTC)"]
    table = _table(*headings, numbers=("n", "rows", "quarantined"))
    for seal in seals:
        made_from = ", ".join(str(parent.version) for parent in seal.parents) or seal.kind
        told = [seal.version, seal.agent or None, made_from, f"{seal.row_count:,}"]
        told += [f"{seal.quarantined:,}"] if quarantined else []
        table.add_row(*map(_cell, [*told, seal.attempt[:8], seal.digest[:8] or None, _moment(seal)]))
    return table


def _show_effective(store: StateStore, workflow: str, state: Sequence[Seal], *, as_json: bool) -> None:
    head = store.seals(workflow)[-1]
    if as_json:
        _print_json({"workflow_id": workflow, "head": head.version, "versions": [facts(seal) for seal in state]})
        return
    console = _console()
    console.print(Text(f"{_plain(workflow)}: the effective state, left by completed attempts", style="bold"))
    table = _table("agent", "n", "rows", "contract", "code version", "sealed (UTC)", numbers=("n", "rows"))
    for seal in state:
        contract = f"{seal.contract} v{seal.contract_version}"
        version = seal.agent_version.removeprefix("sha256:")
        told = [seal.agent, seal.version, f"{seal.row_count:,}", contract, version, _moment(seal)[:-3]]
        table.add_row(*map(_cell, told))
    if state:
        console.print(table)
        shown = f"dagster-mao show '{_plain(workflow)}@{state[-1].version}'"
        console.print(Text(f"One version with its records: {shown}", style="dim"), soft_wrap=True)
    else:
        console.print(f"No attempt has completed. Versions 0 to {head.version} are of unfinished or fenced ones; see dagster-mao history.")


def _show_records(workflow: str, found: Sequence[tuple[Seal, list[dict[str, Any]]]], *, whole: bool, as_json: bool) -> None:
    if as_json:
        told = [{**facts(seal), "contract_schema": _described(seal), "records": rows} for seal, rows in found]
        _print_json({"workflow_id": workflow, "versions": told} if whole else told[0])
        return
    console = _console()
    for seal, rows in found:
        console.print(Text(_plain(f"{seal.reference}: {seal.agent or seal.kind}"), style="bold"))
        if not whole:
            console.print(_facts_table(seal))
        _print_rows(console, rows)
        if len(rows) < seal.row_count and not whole:
            console.print(Text(f"{len(rows):,} of {seal.row_count:,} records; --rows and --record show others.", style="dim"))


def _described(seal: Seal) -> Any:
    try:
        return json.loads(seal.contract_schema)
    except ValueError:
        return None


def _facts_table(seal: Seal) -> Table:
    table = _sheet()
    parents = [f"{parent.agent} {parent.workflow_id}@{parent.version} {parent.digest[:12]}" for parent in seal.parents]
    told = {
        "kind": f"{seal.kind}, attempt {seal.attempt}, epoch {seal.epoch}",
        "made from": parents,
        "records": f"{seal.row_count:,}" + (f", and {seal.quarantined:,} in quarantine" if seal.quarantined else ""),
        "contract": f"{seal.contract} v{seal.contract_version} ({seal.contract_hash[:12]})" if seal.contract else "",
        "agent version": seal.agent_version,
        "configuration": seal.config,
        "model": seal.model,
        "sealed (UTC)": f"{_moment(seal)}, after {seal.latency_seconds:.3f} s",
        "run": seal.run_id,
        "file": seal.path,
        "digest": seal.digest,
        "seal digest": seal.seal_digest,
        "chained to": seal.previous_digest,
    }
    for name, value in told.items():
        for line in value if isinstance(value, list) else [value] if value else []:
            table.add_row(Text(name, style="dim"), _cell(line))
            name = ""  # noqa: PLW2901  the name stands before the first line only
    return table


def _print_rows(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """As a table if that fits the width, else one field a line."""
    if not rows:
        return
    cells = [{name: _cell(value) for name, value in row.items()} for row in rows]
    widths = {name: max(len(_plain(name)), *(row[name].cell_len for row in cells)) for name in cells[0]}
    if len(rows) > 1 and sum(width + 2 for width in widths.values()) <= console.width:
        table = _table(*(_plain(name) for name in widths))
        for row in cells:
            table.add_row(*row.values())
        console.print(table)
        return
    for row in cells:
        table = _sheet()
        for name, cell in row.items():
            table.add_row(Text(_plain(name), style="cyan"), cell)
        console.print(table)
        console.print()


def _print_difference(found: Difference) -> None:
    console = _console()
    for sign, seal in (("-", found.left), ("+", found.right)):
        console.print(Text(_plain(f"{sign} {seal.reference}: {seal.agent}, {seal.row_count:,} records, {_moment(seal)} UTC"), style="bold"))
    if found.circumstances:
        table = _table("what else changed", "from", "to")
        for name, (before, after) in found.circumstances.items():
            table.add_row(_cell(name), _cell(_short(before)), _cell(_short(after)))
        console.print(table)
        console.print()
    for name, change in found.columns:
        console.print(Text(_plain(f"field {name}: {change if change != 'changed' else 'another type'}")))
    counts = f"{found.added:,} added, {found.removed:,} removed, {found.changed:,} changed, {found.same:,} the same"
    console.print("The records are the same." if found.equal else f"Records: {counts}.")
    if found.by_field:
        console.print(Text(_plain("Changed fields: " + ", ".join(f"{name} ({count:,})" for name, count in found.by_field.items()))))
    if found.records:
        table = _table(_plain(found.key or "record"), "change", "field", "from", "to")
        for record in found.records:
            key = _cell("the only one" if found.key is None else record.key)
            for name, (before, after) in record.fields.items() or [("", ("", ""))]:
                table.add_row(key, _cell(record.change), _cell(name), _cell(before), _cell(after))
        console.print(table)
    unlisted = found.added + found.removed + found.changed - len(found.records)
    if unlisted > 0:
        console.print(f"{unlisted:,} more; --limit 0 shows all.")


def _print_report(store: StateStore, report: Report, told: str) -> None:
    console = _console()
    for finding in report.findings:
        _print_finding(console, finding, "red")
    for warning in report.warnings:
        _print_finding(console, warning, "yellow")
    amount = f"{_count(report.files, 'snapshot')} ({decimal(report.size_bytes)}), {_count(report.tables, 'Delta table')}"
    looked_at = (
        f"Looked at {_count(report.versions, 'version')} of {_count(report.workflows, 'workflow')} at {store.root}: "
        f"{amount}, every row of the log and its link."
    )
    console.print(Text(_plain(looked_at)), soft_wrap=True)
    if report.anchors_compared:
        compared = f"Compared with Dagster's event log at {told}: {report.anchored:,} anchored, {report.unanchored:,} unanchored."
    else:
        compared = (
            f"Not compared with Dagster's event log: {told}. "
            "A cut tail, or a history written anew with all its digests, can only be found with it."
        )
    console.print(Text(_plain(compared)), soft_wrap=True)
    for place, count in report.foreign.items():
        console.print(Text(_plain(f"{count:,} anchors there are of another store, at {place}: not compared.")), soft_wrap=True)
    if report.good:
        console.print(Text("All of this is as it was sealed.", style="green"))
    else:
        console.print(Text(f"{_count(len(report.findings), 'finding')}: this is not what was sealed.", style="red"))


def _print_finding(console: Console, finding: Finding, style: str) -> None:
    where = finding.workflow or "the state log"
    where += f"@{finding.version}" if finding.version is not None else ""
    console.print(Text.assemble((finding.kind, style), "  ", (_plain(where), "bold"), f": {_plain(finding.detail)}"), soft_wrap=True)
    if finding.file:
        console.print(Text(f"    {_plain(finding.file)}", style="dim"), soft_wrap=True)


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _moment(seal: Seal) -> str:
    return f"{seal.sealed_at:%Y-%m-%d %H:%M:%S}"


def _short(value: Any) -> Any:
    """Digests by their first twelve digits."""
    if isinstance(value, str) and len(value) >= 40 and all(char in "0123456789abcdef" for char in value.removeprefix("sha256:")):
        return value[: len(value) - len(value.removeprefix("sha256:")) + 12]
    return value
