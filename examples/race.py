"""The war story: a cache between two agents makes a fifth of the ratings wrong; pinned versions make none wrong.

    python examples/race.py              # or `make race`

Part one replays one seeded schedule three ways. The credit-score agent writes a new score, and the risk agent rates by what it reads half a
second later. Naively, it reads a shared cache whose invalidation came late or got lost; or it reads "the latest" from the store while
another run is writing; or it reads what its own attempt sealed. Part two lets processes seal the same and different workflows as fast as
they can, kills some of them with SIGKILL, and counts versions that were lost, doubled, skipped or torn.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Annotated, Literal

import polars as pl
from pydantic import BaseModel, Field

import dagster_mao as mao
from dagster_mao.boundary import run_agent
from dagster_mao.state import Attempt, Provenance, StateStore, staged

READ_AFTER_MS = 500
UNRELIABLE = 0.2  # share of invalidations that come after the read, or never
_STALE, _FRESH = 680, 750  # the scores of the article; the threshold lies between them
_THRESHOLD = 700


class Applicant(BaseModel):
    applicant_id: Annotated[str, mao.Key]
    bureau_score: int = Field(ge=300, le=850)


class CreditScore(BaseModel):
    applicant_id: Annotated[str, mao.Key]
    score: int = Field(ge=300, le=850)


class Rating(BaseModel):
    applicant_id: Annotated[str, mao.Key]
    rating: Literal["low", "high"]


@mao.agent
def credit_score(applicants: mao.LazyFrame[Applicant]) -> mao.LazyFrame[CreditScore]:
    return applicants.select("applicant_id", score="bureau_score")


@mao.agent
def risk_rating(credit_score: mao.LazyFrame[CreditScore]) -> mao.LazyFrame[Rating]:
    return credit_score.select("applicant_id", rating=pl.when(pl.col("score") >= _THRESHOLD).then(pl.lit("low")).otherwise(pl.lit("high")))


PIPELINE = mao.Pipeline("race", entry=mao.ExternalEntry("applicants", contract=Applicant), agents=[credit_score, risk_rating])


def invalidation_lags(applicants: int, seed: int) -> list[float]:
    """For each applicant, milliseconds from the write to the cache's invalidation; infinite where the message is lost."""
    chance = random.Random(seed)
    return [
        (chance.uniform(READ_AFTER_MS, 5_000) if chance.random() < 0.5 else float("inf"))
        if chance.random() < UNRELIABLE
        else chance.uniform(1, READ_AFTER_MS)
        for _ in range(applicants)
    ]


def wrong_with_a_cache(lags: list[float]) -> float:
    """Share of wrong ratings when the risk agent reads through the cache."""
    read = [_FRESH if lag < READ_AFTER_MS else _STALE for lag in lags]
    return sum(score < _THRESHOLD for score in read) / len(lags)


def wrong_through_the_store(store: StateStore, lags: list[float], *, latest: bool = False, workflows: int = 10) -> float:
    """Share of wrong ratings through the project's own store and agents, on the same schedule.

    The applicants whose invalidation would have been late are those for whom another run (with the old scores) gets in between the
    write and the read. With `latest` the risk agent is handed the newest score that anybody sealed, as unpinned code would.
    """
    wrong = 0
    batches = [lags[n::workflows] for n in range(workflows)]
    for number, batch in enumerate(batches):
        late = sum(lag >= READ_AFTER_MS for lag in batch)
        for part, size in (("late", late), ("in-time", len(batch) - late)):
            wrong += _rate(store, f"{number}-{part}", size, overtaken=part == "late", latest=latest)
    return wrong / len(lags)


def _rate(store: StateStore, workflow: str, applicants: int, *, overtaken: bool, latest: bool) -> int:
    ours, other = uuid.uuid4().hex, uuid.uuid4().hex
    _scored(store, workflow, ours, _FRESH, applicants)
    if overtaken:
        _scored(store, workflow, other, _STALE, applicants)
    attempt = _join(store, workflow, ours)
    if latest:
        newest = [seal for seal in store.seals(attempt.workflow_id) if seal.agent == "credit_score"][-1]
        return store.read(newest).filter(pl.col("score") < _THRESHOLD).collect().height
    sealed = run_agent(store, risk_rating, attempt).seal
    return store.read(sealed).filter(pl.col("rating") == "high").collect().height


def _join(store: StateStore, workflow: str, run: str) -> Attempt:
    return store.open_attempt(
        pipeline="race", attempt=run, run_id=run, plan=PIPELINE.order, entry=PIPELINE.entry_name, workflow_key=workflow
    )


def _scored(store: StateStore, workflow: str, run: str, score: int, applicants: int) -> None:
    entry = pl.DataFrame(
        {"applicant_id": [str(n) for n in range(applicants)], "bureau_score": [score] * applicants},
        schema={"applicant_id": pl.String, "bureau_score": pl.Int64},
    )
    run_agent(store, PIPELINE.entry, _join(store, workflow, run), records=entry)
    run_agent(store, credit_score, _join(store, workflow, run))


# -- part two ------------------------------------------------------------------------------------------------------------------------

_AGENTS = ("alpha", "beta", "gamma")
_PROVENANCE = Provenance(
    contract="Any",
    contract_version="1",
    contract_hash="",
    contract_schema="{}",
    key=None,
    agent_version="1",
    config="",
    model=None,
    seed=0,
    latency_seconds=0.0,
    library_version="",
)


