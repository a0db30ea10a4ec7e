"""Bisect: the first bad version, along a workflow or along an agent's history over many, looking at as few as can be."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple

import polars as pl

from dagster_mao.errors import UnknownVersionError, WiringError
from dagster_mao.review.history import known, parse_reference
from dagster_mao.review.predicates import Good, Predicate, predicate_of
from dagster_mao.state import Parent, Seal, StateStore, is_moment, moment, passed

Verdict = Literal["found", "never_bad", "always_bad", "not_monotone"]
What = Literal["agent", "code", "contract", "model", "configuration", "policy", "library", "input"]

_AT_A_TIME = 500  # versions whose rows of the log are read together, where all are looked at
_OUTPUTS = ("entry", "output")
_FACTS: dict[What, str] = {
    "code": "agent_version",
    "contract": "contract_hash",
    "model": "model",
    "configuration": "config",
    "policy": "policy",
    "library": "library_version",
}


class Candidate(NamedTuple):
    """What of a version is read to find it: seven columns of the log."""

    workflow_id: str
    version: int
    kind: str
    agent: str
    sealed_at: dt.datetime
    row_count: int
    digest: str
    contract_hash: str

    @property
    def reference(self) -> str:
        return f"{self.workflow_id}@{self.version}"


@dataclass(frozen=True)
class Probe:
    """A version that was looked at: its `place` among the candidates, and how many times of `asked` it was found good."""

    place: int
    reference: str
    good: bool
    votes: int
    asked: int

    @property
    def is_noisy(self) -> bool:
        """Whether the answers differed."""
        return self.votes not in (0, self.asked)


@dataclass(frozen=True)
class Changed:
    """What was different when the first bad version was made: of its agent, or of one `agent` above it. Of an input, which versions."""

    agent: str
    what: What
    before: str | None
    after: str | None


@dataclass(frozen=True)
class Bisection:
    """What was found among `candidates` versions from the good end to the bad one.

    `verdict`: "found"; "never_bad" or "always_bad", when both ends are alike; "not_monotone", when the first is bad and the last is good.
    With "found", `first_bad` follows `last_good` at once. `against` are pairs of versions, the first bad and the second, later, good: the
    history turns more than once, and this is one of its turns. Of a history that was looked at as a whole (`linear`), `turns` are all
    places where it turns, and `first_bad` is the first one. `ends` and `searched` count the versions that were looked at, `asked` how often
    the predicate was.
    """

    verdict: Verdict
    predicate: str
    linear: bool
    candidates: int
    first: Candidate
    last: Candidate
    first_bad: Seal | None
    last_good: Seal | None
    changes: tuple[Changed, ...]
    against: tuple[tuple[str, str], ...]
    turns: tuple[str, ...]
    probes: tuple[Probe, ...]
    ends: int
    searched: int
    spot_checked: int
    asked: int

    @property
    def is_monotone(self) -> bool:
        """Whether nothing that was looked at speaks against one turn from good to bad."""
        return self.verdict != "not_monotone" and not self.against and len(self.turns) < 2


def bisect(
    store: StateStore,
    name: str,
    good: Good,
    *,
    agent: str | None = None,
    first: str | None = None,
    last: str | None = None,
    linear: bool = False,
    repeat: int = 1,
    spot_checks: int = 0,
) -> Bisection:
    """Finds the first version that is not `good`.

    `name` is a workflow (`credit/2026-01-01`: along its versions, of one `agent` or of all) or a pipeline (`credit`: along the history of
    one agent over all workflows, in the order of sealing). `first` and `last` are the good end and the bad end: `workflow@n`, a version's
    number, or a moment, for the last version that was there then; by default the first and the last of all.

    Both ends are looked at first, then at most ceil(log2(candidates - 1)) versions between them. It is taken for granted that the history
    turns once; `linear` looks at all versions instead, `spot_checks` at so many more, spread over the rest. With `repeat`, an odd number,
    the predicate is asked so often of each version, and the majority counts. Raises `UnknownVersionError` where there are no two versions
    to search between, `WiringError` for a predicate that says neither yes nor no, `TamperedError` when a snapshot is not what was sealed.
    """
    if repeat < 1 or repeat % 2 == 0:
        raise WiringError(f"A majority of {repeat} cannot be told", field="repeat", fix="an odd number: 5")
    predicate = predicate_of(good)
    candidates = _between(_candidates(store, name, agent, predicate), name, first, last)
    looked = _Looking(store, predicate, candidates, repeat)
    return _through(store, looked) if linear else _searched(store, looked, spot_checks)


# -- what there is to look at --------------------------------------------------------------------------------------------------------


def _candidates(store: StateStore, name: str, agent: str | None, predicate: Predicate) -> list[Candidate]:
    """The versions with an agent's rows, in the order of sealing. Those without a row say nothing about rows, and are left out."""
    workflow = name if "/" in name else None
    if workflow is None and agent is None:
        raise WiringError(
            f"{name!r} is a pipeline, and nothing says whose history is meant", field="agent", fix="name an agent, or a workflow"
        )
    pipeline = name.partition("/")[0]
    rows = store.columns(pipeline, *Candidate._fields, workflow=workflow)
    if workflow is not None and rows.is_empty():
        known(store, workflow)
    wanted = pl.col("kind").is_in(_OUTPUTS)
    wanted &= pl.lit(True) if agent is None else pl.col("agent") == agent
    wanted &= pl.col("row_count") > 0 if predicate.of_rows else pl.lit(True)
    # A clock that is behind does not put a version before the one that it follows.
    in_order = rows.sort("workflow_id", "version").with_columns(at=pl.col("sealed_at").cum_max().over("workflow_id")).filter(wanted)
    sort_by = ["version"] if workflow is not None else ["at", "workflow_id", "version"]
    found = [Candidate(*row) for row in in_order.sort(sort_by).select(Candidate._fields).iter_rows()]
    if not found:
        had = sorted(set(rows["agent"]) - {""})
        there = f"it has versions by {', '.join(had)}" if had else "nothing was sealed there"
        raise UnknownVersionError(f"There is no version to look at in {name!r}", agent=agent, fix=there)
    return found


