"""Agents as assets: what a run leaves in Dagster and in the state store, when it goes well and when a batch is refused."""

import json

import dagster as dg
import polars as pl
import pytest
from pydantic import ValidationError

import dagster_mao as mao
from dagster_mao.dagster import AgentTranslator, StateStoreResource, build_asset, build_assets, build_definitions
from dagster_mao.errors import WiringError
from dagster_mao.pipeline import ExternalEntry, Pipeline
from tests.dagster import loans
from tests.dagster.loans import AWKWARD, Application, resources, write

NAMES = ("applications", "credit_score", "verified_income", "approval")


@pytest.fixture
def desk(tmp_path):
    write(tmp_path, 700, 650.5, 620)
    return tmp_path


def run(folder, pipeline=None, *, instance=None, agents=None, assets=(), **options):
    """Materialises the pipeline's assets in this process, all or the agents named."""
    pipeline = pipeline or loans.pipeline()
    own = build_assets(pipeline)
    selection = [dg.AssetKey([pipeline.name, agent]) for agent in agents] if agents else None
    given = {**resources(folder), **options.pop("resources", {})}
    given = {"policies": mao.PolicyOverrides(), **given, "state_io_manager": loans.state_io_manager(folder)}
    return dg.materialize([*own, *assets], instance=instance, selection=selection, resources=given, raise_on_error=False, **options)


def store(folder):
    return StateStoreResource(root=str(folder / "state")).store()


def checks(result, agent):
    return {e.check_name: e for e in result.get_asset_check_evaluations() if e.asset_key.path[-1] == agent}


def materialization(result, agent):
    (event,) = [e for e in result.get_asset_materialization_events() if e.asset_key.path[-1] == agent]
    return event.materialization


def shown(metadata):
    return {name: value.value for name, value in metadata.items()}


def test_a_run_seals_every_agent_and_shows_what_the_log_knows(desk):
    result = run(desk)
    assert result.success
    (workflow,) = store(desk).workflows("loans")
    seals = {seal.agent: seal for seal in store(desk).seals(workflow)}
    assert set(seals) == set(NAMES)
    assert seals["applications"].version == 0
    for agent, seal in seals.items():
        told = materialization(result, agent)
        facts = shown(told.metadata)
        assert facts["mao/state_version"] == f"{workflow}@{seal.version}"
        assert facts["mao/seal_digest"] == seal.seal_digest
        assert facts["dagster/row_count"] == 3
        assert facts["dagster/uri"] == seal.uri
        assert facts["dagster/table_name"] == f"loans.{agent}"
        assert facts["mao/sealed_by"] == result.run_id
        assert told.tags["dagster/data_version"] == seal.digest
        assert told.tags["dagster/code_version"] == seal.agent_version
        assert all(evaluation.passed for evaluation in checks(result, agent).values())
    assert list(checks(result, "approval")) == ["pinned_base", "input_credit_score", "input_verified_income", "output"]
    assert materialization(result, "approval").tags["dagster/input_data_version/loans/credit_score"] == seals["credit_score"].digest


def test_parents_are_shown_with_their_versions(desk):
    result = run(desk)
    (workflow,) = store(desk).workflows()
    rows = materialization(result, "approval").metadata["mao/parents"].records
    versions = {seal.agent: seal for seal in store(desk).seals(workflow)}
    assert {row.data["agent"]: (row.data["version"], row.data["digest"]) for row in rows} == {
        agent: (versions[agent].reference, versions[agent].digest) for agent in ("credit_score", "verified_income")
    }


def test_columns_are_described_by_the_contract_and_traced_to_what_the_agent_reads(desk):
    told = materialization(run(desk), "verified_income").metadata
    columns = {column.name: column for column in told["dagster/column_schema"].value.columns}
    assert columns["application_id"].constraints.unique
    assert "personal" in columns["name"].tags
    lineage = told["dagster/column_lineage"].value.deps_by_column
    source = dg.AssetKey(["loans", "applications"])
    assert lineage["application_id"] == [dg.TableColumnDep(source, "application_id")]
    assert {dep.column_name for dep in lineage["monthly"]} == {"name", "income"}


def test_specs_carry_owner_group_kinds_description_and_schema_before_anything_ran():
    spec = build_asset(loans.pipeline(), "credit_score").get_asset_spec(dg.AssetKey(["loans", "credit_score"]))
    assert (spec.group_name, spec.code_version, spec.description) == ("loans", "7", "Scores by income alone, which nobody should.")
    assert spec.owners == ["team:risk"]
    assert spec.kinds == {"delta", "polars"}
    score = {column.name: column for column in spec.metadata["dagster/column_schema"].columns}["score"]
    assert score.description == "Higher is safer."
    assert any("300" in told for told in score.constraints.other)
    entry = build_asset(loans.pipeline(), "applications").get_asset_spec(dg.AssetKey(["loans", "applications"]))
    assert (entry.owners, entry.tags["domain"]) == (["team:lending"], "credit")


