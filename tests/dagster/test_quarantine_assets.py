"""The quarantine as an asset beside its agent's, and the check that the numbers add up."""

import json
from pathlib import Path
from typing import Annotated

import dagster as dg
import polars as pl
import pytest
from pydantic import BaseModel, Field

import dagster_mao as mao
from dagster_mao.boundary._step import Step
from dagster_mao.dagster import AgentTranslator, StateStoreResource, build_asset, build_definitions
from dagster_mao.dagster.anchors import read_anchors
from dagster_mao.errors import WiringError
from dagster_mao.state.verify import verify

SECRET = "Tricia McMillan"
HALF = mao.Quarantine(max_share=0.5)
DAYS = dg.StaticPartitionsDefinition(["monday", "tuesday"])


class Application(BaseModel):
    application_id: Annotated[str, mao.Key]
    name: Annotated[str, mao.Personal]
    amount: float = Field(gt=0)


class Small(BaseModel):
    application_id: Annotated[str, mao.Key]
    amount: float = Field(le=1000)


class Score(BaseModel):
    application_id: Annotated[str, mao.Key]
    score: int


class Decided(BaseModel):
    application_id: Annotated[str, mao.Key]
    approved: bool


class Desk(dg.ConfigurableResource):
    folder: str

    def records(self, day):
        told = json.loads((Path(self.folder) / f"{day or 'desk'}.json").read_text())
        return [{"application_id": str(n), "name": f"{SECRET} {n}", "amount": amount} for n, amount in enumerate(told)]


@mao.agent(quarantine=HALF, owners=["team:desk"])
def applications(ctx: mao.AgentContext, *, desk: Desk) -> list[Application]:
    return desk.records(ctx.partition_key)


@mao.agent(quarantine=HALF)
def score(applications: Small) -> Score:
    return Score(application_id=applications.application_id, score=int(applications.amount))


@mao.agent
def decision(score: Score) -> Decided:
    return Decided(application_id=score.application_id, approved=score.score > 5)


def pipeline(**options):
    return mao.Pipeline("loans", entry=applications, agents=[score, decision], **options)


@pytest.fixture
def desk(tmp_path):
    write(tmp_path, 7, -1, "a lot", 5000, 3, 8)
    return tmp_path


def write(folder, *amounts, day="desk"):
    (folder / f"{day}.json").write_text(json.dumps(amounts))


def store(folder):
    return StateStoreResource(root=str(folder / "state")).store()


def job_of(folder, *assets, **options):
    given = {"desk": Desk(folder=str(folder)), "state_store": StateStoreResource(root=str(folder / "state"))}
    own = build_definitions(pipeline(**options), resources=given)
    plain = dg.Definitions(assets=assets, resources={"io_manager": dg.mem_io_manager})
    return dg.Definitions.merge(own, plain).resolve_implicit_global_asset_job_def()


def materialization(result, agent):
    (event,) = [e for e in result.get_asset_materialization_events() if e.asset_key.path[-1] == agent]
    return event.materialization


def evaluations(result, name):
    return {e.asset_key.path[-1]: e for e in result.get_asset_check_evaluations() if e.check_name == name}


def table(metadata, name):
    return [record.data for record in metadata[name].value.records]


def test_what_the_quarantine_shows(desk):
    result = job_of(desk).execute_in_process()
    (workflow,) = store(desk).workflows()
    seal = store(desk).seal_at(workflow, 0)
    told = materialization(result, "applications_quarantine")
    facts = {name: value.value for name, value in told.metadata.items()}
    assert (facts["mao/quarantined"], facts["mao/came_in"], facts["mao/quarantined_share"]) == (2, 6, 2 / 6)
    assert (facts["mao/state_version"], facts["mao/attempt"], facts["dagster/row_count"]) == (seal.reference, result.run_id, 2)
    assert facts["dagster/uri"] == f"{seal.uri}_quarantine"
    assert pl.read_delta(facts["dagster/uri"]).height == 2
    assert facts["dagster/table_name"] == "loans.applications_quarantine"
    assert told.tags["dagster/data_version"] == seal.quarantine_digest
    assert {c.name: bool(c.description) for c in facts["dagster/column_schema"].columns} == dict.fromkeys(
        ("record", "side", "upstream", "rules", "values", "masked", "digest", "attempt"), True
    )
    assert {(row["rule"], row["field"], row["count"], row["samples"]) for row in table(told.metadata, "mao/rules")} == {
        ("amount: float_parsing", "amount", 1, '{"record": "2", "amount": "a lot"}'),
        ("amount: gt 0", "amount", 1, '{"record": "1", "amount": -1}'),
    }
    rows = table(told.metadata, "mao/records")
    assert [(row["record"], row["side"]) for row in rows] == [("1", "output"), ("2", "output")]
    assert [json.loads(row["values"]) for row in rows] == [{"amount": -1}, {"amount": "a lot"}], "what the rules are about"
    score = materialization(result, "score_quarantine")
    assert [(row["record"], row["side"], row["upstream"]) for row in table(score.metadata, "mao/records")] == [
        ("3", "input", "applications")
    ]
    assert materialization(result, "applications").metadata["mao/quarantined"].value == 2
    assert evaluations(result, "output")["applications"].metadata["quarantined"].value == 2


