"""What `make` calls: the demo, the UI and the installer, as a newcomer meets them."""

import os
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import polars as pl
import pytest

import dagster_mao as mao
from tools import home, install

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def surroundings(tmp_path):
    """The environment of a demo that leaves this project's own state alone, on a tenth of the applications."""
    pl.read_csv(ROOT / "data" / "german_credit.csv").head(100).write_csv(tmp_path / "some.csv")
    own = {
        "DAGSTER_HOME": str(tmp_path / "dagster_home"),
        "DAGSTER_MAO_ROOT": str(tmp_path / "state"),
        "CREDIT_CORE_BANK": str(tmp_path / "bank.db"),
        "CREDIT_APPLICATIONS": str(tmp_path / "some.csv"),
    }
    return {**os.environ, **own, "COLUMNS": "160"}


def start(module, surroundings, *arguments):
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, cwd=ROOT, env=surroundings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_two_demos_at_once_both_end_well_and_each_adds_its_versions(surroundings, tmp_path):
    demos = [start("tools.demo", surroundings) for _ in range(2)]
    said = [demo.communicate(timeout=280)[0] for demo in demos]
    assert [demo.returncode for demo in demos] == [0, 0], "\n".join(said)
    seals = mao.StateStore(tmp_path / "state").seals("credit/2026-01-01")
    assert [seal.version for seal in seals] == list(range(12))
    assert len({seal.attempt for seal in seals}) == 2
    assert sum("Another demo is running" in text for text in said) == 1
    last = next(text for text in said if "of 12 in all" in text)
    assert re.search(r"inquiry *│ 100 *│ 0 *│ 0 *│ 0 ", last)  # what the first one was answered is kept: the second asks nobody again


@pytest.mark.slow
def test_the_ui_answers_and_leaves_nothing_running(surroundings):
    """Started as a script does with `&`: with SIGINT ignored, which `dagster dev` would inherit and then not be stopped by."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        ui = start("tools.ui", surroundings, "--port", str(port))
    finally:
        signal.signal(signal.SIGINT, before)
    (dagster,) = children(ui.pid, until=f"http://127.0.0.1:{port}/server_info", ui=ui)
    family = descendants(dagster)
    assert len(family) > 1  # webserver, daemon, code server
    ui.send_signal(signal.SIGINT)
    said, _ = ui.communicate(timeout=60)
    assert ui.returncode == 0, said
    assert [pid for pid in family if Path(f"/proc/{pid}").exists() and "Z" not in state(pid)] == []


def children(pid, *, until, ui):
    """The processes that `pid` started, once the address answers."""
    while ui.poll() is None:
        try:
            with urllib.request.urlopen(until, timeout=5):
                break
        except OSError:
            continue
    assert ui.poll() is None, ui.communicate()[0]
    return direct(pid)


def direct(pid):
    return [int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def descendants(pid):
    return [pid, *(below for child in direct(pid) for below in descendants(child))]


def state(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_python_that_is_too_new_is_told_what_to_do(monkeypatch):
    monkeypatch.setattr(install, "NEWEST", (3, 9))
    with pytest.raises(SystemExit, match=r"make demo PYTHON=python3\.12"):
        install.main("")


def test_what_is_installed_is_not_installed_again(monkeypatch, tmp_path):
    (tmp_path / "pyproject.toml").write_text("[project]")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").touch()
    targets = []
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install, "VENV", tmp_path / ".venv")
    monkeypatch.setattr(install, "pip", targets.append)
    for extra in ("dev", "dev", ""):
        install.main(extra)
    assert targets == [f"{tmp_path}[dev]"]
    (tmp_path / "pyproject.toml").write_text("[project]\n# changed")
    install.main("")
    assert targets[1:] == [str(tmp_path)]


def test_an_install_that_fails_shows_why_and_is_tried_again(monkeypatch, tmp_path):
    (tmp_path / "pyproject.toml").write_text("not a project")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "python").write_text("#!/bin/sh\necho no network here\nexit 1\n")
    (tmp_path / ".venv" / "bin" / "python").chmod(0o755)
    monkeypatch.setattr(install, "ROOT", tmp_path)
    monkeypatch.setattr(install, "VENV", tmp_path / ".venv")
    with pytest.raises(SystemExit, match="no network here"):
        install.main("")
    assert not (tmp_path / ".venv" / ".installed").exists()


def test_make_lists_what_it_can_do():
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"make demo", "make test", "make ui"} <= {line.split("\t")[0].strip() for line in said.splitlines()}


def test_somebody_elses_dagster_home_is_not_configured(monkeypatch, tmp_path):
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    assert home.dagster_home() == tmp_path
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "new"))
    assert "nux" in (home.dagster_home() / "dagster.yaml").read_text()
