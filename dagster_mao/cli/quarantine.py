"""`quarantine list`, `show`, `resubmit`, `discard`: the records that broke a contract, and what people decide on them."""

from __future__ import annotations

import csv
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dagster_mao.cli._app import HOME, AsOf, By, Json, Root, Storage, app, me
from dagster_mao.cli._print import cell, counted, grid, misused, plain, print_json, sheet, status, terminal
from dagster_mao.cli._where import load_pipeline, moment_of, open_store, placed, project
from dagster_mao.contract import MASK
from dagster_mao.errors import InvalidRecordsError, StaleStateError, UnknownVersionError
from dagster_mao.home import is_home
from dagster_mao.pipeline import Pipeline
from dagster_mao.resubmission import Resubmission, resubmit
from dagster_mao.review.history import known, parse_reference
from dagster_mao.review.quarantine import Account, Refusal, accounts, akin, discard, refusals, refusals_of
from dagster_mao.state import QUARANTINE_SUFFIX, Seal, StateStore

commands = typer.Typer(no_args_is_help=True)
app.add_typer(commands, name="quarantine", help="Records that broke a contract: list, show, correct and resubmit, or discard them.")

Version = Annotated[str, typer.Argument(metavar="WORKFLOW@N", help="The state version that keeps the record in quarantine.")]


@commands.command("list", epilog="Example: dagster-mao quarantine list credit/2026-01-02")
def list_command(
    workflow: Annotated[str | None, typer.Argument(help="A workflow id; all when left out.", show_default=False)] = None,
    agent: Annotated[str | None, typer.Option(metavar="NAME", help="Only what this agent's boundary refused.", show_default=False)] = None,
    all_: Annotated[bool, typer.Option("--all", help="Also what was decided on, superseded, or left by unfinished attempts.")] = False,
    as_of: AsOf = None,
    json_: Json = False,
    root: Root = None,
    storage_option: Storage = None,
) -> None:
    """List the records that wait in quarantine in the effective state, oldest version first."""
    when = moment_of(as_of)
    store = open_store(root, storage_option)
    if workflow is not None:
        known(store, workflow)
    workflows = [workflow] if workflow is not None else _quarantining(store)
    found = [refusal for one in workflows for refusal in refusals(store, one, agent=agent, every=True, as_of=when)]
    shown = found if all_ else [refusal for refusal in found if refusal.status == "open"]
    if json_:
        print_json([_as_json(refusal) for refusal in shown])
        return
    console = terminal()
    for name in dict.fromkeys(refusal.seal.workflow_id for refusal in shown):
        console.print(Text(plain(name), style="bold"))
        console.print(_list_table([refusal for refusal in shown if refusal.seal.workflow_id == name], with_status=all_))
    _print_what_next(console, shown, found)


@commands.command("show", epilog="Example: dagster-mao quarantine show credit/2026-01-02@0 --record app-0003")
def show_command(
    reference: Version,
    record: Annotated[str | None, typer.Option(metavar="KEY", help="Only the record with this key.", show_default=False)] = None,
    as_of: AsOf = None,
    json_: Json = False,
    root: Root = None,
    storage_option: Storage = None,
) -> None:
    """Show what one version keeps in quarantine: rules, values (personal fields masked), and what was decided."""
    when = moment_of(as_of)
    store = open_store(root, storage_option)
    seal = _version(store, reference)
    found = refusals_of(store, seal, as_of=when)
    if record is not None:
        found = _chosen(seal, found, [record])
    account = accounts(store, seal, as_of=when) if seal.key else None
    if json_:
        sums = _sums(account) if account else {}
        print_json({"version": seal.reference, "agent": seal.agent, **sums, "records": [_as_json(refusal) for refusal in found]})
        return
    console = terminal()
    console.print(Text(plain(f"{seal.reference}: {seal.agent or seal.kind}"), style="bold"))
    if account:
        console.print(Text(plain(_told(account)), style="" if account.balanced else "red"), soft_wrap=True)
    else:
        console.print("It keeps nothing in quarantine.")
    for refusal in found:
        console.print()
        _print_refusal(console, refusal)


