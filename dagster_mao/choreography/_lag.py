"""How subscribers stand: what is due and for how long, what waits for whom, what was given up, and who looks no more."""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import sqlalchemy as sa

from dagster_mao.choreography._deliveries import MOST_DEATHS
from dagster_mao.choreography._due import Brief, Standing, Subscriber, by_workflow, standing, subscribers
from dagster_mao.choreography._tables import BATCHES, DELIVERIES, INBOX, SUBSCRIBERS, shared
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
    """How each subscriber of a pipeline stands, in topological order, after its inbox, if it has one.

    By the state log; of what is not sealed, the database says what is in flight and what failed. `stuck_after`: for how many seconds a
    join may wait for what is under way. Reads the whole log of the pipeline, changes nothing. Raises `StoreError`.
    """
    noted = _Noted.of(store, pipeline)
    workflows = by_workflow(store.sealed(pipeline.name)) if noted.who else {}
    stood = {one.agent: _standings(workflows, one) for one in noted.who}
    states = [_state(one, stood, noted, stuck_after) for one in noted.who]
    return [*([_of_inbox(pipeline, noted, stuck_after)] if pipeline.inbox is not None else []), *states]


class _Delivered(NamedTuple):
    state: str
    error: str | None


class _Looked(NamedTuple):
    beat: float
    every: float | None


class _Waiting(NamedTuple):
    """An inbox: events that are not sealed, since when, how many of them a batch has, and in batches that killed run after run."""

    events: int = 0
    since: float | None = None
    cut: int = 0
    hopeless: int = 0


@dataclass(frozen=True)
class _Noted:
    """What the database says: of deliveries only those that are in flight or failed."""

    now: float
    who: tuple[Subscriber, ...]
    deliveries: Mapping[tuple[str, str, str], _Delivered]
    refused: Mapping[str, int]
    looked: Mapping[str, _Looked]
    waiting: _Waiting

    @classmethod
    def of(cls, store: StateStore, pipeline: Pipeline) -> _Noted:
        database, who = shared(store), subscribers(pipeline)
        if not database.holds(SUBSCRIBERS):  # nobody has looked yet
            return cls(dt.datetime.now(dt.timezone.utc).timestamp(), who, {}, {}, {}, _Waiting())
        mine = DELIVERIES.c.pipeline == pipeline.name
        told = DELIVERIES.c
        wanted = sa.select(told.agent, told.workflow_id, told.parents, told.state, told.error)
        refused = sa.select(DELIVERIES.c.agent, sa.func.sum(DELIVERIES.c.refused)).where(mine).group_by(DELIVERIES.c.agent)
        looked = sa.select(SUBSCRIBERS.c.agent, SUBSCRIBERS.c.beat, SUBSCRIBERS.c.every).where(SUBSCRIBERS.c.pipeline == pipeline.name)
        with database.reading() as connection:
            rows = connection.execute(wanted.where(mine, DELIVERIES.c.state.in_(["claimed", "failed"]))).all()
            return cls(
                database.now(connection),
                who,
                {(row.agent, row.workflow_id, row.parents): _Delivered(row.state, row.error) for row in rows},
                {agent: int(count) for agent, count in connection.execute(refused).all()},
                {row.agent: _Looked(row.beat, row.every) for row in connection.execute(looked)},
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


def _standings(workflows: Mapping[str, Sequence[Brief]], subscriber: Subscriber) -> dict[str, Standing]:
    """Where it has something to do, or to wait for."""
    stood = ((name, standing(name, seals, subscriber)) for name, seals in workflows.items())
    return {name: one for name, one in stood if one.due is not None or one.missing}


def _state(subscriber: Subscriber, stood: Mapping[str, Mapping[str, Standing]], noted: _Noted, stuck_after: float) -> SubscriberState:
    agent, mine = subscriber.agent, stood[subscriber.agent]
    told = {name: noted.deliveries.get((agent, name, one.due.digest)) for name, one in mine.items() if one.due is not None}
    errors = Counter(one.error or "?" for one in told.values() if one is not None and one.state == "failed")
    due = [mine[name].due for name, one in told.items() if one is None or one.state != "failed"]
    oldest = max((max(0.0, noted.now - one.since.timestamp()) for one in due if one is not None), default=None)
    joining = {name: one for name, one in mine.items() if one.missing}
    return SubscriberState(
        subscriber.pipeline,
        agent,
        due=len(due),
        oldest=oldest,
        in_flight=sum(one is not None and one.state == "claimed" for one in told.values()),
        failed=errors.total(),
        errors=dict(sorted(errors.items())),
        refused=noted.refused.get(agent, 0),
        joining=len(joining),
        stuck=tuple(_stuck(joining, stood, noted, stuck_after)),
        **noted.life(agent, oldest, stuck_after),
    )


def _stuck(
    joining: Mapping[str, Standing], stood: Mapping[str, Mapping[str, Standing]], noted: _Noted, stuck_after: float
) -> Iterable[Stuck]:
    for name, one in sorted(joining.items()):
        causes = [_cause(agent, name, stood, noted) for agent in one.missing]
        assert one.since is not None
        if any(failed for failed, _ in causes) or noted.now - one.since.timestamp() > stuck_after:
            yield Stuck(name, one.missing, one.since, "; ".join(dict.fromkeys(why for _, why in causes)))


def _cause(agent: str, workflow: str, stood: Mapping[str, Mapping[str, Standing]], noted: _Noted) -> tuple[bool, str]:
    """Whether what is missing has failed, or waits for what has; and what is the matter with it."""
    if agent not in stood:
        return False, f"{agent} is sealed elsewhere, and was not"
    one = stood[agent].get(workflow, Standing())
    if one.due is not None:
        told = noted.deliveries.get((agent, workflow, one.due.digest))
        if told is None:
            return False, f"{agent} is due"
        return told.state == "failed", f"{agent} failed ({told.error})" if told.state == "failed" else f"{agent} is in flight"
    below = [_cause(upstream, workflow, stood, noted) for upstream in one.missing]
    if not below:
        return False, f"{agent} has nothing to read"
    return any(failed for failed, _ in below), "; ".join(why for _, why in below)
