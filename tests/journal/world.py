"""A pipeline whose agents act on a bank, run step by step as a boundary would, without one: journal, effects, seals. For all rooms' tests.

applications -> inquiry (an effect per record) -> approval (two effects per record)
             -> rating (reads only)           ->
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import polars as pl
from pydantic import BaseModel

import dagster_mao as mao
from dagster_mao.agent._effects import Undo
from dagster_mao.gateway import idempotency_key, shared_store
from dagster_mao.journal import Chunk, Journal
from dagster_mao.state import Attempt, Provenance, Seal, StateStore, staged
from tests.journal.bank import Bank

Amounts = Mapping[str, int]


class Application(BaseModel):
    id: Annotated[str, mao.Key]
    amount: int


@mao.agent
def applications() -> list[Application]:
    raise NotImplementedError


class Inquiry(mao.Agent):
    """Asks about each record."""

    def execute(self, applications: Application) -> Application:
        raise NotImplementedError

    def compensate(self, undo: Undo, *, bank: Bank) -> None:
        cancel(undo, bank)


class Rating(mao.Agent):
    """Reads only."""

    def execute(self, applications: Application) -> Application:
        raise NotImplementedError


class Approval(mao.Agent):
    """Reserves funds, and drafts an offer."""

    def execute(self, inquiry: Application, rating: Application) -> Application:
        raise NotImplementedError

    def compensate(self, undo: Undo, *, bank: Bank) -> None:
        cancel(undo, bank)


EFFECTS = {"inquiry": ("inquiry",), "approval": ("funds", "offer")}
PIPELINE = mao.Pipeline("loans", entry=applications, agents=[Inquiry, Rating, Approval])
DAY = "loans/day"


def cancel(undo: Undo, bank: Bank) -> None:
    for effect in undo.effects:
        bank.cancel(effect.key, undo.epoch)


class World:
    """One store and one bank. It can be sent to other processes."""

    def __init__(self, root: Path | str, bank: Bank, database: str | None = None) -> None:
        self.root, self.bank, self.database = str(root), bank, database
        self.store = StateStore(self.root, database=database)

    def __reduce__(self) -> Any:
        return (World, (self.root, self.bank, self.database))

    @property
    def journal(self) -> Journal:
        assert self.store.database is not None
        return Journal(shared_store(self.store.database))

    def join(self, attempt: str, run: str | None = None) -> Attempt:
        run = run or attempt
        return self.store.open_attempt(
            pipeline="loans",
            attempt=attempt,
            run_id=run,
            lineage=(run, attempt),
            plan=PIPELINE.order,
            entry="applications",
            workflow_key="day",
        )

    def enter(self, attempt: str, amounts: Amounts) -> Seal:
        """Seals the entry."""
        return seal(self.store, self.join(attempt), "applications", amounts, ())

    def step(self, attempt: str, agent: str, *, run: str | None = None, seconds: float | None = None, act: Act | None = None) -> Seal:
        """One agent's step: its effects, then its seal."""
        joined = self.join(attempt, run)
        parents = [joined.pin(read.upstream) for read in PIPELINE.inputs_of(agent)]
        amounts = read(self.store, parents[0])
        if agent not in EFFECTS:
            return seal(self.store, joined, agent, amounts, parents)
        step = self.journal.open(
            pipeline="loans",
            workflow_id=joined.workflow_id,
            epoch=joined.epoch,
            attempt=joined.id,
            run_id=joined.run_id,
            agent=agent,
            parents=[parent.as_parent.model_dump() for parent in parents],
            seconds=seconds,
            personal=False,
        )
        try:
            key = {r: idempotency_key(joined.workflow_id, joined.epoch, agent, r, str(amount)) for r, amount in amounts.items()}
            calls = Chunk(step, list(key.items()))
            for place, record in enumerate(amounts):
                calls.announce(place)
                with calls.call(place) as calling:
                    (act or act_of(agent))(calling.begun(), record, self.bank)
            calls.close()
            step.executed()
            sealed = seal(self.store, joined, agent, amounts, parents)
            step.sealed(sealed.version)
        except BaseException as error:
            step.failed(error)
            raise
        return sealed

    def attempt(self, name: str, amounts: Amounts, *, agents: Sequence[str] = ("inquiry", "rating", "approval"), **acts: Act) -> None:
        """A whole attempt, or one that stops after some agents."""
        self.enter(name, amounts)
        for agent in agents:
            self.step(name, agent, act=acts.get(agent))


Act = Callable[[Any, str, Bank], None]


def act_of(agent: str, *, before: Callable[[], object] = lambda: None, after: Callable[[], object] = lambda: None) -> Act:
    """The agent's effects on one record, with something that happens before or after each, inside of it."""

    def act(effects: Any, record: str, bank: Bank) -> None:
        for kind in EFFECTS[agent]:

            def do(effect: Any, kind: str = kind) -> str:
                before()
                done = bank.do(effect.key, kind, effect.record, effect.epoch)
                after()
                return done

            effects.effect(kind, do, compares_epoch=bank.compares_epoch)

    return act


def expected(amounts: Amounts) -> dict[tuple[str, str], int]:
    """What stands at the bank after a completed attempt."""
    return {(kind, record): 1 for kinds in EFFECTS.values() for kind in kinds for record in amounts}


PROVENANCE = Provenance(
    contract="Application",
    contract_version="1",
    contract_hash="0" * 64,
    contract_schema="{}",
    key="id",
    agent_version="1",
    config="",
    model=None,
    seed=1,
    latency_seconds=0.0,
    library_version="0",
)


def seal(store: StateStore, attempt: Attempt, agent: str, amounts: Amounts, parents: Sequence[Seal]) -> Seal:
    frame = pl.DataFrame({"id": list(amounts), "amount": list(amounts.values())}, schema={"id": pl.String, "amount": pl.Int64})
    with staged(store.objects, frame) as batch:
        sealed, _ = attempt.seal(
            agent,
            batch,
            row_count=frame.height,
            schema=frame.schema,
            parents=[parent.as_parent for parent in parents],
            provenance=PROVENANCE.model_copy(update={"contract_schema": _described()}),
        )
    return sealed


def _described() -> str:
    import json

    return json.dumps(PIPELINE.output_of("applications").describe(), sort_keys=True)


def read(store: StateStore, sealed: Seal) -> dict[str, int]:
    rows = store.read(sealed).collect()
    return dict(zip(rows["id"], rows["amount"], strict=True))
