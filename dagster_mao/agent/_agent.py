"""The agent itself: the class form, the function form, and what is read from their signatures."""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import pickle
import re
import sys
import types
import typing
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, NamedTuple, NoReturn, ParamSpec, TypeVar, overload

from pydantic import BaseModel

from dagster_mao.agent._annotations import Annotation, closure, locals_named_by, shape_of
from dagster_mao.agent._batching import MicroBatch
from dagster_mao.agent._declared import NAME, AgentContext, Input, Quarantine, Shape
from dagster_mao.agent._effects import EffectKind, NoEffects, check_effects, undo_resources
from dagster_mao.agent._fallback import Fallback, check_policy
from dagster_mao.agent._guard import awaiting, calling, executing, refuse_nested, stepping
from dagster_mao.agent._judge import Judge, judges_of
from dagster_mao.agent._source import canonical, names_loaded, source_of
from dagster_mao.contract import Contract
from dagster_mao.errors import MaoError, WiringError
from dagster_mao.expectations import Suite, suite_file
from dagster_mao.gateway import Policy

P = ParamSpec("P")
R = TypeVar("R")

# The resource through which the boundary writes: an agent that held it could read any state, pinned or not.
RESERVED_RESOURCES = frozenset({"state_store"})

_GUARDED = "__mao_guarded__"  # on the execute of a class: the function as it was written


class _Parameters(NamedTuple):
    context: str | None
    upstream: tuple[inspect.Parameter, ...]
    resources: tuple[str, ...]