def test_a_batch_that_breaks_the_output_contract_leaves_reasons_and_nothing_else(desk):
    write(desk, 700, 12.5, 9000)
    result = run(desk)
    assert not result.success
    failed = checks(result, "credit_score")["output"]
    assert not failed.passed
    (low, high) = sorted((row.data for row in failed.metadata["reasons"].records), key=lambda row: row["rule"])
    assert (low["count"], high["count"]) == (1, 1)
    assert {low["field"], high["field"]} == {"score"}
    assert any('B \\"quoted\\"' in row["samples"] for row in (low, high)), "a sample names its record"
    sealed = {e.asset_key.path[-1] for e in result.get_asset_materialization_events()}
    assert sealed == {"applications", "verified_income"}
    (workflow,) = store(desk).workflows()
    assert {seal.agent for seal in store(desk).seals(workflow)} == {"applications", "verified_income"}
    assert not list((desk / "state").glob("tables/loans/credit_score/**/*.parquet")), "no snapshot either"
    failure = result.failure_data_for_node("loans__credit_score").user_failure_data
    assert "output" in failure.description
    assert "output: reasons" in failure.metadata


def test_a_stricter_reader_refuses_before_it_executes(desk):
    write(desk, 700, 350, 620)
    result = run(desk)
    approval = checks(result, "approval")
    assert approval["pinned_base"].passed
    assert not approval["input_credit_score"].passed
    assert "output" not in approval
    assert "credit_score" in {e.asset_key.path[-1] for e in result.get_asset_materialization_events()}


def test_personal_values_are_masked_wherever_the_refusal_is_told(desk):
    secret = "Penelope-" * 10
    (desk / "applications.json").write_text(json.dumps([{"application_id": "x-17", "name": secret, "income": 500.0}]))
    with dg.DagsterInstance.ephemeral() as instance:
        result = run(desk, instance=instance)
        told = "".join(entry.to_json() for entry in instance.all_logs(result.run_id))
    (reason,) = checks(result, "applications")["output"].metadata["reasons"].records
    assert (reason.data["field"], reason.data["samples"]) == ("name", '{"application_id": "x-17", "name": "***"}')
    assert "x-17" in told
    assert "Penelope" not in told


def test_the_values_that_pydantic_quotes_in_an_agents_error_stay_out_of_the_event_log(desk):
    @mao.agent
    def credit_score(applications: Application) -> loans.Score:
        try:
            return loans.Score(application_id=applications.application_id, score=applications.name)
        except ValidationError as error:
            raise LookupError(f"no score for {applications.name}") from error

    with dg.DagsterInstance.ephemeral() as instance:
        result = run(desk, Pipeline("loans", entry=loans.applications, agents=[credit_score]), instance=instance)
        told = "".join(entry.to_json() for entry in instance.all_logs(result.run_id))
    assert not result.success
    assert "LookupError: its text is withheld" in told
    assert "score: int_parsing" in told
    assert "Name of" not in told


def test_an_agent_that_raises_is_a_failed_step_that_may_be_retried(desk):
    (desk / "outage").touch()
    result = run(desk)
    assert not result.success
    data = result.failure_data_for_node("loans__credit_score")
    assert "AgentFailedError" in str(data.error)
    assert "bureau is down" in str(data.error.to_string())


def test_one_asset_alone_reads_the_pinned_effective_state(desk):
    """Materialize on one asset in a workflow that completed: its parents are those of the completed attempt, not newer half-done ones."""
    with dg.DagsterInstance.ephemeral() as instance:
        first = run(desk, instance=instance)
        (workflow,) = store(desk).workflows()
        write(desk, 701, 651, 300)
        half = run(desk, instance=instance, agents=["applications", "credit_score", "approval"])
        assert not half.success
        alone = run(desk, instance=instance, agents=["credit_score"])
        assert alone.success
    told = shown(materialization(alone, "credit_score").metadata)
    assert told["mao/state_version"] == f"{workflow}@4"
    seal = store(desk).seal_at(workflow, 4)
    assert [(p.agent, p.version) for p in seal.parents] == [("applications", 0)]
    assert seal.plan == ("credit_score",)
    assert first.run_id != seal.run_id


def test_one_asset_alone_with_nothing_sealed_fails_its_pinned_base(desk):
    result = run(desk, agents=["approval"])
    assert not result.success
    (check,) = checks(result, "approval").values()
    assert (check.check_name, check.passed) == ("pinned_base", False)
    assert not (desk / "state" / "state_log").exists()


