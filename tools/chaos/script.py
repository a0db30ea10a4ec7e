"""What is to happen in one workflow of the chaos."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

Where = Literal["journal", "effect", "seal", "undo", "anywhere"]
When = Literal["before", "after"]
How = Literal["kill", "stop"]
_WHENS: tuple[When, ...] = ("before", "after")
_HOWS: tuple[How, ...] = ("kill", "stop")
AGENTS = ("inquiry", "reservation", "offer", "audit")
WITH_EFFECTS = AGENTS[:-1]


class Point(NamedTuple):
    """Where a process ends: before or after its n-th commit of the journal, effect at a bank, seal, or cancellation at a bank.

    "anywhere": `n` milliseconds after its run began. "stop": it sleeps until it is woken, when its run has long been given up.
    """

    where: Where
    when: When
    n: int
    how: How = "kill"

    def __str__(self) -> str:
        return f"{self.how} {self.n} ms after the start" if self.where == "anywhere" else f"{self.how} {self.when} {self.where} {self.n}"


@dataclass
class Script:
    """`runs` says where the processes of the first runs end, one after the other, `compensations` the same of those.

    `is_strict`: each of these points is there, and must be reached; chance may choose others. `fails` is the agent that fails, in the first
    attempt, at the last order; `undo_fails` the one whose compensation does, always. `again`: afterwards the workflow is run again;
    `amount` is what the first order is then about. `job` runs it, and `loses_worker`: the process above its steps is killed, not they.
    """

    workflow: str = ""
    fails: str | None = None
    undo_fails: str | None = None
    runs: list[Point] = field(default_factory=list)
    compensations: list[Point] = field(default_factory=list)
    again: bool = False
    is_strict: bool = True
    amount: int = 1000
    first_attempt: str | None = None
    job: str = "chaos_job"
    loses_worker: bool = False

    def write(self, folder: Path) -> None:
        file = folder / "scripts" / f"{self.workflow}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(".new")
        new.write_text(json.dumps(asdict(self)))
        new.rename(file)

    @classmethod
    def read(cls, folder: Path, workflow: str) -> Script:
        told = json.loads((folder / "scripts" / f"{workflow}.json").read_text())
        for name in ("runs", "compensations"):
            told[name] = [Point(*point) for point in told[name]]
        return cls(**told)

    def points(self) -> Iterator[tuple[str, Point]]:
        """All points, by the name under which the process that comes to it says so."""
        for kind, points in (("run", self.runs), ("compensation", self.compensations)):
            yield from ((f"{self.workflow}.{kind}{number}", point) for number, point in enumerate(points))

    def fail_if(self, agent: str, attempt: str, order: str | None) -> None:
        """Raises where the agent is to fail: in the first attempt, at the last of the orders."""
        last = order is None or order.endswith("-3")
        if self.fails == agent and last and self.first_attempt in (None, attempt):
            raise RuntimeError("told to fail")

    def fail_undo(self, agent: str) -> None:
        """Raises where the agent's compensation is to fail."""
        if self.undo_fails == agent:
            raise ConnectionError("told to fail")


def scripted() -> Iterator[Script]:
    """One workflow for each kind of end: each agent's failure, and a process that ends at each kind of point."""
    for agent in AGENTS:
        yield Script(fails=agent)
    for how in _HOWS:
        for when in _WHENS:
            for n in range(1, 13):
                yield Script(runs=[Point("journal", when, n, how)])
            for n in (1, 3, 5, 8, 12, 16):
                yield Script(runs=[Point("effect", when, n, how)])
            for n in (1, 2, 3, 4, 5):
                yield Script(runs=[Point("seal", when, n, how)])
    for when in _WHENS:
        for n in range(1, 19):
            yield Script(fails="audit", compensations=[Point("journal", when, n)])
        for n in (1, 4, 8, 12, 16):
            yield Script(fails="audit", compensations=[Point("undo", when, n)])
        for n in (1, 2):
            yield Script(fails="audit", compensations=[Point("seal", when, n)])
            yield Script(fails="offer", compensations=[Point("undo", when, 2), Point("journal", when, 4)])
        yield Script(fails="audit", compensations=[Point("undo", when, 6, "stop")])
        yield Script(fails="audit", compensations=[Point("journal", when, 5, "stop")])
    for agent in WITH_EFFECTS:
        yield Script(fails="audit", undo_fails=agent)
    yield Script()


def deployed() -> Iterator[Script]:
    """Workflows for a real daemon and code server: in one process, and with a process for each step."""
    yield Script(fails="audit")
    yield Script(runs=[Point("effect", "after", 6)])
    yield Script(runs=[Point("effect", "before", 10, "stop")])
    yield Script(runs=[Point("journal", "before", 7)])
    yield Script(runs=[Point("seal", "after", 3)])
    yield Script(fails="audit", compensations=[Point("undo", "after", 3)])
    yield Script(fails="offer", compensations=[Point("journal", "before", 6), Point("seal", "before", 1)])
    in_steps = "chaos_in_processes"
    yield Script(job=in_steps, fails="audit")
    yield Script(job=in_steps, runs=[Point("effect", "after", 2)])
    yield Script(job=in_steps, runs=[Point("effect", "before", 5, "stop")])
    yield Script(job=in_steps, runs=[Point("journal", "after", 3)])
    yield Script(job=in_steps, loses_worker=True)


def at_random(choose: random.Random) -> Script:
    """A workflow that may meet anything."""
    script = Script(is_strict=False)
    if choose.random() < 0.5:
        script.fails = choose.choice(AGENTS)
    if script.fails is None or choose.random() < 0.3:
        how: How = "stop" if choose.random() < 0.3 else "kill"
        if choose.random() < 0.5:
            script.runs = [Point("anywhere", "after", choose.randrange(1500), how)]
        else:
            where: Where = choose.choice(("journal", "effect", "seal"))
            script.runs = [Point(where, choose.choice(_WHENS), choose.randint(1, 14), how)]
    while len(script.compensations) < 3 and choose.random() < 0.3:  # after each, the next one waits longer
        where = choose.choice(("journal", "undo", "seal", "anywhere"))
        n = choose.randrange(800) if where == "anywhere" else choose.randint(1, 10)
        script.compensations.append(Point(where, choose.choice(_WHENS), n))
    if choose.random() < 0.05:
        script.undo_fails = choose.choice(WITH_EFFECTS)
    return script
