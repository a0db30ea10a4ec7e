"""Effects on the world outside: what an agent declares of them, how it has them (`ctx.effect`), and how it is told to undo them."""

from __future__ import annotations

import datetime as dt
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn, Protocol

import polars as pl

from dagster_mao.correlation import Whose, WorkflowLog
from dagster_mao.errors import WiringError
from dagster_mao.gateway import Policy
from dagster_mao.journal import Effect, effect_key

if TYPE_CHECKING:
    from dagster_mao.agent._agent import Agent

EffectKind = Literal["read_only", "reversible", "irreversible"]
_KINDS = ("read_only", "reversible", "irreversible")


class Effects(Protocol):
    """How the call at hand has effects: what stands behind the context."""

    def begun(self) -> Effects:
        """For a new try of the call."""

    def effect(self, name: str, function: Callable[[Effect], Any], *, compares_epoch: bool = False) -> Any: ...

    def effects(
        self,
        name: str,
        function: Callable[..., Any],
        records: Any,
        *,
        key: str | None = None,
        compares_epoch: bool = False,
        in_batches_of: int | None = None,
    ) -> Any: ...


class Undo:
    """What `compensate` is told: which effects of which attempt it is to undo, and what the agent knew when it had them.

    `effects` are those that happened or may have happened, newest first; undo them all, also those whose state is "unknown", and nothing
    else. An undo may be called twice, and must take effect once: undo by `effect.key`. A target that compares epochs is handed `epoch`, the
    one after the fence: what comes later under an effect's own epoch is then refused.

    `inputs` are the rows that the agent read, by upstream, as pinned; `output` is what it sealed, None where it did not come to that. Both
    are read, verified, when they are first asked for.
    """

    def __init__(
        self,
        *,
        pipeline: str,
        workflow_id: str,
        attempt: str,
        agent: str,
        epoch: int,
        now: dt.datetime,
        effects: Sequence[Effect],
        read_output: Callable[[], pl.LazyFrame | None] = lambda: None,
        read_inputs: Mapping[str, Callable[[], pl.LazyFrame]] | None = None,
        log: logging.Logger | None = None,
    ) -> None:
        self.pipeline, self.workflow_id, self.attempt, self.agent = pipeline, workflow_id, attempt, agent
        self.epoch, self.now, self.effects = epoch, now, tuple(effects)
        self.log = WorkflowLog(log or logging.getLogger(f"dagster_mao.agent.{agent}"), Whose(workflow_id, agent, attempt))
        self._read_output, self.inputs = read_output, Rows(read_inputs or {})

    @property
    def output(self) -> pl.LazyFrame | None:
        """What the agent sealed in this attempt; None where it sealed nothing."""
        return self._read_output()

    def __repr__(self) -> str:
        return f"<undo of {self.agent} in attempt {self.attempt} at {self.workflow_id}: {len(self.effects)} effects>"

    def __reduce__(self) -> Any:
        # To a child process (`isolate`) the rows themselves go, and it logs for itself.
        told = {name: value for name, value in vars(self).items() if not name.startswith("_") and name not in ("log", "inputs")}
        output = self.output
        return (_undo, (told, None if output is None else output.collect(), {name: rows.collect() for name, rows in self.inputs.items()}))


class Rows(Mapping[str, pl.LazyFrame]):
    """Rows by upstream, each read when it is asked for."""

    def __init__(self, read: Mapping[str, Callable[[], pl.LazyFrame]]) -> None:
        self._read = dict(read)

    def __getitem__(self, upstream: str) -> pl.LazyFrame:
        return self._read[upstream]()

    def __iter__(self) -> Iterator[str]:
        return iter(self._read)

    def __len__(self) -> int:
        return len(self._read)


def _undo(told: dict[str, Any], output: pl.DataFrame | None, inputs: Mapping[str, pl.DataFrame]) -> Undo:
    read = {name: rows.lazy for name, rows in inputs.items()}
    return Undo(**told, read_output=lambda: None if output is None else output.lazy(), read_inputs=read)


