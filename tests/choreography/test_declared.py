"""What choreography asks of a pipeline is said at load (law 9)."""

from __future__ import annotations

from typing import Annotated, Any

import pytest
from pydantic import BaseModel

import dagster_mao as mao


class Application(BaseModel):
    application_id: Annotated[str, mao.Key]
    amount: float


class Risk(BaseModel):
    application_id: Annotated[str, mao.Key]
    risk: float


class Notice(BaseModel):
    application_id: Annotated[str, mao.Key]
    text: str


class Keyless(BaseModel):
    amount: float


@mao.agent
def applications() -> list[Application]:
    return []


@mao.agent(quarantine=mao.Quarantine(max_share=1))
def events() -> list[Application]:
    return []


@mao.agent
def risk(applications: Application) -> Risk:
    return Risk(application_id=applications.application_id, risk=0.5)


@mao.agent
def notify(risk: Risk) -> Notice:
    return Notice(application_id=risk.application_id, text="told")


class Booking(mao.Agent):
    """It has something to undo."""

    effects = "reversible"

    def execute(self, risk: Risk) -> Notice:
        return Notice(application_id=risk.application_id, text="booked")

    def compensate(self, undo: Any) -> None: ...


def test_the_mode_is_orchestration_unless_it_is_said() -> None:
    assert mao.Pipeline("loans", entry=applications, agents=[risk]).mode == "orchestration"
    assert mao.Pipeline("loans", entry=applications, agents=[risk], mode="hybrid").mode == "hybrid"


def test_the_same_agents_are_wired_in_every_mode() -> None:
    modes: list[Any] = ["orchestration", "choreography", "hybrid"]
    orders = {mao.Pipeline("loans", entry=applications, agents=[notify, risk], mode=mode).order for mode in modes}
    assert orders == {("applications", "risk", "notify")}


def test_a_pipeline_that_listens_has_the_agents_of_its_own_only() -> None:
    pipeline = mao.Pipeline("loans", listens={"risk": Risk}, agents=[notify], mode="choreography")
    assert pipeline.order == ("notify",)
    assert (pipeline.entry_name, list(pipeline.listens)) == ("", ["risk"])
    assert [i.upstream for i in pipeline.inputs_of("notify")] == ["risk"]
    with pytest.raises(mao.WiringError, match="no entry here"):
        _ = pipeline.entry


class Narrow(BaseModel):
    application_id: Annotated[str, mao.Key]
    verdict: str


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "mode": ({"entry": applications, "agents": [risk], "mode": "chaos"}, "the mode 'chaos'", "mode"),
    "neither": ({"agents": [risk]}, "neither an entry nor anything to listen to", "entry"),
    "both": (
        {"entry": applications, "listens": {"risk": Risk}, "agents": [notify], "mode": "hybrid"},
        "has an entry, and listens",
        "entry",
    ),
    "orchestrated": ({"listens": {"risk": Risk}, "agents": [notify]}, "which orchestration cannot", "listens"),
    "name": ({"listens": {"No Name": Risk}, "agents": [notify], "mode": "hybrid"}, "no name of an agent", "listens"),
    "contract": ({"listens": {"risk": Narrow}, "agents": [notify], "mode": "hybrid"}, "cannot read 'risk' as Risk", "risk"),
    "not there": ({"listens": {"rick": Risk}, "agents": [notify], "mode": "hybrid"}, "'risk', which is no agent of it", "risk"),
    "elsewhere": ({"entry": applications, "agents": [risk], "elsewhere": ["notify"]}, "agents elsewhere that an attempt", "elsewhere"),
    "elsewhere of a listener": (
        {"listens": {"risk": Risk}, "agents": [notify], "mode": "hybrid", "elsewhere": ["letter"]},
        "agents elsewhere that an attempt",
        "elsewhere",
    ),
    "elsewhere and here": (
        {"entry": applications, "agents": [risk], "mode": "hybrid", "elsewhere": ["risk"]},
        "has 'risk' here, and says that it is elsewhere",
        "elsewhere",
    ),
    "elsewhere without a name": (
        {"entry": applications, "agents": [risk], "mode": "hybrid", "elsewhere": ["No Name"]},
        "no name of an agent",
        "elsewhere",
    ),
    "effects": (
        {"entry": applications, "agents": [risk, Booking], "mode": "choreography"},
        "'booking' has side effects, which plain choreography cannot undo",
        "mode",
    ),
    "inbox": ({"entry": applications, "agents": [risk], "inbox": mao.MicroBatch()}, "a bad event would hold up the others", "inbox"),
    "inbox elsewhere": (
        {"listens": {"risk": Risk}, "agents": [notify], "mode": "hybrid", "inbox": mao.MicroBatch()},
        "an inbox and no entry",
        "inbox",
    ),
    "inbox without a key": (
        {"entry": mao.ExternalEntry("events", contract=Keyless), "inbox": mao.MicroBatch()},
        "no key to know an event by",
        "inbox",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wired_wrongly_is_said_at_load(case: str) -> None:
    declared, what, field = WRONG[case]
    with pytest.raises(mao.WiringError, match=what) as caught:
        mao.Pipeline("loans", **declared)
    assert caught.value.field == field
    assert caught.value.fix


def test_side_effects_are_welcome_where_they_can_be_undone() -> None:
    for mode in ("orchestration", "hybrid"):
        mao.Pipeline("loans", entry=applications, agents=[risk, Booking], mode=mode)


def test_an_inbox_needs_an_entry_that_sets_bad_events_aside() -> None:
    pipeline = mao.Pipeline("loans", entry=events, inbox=mao.MicroBatch(size=10, wait=1))
    assert pipeline.inbox == mao.MicroBatch(size=10, wait=1)


@pytest.mark.parametrize("wrong", [{"size": 0}, {"size": True}, {"size": 2.5}, {"wait": -1}, {"wait": float("inf")}, {"redeliveries": -1}])
def test_a_micro_batch_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(mao.WiringError) as caught:
        mao.MicroBatch(**wrong)
    assert caught.value.field == next(iter(wrong))


def test_an_agent_says_its_own_micro_batch() -> None:
    mine = mao.agent(micro_batch=mao.MicroBatch(size=3))(risk._function)
    assert mine.micro_batch == mao.MicroBatch(size=3)
    wrong = mao.agent(micro_batch=3)(risk._function)  # type: ignore[call-overload]
    with pytest.raises(mao.WiringError, match="`micro_batch` is 3"):
        mao.Pipeline("loans", entry=applications, agents=[wrong])