def write_seals(root: str, options: dict[str, str], acknowledged: str, tries: int, workflows: int, seed: int) -> None:
    """One writer: seals at random, and notes, durably, each seal that was acknowledged to it."""
    store, chance = StateStore(root, options), random.Random(seed)
    with Path(acknowledged).open("a") as notes:
        for n in range(tries):
            key, agent, run = f"hot-{chance.randrange(workflows)}", chance.choice(_AGENTS), uuid.uuid4().hex
            try:
                attempt = store.open_attempt(pipeline="storm", attempt=run, run_id=run, plan=[agent], entry=agent, workflow_key=key)
                with staged(store.objects, pl.DataFrame({"n": [n], "writer": [seed]})) as batch:
                    sealed, _ = attempt.seal(agent, batch, row_count=1, schema=_SCHEMA, parents=[], provenance=_PROVENANCE)
                notes.write(json.dumps({"workflow": sealed.workflow_id, "version": sealed.version, "digest": sealed.seal_digest}) + "\n")
            except mao.StaleStateError:
                notes.write('{"refused": 1}\n')
            notes.flush()
            os.fsync(notes.fileno())


_SCHEMA = pl.Schema({"n": pl.Int64, "writer": pl.Int64})


def storm(
    root: str,
    *,
    options: dict[str, str] | None = None,
    processes: int = 8,
    tries: int = 50,
    workflows: int = 4,
    kills: int = 4,
    seed: int = 0,
) -> Counter[str]:
    """Lets writers race, kills some, replaces them, and counts what became of every try. `lost`, `doubled`, `skipped`, `torn` must be 0."""
    spawn, chance = multiprocessing.get_context("spawn"), random.Random(seed)
    notes = Path(tempfile.mkdtemp(prefix="race-"))
    started = 0

    def start() -> multiprocessing.process.BaseProcess:
        nonlocal started
        started += 1
        process = spawn.Process(
            target=write_seals, args=(root, options or {}, str(notes / str(started)), tries, workflows, seed * 1000 + started)
        )
        process.start()
        return process

    writers = [start() for _ in range(processes)]
    killed = 0
    while any(writer.is_alive() for writer in writers):
        # A kill falls where it falls: between any two instructions of a writer that has begun to seal.
        busy = [n for n, writer in enumerate(writers) if writer.is_alive() and (notes / str(n + 1)).exists()]
        if killed < kills and busy and _acknowledged(notes)["tried"] > (killed + 1) * processes:
            victim = writers[chance.choice(busy)]
            os.kill(victim.pid or 0, signal.SIGKILL)
            victim.join()
            writers.append(start())
            killed += 1
        else:
            writers[-1].join(timeout=0.05)
    return _acknowledged(notes) + Counter(killed=killed) + _judge(StateStore(root, options), notes)


def _notes(folder: Path) -> list[dict[str, object]]:
    lines = [line for file in folder.iterdir() for line in file.read_text().splitlines()]
    return [json.loads(line) for line in lines if line.endswith("}")]


def _acknowledged(folder: Path) -> Counter[str]:
    notes = _notes(folder)
    refused = sum("refused" in note for note in notes)
    return Counter(tried=len(notes), refused=refused, acknowledged=len(notes) - refused)


def _judge(store: StateStore, folder: Path) -> Counter[str]:
    rows = store.log().select("workflow_id", "version", "seal_digest").collect()
    there = {(row["workflow_id"], row["version"]): row["seal_digest"] for row in rows.iter_rows(named=True)}
    found = Counter(sealed=len(rows), doubled=len(rows) - len(there), lost=0, skipped=0, torn=0)
    for note in _notes(folder):
        if "refused" not in note and there.get((note["workflow"], note["version"])) != note["digest"]:
            found["lost"] += 1
    for workflow in store.workflows():
        seals = store.seals(workflow)
        found["skipped"] += [seal.version for seal in seals] != list(range(len(seals)))
        found["torn"] += [seal.previous_digest for seal in seals] != ["", *(seal.seal_digest for seal in seals[:-1])]
        for seal in seals:
            try:
                store.read(seal).collect()
            except mao.MaoError:
                found["torn"] += 1
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--applicants", type=int, default=1_000)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--tries", type=int, default=250, help="seals that each process tries")
    parser.add_argument("--kills", type=int, default=8)
    options = parser.parse_args()
    lags = invalidation_lags(options.applicants, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        print(f"The cached-score race: {options.applicants:,} applicants, seed {options.seed}, read {READ_AFTER_MS} ms after the write")
        print(f"  shared cache, late or lost invalidation   {wrong_with_a_cache(lags):6.1%} wrong ratings")
        latest = wrong_through_the_store(StateStore(f"{folder}/latest"), lags, latest=True)
        print(f"  the store, but reading the latest version {latest:6.1%} wrong ratings")
        pinned = wrong_through_the_store(StateStore(f"{folder}/pinned"), lags)
        print(f"  the store, reading what is pinned         {pinned:6.1%} wrong ratings")
        print(f"Lost updates: {options.processes} processes, {options.tries} seals each, {options.kills} killed with SIGKILL")
        begun = time.monotonic()
        found = storm(f"{folder}/storm", processes=options.processes, tries=options.tries, kills=options.kills, seed=options.seed)
        for name in ("tried", "acknowledged", "refused", "sealed", "killed", "lost", "doubled", "skipped", "torn"):
            print(f"  {name:<13}{found[name]:>7,}")
        print(f"  in {time.monotonic() - begun:.0f} s")
    return int(pinned > 0 or any(found[name] for name in ("lost", "doubled", "skipped", "torn")))


if __name__ == "__main__":
    sys.exit(main())
