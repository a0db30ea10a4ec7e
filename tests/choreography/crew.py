"""Drainers, of logs and of inboxes, in processes of their own, which can be killed at scripted points; and the naive ways of draining.

    python -m tests.choreography.crew '{"folder": ..., "way": "ours", "kill": "sealed", "nth": 2}'

A launcher of runs is part of it, as a scheduler is: it starts one run per key, notes who it was, and tells of those that died.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import sqlalchemy as sa

import dagster_mao as mao
from dagster_mao.boundary import run_agent
from dagster_mao.choreography import (
    BatchTakenError,
    _batches,
    _deliveries,
    _inbox,
    _run,
    abandon,
    cut,
    due,
    run_batch,
    run_inbox,
    subscribers,
    tick,
)
from dagster_mao.choreography._deliveries import Claims
from dagster_mao.choreography._tables import INBOX, shared
from dagster_mao.errors import StaleStateError
from dagster_mao.pipeline import Pipeline
from dagster_mao.state import StateStore
from tests.choreography.loans import Ledger, kill_myself, loans

EAGER = mao.MicroBatch(size=3, wait=0)
POINTS = ("looked", "noted", "claimed", "launched", "taken", "begun", "executing", "sealed", "told", "ended")


def start(folder: Path, way: str = "ours", *, kill: str | None = None, nth: int = 1, **options: Any) -> subprocess.Popen[bytes]:
    said = json.dumps({"folder": str(folder), "way": way, "kill": kill, "nth": nth, **options})
    return subprocess.Popen([sys.executable, "-m", "tests.choreography.crew", said])


def store_in(folder: Path, database: str | None = None) -> StateStore:
    return StateStore(folder / "state", database=database)


# -- ways of draining ----------------------------------------------------------------------------------------------------------------


def ours(folder: Path, store: StateStore, pipeline: Pipeline) -> None:
    """Until nothing is due, all runs that died included."""
    deadline = time.monotonic() + 240
    while any(due(store, pipeline, one.agent) for one in subscribers(pipeline)):
        assert time.monotonic() < deadline, "it does not come to an end"
        for subscriber in subscribers(pipeline):
            tell_of_the_dead(folder, store)
            for batch in tick(store, pipeline, subscriber.agent):
                launch(folder, store, pipeline, subscriber.agent, batch.run_key)


def launch(folder: Path, store: StateStore, pipeline: Pipeline, agent: str, key: str) -> None:
    """One run per key, in this process."""
    with suppress(BatchTakenError):
        if (run_id := launched(folder, key)) is not None:
            list(run_batch(store, pipeline, agent, key, run_id=run_id, resources={"ledger": Ledger(folder)}))


def launched(folder: Path, key: str) -> str | None:
    """The id of the run, where this process is the first to start one under the key."""
    runs = folder / "runs"
    runs.mkdir(exist_ok=True)
    (mine := runs / f".{os.getpid()}").write_text(str(os.getpid()))
    try:
        os.link(mine, runs / key)
    except FileExistsError:
        return None
    at("launched")
    return f"run-{os.getpid()}-{key}"


def inbox(folder: Path, store: StateStore, pipeline: Pipeline) -> None:
    """Takes events in, until those who write say that they are done, and nothing is left."""
    deadline = time.monotonic() + 240
    while is_left(folder, store):
        assert time.monotonic() < deadline, "it does not come to an end"
        tell_of_the_dead(folder, store)
        for batch in cut(store, pipeline):
            with suppress(BatchTakenError):
                if (run_id := launched(folder, batch.run_key)) is not None:
                    run_inbox(store, pipeline, batch.run_key, run_id=run_id)


def blind(folder: Path, store: StateStore, pipeline: Pipeline) -> None:
    """Naive: seals what it is handed, without looking whether somebody has."""
    _inbox.Intake.look = _inbox.Intake.require_unsealed = lambda *_: None  # type: ignore[method-assign,assignment]
    inbox(folder, store, pipeline)


def hasty(folder: Path, store: StateStore, pipeline: Pipeline) -> None:
    """Naive: what is taken out of the inbox is gone from it."""
    records = _inbox.Intake.records.fget
    assert records is not None

    def gone(intake: _inbox.Intake) -> Any:
        taken = records(intake)
        with intake._shared.transaction() as connection:
            connection.execute(sa.update(INBOX).where(intake._mine).values(is_open=False))
        at("gone")
        return taken

    _inbox.Intake.records = property(gone)  # type: ignore[method-assign,assignment]
    inbox(folder, store, pipeline)


def is_left(folder: Path, store: StateStore) -> bool:
    if not (folder / "written").exists():
        return True
    with shared(store).reading() as connection:
        return bool(connection.scalar(sa.select(sa.func.count()).where(INBOX.c.is_open)))


def tell_of_the_dead(folder: Path, store: StateStore) -> None:
    for run in (folder / "runs").glob("[0-9]*"):
        if not Path(f"/proc/{run.read_text()}").exists():
            abandon(shared(store), run.name)


def newest(folder: Path, store: StateStore, pipeline: Pipeline) -> None:
    """Naive: reacts to the newest event. It looks as often as there are events to be seen."""
    for _ in range(10):
        for subscriber in subscribers(pipeline):
            rows = store.sealed(pipeline.name).filter(_pl().col("agent").is_in(subscriber.upstreams)).sort("sealed_at")
            if rows.height:
                run_due(folder, store, pipeline, subscriber.agent, only=rows["workflow_id"][-1])


def unclaimed(folder: Path, store: StateStore, pipeline: Pipeline) -> None:
    """Naive: does what is due, as if it were alone. The seal still has one winner."""
    while sum(run_due(folder, store, pipeline, one.agent) for one in subscribers(pipeline)):
        pass


def unrecovered(folder: Path, store: StateStore, pipeline: Pipeline) -> None:
    """Naive: whoever claims first does it, and nobody else ever does."""
    while sum(run_due(folder, store, pipeline, one.agent, claim=True) for one in subscribers(pipeline)):
        pass


def run_due(folder: Path, store: StateStore, pipeline: Pipeline, agent: str, *, only: str | None = None, claim: bool = False) -> bool:
    done = False
    for one in due(store, pipeline, agent):
        if only not in (None, one.workflow_id):
            continue
        if claim:
            try:
                (folder / f"claim-{agent}-{one.digest}").open("x").close()
            except FileExistsError:
                continue
            at("claimed")
        attempt = store.join_attempt(
            store.seals(one.workflow_id), attempt=one.attempt, reads=one.versions, run_id=f"run-{os.getpid()}", plan=[agent]
        )
        with suppress(StaleStateError):
            run_agent(store, pipeline.node(agent), attempt, resources={"ledger": Ledger(folder)})
        done = True
    return done


def _pl() -> Any:
    import polars

    return polars


WAYS: dict[str, Callable[[Path, StateStore, Pipeline], None]] = {
    "ours": ours,
    "newest": newest,
    "unclaimed": unclaimed,
    "unrecovered": unrecovered,
    "inbox": inbox,
    "blind": blind,
    "hasty": hasty,
}

# -- scripted deaths -----------------------------------------------------------------------------------------------------------------

_kill: dict[str, int] = {}


def at(point: str) -> None:
    """Dies the n-th time that it comes here."""
    if point in _kill:
        _kill[point] -= 1
        if not _kill[point]:
            kill_myself()


def _after(owner: Any, name: str, point: str) -> None:
    original = getattr(owner, name)

    def followed(*given: Any, **options: Any) -> Any:
        result = original(*given, **options)
        at(point)
        return result

    setattr(owner, name, followed)


def script(point: str, nth: int) -> None:
    _kill[point] = nth
    _after(_deliveries, "standings", "looked")  # read, and nothing noted
    _after(_deliveries, "look", "noted")  # and nothing claimed
    _after(_deliveries, "handed_out", "claimed")  # and nothing launched
    _after(_batches.Hold, "__enter__", "taken")
    _after(_inbox, "_entered", "entered")  # sealed, and the batch is not closed
    _after(Claims, "begin", "begun")
    _after(Ledger, "note", "executing")
    _after(_run, "run_agent", "sealed")  # and nothing noted of it
    _after(Claims, "say", "told")  # and not written yet
    _after(Claims, "tell", "ended")


def main() -> None:
    told = json.loads(sys.argv[1])
    folder = Path(told["folder"])
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if told["kill"]:
        script(told["kill"], told["nth"])
    store, pipeline = store_in(folder, told.get("database")), loans(micro_batch=EAGER, inbox=EAGER)
    if "crowd" in told:
        (folder / f"ready-{os.getpid()}").touch()
        deadline = time.monotonic() + 120
        while len(list(folder.glob("ready-*"))) < told["crowd"]:
            assert time.monotonic() < deadline, "the others did not come"
            time.sleep(0.01)
    WAYS[told["way"]](folder, store, pipeline)


if __name__ == "__main__":
    main()
