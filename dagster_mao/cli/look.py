"""`history`, `show` and `diff`: what was sealed."""

from __future__ import annotations

import dataclasses
import datetime as dt
import json
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dagster_mao.cli._app import AsOf, Json, Root, Storage, app
from dagster_mao.cli._print import cell, grid, misused, moment, plain, print_json, print_rows, sheet, short, terminal
from dagster_mao.cli._where import moment_of, open_store, when_of
from dagster_mao.cli.contract import export, print_changes, show_changes, show_contracts
from dagster_mao.review.calls import told_of
from dagster_mao.review.deferred import waiting
from dagster_mao.review.diff import Difference, diff
from dagster_mao.review.history import as_of as effective_then
from dagster_mao.review.history import chosen, facts, history, parse_reference, records, resolve, sealed, with_record
from dagster_mao.review.verdicts import judged, said_by
from dagster_mao.state import When
from dagster_mao.state.calls import CallSummary
from dagster_mao.state.seal import Seal
from dagster_mao.state.store import StateStore

_DEFERRED_SHOWN = 10


@app.command("history", epilog="Example: dagster-mao history credit/2026-01-01")
def history_command(
    reference: Annotated[
        str | None,
        typer.Argument(metavar="[WORKFLOW[@N]]", help="A workflow id, <pipeline>/<key>; all when left out.", show_default=False),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=0, help="Newest versions to list; 0 for all. 50 for people, all in JSON.")] = None,
    as_of: AsOf = None,
    json_: Json = False,
    root: Root = None,
    storage_option: Storage = None,
) -> None:
    """List the state versions of one workflow, or of all, oldest first: as they are now, or were up to a version or a moment."""
    when = moment_of(as_of)
    store = open_store(root, storage_option)
    if reference is None:
        seals = history(store, as_of=when)
    else:
        workflow, named = resolve(store, reference)
        seals = history(store, workflow, as_of=when_of(named, as_of))
    shown = _newest(seals, (0 if json_ else 50) if limit is None else limit)
    if json_:
        print_json([facts(seal) for seal in shown])
        return
    console = terminal()
    for name, chain in _grouped(shown).items():
        console.print(Text(plain(name), style="bold"))
        console.print(_versions_table(chain))
    if any(seal.quarantined for seal in shown):
        console.print(Text("held: records in quarantine; dagster-mao quarantine list shows them.", style="dim"))
    if any(seal.deferred for seal in shown):
        told = "waits: records deferred because a breaker was open; the next run asks for them, dagster-mao show names them."
        console.print(Text(told, style="dim"), soft_wrap=True)
    if len(shown) < len(seals):
        console.print(f"{len(seals) - len(shown)} older versions are not shown; --limit 0 shows all.")
    if not seals:
        console.print("Nothing was sealed here yet." if reference is None and when is None else "Nothing was sealed here at that time.")


@app.command("show", epilog="Example: dagster-mao show credit/2026-01-01@3 --record A17")
def show_command(
    reference: Annotated[
        str, typer.Argument(metavar="WORKFLOW[@N]", help="A workflow (its effective state), one version, or WORKFLOW@TIME.")
    ],
    record: Annotated[str | None, typer.Option(metavar="KEY", help="Show the record with this key.", show_default=False)] = None,
    agent: Annotated[str | None, typer.Option(metavar="NAME", help="Show only this agent's version.", show_default=False)] = None,
    rows: Annotated[int, typer.Option(min=0, help="Records of a version to show.")] = 3,
    contract: Annotated[bool, typer.Option("--contract", help="Show the contract instead of the records: fields, rules, readers.")] = False,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="B@M", help="With --contract: what changed since this version's. Exits with 1 if it breaks.", show_default=False
        ),
    ] = None,
    odcs: Annotated[bool, typer.Option("--odcs", help="With --contract: as YAML of the Open Data Contract Standard.")] = False,
    as_of: AsOf = None,
    json_: Json = False,
    root: Root = None,
    storage_option: Storage = None,
) -> None:
    """Show a workflow's effective state, one version, one record through all agents, or a contract; personal fields masked.

    The effective state is the one of now, or the one of a moment: of a workflow, or, with --as-of, of all workflows of a PIPELINE.
    """
    if not contract and (against or odcs):
        misused("--against and --odcs go with --contract")
    if contract and record is not None:
        misused("--contract shows no --record")
    if odcs and (against or json_):
        misused("--odcs goes with neither --against nor --json")
    if against:
        _require_version(against, agent)
    then = moment_of(as_of)
    store = open_store(root, storage_option)
    if then is not None and "/" not in reference:
        _show_pipeline(store, reference, then, agent, as_json=json_)
        return
    workflow, named = resolve(store, reference)
    when = when_of(named, as_of)
    seals = chosen(store, workflow, when, agent)
    whole = not isinstance(when, int) and agent is None
    if contract:
        _show_contract(store, workflow, seals, against, agent, whole=whole, as_json=json_, as_odcs=odcs)
    elif record is not None:
        _show_records(store, workflow, with_record(store, seals, record), whole=whole, as_json=json_)
    elif whole:
        _show_effective(store, workflow, seals, when, as_json=json_)
    else:
        _show_records(store, workflow, [(seals[0], records(store, seals[0], limit=rows))], whole=False, as_json=json_)