@commands.command("discard", epilog="Example: dagster-mao quarantine discard credit/2026-01-02@0 --record app-0003 --why 'sent twice'")
def discard_command(
    reference: Version,
    why: Annotated[str, typer.Option(metavar="TEXT", help="The reason; it is kept.")],
    record: Annotated[list[str] | None, typer.Option(metavar="KEY", help="The record; repeatable.", show_default=False)] = None,
    all_: Annotated[bool, typer.Option("--all", help="All that is open in this version.")] = False,
    by: By = None,
    root: Root = None,
    storage_option: Storage = None,
) -> None:
    """Decide that nothing will become of records. They stay where they are, and are counted as discarded, also after the next run."""
    if bool(record) == all_:
        misused("give --record KEY, once or several times, or --all")
    if not why.strip():
        misused("--why takes a reason")
    store = open_store(root, storage_option)
    seal = _effective_version(store, reference)
    found = refusals_of(store, seal)
    chosen = _chosen(seal, found, record) if record else [refusal for refusal in found if refusal.status == "open"]
    chosen = [refusal for refusal in akin(store, chosen) if refusal.status != "discarded"]
    console = terminal()
    if not chosen:
        console.print("Nothing is left to discard.")
        return
    decision = discard(store, chosen, why=why, by=by or me())
    told = f"Discarded {_records(chosen)} of {seal.workflow_id}, at {_places(chosen)}. The decision is {decision.reference}."
    console.print(Text(plain(told)), soft_wrap=True)


@commands.command(
    "resubmit", epilog="Example: dagster-mao quarantine resubmit credit/2026-01-02@0 --record app-0003 --set credit_amount=2400"
)
def resubmit_command(
    reference: Version,
    record: Annotated[list[str] | None, typer.Option(metavar="KEY", help="The record to correct.", show_default=False)] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="A field to correct; repeatable.", show_default=False)
    ] = None,
    from_: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="Corrected records, .jsonl or .csv; fields left out stay.", show_default=False),
    ] = None,
    pipeline: Annotated[
        str | None, typer.Option(metavar="MODULE:ATTRIBUTE", help="The pipeline; else pyproject.toml says.", show_default=False)
    ] = None,
    why: Annotated[str, typer.Option(metavar="TEXT", help="What was wrong; it is kept.")] = "corrected",
    by: By = None,
    dagster_home: Annotated[
        str | None, typer.Option(help=f"Dagster home to tell of it; else ${HOME}, else pyproject.toml.", show_default=False)
    ] = None,
    root: Root = None,
    storage_option: Storage = None,
) -> None:
    """Correct records: they re-enter their workflow as a new entry.

    The agents below it are then to be materialised again, unless they start by themselves.
    """
    if bool(set_) == bool(from_):
        misused("give --set FIELD=VALUE, or --from FILE")
    if set_ and len(record or ()) != 1:
        misused("--set corrects one record: give --record KEY once")
    store = open_store(root, storage_option)
    seal = _effective_version(store, reference)
    found = refusals_of(store, seal)
    with status("loading the pipeline"):
        own = load_pipeline(pipeline, seal.workflow_id)
    corrections = _from_file(from_, own, record) if from_ else {str((record or [""])[0]): _from_options(set_ or [], own)}
    _chosen(seal, found, corrections)
    try:
        done = resubmit(own, store, seal.workflow_id, corrections, why=why, by=by or me())
    except StaleStateError as error:
        error.fix = f"see `dagster-mao quarantine list '{seal.workflow_id}'`, and resubmit what is left"
        raise
    _print_resubmission(done, corrections, _report(done, own, store, dagster_home), own)


# -- finding -------------------------------------------------------------------------------------------------------------------------


def _quarantining(store: StateStore) -> list[str]:
    rows = store.log().filter(pl.col("quarantined") > 0).select("workflow_id").unique().sort("workflow_id")
    return store.collect(rows)["workflow_id"].to_list()


