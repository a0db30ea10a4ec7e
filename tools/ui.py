"""`make ui`: Dagster's UI with the demo's history, until Ctrl-C; then nothing of it is left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from tools.home import ROOT, dagster_home


def main(arguments: list[str]) -> int:
    home = dagster_home()
    print(f"History in {home}. Ctrl-C stops everything.", flush=True)
    # A session of its own: a Ctrl-C reaches only us, and whatever the webserver, the daemon and the code server start stays in one group
    # that can be ended as a whole. The handlers are set before the start, because a signal that is ignored stays ignored in children.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    command = [str(Path(sys.executable).parent / "dagster"), "dev", "-w", str(ROOT / "workspace.yaml"), *arguments]
    # `dagster dev` warns of its own successor, which needs packages that nothing here needs.
    environment = {**os.environ, "PYTHONWARNINGS": "ignore::FutureWarning"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        return process.wait()
    except KeyboardInterrupt:
        print("\nStopping.", flush=True)
        end(process)
        return 0


def _stop(_number: int, _frame: object) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # one is enough: a second must not interrupt the stopping
    raise KeyboardInterrupt


def end(process: subprocess.Popen[bytes], patience: float = 30) -> None:
    """Asks `dagster dev` to stop, waits up to `patience` seconds, and ends what is left of its group; returns when nothing is."""
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(patience)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        deadline = time.monotonic() + 5
        while is_alive(process) and time.monotonic() < deadline:
            time.sleep(0.05)


def is_alive(process: subprocess.Popen[bytes]) -> bool:
    """Whether anything of the process's group is left."""
    process.poll()  # lets go of the leader itself
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
