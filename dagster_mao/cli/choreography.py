"""`submit`: events into a pipeline's inbox; `choreography`: how its subscribers stand; `advise`: which pattern suits it."""

from __future__ import annotations

import csv
import datetime as dt
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Literal

import typer
from pydantic_core import from_json
from rich.text import Text

from dagster_mao.advice import Advice, advise
from dagster_mao.cli._app import Database, Json, Root, Storage, app
from dagster_mao.cli._print import cell, counted, grid, misused, plain, print_json, terminal
from dagster_mao.cli._where import named_pipelines, store_to_write
from dagster_mao.errors import EventsRefusedError, StoreError
from dagster_mao.pipeline import Pipeline
from dagster_mao.state import StateStore

if TYPE_CHECKING:
    from dagster_mao.choreography import SubscriberState

Format = Literal["jsonl", "csv"]
_TOGETHER = 500  # events in a commit
_SHOWN = 20  # refused lines, or stuck joins of one subscriber
_READ = 1 << 20  # bytes at a time

Named = Annotated[str, typer.Argument(metavar="PIPELINE", help="Its name in pyproject.toml, or module:attribute.", show_default=False)]


@dataclass
class _Told:
    """What became of the events so far. `refused`: why, by line."""

    accepted: int = 0
    duplicates: int = 0
    refused: dict[int, str] = field(default_factory=dict)


@app.command("submit", epilog="Example: tail -f applications.jsonl | dagster-mao submit credit -")
def submit_command(
    pipeline: Named,
    file: Annotated[str, typer.Argument(metavar="FILE|-", help="JSON lines, or CSV with a heading; - is what is piped in.")],
    format_: Annotated[
        Format | None,
        typer.Option("--format", help="By default as the file's ending says; what is piped in: JSON lines.", show_default=False),
    ] = None,
    root: Root = None,
    storage_option: Storage = None,
    database: Database = None,
    json_: Json = False,
) -> None:
    """Put events into a pipeline's inbox, from where they are cut into workflows.

    An event that came in before is recognised by its key and not accepted again: to be sure, submit again. A line that can be no event is
    refused, with the others accepted; exit with 1 then. What is bad in an event shows in the entry's quarantine. An empty cell of a CSV
    file is a field that is left out.
    """
    own, told = _with_entry(named_pipelines(pipeline)), _Told()
    store = store_to_write(root, storage_option, database)
    kind = format_ or ("csv" if file.lower().endswith(".csv") else "jsonl")
    with _opened(file) as stream:
        for events in _csv(stream, told) if kind == "csv" else _lines(stream, told):
            try:
                _submit(store, own, events, told)
            except StoreError:
                typer.echo(f"until then: {_counts(told)}; submit again what is left, or all of it", err=True)
                raise
    if json_:
        print_json(
            {"accepted": told.accepted, "duplicates": told.duplicates, "refused": [{"line": n, "why": w} for n, w in told.refused.items()]}
        )
    else:
        _print(told)
    raise typer.Exit(1 if told.refused else 0)


def _with_entry(pipelines: Sequence[Pipeline]) -> Pipeline:
    return next((one for one in pipelines if one.entry_name), pipelines[0])


def _submit(store: StateStore, pipeline: Pipeline, events: list[tuple[int, Any]], told: _Told) -> None:
    from dagster_mao.choreography import submit

    try:
        done = submit(store, pipeline, [record for _, record in events])
    except EventsRefusedError as error:
        told.refused |= {events[place][0]: why for place, why in error.places.items()}
        _submit(store, pipeline, [event for place, event in enumerate(events) if place not in error.places], told)
        return
    told.accepted += done.accepted
    told.duplicates += done.duplicates


@contextmanager
def _opened(file: str) -> Iterator[BinaryIO]:
    try:
        with nullcontext(sys.stdin.buffer) if file == "-" else Path(file).open("rb") as stream:
            yield stream
    except OSError as error:
        raise StoreError(f"{plain(file)} cannot be read: {error.strerror}", fix="name a file of JSON lines or CSV, or -") from error


def _lines(stream: BinaryIO, told: _Told) -> Iterator[list[tuple[int, Any]]]:
    """Events with their line numbers, those together that are there at once: whoever pipes in slowly need not wait for others."""
    number, rest, read = 0, b"", getattr(stream, "read1", stream.read)
    while chunk := read(_READ):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from _groups(_parsed(enumerate(lines, number + 1), told))
        number += len(lines)
    yield from _groups(_parsed(iter([(number + 1, rest)]), told))