def _version(store: StateStore, reference: str) -> Seal:
    workflow, version = parse_reference(reference)
    if not isinstance(version, int):
        misused(f"{reference!r} names no version: write WORKFLOW@N")
    known(store, workflow)
    return store.seal_at(workflow, version)


def _effective_version(store: StateStore, reference: str) -> Seal:
    """A version that counts: a decision on any other would be about nothing."""
    seal = _version(store, reference)
    current = store.effective(seal.workflow_id).get(seal.agent)
    if current == seal:
        return seal
    where = f"{seal.agent} is at {current.reference} now" if current else "its attempt has not completed"
    fix = f"dagster-mao quarantine list '{seal.workflow_id}' shows what is open"
    raise UnknownVersionError(f"Version {seal.version} is not of the effective state: {where}", workflow=seal.workflow_id, fix=fix)


def _chosen(seal: Seal, found: Sequence[Refusal], names: Iterable[str]) -> list[Refusal]:
    chosen = []
    for name in names:
        mine = [refusal for refusal in found if refusal.is_named(name)]
        if not mine:
            fix = f"dagster-mao quarantine show '{seal.reference}' shows what is; keys are compared in full, as text"
            raise UnknownVersionError(f"Version {seal.version} has no such record in quarantine", workflow=seal.workflow_id, fix=fix)
        chosen += mine
    return chosen


# -- what is corrected ---------------------------------------------------------------------------------------------------------------


def _from_options(pairs: Iterable[str], pipeline: Pipeline) -> dict[str, Any]:
    changes: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not (name and equals):
            misused(f"--set takes FIELD=VALUE, not {pair!r}")
        changes[name] = _value(pipeline, name, value)
    return changes


def _value(pipeline: Pipeline, name: str, text: str) -> Any:
    """Text for a field of text; for any other what it says as JSON (12, true, null, [1, 2]), else the text, for the contract to read."""
    if pipeline.entry.output.schema.get(name) == pl.String:
        return text
    try:
        return json.loads(text)
    except ValueError:
        return text


