"""Pipelines: the graph is read from the agents, and whatever is wrong with it is said at load, with agent, field and fix (law 9)."""

import inspect
import itertools
import subprocess
import sys
from typing import Annotated, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

import dagster_mao as mao
from dagster_mao.agent import Agent, agent
from dagster_mao.errors import AgentCallError, WiringError
from dagster_mao.pipeline import ExternalEntry, Pipeline


class Application(BaseModel):
    application_id: Annotated[str, mao.Key]
    income: int


class Score(BaseModel):
    application_id: Annotated[str, mao.Key]
    score: float = Field(ge=0, le=1)


class Income(BaseModel):
    application_id: Annotated[str, mao.Key]
    verified: bool


class Risk(BaseModel):
    application_id: Annotated[str, mao.Key]
    risk: float


class Policy(BaseModel):
    """Without a key: a batch of one."""

    threshold: float


@agent
def application() -> list[Application]: ...


@agent
def credit_score(application: Application) -> Score: ...


@agent
def income_verification(application: mao.LazyFrame[Application]) -> mao.LazyFrame[Income]: ...


class RiskAssessment(Agent):
    def execute(self, credit_score: Score, income_verification: Income, *, bank: Any) -> Risk: ...


@agent
def approval(risk_assessment: Risk) -> Risk: ...


AGENTS = [approval, RiskAssessment, income_verification, credit_score]


def refused(*agents: Any, entry: Any = application, name: str = "credit") -> WiringError:
    with pytest.raises(WiringError) as caught:
        Pipeline(name, entry=entry, agents=agents)
    assert caught.value.fix
    return caught.value


# -- the graph ------------------------------------------------------------------------------------------------------------------------


def test_the_graph_is_read_from_the_agents():
    pipeline = Pipeline("credit", entry=application, agents=AGENTS, owners=["team:risk"], tags={"a": "b"})
    assert pipeline.order == ("application", "income_verification", "credit_score", "risk_assessment", "approval")
    assert tuple(pipeline.agents) == pipeline.order
    assert (pipeline.entry, pipeline.entry_name) == (application, "application")
    assert [read.upstream for read in pipeline.inputs_of("risk_assessment")] == ["credit_score", "income_verification"]
    assert pipeline.downstreams("application") == ("income_verification", "credit_score")
    assert pipeline.downstreams("approval") == ()
    assert pipeline.output_of("credit_score").model is Score
    assert pipeline.node("approval") is approval
    assert pipeline.resources == ("bank",)
    assert (pipeline.owners, pipeline.tags) == (("team:risk",), {"a": "b"})


def test_the_order_is_that_given_where_the_graph_leaves_it_open():
    assert Pipeline("p", entry=application, agents=[credit_score, income_verification]).order[1:] == ("credit_score", "income_verification")
    assert Pipeline("p", entry=application, agents=[income_verification, credit_score]).order[1:] == ("income_verification", "credit_score")


def test_the_entry_may_be_a_class_and_may_be_listed_too():
    class Applications(Agent):
        name = "application"

        def execute(self) -> list[Application]: ...

    assert Pipeline("p", entry=Applications, agents=[credit_score]).order == ("application", "credit_score")
    assert Pipeline("p", entry=application, agents=[credit_score, application]).order == ("application", "credit_score")


def test_a_pipeline_of_its_entry_alone():
    assert Pipeline("p", entry=application).order == ("application",)


class AssetKeyLike:
    path = ("raw", "application")


class AssetLike:
    key = AssetKeyLike()


@pytest.mark.parametrize("key", ["raw/application", ["raw", "application"], AssetKeyLike(), AssetLike(), ("raw", "application")])
def test_an_existing_asset_is_an_entry_under_the_contract_that_its_readers_agree_on(key):
    pipeline = Pipeline("p", entry=key, agents=[income_verification, credit_score])
    assert isinstance(pipeline.entry, ExternalEntry)
    assert pipeline.entry.asset_key == ("raw", "application")
    assert pipeline.order == ("application", "income_verification", "credit_score")
    assert pipeline.output_of("application").model is Application
    assert pipeline.entry.agent_version.startswith("sha256:")
    with pytest.raises(WiringError, match="raw/application"):
        pipeline.entry.call(None, {}, {})


