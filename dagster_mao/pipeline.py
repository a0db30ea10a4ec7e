"""The pipeline: agents and their entry. Its graph is read from what the agents declare, and whatever is wrong with it is said at load."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Literal, NoReturn, get_args

from pydantic import BaseModel

from dagster_mao.agent import NAME, Agent, Input, MicroBatch, Quarantine, Shape, check_pivots
from dagster_mao.contract import Contract, compare, unmarked_personal
from dagster_mao.errors import MaoError, WiringError
from dagster_mao.gateway import Policy, parse_rate
from dagster_mao.state import CALLS_SUFFIX, DEFERRED_SUFFIX, QUARANTINE_SUFFIX

Mode = Literal["orchestration", "choreography", "hybrid"]
Need = Literal["audit", "autonomy", "rollback"]


class ExternalEntry(Agent):
    """An existing asset as the entry: its key and the contract of its rows. Its batches are handed in, so that it executes nothing.

    `name` is what agents read it under; by default the end of the key. With a `quarantine`, its bad records are set aside.
    """

    def __init__(
        self,
        asset_key: Any,
        contract: type[BaseModel] | Contract[Any],
        name: str | None = None,
        *,
        quarantine: Quarantine | None = None,
    ) -> None:
        path = _path(asset_key)
        if path is None:
            raise WiringError(f"{asset_key!r} is no asset key", field="entry", fix='give "a/b", ["a", "b"] or an AssetKey')
        self.asset_key, self.name = path, name or path[-1]
        self.contract: Contract[Any] = contract if isinstance(contract, Contract) else Contract.of(contract)
        self.description = f"The asset {'/'.join(path)} as it came in."
        self.version = f"sha256:{self.contract.hash[:12]}"
        self.quarantine = quarantine

    def execute(self) -> NoReturn:
        """Raises WiringError: there is nothing to execute, the rows of the asset are to be handed in."""
        raise WiringError(
            f"The entry {self.name!r} is the asset {'/'.join(self.asset_key)}, which brings its own rows",
            agent=self.name,
            field="records",
            fix="hand them in: mao.run(pipeline, records)",
        )

    @cached_property
    def output(self) -> Contract[Any]:
        """The contract of the asset's rows."""
        return self.contract

    @cached_property
    def output_shape(self) -> Shape:
        """LAZYFRAME: the rows are there already."""
        return Shape.LAZYFRAME


