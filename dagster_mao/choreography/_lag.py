"""How subscribers stand: what is due and for how long, what waits for whom, what was given up, and who looks no more."""

from __future__ import annotations

import datetime as dt
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import polars as pl
import sqlalchemy as sa

from dagster_mao.choreography._deliveries import MOST_DEATHS
from dagster_mao.choreography._due import Standing, Subscriber, history, standings, subscribers
from dagster_mao.choreography._tables import BATCHES, DELIVERIES, INBOX, JOINS, SUBSCRIBERS, shared
from dagster_mao.pipeline import Pipeline
from dagster_mao.state import StateStore

STUCK_AFTER = 300.0  # seconds
_INTERVALS, _AT_LEAST = 3, 30.0  # without a look, and seconds: then it counts as dead


@dataclass(frozen=True)
class Stuck:
    """A join that does not come about: of what an agent reads in a workflow, `missing` is not sealed, and other is, `since` then."""

    workflow_id: str
    missing: tuple[str, ...]
    since: dt.datetime
    why: str


@dataclass(frozen=True)
class SubscriberState:
    """How one subscriber stands; for an inbox, as the entry that it feeds, counted in events.

    `due`: versions that it is to react to, `in_flight` ones included, for `oldest` seconds. `failed`: given up until they are delivered
    again, by the class of the error in `errors`. `refused`: what came to it and had been done. `joining`: workflows of which it has some
    of what it reads and not all; `stuck` are those that wait for what has failed, or for too long. `beat`: when it last looked, meaning to
    look again `every` so many seconds; `is_dead` when it has not for three times that.

    `is_elsewhere`: of an agent of another code location that attempts are complete with. Where it has looked, all this is as it noted it
    then; where it never has, due is each workflow that all agents here have sealed, and it has not. What is stuck for it, its own location
    says.
    """

    pipeline: str
    agent: str
    due: int = 0
    oldest: float | None = None
    in_flight: int = 0
    failed: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    refused: int = 0
    joining: int = 0
    stuck: tuple[Stuck, ...] = ()
    beat: dt.datetime | None = None
    every: float | None = None
    is_dead: bool = False
    is_elsewhere: bool = False

    @property
    def is_healthy(self) -> bool:
        """Whether it is alive, and nothing is stuck. What is due shows in its lag, and what failed has been told."""
        return not self.is_dead and not self.stuck

    def as_metadata(self) -> dict[str, Any]:
        """All of it as plain values, for JSON and for metadata."""
        told = {**asdict(self), "is_healthy": self.is_healthy}
        told["beat"] = self.beat.isoformat() if self.beat else None
        told["stuck"] = [{**asdict(one), "missing": list(one.missing), "since": one.since.isoformat()} for one in self.stuck]
        return told


def lag(store: StateStore, pipeline: Pipeline, *, stuck_after: float = STUCK_AFTER) -> list[SubscriberState]:
    """How each subscriber of a pipeline stands, in topological order, after its inbox, if it has one, and before agents `elsewhere`.

    By what its last look noted, and what was sealed since; by the whole log only where it has never looked, or its notes are lost.
    `stuck_after`: for how many seconds a join may wait for what is under way. Changes nothing. Raises `StoreError`.
    """
    noted = _Noted.of(store, pipeline)
    stood = _stood(store, noted)
    states = [_state(one.agent, stood[one.agent], noted, pipeline.name, stuck_after) for one in noted.who]
    states = [replace(one, stuck=tuple(_stuck(stood[one.agent], stood, noted, stuck_after))) for one in states]
    states += [_of_elsewhere(store, pipeline, agent, noted, stuck_after) for agent in pipeline.elsewhere]
    return [*([_of_inbox(pipeline, noted, stuck_after)] if pipeline.inbox is not None else []), *states]


class _Open(NamedTuple):
    """What a subscriber has open with a workflow. `state`: waiting, claimed, failed (by `error`), or joining (`missing`)."""

    state: str
    since: float
    parents: str = ""
    error: str | None = None
    missing: tuple[str, ...] = ()


class _Looked(NamedTuple):
    beat: float
    every: float | None
    cursor: str


class _Waiting(NamedTuple):
    """An inbox: events that are not sealed, since when, how many of them a batch has, and in batches that killed run after run."""

    events: int = 0
    since: float | None = None
    cut: int = 0
    hopeless: int = 0


