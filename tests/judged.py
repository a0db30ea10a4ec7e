"""A pipeline whose answers are judged: complaints, and replies to them. The judge is a function, or whoever is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel

import dagster_mao as mao

SECRET = "Zaphod-Beeblebrox"


class Complaint(BaseModel):
    number: Annotated[str, mao.Key]
    name: Annotated[str, mao.Personal]
    text: str


class Reply(BaseModel):
    number: Annotated[str, mao.Key]
    to: Annotated[str, mao.Personal]
    text: str


COMPLAINTS = [Complaint(number=f"c{n}", name=f"{SECRET}-{n}", text=f"It broke, {n} times.") for n in range(12)]


class Asked:
    """A judge that notes what it is sent. `says` answers by record and by how often it was asked about it."""

    def __init__(self, says: Callable[[str, int], bool] = lambda record, time: True) -> None:
        self.says = says
        self.sent: list[Mapping[str, Any]] = []

    def __call__(self, rubric: str, case: Mapping[str, Any]) -> mao.Verdict:
        self.sent.append(case)
        record = case["said"]["number"]
        passed = self.says(record, self.count(record))
        mao.usage(input_tokens=100, output_tokens=10, cost=0.5, model="small-judge")
        return mao.Verdict(reason=f"Number {record} {'is' if passed else 'is not'} polite.", passed=passed, score=0.9 if passed else 0.3)

    def count(self, record: str) -> int:
        return sum(case["said"]["number"] == record for case in self.sent)

    @property
    def records(self) -> list[str]:
        return [case["said"]["number"] for case in self.sent]


def replies(*judges: mao.Judge, says: Callable[[Complaint], str] = lambda one: f"Sorry, {one.number}.", **declared: Any) -> mao.Agent:
    """The agent that is judged."""

    @mao.agent(name="replies", judges=judges, **declared)
    def agent(complaints: Complaint) -> Reply:
        return Reply(number=complaints.number, to=complaints.name, text=says(complaints))

    return agent


@mao.agent
def complaints() -> list[Complaint]:
    return COMPLAINTS


def desk(*judges: mao.Judge, **declared: Any) -> mao.Pipeline:
    return mao.Pipeline("desk", entry=complaints, agents=[replies(*judges, **declared)])


def polite(ask: Any = None, **declared: Any) -> mao.Judge:
    """A judge that is a function, and that nobody's breaker keeps from answering."""
    if ask is not None:
        declared = {"ask": ask, "policy": mao.Policy(), **declared}
    return mao.Judge("polite", **{"rubric": "The reply is polite.", **declared})


def check_of(result: mao.Result, name: str = "judge_polite") -> Any:
    return next(check for check in result.checks["replies"] if check.name == name)
