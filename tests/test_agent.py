"""Agents: what is read from a declaration, what is refused, how they are called, what their version covers, and that they call no one."""

import asyncio
import concurrent.futures
import contextvars
import dataclasses
import datetime as dt
import functools
import importlib.util
import multiprocessing
import pickle
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Optional

import pytest
from pydantic import BaseModel

import dagster_mao as mao
from dagster_mao.agent import Agent, AgentContext, Shape, agent
from dagster_mao.errors import AgentCallError, WiringError

CTX = AgentContext.for_tests()


class Application(BaseModel):
    application_id: Annotated[str, mao.Key]
    income: int


class Score(BaseModel):
    application_id: Annotated[str, mao.Key]
    score: int


class Fraud(BaseModel):
    application_id: Annotated[str, mao.Key]
    flagged: bool


class Summary(BaseModel):
    text: str


APPLICATION = Application(application_id="a/../'1'", income=10)


@agent
def application() -> list[Application]:
    """The applications of the day."""
    return [APPLICATION]


@agent(owners=["team:risk"], kinds=["rules"], tags={"tier": "1"}, pool="bureau", model="m-1", concurrency=3)
def credit_score(application: Application) -> Score:
    """Scores.

    By income.
    """
    return Score(application_id=application.application_id, score=application.income)


class FraudDetection(Agent):
    """Flags."""

    limit = 5

    async def execute(self, ctx: AgentContext, application: Application, *, bureau: Any, depth: int = 2) -> Fraud:
        return Fraud(application_id=application.application_id, flagged=bureau(application.income) > self.limit)


class NestedReach(Agent):
    """Law 10's culprit: reaches for another agent in whatever way it is told."""

    def __init__(self, reach: Any) -> None:
        self.reach = reach

    def execute(self, application: Application) -> Score:
        return self.reach(application)


# -- what is read ---------------------------------------------------------------------------------------------------------------------


def test_a_function_is_read():
    assert (credit_score.name, credit_score.description) == ("credit_score", "Scores.\n\nBy income.")
    (read,) = credit_score.inputs
    assert (read.parameter, read.upstream, read.shape, read.required) == ("application", "application", Shape.RECORD, True)
    assert read.contract.model is Application
    assert credit_score.output.model is Score
    assert credit_score.output_shape is Shape.RECORD
    assert not credit_score.is_entry
    assert not credit_score.is_async
    assert not credit_score.takes_context
    assert (credit_score.owners, credit_score.kinds, credit_score.tags) == (["team:risk"], ["rules"], {"tier": "1"})
    assert (credit_score.pool, credit_score.model, credit_score.concurrency) == ("bureau", "m-1", 3)


def test_a_class_is_read():
    fraud = FraudDetection()
    assert (fraud.name, fraud.description) == ("fraud_detection", "Flags.")
    assert [read.parameter for read in fraud.inputs] == ["application"]
    assert fraud.takes_context
    assert fraud.is_async
    assert fraud.output.model is Fraud


def test_keyword_only_parameters_are_resources_and_those_with_a_default_are_constants():
    assert FraudDetection().resources == ("bureau",)


@pytest.mark.parametrize("name", ["KYCCheck", "Kyc_Check", "kyc_check"])
def test_a_class_gets_a_name_in_snake_case(name):
    assert type(name, (Agent,), {}).name == "kyc_check"


def test_a_subclass_inherits_neither_name_nor_description():
    class Deeper(FraudDetection):
        pass

    assert (Deeper.name, Deeper.description) == ("deeper", None)
    assert [read.upstream for read in Deeper().inputs] == ["application"]


def test_ins_renames():
    @agent(ins={"app": "application"})
    def scorer(app: Application) -> Score: ...

    assert [(read.parameter, read.upstream) for read in scorer.inputs] == [("app", "application")]


def test_an_optional_upstream_is_not_required():
    @agent
    def approval(a: Score, b: Fraud | None, c: Optional[Application] = None) -> Score: ...  # noqa: UP045

    assert [read.required for read in approval.inputs] == [True, False, False]