@app.command("diff", epilog="Example: dagster-mao diff credit/2026-01-01@5 credit/2026-01-02@5")
def diff_command(
    left: Annotated[str, typer.Argument(metavar="A@N", help="The version to start from; with --agent also WORKFLOW@TIME, or WORKFLOW.")],
    right: Annotated[str, typer.Argument(metavar="B@M", help="The version to compare it with; the same.")],
    agent: Annotated[
        str | None, typer.Option(metavar="NAME", help="Of a workflow now or at a moment, this agent's version.", show_default=False)
    ] = None,
    limit: Annotated[int | None, typer.Option(min=0, help="Differing records to list; 0 for all. 20 for people, all in JSON.")] = None,
    json_: Json = False,
    root: Root = None,
    storage_option: Storage = None,
) -> None:
    """Compare two versions record by record, and say what else was different when they were made.

    Exits with 0 when the records are the same, with 1 when they differ. Fields marked personal are masked.
    """
    for text in (left, right):
        _require_version(text, agent)
    store = open_store(root, storage_option)
    seals = [sealed(store, text, agent=agent) for text in (left, right)]
    most = (0 if json_ else 20) if limit is None else limit
    found = diff(store, *seals, limit=most or None)
    if json_:
        print_json(difference_as_json(found))
    else:
        print_difference(found)
    raise typer.Exit(0 if found.equal else 1)


def _show_contract(
    store: StateStore,
    workflow: str,
    seals: Sequence[Seal],
    against: str | None,
    agent: str | None,
    *,
    whole: bool,
    as_json: bool,
    as_odcs: bool,
) -> None:
    if against is not None:
        if len(seals) != 1:
            misused("--against compares one contract: name a version, WORKFLOW@N, or an --agent")
        show_changes(sealed(store, against, agent=agent), seals[0], as_json=as_json)
    elif as_odcs:
        export(seals)
    else:
        show_contracts(seals, store.seals(workflow), whole=whole, as_json=as_json)


def _require_version(text: str, agent: str | None) -> None:
    if agent is None and not isinstance(parse_reference(text)[1], int):
        misused(f"{text!r} names no version: write WORKFLOW@N, or name an --agent")


def _newest(seals: list[Seal], limit: int) -> list[Seal]:
    return seals[-limit:] if limit else seals


def _grouped(seals: Iterable[Seal]) -> dict[str, list[Seal]]:
    chains: dict[str, list[Seal]] = {}
    for seal in seals:
        chains.setdefault(seal.workflow_id, []).append(seal)
    return chains


def difference_as_json(found: Difference) -> dict[str, Any]:
    """All of it."""
    rest = {name: getattr(found, name) for name in ("equal", "key", "added", "removed", "changed", "same", "by_field", "circumstances")}
    return {
        "left": facts(found.left),
        "right": facts(found.right),
        **rest,
        "columns": dict(found.columns),
        "contract": [dataclasses.asdict(change) for change in found.contract],
        "records": [dataclasses.asdict(record) for record in found.records],
    }