# -- what it declares ----------------------------------------------------------------------------------------------------------------


def undo_resources(agent: Agent) -> tuple[str, ...]:
    """Names of the resources that undoing needs: the keyword-only parameters of `compensate` without a default."""
    compensate = agent.compensate
    if compensate is None:
        return ()
    parameters = inspect.signature(compensate).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty)


def check_effects(agent: Agent) -> None:
    """Raises WiringError, naming agent, field and fix, where what the agent declares of its effects does not fit together."""
    compensate, kind, because = agent.compensate, agent.effects, agent.irreversible_because
    if kind not in _KINDS:
        _wrong(agent, "effects", f"`effects` is {kind!r}", f"one of {', '.join(map(repr, _KINDS))}")
    if kind == "read_only" and compensate is not None:
        _wrong(agent, "compensate", "it is read-only, and has a compensate", "drop one of the two")
    if kind == "reversible" and compensate is None:
        _wrong(
            agent,
            "compensate",
            "its effects are reversible, and it has no compensate",
            "define compensate(self, undo), or declare them irreversible",
        )
    if kind == "irreversible" and compensate is not None:
        _wrong(agent, "compensate", "its effects are irreversible, and it has a compensate", "drop one of the two")
    if because is not None and (kind != "irreversible" or not isinstance(because, str) or not because.strip()):
        _wrong(
            agent, "irreversible_because", "`irreversible_because` says nothing about it", "words, of an agent with irreversible effects"
        )
    _check_undo_policy(agent, agent.undo_policy, compensate)
    if compensate is not None:
        _check_compensate(agent, compensate)


def check_pivots(agents: Mapping[str, Agent]) -> None:
    """Raises WiringError for an irreversible agent after which another may fail, unless its author says why that is acceptable.

    What cannot be undone comes last: every other agent of the pipeline is among its ancestors.
    """
    for name, agent in agents.items():
        if agent.effects != "irreversible" or agent.irreversible_because:
            continue
        ancestors = _ancestors(agents, name)
        if others := [other for other in agents if other != name and other not in ancestors]:
            _wrong(
                agent,
                "effects",
                f"it cannot be undone, and {others[0]!r} may fail after it",
                f"let it read {others[0]!r}, or an agent below it; or say in `irreversible_because=`, in words, why this is acceptable",
            )


def call_compensate(agent: Agent, undo: Undo, resources: Mapping[str, Any]) -> Any:
    """Invokes `compensate` once; an awaitable where it is async. WiringError for a resource that is not there."""
    compensate = agent.compensate
    assert compensate is not None
    missing = [name for name in undo_resources(agent) if name not in resources]
    if missing:
        _wrong(
            agent,
            missing[0],
            f"its compensate needs the resource {missing[0]!r}, which nobody provides",
            f"pass {missing[0]!r} among the resources",
        )
    given = {name: resources[name] for name in undo_resources(agent)}
    return agent._invoke(compensate, (undo,), given, is_async=is_async_undo(agent))


def is_async_undo(agent: Agent) -> bool:
    """Whether `compensate` is awaited."""
    return inspect.iscoroutinefunction(agent.compensate)


def _check_compensate(agent: Agent, compensate: Callable[..., Any]) -> None:
    if not callable(compensate):
        _wrong(agent, "compensate", f"`compensate` is {compensate!r}", "give a function: compensate(undo, *, resources...)")
    parameters = list(inspect.signature(compensate).parameters.values())
    if inspect.isgeneratorfunction(compensate) or inspect.isasyncgenfunction(compensate):
        _wrong(agent, "compensate", "its compensate is a generator, whose body nobody runs", "make it a plain function")
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(positional) != 1 or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        fix = "compensate(self, undo: mao.Undo, *, resources...): inputs and output are in `undo`"
        _wrong(agent, "compensate", "its compensate takes something else than `undo` and resources", fix)


