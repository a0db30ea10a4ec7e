"""What an agent declares of its effects is judged when the pipeline is built."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import pytest
from pydantic import BaseModel

import dagster_mao as mao


class Application(BaseModel):
    id: Annotated[str, mao.Key]


@mao.agent
def applications() -> list[Application]:
    raise NotImplementedError


def undo_it(undo: mao.Undo) -> None: ...


def act(applications: Application) -> Application:
    return applications


def letters(act: Application) -> Application:
    return act


def build(*agents: Any) -> mao.Pipeline:
    return mao.Pipeline("loans", entry=applications, agents=agents)


def test_the_kind_follows_from_compensate() -> None:
    class Acting(mao.Agent):
        def execute(self, applications: Application) -> Application:
            return applications

        async def compensate(self, undo: mao.Undo, *, bank: Any, limit: int = 3) -> None: ...

    class Reading(mao.Agent):
        def execute(self, acting: Application) -> Application:
            return acting

    pipeline = build(Acting, Reading)
    assert [pipeline.node(name).effects for name in pipeline.order] == ["read_only", "reversible", "read_only"]
    assert pipeline.node("acting").undo_resources == ("bank",)
    assert mao.agent(compensate=undo_it)(act).effects == "reversible"


def yielding(undo: mao.Undo) -> Any:
    yield


def with_inputs(undo: mao.Undo, applications: Application) -> None: ...


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"effects": "read_only", "compensate": undo_it}, "compensate", "read-only"),
    ({"effects": "reversible"}, "compensate", "has no compensate"),
    ({"effects": "irreversible", "compensate": undo_it}, "compensate", "irreversible"),
    ({"effects": "some"}, "effects", "'some'"),
    ({"irreversible_because": "it is"}, "irreversible_because", "says nothing"),
    ({"effects": "irreversible", "irreversible_because": " "}, "irreversible_because", "says nothing"),
    ({"undo_policy": mao.Policy()}, "undo_policy", "no compensate"),
    ({"compensate": undo_it, "undo_policy": 3}, "undo_policy", "is 3"),
    ({"compensate": undo_it, "undo_policy": mao.Policy(when_open="fail")}, "undo_policy", "when_open"),
    ({"compensate": undo_it, "undo_policy": mao.Policy(timeout=1, isolate=True)}, "undo_policy", "isolate"),
    ({"compensate": 3}, "compensate", "is 3"),
    ({"compensate": yielding}, "compensate", "generator"),
    ({"compensate": with_inputs}, "compensate", "something else"),
]


@pytest.mark.parametrize(("declared", "field", "what"), WRONG)
def test_what_does_not_fit_together_fails_at_load(declared: dict[str, Any], field: str, what: str) -> None:
    with pytest.raises(mao.WiringError, match=what) as wrong:
        build(mao.agent(**declared)(act))
    assert (wrong.value.agent, wrong.value.field) == ("act", field)
    assert wrong.value.fix


def test_what_cannot_be_undone_comes_last_or_says_why_not() -> None:
    def pivot(**declared: Any) -> Callable[..., Any]:
        return mao.agent(effects="irreversible", **declared)

    build(act_agent := mao.agent(compensate=undo_it)(act), pivot()(letters))
    with pytest.raises(mao.WiringError, match="'letters' may fail after it") as wrong:
        build(pivot()(act), mao.agent(letters))
    assert (wrong.value.agent, wrong.value.field) == ("act", "effects")

    def aside(applications: Application) -> Application:
        return applications

    with pytest.raises(mao.WiringError, match="'aside' may fail after it"):
        build(act_agent, mao.agent(aside), pivot()(letters))
    build(act_agent, mao.agent(aside), pivot(irreversible_because="a letter that need not have been sent does no harm")(letters))


def test_a_read_only_agent_has_no_effects(tmp_path: Any) -> None:
    @mao.agent
    def sly(ctx: mao.AgentContext, applications: Application) -> Application:
        ctx.effect("funds", lambda effect: None)
        return applications

    with pytest.raises(mao.WiringError, match="is read-only") as wrong:
        mao.run(build(sly), [{"id": "A1"}], store=mao.StateStore(tmp_path))
    assert (wrong.value.agent, wrong.value.field) == ("sly", "effects")
