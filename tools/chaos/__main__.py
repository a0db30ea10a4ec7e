"""`make chaos`: hundreds of workflows over real Dagster runs, whose processes are killed and stopped; then the banks are asked."""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from tools.chaos.harness import Chaos
from tools.chaos.project import store
from tools.chaos.script import at_random, scripted
from tools.chaos.tally import Tally

console = Console(highlight=False, markup=False, soft_wrap=True)


def main(arguments: list[str]) -> int:
    options = argparse.ArgumentParser(prog="make chaos", description="Kills what it can, and asks the banks afterwards.")
    options.add_argument("--workflows", type=int, default=300, help="at least so many: all that are scripted, then such as chance makes")
    options.add_argument("--seed", type=int, default=int(time.time()), help="of chance; printed")
    options.add_argument("--processes", type=int, default=3, help="at a time")
    options.add_argument("--folder", type=Path, help="where everything is kept; a new temporary one that is removed if all is well")
    given = options.parse_args(arguments)
    folder = given.folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    choose = random.Random(given.seed)
    scripts = [*scripted()]
    scripts += [at_random(choose) for _ in range(given.workflows - len(scripts))]
    for script in scripts:
        script.again = script.again or choose.random() < 0.3
    console.print(f"{len(scripts)} workflows, seed {given.seed}, in {folder}")
    started = time.monotonic()
    Chaos(folder, seed=given.seed, processes=given.processes, tell=console.print).run(scripts)
    tally = Tally.of(folder, store(folder))
    report(tally, time.monotonic() - started)
    good = not (tally.doubles or tally.missing) and tally.incomplete == sum(script.undo_fails is not None for script in scripts)
    if good and not given.folder:
        shutil.rmtree(folder)
    return 0 if good else 1


def report(tally: Tally, seconds: float) -> None:
    """What came of it."""
    table = Table(title=f"After {seconds:.0f} s", title_justify="left", title_style="bold")
    told = {
        "workflows": tally.workflows,
        "kills": tally.kills,
        "zombies": tally.zombies,
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
    for line in tally.wrong:
        console.print(line)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