def _between(candidates: Sequence[Candidate], name: str, first: str | None, last: str | None) -> list[Candidate]:
    start = 0 if first is None else _place(candidates, name, first)
    end = len(candidates) - 1 if last is None else _place(candidates, name, last)
    if start >= end:
        what = "There is only one version" if len(candidates) == 1 else "The good end does not come before the bad end"
        told = f"{candidates[start].reference} and {candidates[end].reference}"
        raise UnknownVersionError(f"{what}: {told}", fix="name two ends, the good one before the bad one")
    return list(candidates[start : end + 1])


def _place(candidates: Sequence[Candidate], name: str, text: str) -> int:
    if text.isdecimal() and "/" in name:
        text = f"{name}@{text}"
    if is_moment(text):
        until = passed(moment(text))
        then = [place for place, one in enumerate(candidates) if one.sealed_at <= until]
        if not then:
            raise UnknownVersionError(f"No version was there at {text}", fix=f"the first is {candidates[0].reference}")
        return then[-1]
    workflow, version = parse_reference(text)
    for place, one in enumerate(candidates):
        if (one.workflow_id, one.version) == (workflow, version):
            return place
    raise UnknownVersionError(f"{text!r} is none of the versions that are looked at", fix=f"they begin with {candidates[0].reference}")


# -- looking -------------------------------------------------------------------------------------------------------------------------


class _Looking:
    """The versions, and what is known of them."""

    def __init__(self, store: StateStore, predicate: Predicate, candidates: Sequence[Candidate], repeat: int) -> None:
        self.store, self.predicate, self.candidates, self.repeat = store, predicate, candidates, repeat
        self.probes: list[Probe] = []
        self.asked = 0
        self._answers: dict[tuple[str, str], bool] = {}  # by content
        self._seals: dict[int, Seal] = {}
        self._alike = predicate.of_rows and repeat == 1

    def fetch(self, places: Iterable[int]) -> None:
        """Reads the rows of the log of some versions together."""
        wanted = {(one.workflow_id, one.version): place for place in places for one in [self.candidates[place]] if place not in self._seals}
        self._seals |= {wanted[found]: seal for found, seal in self.store.seals_at(wanted).items()}

    def forget(self) -> None:
        self._seals.clear()

    def seal(self, place: int) -> Seal:
        if place not in self._seals:
            self.fetch([place])
        if place not in self._seals:
            raise UnknownVersionError(
                f"{self.candidates[place].reference} is not in the log any more", fix="`dagster-mao verify` says more"
            )
        return self._seals[place]

    def known(self, place: int) -> bool | None:
        """Whether it is good, where that needs no look: it holds what one holds that was looked at."""
        return self._answers.get(self._content(place)) if self._alike else None

    def is_good(self, place: int) -> bool:
        if (answer := self.known(place)) is not None:
            return answer
        seal = self.seal(place)
        votes = sum(self.predicate(self.store, seal) for _ in range(self.repeat))
        self.asked += self.repeat
        good = 2 * votes > self.repeat
        self.probes.append(Probe(place, seal.reference, good, votes, self.repeat))
        if self._alike:
            self._answers[self._content(place)] = good
        return good

    def _content(self, place: int) -> tuple[str, str]:
        return self.candidates[place].digest, self.candidates[place].contract_hash

    def against(self) -> tuple[tuple[str, str], ...]:
        """A bad version and a later good one, if there are such: looked at, or the same as one that was."""
        told: dict[int, bool] = {probe.place: probe.good for probe in self.probes}
        if self._alike:
            told |= {place: answer for place in range(len(self.candidates)) if (answer := self.known(place)) is not None}
        bad = min((place for place, good in told.items() if not good), default=None)
        good = max((place for place, good in told.items() if good), default=None)
        if bad is None or good is None or bad > good:
            return ()
        return ((self.candidates[bad].reference, self.candidates[good].reference),)