@dataclass(frozen=True)
class _Noted:
    """What the database says: by agent and workflow what was open at its last look, and what became of it since."""

    now: float
    who: tuple[Subscriber, ...]
    open: Mapping[str, Mapping[str, _Open]]
    refused: Mapping[str, int]
    looked: Mapping[str, _Looked]
    waiting: _Waiting

    @classmethod
    def of(cls, store: StateStore, pipeline: Pipeline) -> _Noted:
        database, who = shared(store), subscribers(pipeline)
        if not database.holds(SUBSCRIBERS):  # nobody has looked yet
            return cls(dt.datetime.now(dt.timezone.utc).timestamp(), who, {}, {}, {}, _Waiting())
        counted = sa.select(DELIVERIES.c.agent, sa.func.sum(DELIVERIES.c.refused)).where(DELIVERIES.c.pipeline == pipeline.name)
        told = SUBSCRIBERS.c
        looked = sa.select(told.agent, told.beat, told.every, told.cursor).where(told.pipeline == pipeline.name)
        with database.reading() as connection:
            return cls(
                database.now(connection),
                who,
                _noted(connection, pipeline.name),
                {agent: int(count) for agent, count in connection.execute(counted.group_by(DELIVERIES.c.agent)).all()},
                {agent: _Looked(*row) for agent, *row in connection.execute(looked)},
                _inbox(connection, pipeline),
            )

    def life(self, agent: str, oldest: float | None, stuck_after: float) -> dict[str, Any]:
        """When it looked, and whether it is dead: one that never has is so once something has been due for long."""
        looked = self.looked.get(agent)
        if looked is None:
            return {"is_dead": (oldest or 0.0) > stuck_after}
        silent = self.now - looked.beat
        is_dead = looked.every is not None and silent > max(_INTERVALS * looked.every, _AT_LEAST)
        return {"beat": dt.datetime.fromtimestamp(looked.beat, dt.timezone.utc), "every": looked.every, "is_dead": is_dead}


def _noted(connection: sa.Connection, pipeline: str) -> dict[str, dict[str, _Open]]:
    found: dict[str, dict[str, _Open]] = {}
    joins = sa.select(JOINS.c.agent, JOINS.c.workflow_id, JOINS.c.since, JOINS.c.missing).where(JOINS.c.pipeline == pipeline)
    for agent, workflow, since, missing in connection.execute(joins):
        found.setdefault(agent, {})[workflow] = _Open("joining", since, missing=tuple(json.loads(missing)))
    told = DELIVERIES.c
    wanted = sa.select(told.agent, told.workflow_id, told.state, told.since, told.parents, told.error)
    wanted = wanted.where(told.pipeline == pipeline, told.state.in_(["waiting", "claimed", "failed"]))
    for agent, workflow, state, since, parents, error in connection.execute(wanted.order_by(told.id)):
        found.setdefault(agent, {})[workflow] = _Open(state, since, parents, error)
    return found


def _inbox(connection: sa.Connection, pipeline: Pipeline) -> _Waiting:
    if pipeline.inbox is None:
        return _Waiting()
    mine = (INBOX.c.pipeline == pipeline.name) & INBOX.c.is_open.is_(True)
    told = sa.select(sa.func.count(), sa.func.min(INBOX.c.at), sa.func.count(INBOX.c.batch)).where(mine)
    deadly = sa.select(sa.func.count()).where(mine, INBOX.c.batch == BATCHES.c.id, BATCHES.c.generation >= MOST_DEATHS)
    events, since, cut = connection.execute(told).one()
    return _Waiting(events, since, cut, connection.scalar(deadly) or 0)


def _of_inbox(pipeline: Pipeline, noted: _Noted, stuck_after: float) -> SubscriberState:
    waiting = noted.waiting
    oldest = None if waiting.since is None else max(0.0, noted.now - waiting.since)
    life = noted.life(pipeline.entry_name, oldest, stuck_after)
    return SubscriberState(
        pipeline.name, pipeline.entry_name, due=waiting.events, oldest=oldest, in_flight=waiting.cut, failed=waiting.hopeless, **life
    )


# -- by the log ----------------------------------------------------------------------------------------------------------------------


