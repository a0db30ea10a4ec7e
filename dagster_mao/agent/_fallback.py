"""The fallback of an agent's policy, read as an agent: who answers where the agent's own calls finally failed."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from dagster_mao.agent._declared import AgentContext, Input, Shape
from dagster_mao.errors import MaoError, WiringError
from dagster_mao.gateway import Policy

if TYPE_CHECKING:
    from dagster_mao.agent._agent import Agent


class Fallback:
    """The `agent` that answers in the place of another one, and how it is given what the other one was given.

    Made by `Fallback.of`, which raises WiringError, naming agent, field and fix, when the two do not fit: the fallback reads what the agent
    does not, or under another contract, or answers under another one; or the contract has no field that says who answered.
    """

    def __init__(self, agent: Agent, of: Agent) -> None:
        self.agent, self._of = agent, of
        self._parameters = {i.upstream: i.parameter for i in of.inputs}
        self._check()

    @classmethod
    def of(cls, agent: Agent, read: Callable[[types.FunctionType, Mapping[str, str]], Agent], base: type[Any]) -> Fallback | None:
        """The fallback that the agent's policy names; None without one. `read` makes an agent of a function, `base` is every agent's."""
        named: Any = agent.policy.fallback if agent.policy else None
        if named is None:
            return None
        if isinstance(named, base):
            return cls(named, agent)
        if isinstance(named, type) and issubclass(named, base):
            try:
                return cls(named(), agent)
            except TypeError as error:
                _wrong(agent, f"the class {named.__name__!r} cannot be made an agent ({error})", f"give an instance: {named.__name__}(...)")
        if not isinstance(named, types.FunctionType):
            _wrong(agent, f"its fallback is {_shown(named)}", "give a function with the parameters of execute, or an agent")
        names = set(inspect.signature(named).parameters)
        return cls(read(named, {name: upstream for name, upstream in agent.ins.items() if name in names}), agent)

    def call(self, ctx: AgentContext | None, values: Mapping[str, Any], resources: Mapping[str, Any]) -> Any:
        """As `Agent.call`; `values` by the parameters of the agent whose place it takes."""
        given = {i.parameter: values[self._parameters[i.upstream]] for i in self.agent.inputs}
        answer = self.agent.call(ctx, given, resources)
        return answer if self._of.is_entry == self.agent.is_entry or self.agent.output_shape is not Shape.RECORD else _alone(answer)

    def _check(self) -> None:
        ours, theirs = self._of, self.agent
        if theirs.policy is not None and theirs.policy.fallback is not None:
            self._wrong("has a fallback of its own", "give the fallback a policy without one")
        try:
            theirs.resolve()
        except MaoError as error:
            error.what = f"Agent {ours.name!r}, its fallback: {error.what}"
            raise
        reads = {i.upstream: i for i in ours.inputs}
        for wanted in theirs.inputs:
            self._check_input(wanted, reads.get(wanted.upstream))
        if theirs.output.model is not ours.output.model:
            self._wrong(f"answers {theirs.output.name}, not {ours.output.name}", f"return {ours.output.name}, as execute does")
        many = theirs.returns_many and not ours.is_entry
        if (theirs.output_shape is Shape.RECORD) != (ours.output_shape is Shape.RECORD) or many:
            self._wrong("answers in another shape", "return records where execute does, and frames where it does")
        if ours.output.from_fallback is None:
            raise WiringError(
                f"Agent {ours.name!r}: it has a fallback, and nothing in {ours.output.name} says which answers are its",
                agent=ours.name,
                field="fallback",
                fix=f"give {ours.output.name} a field `from_fallback: Annotated[bool, mao.FromFallback] = False`",
            )

    def _check_input(self, wanted: Input, given: Input | None) -> None:
        if given is None:
            there = ", ".join(i.parameter for i in self._of.inputs) or "nothing"
            self._wrong(f"reads {wanted.parameter!r}, which execute does not", f"take what execute takes: {there}")
        if not issubclass(given.contract.model, wanted.contract.model):
            what = f"reads {wanted.parameter!r} as {wanted.contract.name}, execute as {given.contract.name}"
            self._wrong(what, f"annotate it with {given.contract.name}")
        if wanted.shape is not given.shape:
            what = f"reads {wanted.parameter!r} as a {wanted.shape.value}, execute as a {given.shape.value}"
            self._wrong(what, "read it as execute does")
        if wanted.required and not given.required:
            self._wrong(f"needs {wanted.parameter!r}, which may be missing", f"annotate it with `{wanted.contract.name} | None`")

    def _wrong(self, what: str, fix: str) -> NoReturn:
        _wrong(self._of, f"its fallback {self.agent.name!r} {what}", fix)


def check_policy(agent: Agent, policy: Policy) -> None:
    """Raises WiringError when a policy, declared or overridden, is none for this agent."""
    if policy.isolate and agent.is_async:
        raise WiringError(
            f"Agent {agent.name!r}: it is async, and `isolate` would do nothing: only what is not async runs in a child process",
            agent=agent.name,
            field="isolate",
            fix="leave `isolate` out: a call is cancelled at its `timeout`; or, where it may never await, define execute without async",
        )
    if policy.when_open == "defer":
        _check_deferral(agent)


def _check_deferral(agent: Agent) -> None:
    """Only records that can be told apart can wait."""
    key = agent.output.key
    driver = next((i for i in agent.inputs if i.contract.key and i.required), None)
    if agent.output_shape is not Shape.RECORD or driver is None:
        what, fix = "it defers records and is not called record by record", "take and return records, or choose when_open='fail'"
    elif key is None or driver.contract.key != key:
        what, fix = f"it defers records and does not return the key it reads, {driver.contract.key!r}", "return it, marked with mao.Key"
    else:
        return
    raise WiringError(f"Agent {agent.name!r}: {what}", agent=agent.name, field="when_open", fix=fix)


def _alone(answer: Any) -> Any:
    """The one record of a fallback that reads nothing, which as an agent would be an entry."""
    if inspect.isawaitable(answer):

        async def first() -> Any:
            return (await answer)[0]

        return first()
    return answer[0]


def _wrong(agent: Agent, what: str, fix: str) -> NoReturn:
    raise WiringError(f"Agent {agent.name!r}: {what}", agent=agent.name, field="fallback", fix=fix)


def _shown(value: Any) -> str:
    return str(getattr(value, "__name__", type(value).__name__))