def test_an_external_entry_says_contract_and_name():
    entry = ExternalEntry("raw/Loan-Applications", contract=Application, name="application")
    assert Pipeline("p", entry=entry, agents=[credit_score]).entry_name == "application"


def test_a_stricter_input_is_no_contradiction_and_a_narrower_one_neither():
    class Confident(BaseModel):
        application_id: Annotated[str, mao.Key]
        score: float = Field(gt=0.7)

    class KeyOnly(BaseModel):
        application_id: Annotated[str, mao.Key]

    @agent
    def analysis(credit_score: Confident, application: KeyOnly) -> Risk: ...

    assert Pipeline("p", entry=application, agents=[credit_score, analysis]).order[-1] == "analysis"


def test_an_upstream_without_a_key_is_there_for_every_record():
    @agent
    def policy(application: mao.LazyFrame[Application]) -> mao.LazyFrame[Policy]: ...

    @agent
    def judged(credit_score: Score, policy: Policy) -> Risk: ...

    assert Pipeline("p", entry=application, agents=[judged, policy, credit_score]).order[-1] == "judged"


def reading(name: str, upstreams: list[str]) -> Agent:
    """An agent that reads what it is told to, of Score records all the way down."""

    def execute(): ...

    parameters = [inspect.Parameter(u, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=Score) for u in upstreams]
    execute.__signature__ = inspect.Signature(parameters, return_annotation=Score)
    return agent(name=name)(execute)


@st.composite
def graphs(draw):
    """Edges of an acyclic graph below the entry `n0`, and its agents' names in an order that says nothing."""
    size = draw(st.integers(1, 7))
    reads = {
        f"n{n}": sorted(draw(st.sets(st.integers(0, n - 1).map(lambda m: f"n{m}"), min_size=1, max_size=3))) for n in range(1, size + 1)
    }
    return reads, draw(st.permutations(sorted(reads)))


@agent(name="n0")
def source() -> list[Score]: ...


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_every_agent_comes_after_all_that_it_reads(graph):
    reads, names = graph
    order = Pipeline("p", entry=source, agents=[reading(n, reads[n]) for n in names]).order
    assert order[0] == "n0"
    assert sorted(order[1:]) == sorted(names)
    assert all(order.index(upstream) < order.index(name) for name in names for upstream in reads[name])


@settings(max_examples=60, deadline=None)
@given(graphs(), st.data())
def test_every_cycle_is_named_by_edges_that_are_there(graph, data):
    reads, names = graph
    low = data.draw(st.sampled_from(names))
    above = {low}  # low and all that descends from it: reading one of these closes a cycle
    for name in sorted(reads):
        if above.intersection(reads[name]):
            above.add(name)
    reads[low] = sorted({*reads[low], data.draw(st.sampled_from(sorted(above)))})
    cycle = str(refused(*(reading(n, reads[n]) for n in names), entry=source)).split("cycle: ")[1].split(" [")[0].split(" -> ")
    assert cycle[0] == cycle[-1]
    assert all(upstream in reads[name] for upstream, name in itertools.pairwise(cycle))


# -- what is wrong is said at load ----------------------------------------------------------------------------------------------------


def test_a_missing_upstream_suggests_the_name_meant():
    @agent
    def approval(credit_scor: Score) -> Risk: ...

    error = refused(credit_score, approval)
    assert (error.agent, error.field) == ("approval", "credit_scor")
    assert "'credit_score'" in error.fix


def test_a_missing_upstream_with_no_name_near_says_which_there_are():
    @agent
    def approval(zzz: Score) -> Risk: ...

    assert "credit_score" in refused(credit_score, approval).fix


def test_a_cycle_is_named_with_its_path():
    @agent
    def first(application: Application, third: Score) -> Score: ...

    @agent
    def second(first: Score) -> Score: ...

    @agent
    def third(second: Score) -> Score: ...

    error = refused(first, second, third)
    cycle = str(error).split("cycle: ")[1].split(" [")[0].split(" -> ")
    assert cycle[0] == cycle[-1]
    assert set(cycle) == {"first", "second", "third"}
    edges = {("third", "first"), ("first", "second"), ("second", "third")}
    assert set(itertools.pairwise(cycle)) == edges, "data flows along the arrows"


