"""What all commands print with: for people (rich) and for machines (JSON)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import typer
from pydantic_core import to_json
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dagster_mao.state.seal import Seal


def terminal(*, err: bool = False) -> Console:
    return Console(stderr=err, highlight=False, markup=False, emoji=False)


def status(what: str) -> Any:
    return terminal(err=True).status(what)


def plain(value: Any) -> str:
    """Text that can do nothing to a terminal: what is not printable (escape sequences, line ends, reversed text) is written out."""
    text = value if isinstance(value, str) else str(value)
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def cell(value: Any) -> Text:
    """A value in a table. `Text` is not looked through for markup, so nothing in it is interpreted."""
    if value is None:
        return Text("-", style="dim")
    if isinstance(value, float):
        return Text(f"{value:.10g}")
    if isinstance(value, (dict, list)):
        value = json.dumps(value, default=str, ensure_ascii=False)
    return Text(plain(value), overflow="fold")


_UNBROKEN = ("n", "rows", "digest", "sealed (UTC)")


def grid(*headings: str, numbers: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right" if heading in numbers else "left", overflow="fold", no_wrap=heading in _UNBROKEN)
    return table


def sheet() -> Table:
    """One name and value a line; names are never broken."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def print_rows(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """As a table if that fits the width, else one field a line."""
    if not rows:
        return
    cells = [{name: cell(value) for name, value in row.items()} for row in rows]
    widths = {name: max(len(plain(name)), *(row[name].cell_len for row in cells)) for name in cells[0]}
    if len(rows) > 1 and sum(width + 2 for width in widths.values()) <= console.width:
        table = grid(*(plain(name) for name in widths))
        for row in cells:
            table.add_row(*row.values())
        console.print(table)
        return
    for row in cells:
        table = sheet()
        for name, shown in row.items():
            table.add_row(Text(plain(name), style="cyan"), shown)
        console.print(table)
        console.print()


def counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def moment(seal: Seal) -> str:
    return f"{seal.sealed_at:%Y-%m-%d %H:%M:%S}"


def short(value: Any) -> Any:
    """Digests by their first twelve digits."""
    if isinstance(value, str) and len(value) >= 40 and all(char in "0123456789abcdef" for char in value.removeprefix("sha256:")):
        return value[: len(value) - len(value.removeprefix("sha256:")) + 12]
    return value


def print_json(value: Any) -> None:
    # Not through rich, which wraps. NaN is no JSON, and not all bytes are UTF-8.
    typer.echo(to_json(value, indent=2, ensure_ascii=True, inf_nan_mode="strings", bytes_mode="base64", fallback=str).decode())


def misused(message: str) -> NoReturn:
    raise typer.BadParameter(plain(message))