def _from_file(file: Path, pipeline: Pipeline, only: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """Corrected records by key. Raises `InvalidRecordsError` naming the line of what is no record."""
    readers = {".jsonl": _from_jsonl, ".ndjson": _from_jsonl, ".csv": _from_csv}
    if file.suffix.lower() not in readers:
        misused(f"--from takes a .jsonl or a .csv file, not {file.name!r}")
    key = str(pipeline.entry.output.key)
    try:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            rows = list(readers[file.suffix.lower()](lines, pipeline))
    except InvalidRecordsError as error:
        error.what = f"{file}: {error.what}"
        raise
    except OSError as error:
        raise InvalidRecordsError(f"{file} cannot be read: {error.strerror or error}", fix="name a file of corrected records") from error
    except UnicodeDecodeError as error:
        raise InvalidRecordsError(f"{file} is not UTF-8", fix="save it as UTF-8") from error
    found: dict[str, dict[str, Any]] = {}
    for line, row in rows:
        name = row.get(key)
        if name is None or name == "":
            raise InvalidRecordsError(f"{file}, line {line}: the record has no {key}", field=key, fix="say which record it corrects")
        if str(name) in found:
            raise InvalidRecordsError(f"{file}, line {line}: a second record by this {key}", field=key, fix="keep one of them")
        found[str(name)] = row
    if missing := [name for name in only or () if name not in found]:
        raise InvalidRecordsError(f"{file} corrects no record {missing[0]!r}", field=key, fix="check --record and the file")
    if not found:
        raise InvalidRecordsError(f"{file} holds no record", fix="one record a line")
    return {name: row for name, row in found.items() if not only or name in only}


def _from_jsonl(lines: Iterable[str], _: Pipeline) -> Iterable[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise InvalidRecordsError(f"Line {number} is no JSON ({_position(error)})", fix="one JSON object a line") from None
        if not isinstance(row, dict):
            raise InvalidRecordsError(f"Line {number} is no JSON object", fix='one JSON object a line: {"field": value, …}')
        yield number, row


def _position(error: ValueError) -> str:
    return f"column {error.colno}" if isinstance(error, json.JSONDecodeError) else type(error).__name__


def _from_csv(lines: Iterable[str], pipeline: Pipeline) -> Iterable[tuple[int, dict[str, Any]]]:
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise InvalidRecordsError("The header names a column twice", fix="give every column a name of its own")
        for cells in reader:
            if cells and len(cells) != len(header):
                what = f"Line {reader.line_num} has {len(cells)} cells, the header has {len(header)}"
                raise InvalidRecordsError(what, fix="quote cells that hold commas")
            # An empty cell says nothing: CSV cannot tell it from a null.
            row = {name: _value(pipeline, name, text) for name, text in zip(header, cells, strict=False) if text != ""}
            if cells:
                yield reader.line_num, row
    except csv.Error as error:
        raise InvalidRecordsError(f"Line {reader.line_num} is no CSV ({error})", fix="quote cells that hold commas or quotes") from None


# -- telling -------------------------------------------------------------------------------------------------------------------------


def _as_json(refusal: Refusal) -> dict[str, Any]:
    seal = refusal.seal
    return {
        "workflow_id": seal.workflow_id,
        "version": seal.version,
        "agent": seal.agent,
        "attempt": seal.attempt,
        **{name: getattr(refusal, name) for name in ("record", "side", "upstream", "rules", "values", "digest", "status")},
        **({"why": refusal.why, "by": refusal.by, "at": refusal.at} if refusal.at else {}),
    }


def _list_table(found: Sequence[Refusal], *, with_status: bool) -> Table:
    table = grid("n", "agent", "record", "broken rules", *(["status"] if with_status else []), numbers=("n",))
    for refusal in found:
        told = [refusal.seal.version, refusal.seal.agent, _name(refusal), "\n".join(map(plain, refusal.rules))]
        cells = [cell(value) for value in told[:3]] + [Text(str(told[3]), overflow="fold")]
        table.add_row(*cells, *([cell(refusal.status)] if with_status else []))
    return table


def _name(refusal: Refusal) -> str:
    """By what a command takes it: its key, else its digest."""
    return refusal.digest[:12] if refusal.record in (None, MASK, "") else str(refusal.record)


def _print_what_next(console: Console, shown: Sequence[Refusal], found: Sequence[Refusal]) -> None:
    opened = [refusal for refusal in found if refusal.status == "open"]
    others = Counter(refusal.status for refusal in found if refusal not in shown)
    console.print(f"{_records(opened)} open." if opened else "No record is open.")
    if others:
        told = ", ".join(f"{count:,} {name}" for name, count in others.items())
        console.print(Text(f"Not shown: {told}; --all shows all.", style="dim"), soft_wrap=True)
    if opened:
        first = opened[0].seal.reference
        console.print(Text(f"Their values: dagster-mao quarantine show '{plain(first)}'", style="dim"), soft_wrap=True)


def _print_refusal(console: Console, refusal: Refusal) -> None:
    where = f"input, from {refusal.upstream}" if refusal.upstream else refusal.side
    decided = f": {refusal.why} ({refusal.by or 'unknown'}, {refusal.at:%Y-%m-%d %H:%M} UTC)" if refusal.at else ""
    facts, values = sheet(), sheet()
    for name, value in {"refused at": where, "status": f"{refusal.status}{decided}", "digest": refusal.digest[:12]}.items():
        facts.add_row(Text(name, style="dim"), cell(value))
    for place, rule in enumerate(refusal.rules):
        facts.add_row(Text("breaks" if place == 0 else "", style="dim"), Text(plain(rule), style="red", overflow="fold"))
    # What the rules are about comes first.
    for name in sorted(refusal.values, key=lambda name: not refusal.is_about(name)):
        values.add_row(Text(plain(name), style="red" if refusal.is_about(name) else "cyan"), cell(refusal.values[name]))
    console.print(Text(plain(_name(refusal)), style="bold"))
    console.print(facts)
    console.print(values)


def _sums(account: Account) -> dict[str, Any]:
    numbers = {name: getattr(account, name) for name in ("came_in", "sealed", "quarantined", "discarded", "deferred")}
    return {**numbers, "balanced": account.balanced}


def _told(account: Account) -> str:
    sums = f"{account.sealed:,} sealed + {account.quarantined:,} in quarantine + {account.discarded:,} discarded"
    sums += f" + {account.deferred:,} deferred" if account.deferred else ""
    return f"{account.came_in:,} came in = {sums}" if account.balanced else f"{account.came_in:,} came in, but {sums}: see `accounted`"


def _records(found: Sequence[Refusal]) -> str:
    return counted(len({(r.seal.workflow_id, r.seal.key, r.key if r.key is not None else r.digest) for r in found}), "record")


def _places(found: Sequence[Refusal]) -> str:
    return ", ".join(dict.fromkeys(f"{refusal.seal.agent}@{refusal.seal.version}" for refusal in found))


def _report(done: Resubmission, pipeline: Pipeline, store: StateStore, dagster_home: str | None) -> str:
    """Tells Dagster, where there is one to tell; returns a sentence on it. The version stands whether Dagster knows or not."""
    configured, where = project()
    home = dagster_home or os.environ.get(HOME) or placed(configured.get("dagster_home"), where)
    if not home or not is_home(Path(home).expanduser()):
        return f"Dagster was not told: there is no Dagster home{f' at {home}' if home else ''}."
    with status("telling Dagster"):
        # Importing Dagster takes seconds: nothing but this needs it.
        from dagster_mao.dagster.anchors import opened
        from dagster_mao.dagster.quarantine import report

        try:
            with opened(home) as instance:
                report(instance, pipeline, store, done.entry)
        except Exception as error:  # the version is sealed: an event log that is down must not look like a failure of it
            return f"Dagster at {home} could not be told ({type(error).__name__}): the UI does not show this version."
    return f"Dagster at {home} knows of it."


def _print_resubmission(done: Resubmission, corrections: Mapping[str, Any], told: str, pipeline: Pipeline) -> None:
    console, entry = terminal(), done.entry
    left = f", {entry.quarantined:,} in quarantine" if entry.quarantined else ""
    first = f"Sealed {entry.reference}, a new entry with {counted(len(corrections), 'record')} corrected: {entry.row_count:,} sealed{left}."
    console.print(Text(plain(first)), soft_wrap=True)
    decided = f"Marked as resubmitted at {_places(done.answered)}; the decision is {done.decision.reference}."
    console.print(Text(plain(f"{decided} {told}")), soft_wrap=True)
    if not done.agents:
        return
    if pipeline.mode != "orchestration":
        undone = " Where one of them fails, what was done for it is undone, and the records are open again." * (pipeline.mode == "hybrid")
        console.print(Text(f"What is below it starts by itself: {', '.join(done.agents)}.{undone}"), soft_wrap=True)
        return
    key = entry.workflow_id.removeprefix(f"{pipeline.name}/")
    partition = f" --partition '{key}'" if pipeline.partitions_def else ""
    assets = [f"{pipeline.name}/{name}" for agent in done.agents for name in _assets(pipeline, agent)]
    place = "-f definitions.py" if Path("definitions.py").is_file() else "-m YOUR_DEFINITIONS"
    where = f"in the partition {key}" if pipeline.partitions_def else f"in a run with the tag mao/workflow={entry.workflow_id}"
    console.print(Text(plain(f"Next, materialise what is below it, {where}, without {entry.agent}: {', '.join(done.agents)}.")))
    if pipeline.partitions_def:
        console.print(Text(plain(f"  dagster asset materialize {place}{partition} --select '{','.join(assets)}'")), soft_wrap=True)
    first_step = f"select these assets{' with their quarantines' if len(assets) > len(done.agents) else ''}, then Materialize selected"
    console.print(Text(f"  In the UI: {first_step}."), soft_wrap=True)


def _assets(pipeline: Pipeline, agent: str) -> list[str]:
    return [agent, f"{agent}{QUARANTINE_SUFFIX}"] if pipeline.node(agent).quarantine is not None else [agent]
