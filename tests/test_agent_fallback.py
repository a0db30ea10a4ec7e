"""Fallbacks of agents: what is read from a policy, what is refused when the pipeline is built, and what of it is the agent's version."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import pytest
from pydantic import BaseModel

import dagster_mao as mao
from dagster_mao.agent import Agent, AgentContext, agent, current
from dagster_mao.errors import WiringError

CTX = AgentContext.for_tests()


class Application(BaseModel):
    application_id: Annotated[str, mao.Key]
    income: int


class Score(BaseModel):
    application_id: Annotated[str, mao.Key]
    score: int
    from_fallback: Annotated[bool, mao.FromFallback] = False


class Unsaid(BaseModel):
    application_id: Annotated[str, mao.Key]
    score: int


class Summary(BaseModel):
    text: str
    from_fallback: Annotated[bool, mao.FromFallback] = False


class Plain(BaseModel):
    text: str


class Other(BaseModel):
    other_id: Annotated[str, mao.Key]


def score(applications: Application, other: Other | None) -> Score:
    return Score(application_id=applications.application_id, score=applications.income)


def summary(applications: mao.DataFrame[Application]) -> mao.DataFrame[Summary]:
    return pl.DataFrame({"text": ["all"]})


def scoring(fallback: Any, function: Callable[..., Any] = score, **declared: Any) -> Agent:
    return agent(policy=mao.Policy(fallback=fallback), **declared)(function)


# -- what is read --------------------------------------------------------------------------------------------------------------------


def test_a_function_answers_with_a_part_of_what_execute_is_given() -> None:
    def refer(ctx: AgentContext, applications: Application, *, desk: list[str], limit: int = 3) -> Score:
        desk.append(applications.application_id)
        return Score(application_id=applications.application_id, score=limit)

    given = {"applications": Application(application_id="a", income=1), "other": None}
    one, desk = scoring(refer), list[str]()
    one.resolve()
    assert one.fallback
    assert one.fallback.call(CTX, given, {"desk": desk}).score == 3
    assert desk == ["a"]
    assert one.resources == ("desk",)
    assert one.call(None, given, {}).score == 1, "what only the fallback needs is no business of the agent's own"


def test_an_agent_answers_under_its_own_names() -> None:
    class Cautious(mao.Agent):
        ins = {"application": "applications"}

        def __init__(self, points: int = 0) -> None:
            self.points = points

        async def execute(self, application: Application) -> Score:
            return Score(application_id=application.application_id, score=self.points)

    def renamed(app: Application, other: Other | None) -> Score: ...

    for named, points in ((Cautious, 0), (Cautious(7), 7)):
        one = scoring(named, renamed, ins={"app": "applications"})
        assert one.fallback
        assert one.fallback.agent.is_async
        answer = one.fallback.call(None, {"app": Application(application_id="a", income=1), "other": None}, {})
        assert asyncio.run(answer).score == points


def test_a_function_knows_the_agents_parameters_by_the_agents_names() -> None:
    def renamed(app: Application) -> Score: ...
    def instead(app: Application) -> Score:
        return Score(application_id=app.application_id, score=2)

    one = scoring(instead, renamed, ins={"app": "applications"})
    assert one.fallback
    assert [i.upstream for i in one.fallback.agent.inputs] == ["applications"]


def test_a_fallback_without_inputs_answers_for_one_record_and_for_a_frame() -> None:
    def one_of_one(plain: Plain) -> Summary: ...
    def nothing() -> Summary:
        return Summary(text="none")

    async def later() -> Summary:
        return Summary(text="none")

    def no_frame() -> mao.LazyFrame[Summary]:
        return pl.LazyFrame({"text": ["none"]})

    for fallback in (nothing, later):
        one = scoring(fallback, one_of_one)
        assert one.fallback
        answer = one.fallback.call(None, {"plain": Plain(text="x")}, {})
        assert (asyncio.run(answer) if fallback is later else answer) == Summary(text="none")
    framed = scoring(no_frame, summary)
    framed.resolve()
    assert framed.fallback
    assert framed.fallback.call(None, {"applications": pl.DataFrame()}, {}).collect()["text"].item() == "none"


def test_an_entrys_fallback_brings_the_batch_in() -> None:
    def entry() -> list[Summary]: ...
    def instead() -> list[Summary]:
        return [Summary(text="yesterday's")]

    one = scoring(instead, entry)
    one.resolve()
    assert one.fallback
    assert one.fallback.call(None, {}, {}) == [Summary(text="yesterday's")]


# -- what is refused -----------------------------------------------------------------------------------------------------------------


def reads_more(applications: Application, fraud: Other) -> Score: ...
def reads_otherwise(applications: Other) -> Score: ...
def needs_what_may_be_missing(other: Other) -> Score: ...
def answers_otherwise(applications: Application) -> Unsaid: ...
def answers_many() -> list[Score]: ...
def unannotated(applications: Application):  # type: ignore[no-untyped-def]
    ...
def reads_a_frame(applications: mao.DataFrame[Application]) -> Score: ...


@agent(policy=mao.Policy(fallback=score))
def with_a_fallback(applications: Application) -> Score: ...


@pytest.mark.parametrize(
    ("fallback", "what"),
    [
        (reads_more, "reads 'fraud', which execute does not"),
        (reads_otherwise, "reads 'applications' as Other, execute as Application"),
        (needs_what_may_be_missing, "needs 'other', which may be missing"),
        (answers_otherwise, "answers Unsaid, not Score"),
        (answers_many, "another shape"),
        (unannotated, "no contract"),
        (reads_a_frame, "shapes"),
        (with_a_fallback, "has a fallback of its own"),
        (Score, "its fallback is Score"),
    ],
)
def test_a_fallback_that_does_not_fit_is_refused_when_the_pipeline_is_built(fallback: Any, what: str) -> None:
    with pytest.raises(WiringError, match=what) as refused:
        scoring(fallback).resolve()
    assert refused.value.fix
    assert "'score'" in str(refused.value)


def test_an_agent_that_is_its_own_fallback_is_refused() -> None:
    one = scoring(score)
    one.policy = mao.Policy(fallback=one)
    with pytest.raises(WiringError, match="a fallback of its own"):
        one.resolve()


def test_answers_of_a_fallback_must_be_told_apart() -> None:
    def unsaid(applications: Application) -> Unsaid: ...

    with pytest.raises(WiringError, match="nothing in Unsaid says which answers") as refused:
        scoring(answers_otherwise, unsaid).resolve()
    assert "mao.FromFallback" in str(refused.value.fix)
    assert (refused.value.agent, refused.value.field) == ("unsaid", "fallback")


class Grade(BaseModel):
    grade_id: Annotated[str, mao.Key]


def graded(applications: Application) -> Grade: ...
def grades(applications: mao.LazyFrame[Application]) -> mao.LazyFrame[Score]: ...
def entered() -> list[Score]: ...
def kept(applications: Application) -> Score: ...


@pytest.mark.parametrize(
    ("function", "what"),
    [
        (graded, "does not return the key it reads, 'application_id'"),
        (grades, "not called record by record"),
        (entered, "not called record by record"),
    ],
)
def test_only_records_that_can_be_told_apart_can_be_deferred(function: Callable[..., Any], what: str) -> None:
    policy = mao.Policy(breaker=mao.Breaker(), when_open="defer")
    with pytest.raises(WiringError, match=what) as refused:
        agent(policy=policy)(function).resolve()
    assert (refused.value.agent, refused.value.field) == (function.__name__, "when_open")
    agent(policy=policy)(kept).resolve()


# -- what it is part of --------------------------------------------------------------------------------------------------------------

SOURCE = """
def instead(applications: Application) -> Score:
    return Score(application_id=applications.application_id, score={points})
