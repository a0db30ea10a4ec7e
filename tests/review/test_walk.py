"""Step: a workflow version by version."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from dagster_mao.cli import app
from dagster_mao.cli.step import step_through
from dagster_mao.errors import UnknownVersionError
from dagster_mao.review import MASK, walk
from dagster_mao.review.walk import scene
from dagster_mao.state import StateStore
from tests.sealed import MARKUP_KEY, MONDAY, NESTED_SECRET, SECRET, two_days

DEADLINE = 120


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> StateStore:
    store = StateStore(tmp_path_factory.mktemp("walk"))
    two_days(store)
    store.fence(MONDAY, attempt="second", run_id="undo")
    return store


def test_each_version_with_what_was_read_said_and_new(store: StateStore) -> None:
    scenes = list(walk(store, MONDAY))
    assert [(one.place, one.count, one.seal.version) for one in scenes] == [(n + 1, 7, n) for n in range(7)]
    score = scenes[4]
    assert [(seal.reference, len(rows)) for seal, rows in score.inputs] == [(f"{MONDAY}@3", 3)]
    assert score.output[0] == {"id": MARKUP_KEY, "score": 100}
    assert score.previous == store.seal_at(MONDAY, 1)
    assert score.difference is not None
    assert [(one.key, one.change) for one in score.difference.records] == [("A2", "changed"), ("A3", "removed"), ("A4", "added")]
    assert [one.difference for one in scenes[:3]] == [None, None, None]
    assert (scenes[6].seal.kind, scenes[6].output, scenes[6].difference) == ("fence", [], None)


def test_of_one_agent_and_one_record(store: StateStore) -> None:
    first, second = walk(store, MONDAY, agent="score", record="A2")
    assert (first.output, second.output) == ([{"id": "A2", "score": 900}], [{"id": "A2", "score": 950}])
    assert [len(rows) for _, rows in second.inputs] == [1]
    assert second.difference is not None
    assert [one.fields for one in second.difference.records] == [{"score": (900, 950)}]


def test_personal_fields_are_masked(store: StateStore) -> None:
    (first, *_) = walk(store, MONDAY)
    assert first.output[0]["name"] == MASK
    for options in ([], ["--json"], ["--record", "A2"]):
        out = call(store, MONDAY, *options).stdout
        assert SECRET not in out
        assert NESTED_SECRET not in out


def test_it_reads_as_it_goes(store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = StateStore.read
    monkeypatch.setattr(StateStore, "read", lambda self, seal, **given: (read.append(seal.reference), original(self, seal, **given))[1])
    scenes = walk(store, MONDAY)
    assert read == []
    next(scenes)
    assert set(read) == {f"{MONDAY}@0"}


# -- the command line ----------------------------------------------------------------------------------------------------------------


def call(store: StateStore, *arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["step", *arguments, "--root", store.root], env={"COLUMNS": "120", "NO_COLOR": "1"})
    assert result.exit_code == code, result.output
    return result


def test_printed_in_sequence_where_nobody_presses_keys(store: StateStore) -> None:
    out = call(store, MONDAY).stdout
    places = [out.index(f"{MONDAY}@{n}  ") for n in range(7)]
    assert places == sorted(places)
    assert "since version 1, by score too: 1 added, 1 removed, 1 changed, 1 the same" in out
    assert "\x1b" not in out


def test_from_a_version_on_and_as_json(store: StateStore) -> None:
    told = json.loads(call(store, f"{MONDAY}@4", "--json").stdout)
    assert [one["version"] for one in told] == [4, 5, 6]
    assert told[0]["inputs"][0]["reference"] == f"{MONDAY}@3"
    assert (told[0]["previous"], told[0]["difference"]["changed"]) == (f"{MONDAY}@1", 1)
    assert "no version to step to" in call(store, MONDAY, "--agent", "scores", code=1).stderr
    assert "did you mean" in call(store, "loans/2026-01-5", code=1).stderr
    with pytest.raises(UnknownVersionError):
        list(walk(store, "loans/none"))


def test_by_keys(store: StateStore) -> None:
    """At either end it stays where it is; other keys do nothing, and show nothing again."""
    seals = store.seals(MONDAY)
    looked: list[int] = []

    def look(place: int) -> Any:
        looked.append(place)
        return scene(store, seals, seals, place)

    keys: Iterator[str] = iter(["p", "n", "x", "n", "p", "\r", "n", "n", "n", "n", "n", "q"])
    step_through(Console(file=open(os.devnull, "w")), look, 0, len(seals), lambda: next(keys))  # noqa: SIM115
    assert looked == [0, 1, 2, 1, 2, 3, 4, 5, 6]


def test_the_end_of_the_keys_is_the_end(store: StateStore) -> None:
    seals = store.seals(MONDAY)

    def gone() -> str:
        raise EOFError

    step_through(Console(file=open(os.devnull, "w")), lambda place: scene(store, seals, seals, place), 0, 1, gone)  # noqa: SIM115


def test_on_a_terminal(store: StateStore, tmp_path: Path) -> None:
    mine, theirs = pty.openpty()
    command = [sys.executable, "-c", "from dagster_mao.cli import app; app()", "step", MONDAY, "--root", store.root]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, env={**os.environ, "NO_COLOR": "1"})
    os.close(theirs)
    try:
        assert f"{MONDAY}@0" in until(mine, "[1/7]")
        assert f"{MONDAY}@1" in until(mine, "[2/7]", key=b"n")
        until(mine, None, key=b"q")
        assert process.wait(DEADLINE) == 0
    finally:
        process.kill()
        process.wait()
        os.close(mine)


def until(terminal: int, text: str | None, *, key: bytes = b"") -> str:
    """What is shown until this is; None: until the end. A key is pressed again and again: what comes before it is waited for is dropped."""
    seen, deadline = "", time.monotonic() + DEADLINE
    while text is None or text not in seen:
        assert time.monotonic() < deadline, seen
        try:
            if key:
                os.write(terminal, key)
            if select.select([terminal], [], [], 1)[0]:
                seen += os.read(terminal, 65536).decode(errors="replace")
        except OSError:  # how Linux says that the other side is closed
            return seen
    return seen
