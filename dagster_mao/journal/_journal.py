"""The journal: what steps are about to do and have done, and who undoes it; in the shared store.

All that is written about one workflow is written in turn: under SQLite's write lock, or an advisory lock of PostgreSQL. So a step that
announces something has been fenced by then or has not, and whoever fences it sees all that it had announced.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import sqlalchemy as sa

from dagster_mao.errors import FencedError
from dagster_mao.gateway._shared import SharedStore
from dagster_mao.journal._pages import Earlier, Page, Segment
from dagster_mao.journal._step import Identity, Step
from dagster_mao.journal._tables import PAGES, SAGAS, STEPS

_READ_PAGES = 200  # at a time


class Journal:
    """The journal in a shared store. It can be pickled, and used by threads."""

    def __init__(self, shared: SharedStore) -> None:
        self._shared = shared

    def __reduce__(self) -> Any:
        return (Journal, (self._shared,))

    def now(self) -> float:
        """The database's time, in seconds since the epoch."""
        with self._shared.reading() as connection:
            return self._shared.now(connection)

    @contextmanager
    def writing(self, workflow_id: str, *, durable: bool = True) -> Iterator[tuple[sa.Connection, float]]:
        """A transaction, while nobody else writes about the workflow; with the database's time. Raises `StoreError`."""
        with self._shared.transaction(durable=durable) as connection:
            if self._shared.file is None:
                lock = int.from_bytes(hashlib.sha256(workflow_id.encode("utf-8", "surrogatepass")).digest()[:8], "big", signed=True)
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(lock)))
            yield connection, self._shared.now(connection)

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        with self._shared.reading() as connection:
            yield connection

    # -- steps -----------------------------------------------------------------------------------------------------------------------

    def open(
        self,
        *,
        pipeline: str,
        workflow_id: str,
        epoch: int,
        attempt: str,
        run_id: str,
        agent: str,
        parents: Sequence[Mapping[str, Any]],
        seconds: float | None,
        personal: bool,
    ) -> Step:
        """Notes, durably, that a step is about to run. Raises `FencedError` when its attempt is compensated, or was."""
        with self.writing(workflow_id) as (connection, now):
            for saga in connection.execute(sa.select(SAGAS).where(SAGAS.c.workflow_id == workflow_id, SAGAS.c.superseded_by == "")):
                ended = saga.ended_epoch is not None and epoch <= saga.ended_epoch
                if saga.fenced is not None and saga.state != "void" and (saga.attempt == attempt or ended):
                    refuse(agent, workflow_id, own=saga.attempt == attempt)
            row = {
                **{"pipeline": pipeline, "workflow_id": workflow_id, "epoch": epoch, "attempt": attempt, "run_id": run_id, "agent": agent},
                **{"parents": json.dumps([dict(parent) for parent in parents]), "personal": personal, "seconds": seconds},
                **{"state": "running", "started": now, "undone_to": 0},
                **dict.fromkeys(("fenced", "late", "settled"), False),
            }
            of_agent = (STEPS.c.workflow_id == workflow_id) & (STEPS.c.epoch == epoch) & (STEPS.c.agent == agent)
            earlier = list(connection.scalars(sa.select(STEPS.c.id).where(of_agent).order_by(STEPS.c.id)))
            step = connection.scalar(sa.insert(STEPS).values(**row).returning(STEPS.c.id))
        assert step is not None
        known = Earlier(earlier)
        if earlier:
            self.refresh(known)
        return Step(self, Identity(step, workflow_id, epoch, agent, personal, seconds), known)

    def write(
        self, step: Identity, page: Page, told: Page, earlier: Earlier, *, durable: bool, state: str | None = None, alone: bool = False
    ) -> bool:
        """Commits what a step announces (`page`) and what has happened (`told`); whether it was fenced before.

        Then what it announces is not written. `earlier` is read on. `alone`: from another process of the step.
        """
        with self.writing(step.workflow_id, durable=durable) as (connection, now):
            row = connection.execute(sa.select(STEPS.c.fenced, STEPS.c.undone_to).where(STEPS.c.id == step.id)).one()
            if not row.fenced:
                entries = [*page.entries, *told.entries]
                told = Page([*page.segments, *told.segments], page.cover, entries, told.closed)
            if told:
                items = {entry.item for entry in told.entries} if alone and not told.segments else set()
                keys, body = told.encode()
                values = {"step": step.id, "keys": keys, "body": body, "at": now, "item": items.pop() if len(items) == 1 else None}
                connection.execute(sa.insert(PAGES).values(**values))
            if row.fenced and row.undone_to and told.entries:
                connection.execute(sa.update(STEPS).where(STEPS.c.id == step.id).values(late=True))
            if state is not None and not row.fenced:
                connection.execute(sa.update(STEPS).where(STEPS.c.id == step.id).values(state=state))
            if page.segments and earlier.steps and not row.fenced:
                self._read_on(connection, earlier)
        return bool(row.fenced)

    def refresh(self, earlier: Earlier, *, call: tuple[int, bytes] | None = None) -> None:
        """Reads on; only what other processes of a step told of one call (its number and key), where one is given."""
        with self._shared.reading() as connection:
            if call is None:
                self._read_on(connection, earlier)
                return
            (step,), (number, key) = earlier.steps, call
            earlier.add(step, 0, Page(segments=[Segment(number, [None], [key])]))
            pages = sa.select(PAGES).where(PAGES.c.step == step, PAGES.c.item == number).order_by(PAGES.c.id)
            for row in connection.execute(pages).all():
                earlier.add(step, row.id, Page.decode(row.keys, row.body))

    def _read_on(self, connection: sa.Connection, earlier: Earlier) -> None:
        for number, step, page in pages(connection, earlier.steps, after=earlier.last):
            earlier.add(step, number, page)

    def is_fenced(self, step: int) -> bool:
        with self._shared.reading() as connection:
            return bool(connection.scalar(sa.select(STEPS.c.fenced).where(STEPS.c.id == step)))

    def ended(self, step: int, state: str, *, version: int | None = None, error: str | None = None) -> None:
        """Notes how a step ended: "sealed", or "failed"."""
        with self._shared.transaction(durable=False) as connection:
            values = {"state": state, "version": version, "error": error, "ended": self._shared.now(connection)}
            connection.execute(sa.update(STEPS).where(STEPS.c.id == step).values(**values))


def pages(connection: sa.Connection, steps: Collection[int], *, after: int = 0) -> Iterator[tuple[int, int, Page]]:
    """The pages of these steps in order: number, step, page."""
    while True:
        query = sa.select(PAGES).where(PAGES.c.step.in_(steps), PAGES.c.id > after).order_by(PAGES.c.id).limit(_READ_PAGES)
        rows = connection.execute(query).all()
        for row in rows:
            yield row.id, row.step, Page.decode(row.keys, row.body)
        if len(rows) < _READ_PAGES:
            return
        after = rows[-1].id


def refuse(agent: str | None, workflow_id: str, *, own: bool) -> NoReturn:
    """What a step is told that comes too late."""
    if own:
        raise FencedError(
            "This attempt is being compensated, or was",
            agent=agent,
            workflow=workflow_id,
            fix="start a new run instead of re-executing this one; `dagster-mao compensate --status` tells how far it is",
        )
    raise FencedError(
        "The workflow was fenced after this step pinned: another attempt at it is being compensated",
        agent=agent,
        workflow=workflow_id,
        fix="run again",
    )
