"""What the banks say came of it, against what the state says should have."""

from __future__ import annotations

import json
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from dagster_mao.saga import SagaState, sagas
from dagster_mao.state import Seal, StateStore
from tools.chaos.script import Script

LATENCIES = "seconds.json"
BANKS = {"bank": ("inquiry", "offer"), "forgetful": ("reservation", "funds")}
_STANDING = """
SELECT e.kind, e.application_id, e.amount FROM ledger e
WHERE e.took_effect AND NOT EXISTS (SELECT 1 FROM cancellations c WHERE c.key = e.key AND c.took_effect)
"""
Standing = Counter[tuple[str, str, int]]


@dataclass
class Tally:
    """`doubles`: effects that stand more than once. `missing`: effects that do not stand though the state says so, and undoings of which

    the same is true (an effect that stands, and no completed attempt has it). `left`: those where an undo was told to fail. `incomplete`
    are workflows with something left, `expected` those that were told to. `kills` counts processes, by what they were; `unreached` are the
    scripted points that no process ended at.
    """

    workflows: int = 0
    completed: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    unreached: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # from the end of a run to the start of its compensation
    compensated: int = 0
    expected: int = 0
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
        tally.kills.update(file.read_text().partition(":")[0] for file in (folder / "killed").iterdir())
        tally.seconds = json.loads((folder / LATENCIES).read_text()) if (folder / LATENCIES).exists() else []
        of: dict[str, list[SagaState]] = {}
        for saga in sagas(store, pipeline):
            of.setdefault(saga.workflow_id, []).append(saga)
            tally.compensated += saga.state == "compensated" and not saga.superseded_by
            tally.superseded += saga.state == "compensated" and bool(saga.superseded_by)
        for file in sorted((folder / "scripts").glob("*.json")):
            script = Script.read(folder, file.stem)
            tally.workflows += 1
            tally.expected += script.undo_fails is not None
            if script.is_strict:
                points = [(name, str(point)) for name, point in script.points()]
                points += [(f"{file.stem}.worker", "kill")] if script.loses_worker else []
                tally.unreached += [f"{name}: {point}" for name, point in points if not (folder / "killed" / name).exists()]
            workflow = f"{pipeline}/{file.stem}"
            effective = store.effective(workflow)
            tally.completed += bool(effective)
            expected = Standing(_expected(store, effective)) if effective else Standing()
            own = Standing({one: count for one, count in standing.items() if one[1].rpartition("-")[0] == file.stem})
            incomplete = sum(saga.state == "incomplete" for saga in of.get(workflow, ()))
            tally.incomplete += bool(incomplete)
            if incomplete and script.undo_fails is None:
                tally.wrong.append(f"{workflow}: something is left, and no undo was told to fail")
            tally._compare(workflow, expected, own, incomplete)
        return tally

    def __add__(self, other: Tally) -> Tally:
        return Tally(**{one.name: getattr(self, one.name) + getattr(other, one.name) for one in fields(self)})

    @property
    def good(self) -> bool:
        """Nothing is doubled or missing, something is left only where an undo was told to fail, and each scripted point was met."""
        return not (self.wrong or self.unreached)

    def _compare(self, workflow: str, expected: Standing, own: Standing, incomplete: int) -> None:
        """`incomplete`: of so many attempts something may stand which was to be undone, beside what a later one has had anew."""
        for one in expected.keys() | own.keys():
            should, does = expected[one], own[one]
            left = max(0, min(does - should, incomplete))
            missing, surplus = max(0, should - does), does - left - should
            doubled, undone = (surplus, 0) if should else (max(0, surplus - 1), min(max(surplus, 0), 1))
            self.left += left
            self.doubles += max(0, doubled)
            self.missing += missing + undone
            if missing or surplus > 0:
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
