"""What a step journals of its agent's effects: nothing, where the agent is read-only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dagster_mao.agent import Agent
from dagster_mao.gateway import Policy
from dagster_mao.journal import journal_of
from dagster_mao.state import Attempt, Seal, StateStore

if TYPE_CHECKING:
    from dagster_mao.journal import Step


@contextmanager
def journaled(store: StateStore, agent: Agent, attempt: Attempt, pinned: Sequence[Seal], policy: Policy) -> Iterator[Step | None]:
    """The journal of the step, which is told how it fails; None for a read-only agent.

    Raises `FencedError` when the attempt is compensated, and `WiringError` where the store has no database.
    """
    if agent.effects == "read_only":
        yield None
        return
    step = journal_of(store.database).open(
        pipeline=attempt.pipeline,
        workflow_id=attempt.workflow_id,
        epoch=attempt.epoch,
        attempt=attempt.id,
        run_id=attempt.run_id,
        agent=agent.name,
        parents=[seal.as_parent.model_dump() for seal in pinned],
        seconds=policy.timeout,
        personal=is_personal(agent),
    )
    try:
        yield step
    except BaseException as error:
        step.failed(error)
        raise


def is_personal(agent: Agent) -> bool:
    """Whether the key of its records is."""
    contracts = [agent.output, *(read.contract for read in agent.inputs)]
    return any(contract.key in contract.personal for contract in contracts if contract.key)
