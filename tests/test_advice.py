"""Which pattern suits a pipeline, by the matrix: the same agents are advised by what is asked of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

import dagster_mao as mao
from assets.pipeline import credit
from tests.choreography.loans import AGENTS, Application, Decision, Score, elsewhere, loans
from tests.choreography.test_declared import Booking
from tests.choreography.test_declared import applications as plain
from tests.choreography.test_declared import risk as rating

SCORE = AGENTS[0]
EVENTS = mao.MicroBatch()


def simple(**declared: Any) -> mao.Pipeline:
    """One agent that nobody waits for."""
    return loans(declared.pop("mode", "orchestration"), agents=[SCORE], **declared)


def booking(**declared: Any) -> mao.Pipeline:
    return mao.Pipeline("loans", entry=plain, agents=[rating, Booking], **declared)


MATRIX: dict[str, tuple[mao.Pipeline, str, str]] = {
    "simple, nothing asked": (simple(), "orchestration", "stay as they are"),
    "simple, autonomous": (simple(needs="autonomy"), "choreography", "changed independently"),
    "simple, events": (simple(inbox=EVENTS), "choreography", "into an inbox"),
    "simple, elsewhere": (elsewhere(), "choreography", "run elsewhere: approval"),
    "simple, audits": (simple(needs=["audit"]), "orchestration", "who decided"),
    "simple, events, audits": (simple(inbox=EVENTS, needs=["audit"]), "orchestration", "an inbox is cut into runs"),
    "simple, autonomous, rollback": (simple(needs=["autonomy", "rollback"]), "hybrid", "it needs rollback"),
    "complex, nothing asked": (loans("choreography"), "orchestration", "risk wait for several agents"),
    "complex, autonomous": (loans(needs=["autonomy"]), "hybrid", "a saga over them"),
    "effects": (booking(), "orchestration", "have to be undone when it fails: booking"),
    "effects, autonomous": (booking(needs=["autonomy"]), "hybrid", "have to be undone"),
    "the reference project": (credit, "orchestration", "risk_assessment"),
}


@pytest.mark.parametrize("case", MATRIX)
def test_the_matrix(case: str) -> None:
    pipeline, pattern, reason = MATRIX[case]
    advice = mao.advise(pipeline)
    assert (advice.pattern, advice.declared) == (pattern, pipeline.mode)
    assert any(reason in one for one in advice.reasons), advice.reasons
    declared = [one for one in advice.missing if one.startswith("mode=")]
    assert bool(declared) is (pattern != pipeline.mode)


def test_five_agents_have_ten_possible_connections() -> None:
    advice = mao.advise(credit)
    assert (advice.agents, advice.connections, advice.possible) == (5, 4, 10)
    assert advice.reasons[0] == "5 agents have 4 of 10 possible connections"


def test_several_owners_are_asked_whether_they_are_autonomous() -> None:
    @mao.agent(name="score", owners=["team:bureau"])
    def theirs(applications: Application) -> Score:
        return Score(id=applications.id, score=1.0)

    @mao.agent(owners=["team:credit"])
    def decide(score: Score) -> Decision:
        return Decision(id=score.id, approved=True)

    advice = mao.advise(loans("orchestration", agents=[theirs, decide]))
    assert advice.pattern == "orchestration"
    assert advice.reasons[-1] == 'its agents have 2 owners: where these change them independently, say needs="autonomy"'
    assert mao.advise(loans(agents=[theirs, decide], needs=["autonomy"])).pattern == "choreography"


def test_a_long_chain_is_complex() -> None:
    def agent(name: str, upstream: str) -> Any:
        return mao.agent(name=name, ins={"score": upstream})(_passed)

    three = [SCORE, agent("second", "score"), agent("third", "second")]
    assert mao.advise(loans(agents=three, needs=["autonomy"])).pattern == "choreography"
    assert mao.advise(loans(agents=[*three, agent("fourth", "third")], needs=["autonomy"])).pattern == "hybrid"


def _passed(score: Score) -> Score:
    return score


def test_what_is_missing_is_said_by_agent() -> None:
    missing = "\n".join(mao.advise(loans("choreography", needs=["autonomy", "audit", "rollback"])).missing)
    assert 'mode="hybrid"' in missing
    assert "score, income, risk, approval: owners" in missing
    assert "score, income, risk, approval: a policy with a timeout" in missing
    assert "a version= of its own" in missing
    assert "no agent declares effects" in missing
    assert "quarantine" not in missing  # it has one
    assert "a quarantine at the entry applications" in "\n".join(mao.advise(booking(needs=["autonomy"])).missing)
    assert "booking: a policy with a timeout: until when" in "\n".join(mao.advise(booking()).missing)


def test_what_lacks_nothing_is_told_so() -> None:
    @mao.agent(name="score", owners=["team:credit"], policy=mao.Policy(timeout=30))
    def whole(applications: Application) -> Score:
        return Score(id=applications.id, score=1.0)

    advice = mao.advise(loans("choreography", agents=[whole], needs=["autonomy"]))
    assert (advice.pattern, advice.missing) == ("choreography", ())
    assert advice.as_markdown().startswith("**choreography** (as it is declared)\n\n- 1 agents have 0 of 0")
    assert "Missing" not in advice.as_markdown()


def test_it_is_told_as_a_page_and_as_plain_values() -> None:
    advice = mao.advise(loans("choreography"))
    page = advice.as_markdown()
    assert page.startswith("**orchestration** (declared is choreography)")
    assert "Missing for it:" in page
    assert json.loads(json.dumps(advice.as_json())) == advice.as_json()


def test_what_nobody_can_need_is_said_at_load() -> None:
    with pytest.raises(mao.WiringError, match="needs 'speed'") as caught:
        loans(needs=["speed"])
    assert caught.value.field == "needs"
    with pytest.raises(mao.WiringError, match="needs 'audits'"):
        loans(needs="audits")
