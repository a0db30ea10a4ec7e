"""One run of a subscriber: one agent over many workflows, each a version of its own."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

from dagster_mao.agent import Agent
from dagster_mao.boundary import Outcome, run_agent
from dagster_mao.choreography._batches import BatchTakenError, Hold
from dagster_mao.choreography._deliveries import Claims, Delivery
from dagster_mao.choreography._due import Brief, Standing, Subscriber, standing
from dagster_mao.choreography._tables import shared
from dagster_mao.errors import BreakerOpenError, FencedError, MaoError, StaleStateError, StoreError
from dagster_mao.pipeline import Pipeline
from dagster_mao.state import Seal, StateStore

_TOGETHER = 50  # workflows whose seals are read at a time
_FRESH = 1.0  # seconds after which they are read again: it may have been sealed meanwhile
_PAUSE = 30.0  # seconds until what a store that is down kept from being done is delivered again


@dataclass(frozen=True)
class Delivered:
    """What became of one workflow in a run.

    `state`: "done" (it has an `outcome`), "failed" (by `error`; None where it was the death of several runs), "duplicate" (it had been done
    before, and nothing was), "void" (it is nobody's to do any more: fenced or superseded), "later" (by `error` it could not be done now,
    and it is delivered again).
    """

    workflow_id: str
    state: Literal["done", "failed", "duplicate", "void", "later"]
    outcome: Outcome | None = None
    error: MaoError | None = None


def run_batch(
    store: StateStore,
    pipeline: Pipeline,
    agent: str,
    run_key: str,
    *,
    run_id: str,
    resources: Mapping[str, Any] | None = None,
    config_digest: str = "",
    policies: Mapping[str, Mapping[str, Any]] | None = None,
    fresh: bool = False,
    log: logging.Logger | None = None,
) -> Iterator[Delivered]:
    """Runs an agent over the workflows of a batch; tells of each when it is through. To be read to its end.

    Each workflow is judged by the log just before it is begun, sealed for itself, and fails for itself. After an error that all of them
    would meet (an open breaker, a store that is down) what is left is delivered again later.

    Raises `BatchTakenError` when there is nothing to do for this run, `StoreError` when the database is down. Killed at any point, or
    stopped and woken up late, it has sealed nothing twice, and what it leaves undone is delivered again.
    """
    subscriber = Subscriber.of(pipeline, agent)
    options = {"resources": resources, "config_digest": config_digest, "policies": policies, "fresh": fresh, "log": log}
    with Hold(shared(store), run_key, run_id) as hold:
        claims = Claims(shared(store), hold, pipeline.node(agent).micro_batch or pipeline.micro_batch)
        said = {name: value for name, value in options.items() if value}
        work = _Work(store, subscriber, pipeline.node(agent), claims, run_id, said)
        waiting = claims.open()
        try:
            while waiting:
                told = work.one(waiting[0], work.seen(waiting))
                del waiting[0]
                if told.state == "later" and not isinstance(told.error, (StaleStateError, FencedError)):
                    for rest in waiting:
                        claims.again(rest, type(told.error).__name__, after=_pause(told.error))
                    waiting = []
                yield told
            claims.tell(last=True)
        except BaseException:
            with suppress(StoreError, BatchTakenError):
                claims.tell()
            raise


class _Work:
    """What a run does, one workflow after the other."""

    def __init__(
        self, store: StateStore, subscriber: Subscriber, agent: Agent, claims: Claims, run_id: str, options: Mapping[str, Any]
    ) -> None:
        self._store, self._subscriber, self._agent, self._claims = store, subscriber, agent, claims
        self._run_id, self._options = run_id, options
        self._read: dict[str, list[Seal]] = {}
        self._read_at = 0.0

    def seen(self, waiting: Sequence[Delivery]) -> list[Seal]:
        """The seals of the first one's workflow, as they are now or were a moment ago."""
        if waiting[0].workflow_id not in self._read or time.monotonic() > self._read_at + _FRESH:
            self._read_at = time.monotonic()
            self._read = self._store.seals_of(one.workflow_id for one in waiting[:_TOGETHER])
        return self._read.pop(waiting[0].workflow_id)

    def one(self, delivery: Delivery, seen: list[Seal]) -> Delivered:
        stands = self._standing(delivery, seen)
        if (settled := self._settled(delivery, stands)) is not None:
            return settled
        if not self._claims.begin(delivery):
            return Delivered(delivery.workflow_id, "failed")
        due = stands.due
        assert due is not None
        try:
            plan = self._plan(due.attempt, seen)
            attempt = self._store.join_attempt(seen, attempt=due.attempt, reads=due.versions, run_id=self._run_id, plan=plan)
            outcome = run_agent(self._store, self._agent, attempt, partition_key=attempt.workflow_key, **self._options)
        except (StoreError, BreakerOpenError) as error:
            # Whoever is waiting with it is delivered before it, lest it is what the store cannot take.
            self._claims.again(delivery, type(error).__name__, after=4 * _pause(error), tries=delivery.tries)
            return Delivered(delivery.workflow_id, "later", error=error)
        except (StaleStateError, FencedError) as error:
            # Somebody sealed something meanwhile: this very work, or what makes it void, or something else.
            stands = self._standing(delivery, self._store.seals(delivery.workflow_id))
            if (settled := self._settled(delivery, stands)) is not None:
                return replace(settled, error=error)
            self._claims.again(delivery, type(error).__name__, after=0)
            return Delivered(delivery.workflow_id, "later", error=error)
        except MaoError as error:
            is_over = self._claims.failed(delivery, type(error).__name__)
            return Delivered(delivery.workflow_id, "failed" if is_over else "later", error=error)
        self._claims.say(delivery, "done", error=None)
        return Delivered(delivery.workflow_id, "done", outcome)

    def _plan(self, attempt: str, seen: Sequence[Seal]) -> tuple[str, ...]:
        """What the attempt is complete with, as its entry says it; its own, for one that the entry does not count on."""
        plan = next((seal.plan for seal in seen if seal.kind == "entry" and seal.attempt == attempt), ())
        return plan if self._subscriber.agent in plan else self._subscriber.plan

    def _standing(self, delivery: Delivery, seen: Sequence[Seal]) -> Standing:
        return standing(delivery.workflow_id, [Brief.of(seal) for seal in seen], self._subscriber)

    def _settled(self, delivery: Delivery, stands: Standing) -> Delivered | None:
        """What has become of it, where there is nothing to do any more."""
        if delivery.parents in stands.done:
            self._claims.refused(delivery)
            return Delivered(delivery.workflow_id, "duplicate")
        if stands.due is None or stands.due.digest != delivery.parents:
            self._claims.say(delivery, "void")
            return Delivered(delivery.workflow_id, "void")
        return None


def _pause(error: BaseException | None) -> float:
    after = getattr(error, "retry_after", None)
    return _PAUSE if after is None else float(after)