def _check_undo_policy(agent: Agent, policy: Any, compensate: Any) -> None:
    if policy is None:
        return
    if not isinstance(policy, Policy):
        _wrong(agent, "undo_policy", f"`undo_policy` is {policy!r}", "undo_policy=mao.Policy(timeout=30, retries=3)")
    if compensate is None:
        _wrong(agent, "undo_policy", "it has an `undo_policy`, and no compensate", "drop it")
    if policy.fallback is not None or policy.when_open is not None:
        _wrong(
            agent,
            "undo_policy",
            "its `undo_policy` has a fallback or says `when_open`",
            "what cannot be undone now is undone later: drop them",
        )
    if policy.isolate:
        # `undo` reads the store and the journal of the process that asks; which is a step of the compensation and nothing else.
        _wrong(
            agent,
            "undo_policy",
            "its `undo_policy` says `isolate`, and an undo cannot be sent to a child process",
            "drop it: each undo is a step of its own, and a `timeout` gives it up",
        )


def _ancestors(agents: Mapping[str, Agent], name: str) -> set[str]:
    found: set[str] = set()
    waiting = [name]
    while waiting:
        for read in agents[waiting.pop()].inputs:
            if read.upstream in agents and read.upstream not in found:
                found.add(read.upstream)
                waiting.append(read.upstream)
    return found


def _wrong(agent: Agent, field: str, what: str, fix: str) -> NoReturn:
    raise WiringError(f"Agent {agent.name!r}: {what}", agent=agent.name, field=field, fix=fix)


# -- without a journal ---------------------------------------------------------------------------------------------------------------


class NoEffects:
    """What stands behind the context of a read-only agent."""

    def __init__(self, agent: str) -> None:
        self._agent = agent

    def begun(self) -> NoEffects:
        return self

    def effect(self, name: str, *_: Any, **__: Any) -> NoReturn:
        raise WiringError(
            f"Agent {self._agent!r} has the effect {name!r}, and is read-only",
            agent=self._agent,
            field="effects",
            fix='define compensate(self, undo), which undoes it; or declare effects="irreversible"',
        )

    effects = effect


class Unjournaled:
    """Behind the context of a unit test: effects are had, with keys that are the same every time, and nobody keeps a journal."""

    def __init__(self, call: str = "0" * 64, record: str | None = None) -> None:
        self._call, self._record = call, record
        self._counts: Counter[str] = Counter()

    def begun(self) -> Unjournaled:
        return Unjournaled(self._call, self._record)

    def effect(self, name: str, function: Callable[[Effect], Any], *, compares_epoch: bool = False) -> Any:
        n, self._counts[name] = self._counts[name], self._counts[name] + 1
        return function(Effect(effect_key(self._call, name, n), 0, name, self._record))

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
        frame = records.collect() if isinstance(records, pl.LazyFrame) else records
        rows = frame.iter_rows(named=True) if isinstance(frame, pl.DataFrame) else iter(frame)
        told = [
            Effect(effect_key(self._call, name, n), 0, name, str(row[key] if isinstance(row, Mapping) else getattr(row, str(key))), row=row)
            for n, row in enumerate(rows)
        ]
        if inspect.iscoroutinefunction(function):
            return self._awaited(function, told, in_batches_of)
        parts = _parts(told, in_batches_of)
        answers = [function(part) for part in parts] if in_batches_of else [[function(effect)] for effect in told]
        return _by_record(told, answers)

    async def _awaited(self, function: Callable[..., Any], told: Sequence[Effect], size: int | None) -> dict[str, Any]:
        answers = [await function(part) for part in _parts(told, size)] if size else [[await function(effect)] for effect in told]
        return _by_record(told, answers)


def _parts(told: Sequence[Effect], size: int | None) -> list[list[Effect]]:
    return [list(told[at : at + (size or 1)]) for at in range(0, len(told), size or 1)]


def _by_record(told: Sequence[Effect], answers: Sequence[Sequence[Any]]) -> dict[str, Any]:
    flat = (answer for part in answers for answer in part)
    return {str(effect.record): answer for effect, answer in zip(told, flat, strict=True)}
