"""Makes .venv and installs the project into it, once: `python3 tools/install.py [dev]`. Needs nothing but Python itself.

Two at once are serialised by a lock, and the second finds the work done.
"""

import fcntl
import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
OLDEST, NEWEST = (3, 10), (3, 13)


def main(extra: str) -> None:
    if not OLDEST <= sys.version_info[:2] <= NEWEST:
        sys.exit(
            f"This project runs on Python 3.10 to 3.13, and {sys.executable} is {sys.version.split()[0]}. "
            "Say which one to use, for instance: make demo PYTHON=python3.12"
        )
    (ROOT / ".mao").mkdir(exist_ok=True)
    with (ROOT / ".mao" / "install.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another install is under way; waiting for it.", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        install(extra)


def install(extra: str) -> None:
    """Does what is missing, and leaves a stamp that says for which pyproject.toml it was done."""
    stamp = VENV / (".installed-" + extra if extra else ".installed")
    wanted = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        stamp.touch()  # make compares times
        return
    if not (VENV / "bin" / "python").exists():
        print(f"Making {VENV} with Python {sys.version.split()[0]}.", flush=True)
        try:
            venv.create(VENV, with_pip=True, clear=VENV.exists())
        except subprocess.CalledProcessError:
            sys.exit("Python's venv module cannot install pip here. On Debian and Ubuntu: apt install python3-venv")
    print("Installing the project and what it needs (once, some minutes).", flush=True)
    pip(f"{ROOT}[{extra}]" if extra else str(ROOT))
    for done in {VENV / ".installed", stamp}:  # with the extra comes all the rest
        done.write_text(wanted)


def pip(target: str) -> None:
    """Installs the target, editable: a line of progress on a terminal, everything in a log, the log's end if it fails."""
    log = VENV / "install.log"
    # On a terminal a line is written over by the next one; elsewhere it stays.
    start, end = ("\r\033[K", "") if os.isatty(1) else ("", "\n")
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", "-e", target]
    with log.open("w") as out, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            out.write(line)
            if line.startswith(("Collecting", "Building", "Installing")):
                print(f"{start}  {line.strip()[:100]}", end=end, flush=True)
    print(start, end="", flush=True)
    if process.returncode:
        sys.exit("".join(log.read_text().splitlines(keepends=True)[-20:]) + f"\nThe install failed; all of its output is in {log}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "")
