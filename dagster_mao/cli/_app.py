"""The application object, and the options that commands share."""

from __future__ import annotations

import getpass
import os
from typing import Annotated, Any

import typer
from polars.exceptions import PanicException
from typer.core import TyperGroup

from dagster_mao.cli._print import plain
from dagster_mao.errors import MaoError

ROOT, HOME, DATABASE = "DAGSTER_MAO_ROOT", "DAGSTER_HOME", "DAGSTER_MAO_DATABASE"


class Commands(TyperGroup):
    """Turns our own errors into one line and exit code 1. Anything else is a defect and keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except MaoError as error:
            typer.echo(f"error: {plain(error)}", err=True)
            raise typer.Exit(1) from None
        except PanicException:  # how polars meets a Parquet file that was cut short; it has told the terminal already
            typer.echo("error: a file of the store is damaged. Fix: `dagster-mao verify` says which", err=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=Commands,
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
Database = Annotated[
    str | None,
    typer.Option("--database", metavar="URL", help="The shared SQL database, or the path of an SQLite file.", show_default=False),
]
By = Annotated[str | None, typer.Option(metavar="NAME", help="Who decides; the user of this terminal when left out.", show_default=False)]
AsOf = Annotated[
    str | None,
    typer.Option("--as-of", metavar="TIME", help="As it was at this moment, as in 2026-03-03T12:00Z.", show_default=False),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def me() -> str:
    """The user of this terminal."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return str(os.getuid())