def test_nothing_personal_leaves_the_store(desk):
    with dg.DagsterInstance.ephemeral() as instance:
        result = job_of(desk).execute_in_process(instance=instance)
        told = "".join(entry.to_json() for entry in instance.all_logs(result.run_id))
    assert "a lot" in told
    assert SECRET not in told


def test_an_empty_quarantine_is_materialised_too_so_that_the_plot_has_its_zeros(desk):
    write(desk, 1, 2)
    result = job_of(desk).execute_in_process()
    told = materialization(result, "score_quarantine").metadata
    assert (told["mao/quarantined"].value, told["mao/quarantined_share"].value, told["dagster/row_count"].value) == (0, 0.0, 0)
    assert "mao/records" not in told


def test_only_agents_that_declare_one_have_one_and_it_is_shown_like_its_agent():
    own = build_asset(pipeline(partitions_def=DAYS), "applications")
    (agent, aside) = (own.get_asset_spec(dg.AssetKey(["loans", name])) for name in ("applications", "applications_quarantine"))
    assert (aside.group_name, aside.owners, aside.partitions_def) == (agent.group_name, agent.owners, DAYS)
    assert aside.kinds == {"delta", "quarantine"}
    assert [dep.asset_key for dep in aside.deps] == [agent.key]
    assert [key.path[-1] for key in build_asset(pipeline(), "decision").keys] == ["decision"]


def test_an_op_of_two_assets_is_selected_whole(desk):
    """Downstream of the agent both are; one alone is refused by Dagster, which names the way out."""
    job = job_of(desk)
    agent, aside, below = (dg.AssetKey(["loans", name]) for name in ("score", "score_quarantine", "decision"))
    with pytest.raises(dg.DagsterInvalidSubsetError, match="required_multi_asset_neighbors"):
        job.get_subset(asset_selection={agent, below})
    graph = job.asset_layer.asset_graph
    assert dg.AssetSelection.assets(agent).downstream().resolve(graph) == {agent, aside, below}
    assert dg.AssetSelection.assets(agent).required_multi_asset_neighbors().resolve(graph) == {agent, aside}


def test_a_translator_changes_the_quarantine_but_not_its_key():
    class Quiet(AgentTranslator):
        def get_quarantine_spec(self, agent, pipeline):
            return super().get_quarantine_spec(agent, pipeline).replace_attributes(description="Ask Ford.")

    class Moved(AgentTranslator):
        def get_quarantine_spec(self, agent, pipeline):
            return super().get_quarantine_spec(agent, pipeline).replace_attributes(key="elsewhere")

    key = dg.AssetKey(["loans", "score_quarantine"])
    assert build_asset(pipeline(), "score", translator=Quiet()).get_asset_spec(key).description == "Ask Ford."
    with pytest.raises(WiringError, match="elsewhere"):
        build_asset(pipeline(), "score", translator=Moved())


def test_an_agent_may_not_have_the_name_of_a_quarantine():
    @mao.agent
    def score_quarantine(score: Score) -> Score:
        return score

    with pytest.raises(WiringError, match="the name of the quarantine of 'score'"):
        mao.Pipeline("loans", entry=applications, agents=[score, score_quarantine])
    mao.Pipeline("loans", entry=applications, agents=[score, decision])


def test_an_anchor_is_the_agents_materialisation_not_its_quarantines(desk):
    with dg.DagsterInstance.ephemeral() as instance:
        job_of(desk).execute_in_process(instance=instance)
        anchors = read_anchors(instance, ["loans"])
    (workflow,) = store(desk).workflows()
    assert sorted((a.version, a.seal_digest) for a in anchors) == [(s.version, s.seal_digest) for s in store(desk).seals(workflow)]
    assert verify(store(desk), anchors=anchors).good


def test_a_plain_asset_reads_the_quarantine_pinned(desk):
    aside = dg.AssetKey(["loans", "applications_quarantine"])

    @dg.asset(ins={"refused": dg.AssetIn(aside), "applications": dg.AssetIn(dg.AssetKey(["loans", "applications"]))})
    def letters(refused: pl.DataFrame, applications: pl.LazyFrame) -> list[str]:
        assert applications.collect().height == 4
        return refused["record"].to_list()

    @dg.asset(ins={"refused": dg.AssetIn(aside)})
    def lazily(refused: pl.LazyFrame) -> int:
        return refused.collect().height

    with dg.DagsterInstance.ephemeral() as instance:
        job = job_of(desk, letters, lazily)
        result = job.execute_in_process(instance=instance)
        again = job.get_subset(asset_selection={dg.AssetKey("letters")}).execute_in_process(instance=instance)
    assert result.output_for_node("letters") == again.output_for_node("letters") == ["1", "2"]
    assert result.output_for_node("lazily") == 2
    (loaded,) = [e.event_specific_data.metadata for e in again.all_events if e.event_type_value == "LOADED_INPUT" if "refused" in str(e)]
    (workflow,) = store(desk).workflows()
    assert loaded["mao/state_version"].value == f"{workflow}@0"
    assert loaded["mao/digest"].value == store(desk).seal_at(workflow, 0).quarantine_digest