def _versions_table(seals: Sequence[Seal]) -> Table:
    # Columns that most workflows never need: they are there when they say something.
    extra = {"held": [seal.quarantined for seal in seals], "waits": [seal.deferred or 0 for seal in seals]}
    extra = {name: counts for name, counts in extra.items() if any(counts)}
    table = grid("n", "agent", "from", "rows", *extra, "attempt", "digest", "sealed (UTC)", numbers=("n", "rows", *extra))
    for place, seal in enumerate(seals):
        made_from = ", ".join(str(parent.version) for parent in seal.parents) or seal.kind
        told = [seal.version, seal.agent or f"({seal.kind})", made_from, f"{seal.row_count:,}"]
        told += [f"{counts[place]:,}" for counts in extra.values()]
        # 80 columns hold a column more, or the seconds.
        table.add_row(*map(cell, [*told, seal.attempt[:8], seal.digest[:8] or None, moment(seal)[: -3 if extra else None]]))
    return table


def _show_pipeline(store: StateStore, pipeline: str, when: dt.datetime, agent: str | None, *, as_json: bool) -> None:
    """What was effective in all its workflows."""
    states = effective_then(store, pipeline, when)
    found = [seal for state in states.values() for seal in state.values() if agent in (None, seal.agent)]
    if as_json:
        print_json({"pipeline": pipeline, "as_of": when, "versions": [facts(seal) for seal in found]})
        return
    console = terminal()
    console.print(Text(f"{plain(pipeline)}: what was effective at {_utc(when)}", style="bold"), soft_wrap=True)
    table = grid("workflow", "agent", "n", "rows", "code version", "sealed (UTC)", numbers=("n", "rows"))
    for seal in found:
        version = seal.agent_version.removeprefix("sha256:")
        table.add_row(*map(cell, [seal.workflow_id, seal.agent, seal.version, f"{seal.row_count:,}", version, moment(seal)[:-3]]))
    console.print(table if found else "No attempt had completed.")


def _show_effective(store: StateStore, workflow: str, state: Sequence[Seal], when: When | None, *, as_json: bool) -> None:
    seals = store.seals(workflow, as_of=when)
    head = seals[-1].version if seals else None
    if as_json:
        print_json({"workflow_id": workflow, "as_of": when, "head": head, "versions": [facts(seal) for seal in state]})
        return
    console = terminal()
    then = f" at {_utc(when)}" if isinstance(when, dt.datetime) else ""
    console.print(Text(f"{plain(workflow)}: the effective state{then}, left by completed attempts", style="bold"), soft_wrap=True)
    table = grid("agent", "n", "rows", "contract", "code version", "sealed (UTC)", numbers=("n", "rows"))
    for seal in state:
        contract = f"{seal.contract} v{seal.contract_version}"
        version = seal.agent_version.removeprefix("sha256:")
        told = [seal.agent, seal.version, f"{seal.row_count:,}", contract, version, moment(seal)[:-3]]
        table.add_row(*map(cell, told))
    if state:
        console.print(table)
        shown = f"dagster-mao show '{plain(workflow)}@{state[-1].version}'"
        console.print(Text(f"One version with its records: {shown}", style="dim"), soft_wrap=True)
    else:
        had, what = ("had", "were") if then else ("has", "are")
        why = f"Versions 0 to {head} {what} of unfinished or fenced ones; see dagster-mao history."
        console.print(f"No attempt {had} completed. {why if head is not None else 'Nothing was sealed yet.'}", soft_wrap=True)


def _utc(when: dt.datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M:%S} UTC"


def _show_records(
    store: StateStore, workflow: str, found: Sequence[tuple[Seal, list[dict[str, Any]]]], *, whole: bool, as_json: bool
) -> None:
    if as_json:
        told = [
            {**facts(seal), "contract_schema": _described(seal), "records": rows, "deferred_records": waiting(store, seal)}
            for seal, rows in found
        ]
        print_json({"workflow_id": workflow, "versions": told} if whole else told[0])
        return
    console = terminal()
    for seal, rows in found:
        console.print(Text(plain(f"{seal.reference}: {seal.agent or seal.kind}"), style="bold"))
        if not whole:
            console.print(_facts_table(seal))
        print_rows(console, rows)
        if len(rows) < seal.row_count and not whole:
            console.print(Text(f"{len(rows):,} of {seal.row_count:,} records; --rows and --record show others.", style="dim"))
        if not whole:
            _print_deferred(console, store, seal)


