"""The part of the chaos that needs nothing but Dagster: a real daemon, its code server, and the processes that these start."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import dagster as dg

from dagster_mao.dagster.endings import is_gone
from dagster_mao.saga import unfinished
from tools.chaos.deployment import Deployment, kill
from tools.chaos.processes import COMPENSATION
from tools.chaos.project import FOLDER, store, workflows
from tools.chaos.script import Point, Script
from tools.chaos.tally import LATENCIES

_CONFIGURATION = "concurrency: {runs: {max_concurrent_runs: 3}}\nnux: {enabled: false}\n"
_ZOMBIES_SLEEP = 15.0  # seconds: the daemon's sensors tick every 5


@dataclass
class Live:
    """`folder` holds everything. The daemon and its code server are killed `daemon_kills` times, and started again."""

    folder: Path
    daemon_kills: int = 2
    patience: float = 3600.0
    tell: Callable[[str], None] = print
    _wakes: dict[str, float] = field(default_factory=dict)

    def run(self, scripts: Sequence[Script]) -> None:
        """Returns when nothing is left to be done about any workflow, and no process of any goes on."""
        for name in ("scripts", "ended", "killed", "processes"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        self._scripts = list(scripts)
        for number, script in enumerate(self._scripts):
            script.workflow = f"d{number:03}"
            script.write(self.folder)
        self._store = store(self.folder)
        self._dagster = Deployment(self.folder / "home", "tools.chaos.deployed", {FOLDER: str(self.folder)}, _CONFIGURATION)
        self._dagster.instance.add_dynamic_partitions(str(workflows.name), [script.workflow for script in self._scripts])
        try:
            self._dagster.start()
            for script in self._scripts:
                self._dagster.ask(script.workflow, job_name=script.job, partition_key=script.workflow)
            self._attend()
            (self.folder / LATENCIES).write_text(json.dumps(self._latencies()))
        finally:
            self._dagster.close()

    def _attend(self) -> None:
        deadline, kills, told = time.monotonic() + self.patience, 0, 0
        while (left := self._unsettled()) or self._running():
            assert time.monotonic() < deadline, f"not settled: {left}"
            for script in self._scripts:
                for name, point in script.points():
                    self._look(script, name, point)
                if script.loses_worker:
                    self._lose_worker(script)
            settled = len(self._scripts) - len(left)
            if settled // 4 > told // 4:
                self.tell(f"{settled} of {len(self._scripts)} workflows of the daemon")
                told = settled
            if kills < self.daemon_kills and settled * (self.daemon_kills + 1) > kills * len(self._scripts):
                kills += 1
                self._dagster.kill_daemon()
                self._confirm(f"daemon{kills}", "daemon")
                self._dagster.start()
            time.sleep(1.0)

    # -- what dies -------------------------------------------------------------------------------------------------------------------

    def _look(self, script: Script, name: str, point: Point) -> None:
        """Takes note of a process that came to its end, and of one that only stopped does what a person does, who has lost patience."""
        if name in self._wakes:
            if time.monotonic() > self._wakes[name]:
                with suppress(ProcessLookupError):
                    os.kill(int((self.folder / "ended" / name).read_text()), signal.SIGCONT)
            return
        with suppress(FileNotFoundError, ValueError):
            pid = int((self.folder / "ended" / name).read_text())
            kind = "compensator" if ".compensation" in name else "run" if script.job == "chaos_job" else "step"
            if point.how == "kill" and not _is_there(pid):
                self._confirm(name, kind)
                self._wakes[name] = float("inf")
            if point.how == "stop" and _is_there(pid) == "T":
                self._confirm(name, f"zombie {kind}")
                self._wakes[name] = time.monotonic() + _ZOMBIES_SLEEP
                run = self._dagster.run(script.workflow)
                if not run.is_finished:
                    self._dagster.instance.report_run_failed(run, "it hangs")

    def _lose_worker(self, script: Script) -> None:
        """Kills the process above the steps, once one of them has had an effect: they go on."""
        name = f"{script.workflow}.worker"
        if not (self.folder / "killed" / name).exists() and self._has_effects(script.workflow):
            kill(self._dagster.pid(script.workflow))
            self._confirm(name, "worker")

    def _has_effects(self, workflow: str) -> bool:
        for bank in self.folder.glob("*.db"):
            with suppress(sqlite3.OperationalError), sqlite3.connect(bank) as ledger:
                if ledger.execute("SELECT 1 FROM ledger WHERE application_id LIKE ?", (f"{workflow}-%",)).fetchone():
                    return True
        return False

    def _confirm(self, name: str, kind: str) -> None:
        (self.folder / "killed" / name).write_text(kind)

    # -- what is left to be done -----------------------------------------------------------------------------------------------------

    def _unsettled(self) -> set[str]:
        """The workflows about which something is still to be done."""
        open_ = {one.workflow_id.partition("/")[2] for one in unfinished(self._store, "chaos") if one.state != "incomplete"}
        over = set[str]()
        for run in self._dagster.instance.get_runs():
            if run.is_finished or is_gone(self._dagster.instance, run):
                over.add(run.tags.get("dagster/run_key", "") if run.job_name != COMPENSATION else "")
            elif run.job_name == COMPENSATION:
                open_.add(run.tags["mao/workflow"].partition("/")[2])
        return open_ | {script.workflow for script in self._scripts if script.workflow not in over}

    def _running(self) -> list[str]:
        """The processes that execute something."""
        return [file.name for file in (self.folder / "processes").iterdir() if _is_there(int(file.name.rpartition(".")[2]))]

    def _latencies(self) -> list[float]:
        """Seconds from the end of a run to the start of the first run that compensates it."""
        first = dict[str, dg.RunRecord]()
        for record in self._dagster.instance.get_run_records(dg.RunsFilter(job_name=COMPENSATION), ascending=True):
            first.setdefault(record.dagster_run.tags.get("mao/compensates", ""), record)
        found = []
        for run_id, record in first.items():
            failed = self._dagster.instance.get_run_record_by_id(run_id)
            if failed is not None and failed.end_time is not None and record.start_time is not None:
                found.append(record.start_time - failed.end_time)
        return found


def _is_there(pid: int) -> str:
    """The state of a process, as /proc has it; nothing where there is none, or where it waits to be buried."""
    with suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return "" if state == "Z" else state
    return ""
