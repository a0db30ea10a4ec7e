"""In which order agents are undone, and what others still need of what they did."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

from dagster_mao.pipeline import Pipeline
from dagster_mao.state import Seal, effective, is_completed

if TYPE_CHECKING:
    from dagster_mao.journal._pages import Outstanding, Page, Told
    from dagster_mao.journal._sagas import StepRow


OPEN = ("running", "sealing")
"""States of a step that has not told how it ended: it is at work, or died."""


def in_order(pipeline: Pipeline, steps: Sequence[StepRow], seals: Sequence[Seal]) -> list[str]:
    """Agents as they are to be undone: what depends on another before it; else first what is not sealed, then the last seals first."""
    attempts = {step.attempt for step in steps}
    sealed = {seal.agent: seal.version for seal in seals if seal.attempt in attempts}
    newest = {step.agent: step for step in steps}
    waiting = sorted(newest, key=lambda agent: (agent in sealed, -sealed.get(agent, 0), -newest[agent].id))
    reads = made_from(pipeline, steps, seals)
    order: list[str] = []
    while waiting:
        # Of a cycle, which only pipelines that changed meanwhile can have, whoever comes first.
        free = (agent for agent in waiting if not any(agent in reads[other] for other in waiting if other != agent))
        agent = next(free, waiting[0])
        order.append(agent)
        waiting.remove(agent)
    return order


def made_from(pipeline: Pipeline, steps: Sequence[StepRow], seals: Sequence[Seal]) -> dict[str, set[str]]:
    """By agent, all that what it did was made from, however far up: as it pinned, and as the pipeline has it now.

    What was pinned says it of agents that other code locations have, too, and says the same in all of them.
    """
    attempts = {step.attempt for step in steps}
    direct: dict[str, set[str]] = {name: {read.upstream for read in agent.inputs} for name, agent in pipeline.agents.items()}
    for seal in seals:
        if seal.attempt in attempts and seal.path:
            direct.setdefault(seal.agent, set()).update(parent.agent for parent in seal.parents)
    for step in steps:
        direct.setdefault(step.agent, set()).update(str(parent["agent"]) for parent in step.parents)
    return {step.agent: _above(step.agent, direct) for step in steps}


def _above(agent: str, direct: Mapping[str, set[str]]) -> set[str]:
    found, waiting = set[str](), [agent]
    while waiting:
        further = direct.get(waiting.pop(), set()) - found
        found |= further
        waiting += further
    return found - {agent}


def has_sealed(step: StepRow, seals: Iterable[Seal]) -> bool:
    """Whether the state log has a seal of this step's, whatever the journal knows of it."""
    return any(seal.agent == step.agent and seal.attempt == step.attempt and seal.run_id == step.run_id for seal in seals)


class Needed:
    """What steps of other attempts have asked for and found done: it is theirs too."""

    def __init__(self, told: Mapping[int, Told]) -> None:
        self._calls: dict[bytes, tuple[int, int]] = {}
        self._keys: dict[bytes, tuple[int, int]] = {}
        for step, one in told.items():
            calls = one.calls()
            for key, place in one.places().items():
                (self._calls if key in calls else self._keys)[key] = (step, place)

    def adopt(self, effects: Iterable[Outstanding]) -> tuple[list[Outstanding], list[tuple[int, Page]]]:
        """Of effects, newest first: what nobody else needs, and, by step, the pages by which the others take over what they need."""
        from dagster_mao.journal._pages import Entry, Page, Segment, Slot

        left: list[Outstanding] = []
        entries: dict[int, list[Entry]] = {}
        segments: dict[int, list[Segment]] = {}
        for effect in effects:
            if (found := self._keys.get(effect.key)) is not None:
                entries.setdefault(found[0], []).append(effect.entry._replace(item=found[1]))
            elif (found := self._calls.get(effect.call)) is not None:
                step, place = found
                if effect.is_of_batch:
                    # Beyond all numbers that a step gives out itself.
                    first = (1 << 61) + time.time_ns() + len(segments.setdefault(step, []))
                    slot = Slot(*effect.entry.slot)
                    segments[step].append(Segment(first, [effect.record], [effect.key], slot, place))
                    place = first
                entries.setdefault(step, []).append(effect.entry._replace(item=place))
            else:
                left.append(effect)
        pages = [
            (step, Page(segments.get(step, ()), (), of_step[::-1], [segment.first for segment in segments.get(step, ())]))
            for step, of_step in entries.items()
        ]
        return left, pages

    def __contains__(self, effect: Outstanding) -> bool:
        return effect.call in self._calls or effect.key in self._keys


