"""What an agent declares and is told: shapes, inputs, the consent to a quarantine, the context."""

from __future__ import annotations

import datetime as dt
import logging
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from dagster_mao.agent._effects import Effects, Unjournaled
from dagster_mao.contract import Contract
from dagster_mao.correlation import Whose, WorkflowLog
from dagster_mao.errors import WiringError
from dagster_mao.journal import Effect

NAME = re.compile(r"[a-z][a-z0-9_]*")


class Shape(str, Enum):
    """How a parameter or an output holds records: one by one, or a whole batch as a frame."""

    RECORD = "record"
    LAZYFRAME = "lazyframe"
    DATAFRAME = "dataframe"


@dataclass(frozen=True)
class Input:
    """One upstream that an agent reads: under which parameter, under which contract, in which shape.

    `required` is False for `Fraud | None`: a record that the upstream does not have arrives as None (record-wise) or has fewer rows
    (frame-wise).
    """

    parameter: str
    upstream: str
    contract: Contract[Any]
    shape: Shape
    required: bool


@dataclass(frozen=True)
class Quarantine:
    """Consent to go on without the records that break a contract: they go, with their reasons, to the sibling asset `<agent>_quarantine`.

    `max_share` (0 to 1) is the share of the records that came in which may be quarantined; past it the batch fails after all.
    """

    max_share: float = 0.1

    def __post_init__(self) -> None:
        if isinstance(self.max_share, bool) or not isinstance(self.max_share, (int, float)) or not 0 <= self.max_share <= 1:
            raise WiringError(f"`max_share` is {self.max_share!r}", field="quarantine", fix="a share from 0 to 1")


@dataclass(frozen=True)
class AgentContext:
    """What an agent may know about where it runs. Time and randomness come from here and are recorded in the seal.

    `now` (aware, UTC) is the same for all agents of an attempt; `seed` is that of the attempt. Lines written to `log` begin with workflow,
    agent and attempt. Values of records are yours to keep out of it.

    Of the call at hand: `record` is the key of its record, as text (None where it is about a whole batch, or a record without a key);
    `idempotency_key` (sha256, hex) is the same whenever this agent is called with these inputs, in whatever attempt, until the workflow is
    fenced. Hand it to whoever must not do the same thing twice.
    """

    workflow_id: str
    agent: str
    attempt: str
    run_id: str
    now: dt.datetime
    seed: int
    partition_key: str | None = None
    log: logging.Logger | WorkflowLog = field(default_factory=lambda: logging.getLogger("dagster_mao"), compare=False)
    record: str | None = None
    idempotency_key: str = ""
    having: Effects | None = field(default=None, compare=False, repr=False)  # what stands behind `effect`; None in unit tests

    def effect(self, name: str, function: Callable[[Effect], Any], *, compares_epoch: bool = False) -> Any:
        """Has one effect on the world outside: calls `function` with the `Effect`, and returns what it returned, as JSON gives it back.

        That it is about to happen is on disk before, and what became of it is told afterwards, so that the agent's `compensate` finds it in
        `undo.effects`, whatever dies. Hand `effect.key` to the target: the same effect has the same key, in whatever attempt. One that is
        known to be done is not had again: its result is returned. If the function is async, await this. A name may come several times in
        one call, always in the same order.

        Of what the function raises, `NotDoneError` says that nothing happened; after anything else nobody knows, and it will be undone.
        `compares_epoch`: the target is handed `effect.epoch` too, and refuses what comes late itself, so that an undo need not wait for
        it. Raises `FencedError` when the attempt is being compensated, `WiringError` in a read-only agent.
        """
        return self._having().effect(name, function, compares_epoch=compares_epoch)

    def effects(
        self,
        name: str,
        function: Callable[..., Any],
        records: Any,
        *,
        key: str | None = None,
        compares_epoch: bool = False,
        in_batches_of: int | None = None,
    ) -> Any:
        """Has one effect per record of a frame, or of an iterable of dicts or models; the results by record. For agents that take frames.

        As `effect`, many at a time: 100 000 cost some tens of commits. `key` is the column that tells records apart, `effect.row` a
        record's row; a row that has not changed keeps its key, whatever else is in the batch. With `in_batches_of` the function is
        called with lists of so many effects, and returns their results in order.
        """
        having = self._having()
        return having.effects(name, function, records, key=key, compares_epoch=compares_epoch, in_batches_of=in_batches_of)

    def _having(self) -> Effects:
        if self.having is None:
            self.__dict__["having"] = Unjournaled(self.idempotency_key, self.record)
        return self.having  # type: ignore[return-value]

    def begun(self) -> AgentContext:
        """The same for a new try of the call."""
        told = object.__new__(AgentContext)
        told.__dict__.update(self.__dict__, having=self._having().begun())
        return told

    def of_call(self, record: str | None, idempotency_key: str, having: Effects | None = None) -> AgentContext:
        """The same for one call. `having`: how it has effects."""
        told = object.__new__(AgentContext)  # dataclasses.replace takes twenty times as long, and this is done for every record
        told.__dict__.update(self.__dict__, record=record, idempotency_key=idempotency_key)
        if having is not None:
            told.__dict__["having"] = having
        return told

    def random(self, *salt: object) -> random.Random:
        """A generator seeded by `seed`, and by `salt` when given: record-wise agents pass the record's key, else all records draw alike."""
        return random.Random("/".join(str(part) for part in (self.seed, *salt)) if salt else self.seed)

    def __reduce__(self) -> Any:
        # Another process logs for itself: Dagster's logger belongs to its step.
        told = {name: value for name, value in vars(self).items() if name != "log"}
        return (_context, (told,))

    @classmethod
    def for_tests(cls, agent: str = "agent", **changes: Any) -> AgentContext:
        """A context with fixed values (2000-01-01 UTC, seed 0) for calling an agent directly in a unit test."""
        values: dict[str, Any] = {
            "workflow_id": "test/0",
            "agent": agent,
            "attempt": "test",
            "run_id": "test",
            "now": dt.datetime(2000, 1, 1, tzinfo=dt.timezone.utc),
            "seed": 0,
            "idempotency_key": "0" * 64,
        }
        return cls(**{**values, **changes})


def _context(told: dict[str, Any]) -> AgentContext:
    whose = Whose(told["workflow_id"], told["agent"], told["attempt"])
    return AgentContext(**told, log=WorkflowLog(logging.getLogger(f"dagster_mao.agent.{whose.agent}"), whose))