def _parsed(lines: Iterator[tuple[int, bytes]], told: _Told) -> Iterator[tuple[int, Any]]:
    for number, line in lines:
        if not line.strip():
            continue
        try:
            yield number, from_json(line)
        except ValueError:
            told.refused[number] = "it is no JSON"


def _csv(stream: BinaryIO, told: _Told) -> Iterator[list[tuple[int, Any]]]:
    # Bytes that are no UTF-8 are no reason to refuse other lines than theirs.
    reader = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline=""), strict=True)

    def events() -> Iterator[tuple[int, Any]]:
        while True:
            try:
                row = next(reader, None)
            except csv.Error:
                told.refused[reader.reader.line_num] = "it cannot be read as CSV, nor what follows"
                return
            if row is None:
                return
            if None in row:
                told.refused[reader.line_num] = "it has more cells than the heading"
                continue
            yield reader.line_num, {name: value for name, value in row.items() if value}

    yield from _groups(events())


def _groups(events: Iterator[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    while group := list(islice(events, _TOGETHER)):
        yield group


def _counts(told: _Told) -> str:
    return f"{counted(told.accepted, 'event')} accepted, {counted(told.duplicates, 'duplicate')}, {len(told.refused):,} refused"


def _print(told: _Told) -> None:
    console = terminal()
    console.print(_counts(told))
    for number, why in sorted(told.refused.items())[:_SHOWN]:
        console.print(f"  line {number}: {plain(why)}", style="red", soft_wrap=True)
    if len(told.refused) > _SHOWN:
        console.print(f"  and {counted(len(told.refused) - _SHOWN, 'line')} more", style="red")


# -- how subscribers stand -----------------------------------------------------------------------------------------------------------


@app.command("choreography", epilog="Example: dagster-mao choreography credit --redeliver --agent approval")
def choreography_command(
    pipeline: Named,
    redeliver_: Annotated[bool, typer.Option("--redeliver", help="Let what failed be tried again, then show.")] = False,
    agent: Annotated[
        list[str] | None, typer.Option("--agent", metavar="NAME", help="Only this subscriber; repeatable.", show_default=False)
    ] = None,
    workflow: Annotated[
        list[str] | None,
        typer.Option("--workflow", metavar="ID", help="Only these failed workflows are tried again; repeatable.", show_default=False),
    ] = None,
    stuck_after: Annotated[float, typer.Option(metavar="SECONDS", help="For so long a join may wait for what is under way.")] = 300.0,
    json_: Json = False,
    root: Root = None,
    storage_option: Storage = None,
    database: Database = None,
) -> None:
    """Show how the subscribers of a pipeline stand: what is due and for how long, joins that are stuck, what failed, who is dead.

    Agents of other code locations that attempts are complete with are among them: where they have never been seen, it says so.

    Exits with 1 when a subscriber is dead or a join is stuck.
    """
    from dagster_mao.choreography import lag, redeliver, subscribers

    pipelines = named_pipelines(pipeline)
    store = store_to_write(root, storage_option, database)
    names = {one.agent for own in pipelines for one in subscribers(own)}
    there = names | {own.entry_name for own in pipelines if own.inbox is not None}
    there |= set() if redeliver_ else {name for own in pipelines for name in own.elsewhere}
    if unknown := sorted(set(agent or ()) - there):
        misused(f"{pipeline} has no subscriber {unknown[0]!r}; it has {', '.join(sorted(there)) or 'none'}")
    if workflow and not redeliver_:
        misused("--workflow goes with --redeliver")
    again = 0
    if redeliver_:
        wanted = ((own, one.agent) for own in pipelines for one in subscribers(own))
        again = sum(redeliver(store, own, name, workflow) for own, name in wanted if not agent or name in agent)
    every = [one for own in pipelines for one in lag(store, own, stuck_after=stuck_after) if not agent or one.agent in agent]
    states = [one for one in every if not (one.is_elsewhere and one.agent in names)]
    is_healthy = all(one.is_healthy for one in states)
    if json_:
        told = {"pipeline": pipelines[0].name, "is_healthy": is_healthy, "subscribers": [one.as_metadata() for one in states]}
        print_json(told | ({"redelivered": again} if redeliver_ else {}))
    else:
        _print_states(pipelines[0], states, again if redeliver_ else None)
    raise typer.Exit(0 if is_healthy else 1)


def _print_states(pipeline: Pipeline, states: Sequence[SubscriberState], again: int | None) -> None:
    console = terminal()
    if again is not None:
        console.print(f"{counted(again, 'failed delivery').replace('deliverys', 'deliveries')} to be tried again")
    if not states:
        console.print(f"Nobody in {plain(pipeline.name)} starts by itself: its mode is {pipeline.mode}.")
        return
    table = grid("subscriber", "due", "oldest", "in flight", "joining", "failed", "refused", "looked", numbers=_NUMBERS)
    for one in states:
        what = " (inbox)" if one.agent == pipeline.entry_name else " (elsewhere)" if one.is_elsewhere else ""
        name = f"{one.agent}{what}"
        counts = (one.due, _span(one.oldest), one.in_flight, one.joining, one.failed, one.refused)
        table.add_row(cell(name), *(_number(count) for count in counts), _looked(one))
    console.print(table)
    for one in states:
        if one.errors:
            told = ", ".join(f"{count:,} by {name}" for name, count in one.errors.items())
            console.print(
                Text(f"\n{one.agent} has given up {one.failed:,}: {told}. --redeliver tries again", style="yellow"), soft_wrap=True
            )
        if one.stuck:
            console.print(Text(f"\n{one.agent}: {counted(len(one.stuck), 'stuck join')}", style="red"))
            for stuck in one.stuck[:_SHOWN]:
                since = f"{stuck.since:%Y-%m-%d %H:%M:%S} UTC"
                missing = ", ".join(stuck.missing)
                console.print(Text(f"  {plain(stuck.workflow_id)} lacks {missing} since {since}: {plain(stuck.why)}"), soft_wrap=True)
            if len(one.stuck) > _SHOWN:
                console.print(Text(f"  and {len(one.stuck) - _SHOWN:,} more; --json has all", style="dim"))
    if all(one.is_healthy for one in states):
        console.print(Text("\nNobody is dead, and nothing is stuck.", style="green"))


_NUMBERS = ("due", "oldest", "in flight", "joining", "failed", "refused")


def _number(count: Any) -> Text:
    return Text(f"{count:,}" if isinstance(count, int) else count, style="" if count not in (0, "-") else "dim")


def _span(seconds: float | None) -> str:
    """A time that people read at a glance."""
    if seconds is None:
        return "-"
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _looked(one: SubscriberState) -> Text:
    if one.beat is None:
        never = "never seen" if one.is_elsewhere else "never"
        return Text(f"{never}: DEAD" if one.is_dead else never, style="red" if one.is_dead else "dim")
    ago = _span(max(0.0, dt.datetime.now(dt.timezone.utc).timestamp() - one.beat.timestamp()))
    every = "by hand" if one.every is None else f"every {_span(one.every)}"
    return Text(f"{ago} ago, {every}{': DEAD' if one.is_dead else ''}", style="red" if one.is_dead else "")


# -- which pattern -------------------------------------------------------------------------------------------------------------------


@app.command("advise", epilog="Example: dagster-mao advise credit")
def advise_command(pipeline: Named, json_: Json = False) -> None:
    """Say whether orchestration, choreography or hybrid suits a pipeline, why, and what it lacks for it. Reads its code, no state.

    Exits with 1 when it is declared as something else.
    """
    found = [advise(own) for own in named_pipelines(pipeline)]
    if json_:
        print_json([one.as_json() for one in found])
    else:
        for one in found:
            _print_advice(one)
    raise typer.Exit(0 if all(one.pattern == one.declared for one in found) else 1)


def _print_advice(advice: Advice) -> None:
    console, fits = terminal(), advice.pattern == advice.declared
    said = "as it is declared" if fits else f"it is declared as {advice.declared}"
    console.print(Text.assemble(f"{advice.pipeline}: ", (advice.pattern, "green" if fits else "yellow"), f", {said}"), soft_wrap=True)
    for reason in advice.reasons:
        console.print(Text(f"  {plain(reason)}"), soft_wrap=True)
    if advice.missing:
        console.print("missing for it:")
    for one in advice.missing:
        console.print(Text(f"  {plain(one)}"), soft_wrap=True)