def _print_deferred(console: Console, store: StateStore, seal: Seal) -> None:
    rows = waiting(store, seal, limit=_DEFERRED_SHOWN)
    if not rows:
        return
    console.print(Text("Waiting for the next run, because a breaker was open:", style="bold"))
    print_rows(console, rows)
    if len(rows) < (seal.deferred or 0):
        console.print(Text(f"{len(rows):,} of {seal.deferred:,} deferred records; --json has all.", style="dim"))


def _described(seal: Seal) -> Any:
    try:
        return json.loads(seal.contract_schema)
    except ValueError:
        return None


def _facts_table(seal: Seal) -> Table:
    table = sheet()
    parents = [f"{parent.agent} {parent.workflow_id}@{parent.version} {parent.digest[:12]}" for parent in seal.parents]
    told = {
        "kind": f"{seal.kind}, attempt {seal.attempt}, epoch {seal.epoch}",
        "made from": parents,
        "records": _counted(seal),
        "calls": told_of(CallSummary.model_validate_json(seal.usage)) if seal.usage else None,
        "judges": "; ".join(f"{one.judge}: {said_by(one)}" for one in judged([seal])) or None,
        "policy": f"overridden: {seal.policy}" if seal.policy else None,
        "contract": f"{seal.contract} v{seal.contract_version} ({seal.contract_hash[:12]})" if seal.contract else "",
        "agent version": f"{seal.agent_version}, registered as {seal.registration[:8]}" if seal.registration else seal.agent_version,
        "configuration": seal.config,
        "model": seal.model,
        "sealed (UTC)": f"{moment(seal)}, after {seal.latency_seconds:.3f} s",
        "run": seal.run_id,
        "file": seal.path,
        "digest": seal.digest,
        "seal digest": seal.seal_digest,
        "chained to": seal.previous_digest,
    }
    for name, value in told.items():
        for line in value if isinstance(value, list) else [value] if value else []:
            table.add_row(Text(name, style="dim"), cell(line))
            name = ""  # noqa: PLW2901  the name stands before the first line only
    return table


def _counted(seal: Seal) -> str:
    told = f"{seal.row_count:,}"
    told += f", {seal.fallbacks:,} of them by the fallback" if seal.fallbacks else ""
    told += f", and {seal.quarantined:,} in quarantine" if seal.quarantined else ""
    return told + (f", and {seal.deferred:,} wait for the next run" if seal.deferred else "")


def print_difference(found: Difference, *, right: str | None = None) -> None:
    """`right`: what is said of a right side that is no version."""
    console = terminal()
    for sign, seal in (("-", found.left), ("+", found.right)):
        told = f"{seal.reference}: {seal.agent}, {seal.row_count:,} records, {moment(seal)} UTC"
        console.print(Text(plain(f"{sign} {right if right and sign == '+' else told}"), style="bold"))
    print_circumstances(console, found)
    if found.circumstances:
        console.print()
    if print_changes(console, found.contract):
        console.print()
    for name, change in found.columns:
        console.print(Text(plain(f"field {name}: {change if change != 'changed' else 'another type'}")))
    counts = f"{found.added:,} added, {found.removed:,} removed, {found.changed:,} changed, {found.same:,} the same"
    console.print("The records are the same." if found.equal else f"Records: {counts}.")
    if found.by_field:
        console.print(Text(plain("Changed fields: " + ", ".join(f"{name} ({count:,})" for name, count in found.by_field.items()))))
    print_records_of(console, found)
    unlisted = found.added + found.removed + found.changed - len(found.records)
    if unlisted > 0:
        console.print(f"{unlisted:,} more; --limit 0 shows all.")


def print_circumstances(console: Console, found: Difference) -> None:
    """What else was different."""
    if found.circumstances:
        table = grid("what else changed", "from", "to")
        for name, (before, after) in found.circumstances.items():
            table.add_row(cell(name), cell(short(before)), cell(short(after)))
        console.print(table)


def print_records_of(console: Console, found: Difference) -> None:
    """The records that are listed, field by field."""
    if found.records:
        table = grid(plain(found.key or "record"), "change", "field", "from", "to")
        for record in found.records:
            key = cell("the only one" if found.key is None else record.key)
            for name, (before, after) in record.fields.items() or [("", ("", ""))]:
                table.add_row(key, cell(record.change), cell(name), cell(before), cell(after))
        console.print(table)
