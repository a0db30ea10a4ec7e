"""Agents never call agents: what executes in a thread or task is known, and another one is refused there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from dagster_mao.errors import AgentCallError

if TYPE_CHECKING:
    from dagster_mao.agent._agent import Agent
    from dagster_mao.agent._declared import AgentContext

executing: ContextVar[Agent | None] = ContextVar("dagster_mao_executing", default=None)
calling: ContextVar[AgentContext | None] = ContextVar("dagster_mao_calling", default=None)


def current() -> tuple[Agent | None, AgentContext | None]:
    """The agent that executes in this thread or task, and what its call was told; each None where there is none.

    For clients of models and services, so that they can send the call's idempotency key though `execute` takes no context.
    """
    return executing.get(), calling.get()


@contextlib.contextmanager
def _executing_as(agent: Agent, context: AgentContext | None) -> Generator[None]:
    """Mark `agent` as the one that executes in this thread or task; AgentCallError when another one already does.

    It reaches as far as context variables do: nested calls, asyncio tasks, `asyncio.to_thread`; not a thread that an agent starts itself.
    """
    refuse_nested(agent)
    token, told = executing.set(agent), calling.set(context)
    try:
        yield
    finally:
        executing.reset(token)
        calling.reset(told)


def refuse_nested(agent: Agent) -> None:
    caller = executing.get()
    # The same agent may: `super().execute(...)`, recursion.
    if caller is not None and caller is not agent:
        raise AgentCallError(
            f"Agent {caller.name!r} called agent {agent.name!r} inside its execute; agents never call agents",
            agent=caller.name,
            field=agent.name,
            fix=f"take `{agent.name}` as a parameter of {caller.name!r}: the pipeline hands over its sealed output",
        )


async def awaiting(
    agent: Agent,
    context: AgentContext | None,
    function: Callable[..., Coroutine[Any, Any, Any]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    refuse_nested(agent)
    # As `_executing_as`, which takes half as long as a call that does nothing.
    token, told = executing.set(agent), calling.set(context)
    try:
        return await function(*args, **kwargs)
    finally:
        executing.reset(token)
        calling.reset(told)


def stepping(agent: Agent, context: AgentContext | None, iterator: Iterator[Any]) -> Iterator[Any]:
    try:
        while True:
            with _executing_as(agent, context):
                try:
                    value = next(iterator)
                except StopIteration:
                    return
            yield value
    finally:
        if isinstance(iterator, Generator):
            iterator.close()