class Superseded:
    """What completed attempts did for inputs that have changed since: effects that the effective state does not ask for any more.

    Also what an agent did and never sealed in an attempt that completed without it: there the run that failed supersedes it.
    """

    def __init__(self, steps: Sequence[StepRow], seals: Sequence[Seal]) -> None:
        self._seals = seals
        of_agent: dict[str, list[StepRow]] = {}
        for step in steps:
            of_agent.setdefault(step.agent, []).append(step)
        self._effective: dict[str, StepRow] = {}
        self._others: dict[str, list[StepRow]] = {}
        now = effective(seals)
        self._unsealed = {agent: own for agent, own in of_agent.items() if agent not in now}
        for agent, seal in now.items():
            own = [s for s in of_agent.get(agent, ()) if s.attempt == seal.attempt and s.run_id == seal.run_id and s.state != "failed"]
            if own and len(of_agent[agent]) > 1:
                self._effective[agent] = own[-1]
                self._others[agent] = [step for step in of_agent[agent] if step is not own[-1]]

    @property
    def steps(self) -> list[int]:
        """The steps that have to be looked at: none where each agent ran once."""
        looked_at = [*self._effective.values(), *chain(*self._others.values(), *self._unsealed.values())]
        return [step.id for step in looked_at]

    def found(self, told: Mapping[int, Told]) -> tuple[dict[tuple[str, str], dict[int, list[Outstanding]]], bool]:
        """By attempt and the attempt that superseded it: by step, the effects; and whether some must wait for an attempt that goes on."""
        found, waits = self._never_sealed(told)
        for agent, now in self._effective.items():
            asked, records = Needed({now.id: told[now.id]}), told[now.id].records()
            going_on = Needed({step.id: told[step.id] for step in self._others[agent] if self._goes_on(step.attempt)})
            for step in self._others[agent]:
                if not self._is_over(step, now):
                    continue
                for effect in told[step.id].outstanding(step.undone_to):
                    if effect in asked or (records != {None} and effect.record not in records):
                        continue
                    if effect in going_on:
                        waits = True
                    else:
                        found.setdefault((step.attempt, now.attempt), {}).setdefault(step.id, []).append(effect)
        return found, waits

    def _never_sealed(self, told: Mapping[int, Told]) -> tuple[dict[tuple[str, str], dict[int, list[Outstanding]]], bool]:
        found: dict[tuple[str, str], dict[int, list[Outstanding]]] = {}
        waits = False
        for steps in self._unsealed.values():
            for attempt in {step.attempt for step in steps if is_completed(self._seals, step.attempt)}:
                own = [step for step in steps if step.attempt == attempt]
                if any(step.state in OPEN for step in own):  # it is at work; one that died is found to be dead first
                    waits = True
                    continue
                if any(step.state == "sealed" for step in own):
                    continue
                effects = {step.id: left for step in own if (left := list(told[step.id].outstanding(step.undone_to)))}
                if effects:
                    found[attempt, own[-1].run_id] = effects
        return found, waits

    def _goes_on(self, attempt: str) -> bool:
        return not is_completed(self._seals, attempt) and not self._is_fenced(attempt)

    def _is_over(self, step: StepRow, now: StepRow) -> bool:
        """Whether the step belongs to a completed attempt. One that runs again within the effective attempt may go on to seal."""
        return is_completed(self._seals, step.attempt) and (step.attempt != now.attempt or step.state in ("failed", "sealed"))

    def _is_fenced(self, attempt: str) -> bool:
        return any(seal.kind == "fence" and seal.attempt == attempt for seal in self._seals)
