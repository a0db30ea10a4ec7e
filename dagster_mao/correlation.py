"""Which workflow is a line of a log about? The workflow is what the lines of all agents, runs and processes have in common."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple

_SHOWN = 8  # characters of an attempt, as Dagster shows run ids


class Whose(NamedTuple):
    """What a line is about: a workflow, and where they are known the agent at work and the attempt."""

    workflow: str
    agent: str | None = None
    attempt: str | None = None


_at_work: ContextVar[Whose | None] = ContextVar("mao_at_work", default=None)


@contextmanager
def about(workflow: str, agent: str | None = None, attempt: str | None = None) -> Iterator[None]:
    """What is logged in here, and in threads that are started here with a copy of the context, is about this workflow."""
    token = _at_work.set(Whose(workflow, agent, attempt))
    try:
        yield
    finally:
        _at_work.reset(token)


if TYPE_CHECKING:
    _Adapter = logging.LoggerAdapter[logging.Logger]
else:
    _Adapter = logging.LoggerAdapter  # which takes no parameters before Python 3.11


class WorkflowLog(_Adapter):
    """A logger whose lines begin with the workflow that they are about, the agent and the first characters of the attempt.

    Their records have all three as attributes too, `workflow`, `agent` and `attempt`, for whoever writes logs as JSON. Without a `whose`
    they are about what is at work (`about`), if anything is. It costs nothing where a line is not logged.
    """

    def __init__(self, logger: logging.Logger, whose: Whose | None = None) -> None:
        super().__init__(logger, {})
        self._whose = whose

    def log(self, level: Any, msg: object, *args: Any, **kwargs: Any) -> None:
        """As `logging.Logger.log`."""
        if isinstance(level, int) and not self.isEnabledFor(level):  # Dagster's logger takes names of levels too
            return
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 1  # whoever logs is one further away
        whose = self._whose or _at_work.get()
        if whose is not None:
            kwargs["extra"] = {**whose._asdict(), **(kwargs.get("extra") or {})}
            msg = f"{_prefix(whose, is_format=bool(args))}{msg}"
        self.logger.log(level, msg, *args, **kwargs)


def _prefix(whose: Whose, *, is_format: bool) -> str:
    attempt = f"attempt {whose.attempt[:_SHOWN]}" if whose.attempt else None
    told = ", ".join(part for part in (whose.workflow, whose.agent, attempt) if part)
    # Keys of workflows are whatever keys of partitions are.
    return f"{told.replace('%', '%%') if is_format else told}: "
