"""A Dagster deployment in processes of its own, to be killed: a daemon, and the code server that it starts.

Runs are asked for by files in a folder, which a sensor of the code location turns into run requests: as in production, nothing of a run is
in the process of the test.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg

REQUESTS = "REQUESTS_FOLDER"
T = TypeVar("T")


def asked_for(context: dg.SensorEvaluationContext) -> Iterator[dg.RunRequest]:
    """The run requests in the folder that the environment names: the body of a sensor."""
    for file in sorted(Path(os.environ[REQUESTS]).glob("*.json")):
        asked = json.loads(file.read_text())
        yield dg.RunRequest(run_key=file.stem, **asked)


def until(found: Callable[[], T], what: str, patience: float = 120) -> T:
    """What `found` returns, once it is true."""
    deadline = time.monotonic() + patience
    while not (value := found()):
        assert time.monotonic() < deadline, f"not within {patience} s: {what}"
        time.sleep(0.1)
    return value


class Deployment:
    """`home` is made if it is not there; `modules` are the code locations. With `is_dev` it is a `dagster dev`, else a daemon alone."""

    def __init__(
        self, home: Path, modules: str | Sequence[str], environment: dict[str, str], configuration: str = "", *, is_dev: bool = False
    ) -> None:
        self.home, self.requests, self._groups, self._is_dev = home, home / "requests", list[int](), is_dev
        self._modules = [modules] if isinstance(modules, str) else list(modules)
        self.requests.mkdir(parents=True, exist_ok=True)
        quiet = "telemetry: {enabled: false}\n"
        (home / "dagster.yaml").write_text(quiet + configuration)
        path = os.pathsep.join(entry for entry in (os.getcwd(), os.environ.get("PYTHONPATH")) if entry)
        own = {"DAGSTER_HOME": str(home), REQUESTS: str(self.requests), "PYTHONPATH": path}
        self._environment = {**os.environ, **own, **environment}
        self.instance = dg.DagsterInstance.from_config(str(home))

    def start(self) -> None:
        """Starts the daemon; `kill` ends it, and all that it started."""
        programs = Path(sys.executable).parent
        command = [str(programs / "dagster"), "dev", "--port", "0"] if self._is_dev else [str(programs / "dagster-daemon"), "run"]
        command += [part for module in self._modules for part in ("-m", module)]
        with (self.home / "daemon.log").open("ab") as log:
            daemon = subprocess.Popen(command, env=self._environment, stdout=log, stderr=log, start_new_session=True)
        self._groups.append(daemon.pid)

    def ask(self, name: str, **request: Any) -> None:
        """Asks for a run, under a name that is asked for once."""
        unfinished = self.requests / f"{name}.partial"
        unfinished.write_text(json.dumps(request))
        unfinished.rename(self.requests / f"{name}.json")

    def run(self, name: str, patience: float = 120) -> dg.DagsterRun:
        """The run that was asked for under a name."""
        wanted = dg.RunsFilter(tags={"dagster/run_key": name})
        return until(lambda: self.instance.get_runs(wanted), f"run {name}", patience)[0]

    def ended(self, name: str, patience: float = 120) -> dg.DagsterRun:
        """The same, once it has ended."""
        until(lambda: self.run(name).is_finished, f"the end of {name}", patience)
        return self.run(name)

    def pid(self, name: str) -> int:
        """Of the process that executes a run."""
        run = self.run(name)
        told = re.compile(r"Started process for run \(pid: (\d+)\)")

        def found() -> str | None:
            return next((m[1] for one in self.instance.all_logs(run.run_id) if (m := told.search(one.user_message or one.message))), None)

        return int(until(found, f"the process of {name}") or 0)

    def servers(self) -> list[int]:
        """The code servers that the daemon started."""
        return [pid for pid, group, command in _processes() if group in self._groups and "dagster api grpc" in command]

    def kill_daemon(self) -> None:
        """The daemon and its code servers; what they started goes on."""
        for pid in [*self.servers(), self._groups[-1]]:
            kill(pid)

    def kill_all(self) -> None:
        """Daemon, code servers and runs, at once."""
        for group in self._groups:
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)

    def close(self) -> None:
        """Ends whatever is left."""
        self.kill_all()
        self.instance.dispose()


def kill(pid: int) -> None:
    """By SIGKILL, if it is still there."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


@contextmanager
def deployed(
    home: Path, modules: str | Sequence[str], environment: dict[str, str], configuration: str = "", *, is_dev: bool = False
) -> Iterator[Deployment]:
    """A running deployment; nothing of it is left behind."""
    deployment = Deployment(home, modules, environment, configuration, is_dev=is_dev)
    try:
        deployment.start()
        yield deployment
    finally:
        deployment.close()


def _processes() -> Iterator[tuple[int, int, str]]:
    listed = subprocess.run(["ps", "-eo", "pid=,pgid=,args="], capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        pid, group, command = line.split(maxsplit=2)
        yield int(pid), int(group), command
