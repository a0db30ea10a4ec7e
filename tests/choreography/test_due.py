"""What is due is told by the log alone: whatever comes in whatever order, nothing twice, nothing of two entries."""

from __future__ import annotations

import datetime as dt

from hypothesis import given
from hypothesis import strategies as st

from dagster_mao.choreography._due import Brief, Standing, Subscriber, standing

_NOW = dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc)
READS = {"score": ("entry",), "income": ("entry",), "risk": ("income", "score"), "approval": ("entry", "risk")}


def subscriber(agent: str) -> Subscriber:
    return Subscriber("loans", agent, READS[agent], (agent,))


class Log:
    """The seals of one workflow, written by hand."""

    def __init__(self) -> None:
        self.seals: list[Brief] = []

    def add(self, agent: str, *parents: int, attempt: str = "a", kind: str | None = None) -> int:
        kind = kind or ("entry" if agent == "entry" else "output")
        version = len(self.seals)
        self.seals.append(Brief(version, kind, agent, attempt, parents, f"d{version}", _NOW + dt.timedelta(seconds=version)))
        return version

    def fence(self, attempt: str) -> None:
        self.add("", attempt=attempt, kind="fence")

    def stands(self, agent: str) -> Standing:
        return standing("loans/day", self.seals, subscriber(agent))

    def due(self, agent: str) -> tuple[int, ...] | None:
        found = self.stands(agent).due
        return found.versions if found else None


def test_an_agent_is_due_once_all_that_it_reads_is_there_until_it_has_sealed() -> None:
    log = Log()
    assert log.stands("score") == Standing()
    entry = log.add("entry")
    assert (log.due("score"), log.due("risk")) == ((0,), None)
    score = log.add("score", entry)
    assert log.due("score") is None
    stands = log.stands("risk")
    assert (stands.due, stands.missing, stands.since) == (None, ("income",), _NOW + dt.timedelta(seconds=1))
    income = log.add("income", entry)
    assert log.due("risk") == (income, score)
    log.add("risk", income, score)
    assert log.due("risk") is None
    assert log.due("approval") == (0, 3)


def test_what_was_sealed_again_is_due_again_downstream() -> None:
    log = Log()
    log.add("entry")
    log.add("score", 0)
    log.add("income", 0)
    log.add("risk", 2, 1)
    log.add("score", 0)
    assert log.due("risk") == (2, 4)
    assert len(log.stands("risk").done) == 1


def test_a_later_entry_supersedes_all_that_descends_from_the_earlier() -> None:
    log = Log()
    log.add("entry")
    log.add("score", 0)
    log.add("income", 0)
    log.add("entry", attempt="b")
    assert log.due("risk") is None  # of the first entry nobody needs it any more
    assert log.stands("risk") == Standing()
    late = log.add("income", 0)  # was under way
    assert log.due("risk") is None
    assert log.due("income") == (3,)
    log.add("income", 3, attempt="b")
    log.add("score", 3, attempt="b")
    assert log.due("risk") == (5, 6)
    assert late not in (5, 6)


def test_the_attempt_is_that_of_the_entry_whoever_sealed_what_is_read() -> None:
    log = Log()
    log.add("entry", attempt="a")
    log.add("score", 0, attempt="by hand")
    log.add("income", 0, attempt="a")
    found = log.stands("risk").due
    assert found is not None
    assert found.attempt == "a"


def test_a_fence_takes_everything_of_its_attempt_and_gives_back_what_was_before() -> None:
    log = Log()
    log.add("entry", attempt="a")
    log.add("score", 0, attempt="a")
    log.add("entry", attempt="b")
    log.add("score", 2, attempt="b")
    log.add("income", 2, attempt="b")
    log.fence("b")
    assert log.due("risk") is None
    assert log.due("income") == (0,)
    assert log.due("score") is None
    log.fence("a")
    assert log.stands("income") == Standing()
    log.add("entry", attempt="c")
    assert log.due("score") == (7,)


def test_what_descends_from_no_entry_concerns_nobody() -> None:
    log = Log()
    log.add("score")
    log.add("", kind="disposition")
    assert log.stands("risk") == Standing()


def test_the_deliveries_of_two_workflows_and_of_two_versions_are_told_apart() -> None:
    log = Log()
    log.add("entry")
    one, other = (standing(name, log.seals, subscriber("score")).due for name in ("loans/a", "loans/b"))
    assert one is not None
    assert other is not None
    assert one.digest != other.digest
    changed = [log.seals[0]._replace(digest="another")]
    again = standing("loans/a", changed, subscriber("score")).due
    assert again is not None
    assert again.digest != one.digest


@given(st.lists(st.tuples(st.sampled_from(["entry", "fence", *READS]), st.integers(0, 5)), max_size=25))
def test_whatever_happens_all_parents_are_of_the_last_entry_and_nothing_is_due_twice(happenings: list[tuple[str, int]]) -> None:
    """Agents seal what is due, sometimes what was due a while ago; entries and fences come between."""
    log, attempts = Log(), 0
    remembered: dict[str, list[tuple[int, ...]]] = {agent: [] for agent in READS}
    for what, choice in happenings:
        if what == "entry":
            attempts += 1
            log.add("entry", attempt=f"attempt-{attempts}")
        elif what == "fence":
            log.fence(f"attempt-{choice}")
        elif remembered[what]:
            parents = remembered[what][-1 - choice % len(remembered[what])]
            log.add(what, *parents, attempt=_entry_of(log, parents[0]).attempt)
        fenced = {seal.attempt for seal in log.seals if seal.kind == "fence"}
        entries = [seal for seal in log.seals if seal.kind == "entry" and seal.attempt not in fenced]
        for agent, reads in READS.items():
            found = log.stands(agent).due
            if found is None:
                continue
            assert {_entry_of(log, version) for version in found.versions} == {entries[-1]}
            assert [log.seals[version].agent for version in found.versions] == sorted(reads)
            mine = [seal for seal in log.seals if seal.agent == agent and seal.attempt not in fenced]
            assert found.versions not in [seal.parents for seal in mine]
            remembered[agent].append(found.versions)


def _entry_of(log: Log, version: int) -> Brief:
    seal = log.seals[version]
    return seal if seal.kind == "entry" else _entry_of(log, seal.parents[0])
