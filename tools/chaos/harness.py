"""Runs workflows by their scripts, as code server and daemon would: their processes end, and others take note, later or not at all."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import dagster as dg

from tools.chaos import processes
from tools.chaos.processes import COMPENSATION
from tools.chaos.script import Point, Script

_ACTIVE = 12  # workflows on their way at a time
_TICK = 1.0  # seconds between ticks of the sensor; the daemon's are 5 apart
_ZOMBIES_SLEEP = 6.0  # seconds at least


@dataclass
class _Workflow:
    script: Script
    process: BaseProcess | None = None
    run_id: str = ""
    point: Point | None = None
    zombie: BaseProcess | None = None
    wakes: float = 0.0
    runs: int = 0


@dataclass
class Chaos:
    """`folder` holds everything: scripts, state, journal, banks, Dagster's home, logs. `processes` at a time.

    `project` is the code location; without `ticks` nobody looks for what is to be compensated.
    """

    folder: Path
    seed: int = 0
    processes: int = 3
    kill_ticks: float = 0.1
    ticks: bool = True
    project: str = "tools.chaos.project"
    tell: Callable[[str], None] = print
    _active: dict[str, _Workflow] = field(default_factory=dict)
    _compensations: dict[str, tuple[BaseProcess, str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("scripts", "ended", "logs", "home"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        (self.folder / "home" / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
        self._choose = random.Random(self.seed)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([self.project, "tools.chaos.processes"])
        self.instance = dg.DagsterInstance.from_config(str(self.folder / "home"))
        self._ticking: BaseProcess | None = None
        self._ticked = self._looked = 0.0
        self._launched = set[str]()

    def run(self, scripts: Iterable[Script]) -> None:
        """Returns when nothing is left to be done about any workflow."""
        from tools.chaos.project import store, workflows

        waiting, done = list(scripts), 0
        for number, script in enumerate(waiting):
            script.workflow = f"w{number:04}"
        self.instance.add_dynamic_partitions(str(workflows.name), [script.workflow for script in waiting])
        total, waiting = len(waiting), waiting[::-1]
        self._store = store(self.folder)
        while waiting or self._active:
            while waiting and len(self._active) < _ACTIVE and self._has_room():
                script = waiting.pop()
                self._active[script.workflow] = workflow = _Workflow(script)
                self._start(workflow)
            self._tick()
            self._launch()
            self._bury()
            for workflow in list(self._active.values()):
                self._attend(workflow)
            for workflow in self._settled():
                if workflow.script.again and workflow.runs == 1:
                    workflow.script.amount += 1
                    self._start(workflow)
                else:
                    del self._active[workflow.script.workflow]
                    done += 1
                    if done % 20 == 0 or not (waiting or self._active):
                        self.tell(f"{done} of {total} workflows")
            time.sleep(0.05)
        while self._ticking is not None and self._ticking.is_alive():
            time.sleep(0.05)

    # -- runs ------------------------------------------------------------------------------------------------------------------------

    def _start(self, workflow: _Workflow) -> None:
        script = workflow.script
        workflow.point = script.runs[workflow.runs] if workflow.runs < len(script.runs) else None
        workflow.runs += 1
        workflow.run_id = str(uuid.uuid4())
        script.first_attempt = script.first_attempt or workflow.run_id
        script.write(self.folder)
        workflow.process = self._process("run_workflow", script.workflow, workflow.run_id, workflow.point)

    def _attend(self, workflow: _Workflow) -> None:
        """What a code server does when a run's process dies; of one that only stopped, what a person does who has lost patience."""
        process = workflow.process
        if process is not None and not process.is_alive():
            workflow.process = None
            if process.exitcode == -signal.SIGKILL and self._choose.random() < 0.5:
                self._given_up(workflow.run_id)  # else nobody saw it
        elif process is not None and workflow.point is not None and workflow.point.how == "stop" and self._has_ended(workflow.run_id):
            workflow.process, workflow.zombie = None, process
            workflow.wakes = time.monotonic() + _ZOMBIES_SLEEP + self._choose.random() * 6
            self._given_up(workflow.run_id)
        if workflow.zombie is not None:
            if time.monotonic() > workflow.wakes:
                with suppress(ProcessLookupError):
                    os.kill(workflow.zombie.pid or 0, signal.SIGCONT)
            if not workflow.zombie.is_alive():
                workflow.zombie = None

    def _has_ended(self, run_id: str) -> bool:
        return (self.folder / "ended" / run_id).exists()

    def _given_up(self, run_id: str) -> None:
        run = self.instance.get_run_by_id(run_id)
        if run is not None and not run.is_finished:
            self.instance.report_run_failed(run, "its process is gone")

    # -- compensations ---------------------------------------------------------------------------------------------------------------

    def _tick(self) -> None:
        if not self.ticks or (self._ticking is not None and self._ticking.is_alive()):
            return
        if time.monotonic() - self._ticked > _TICK:
            self._ticked = time.monotonic()
            killed = self._choose.random() < self.kill_ticks
            self._ticking = self._process("tick", Point("anywhere", "after", self._choose.randrange(400)) if killed else None)

    def _launch(self) -> None:
        for run in self._asked():
            if not self._has_room(1):
                return
            workflow = self._active.get(run.tags["mao/workflow"].partition("/")[2])
            points = workflow.script.compensations if workflow else []
            point = points.pop(0) if points else None
            self._compensations[run.run_id] = self._process("compensate", run.run_id, point), run.tags["mao/workflow"]
            self._launched.add(run.run_id)

    def _asked(self) -> list[dg.DagsterRun]:
        wanted = dg.RunsFilter(job_name=COMPENSATION, statuses=[dg.DagsterRunStatus.NOT_STARTED])
        return [run for run in self.instance.get_runs(wanted) if run.run_id not in self._launched]

    def _bury(self) -> None:
        for run_id, (process, _) in list(self._compensations.items()):
            if not process.is_alive():
                del self._compensations[run_id]
                if process.exitcode == -signal.SIGKILL and self._choose.random() < 0.5:
                    self._given_up(run_id)

    def _settled(self) -> Iterator[_Workflow]:
        """Those of which nothing goes on, and nothing is to be done by the journal."""
        from dagster_mao.saga import unfinished

        idle = [one for one in self._active.values() if one.process is None and one.zombie is None]
        if not idle or time.monotonic() - self._looked < _TICK:
            return
        self._looked = time.monotonic()
        open_ = {one.workflow_id for one in unfinished(self._store, "chaos") if one.state != "incomplete"}
        open_ |= {workflow for _, workflow in self._compensations.values()}
        open_ |= {run.tags["mao/workflow"] for run in self._asked()}
        for one in idle:
            if f"chaos/{one.script.workflow}" not in open_:
                yield one

    # -- processes -------------------------------------------------------------------------------------------------------------------

    def _process(self, what: str, *arguments: Any) -> BaseProcess:
        process = self._context.Process(target=getattr(processes, what), args=(self.project, str(self.folder), *arguments), daemon=False)
        process.start()
        return process

    def _has_room(self, more: int = 0) -> bool:
        """Compensations go before new workflows."""
        running = sum(one.process is not None for one in self._active.values()) + len(self._compensations)
        return running < self.processes + more