def test_materialising_the_same_rows_again_is_another_version_of_another_workflow(desk):
    with dg.DagsterInstance.ephemeral() as instance:
        run(desk, instance=instance)
        run(desk, instance=instance)
    assert len(store(desk).workflows("loans")) == 2


def test_a_run_tag_names_the_workflow(desk):
    run(desk, tags={"mao/workflow": "batch-7"})
    assert store(desk).workflows("loans") == ["loans/batch-7"]


def test_an_existing_asset_as_the_entry_is_loaded_by_its_own_io_manager_and_sealed(desk):
    @dg.asset(key=["raw", "applications"], io_manager_key="mem")
    def raw() -> pl.DataFrame:
        return pl.DataFrame({"application_id": AWKWARD, "name": ["x", "y", "z"], "income": [700.0, 650.5, 620.0]})

    pipeline = loans.pipeline(entry=ExternalEntry("raw/applications", contract=Application))
    result = run(desk, pipeline, assets=[raw], resources={"mem": dg.mem_io_manager})
    assert result.success
    (workflow,) = store(desk).workflows()
    entry = store(desk).seal_at(workflow, 0)
    assert (entry.kind, entry.agent, entry.row_count) == ("entry", "applications", 3)
    assert list(checks(result, "applications")) == ["pinned_base", "output"]


def test_a_bad_batch_from_an_existing_asset_is_refused_at_the_entry(desk):
    @dg.asset(key="applications", io_manager_key="mem")
    def raw() -> list:
        return [{"application_id": "1", "name": "x", "income": -5.0}]

    result = run(desk, loans.pipeline(entry="applications"), assets=[raw], resources={"mem": dg.mem_io_manager})
    assert not checks(result, "applications")["output"].passed
    assert store(desk).workflows() == []


def test_a_translator_changes_everything_but_the_key():
    class Loud(AgentTranslator):
        def get_asset_spec(self, agent, pipeline):
            return super().get_asset_spec(agent, pipeline).replace_attributes(description=agent.name.upper(), group_name="loud")

    class Moved(AgentTranslator):
        def get_asset_spec(self, agent, pipeline):
            return super().get_asset_spec(agent, pipeline).replace_attributes(key="elsewhere")

    spec = build_asset(loans.pipeline(), "approval", translator=Loud()).get_asset_spec(dg.AssetKey(["loans", "approval"]))
    assert (spec.description, spec.group_name) == ("APPROVAL", "loud")
    with pytest.raises(WiringError, match="elsewhere"):
        build_asset(loans.pipeline(), "approval", translator=Moved())


def test_a_missing_resource_and_a_missing_store_fail_at_load(desk, monkeypatch):
    monkeypatch.delenv("DAGSTER_MAO_ROOT", raising=False)
    with pytest.raises(WiringError, match="desk"):
        build_definitions(loans.pipeline())
    with pytest.raises(WiringError, match="DAGSTER_MAO_ROOT"):
        build_definitions(loans.pipeline(), resources={"desk": resources(desk)["desk"]})
    monkeypatch.setenv("DAGSTER_MAO_ROOT", str(desk))
    assert isinstance(build_definitions(loans.pipeline(), resources={"desk": resources(desk)["desk"]}), dg.Definitions)


def test_the_configuration_of_an_agents_resources_is_in_its_seal(desk):
    run(desk)
    (workflow,) = store(desk).workflows()
    config = {seal.agent: seal.config for seal in store(desk).seals(workflow)}
    assert config["credit_score"] == config["applications"] != ""
    assert config["approval"] == ""


def test_the_output_of_one_pipeline_may_be_the_entry_of_another(desk):
    @mao.agent
    def letter(approval: loans.Decided) -> loans.Decided:
        return approval

    letters = Pipeline("letters", entry=ExternalEntry("loans/approval", contract=loans.Decided), agents=[letter])
    result = run(desk, letters, assets=build_assets(loans.pipeline()))
    assert result.success
    (workflow,) = store(desk).workflows("letters")
    assert [(seal.agent, seal.kind, seal.row_count) for seal in store(desk).seals(workflow)] == [
        ("approval", "entry", 3),
        ("letter", "output", 3),
    ]


def test_agents_without_partitions_are_not_scheduled_and_pipelines_merge(desk):
    """Both share the store and its IO manager, which merging takes only as the same object."""
    other = Pipeline("other", entry=loans.applications, agents=[loans.credit_score])
    shared = resources(desk)
    merged = dg.Definitions.merge(*(build_definitions(p, resources=shared) for p in (loans.pipeline(), other)))
    dg.Definitions.validate_loadable(merged)
    assert {job.name for job in merged.resolve_all_job_defs()} >= {"loans_job", "other_job"}
    assert not merged.schedules