class Pipeline:
    """A set of agents and their entry.

    `entry` is an agent without inputs, an `ExternalEntry`, or the key of an existing asset ("a/b", ["a", "b"], an AssetKey), whose contract
    is then what its readers agree on. `agents` may be agents or classes, in any order. `partitions_def`, `owners` and `tags` go to Dagster.

    The entry is an agent in every case and comes first in `agents` and `order`, which are topological and otherwise as given.

    `mode` says who starts the agents. "orchestration": a run that covers them. "choreography": each starts by itself when all that it reads
    of a workflow is sealed, up to `micro_batch` workflows in one run (an agent's own `micro_batch` comes first). "hybrid": the same, and an
    attempt counts only once all agents have sealed it, and is undone where one fails.

    `listens` takes the place of the entry where agents of the same pipeline run in another code location: what is sealed there, by agent,
    and the contract that it is expected to keep. With `inbox`, single events that were submitted are cut into workflows of so many.

    `elsewhere`, in hybrid mode and where the entry is: names of agents of other code locations that belong to an attempt. It counts once
    they too have sealed it, and is undone where one of them fails. Who listens and is not named may fail without it, and undoes its own.

    `needs` says what `mao.advise` cannot see: "audit" (of who decided, in which order), "autonomy" (agents are operated and changed by
    themselves), "rollback". It changes nothing else.

    Raises WiringError naming agent, field and fix: missing upstream, cycle, duplicate, unreachable agent, contracts that contradict, keys
    that cannot be joined, a read that no parameter declares, side effects in plain choreography, an inbox whose entry sets nothing aside.
    """

    def __init__(
        self,
        name: str,
        *,
        entry: Any = None,
        agents: Sequence[Agent | type[Agent]] = (),
        mode: Mode = "orchestration",
        listens: Mapping[str, type[BaseModel] | Contract[Any]] | None = None,
        elsewhere: Sequence[str] = (),
        micro_batch: MicroBatch | None = None,
        inbox: MicroBatch | None = None,
        needs: Sequence[Need] | Need = (),
        description: str | None = None,
        partitions_def: Any = None,
        owners: Sequence[str] = (),
        tags: Mapping[str, str] | None = None,
    ) -> None:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise WiringError(f"{name!r} is no name of a pipeline", field="name", fix="use small letters, digits and _, a letter first")
        self.name, self.description, self.partitions_def = name, description, partitions_def
        self.owners, self.tags = tuple(owners), dict(tags or {})
        self.mode, self.micro_batch, self.inbox = mode, micro_batch or MicroBatch(), inbox
        given = [_instance(a) for a in agents]
        self._listened = {agent: ExternalEntry([name, str(agent)], contract) for agent, contract in (listens or {}).items()}
        self.elsewhere = (elsewhere,) if isinstance(elsewhere, str) else tuple(dict.fromkeys(elsewhere))
        self.needs: tuple[str, ...] = (needs,) if isinstance(needs, str) else tuple(needs)
        self._check_mode(entry)
        entry = _instance(entry) if isinstance(entry, type) else entry
        self._entry = entry if isinstance(entry, Agent) or self._listened else self._external(entry, given)
        self.entry_name = self._entry.name if self._entry is not None else ""
        first = [self._entry] if self._entry is not None else list(self._listened.values())
        self._declared = self._by_name([*first, *(a for a in given if a is not self._entry)])
        self._check_names()
        self._check_elsewhere()
        self._check_sources()
        self.agents: dict[str, Agent] = {a: self._declared[a] for a in self._sorted() if a not in self._listened}
        for reader in self.agents.values():
            self._check_readers(reader)
            self._check_contracts(reader)
            self._check_keys(reader)
        self._check_policies()
        self._check_effects()
        if inbox is not None:
            self.check_inbox()

    def __repr__(self) -> str:
        return f"<pipeline {self.name}: {' '.join(self.order)}>"

    @property
    def entry(self) -> Agent:
        """Who brings the batch in. WiringError for a pipeline that listens to another code location, where the entry is."""
        if self._entry is None:
            self._wrong("has no entry here: it listens to agents that are run elsewhere", None, "entry", "ask where the entry is")
        return self._entry

    @property
    def listens(self) -> dict[str, Contract[Any]]:
        """By name, what the agents that are run elsewhere are expected to promise."""
        return {name: listened.output for name, listened in self._listened.items()}

    @property
    def order(self) -> tuple[str, ...]:
        """Names of the agents, each after all that it reads."""
        return tuple(self.agents)

    @property
    def plan(self) -> tuple[str, ...]:
        """What an attempt that begins here is complete with, where it is one of all agents: those of other code locations come last."""
        return (*self.order, *self.elsewhere)

    @property
    def resources(self) -> tuple[str, ...]:
        """Names of all resources that its agents need, sorted."""
        return tuple(sorted({name for a in self.agents.values() for name in a.all_resources}))

    def node(self, agent: str) -> Agent:
        """The agent (or the entry) of that name. WiringError if the pipeline has no such agent."""
        if agent not in self.agents:
            self._wrong(f"has no agent {agent!r}", agent, "agent", _suggestion(agent, self.agents) or f"it has {', '.join(self.agents)}")
        return self.agents[agent]

    def inputs_of(self, agent: str) -> tuple[Input, ...]:
        """What the agent reads; empty for the entry."""
        return self.node(agent).inputs

    def output_of(self, agent: str) -> Contract[Any]:
        """The contract that the agent promises to those who read it; of one that is run elsewhere, what it is expected to promise."""
        return (self._listened.get(agent) or self.node(agent)).output

    def downstreams(self, agent: str) -> tuple[str, ...]:
        """Names of those who read the agent, in topological order."""
        name = self.node(agent).name
        return tuple(a.name for a in self.agents.values() if any(i.upstream == name for i in a.inputs))

    def build_definitions(self, **overrides: Any) -> Any:
        """The pipeline as `dg.Definitions`: assets, checks, job, schedule, resources. Imports Dagster."""
        return importlib.import_module("dagster_mao.dagster").build_definitions(self, **overrides)

    def check_inbox(self) -> None:
        """Raises WiringError unless the entry can take single events: known by a key, and a bad one set aside without its neighbours."""
        entry, field = self.entry, "inbox"
        if entry.output.key is None:
            fix = f"mark a field of {entry.output.name} with mao.Key"
            self._wrong(f"has an inbox, and its entry {entry.name!r} has no key to know an event by", entry.name, field, fix)
        if entry.quarantine is None or entry.quarantine.max_share < 1:
            fix = "declare quarantine=mao.Quarantine(max_share=1) on the entry"
            self._wrong(f"has an inbox, and a bad event would hold up the others at its entry {entry.name!r}", entry.name, field, fix)

    # -- wiring ----------------------------------------------------------------------------------------------------------------------

    @property
    def _first(self) -> str:
        return self.entry_name or next(iter(self._listened))

    def _check_mode(self, entry: Any) -> None:
        if self.mode not in get_args(Mode):
            self._wrong(f"has the mode {self.mode!r}", None, "mode", f"it is one of {', '.join(get_args(Mode))}")
        if unknown := [one for one in self.needs if one not in get_args(Need)]:
            self._wrong(f"needs {unknown[0]!r}", None, "needs", f"it may need {', '.join(get_args(Need))}")
        if self._listened and self.mode == "orchestration":
            self._wrong("listens to other code locations, which orchestration cannot", None, "listens", 'mode="choreography" or "hybrid"')
        if self._listened and entry is not None:
            fix = "leave entry= to the code location that has it"
            self._wrong("has an entry, and listens to a code location that has one", None, "entry", fix)
        if entry is None and not self._listened:
            self._wrong("has neither an entry nor anything to listen to", None, "entry", "give entry=, or listens={agent: Model}")
        for name in self._listened:
            if not NAME.fullmatch(name):
                self._wrong(f"listens to {name!r}, which is no name of an agent", name, "listens", "name the agent as it is named there")
        if self.inbox is not None and self._listened:
            self._wrong("has an inbox and no entry", None, "inbox", "declare it where the entry is")

    def _check_effects(self) -> None:
        """What cannot be undone comes last; and what no saga watches over must have nothing to undo."""
        check_pivots(self.agents)
        if self.mode != "choreography":
            return
        for one in self.agents.values():
            if one.effects != "read_only":
                fix = 'mode="hybrid", which undoes what an attempt did, or "orchestration"'
                self._wrong(f"agent {one.name!r} has side effects, which plain choreography cannot undo", one.name, "mode", fix)

    def _by_name(self, agents: list[Agent]) -> dict[str, Agent]:
        found: dict[str, Agent] = {}
        for one in agents:
            if one.name in found:
                self._wrong(f"has two agents named {one.name!r}", one.name, "name", "list it once, or give one of them another name=")
            try:
                one.resolve()
            except MaoError as error:
                error.what = f"Pipeline {self.name!r}: {error.what}"
                raise
            found[one.name] = one
        return found

    def _external(self, key: Any, agents: Sequence[Agent]) -> ExternalEntry:
        path = _path(key)
        if path is None:
            fix = 'give an agent without inputs, mao.ExternalEntry(key, contract=Model), or an asset key: "a/b", ["a", "b"], AssetKey'
            self._wrong(f"{key!r} is neither an agent nor an asset key", None, "entry", fix)
        return ExternalEntry(path, self._agreed(path, agents))

    def _agreed(self, path: tuple[str, ...], agents: Sequence[Agent]) -> Contract[Any]:
        fix = f"say it: entry=mao.ExternalEntry({'/'.join(path)!r}, contract=Model)"
        readers = [(a, i) for a in agents for i in a.inputs if i.upstream == path[-1]]
        if not readers:
            self._wrong(f"no agent reads the entry {path[-1]!r}", None, "entry", f"name a parameter {path[-1]!r}, or map one to it by ins=")
        (_, first), *others = readers
        for reader, read in others:
            if (read.contract.hash, read.contract.key) != (first.contract.hash, first.contract.key):
                names = f"{first.contract.name!r} and {read.contract.name!r}"
                self._wrong(
                    f"the readers of the entry {path[-1]!r} do not agree on its contract ({names})", reader.name, read.parameter, fix
                )
        return first.contract

    def _check_names(self) -> None:
        for one in self._declared.values():
            if one.quarantine is not None and (name := f"{one.name}{QUARANTINE_SUFFIX}") in self._declared:
                self._wrong(f"its agent {name!r} has the name of the quarantine of {one.name!r}", name, "name", "give it another name=")
            for suffix, what in ((CALLS_SUFFIX, "table of calls"), (DEFERRED_SUFFIX, "deferred records")):
                if (name := f"{one.name}{suffix}") in self._declared:
                    self._wrong(f"its agent {name!r} has the name of the {what} of {one.name!r}", name, "name", "give it another name=")

    def _check_elsewhere(self) -> None:
        if self.elsewhere and (self.mode != "hybrid" or self._listened):
            what, fix = "names agents elsewhere that an attempt is complete with", 'say it where the entry is, with mode="hybrid"'
            self._wrong(what, None, "elsewhere", fix)
        for name in self.elsewhere:
            if not isinstance(name, str) or not NAME.fullmatch(name):
                self._wrong(
                    f"has {name!r} elsewhere, which is no name of an agent", None, "elsewhere", "name the agent as it is named there"
                )
            if name in self._declared:
                self._wrong(f"has {name!r} here, and says that it is elsewhere", name, "elsewhere", "leave it out of one of them")

    def _check_sources(self) -> None:
        names = set(self._declared)
        if self._entry is not None and not self._entry.is_entry:
            reads = self._entry.inputs[0]
            fix = "give an agent without inputs; agents that read others go to agents="
            self._wrong(f"the entry {self.entry_name!r} reads {reads.upstream!r}", self.entry_name, reads.parameter, fix)
        for one in self._declared.values():
            if one.is_entry and one is not self._entry and one.name not in self._listened:
                fix = f"take the entry, `{self._first}`, or an agent below it as a parameter; or make it the entry="
                self._wrong(f"agent {one.name!r} reads nothing and is not the entry: nothing reaches it", one.name, "inputs", fix)
            for read in one.inputs:
                if read.upstream not in names:
                    fix = (
                        _suggestion(read.upstream, names)
                        or f"add it to agents=, or map the parameter by ins=; there are {', '.join(sorted(names))}"
                    )
                    self._wrong(f"agent {one.name!r} reads {read.upstream!r}, which is no agent of it", one.name, read.parameter, fix)
            if undeclared := sorted(one.named_agents & names - {i.upstream for i in one.inputs}):
                fix = f"take `{undeclared[0]}` as a parameter: the pipeline hands over its sealed output"
                self._wrong(f"agent {one.name!r} reaches for {undeclared[0]!r}, which no parameter declares", one.name, undeclared[0], fix)

    def _sorted(self) -> list[str]:
        done: list[str] = []
        waiting = list(self._declared)
        reads = {name: {i.upstream for i in one.inputs} for name, one in self._declared.items()}
        while waiting:
            ready = next((name for name in waiting if reads[name] <= set(done)), None)
            if ready is None:
                self._refuse_cycle(reads, waiting)
            done.append(ready)
            waiting.remove(ready)
        return done

    def _refuse_cycle(self, reads: Mapping[str, set[str]], waiting: Sequence[str]) -> NoReturn:
        path = [waiting[0]]
        while path[-1] not in path[:-1]:
            path.append(min(reads[path[-1]].intersection(waiting)))
        cycle = path[path.index(path[-1]) :][::-1]
        upstream, reader = next(pairwise(cycle))
        parameter = next(i.parameter for i in self._declared[reader].inputs if i.upstream == upstream)
        fix = f"let one of them read something further up, for example `{self._first}`"
        self._wrong(f"its agents read each other in a cycle: {' -> '.join(cycle)}", reader, parameter, fix)

    def _check_readers(self, reader: Agent) -> None:
        for read in reader.inputs:
            readers = self._declared[read.upstream].readers
            if readers is not None and reader.name not in readers:
                allowed = ", ".join(readers) or "nobody"
                what = f"agent {reader.name!r} reads {read.upstream!r}, which is for {allowed}"
                self._wrong(what, reader.name, read.parameter, f"name it in the `readers` of {read.upstream!r}, or do not read it")

    def _check_contracts(self, reader: Agent) -> None:
        for read in reader.inputs:
            producer = self._declared[read.upstream].output
            for difference in compare(producer.describe(), read.contract.describe()):
                if difference.kind == "contradiction":
                    what = f"agent {reader.name!r} cannot read {read.upstream!r} as {read.contract.name}: {difference.detail}"
                    fix = f"change {difference.field!r} in {read.contract.name}, or in {producer.name}, which {read.upstream!r} promises"
                    self._wrong(what, reader.name, difference.field, fix)
            if producer.key != read.contract.key:
                self._refuse_key(reader, read, producer)
            self._check_personal(reader, read, producer)

    def _check_personal(self, reader: Agent, read: Input, producer: Contract[Any]) -> None:
        """A personal field stays one: what its reader did not mark would be shown by the reader's checks."""
        unmarked = unmarked_personal(producer.describe(), read.contract.describe())
        if unmarked:
            what = f"agent {reader.name!r} reads {unmarked[0]!r} of {read.upstream!r}, which is personal, as if it were not"
            self._wrong(what, reader.name, unmarked[0], f"annotate it in {read.contract.name} with mao.Personal, or do not read it")

    def _refuse_key(self, reader: Agent, read: Input, producer: Contract[Any]) -> NoReturn:
        what = f"agent {reader.name!r} reads {read.upstream!r} by the key {read.contract.key!r}, which promises {producer.key!r}"
        if producer.key is None:
            fix = f"mark {read.contract.key!r} in {producer.name} as mao.Key, or unmark it in {read.contract.name} (a batch of one record)"
        else:
            fix = f"mark {producer.key!r} in {read.contract.name} as mao.Key"
        self._wrong(what, reader.name, read.contract.key or producer.key, fix)

    def _check_keys(self, reader: Agent) -> None:
        # Without a key an upstream is a batch of one record, and is there for every record of the others.
        keyed = [(i.upstream, key, i.contract.schema[key]) for i in reader.inputs if (key := i.contract.key) is not None]
        for (one, its_key, its_type), (other, key, dtype) in pairwise(keyed):
            if its_type != dtype:
                what = f"agent {reader.name!r} joins {one!r} by {its_key!r} ({its_type}) with {other!r} by {key!r} ({dtype})"
                self._wrong(what, reader.name, key, "give both keys the same type")
        returned = reader.output.key
        for upstream, key, dtype in keyed:
            # The same key on both sides promises that records are conserved, which is compared value by value.
            if key == returned and dtype != reader.output.schema[key]:
                what = f"agent {reader.name!r} reads {key!r} of {upstream!r} as {dtype} and returns it as {reader.output.schema[key]}"
                self._wrong(what, reader.name, key, "give it the same type on both sides, or the returned key another name")

    def _check_policies(self) -> None:
        """What agents share by name they must declare alike: a breaker that trips at two and at five failures is none."""
        shared: dict[tuple[str, str], tuple[Agent, Any]] = {}
        for one in self.agents.values():
            for who in (one, *([one.fallback.agent] if one.fallback else [])):
                for name, declared in _shared(who.policy):
                    other, before = shared.setdefault(name, (who, declared))
                    if before != declared:
                        what = f"agents {other.name!r} and {who.name!r} share the {name[0]} {name[1]!r} and declare it differently"
                        self._wrong(what, who.name, name[0], "declare it alike, or give it two names")

    def _wrong(self, what: str, agent: str | None, field: str | None, fix: str) -> NoReturn:
        raise WiringError(f"Pipeline {self.name!r}: {what}", agent=agent, field=field, fix=fix)