def test_an_agent_that_reads_itself_is_a_cycle():
    @agent
    def echo(echo: Score, application: Application) -> Score: ...

    error = refused(echo)
    assert "echo -> echo" in str(error)
    assert (error.agent, error.field) == ("echo", "echo")


def test_what_stands_below_a_cycle_is_not_blamed():
    @agent
    def one(two: Score) -> Score: ...

    @agent
    def two(one: Score) -> Score: ...

    @agent
    def below(one: Score) -> Score: ...

    assert "below" not in str(refused(below, one, two))


def test_duplicates():
    @agent(name="credit_score")
    def other(application: Application) -> Score: ...

    assert (refused(credit_score, other).agent, refused(credit_score, credit_score).field) == ("credit_score", "name")
    assert refused(RiskAssessment, RiskAssessment(), credit_score).agent == "risk_assessment"


def test_an_agent_that_nothing_reaches():
    @agent
    def island() -> list[Application]: ...

    error = refused(credit_score, island)
    assert (error.agent, error.field) == ("island", "inputs")


def test_an_entry_that_reads():
    assert refused(application, entry=credit_score).agent == "credit_score"


@pytest.mark.parametrize("entry", [None, 7, "", "a//b", [], [1]])
def test_an_entry_that_is_none(entry):
    assert refused(credit_score, entry=entry).field == "entry"


def test_an_external_entry_that_nobody_reads():
    assert "ins=" in refused(credit_score, entry="raw/applications").fix


def test_an_external_entry_whose_name_no_parameter_can_have():
    assert refused(credit_score, entry=ExternalEntry("raw/Loan-Applications", contract=Application)).field == "name"


def test_an_external_entry_named_like_an_agent():
    assert refused(credit_score, entry=ExternalEntry("raw/credit_score", contract=Application)).field == "name"


def test_readers_that_disagree_on_an_external_entry():
    class Other(BaseModel):
        application_id: Annotated[str, mao.Key]
        purpose: str

    @agent
    def purpose(application: Other) -> Score: ...

    error = refused(credit_score, purpose, entry="raw/application")
    assert (error.agent, error.field) == ("purpose", "application")
    assert "ExternalEntry('raw/application', contract=Model)" in error.fix


@pytest.mark.parametrize(
    ("field", "annotation"),
    [("missing", (str, ...)), ("score", (str, ...)), ("score", (float, Field(gt=1))), ("score", (float, Field(lt=0)))],
    ids=["a missing field", "a wrong type", "a bound above", "a bound below"],
)
def test_contracts_that_contradict(field, annotation):
    from pydantic import create_model

    asked = create_model("Asked", application_id=(Annotated[str, mao.Key], ...), **{field: annotation})

    @agent
    def approval(credit_score: asked) -> Risk: ...

    error = refused(credit_score, approval)
    assert (error.agent, error.field) == ("approval", field)
    assert "Asked" in error.fix
    assert "Score" in error.fix


def test_a_reader_that_knows_another_key_than_the_producer():
    class Unmarked(BaseModel):
        application_id: str
        score: float

    @agent
    def approval(credit_score: mao.LazyFrame[Unmarked]) -> mao.LazyFrame[Risk]: ...

    error = refused(credit_score, approval)
    assert (error.agent, error.field) == ("approval", "application_id")
    assert "mao.Key" in error.fix


def test_keys_of_different_types_cannot_be_joined():
    class Numbered(BaseModel):
        number: Annotated[int, mao.Key]

    @agent
    def numbered(application: mao.LazyFrame[Application]) -> mao.LazyFrame[Numbered]: ...

    @agent
    def joined(credit_score: Score, numbered: Numbered) -> Risk: ...

    error = refused(credit_score, numbered, joined)
    assert (error.agent, error.field) == ("joined", "number")


