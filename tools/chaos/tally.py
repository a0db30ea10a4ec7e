"""What the banks say came of it, against what the state says should have."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dagster_mao.saga import SagaState, sagas
from dagster_mao.state import Seal, StateStore

BANKS = {"bank": ("inquiry", "offer"), "forgetful": ("reservation", "funds")}
_STANDING = """
SELECT e.kind, e.application_id, e.amount FROM ledger e
WHERE e.took_effect AND NOT EXISTS (SELECT 1 FROM cancellations c WHERE c.key = e.key AND c.took_effect)
"""
Standing = Counter[tuple[str, str, int]]


@dataclass
class Tally:
    """`doubles`: effects that stand more than once. `missing`: effects that do not stand though the state says so, and undoings of which

    the same is true (an effect that stands, and no completed attempt has it). `left`: those where an undo was told to fail.
    """

    workflows: int = 0
    completed: int = 0
    kills: int = 0
    zombies: int = 0
    compensated: int = 0
    incomplete: int = 0
    superseded: int = 0
    repeats: int = 0
    doubles: int = 0
    missing: int = 0
    left: int = 0
    wrong: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path, store: StateStore, pipeline: str = "chaos") -> Tally:
        tally, standing = cls(), Standing()
        for name in BANKS:
            if (folder / f"{name}.db").exists():
                standing.update(_standing(folder / f"{name}.db"))
                tally.repeats += _repeats(folder / f"{name}.db")
        points = [file.read_text() for file in (folder / "ended").iterdir()]
        tally.zombies = sum(point.startswith("stop") for point in points)
        tally.kills = len(points) - tally.zombies
        of: dict[str, list[SagaState]] = {}
        for saga in sagas(store, pipeline):
            of.setdefault(saga.workflow_id, []).append(saga)
            tally.compensated += saga.state == "compensated" and not saga.superseded_by
            tally.superseded += saga.state == "compensated" and bool(saga.superseded_by)
        for script in sorted((folder / "scripts").glob("*.json")):
            tally.workflows += 1
            workflow = f"{pipeline}/{script.stem}"
            effective = store.effective(workflow)
            tally.completed += bool(effective)
            expected = Standing(_expected(store, effective)) if effective else Standing()
            own = Standing({one: count for one, count in standing.items() if one[1].rpartition("-")[0] == script.stem})
            incomplete = any(saga.state == "incomplete" for saga in of.get(workflow, ()))
            tally.incomplete += incomplete
            tally._compare(workflow, expected, own, incomplete)
        return tally

    def _compare(self, workflow: str, expected: Standing, own: Standing, incomplete: bool) -> None:
        for one in expected.keys() | own.keys():
            should, does = expected[one], own[one]
            doubled, missing, undone = max(0, does - max(should, 1)), max(0, should - does), max(0, min(does, 1) - should)
            self.doubles += doubled
            if incomplete and undone:
                self.left += undone
                undone = 0
            self.missing += missing + undone
            if doubled or missing or undone:
                self.wrong.append(f"{workflow}: {one} should stand {should} times, and does {does} times")


def _standing(file: Path) -> Iterator[tuple[str, str, int]]:
    with sqlite3.connect(file) as ledger:
        yield from ledger.execute(_STANDING)


def _repeats(file: Path) -> int:
    with sqlite3.connect(file) as ledger:
        (count,) = ledger.execute("SELECT count(*) FROM ledger WHERE NOT took_effect").fetchone()
        return int(count)


def _expected(store: StateStore, effective: Mapping[str, Seal]) -> Iterator[tuple[str, str, int]]:
    kinds = {"inquiry": ["inquiry"], "reservation": ["reservation"], "offer": ["funds", "offer"]}
    for agent, effects in ((agent, effects) for agent, effects in kinds.items() if agent in effective):
        for row in store.read(effective[agent]).collect().iter_rows(named=True):
            for kind in effects:
                yield kind, row["order_id"], row["amount"]
