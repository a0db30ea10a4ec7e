"""`bisect`: the first bad version."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from rich.console import Console
from rich.text import Text

from dagster_mao.cli._app import HOME, Json, Root, Storage, app
from dagster_mao.cli._print import cell, counted, grid, misused, plain, print_json, sheet, short, status, terminal
from dagster_mao.cli._where import imported, load_pipeline, open_store, placed, project, resources_of
from dagster_mao.errors import StoreError
from dagster_mao.review.bisect import Bisection, bisect
from dagster_mao.review.history import facts
from dagster_mao.review.predicates import Function, Good, Keeps

_CODES = {"found": 0, "never_bad": 3, "always_bad": 4, "not_monotone": 5}


@app.command("bisect", epilog='Example: dagster-mao bisect credit --agent approval --holds "amount <= 20000 or not approved"')
def bisect_command(
    name: Annotated[str, typer.Argument(metavar="WORKFLOW|PIPELINE", help="Along a workflow's versions, or an agent's history.")],
    agent: Annotated[str | None, typer.Option(metavar="NAME", help="Whose versions; a PIPELINE needs it.", show_default=False)] = None,
    holds: Annotated[
        str | None, typer.Option(metavar="EXPRESSION", help="In SQL: true of every record of a good version.", show_default=False)
    ] = None,
    function: Annotated[
        str | None, typer.Option(metavar="MODULE:NAME", help="A function of the rows that says so: yours, it is run.", show_default=False)
    ] = None,
    contract: Annotated[
        str | None, typer.Option(metavar="MODULE:MODEL", help="A contract that a good version keeps.", show_default=False)
    ] = None,
    check: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="An asset check that passed for a good version.", show_default=False),
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(metavar="AGENT.JUDGE", help="A judge that passes a good version: asked live, which costs.", show_default=False),
    ] = None,
    good: Annotated[
        str | None, typer.Option(metavar="VERSION|TIME", help="The good end; the first of all when left out.", show_default=False)
    ] = None,
    bad: Annotated[
        str | None, typer.Option(metavar="VERSION|TIME", help="The bad end; the last of all when left out.", show_default=False)
    ] = None,
    linear: Annotated[bool, typer.Option("--linear", help="Look at all versions, and tell all turns.")] = False,
    repeat: Annotated[int, typer.Option(min=1, help="Ask so often of each version, and take the majority: an odd number.")] = 1,
    spot_checks: Annotated[int, typer.Option(min=0, help="Look at so many more, to see whether the history turns once.")] = 0,
    pipeline: Annotated[
        str | None,
        typer.Option(metavar="MODULE:ATTRIBUTE", help="The pipeline of the judge, else as in pyproject.toml.", show_default=False),
    ] = None,
    definitions: Annotated[
        str | None,
        typer.Option(metavar="MODULE:ATTRIBUTE", help="Dagster definitions with its resources, else as there.", show_default=False),
    ] = None,
    dagster_home: Annotated[str | None, typer.Option(metavar="FOLDER", help="The Dagster that has the check.", show_default=False)] = None,
    json_: Json = False,
    root: Root = None,
    storage_option: Storage = None,
) -> None:
    """Find the first bad version, looking at both ends and at log2 of those between them; say what had changed since the last good one.

    Exits with 0: found; 3: the last is good; 4: the first is bad; 5: it turns more than once; 1: an error; 2: wrong usage.
    """
    said = [one for one in (holds, function, contract, check, judge) if one is not None]
    if len(said) != 1:
        misused("say once what is true of a good version: --holds, --function, --contract, --check or --judge")
    if repeat % 2 == 0:
        misused("--repeat takes an odd number: of an even one there may be no majority")
    store = open_store(root, storage_option)
    if judge is not None:
        of, dot, _ = judge.partition(".")
        if not dot or agent not in (None, of):
            misused("a judge is named with its agent: --judge AGENT.JUDGE")
        agent = of
        chosen = _asked(name, judge, pipeline, definitions)
    else:
        chosen = _predicate(name, agent, holds, function, contract, check, dagster_home)
    with chosen as predicate:
        found = bisect(store, name, predicate, agent=agent, first=good, last=bad, linear=linear, repeat=repeat, spot_checks=spot_checks)
        judgements = getattr(predicate, "judgements", ())
    paid = {"votes": sum(one.summary()["votes"] for one in judgements), "cost": sum(one.summary()["cost"] for one in judgements)}
    if json_:
        print_json(_as_json(found) | ({"judge": paid} if judgements else {}))
    else:
        _print(terminal(), found)
        if judgements:
            terminal().print(Text(f"The judge was asked for {counted(paid['votes'], 'vote')}, cost {paid['cost']:.6g}.", style="dim"))
    raise typer.Exit(_CODES["not_monotone"] if not found.is_monotone else _CODES[found.verdict])


@contextmanager
def _asked(name: str, judge: str, pipeline: str | None, definitions: str | None) -> Iterator[Good]:
    from dagster_mao.review.judging import AskedJudge

    agent, _, called = judge.partition(".")
    own = load_pipeline(pipeline, name if "/" in name else f"{name}/")
    names = [one for declared in own.node(agent).panel if declared.name == called for one in declared.resources]
    with resources_of(names, definitions, f"Asking {judge}") as resources:
        yield AskedJudge(own, agent, called, resources)


@contextmanager
def _predicate(
    name: str, agent: str | None, holds: str | None, function: str | None, contract: str | None, check: str | None, home: str | None
) -> Iterator[Good]:
    configured, where = project()
    if holds is not None:
        yield holds
    elif function is not None:
        yield Function(imported(function, where.parent, FunctionType, "function"), function)
    elif contract is not None:
        yield Keeps(imported(contract, where.parent, type(BaseModel), "pydantic model"))
    else:
        if agent is None:
            misused("--check goes with --agent: a check is one agent's")
        place = home or os.environ.get(HOME) or placed(configured.get("dagster_home"), where)
        if not place:
            raise StoreError("No Dagster home is named", fix=f"give --dagster-home, or set {HOME}")
        with status("opening Dagster's event log"):
            # Importing Dagster takes seconds: nothing but this needs it.
            from dagster_mao.dagster.anchors import opened
            from dagster_mao.dagster.recorded import RecordedCheck
        with opened(Path(place)) as instance:
            yield RecordedCheck(instance, name.partition("/")[0], agent, str(check))


# -- telling -------------------------------------------------------------------------------------------------------------------------


def _as_json(found: Bisection) -> dict[str, Any]:
    names = ("verdict", "predicate", "linear", "candidates", "ends", "searched", "spot_checked", "asked", "turns", "against", "is_monotone")
    return {
        **{name: getattr(found, name) for name in names},
        "first": found.first.reference,
        "last": found.last.reference,
        "first_bad": found.first_bad and facts(found.first_bad),
        "last_good": found.last_good and facts(found.last_good),
        "changes": [dataclasses.asdict(change) for change in found.changes],
        "probes": [{**dataclasses.asdict(probe), "noisy": probe.is_noisy} for probe in found.probes],
    }


def _print(console: Console, found: Bisection) -> None:
    between = f"{counted(found.candidates, 'version')} from {found.first.reference} to {found.last.reference}"
    console.print(Text(plain(f"{found.predicate}: {between}"), style="bold"), soft_wrap=True)
    _print_verdict(console, found)
    if found.changes:
        console.print()
        console.print("What had changed since the last good one:")
        table = grid("agent", "what", "from", "to")
        for change in found.changes:
            table.add_row(*map(cell, [change.agent, change.what, short(change.before), short(change.after)]))
        console.print(table)
    elif found.first_bad is not None:
        console.print("Nothing that a seal records had changed since the last good one.")
    console.print()
    _print_doubts(console, found)
    _print_cost(console, found)


def _print_verdict(console: Console, found: Bisection) -> None:
    if found.first_bad is None or found.last_good is None:
        told = {
            "never_bad": "No bad version was found: the first and the last are good.",
            "always_bad": "The first version is bad already: name an earlier good end by --good.",
            "not_monotone": "The first version is bad and the last is good: there is no first bad one between them.",
        }
        console.print(Text(told[found.verdict], style="yellow"), soft_wrap=True)
        return
    bad, good = found.first_bad, found.last_good
    table = sheet()
    for name, value in {
        "first bad": f"{bad.reference}, sealed {bad.sealed_at:%Y-%m-%d %H:%M:%S} UTC",
        "by": f"{bad.agent}, code version {bad.agent_version}",
        "run": bad.run_id,
        "last good": f"{good.reference}, sealed {good.sealed_at:%Y-%m-%d %H:%M:%S} UTC",
    }.items():
        table.add_row(Text(name, style="red" if name == "first bad" else "dim"), cell(value))
    console.print(table)


def _print_doubts(console: Console, found: Bisection) -> None:
    for bad, good in found.against:
        told = f"It turns more than once: {bad} is bad and {good}, after it, is good. --linear finds all turns."
        console.print(Text(plain(told), style="yellow"), soft_wrap=True)
    if len(found.turns) > 1:
        console.print(Text(plain(f"It turns {len(found.turns)} times: at {', '.join(found.turns[:20])}"), style="yellow"), soft_wrap=True)
    if noisy := [probe for probe in found.probes if probe.is_noisy]:
        votes = ", ".join(f"{probe.reference} ({probe.votes} of {probe.asked} say good)" for probe in noisy[:5])
        told = f"The answers differed for {counted(len(noisy), 'version')}: {votes}. A larger --repeat makes it surer."
        console.print(Text(plain(told), style="yellow"), soft_wrap=True)
    if found.is_monotone and not found.linear:
        told = "This supposes that the history turns once; --spot-checks looks at some more versions, --linear at all."
        console.print(Text(told, style="dim"), soft_wrap=True)


def _print_cost(console: Console, found: Bisection) -> None:
    parts = [f"{found.ends} at the ends, {found.searched} between them"] if not found.linear else [f"all {found.searched}"]
    parts += [f"{found.spot_checked} spot checks"] if found.spot_checked else []
    asked = f"; asked {found.asked:,} times" if found.asked != len(found.probes) else ""
    console.print(Text(f"Looked at {counted(len(found.probes), 'version')}: {', '.join(parts)}{asked}.", style="dim"), soft_wrap=True)
    if found.verdict == "found" and found.first_bad is not None and found.last_good is not None:
        compare = f"dagster-mao diff '{plain(found.last_good.reference)}' '{plain(found.first_bad.reference)}'"
        console.print(Text(f"Their records: {compare}", style="dim"), soft_wrap=True)
