"""Law 8 with real processes: a step that is killed at any point, and run again, asks nobody twice who had answered."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from dagster_mao.state import StateStore
from dagster_mao.state.verify import verify
from tests.killed import AT_A_TIME, COUNT, enter
from tests.shop import logged

SECONDS = 120


class Witness:
    """The other side: it says what it was asked, and under which keys. At the `kill_at`th request it calls `kill`, and does not answer."""

    def __init__(self) -> None:
        self.asked, self.keys = Counter[str](), dict[str, set[str]]()
        self.kill_at, self.kill = 0, lambda: None
        lock, witness = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                item = self.path.strip("/")
                with lock:
                    witness.asked[item] += 1
                    witness.keys.setdefault(item, set()).add(str(self.headers["Idempotency-Key"]))
                    if witness.asked.total() == witness.kill_at:
                        witness.kill()
                        return
                self.send_response(200)
                self.end_headers()
                self.wfile.write(b"1")

            def log_message(self, format: str, *args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def witness() -> Iterator[Witness]:
    made = Witness()
    yield made
    made.close()


def process(root: str, witness: Witness, way: str, run: str, point: str, notes: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.killed", root, witness.url, way, run, point, str(notes)], stderr=subprocess.PIPE, cwd=Path.cwd()
    )


def ended(one: subprocess.Popen[bytes]) -> int:
    _, told = one.communicate(timeout=SECONDS)
    assert one.returncode in (0, -9), told.decode()
    return one.returncode


POINTS = {
    "async": ("kept:1", "kept:5", "asked:6", "seal", "sealed", "logged"),
    "threads": ("kept:1", "asked:6", "sealed"),
    "sync": ("kept:5", "asked:6", "logged"),
    "frames": ("asked:1", "kept:1", "seal", "sealed", "logged"),
}
FEW = {
    ("async", "kept:5"),
    ("async", "sealed"),
    ("threads", "asked:6"),
    ("sync", "logged"),
    ("frames", "kept:1"),
}  # each of them two processes
ANYWHERE = [
    pytest.param(way, point, marks=() if (way, point) in FEW else pytest.mark.long) for way, points in POINTS.items() for point in points
]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("way", "point"), ANYWHERE)
def test_killed_at_any_point_and_run_again_only_what_was_in_flight_is_asked_again(
    tmp_path: Path, witness: Witness, way: str, point: str
) -> None:
    root, notes = str(tmp_path / "state"), tmp_path / "notes"
    enter(root, way)
    first = process(root, witness, way, "first", point, notes)
    if point.startswith("asked"):
        witness.kill_at, witness.kill = int(point.partition(":")[2]), first.kill
    assert ended(first) == -9
    kept = set(notes.read_text().split())
    names = {"frame"} if way == "frames" else {f"i{n}" for n in range(COUNT)}
    if point in ("seal", "sealed", "logged"):
        assert kept == names

    witness.kill_at = 0
    assert ended(process(root, witness, way, "again", "", tmp_path / "notes again")) == 0

    assert set(witness.asked) == names
    repeated = {item for item, times in witness.asked.items() if times > 1}
    assert not repeated & kept, "it had answered"
    assert max(witness.asked.values()) <= 2
    assert len(repeated) <= (AT_A_TIME if way in ("threads", "async") else 1)
    assert all(len(keys) == 1 for keys in witness.keys.values()), "what is asked again is asked under the same key"

    store = StateStore(root)
    seals = [seal for seal in store.seals("shop/day") if seal.agent == "pricing"]
    assert len(seals) == 1
    assert seals[0].run_id == ("first" if point in ("sealed", "logged") else "again")
    assert verify(store).good

    calls = logged(store)
    answered = calls.filter(outcome="answered")
    assert answered.height == answered["call"].n_unique() == len(names), "every answered call is told once"
    by_the_first = set(answered.filter(run_id="first")["record"].fill_null("frame"))
    assert kept <= by_the_first, "others may have been committed with them"
    assert not repeated & by_the_first
    assert set(calls.filter(outcome="reused")["record"].fill_null("frame")) == by_the_first
    assert (answered["agent_version"].null_count(), answered["epoch"].unique().to_list()) == (0, [0])


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_killed_again_and_again_it_comes_to_its_end(tmp_path: Path, witness: Witness) -> None:
    # With the third answer those in flight beside it may have been committed: each run but the last has at most so many.
    root, count = str(tmp_path / "state"), 3 * (3 + AT_A_TIME) + 1
    enter(root, "async", count)
    for run in range(1, 4):
        assert ended(process(root, witness, "async", "first" if run == 1 else f"again{run}", "kept:3", tmp_path / f"notes{run}")) == -9
    assert ended(process(root, witness, "async", "last", "", tmp_path / "notes")) == 0
    kept = Counter(line for notes in tmp_path.glob("notes*") for line in notes.read_text().split())
    assert max(kept.values()) == 1
    assert witness.asked.total() <= count + 3 * AT_A_TIME
    answered = logged(StateStore(root)).filter(outcome="answered")
    assert Counter(answered["record"]) == Counter({f"i{n}": 1 for n in range(count)})
    assert answered["run_id"].n_unique() == 4