def _searched(store: StateStore, looked: _Looking, spot_checks: int) -> Bisection:
    low, high = 0, len(looked.candidates) - 1
    looked.fetch([low, high])
    ends = (looked.is_good(low), looked.is_good(high))
    at_ends = len(looked.probes)
    if ends != (True, False):
        verdict: Verdict = "not_monotone" if ends == (False, True) else "never_bad" if ends[0] else "always_bad"
        _spot_check(looked, spot_checks)
        return _told(store, looked, verdict, at_ends, at_ends, None)
    while high - low > 1:
        middle = (low + high) // 2
        if looked.is_good(middle):
            low = middle
        else:
            high = middle
    searched = len(looked.probes)
    _spot_check(looked, spot_checks)
    return _told(store, looked, "found", at_ends, searched, high)


def _spot_check(looked: _Looking, count: int) -> None:
    """Looks at so many more, evenly spread over those of which nothing is known."""
    seen = {probe.place for probe in looked.probes}
    rest = [place for place in range(len(looked.candidates)) if place not in seen]
    for turn in range(min(count, len(rest))):
        looked.is_good(rest[turn * len(rest) // min(count, len(rest))])


def _through(store: StateStore, looked: _Looking) -> Bisection:
    """All of them, in their order."""
    answers: list[bool] = []
    for start in range(0, len(looked.candidates), _AT_A_TIME):
        places = range(start, min(start + _AT_A_TIME, len(looked.candidates)))
        looked.fetch(places)
        answers += [looked.is_good(place) for place in places]
        looked.forget()
    turns = [place for place, (before, after) in enumerate(pairwise(answers), 1) if before != after]
    first_bad = next((place for place in turns if not answers[place]), None)
    verdict: Verdict = "found" if first_bad is not None else "never_bad" if answers[0] else "not_monotone" if turns else "always_bad"
    return _told(store, looked, verdict, 0, len(looked.probes), first_bad, linear=True, turns=turns)


def _told(
    store: StateStore,
    looked: _Looking,
    verdict: Verdict,
    ends: int,
    searched: int,
    first_bad: int | None,
    *,
    linear: bool = False,
    turns: Sequence[int] = (),
) -> Bisection:
    candidates = looked.candidates
    bad, last_good = (None, None) if first_bad is None else (looked.seal(first_bad), looked.seal(first_bad - 1))
    return Bisection(
        verdict=verdict,
        predicate=looked.predicate.name,
        linear=linear,
        candidates=len(candidates),
        first=candidates[0],
        last=candidates[-1],
        first_bad=bad,
        last_good=last_good,
        changes=() if bad is None or last_good is None else changes(store, last_good, bad),
        against=looked.against(),
        turns=tuple(candidates[place].reference for place in turns),
        probes=tuple(looked.probes),
        ends=ends,
        searched=searched - ends,
        spot_checked=len(looked.probes) - searched,
        asked=looked.asked,
    )


# -- what changed --------------------------------------------------------------------------------------------------------------------


def changes(store: StateStore, before: Seal, after: Seal) -> tuple[Changed, ...]:
    """What was different when the second version was made: of its agent, which counts most, and of all agents above it, whose code or
    contract may be why an input is another. Of the inputs, which were read.
    """
    left, right = _lineages(store, before, after)
    found = [] if before.agent == after.agent else [Changed(after.agent, "agent", before.agent, after.agent)]
    for agent in dict.fromkeys([after.agent, *right, *left]):
        old, new = left.get(agent), right.get(agent)
        if old is not None and new is not None:
            facts = {what: (_text(old, field), _text(new, field)) for what, field in _FACTS.items()}
            found += [Changed(agent, what, *told) for what, told in facts.items() if told[0] != told[1]]
    old_inputs, new_inputs = ({parent.agent: parent for parent in seal.parents} for seal in (before, after))
    for agent in dict.fromkeys([*new_inputs, *old_inputs]):
        was, now = old_inputs.get(agent), new_inputs.get(agent)
        if was is None or now is None or was.digest != now.digest:
            found.append(Changed(agent, "input", _read(was), _read(now)))
    return tuple(found)


def _read(parent: Parent | None) -> str | None:
    return None if parent is None else f"{parent.workflow_id}@{parent.version}"


def _text(seal: Seal, field: str) -> str | None:
    value = getattr(seal, field)
    return None if value is None else str(value)


def _lineages(store: StateStore, *seals: Seal) -> list[dict[str, Seal]]:
    """Each version and all that it was made from, by agent, the nearest first; level by level, those of both in one read."""
    found: list[dict[str, Seal]] = [{seal.agent: seal} for seal in seals]
    level: list[list[Seal]] = [[seal] for seal in seals]
    while any(level):
        wanted = [{(parent.workflow_id, parent.version) for seal in side for parent in seal.parents} for side in level]
        read = store.seals_at(pair for side in wanted for pair in side)
        level = [[read[pair] for pair in sorted(side) if pair in read] for side in wanted]
        for lineage, side in zip(found, level, strict=True):
            for seal in side:
                lineage.setdefault(seal.agent, seal)
    return found
