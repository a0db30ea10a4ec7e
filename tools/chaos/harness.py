"""Runs workflows by their scripts, as code server and daemon would: their processes end, and others take note, later or not at all."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import dagster as dg
from sqlalchemy.exc import OperationalError

from dagster_mao.errors import StoreError
from tools.chaos import processes
from tools.chaos.processes import COMPENSATION, LOCKED_OUT, Task
from tools.chaos.script import Point, Script

# Without Dagster's capture of what is printed, which takes four processes a run.
_CONFIGURATION = """
telemetry: {enabled: false}
compute_logs: {module: dagster._core.storage.noop_compute_log_manager, class: NoOpComputeLogManager}
"""
_ACTIVE = 12  # workflows on their way at a time
_TICK = 1.0  # seconds between ticks of the sensor; the daemon's are 5 apart
_TICKS_LIVE = 60_000  # milliseconds within which a ticking process is killed, if it is
_ZOMBIES_SLEEP = 6.0  # seconds at least
_COMPENSATORS_SLEEP = 20.0  # longer than their lease


@dataclass
class _Worker:
    process: BaseProcess
    tasks: Connection
    task: Task | None = None
    is_zombie: bool = False

    def sleep(self, seconds: float) -> None:
        """Wakes the stopped process later, whatever this one does then: it may wait for a lock that the other holds."""

        def wake() -> None:
            with suppress(ProcessLookupError):
                os.kill(self.process.pid or 0, signal.SIGCONT)

        self.is_zombie = True
        timer = threading.Timer(seconds, wake)
        timer.daemon = True
        timer.start()


@dataclass
class _Workflow:
    script: Script
    runs: int = 0
    compensations: int = 0


@dataclass
class Chaos:
    """`folder` holds everything: scripts, state, journal, banks, Dagster's home, logs. `processes` work at a time.

    `project` is the code location; without `ticks` nobody looks for what is to be compensated.
    """

    folder: Path
    seed: int = 0
    processes: int = 2
    kill_ticks: float = 0.5
    ticks: bool = True
    project: str = "tools.chaos.project"
    tell: Callable[[str], None] = print
    _active: dict[str, _Workflow] = field(default_factory=dict)
    _workers: list[_Worker] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name in ("scripts", "ended", "killed", "logs", "home"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "home" / "dagster.yaml").write_text(_CONFIGURATION)
        self._choose = random.Random(self.seed)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([self.project, "tools.chaos.processes", "tools.chaos.preloaded"])
        self.instance = dg.DagsterInstance.from_config(str(self.folder / "home"))
        self._ticking: BaseProcess | None = None
        self._looked = self._asked_at = 0.0
        self._launched = set[str]()
        self._given_up: list[str] = []  # runs whose processes are gone, to be reported

    def run(self, scripts: Iterable[Script]) -> None:
        """Returns when nothing is left to be done about any workflow."""
        from tools.chaos.project import store, workflows

        waiting, done = list(scripts), 0
        for number, script in enumerate(waiting):
            script.workflow = f"w{number:04}"
            script.write(self.folder)
        self.instance.add_dynamic_partitions(str(workflows.name), [script.workflow for script in waiting])
        total, waiting = len(waiting), waiting[::-1]
        self._store = store(self.folder)
        try:
            while waiting or self._active:
                self._keep_ticking()
                self._launch()
                while waiting and len(self._active) < _ACTIVE and self._is_idle():
                    script = waiting.pop()
                    self._active[script.workflow] = workflow = _Workflow(script)
                    self._start(workflow)
                self._attend()
                self._give_up()
                for workflow in self._settled():
                    if workflow.script.again and workflow.runs == 1:
                        workflow.script.amount += 1
                        self._start(workflow)
                    else:
                        del self._active[workflow.script.workflow]
                        done += 1
                        if done % 20 == 0 or done == total:
                            self.tell(f"{done} of {total} workflows")
                time.sleep(0.05)
        finally:
            self._close()

    # -- runs ------------------------------------------------------------------------------------------------------------------------

    def _start(self, workflow: _Workflow) -> None:
        script = workflow.script
        point = script.runs[workflow.runs] if workflow.runs < len(script.runs) else None
        run_id = str(uuid.uuid4())
        script.first_attempt = script.first_attempt or run_id
        script.write(self.folder)
        self._hand(Task(f"{script.workflow}.run{workflow.runs}", run_id, script.workflow, point))
        workflow.runs += 1

    def _launch(self) -> None:
        """Compensations that the sensor asked for go before new workflows."""
        asked: list[dg.DagsterRun] = []
        with suppress(OperationalError):
            asked = self._asked()
        for run in asked:
            if not self._is_idle():
                return
            workflow = self._active.get(run.tags["mao/workflow"].partition("/")[2])
            points, number = (workflow.script.compensations, workflow.compensations) if workflow else ([], 0)
            name = f"{workflow.script.workflow}.compensation{number}" if workflow else run.run_id
            self._launched.add(run.run_id)
            self._hand(Task(name, run.run_id, None, points[number] if number < len(points) else None))
            if workflow:
                workflow.compensations += 1

    def _asked(self) -> list[dg.DagsterRun]:
        if time.monotonic() - self._asked_at < 0.5:
            return []
        self._asked_at = time.monotonic()
        wanted = dg.RunsFilter(job_name=COMPENSATION, statuses=[dg.DagsterRunStatus.NOT_STARTED])
        return [run for run in self.instance.get_runs(wanted)[::-1] if run.run_id not in self._launched]

    # -- workers ---------------------------------------------------------------------------------------------------------------------

    def _is_idle(self) -> bool:
        working = sum(worker.task is not None and not worker.is_zombie for worker in self._workers)
        return working < self.processes

    def _hand(self, task: Task) -> None:
        worker = next((one for one in self._workers if one.task is None), None) or self._worker()
        worker.task = task
        worker.tasks.send(task)

    def _worker(self) -> _Worker:
        here, there = self._context.Pipe()
        worker = _Worker(self._process("work", there), here)
        there.close()
        self._workers.append(worker)
        return worker

    def _attend(self) -> None:
        """What a code server does when a run's process dies; of one that only stopped, what a person does who has lost patience."""
        for worker in list(self._workers):
            task = worker.task
            if not worker.process.is_alive():
                self._workers.remove(worker)
                assert task is not None
                code, kind = worker.process.exitcode, "run" if task.workflow else "compensator"
                assert code in (-signal.SIGKILL, LOCKED_OUT), f"{task}: its process ended by itself, with {code}"
                self._confirm(task.name, kind if code == -signal.SIGKILL else f"locked-out {kind}", task.point)
                if self._choose.random() < 0.5:
                    self._given_up.append(task.run_id)  # else nobody saw it
            elif task is not None and worker.tasks.poll():
                self._done(worker)
            elif task is not None and not worker.is_zombie and self._has_stopped(worker):
                self._confirm(task.name, "zombie run" if task.workflow else "zombie compensator", task.point)
                least = _ZOMBIES_SLEEP if task.workflow else _COMPENSATORS_SLEEP
                worker.sleep(least + self._choose.random() * 6)
                self._given_up.append(task.run_id)

    def _done(self, worker: _Worker) -> None:
        try:
            worker.tasks.recv()
        except EOFError:
            worker.process.join()  # it has died this very moment
            return
        worker.task = None
        if worker.is_zombie:
            worker.tasks.close()
            self._workers.remove(worker)

    def _has_stopped(self, worker: _Worker) -> bool:
        assert worker.task is not None
        if not (self.folder / "ended" / worker.task.name).exists():
            return False
        with suppress(OSError):
            return Path(f"/proc/{worker.process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
        return False

    def _confirm(self, name: str, kind: str, point: Point | None) -> None:
        (self.folder / "killed" / name).write_text(f"{kind}: {point}")

    def _give_up(self) -> None:
        """Reports runs as failed whose processes are gone, once Dagster's database can be written to."""
        with suppress(OperationalError):  # whoever was stopped in the middle of a commit holds the lock
            while self._given_up:
                run = self.instance.get_run_by_id(self._given_up[-1])
                if run is not None and not run.is_finished:
                    self.instance.report_run_failed(run, "its process is gone")
                self._given_up.pop()

    # -- the daemon ------------------------------------------------------------------------------------------------------------------

    def _keep_ticking(self) -> None:
        """Starts what ticks the sensor, again when it was killed."""
        if not self.ticks or (self._ticking is not None and self._ticking.is_alive()):
            return
        if self._ticking is not None:
            assert self._ticking.exitcode == -signal.SIGKILL, "the sensor's process ended by itself"
            self._confirm(f"tick-{self._ticking.pid}", "ticks", None)
        killed = self._choose.random() < self.kill_ticks
        point = Point("anywhere", "after", self._choose.randrange(_TICKS_LIVE)) if killed else None
        self._alive, there = self._context.Pipe()
        self._ticking = self._process("tick", there, _TICK, point)
        there.close()

    def _settled(self) -> Iterator[_Workflow]:
        """Those of which nothing goes on, and nothing is to be done by the journal."""
        from dagster_mao.saga import unfinished

        if time.monotonic() - self._looked < _TICK:
            return
        self._looked = time.monotonic()
        working = {worker.task.name.partition(".")[0] for worker in self._workers if worker.task is not None}
        idle = [one for name, one in self._active.items() if name not in working]
        if not idle:
            return
        self._asked_at = 0.0
        try:
            open_ = {run.tags["mao/workflow"] for run in self._asked()}
            open_ |= {one.workflow_id for one in unfinished(self._store, "chaos") if self.ticks and one.state != "incomplete"}
        except (StoreError, OperationalError):  # whoever was stopped in the middle of a commit holds the lock
            return
        yield from (one for one in idle if f"chaos/{one.script.workflow}" not in open_)

    # -- processes -------------------------------------------------------------------------------------------------------------------

    def _process(self, what: str, *arguments: object) -> BaseProcess:
        process = self._context.Process(target=getattr(processes, what), args=(self.project, str(self.folder), *arguments), daemon=True)
        process.start()
        return process

    def _close(self) -> None:
        """Nothing of it goes on."""
        for worker in self._workers:
            worker.tasks.close()
            worker.process.kill()
        if self._ticking is not None:
            self._ticking.kill()
        for process in [*(worker.process for worker in self._workers), *([self._ticking] if self._ticking else [])]:
            process.join()
        self.instance.dispose()