def _stood(store: StateStore, noted: _Noted) -> dict[str, dict[str, _Open]]:
    """By agent and workflow what is open now: as noted, unless the log has something newer."""
    stood, read = dict[str, dict[str, _Open]](), dict[str, pl.DataFrame]()
    for one in noted.who:
        cursor = noted.looked[one.agent].cursor if one.agent in noted.looked else ""
        if cursor not in read:
            read[cursor], _ = store.sealed_since(cursor, one.pipeline)
        newer = standings(history(store, one, read[cursor], whole=not cursor), one)
        before = noted.open.get(one.agent, {})
        found = {name: told for name, told in before.items() if name not in newer and cursor}
        for name, standing in newer.items():
            if (told := _of_standing(standing, before.get(name))) is not None:
                found[name] = told
        stood[one.agent] = found
    return stood


def _of_standing(standing: Standing, before: _Open | None) -> _Open | None:
    if standing.due is not None:
        is_noted = before is not None and before.parents == standing.due.digest
        return before if is_noted else _Open("waiting", standing.due.since.timestamp())
    if standing.missing and standing.since is not None:
        return _Open("joining", standing.since.timestamp(), missing=standing.missing)
    return None


def _state(agent: str, mine: Mapping[str, _Open], noted: _Noted, pipeline: str, stuck_after: float) -> SubscriberState:
    states = Counter(one.state for one in mine.values())
    errors = Counter(one.error or "?" for one in mine.values() if one.state == "failed")
    due = [one for one in mine.values() if one.state in ("waiting", "claimed")]
    oldest = max((max(0.0, noted.now - one.since) for one in due), default=None)
    return SubscriberState(
        pipeline,
        agent,
        due=len(due),
        oldest=oldest,
        in_flight=states["claimed"],
        failed=states["failed"],
        errors=dict(sorted(errors.items())),
        refused=noted.refused.get(agent, 0),
        joining=states["joining"],
        **noted.life(agent, oldest, stuck_after),
    )


def _of_elsewhere(store: StateStore, pipeline: Pipeline, agent: str, noted: _Noted, stuck_after: float) -> SubscriberState:
    mine = noted.open.get(agent, {}) if agent in noted.looked else _awaited(store, pipeline, agent)
    return replace(_state(agent, mine, noted, pipeline.name, stuck_after), is_elsewhere=True)


def _awaited(store: StateStore, pipeline: Pipeline, agent: str) -> dict[str, _Open]:
    """The workflows that lack nothing of the agents here, and something of an agent of which only the name is known."""
    rows = store.sealed(pipeline.name)
    here = standings(rows, Subscriber(pipeline.name, "", pipeline.order, ()))
    there = standings(rows, Subscriber(pipeline.name, "", (agent,), ()))
    due = {name: one.due for name, one in here.items() if one.due is not None and there[name].due is None}
    return {name: _Open("waiting", one.since.timestamp()) for name, one in due.items()}


def _stuck(mine: Mapping[str, _Open], stood: Mapping[str, Mapping[str, _Open]], noted: _Noted, stuck_after: float) -> Iterable[Stuck]:
    for name, one in sorted(mine.items()):
        causes = [_cause(agent, name, stood) for agent in one.missing]
        if causes and (any(failed for failed, _ in causes) or noted.now - one.since > stuck_after):
            since = dt.datetime.fromtimestamp(one.since, dt.timezone.utc)
            yield Stuck(name, one.missing, since, "; ".join(dict.fromkeys(why for _, why in causes)))


def _cause(agent: str, workflow: str, stood: Mapping[str, Mapping[str, _Open]]) -> tuple[bool, str]:
    """Whether what is missing has failed, or waits for what has; and what is the matter with it."""
    if agent not in stood:
        return False, f"{agent} is sealed elsewhere, and was not"
    one = stood[agent].get(workflow)
    if one is None:
        return False, f"{agent} has nothing to read"
    if one.state != "joining":
        told = {"waiting": "is due", "claimed": "is in flight"}.get(one.state, f"failed ({one.error})")
        return one.state == "failed", f"{agent} {told}"
    below = [_cause(upstream, workflow, stood) for upstream in one.missing]
    return any(failed for failed, _ in below), "; ".join(why for _, why in below)
