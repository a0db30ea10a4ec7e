"""How an agent is asked, and what becomes of a call that it does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from dagster_mao.agent import Agent, AgentContext, Fallback
from dagster_mao.boundary._log import CallLog
from dagster_mao.boundary._one import EXECUTING, Answered, Deferred, Failed, One, StoppedError, WrongAnswerError
from dagster_mao.boundary._ways import Loop
from dagster_mao.errors import BreakerOpenError, MaoError
from dagster_mao.gateway import CallRecord, Gateway, Policy

Outcome = Answered | Deferred | Failed


class Asking:
    """The calls of one step of one agent: each through its gateway, and, where that fails or is refused, as its policy says.

    `is_answer` tells what may be returned, `expects` names it. `instead` is the fallback with the gateway of its own calls, `loop` makes
    the loop that an async one needs below a sync agent. `opened` is the refusal that the policy had an answer to, the latest.
    """

    def __init__(
        self,
        agent: Agent,
        policy: Policy,
        context: AgentContext,
        resources: Mapping[str, Any],
        gateway: Gateway,
        instead: tuple[Fallback, Gateway] | None,
        log: CallLog,
        loop: Callable[[], Loop],
    ) -> None:
        self._agent, self._policy, self._context, self._resources = agent, policy, context, resources
        self._gateway, self._instead, self._log, self._loop = gateway, instead, log, loop
        self._degradation = policy.degradation
        self.opened: BreakerOpenError | None = None
        self.answered_instead = False

    def ask(self, one: One, is_answer: Callable[[Any], bool], expects: str) -> Outcome:
        """Raises what ends the step: an error of the platform, an open breaker that the policy has no answer to."""
        try:
            if self._policy.isolate:  # what is sent to the child process is the agent's, and nothing of the step's
                one.state = EXECUTING
                value = self._gateway.call(self._agent.call, self._of(one), one.values, self._resources, observe=one, pause=one.pause)
            else:
                value = self._gateway.call(self._execute, one, observe=one, pause=one.pause)
            if is_answer(value):
                return Answered(value, one.last)
            error: Exception = WrongAnswerError(type(value).__name__, expects)
        except Exception as raised:
            error = raised
        return self.unanswered(one, error, is_answer, expects)

    def unanswered(self, one: One, error: Exception, is_answer: Callable[[Any], bool], expects: str) -> Outcome:
        """What becomes of a call that finally failed or was refused. Raises as `ask` does."""
        if (deferred := self._degraded(error)) is not None:
            return deferred
        if self._instead is None:
            return Failed(error)
        fallback, gateway = self._instead
        asked = (fallback.call, self._of(one), one.values, self._resources)
        try:
            if fallback.agent.is_async:
                value = self._loop().run(gateway.acall(*asked, observe=self._told(one)))
            else:
                value = gateway.call(*asked, observe=self._told(one), pause=one.pause)
            return self._answered_instead(value, is_answer, expects)
        except Exception as raised:
            return self._failed(error, raised)

    async def aask(self, one: One, is_answer: Callable[[Any], bool], expects: str) -> Outcome:
        """As `ask`, for an agent that is awaited."""
        try:
            value = await self._gateway.acall(self._execute, one, observe=one)
            if is_answer(value):
                return Answered(value, one.last)
            error: Exception = WrongAnswerError(type(value).__name__, expects)
        except Exception as raised:
            error = raised
        if (deferred := self._degraded(error)) is not None:
            return deferred
        if self._instead is None:
            return Failed(error)
        fallback, gateway = self._instead
        asked = (fallback.call, self._of(one), one.values, self._resources)
        try:
            if fallback.agent.is_async:
                value = await gateway.acall(*asked, observe=self._told(one))
            elif fallback.agent.policy is None:
                value = gateway.call(*asked, observe=self._told(one))
            else:  # it may wait, between its tries and for its limits
                value = await asyncio.to_thread(gateway.call, *asked, observe=self._told(one), pause=one.pause)
            return self._answered_instead(value, is_answer, expects)
        except Exception as raised:
            return self._failed(error, raised)

    def _of(self, one: One) -> AgentContext:
        return self._context.of_call(one.record, one.key, one.effects)

    def _execute(self, one: One) -> Any:
        if one.stopped:
            raise StoppedError
        one.state = EXECUTING
        return self._agent.call(self._context.of_call(one.record, one.key, one.effects), one.values, self._resources)

    def _degraded(self, error: Exception) -> Deferred | None:
        """What the policy makes of a call that was refused; None where its fallback, or nobody, is to answer. Raises what ends the step."""
        if isinstance(error, BreakerOpenError):
            if self._degradation == "fail":
                raise error
            self.opened = error
            return Deferred(error.breaker) if self._degradation == "defer" else None
        _raise_platform(error)
        return None

    def _failed(self, error: Exception, instead: Exception) -> Failed:
        _raise_platform(instead)
        if instead.__context__ is None and instead.__cause__ is None:
            instead.__context__ = error
        return Failed(error, instead)

    def _told(self, one: One) -> Callable[[CallRecord], None]:
        """Logs the fallback's tries as further ones of the same call."""
        before = one.last.number if one.last else 0

        def tell(told: CallRecord) -> None:
            outcome = "fallback" if told.outcome == "answered" else told.outcome
            self._log.tell((one.key, one.shown, told._replace(number=before + told.number, outcome=outcome)))

        return tell

    def _answered_instead(self, value: Any, is_answer: Callable[[Any], bool], expects: str) -> Answered:
        if not is_answer(value):
            raise WrongAnswerError(type(value).__name__, expects)
        self.answered_instead = True
        return Answered(value, None)


def _raise_platform(error: Exception) -> None:
    if isinstance(error, MaoError) and not error.of_one_call:
        raise error