"""


def test_the_source_of_the_fallback_counts_in_the_version(tmp_path: Path) -> None:
    def loaded(name: str, points: int) -> Any:
        file = tmp_path / f"{name}.py"
        file.write_text(SOURCE.format(points=points))
        names: dict[str, Any] = {"Application": Application, "Score": Score}
        exec(compile(file.read_text(), str(file), "exec"), names)
        return names["instead"]

    one, same, other = loaded("one", 1), loaded("same", 1), loaded("other", 2)
    assert scoring(one).agent_version == scoring(same).agent_version != scoring(other).agent_version
    assert scoring(one).agent_version != agent()(score).agent_version
    assert scoring(one, version="3").agent_version == "3"


@agent
def elsewhere(applications: Application) -> Score: ...


def reaching(applications: Application) -> Score:
    return elsewhere(applications)


def test_a_fallback_that_reaches_for_another_agent_is_found_when_the_pipeline_is_built() -> None:
    @agent
    def applications() -> list[Application]:
        return []

    def scorer(applications: Application) -> Score: ...

    with pytest.raises(WiringError, match="reaches for 'elsewhere'"):
        mao.Pipeline("credit", entry=applications, agents=[scoring(reaching, scorer), elsewhere])


@pytest.mark.parametrize(("suffix", "what"), [("calls", "table of calls"), ("deferred", "deferred records")])
def test_no_agent_has_the_name_of_what_lies_beside_another(suffix: str, what: str) -> None:
    @agent
    def applications() -> list[Application]:
        return []

    beside = agent(name=f"applications_{suffix}")(kept)
    with pytest.raises(WiringError, match=f"the name of the {what} of 'applications'"):
        mao.Pipeline("credit", entry=applications, agents=[beside])


def test_what_a_fallback_shares_by_name_it_declares_alike() -> None:
    @agent
    def applications() -> list[Application]:
        return []

    other = agent(name="other", policy=mao.Policy(breaker=mao.Breaker(fail_max=2, name="bureau")))(kept)
    policy = mao.Policy(breaker=mao.Breaker(name="bureau"), fallback=other)
    with pytest.raises(WiringError, match="'bureau' and declare it differently"):
        mao.Pipeline("credit", entry=applications, agents=[agent(policy=policy)(kept)])


# -- who executes --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_client_finds_out_for_which_call_it_works(is_async: bool) -> None:
    seen: list[Any] = []

    def sync(applications: Application) -> Score:
        seen.append(current())
        return Score(application_id="a", score=1)

    async def asynchronous(applications: Application) -> Score:
        await asyncio.sleep(0)
        return sync(applications)

    one = agent(name="scorer")(asynchronous if is_async else sync)
    context = CTX.of_call("a", "f" * 64)
    answer = one.call(context, {"applications": Application(application_id="a", income=1)}, {})
    if is_async:
        asyncio.run(answer)
    assert seen == [(one, context)]
    assert seen[0][1].idempotency_key == "f" * 64
    assert current() == (None, None)


def test_a_client_finds_out_while_a_generator_is_read() -> None:
    @agent
    def entry() -> list[Application]:
        for name in "ab":
            assert current() == (entry, CTX)
            yield Application(application_id=name, income=1)

    records = entry.call(CTX, {}, {})
    assert current() == (None, None)
    assert len(list(records)) == 2


def test_the_context_of_a_call_travels_to_other_processes() -> None:
    context = CTX.of_call("é\n", "a" * 64)
    assert pickle.loads(pickle.dumps(context)) == context  # noqa: S301
    assert (context.record, context.now, context.random("x").random()) == ("é\n", CTX.now, CTX.random("x").random())
    assert (CTX.record, CTX.idempotency_key) == (None, "0" * 64)