def test_the_accounts_are_checked_in_the_step_of_the_chain_and_alone(desk):
    with dg.DagsterInstance.ephemeral() as instance:
        job = job_of(desk)
        result = job.execute_in_process(instance=instance)
        steps = {e.step_key for e in result.all_events if e.event_type_value == "STEP_START"}
        key = dg.AssetCheckKey(dg.AssetKey(["loans", "score_quarantine"]), "accounted")
        alone = job.get_subset(asset_selection=set(), asset_check_selection={key}).execute_in_process(instance=instance)
    assert steps == {"loans__applications", "loans__score", "loans__decision", "loans__chain_integrity"}
    found = evaluations(result, "accounted")
    assert set(found) == {"applications_quarantine", "score_quarantine"}
    for one in (found["score_quarantine"], evaluations(alone, "accounted")["score_quarantine"]):
        assert one.passed
        told = {name: one.metadata[name].value for name in ("came_in", "sealed", "quarantined", "discarded")}
        assert told == {"came_in": 4, "sealed": 3, "quarantined": 1, "discarded": 0}


def test_the_accounts_of_partitions(desk):
    write(desk, 1, -1, day="monday")
    write(desk, 2, 3, 4000, day="tuesday")
    with dg.DagsterInstance.ephemeral() as instance:
        job = job_of(desk, partitions_def=DAYS)
        for day in ("monday", "tuesday"):
            own = build_definitions(
                pipeline(partitions_def=DAYS),
                resources={"desk": Desk(folder=str(desk)), "state_store": StateStoreResource(root=str(desk / "state"))},
            ).resolve_job_def("loans_job")
            result = own.execute_in_process(instance=instance, partition_key=day)
            assert {e.partition for e in evaluations(result, "accounted").values()} == {day}
            assert not evaluations(result, "accounted_all")
        keys = {dg.AssetCheckKey(dg.AssetKey(["loans", f"{a}_quarantine"]), "accounted_all") for a in ("applications", "score")}
        everywhere = job.get_subset(asset_selection=set(), asset_check_selection=keys).execute_in_process(instance=instance)
    found = evaluations(everywhere, "accounted_all")
    counts = {agent: (one.metadata["came_in"].value, one.metadata["quarantined"].value) for agent, one in found.items()}
    assert counts == {"applications_quarantine": (5, 1), "score_quarantine": (4, 1)}


def test_a_record_that_is_nowhere_fails_the_check(desk, monkeypatch):
    """A boundary that loses a record without a word: its own counters add up, because nobody counted it."""
    honest = Step.seal

    def careless(self, frame, *rest, **more):
        kept = frame.filter(pl.col("application_id") != "0") if self._agent.name == "score" else frame
        return honest(self, kept, *rest, **more)

    monkeypatch.setattr(Step, "seal", careless)
    monkeypatch.setattr(Step, "_require_conserved", lambda *_: None)
    result = job_of(desk).execute_in_process()
    assert result.success
    found = evaluations(result, "accounted")
    assert {agent: one.passed for agent, one in found.items()} == {"applications_quarantine": True, "score_quarantine": False}
    score = found["score_quarantine"]
    assert "1 record neither sealed nor in quarantine" in score.description
    (row,) = table(score.metadata, "wrong")
    assert (row["count"], row["records"]) == (1, "0")
    assert (score.metadata["came_in"].value, score.metadata["sealed"].value) == (4, 2)


def test_an_existing_asset_as_entry_has_a_quarantine_beside_what_was_sealed_of_it(desk):
    @dg.asset(key=["raw", "applications"])
    def raw() -> list:
        return [{"application_id": str(n), "name": SECRET, "amount": amount} for n, amount in enumerate((1, -1, 2))]

    entry = mao.ExternalEntry("raw/applications", contract=Application, quarantine=HALF)
    given = {"state_store": StateStoreResource(root=str(desk / "state"))}
    own = build_definitions(mao.Pipeline("loans", entry=entry, agents=[score, decision]), resources=given)
    plain = dg.Definitions(assets=[raw], resources={"io_manager": dg.mem_io_manager})
    result = dg.Definitions.merge(own, plain).resolve_implicit_global_asset_job_def().execute_in_process()
    assert materialization(result, "applications_quarantine").metadata["mao/quarantined"].value == 1
    assert evaluations(result, "accounted")["applications_quarantine"].passed