def test_frames_are_read():
    @agent
    def risk(a: mao.LazyFrame[Score], b: mao.DataFrame[Fraud] | None) -> mao.LazyFrame[Score]: ...

    assert [(read.shape, read.required) for read in risk.inputs] == [(Shape.LAZYFRAME, True), (Shape.DATAFRAME, False)]
    assert risk.output_shape is Shape.LAZYFRAME


@pytest.mark.parametrize("returned", [list[Application], Iterator[Application], tuple[Application, ...], Application])
def test_an_entry_returns_records(returned):
    @agent
    def entry() -> returned: ...

    assert entry.is_entry
    assert (entry.output_shape, entry.output.model) == (Shape.RECORD, Application)


@pytest.mark.parametrize("future", ["", "from __future__ import annotations"])
def test_annotations_are_read_with_and_without_postponed_evaluation(future, tmp_path):
    module = _module(
        tmp_path,
        f"agents_{len(future)}",
        f"""
        {future}
        from typing import TYPE_CHECKING, Annotated
        import dagster_mao as mao
        from dagster_mao import AgentContext as Context
        from pydantic import BaseModel
        if TYPE_CHECKING:
            from nowhere import Bank

        @mao.agent
        def early(context: "Context", later: "mao.LazyFrame[Later]", *, bank: "Bank") -> "mao.LazyFrame[Later] ": ...

        class Later(BaseModel):
            key: Annotated[int, mao.Key]

        def make():
            class Inner(BaseModel):
                key: Annotated[int, mao.Key]

            @mao.agent
            def inner(ctx: mao.AgentContext, later: Later, inner_too: Inner | None) -> Inner: ...

            class Formal(mao.Agent):
                def execute(self, later: Inner) -> Inner: ...

            return inner, Formal()
        """,
    )
    inner, formal = module.make()
    assert [read.contract.name for read in inner.inputs] == ["Later", "Inner"]
    assert inner.output.name == formal.output.name == "Inner"
    assert inner.takes_context
    assert module.early.output.model is module.Later
    assert module.early.takes_context
    assert module.early.resources == ("bank",)


def test_a_decorated_function_and_a_dataclass_are_agents_too():
    def doubled(function):
        @functools.wraps(function)
        def twice(*args):
            return function(*args).model_copy(update={"score": 2 * function(*args).score})

        return twice

    @agent
    @doubled
    def scorer(application: Application) -> Score:
        return Score(application_id=application.application_id, score=3)

    @dataclasses.dataclass(frozen=True)
    class Limited(Agent):
        limit: int

        def execute(self, application: "Application") -> "Score":
            return Score(application_id=application.application_id, score=self.limit)

    assert [scorer.call(None, {"application": APPLICATION}, {}).score, scorer.output.model] == [6, Score]
    limited = Limited(7)
    limited.resolve()
    assert limited.call(None, {"application": APPLICATION}, {}).score == 7
    assert limited.agent_version == Limited(7).agent_version != Limited(8).agent_version


# -- what is refused: agent, field and fix --------------------------------------------------------------------------------------------


def no_annotation(application) -> Score: ...
def no_return(application: Application): ...
def plain_type(application: Application, threshold: float = 0.5) -> Score: ...
def unknown_name(application: "Aplication") -> Score: ...  # noqa: F821
def mixed(application: Application, score: mao.LazyFrame[Score]) -> Score: ...
def frame_from_records(application: Application) -> mao.LazyFrame[Score]: ...
def records_from_frame(application: mao.LazyFrame[Application]) -> Score: ...
def many_from_one(application: Application) -> list[Score]: ...
def list_of_records(application: list[Application]) -> Score: ...
def maybe_nothing(application: Application) -> Score | None: ...
def keyless_per_record(application: Application) -> Summary: ...
def variadic(application: Application, *more: Score) -> Score: ...
def nothing_required(application: Application | None) -> Score: ...
def bare_frame(application: mao.LazyFrame) -> mao.LazyFrame[Score]: ...
def useless_default(application: Application = APPLICATION) -> Score: ...
def reads_everything(application: Application, *, state_store: Any) -> Score: ...
async def async_generator() -> Iterator[Application]:
    yield APPLICATION


def LoudName(application: Application) -> Score: ...