class Agent:
    """Base of the class form: derive, and define `execute(self, [ctx,] upstream..., *, resources...)`.

    Class attributes declare the rest: `name` (default: the class name in snake_case), `version` (default: a hash of the module's source
    and of `code_files`), `description` (default: the docstring), `owners`, `tags`, `kinds`, `pool`, `model` as on a Dagster asset, `ins`
    (parameter -> upstream name, where they differ), `concurrency` (record-wise calls in flight: 16 of an async agent by default; a sync one
    is called in place, with more than 1 in that many threads), `code_files` (files and directories beside the module that the agent's
    behaviour depends on), `quarantine` (a `Quarantine`: bad records are set aside; without one, one bad record fails the batch), `policy`
    (a `Policy`: how its calls are made), `readers` (who may read what it seals: names of agents, keys of assets as "a/b"; else anybody),
    `micro_batch` (a `MicroBatch`: how many workflows one run takes in choreography) and
    `expectations` (about the batch as a whole: a list of Great Expectations' expectations or dicts, an `ExpectationSuite`, the path of a
    suite file, which counts as a code file, or `Expectations` of these), `judges` (a list of `Judge`: who says of a sample of its records
    whether they keep a rubric).

    `inputs`, `output` and the like are read from the signature when first asked for and raise WiringError naming agent, field and fix.
    """

    name: str = ""
    version: str | None = None
    description: str | None = None
    owners: Sequence[str] = ()
    tags: Mapping[str, str] = {}
    kinds: Sequence[str] = ()
    pool: str | None = None
    model: str | None = None
    ins: Mapping[str, str] = {}
    concurrency: int | None = None
    code_files: Sequence[str | Path] = ()
    quarantine: Quarantine | None = None
    policy: Policy | None = None
    micro_batch: MicroBatch | None = None
    expectations: Any = ()
    judges: Sequence[Judge] = ()
    effects: EffectKind = "read_only"
    compensate: Any = None
    undo_policy: Policy | None = None
    irreversible_because: str | None = None
    readers: Sequence[str] | None = None

    _namespace: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__module__ == __name__:  # the function form, which guards and names itself
            return
        own = vars(cls)
        if "name" not in own:
            cls.name = _snake_case(cls.__name__)
        if "description" not in own:
            cls.description = inspect.cleandoc(own.get("__doc__") or "") or None
        if "effects" not in own and own.get("compensate") is not None:
            cls.effects = "reversible"
        execute = inspect.getattr_static(cls, "execute")  # a mixin's too
        if isinstance(execute, types.FunctionType) and execute is not Agent.execute and not hasattr(execute, _GUARDED):
            cls._namespace = locals_named_by(execute, sys._getframe(1))
            cls.execute = _guarded(execute)  # type: ignore[method-assign]

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        """The agent's work. To be defined by the subclass."""
        raise NotImplementedError(f"{type(self).__name__} defines no execute")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the agent directly, as a unit test does. AgentCallError inside another agent's `execute`."""
        return self.execute(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<agent {self.name}>"

    def __getstate__(self) -> dict[str, Any]:
        # What is read from the signature is read again on the other side: contracts need not travel.
        return {name: value for name, value in vars(self).items() if name not in _CACHED}

    # -- the declaration, read once --------------------------------------------------------------------------------------------------

    def resolve(self) -> None:
        """Read the whole declaration now, as a pipeline does when it is built, so that whatever is wrong is said at load."""
        self._check_attributes()
        _ = self.inputs, self.output, self.fallback, self.resources, self.suite, self.agent_version, self.panel
        self._check_quarantine()
        check_effects(self)
        if self.policy is not None:
            check_policy(self, self.policy)

    @cached_property
    def inputs(self) -> tuple[Input, ...]:
        """The upstreams, in parameter order. Empty for an entry agent."""
        inputs = tuple(self._input(parameter) for parameter in self._parameters.upstream)
        if unknown := sorted(set(self.ins) - {i.parameter for i in inputs}):
            self._wrong(
                f"`ins` renames {unknown[0]!r}, which is no parameter of it", unknown[0], "name a positional parameter of execute in `ins`"
            )
        self._check_inputs(inputs)
        return inputs

    @cached_property
    def output(self) -> Contract[Any]:
        """The contract of what it returns."""
        return self._contract(self._returned.model, "return")

    @cached_property
    def output_shape(self) -> Shape:
        """RECORD for models (an entry returns several), else the kind of frame."""
        return self._returned.shape

    @cached_property
    def suite(self) -> Suite:
        """What it expects of its batch as a whole; false when it declares no `expectations`."""
        return Suite.of(self.expectations, self.output, agent=self.name, home=self._home) if self.expectations else Suite.empty(self.name)

    @cached_property
    def panel(self) -> tuple[Judge, ...]:
        """Its judges, with their rubrics read."""
        return judges_of(self, self._home) if self.judges else ()

    @property
    def returns_many(self) -> bool:
        """Whether it returns a collection of records, as only an entry may."""
        return self._returned.many

    @cached_property
    def fallback(self) -> Fallback | None:
        """Who answers where its calls finally failed, read from its policy; None where nobody does."""

        def read(function: types.FunctionType, ins: Mapping[str, str]) -> Agent:
            name = _snake_case(function.__name__) or "fallback"
            return FunctionAgent(function, self._namespace, name=name, ins=ins)

        return Fallback.of(self, read, Agent)

    @property
    def is_entry(self) -> bool:
        """Whether it reads no upstream: it brings the batch in."""
        return not self.inputs

    @property
    def resources(self) -> tuple[str, ...]:
        """Names of the keyword-only parameters without a default, its fallback's too. One with a default is a constant of the function."""
        return tuple(dict.fromkeys((*self._parameters.resources, *(self.fallback.agent.resources if self.fallback else ()))))

    @property
    def all_resources(self) -> tuple[str, ...]:
        """Names of the resources that its step needs: its own, and those of its judges."""
        return tuple(dict.fromkeys((*self.resources, *(name for judge in self.panel for name in judge.resources))))

    def own_resources(self, resources: Mapping[str, Any] | None) -> dict[str, Any]:
        """Of these resources the ones that `execute` takes: its configuration is theirs, and not that of its judges."""
        return {name: resources[name] for name in self.resources if resources and name in resources}

    @property
    def undo_resources(self) -> tuple[str, ...]:
        """Names of the resources that its `compensate` takes: its keyword-only parameters without a default."""
        return undo_resources(self)

    @property
    def takes_context(self) -> bool:
        """Whether the first parameter is the AgentContext (named `ctx`, or annotated with it)."""
        return self._parameters.context is not None

    @cached_property
    def is_async(self) -> bool:
        """Whether `call` returns an awaitable."""
        return inspect.iscoroutinefunction(self._raw)

    @cached_property
    def agent_version(self) -> str:
        """The declared `version`, else "sha256:" and 12 hex digits over the source of its modules, its `code_files` and its own settings.

        Of the class form every base class counts, and what its constructor set, so that `Approval(limit=2)` is not
        `Approval(limit=1)`. The version of its fallback counts too.
        """
        if self.version is not None:
            return str(self.version)
        digest = hashlib.sha256()
        instead = [self.fallback.agent.agent_version.encode()] if self.fallback else []
        for part in (*self._sources(), *self._files(), canonical(self._settings()), *instead):
            digest.update(len(part).to_bytes(8, "big") + part)
        return f"sha256:{digest.hexdigest()[:12]}"

    @cached_property
    def named_agents(self) -> frozenset[str]:
        """Names of other agents that its own code names as globals or closure variables: reads that no parameter declares."""
        functions = [*self._functions(), *(self.fallback.agent._functions() if self.fallback else ())]
        found = (value for function in functions for value in names_loaded(function))
        others = (value for value in found if _is_agent(value) and value is not self and value is not type(self))
        return frozenset(value.name for value in others if not (isinstance(value, type) and isinstance(self, value)))

    # -- running it ------------------------------------------------------------------------------------------------------------------

    def call(self, ctx: AgentContext | None, values: Mapping[str, Any], resources: Mapping[str, Any]) -> Any:
        """Invoke `execute` once: `values` by parameter name, `resources` by name (others are ignored).

        Returns what it returned: a model, a frame, an iterable of models (entry), or an awaitable of that when `is_async`. Awaits nothing.
        AgentCallError when another agent is executing in this thread or task; WiringError for a resource that is not there.
        """
        takes_context, parameters, names, alone = self._binding
        kwargs = self._taken(names, resources)
        args = [values[name] for name in parameters]
        if ctx is not None and not isinstance(ctx.having, NoEffects):
            ctx = ctx.begun()
        told = calling.set(ctx)
        try:
            result = self.execute(ctx, *args, **kwargs) if takes_context else self.execute(*args, **kwargs)
        finally:
            calling.reset(told)
        if alone:
            return _awaited_alone(result) if self.is_async else [result]
        return result

    def bound(self, resources: Mapping[str, Any]) -> Callable[[AgentContext | None, Mapping[str, Any]], Any]:
        """`call` for many calls, one after the other, of a record-wise sync agent: what they have in common is done once.

        AgentCallError when another agent is executing here; WiringError for a resource that is not there.
        """
        refuse_nested(self)
        takes_context, parameters, names, _ = self._binding
        function, kwargs = self._plain, self._taken(names, resources)
        alone = parameters[0] if len(parameters) == 1 and not takes_context else None

        def call(ctx: AgentContext | None, values: Mapping[str, Any]) -> Any:
            token, told = executing.set(self), calling.set(ctx)
            try:
                if alone is not None:
                    return function(values[alone], **kwargs)
                args = [values[name] for name in parameters]
                return function(ctx, *args, **kwargs) if takes_context else function(*args, **kwargs)
            finally:
                executing.reset(token)
                calling.reset(told)

        return call

    @property
    def _plain(self) -> Callable[..., Any]:
        """`execute` without its guard."""
        function: Callable[..., Any] = self._raw.__get__(self)
        return function

    def _taken(self, names: Sequence[str], resources: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return {name: resources[name] for name in names}
        except KeyError as missing:
            name = missing.args[0]
            self._wrong(f"it needs the resource {name!r}, which nobody provides", name, f"pass {name!r} among the resources")

    @cached_property
    def _binding(self) -> tuple[bool, tuple[str, ...], tuple[str, ...], bool]:
        # Read once: `call` is made for every record.
        alone = self.is_entry and self.output_shape is Shape.RECORD and not self._returned.many
        return self.takes_context, tuple(i.parameter for i in self.inputs), self._parameters.resources, alone

    def _invoke(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, is_async: bool) -> Any:
        refuse_nested(self)
        if is_async:
            return awaiting(self, calling.get(), function, args, kwargs)
        token = executing.set(self)
        try:
            result = function(*args, **kwargs)
        finally:
            executing.reset(token)
        # A generator's body runs while it is read, which is after this returns.
        return stepping(self, calling.get(), result) if isinstance(result, Iterator) else result

    # -- reading the signature -------------------------------------------------------------------------------------------------------

    @property
    def _raw(self) -> Callable[..., Any]:
        execute = type(self).execute
        if execute is Agent.execute:
            self._wrong("the class defines no `execute`", "execute", "define execute(self, upstream: Model) -> Model")
        if not hasattr(execute, _GUARDED):
            self._wrong("its `execute` is no plain method", "execute", "define execute(self, upstream: Model) -> Model in the class")
        return typing.cast(Callable[..., Any], getattr(execute, _GUARDED))

    @property
    def _signature(self) -> inspect.Signature:
        signature = inspect.signature(self._raw)
        return signature.replace(parameters=list(signature.parameters.values())[1:])  # without self

    @cached_property
    def _parameters(self) -> _Parameters:
        parameters = list(self._signature.parameters.values())
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                self._wrong("it takes *args or **kwargs, which name no upstream", parameter.name, "name every upstream and resource")
        positional = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
        context = positional[0].name if positional and self._is_context(positional[0]) else None
        resources = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty)
        if reserved := RESERVED_RESOURCES.intersection(resources):
            name = min(reserved)
            self._wrong(
                f"it asks for the resource {name!r}: reads that no parameter declares", name, "declare the upstream agent as a parameter"
            )
        return _Parameters(context, tuple(positional[1:] if context else positional), resources)

    def _is_context(self, parameter: inspect.Parameter) -> bool:
        if parameter.name == "ctx" or parameter.annotation is parameter.empty:
            return parameter.name == "ctx"
        return self._evaluate(parameter.annotation, parameter.name) is AgentContext

    def _input(self, parameter: inspect.Parameter) -> Input:
        read = self._read(parameter.annotation, parameter.name)
        if read.many:
            self._wrong("a collection of records is no shape of input", parameter.name, f"take mao.DataFrame[{read.model.__name__}]")
        if parameter.default is not parameter.empty and not (read.optional and parameter.default is None):
            self._wrong(
                "an upstream has a default, which would never be used",
                parameter.name,
                f"annotate `{read.model.__name__} | None`, or drop it",
            )
        contract = self._contract(read.model, parameter.name)
        return Input(parameter.name, self.ins.get(parameter.name, parameter.name), contract, read.shape, not read.optional)

    def _check_inputs(self, inputs: tuple[Input, ...]) -> None:
        shapes = {i.shape is Shape.RECORD for i in inputs}
        if len(shapes) > 1:
            odd = next(i for i in inputs if i.shape is Shape.RECORD)
            self._wrong("records and frames are mixed among its inputs", odd.parameter, f"take mao.LazyFrame[{odd.contract.name}] here too")
        upstreams = [i.upstream for i in inputs]
        if repeated := [i for n, i in enumerate(inputs) if i.upstream in upstreams[:n]]:
            self._wrong(
                f"it reads {repeated[0].upstream!r} twice", repeated[0].parameter, "take it once, under one contract that has all fields"
            )
        for among in (inputs, [i for i in inputs if i.contract.key]):
            if among and not any(i.required for i in among):
                self._wrong(
                    "all its inputs may be missing, so that nothing says which records there are",
                    among[0].parameter,
                    "drop `| None` on one",
                )

    @cached_property
    def _returned(self) -> Annotation:
        if inspect.isasyncgenfunction(self._raw):
            self._wrong("it is an async generator", "return", "return a list, or make it a plain generator")
        read = self._read(self._signature.return_annotation, "return")
        model = read.model.__name__
        if read.optional:
            self._wrong("it may return None, and records are conserved", "return", f"return a {model} that says so")
        if self.is_entry:
            return read
        if read.many:
            self._wrong("it returns a collection per record", "return", f"return {model}, or work on frames: mao.LazyFrame[{model}]")
        if (read.shape is Shape.RECORD) != (self.inputs[0].shape is Shape.RECORD):
            fix = f"mao.LazyFrame[{model}]" if read.shape is Shape.RECORD else model
            self._wrong("its inputs and its output are of different shapes", "return", f"return {fix}")
        keyed = [i for i in self.inputs if i.contract.key]
        if read.shape is Shape.RECORD and keyed and self._contract(read.model, "return").key is None:
            self._wrong(
                f"it returns a {model} per record of {keyed[0].upstream!r}, but {model} has no key",
                "return",
                f"mark a field of {model} as mao.Key",
            )
        return read

    def _read(self, annotation: Any, where: str) -> Annotation:
        if annotation is inspect.Parameter.empty:
            self._wrong(
                "no contract: it has no annotation",
                where,
                "annotate it with a pydantic model, mao.LazyFrame[Model] or mao.DataFrame[Model]",
            )
        resolved = self._evaluate(annotation, where)
        if typing.get_origin(resolved) is typing.Annotated:
            resolved = typing.get_args(resolved)[0]
        if typing.get_origin(resolved) in (typing.Union, types.UnionType):
            arms = [arm for arm in typing.get_args(resolved) if arm is not types.NoneType]
            if len(arms) == 1:
                return self._read(arms[0], where)._replace(optional=True)
        read = shape_of(resolved)
        if read is None:
            shown = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
            fix = "annotate it with a pydantic model, mao.LazyFrame[Model] or mao.DataFrame[Model]"
            if where != "return":
                fix += "; a resource is keyword-only (after `*`), the context is the first parameter"
            self._wrong(f"{shown!r} is no contract", where, fix)
        return read

    def _evaluate(self, annotation: Any, where: str) -> Any:
        # One at a time: a resource annotated with a name that only type checkers import must not be in the way.
        function = inspect.unwrap(self._raw)
        names = {**vars(type(self)), **closure(function), **self._namespace}
        holder = types.SimpleNamespace(__annotations__={"it": annotation})
        try:
            return typing.get_type_hints(holder, getattr(function, "__globals__", {}), names, include_extras=True)["it"]
        except Exception as error:
            fix = "define or import the model at module level, and not under TYPE_CHECKING"
            self._wrong(f"the annotation {annotation!r} cannot be resolved ({error})", where, fix, error)

    def _contract(self, model: type[BaseModel], where: str) -> Contract[Any]:
        try:
            return Contract.of(model)
        except MaoError as error:
            error.agent = error.agent or self.name
            error.field = error.field or where
            raise

    def _check_attributes(self) -> None:
        if not NAME.fullmatch(self.name):
            self._wrong(
                f"{self.name!r} is no name of an agent",
                "name",
                f"use small letters, digits and _: {_snake_case(self.name) or 'my_agent'!r}",
            )
        for attribute in ("owners", "kinds", "code_files", "readers"):
            value = getattr(self, attribute)
            if isinstance(value, (str, Path)):
                self._wrong(f"`{attribute}` is one string", attribute, f"{attribute}=[{str(value)!r}]")
        if self.quarantine is not None and not isinstance(self.quarantine, Quarantine):
            self._wrong(f"`quarantine` is {self.quarantine!r}", "quarantine", "quarantine=mao.Quarantine(max_share=0.1)")
        if self.policy is not None and not isinstance(self.policy, Policy):
            self._wrong(f"`policy` is {self.policy!r}", "policy", "policy=mao.Policy(timeout=30, retries=3)")
        if self.micro_batch is not None and not isinstance(self.micro_batch, MicroBatch):
            self._wrong(f"`micro_batch` is {self.micro_batch!r}", "micro_batch", "micro_batch=mao.MicroBatch(size=500, wait=5.0)")
        if self.concurrency is not None and (not isinstance(self.concurrency, int) or self.concurrency < 1):
            self._wrong(f"`concurrency` is {self.concurrency!r}", "concurrency", "a whole number from 1 on")

    def _check_quarantine(self) -> None:
        """A record can be set aside only where it can be told from the others, on both sides of the agent."""
        if self.quarantine is None:
            return
        key = self.output.key
        if key is None:
            self._wrong(f"it declares a quarantine, and {self.output.name} has no key", "quarantine", "mark a field of it with mao.Key")
        driver = next((i for i in self.inputs if i.contract.key and i.required), None)
        if self.inputs and (driver is None or driver.contract.key != key):
            self._wrong(
                f"it declares a quarantine, and {key!r} is not the key of what it reads",
                "quarantine",
                "let it return the key it reads by, or drop the quarantine: one bad record then fails the batch",
            )

    def _wrong(self, what: str, where: str, fix: str, cause: Exception | None = None) -> NoReturn:
        raise WiringError(f"Agent {self.name!r}: {what}", agent=self.name, field=where, fix=fix) from cause

    # -- what its version covers -----------------------------------------------------------------------------------------------------

    def _functions(self) -> list[types.FunctionType]:
        classes = [cls for cls in type(self).__mro__ if cls.__module__ not in (__name__, "builtins", "abc", "typing")]
        found = (
            inspect.unwrap(value) for cls in classes for value in vars(cls).values() if callable(value) and not isinstance(value, type)
        )
        return [function for function in found if isinstance(function, types.FunctionType)]

    def _settings(self) -> dict[str, Any]:
        return self.__getstate__()

    def _sources(self) -> list[bytes]:
        return list({source: None for function in self._functions() for source in [source_of(function)]})

    @property
    def _home(self) -> Path:
        return Path(inspect.unwrap(self._raw).__code__.co_filename).parent

    def _files(self) -> Iterator[bytes]:
        home, suite = self._home, suite_file(self.expectations)
        for declared in (*self.code_files, *([suite] if suite else [])):
            path = home / declared
            if not path.exists():
                self._wrong(
                    f"the code file {str(declared)!r} does not exist", "code_files", f"give a path relative to {home}, or an absolute one"
                )
            files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
            for file in files:
                yield f"{declared}/{file.relative_to(path)}".encode()
                yield file.read_bytes()


class FunctionAgent(Agent, Generic[P, R]):
    """The function form, made by `@agent`. Calling it calls the function."""

    def __init__(self, function: Callable[P, R], namespace: Mapping[str, Any], **declared: Any) -> None:
        self._function = function
        self._namespace = namespace  # type: ignore[misc]
        self._declared = declared
        self.__doc__, self.__module__ = function.__doc__, function.__module__
        self.__name__, self.__qualname__ = function.__name__, function.__qualname__
        self.__signature__ = inspect.signature(function)
        self.name = function.__name__
        self.description = inspect.cleandoc(function.__doc__ or "") or None
        if declared.get("compensate") is not None and declared.get("effects") is None:
            self.effects = "reversible"
        for attribute, value in declared.items():
            if value is not None:
                setattr(self, attribute, value)

    def execute(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """What the function returns. AgentCallError inside another agent's `execute`."""
        return typing.cast(R, self._invoke(self._function, args, kwargs, is_async=self.is_async))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return self.execute(*args, **kwargs)

    def __reduce__(self) -> Any:
        # The name in the module is the agent, so the function cannot be found by its name, and need not be: the agent can.
        found = _find(self.__module__, self.__qualname__)
        if found is self:
            return (_find, (self.__module__, self.__qualname__))
        if found is self._function:
            return (_rebuild, (self._function, self._declared))
        raise pickle.PicklingError(
            f"Agent {self.name!r} cannot be imported as {self.__module__}.{self.__qualname__}. Fix: define it at module level"
        )

    @property
    def _raw(self) -> Callable[..., Any]:
        return self._function

    @property
    def _plain(self) -> Callable[..., Any]:
        return self._function

    @property
    def _signature(self) -> inspect.Signature:
        return inspect.signature(self._function)

    def _functions(self) -> list[types.FunctionType]:
        function = inspect.unwrap(self._function)
        return [function] if isinstance(function, types.FunctionType) else []

    def _settings(self) -> dict[str, Any]:
        return {}


_CACHED = frozenset(name for name, value in vars(Agent).items() if isinstance(value, cached_property))


@overload
def agent(fn: Callable[P, R], /) -> FunctionAgent[P, R]: ...
@overload
def agent(
    *,
    name: str | None = ...,
    version: str | None = ...,
    ins: Mapping[str, str] | None = ...,
    owners: Sequence[str] = ...,
    tags: Mapping[str, str] | None = ...,
    kinds: Sequence[str] = ...,
    pool: str | None = ...,
    model: str | None = ...,
    description: str | None = ...,
    code_files: Sequence[str | Path] = ...,
    concurrency: int | None = ...,
    quarantine: Quarantine | None = ...,
    policy: Policy | None = ...,
    micro_batch: MicroBatch | None = ...,
    expectations: Any = ...,
    judges: Sequence[Judge] = ...,
    effects: EffectKind | None = ...,
    compensate: Callable[..., Any] | None = ...,
    undo_policy: Policy | None = ...,
    irreversible_because: str | None = ...,
    readers: Sequence[str] | None = ...,
) -> Callable[[Callable[P, R]], FunctionAgent[P, R]]: ...


def agent(
    fn: Callable[P, R] | None = None,
    /,
    *,
    name: str | None = None,
    version: str | None = None,
    ins: Mapping[str, str] | None = None,
    owners: Sequence[str] = (),
    tags: Mapping[str, str] | None = None,
    kinds: Sequence[str] = (),
    pool: str | None = None,
    model: str | None = None,
    description: str | None = None,
    code_files: Sequence[str | Path] = (),
    concurrency: int | None = None,
    quarantine: Quarantine | None = None,
    policy: Policy | None = None,
    micro_batch: MicroBatch | None = None,
    expectations: Any = (),
    judges: Sequence[Judge] = (),
    effects: EffectKind | None = None,
    compensate: Callable[..., Any] | None = None,
    undo_policy: Policy | None = None,
    irreversible_because: str | None = None,
    readers: Sequence[str] | None = None,
) -> FunctionAgent[P, R] | Callable[[Callable[P, R]], FunctionAgent[P, R]]:
    """Make an agent of a function: `@agent`, or `@agent(name=..., owners=[...])`. The options are the attributes of `Agent`.

    The agent can be called as the function could, so that a unit test needs no pipeline. WiringError if it is given no function.
    """
    declared = {
        "name": name,
        "version": version,
        "ins": ins,
        "owners": owners,
        "tags": tags,
        "kinds": kinds,
        "pool": pool,
        "model": model,
        "description": description,
        "code_files": code_files,
        "concurrency": concurrency,
        "quarantine": quarantine,
        "policy": policy,
        "micro_batch": micro_batch,
        "expectations": expectations,
        "judges": judges,
        "effects": effects,
        "compensate": compensate,
        "undo_policy": undo_policy,
        "irreversible_because": irreversible_because,
        "readers": readers,
    }
    caller = sys._getframe(1)

    def decorate(function: Callable[P, R]) -> FunctionAgent[P, R]:
        if not inspect.isfunction(function):
            shown = getattr(function, "__name__", repr(function))
            raise WiringError(
                f"{shown!r} is no function", agent=str(shown), field="fn", fix="decorate a function; derive a class from mao.Agent"
            )
        return FunctionAgent(function, locals_named_by(function, caller), **declared)

    return decorate(fn) if fn is not None else decorate


def _guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    is_async = inspect.iscoroutinefunction(function)

    @functools.wraps(function)
    def execute(self: Agent, *args: Any, **kwargs: Any) -> Any:
        return self._invoke(function.__get__(self), args, kwargs, is_async=is_async)

    setattr(execute, _GUARDED, function)
    return execute


async def _awaited_alone(record: Coroutine[Any, Any, Any]) -> list[Any]:
    return [await record]


def _snake_case(name: str) -> str:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return re.sub(r"[^a-z0-9]+", "_", words.lower()).strip("_")


def _is_agent(value: Any) -> bool:
    return isinstance(value, Agent) or (isinstance(value, type) and issubclass(value, Agent) and value is not Agent)


def _find(module: str, qualname: str) -> Any:
    found: Any = importlib.import_module(module)
    for part in qualname.split("."):
        found = getattr(found, part, None)
    return found


def _rebuild(function: Callable[..., Any], declared: dict[str, Any]) -> FunctionAgent[..., Any]:
    return FunctionAgent(function, {}, **declared)
