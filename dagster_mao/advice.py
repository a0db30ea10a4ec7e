"""Which pattern suits a pipeline: orchestration, choreography or hybrid, by what it declares.

The matrix: agents that are operated and changed independently, or events that come one by one, ask for choreography, which suits simple
pipelines without anything to take back. Complex dependencies, effects that have to be undone, and audits of who decided in which order ask
for orchestration, and so does a pipeline that stays as it is. Where both are asked for it is hybrid: choreography with a saga over it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from dagster_mao.agent import Agent
from dagster_mao.pipeline import Mode, Pipeline

_LONG = 3  # agents one after the other, beyond which it is no simple chain


@dataclass(frozen=True)
class Advice:
    """What pattern a pipeline asks for, why, and what it lacks for it; `declared` is its mode now.

    Of `possible` connections between n agents, n(n-1)/2, it has as many as `connections`: each of them can fail, be late, or be raced.
    """

    pipeline: str
    pattern: Mode
    declared: Mode
    reasons: tuple[str, ...]
    missing: tuple[str, ...]
    agents: int
    connections: int
    possible: int

    def as_json(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {**asdict(self), "reasons": list(self.reasons), "missing": list(self.missing)}

    def as_markdown(self) -> str:
        """As a page: the pattern, the reasons, and what is missing."""
        fit = "as it is declared" if self.pattern == self.declared else f"declared is {self.declared}"
        lines = [f"**{self.pattern}** ({fit})", "", *(f"- {reason}" for reason in self.reasons)]
        return "\n".join([*lines, *(["", "Missing for it:", "", *(f"- {one}" for one in self.missing)] if self.missing else [])])


def advise(pipeline: Pipeline) -> Advice:
    """Which pattern suits a pipeline, by its agents, their connections and effects, and by what it says that it `needs`. Reads nothing."""
    shape = _Shape.of(pipeline)
    pattern, reasons = _pattern(pipeline, shape)
    return Advice(
        pipeline.name,
        pattern,
        pipeline.mode,
        tuple(reasons),
        tuple(_missing(pipeline, shape, pattern)),
        shape.agents,
        shape.connections,
        shape.agents * (shape.agents - 1) // 2,
    )


@dataclass(frozen=True)
class _Shape:
    """How the agents hang together, the entry left out: `joins` read several agents, `longest` is the longest chain."""

    agents: int
    connections: int
    joins: tuple[str, ...]
    longest: int
    effects: tuple[str, ...]
    owners: tuple[str, ...]

    @classmethod
    def of(cls, pipeline: Pipeline) -> _Shape:
        agents = [one for one in pipeline.agents.values() if one.name != pipeline.entry_name]
        known = {one.name for one in agents} | pipeline.listens.keys()
        reads = {one.name: [i.upstream for i in one.inputs if i.upstream in known] for one in agents}
        depth: dict[str, int] = dict.fromkeys(pipeline.listens, 1)
        for one in agents:
            depth[one.name] = 1 + max((depth[upstream] for upstream in reads[one.name]), default=0)
        return cls(
            len(known),
            sum(len(upstreams) for upstreams in reads.values()),
            tuple(name for name, upstreams in reads.items() if len(upstreams) > 1),
            max(depth.values(), default=0),
            tuple(one.name for one in pipeline.agents.values() if one.effects != "read_only"),
            tuple(sorted({owner for one in agents for owner in one.owners})),
        )

    @property
    def is_complex(self) -> bool:
        return bool(self.joins) or self.longest > _LONG


def _pattern(pipeline: Pipeline, shape: _Shape) -> tuple[Mode, list[str]]:
    free, bound = list(_for_choreography(pipeline)), list(_for_orchestration(pipeline, shape))
    told = f"{shape.agents} agents have {shape.connections} of {shape.agents * (shape.agents - 1) // 2} possible connections"
    if bound and (pipeline.listens or "autonomy" in pipeline.needs):
        return "hybrid", [told, *free, *bound, "both are asked for: agents that start by themselves, and a saga over them"]
    if free and not bound:
        return "choreography", [told, *free, "its dependencies are simple, and there is nothing to take back"]
    reasons = bound or ["nothing asks for agents that start by themselves: they are run together, and stay as they are"]
    if free:
        reasons.append("events alone do not ask for more: in orchestration too, an inbox is cut into runs")
    if len(shape.owners) > 1:
        reasons.append(f'its agents have {len(shape.owners)} owners: where these change them independently, say needs="autonomy"')
    return "orchestration", [told, *reasons]


def _for_choreography(pipeline: Pipeline) -> Iterator[str]:
    if pipeline.listens:
        yield f"it listens to what is run elsewhere: {', '.join(pipeline.listens)}"
    if "autonomy" in pipeline.needs:
        yield "it needs autonomy: agents are operated and changed independently"
    if pipeline.inbox is not None:
        yield "events come one by one, into an inbox"


def _for_orchestration(pipeline: Pipeline, shape: _Shape) -> Iterator[str]:
    if shape.effects:
        yield f"effects have to be undone when it fails: {', '.join(shape.effects)}"
    elif "rollback" in pipeline.needs:
        yield "it needs rollback"
    if shape.joins:
        yield f"its dependencies are complex: {', '.join(shape.joins)} wait for several agents"
    elif shape.longest > _LONG:
        yield f"its dependencies are complex: {shape.longest} agents one after the other"
    if "audit" in pipeline.needs:
        yield "it needs audits: who decided, in which order, on what"


def _missing(pipeline: Pipeline, shape: _Shape, pattern: Mode) -> Iterator[str]:
    if pattern != pipeline.mode:
        yield f'mode="{pattern}" on the pipeline: it is {pipeline.mode}'
    agents = [one for one in pipeline.agents.values() if one.name != pipeline.entry_name]
    if pattern != "orchestration":
        yield from _named("owners, who are told when what it waits for does not come", (one for one in agents if not one.owners))
        yield from _named("a policy with a timeout, without which it hangs unseen", (one for one in agents if not _times_out(one)))
        entry = pipeline.agents.get(pipeline.entry_name)
        if entry is not None and entry.quarantine is None:
            yield f"a quarantine at the entry {entry.name}: a bad record stops the workflow before anybody listens"
    if pattern != "choreography":
        lasting = [one for one in pipeline.agents.values() if one.effects == "irreversible"]
        yield from _named("a compensate: what it does cannot be undone, so that it has to come last", lasting)
        if pattern == "orchestration":
            late = (one for one in map(pipeline.agents.__getitem__, shape.effects) if not _times_out(one))
            yield from _named("a policy with a timeout: until when an effect may come late is not known", late)
        if not shape.effects and "rollback" in pipeline.needs:
            yield "agents with a compensate: it needs rollback, and no agent declares effects"
    if "audit" in pipeline.needs:
        yield from _named("a version= of its own: the seal has a hash of its code instead", (one for one in agents if one.version is None))
        yield from _named("owners, who answer for it", (one for one in agents if not one.owners and pattern == "orchestration"))


def _named(what: str, agents: Iterable[Agent]) -> Iterator[str]:
    if names := [one.name for one in agents]:
        yield f"{', '.join(names)}: {what}"


def _times_out(agent: Agent) -> bool:
    return agent.policy is not None and agent.policy.timeout is not None
