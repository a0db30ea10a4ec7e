"""`make chaos`: hundreds of workflows over real Dagster runs, whose processes are killed and stopped; then the banks are asked."""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tools.chaos.harness import Chaos
from tools.chaos.project import store
from tools.chaos.script import at_random, deployed, scripted
from tools.chaos.tally import Tally

console = Console(highlight=False, markup=False, soft_wrap=True, width=120)  # the table is wider than 80


def main(arguments: list[str]) -> int:
    options = argparse.ArgumentParser(prog="make chaos", description="Kills what it can, and asks the banks afterwards.")
    options.add_argument("--workflows", type=int, default=300, help="at least so many: all that are scripted, then such as chance makes")
    options.add_argument("--seed", type=int, default=int(time.time()), help="of chance; printed")
    options.add_argument("--processes", type=int, default=2, help="at a time")
    options.add_argument("--without-daemon", action="store_true", help="leave out the workflows of a real daemon, some minutes")
    options.add_argument("--folder", type=Path, help="where everything is kept; a new temporary one that is removed if all is well")
    given = options.parse_args(arguments)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    choose = random.Random(given.seed)
    live = [] if given.without_daemon else list(deployed())
    scripts = [*scripted()]
    scripts += [at_random(choose) for _ in range(given.workflows - len(scripts) - len(live))]
    for script in scripts:
        script.again = script.again or choose.random() < 0.3
    console.print(f"{len(scripts) + len(live)} workflows, seed {given.seed}, in {folder}")
    started = time.monotonic()
    Chaos(folder / "workers", seed=given.seed, processes=given.processes, tell=console.print).run(scripts)
    tally = Tally.of(folder / "workers", store(folder / "workers"))
    if live:
        from tools.chaos.live import Live

        Live(folder / "daemon", tell=console.print).run(live)
        tally += Tally.of(folder / "daemon", store(folder / "daemon"))
    report(tally, time.monotonic() - started)
    if tally.good and not given.folder:
        shutil.rmtree(folder)
    return 0 if tally.good else 1


def report(tally: Tally, seconds: float) -> None:
    """What came of it."""
    table = Table(title=f"After {seconds:.0f} s", title_justify="left", title_style="bold")
    told = {
        "workflows": tally.workflows,
        "kills": tally.kills.total(),
        "completed": tally.completed,
        "compensated": tally.compensated,
        "superseded": tally.superseded,
        "incomplete": tally.incomplete,
        "asked again": tally.repeats,
        "doubles": tally.doubles,
        "missing": tally.missing,
    }
    for name in told:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:,}" for value in told.values()))
    console.print(table)
    console.print("Killed: " + ", ".join(f"{count} {kind}" for kind, count in sorted(tally.kills.items())))
    console.print(f"Incomplete because an undo was told to fail: {tally.expected}")
    if tally.seconds:
        median, most = statistics.median(tally.seconds), max(tally.seconds)
        count = len(tally.seconds)
        console.print(f"From the end of a run to the start of its compensation: median {median:.1f} s, at most {most:.1f} s, of {count}")
    for line in tally.wrong:
        console.print(line)
    for line in tally.unreached:
        console.print(f"no process ended at {line}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
