"""`make demo`: the credit pipeline over 1 000 real applications, on a Dagster instance that remembers; then what came of it.

`make demo DAY=2026-01-02 FILE=data/day_with_errors.csv` decides another day, from another file.
`make demo FRESH=1` asks anew what is answered already.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tools.home import ROOT, dagster_home

console = Console(highlight=False, markup=False, soft_wrap=True)


def main() -> int:
    options = argparse.ArgumentParser(prog="make demo", description="Decides a day's loan applications.")
    options.add_argument("--day", default="2026-01-01", help="from 2026-01-01 on (make demo DAY=…)")
    options.add_argument("--file", help="a CSV file of applications (make demo FILE=…)")
    options.add_argument("--fresh", action="store_true", help="ask anew what is answered already (make demo FRESH=1)")
    given = options.parse_args()
    if given.file:
        os.environ["CREDIT_APPLICATIONS"] = os.path.abspath(given.file)
    home, day = dagster_home(), given.day
    with one_at_a_time(home.parent / "demo.lock"):
        started = time.monotonic()
        with console.status("Loading Dagster and the pipeline"):
            import dagster as dg

            from definitions import defs
        with dg.DagsterInstance.get() as instance:
            succeeded = decide(instance, defs, day, fresh=given.fresh)
        if succeeded:
            report(home, defs, day)
    console.print(
        f"{time.monotonic() - started:.0f} s in all."
        if succeeded
        else "Nothing more was sealed. `make ui` shows the run with all its details."
    )
    return 0 if succeeded else 1


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Two demos at once would seal the same workflow, and one of them would be refused as stale: the second waits for the first."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.print("Another demo is running; waiting for it to end.")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def decide(instance: Any, defs: Any, day: str, *, fresh: bool) -> bool:
    """Runs everything for one day, as Materialize all does in the UI, and shows which step it is at."""
    import dagster as dg

    job = defs.resolve_implicit_global_asset_job_def()
    run_id, failed = str(uuid.uuid4()), dict[str, str]()
    with Progress(TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console) as progress:
        steps = progress.add_task(f"Deciding the applications of {day}", total=len(job.graph.node_dict))

        def on_event(entry: Any) -> None:
            event = entry.dagster_event
            if event is not None and event.event_type == dg.DagsterEventType.STEP_START:
                progress.update(steps, description=event.step_key.removeprefix("credit__"))
            elif event is not None and event.event_type == dg.DagsterEventType.STEP_SUCCESS:
                progress.advance(steps)
            elif event is not None and event.event_type == dg.DagsterEventType.STEP_FAILURE:
                failed[event.step_key] = _reason(event.step_failure_data.error)

        instance.add_event_listener(run_id, on_event)
        # Dagster would print every failure several times over, with its stack; the UI has it all.
        quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
        tags = {"mao/fresh": "true"} if fresh else {}
        result = job.execute_in_process(quiet, instance=instance, partition_key=day, run_id=run_id, tags=tags, raise_on_error=False)
        progress.update(steps, description=f"The applications of {day}")
    checks = result.get_asset_check_evaluations()
    console.print(f"Checks: {sum(check.passed for check in checks)} of {len(checks)} passed.")
    for check in checks:
        if not check.passed:
            console.print(f"  {check.severity.value} {check.asset_key.path[-1]}, {check.check_name}: {check.description}")
    for step, why in failed.items():
        console.print(f"{step} failed. {why}")
    return bool(result.success)


def _reason(error: Any) -> str:
    """What a step failed of. Dagster wraps what is not its own Failure; the reason is then in the cause."""
    told = error.cause or error
    return str(told.message.partition(": ")[2].strip() or told.cls_name)


def report(home: Path, defs: Any, day: str) -> None:
    """The decisions by outcome, the versions this and earlier runs sealed, and where everything lies."""
    from assets.fairness import against_outcomes, scores
    from definitions import STATE

    resources = defs.resources
    store, bank, file = resources["state_store"].store(), resources["core_bank"], resources["applications_file"]
    seals = store.seals(f"credit/{day}")
    newest = {seal.agent: seal for seal in seals if seal.path and seal.agent}

    table = against_outcomes(store.read(newest["approval"]), file.outcomes(day))
    console.print(
        as_table("Decisions and what became of the applicants", ["decision", "paid back", "did not", "applications"], table.rows())
    )
    figures = scores(table)
    console.print(
        f"Decided without a person: {figures['automatic_share']:.0%}, of these right: {figures['accuracy']:.0%}. "
        f"Not paid back: {figures['bad_rate']:.0%} of the approved, {sum(table['bad']) / max(1, sum(table['applications'])):.0%} of all."
    )
    entry = newest["applications"]
    console.print(f"In quarantine: {entry.quarantined} of {entry.row_count + entry.quarantined:,} applications.".replace(",", " "))
    rows = [(seal.version, seal.agent, seal.row_count, seal.digest[:12], f"{seal.latency_seconds:.2f}") for seal in newest.values()]
    title = f"Versions of credit/{day} sealed by this run, of {len(seals)} in all"
    console.print(as_table(title, ["version", "agent", "rows", "sha256", "seconds"], sorted(rows)))
    console.print(as_table("Effects in the core bank", ["effect", "stands", "DM", "asked for again", "cancelled"], bank.totals()))
    console.print(f"State:   {shown(STATE)}\nHistory: {shown(home)}\nBank:    {shown(bank.path)}\n")
    nexts = {
        "make ui": "the same in Dagster, at http://localhost:3000",
        f".venv/bin/dagster-mao history credit/{day}": "every version, and what it was made from",
        f".venv/bin/dagster-mao show credit/{day} --record app-0001": "one application, through all agents",
        ".venv/bin/dagster-mao verify": "every digest, recomputed",
    }
    if entry.quarantined:
        nexts[f".venv/bin/dagster-mao quarantine show {entry.reference}"] = "what broke the contract, and why"
    console.print("Next:\n" + "".join(f"  {command:<64}{what}\n" for command, what in nexts.items()))


def as_table(title: str, columns: list[str], rows: Any) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in columns:
        table.add_column(name)
    for row in rows:
        table.add_row(*(f"{cell:,}".replace(",", " ") if isinstance(cell, int) else str(cell) for cell in row))
    return table


def shown(path: str | Path) -> str:
    """Relative to the project where that is shorter."""
    return os.path.relpath(path, ROOT) if Path(path).is_relative_to(ROOT) else str(path)


if __name__ == "__main__":
    sys.exit(main())