@pytest.mark.parametrize(
    ("function", "field", "fix"),
    [
        (no_annotation, "application", "pydantic model"),
        (no_return, "return", "pydantic model"),
        (plain_type, "threshold", "keyword-only"),
        (unknown_name, "application", "module level"),
        (mixed, "application", "mao.LazyFrame[Application]"),
        (frame_from_records, "return", "return Score"),
        (records_from_frame, "return", "mao.LazyFrame[Score]"),
        (many_from_one, "return", "return Score"),
        (list_of_records, "application", "mao.DataFrame[Application]"),
        (maybe_nothing, "return", "Score"),
        (keyless_per_record, "return", "mao.Key"),
        (variadic, "more", "every upstream"),
        (nothing_required, "application", "| None"),
        (bare_frame, "application", "mao.LazyFrame[Model]"),
        (useless_default, "application", "Application | None"),
        (reads_everything, "state_store", "parameter"),
        (async_generator, "return", "list"),
        (LoudName, "name", "loud_name"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_wrong_declaration_names_agent_field_and_fix(function, field, fix):
    with pytest.raises(WiringError) as caught:
        agent(function).resolve()
    assert (caught.value.agent, caught.value.field) == (function.__name__, field)
    assert fix in caught.value.fix


@pytest.mark.parametrize(
    ("declared", "field"),
    [
        ({"owners": "team:risk"}, "owners"),
        ({"concurrency": 0}, "concurrency"),
        ({"ins": {"aplication": "x"}}, "aplication"),
        ({"code_files": ["nowhere.txt"]}, "code_files"),
    ],
)
def test_wrong_options_name_agent_field_and_fix(declared, field):
    def scorer(application: Application) -> Score: ...

    with pytest.raises(WiringError) as caught:
        agent(**declared)(scorer).resolve()
    assert (caught.value.agent, caught.value.field) == ("scorer", field)
    assert caught.value.fix


def test_a_contract_that_cannot_be_compiled_names_the_agent():
    class TwoKeys(BaseModel):
        one: Annotated[str, mao.Key]
        two: Annotated[str, mao.Key]

    def scorer(application: Application) -> TwoKeys: ...

    with pytest.raises(WiringError) as caught:
        agent(scorer).resolve()
    assert caught.value.agent == "scorer"


def test_a_class_without_execute_and_a_thing_that_is_no_function():
    with pytest.raises(WiringError, match="execute"):
        type("Empty", (Agent,), {})().resolve()
    with pytest.raises(WiringError, match="no function"):
        agent(Score)


# -- calling --------------------------------------------------------------------------------------------------------------------------


def test_an_agent_can_be_called_directly_as_a_unit_test_does():
    assert credit_score(APPLICATION).score == 10
    assert asyncio.run(FraudDetection()(CTX, APPLICATION, bureau=lambda income: income)).flagged
    assert asyncio.run(FraudDetection().execute(CTX, APPLICATION, bureau=lambda _: 0)).flagged is False


def test_call_binds_context_upstreams_and_resources():
    given = {"bureau": lambda income: income, "other": None}
    assert asyncio.run(FraudDetection().call(CTX, {"application": APPLICATION}, given)).flagged
    assert credit_score.call(None, {"application": APPLICATION}, {}).score == 10


def test_call_without_a_resource_says_which():
    with pytest.raises(WiringError) as caught:
        FraudDetection().call(CTX, {"application": APPLICATION}, {})
    assert (caught.value.agent, caught.value.field) == ("fraud_detection", "bureau")


def test_an_entry_of_one_record_is_a_batch_of_one():
    @agent
    def question() -> Summary:
        return Summary(text="?")

    @agent
    async def later() -> Summary:
        return Summary(text="?")

    assert question.call(None, {}, {}) == [Summary(text="?")]
    assert asyncio.run(later.call(None, {}, {})) == [Summary(text="?")]


def test_the_context_draws_alike_for_the_same_seed_and_differently_by_salt():
    assert CTX.random().random() == CTX.random().random()
    assert CTX.random("a").random() == CTX.random("a").random() != CTX.random("b").random()
    assert CTX.now == dt.datetime(2000, 1, 1, tzinfo=dt.timezone.utc)


# -- law 10: agents never call agents -------------------------------------------------------------------------------------------------


async def _gathered(application):
    task = asyncio.create_task(FraudDetection()(CTX, application, bureau=lambda _: 1))
    return await task


def _in_a_copied_context(application):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(contextvars.copy_context().run, credit_score, application).result()


REACHES = {
    "call": credit_score,
    "execute": credit_score.execute,
    "boundary call": lambda a: credit_score.call(None, {"application": a}, {}),
    "class form": lambda a: NestedReach(lambda _: None).execute(a),
    "unbound": lambda a: NestedReach.execute(NestedReach(lambda _: None), a),
    "coroutine, not awaited": lambda a: FraudDetection()(CTX, a, bureau=None),
    "task": lambda a: asyncio.run(_gathered(a)),
    "to_thread": lambda a: asyncio.run(asyncio.to_thread(credit_score, a)),
    "thread with the context": _in_a_copied_context,
    "entry": lambda _: application(),
}


@pytest.mark.parametrize("reach", REACHES.values(), ids=REACHES.keys())
def test_reaching_for_another_agent_inside_execute_raises(reach):
    with pytest.raises(AgentCallError) as caught:
        NestedReach(reach).call(None, {"application": APPLICATION}, {})
    assert caught.value.agent == "nested_reach"
    assert caught.value.fix
    assert credit_score(APPLICATION), "afterwards agents can be called again"


def test_reaching_from_an_async_agent_and_from_its_tasks_raises():
    @agent
    async def outer(application: Application) -> Score:
        return await asyncio.create_task(_gathered(application))

    with pytest.raises(AgentCallError):
        asyncio.run(outer(APPLICATION))


def test_reaching_from_the_body_of_a_generator_raises_though_it_runs_after_the_call():
    @agent
    def entry() -> Iterator[Application]:
        yield APPLICATION
        credit_score(APPLICATION)

    records = entry.call(None, {}, {})
    assert next(records) is APPLICATION
    assert credit_score(APPLICATION), "between two records nobody executes"
    with pytest.raises(AgentCallError):
        next(records)


def test_swallowing_the_error_does_not_let_the_call_through():
    reached = []

    @agent
    def other(application: Application) -> Score:
        reached.append(application)

    def stubborn(application):
        for _ in range(2):
            with pytest.raises(AgentCallError):
                other(application)

    NestedReach(stubborn).call(None, {"application": APPLICATION}, {})
    assert not reached


def test_concurrent_agents_are_not_in_each_others_way():
    started = asyncio.Event()

    @agent
    async def first(application: Application) -> None:
        started.set()
        await asyncio.sleep(0)

    @agent
    async def second(application: Application) -> None:
        await started.wait()

    async def both():
        await asyncio.gather(*(a(APPLICATION) for a in (first, second, first, second)))

    asyncio.run(both())


def test_super_execute_is_the_same_agent():
    class Base(Agent):
        def execute(self, application: Application) -> Score:
            return credit_score.output.model(application_id=application.application_id, score=1)

    class Stricter(Base):
        def execute(self, application: Application) -> Score:
            return super().execute(application).model_copy(update={"score": 2})

    assert Stricter().call(None, {"application": APPLICATION}, {}).score == 2


def test_an_execute_that_comes_from_elsewhere_is_guarded_too():
    class Mixin:
        def execute(self, application: Application) -> Score:
            return credit_score(application)

    class Mixed(Mixin, Agent):
        pass

    assert Mixed().output.model is Score
    with pytest.raises(AgentCallError):
        Mixed()(APPLICATION)


def test_an_execute_that_cannot_be_guarded_is_refused():
    class Static(Agent):
        @staticmethod
        def execute(application: Application) -> Score: ...

    with pytest.raises(WiringError) as caught:
        Static().resolve()
    assert (caught.value.agent, caught.value.field) == ("static", "execute")


# -- law 14: the version --------------------------------------------------------------------------------------------------------------

SOURCE = """
    import dagster_mao as mao
    from pydantic import BaseModel

    class Note(BaseModel):
        text: str

    @mao.agent(code_files=["prompts"])
    def note() -> Note:
        return Note(text="a")

    class Formal(mao.Agent):
        def __init__(self, limit=1):
            self.limit = limit

        def execute(self) -> Note: ...
"""


@pytest.fixture
def versioned(tmp_path):
    """Loads SOURCE, changed or not, as a module with a directory of prompts beside it."""
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts" / "one.txt").write_text("be kind")
    count = iter(range(99))
    return lambda source=SOURCE: _module(tmp_path, f"versioned_{next(count)}", source)


def test_the_version_is_that_of_the_modules_source(versioned):
    before, same, changed = versioned(), versioned(), versioned(SOURCE.replace('"a"', '"b"'))
    assert before.note.agent_version.startswith("sha256:")
    assert len(before.note.agent_version) == len("sha256:") + 12
    assert before.note.agent_version == same.note.agent_version != changed.note.agent_version
    assert before.Formal().agent_version == same.Formal().agent_version != changed.Formal().agent_version


def test_a_declared_file_counts(versioned, tmp_path):
    before = versioned().note.agent_version
    (tmp_path / "prompts" / "one.txt").write_text("be strict")
    assert versioned().note.agent_version != before
    (tmp_path / "prompts" / "one.txt").write_text("be kind")
    assert versioned().note.agent_version == before
    (tmp_path / "prompts" / "one.txt").rename(tmp_path / "prompts" / "two.txt")
    assert versioned().note.agent_version != before


def test_what_the_constructor_set_counts(versioned):
    formal = versioned().Formal
    assert formal(1).agent_version == formal(1).agent_version != formal(2).agent_version
    assert formal(object()).agent_version == formal(object()).agent_version, "an address is no setting"


def test_using_an_agent_does_not_change_its_version(versioned):
    formal = versioned().Formal(1)
    formal.resolve()
    assert pickle.loads(pickle.dumps(FraudDetection())).agent_version == FraudDetection().agent_version  # noqa: S301
    assert formal.agent_version == type(formal)(1).agent_version


def test_a_base_class_elsewhere_counts(tmp_path):
    def loaded(text):
        base = _module(tmp_path, "base_of_agents", SOURCE.replace('"a"', text))
        derived = _module(tmp_path, "derived_agents", "import base_of_agents\nclass Derived(base_of_agents.Formal): ...")
        assert issubclass(derived.Derived, base.Formal)
        return derived.Derived().agent_version

    assert loaded('"a"') != loaded('"changed"')


def test_an_explicit_version_wins():
    @agent(version="7")
    def scorer(application: Application) -> Score: ...

    assert scorer.agent_version == "7"


def test_code_without_a_file_still_has_a_version():
    def version(text):
        space = {"agent": agent, "Summary": Summary}
        exec(compile(f"@agent\ndef note() -> Summary:\n    return [x for x in {text!r}]", "<nowhere>", "exec"), space)
        return space["note"].agent_version

    assert version("a") == version("a") != version("b")


# -- other processes ------------------------------------------------------------------------------------------------------------------


def test_agents_travel_by_name(tmp_path):
    module = _module(tmp_path, "travelling_agents", SOURCE)
    assert pickle.loads(pickle.dumps(module.note)) is module.note  # noqa: S301
    formal = module.Formal(3)
    formal.resolve()
    assert pickle.loads(pickle.dumps(formal)).limit == 3  # noqa: S301


def test_an_agent_that_cannot_be_imported_says_so():
    @agent
    def local(application: Application) -> Score: ...

    with pytest.raises(pickle.PicklingError, match="module level"):
        pickle.dumps(local)


def test_an_agent_runs_in_a_spawned_process(tmp_path, monkeypatch):
    _module(tmp_path, "spawned_agents", SOURCE.replace('(code_files=["prompts"])', ""))
    monkeypatch.syspath_prepend(str(tmp_path))
    module = sys.modules["spawned_agents"]
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(module.note).result().text == "a"


def _module(directory: Path, name: str, source: str) -> Any:
    path = directory / f"{name}.py"
    path.write_text(textwrap.dedent(source))
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