def _instance(declared: Any) -> Agent:
    if isinstance(declared, Agent):
        return declared
    shown = getattr(declared, "__name__", repr(declared))
    if not (isinstance(declared, type) and issubclass(declared, Agent)):
        raise WiringError(
            f"{shown!r} is no agent", agent=shown, field="agents", fix="decorate it with @mao.agent, or derive it from mao.Agent"
        )
    try:
        return declared()
    except TypeError as error:
        raise WiringError(
            f"The class {shown!r} cannot be made an agent ({error})", agent=shown, field="agents", fix=f"list an instance: {shown}(...)"
        ) from error


def _shared(policy: Policy | None) -> Iterator[tuple[tuple[str, str], Any]]:
    """What a policy shares with others by a name, and how it declares it."""
    if policy is not None and policy.breaker and policy.breaker.name:
        yield ("breaker", policy.breaker.name), policy.breaker
    for field in ("rate_limit", "token_limit"):
        if policy is not None and policy.rate_key and (rate := getattr(policy, field)):
            yield ("rate_key" if field == "rate_limit" else field, policy.rate_key), parse_rate(rate)


def _path(key: Any) -> tuple[str, ...] | None:
    """The path of an asset key, however it is written: "a/b", ["a", "b"], an AssetKey, an asset with a key."""
    key = getattr(key, "key", key)
    path = getattr(key, "path", key)
    parts = path.split("/") if isinstance(path, str) else path
    if not isinstance(parts, Iterable):
        return None
    parts = tuple(parts)
    return parts if parts and all(isinstance(part, str) and part for part in parts) else None


def _suggestion(name: str, names: Iterable[str]) -> str | None:
    close = difflib.get_close_matches(name, sorted(names), n=1)
    return f"did you mean {close[0]!r}?" if close else None
