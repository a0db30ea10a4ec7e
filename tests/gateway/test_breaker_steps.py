"""The breaker's laws in the steps of a real Dagster run, and what pybreaker does there by itself. See `eight_steps`."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from dagster_mao.gateway._breaker import LOOK_EVERY
from tests.gateway.eight_steps import DECLARED, STEPS

pytestmark = pytest.mark.slow
Law = Callable[["Side"], None]
NAIVE = ("plain", "merely shared")


class Side:
    """The called side, for one kind of breaker: it fails at first, and answers later.

    The first calls of all steps run at the same time. When all steps were refused, and time has passed, the first call that is made
    has its answer only when each other step has made one as well, or was refused three times meanwhile; or, where they wait for it
    (`is_waited_for`), when all have come, and some looks later.
    """

    def __init__(self, is_waited_for: bool) -> None:
        self._is_waited_for = is_waited_for
        self._coming = set[str]()
        self.calls = Counter[str]()
        self.openings = 0
        self.probes = 0  # calls of the second kind, made before the first of them had its answer
        self._refusals = Counter[str]()
        self._prober = ""
        self._is_answered = False
        self._begun, self._refused = threading.Barrier(STEPS), threading.Barrier(STEPS)
        self._changed = threading.Condition()

    def hear(self, what: str, step: str) -> int:
        return {
            "failing": self._fails,
            "refused": self._lets_time_pass,
            "coming": self._comes,
            "probing": self._answers,
            "refused-again": self._refuses,
            "opened": self._opened,
        }[what](step)

    def _fails(self, step: str) -> int:
        with self._changed:
            self.calls[step] += 1
            is_first = self.calls[step] == 1
        if is_first:
            self._begun.wait(120)
        return 500

    def _lets_time_pass(self, _: str) -> int:
        self._refused.wait(120)
        time.sleep(DECLARED.reset_timeout * 1.1)  # nothing else ends a reset timeout
        return 200

    def _comes(self, step: str) -> int:
        with self._changed:
            self._coming.add(step)
            self._changed.notify_all()
        return 200

    def _answers(self, step: str) -> int:
        with self._changed:
            if not self._is_answered:
                self.probes += 1
                self._prober = self._prober or step
                self._changed.notify_all()
                if self._is_waited_for:
                    self._changed.wait_for(lambda: len(self._coming) == STEPS, 120)
                self._changed.wait_for(self._all_others_came, 8 * LOOK_EVERY if self._is_waited_for else 120)
                self._is_answered = True
                self._changed.notify_all()
        return 200

    def _all_others_came(self) -> bool:
        return self._is_answered or self.probes + sum(times >= 3 for times in self._refusals.values()) >= STEPS

    def _refuses(self, step: str) -> int:
        with self._changed:
            if self._prober:
                self._refusals[step] += 1
                self._changed.notify_all()
        return 200

    def _opened(self, _: str) -> int:
        with self._changed:
            self.openings += 1
        return 200


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Side]:
    """What the witness saw of a run with our breakers."""
    with seen_by(tmp_path_factory.mktemp("eight_steps"), "ours") as sides:
        yield sides["ours"]


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Side]]:
    """The same of a run with each naive kind."""
    with seen_by(tmp_path_factory.mktemp("eight_steps"), *NAIVE) as sides:
        yield sides


@contextmanager
def seen_by(folder: Path, *kinds: str) -> Iterator[dict[str, Side]]:
    seen = {kind.replace(" ", "_"): Side(kind == "ours") for kind in kinds}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            kind, what, step = self.path.strip("/").split("/")
            self.send_response(seen[kind].hear(what, step))
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = "import sys; from tests.gateway.eight_steps import main; main(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), f"http://127.0.0.1:{server.server_port}", *kinds],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    yield seen
    server.shutdown()


def opens_once(side: Side) -> None:
    assert side.openings == 1


def makes_few_calls(side: Side) -> None:
    """Those that open it, and of each other step the one that was running, or was begun before it looked again."""
    assert DECLARED.fail_max <= side.calls.total() <= DECLARED.fail_max + STEPS - 1


def admits_one_probe(side: Side) -> None:
    assert side.probes == 1


@pytest.mark.parametrize("law", [opens_once, makes_few_calls, admits_one_probe])
def test_over_eight_steps(side: Side, law: Law) -> None:
    law(side)


# The naive kinds break the same laws over eight processes in test_breaker_processes, in seconds; here they take two Dagster runs more.


@pytest.mark.long
def test_what_pybreaker_does_in_eight_steps(sides: dict[str, Side]) -> None:
    """Each step has a breaker of its own."""
    side = sides["plain"]
    assert (side.openings, side.calls.total(), side.probes) == (STEPS, STEPS * DECLARED.fail_max, STEPS)


@pytest.mark.long
def test_what_pybreaker_with_a_shared_storage_does_in_eight_steps(sides: dict[str, Side]) -> None:
    """Each failure from the fifth on opens it again, and half-open it lets everybody through."""
    side = sides["merely_shared"]
    assert side.openings > STEPS - DECLARED.fail_max
    assert side.probes == STEPS


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "law"),
    [
        ("plain", opens_once),
        ("plain", makes_few_calls),
        ("plain", admits_one_probe),
        ("merely_shared", opens_once),
        ("merely_shared", admits_one_probe),
    ],
)
def test_naive_breakers_break_the_laws(sides: dict[str, Side], kind: str, law: Law) -> None:
    with pytest.raises(AssertionError):
        law(sides[kind])
