"""Agents never call agents: what executes in a thread or task is known, and another one is refused there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Coroutine, Generator, Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from dagster_mao.errors import AgentCallError

if TYPE_CHECKING:
    from dagster_mao.agent._agent import Agent

executing: ContextVar[Agent | None] = ContextVar("dagster_mao_executing", default=None)


@contextlib.contextmanager
def _executing_as(agent: Agent) -> Generator[None]:
    """Mark `agent` as the one that executes in this thread or task; AgentCallError when another one already does.

    It reaches as far as context variables do: nested calls, asyncio tasks, `asyncio.to_thread`; not a thread that an agent starts itself.
    """
    refuse_nested(agent)
    token = executing.set(agent)
    try:
        yield
    finally:
        executing.reset(token)


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


async def awaiting(agent: Agent, function: Callable[..., Coroutine[Any, Any, Any]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with _executing_as(agent):
        return await function(*args, **kwargs)


def stepping(agent: Agent, iterator: Iterator[Any]) -> Iterator[Any]:
    try:
        while True:
            with _executing_as(agent):
                try:
                    value = next(iterator)
                except StopIteration:
                    return
            yield value
    finally:
        if isinstance(iterator, Generator):
            iterator.close()
