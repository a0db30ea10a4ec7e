"""`submit`: events into a pipeline's inbox."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import typer
from pydantic_core import from_json

from dagster_mao.cli._app import Database, Json, Root, Storage, app
from dagster_mao.cli._print import counted, plain, print_json, terminal
from dagster_mao.cli._where import named_pipeline, store_to_write
from dagster_mao.errors import EventsRefusedError, StoreError
from dagster_mao.pipeline import Pipeline
from dagster_mao.state import StateStore

Format = Literal["jsonl", "csv"]
_TOGETHER = 500  # events in a commit
_SHOWN = 20  # refused lines
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
    own, told = named_pipeline(pipeline), _Told()
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