def test_a_key_that_changes_its_type_on_the_way():
    class Numbered(BaseModel):
        application_id: Annotated[int, mao.Key]

    @agent
    def numbered(application: Application) -> Numbered: ...

    error = refused(numbered)
    assert (error.agent, error.field) == ("numbered", "application_id")


def test_reaching_for_an_agent_without_declaring_it_fails_at_load():
    @agent
    def sly(application: Application) -> Risk:
        return max([credit_score(a) for a in [application]])

    class Slyer(Agent):
        def execute(self, application: Application) -> Risk:
            return self._reach(application)

        def _reach(self, application):
            return RiskAssessment().execute(application, application, bank=None)

    error = refused(credit_score, sly)
    assert (error.agent, error.field) == ("sly", "credit_score")
    assert refused(credit_score, income_verification, RiskAssessment, Slyer).field == "risk_assessment"


def test_an_attribute_named_like_an_agent_is_no_read():
    class Bundle(BaseModel):
        application_id: Annotated[str, mao.Key]
        credit_score: float

    @agent
    def bundle(application: Application) -> Bundle: ...

    @agent
    def reader(bundle: Bundle) -> Risk:
        return Risk(application_id=bundle.application_id, risk=bundle.credit_score)

    assert "reader" in Pipeline("p", entry=application, agents=[credit_score, bundle, reader]).order


def test_a_declared_upstream_that_is_called_too_fails_when_it_runs():
    @agent(ins={"score": "credit_score"})
    def sly(score: Score) -> Risk:
        return credit_score(score)

    pipeline = Pipeline("p", entry=application, agents=[credit_score, sly])
    with pytest.raises(AgentCallError):
        pipeline.node("sly").call(None, {"score": None}, {})


def test_a_function_that_is_no_agent_and_a_class_that_needs_arguments():
    def plain(application: Application) -> Score: ...

    class Picky(Agent):
        def __init__(self, limit):
            self.limit = limit

        def execute(self, application: Application) -> Score: ...

    assert "@mao.agent" in refused(plain).fix
    assert "Picky(...)" in refused(Picky).fix
    assert Pipeline("p", entry=application, agents=[Picky(1)]).order[-1] == "picky"


def test_an_agents_own_errors_are_raised_by_the_pipeline():
    @agent
    def vague(application: Application): ...

    error = refused(vague)
    assert (error.agent, error.field) == ("vague", "return")
    assert "'credit'" in str(error)


@pytest.mark.parametrize("name", ["Credit", "credit pipeline", "../credit", "", "1st", "credit\n"])
def test_names_that_make_no_path(name):
    assert refused(credit_score, name=name).field == "name"


def test_an_unknown_agent_is_asked_for():
    with pytest.raises(WiringError, match="credit_score"):
        Pipeline("p", entry=application, agents=[credit_score]).inputs_of("credit_scor")


# -- what it drags in -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["dagster_mao.agent", "dagster_mao.contract"])
def test_agents_and_contracts_know_neither_dagster_nor_delta(module):
    """What stands below the package root: `dagster_mao` itself may import the store."""
    code = f"""
import sys, types, pathlib
import importlib.util
package = types.ModuleType("dagster_mao")
package.__path__ = [str(pathlib.Path(importlib.util.find_spec("dagster_mao").origin).parent)]
sys.modules["dagster_mao"] = package
import {module}
print(sorted({{"dagster", "deltalake", "obstore"}} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_reader_that_forgets_that_a_field_is_personal() -> None:
    class Contact(BaseModel):
        phone: Annotated[str, mao.Personal]

    class Person(BaseModel):
        person_id: Annotated[str, mao.Key]
        contacts: list[Contact]

    class Bare(BaseModel):
        phone: str

    class Careless(BaseModel):
        person_id: Annotated[str, mao.Key]
        contacts: list[Bare]

    @mao.agent
    def people() -> list[Person]:
        return []

    @mao.agent
    def calls(people: Careless) -> Careless:
        return people

    with pytest.raises(mao.WiringError, match=r"'contacts\[\].phone' of 'people', which is personal") as caught:
        mao.Pipeline("phones", entry=people, agents=[calls])
    assert (caught.value.agent, caught.value.field) == ("calls", "contacts[].phone")
