"""Reading agents' output from plain assets, and the check that the store still holds what was sealed."""

import datetime as dt
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from dagster_mao.dagster import StateIOManager, StateStoreResource, build_definitions
from dagster_mao.errors import PinError, UnknownVersionError, WiringError
from tests.dagster import loans
from tests.dagster.loans import resources, write

DAYS = dg.StaticPartitionsDefinition(["monday", "tuesday"])
APPROVAL = dg.AssetKey(["loans", "approval"])


@pytest.fixture
def desk(tmp_path):
    write(tmp_path, 700, 650.5, 620)
    return tmp_path


def job_of(folder, *assets, **changes):
    """One job of the pipeline's assets and some plain ones."""
    merged = dg.Definitions.merge(
        build_definitions(loans.pipeline(**changes), resources=resources(folder)),
        dg.Definitions(assets=assets, resources={"io_manager": dg.mem_io_manager}),
    )
    return merged.resolve_implicit_global_asset_job_def()


def loaded(result):
    events = [event for event in result.all_events if event.event_type_value == "LOADED_INPUT"]
    return [event.event_specific_data.metadata["mao/state_version"].value for event in events]


def store(folder):
    return StateStoreResource(root=str(folder / "state")).store()


def test_a_plain_asset_reads_what_its_own_run_sealed_and_tells_which_version(desk):
    @dg.asset(ins={"approval": dg.AssetIn(APPROVAL)})
    def lazily(approval: pl.LazyFrame) -> int:
        assert isinstance(approval, pl.LazyFrame)
        return approval.collect().height

    @dg.asset(ins={"approval": dg.AssetIn(APPROVAL)})
    def eagerly(approval: pl.DataFrame) -> int:
        assert isinstance(approval, pl.DataFrame)
        return approval.height

    result = job_of(desk, lazily, eagerly).execute_in_process()
    (workflow,) = store(desk).workflows()
    version = store(desk).effective(workflow)["approval"].reference
    assert (result.output_for_node("lazily"), result.output_for_node("eagerly")) == (3, 3)
    assert loaded(result) == [version, version]


def test_two_plain_assets_of_one_run_read_the_same_version_whatever_happens_in_between(desk):
    """The naive IO manager reads the newest materialisation and gets two different ones."""
    others: list[Any] = []

    @dg.asset(ins={"approval": dg.AssetIn(APPROVAL)})
    def early(approval: pl.DataFrame) -> int:
        others.append(job_of(desk, tags_only).execute_in_process(instance=instance))
        return approval.height

    @dg.asset(deps=[early], ins={"approval": dg.AssetIn(APPROVAL)})
    def late(approval: pl.DataFrame) -> int:
        return approval.height

    @dg.asset
    def tags_only() -> None: ...

    with dg.DagsterInstance.ephemeral() as instance:
        job = job_of(desk, early, late)
        first = job_of(desk).execute_in_process(instance=instance)
        write(desk, 700)
        result = job.get_subset(asset_selection={dg.AssetKey("early"), dg.AssetKey("late")}).execute_in_process(instance=instance)
    assert first.success
    assert others[0].success
    assert len(store(desk).workflows()) == 2
    assert len(set(loaded(result))) == 1
    assert (result.output_for_node("early"), result.output_for_node("late")) == (3, 3)


def test_what_a_plain_asset_reads_together_descends_from_one_entry(desk):
    """Each input alone is pinned well; together they would join new applications with the decisions on the old ones."""
    applications = dg.AssetKey(["loans", "applications"])

    @dg.asset(ins={"approval": dg.AssetIn(APPROVAL), "applications": dg.AssetIn(applications)})
    def report(approval: pl.DataFrame, applications: pl.DataFrame) -> int:
        return approval.height

    tag = {"mao/workflow": "loans/one"}
    with dg.DagsterInstance.ephemeral() as instance:
        job = job_of(desk, report)
        assert job.execute_in_process(instance=instance, tags=tag).success
        entry_alone = job.get_subset(asset_selection={applications})
        assert entry_alone.execute_in_process(instance=instance, tags=tag).success
        alone = job.get_subset(asset_selection={report.key})
        with pytest.raises(PinError, match="different entries"):
            alone.execute_in_process(instance=instance, tags=tag)


def test_several_partitions_come_as_frames_by_partition_key(desk):
    @dg.asset(ins={"approval": dg.AssetIn(APPROVAL, partition_mapping=dg.AllPartitionMapping())})
    def week(approval: dict[str, Any]) -> dict[str, int]:
        return {day: frame.collect().height for day, frame in approval.items()}

    @dg.asset(ins={"approval": dg.AssetIn(APPROVAL)}, partitions_def=DAYS)
    def day(approval: pl.DataFrame) -> int:
        return approval.height

    write(desk, days={"monday": [700, 650], "tuesday": [620]})
    with dg.DagsterInstance.ephemeral() as instance:
        pipeline = [dg.AssetKey(["loans", agent]) for agent in loans.pipeline().order]
        job = job_of(desk, week, day, partitions_def=DAYS)
        for key in ("monday", "tuesday"):
            daily = job.get_subset(asset_selection={*pipeline, dg.AssetKey("day")})
            assert daily.execute_in_process(instance=instance, partition_key=key).output_for_node("day") == {"monday": 2, "tuesday": 1}[key]
        result = job.get_subset(asset_selection={dg.AssetKey("week")}).execute_in_process(instance=instance)
    assert result.output_for_node("week") == {"monday": 2, "tuesday": 1}


def report_of(as_of="", agents=("approval",), manager=None):
    """A plain asset that tells how many rows it read of each agent."""
    metadata = {"mao/as_of": as_of} if as_of else {}
    ins = {agent: dg.AssetIn(dg.AssetKey(["loans", agent]), metadata=metadata, input_manager_key=manager) for agent in agents}

    @dg.asset(ins=ins)
    def report(**read) -> dict[str, int]:
        return {agent: frame.collect().height for agent, frame in read.items()}

    return report


@pytest.fixture
def two_attempts(desk):
    """Three applications, then one, in the same workflow, and the moment between the two."""
    tag = {"mao/workflow": "loans/one"}
    with dg.DagsterInstance.ephemeral() as instance:
        assert job_of(desk).execute_in_process(instance=instance, tags=tag).success
        between = dt.datetime.now(dt.timezone.utc)
        write(desk, 700)
        assert job_of(desk).execute_in_process(instance=instance, tags=tag).success
        yield desk, instance, between.isoformat()


def read_then(folder, instance, asset, **tags):
    job = job_of(folder, asset).get_subset(asset_selection={asset.key})
    result = job.execute_in_process(instance=instance, tags={"mao/workflow": "loans/one", **tags})
    return result.output_for_node(asset.key.path[-1]), loaded(result)


def test_a_plain_asset_reads_what_was_effective_at_a_moment(two_attempts):
    folder, instance, between = two_attempts
    seals = store(folder).seals("loans/one")
    first, second = ([seal.reference for seal in seals if seal.agent == "approval"][place] for place in (0, 1))
    assert read_then(folder, instance, report_of()) == ({"approval": 1}, [second])
    assert read_then(folder, instance, report_of(between)) == ({"approval": 3}, [first])
    assert read_then(folder, instance, report_of(first)) == ({"approval": 3}, [first])
    assert read_then(folder, instance, report_of(), **{"mao/as_of": between}) == ({"approval": 3}, [first])
    assert read_then(folder, instance, report_of(second), **{"mao/as_of": between}) == ({"approval": 1}, [second])
    assert read_then(folder, instance, report_of(agents=["applications", "approval"]), **{"mao/as_of": between})[0] == {
        "applications": 3,
        "approval": 3,
    }


def test_without_a_workflow_it_is_the_one_that_was_sealed_last_then(two_attempts):
    folder, instance, between = two_attempts
    asset = report_of(between)
    write(folder, 700, 650)
    assert job_of(folder).execute_in_process(instance=instance).success
    job = job_of(folder, asset).get_subset(asset_selection={asset.key})
    assert job.execute_in_process(instance=instance).output_for_node("report") == {"approval": 3}


@pytest.mark.parametrize("said", ["2000-01-01T00:00Z", "2026-03-03", "loans/one@0", "loans/two@1", "loans/one"])
def test_what_names_no_version_of_the_agent_is_not_read(two_attempts, said):
    """Not the workflow alone either: what it has now is another thing tomorrow."""
    folder, instance, _ = two_attempts
    with pytest.raises(UnknownVersionError):
        read_then(folder, instance, report_of(said))


def test_what_was_read_together_then_descends_from_one_entry(two_attempts):
    folder, instance, _ = two_attempts
    job = job_of(folder).get_subset(asset_selection={dg.AssetKey(["loans", "applications"])})
    assert job.execute_in_process(instance=instance, tags={"mao/workflow": "loans/one"}).success
    at = dt.datetime.now(dt.timezone.utc).isoformat()
    with pytest.raises(PinError, match="different entries"):
        read_then(folder, instance, report_of(agents=["applications", "approval"]), **{"mao/as_of": at})
    assert read_then(folder, instance, report_of(at, agents=["applications", "approval"]))[0] == {"applications": 1, "approval": 1}


def test_a_manager_of_its_own_may_look_back_for_all(two_attempts):
    folder, instance, between = two_attempts
    asset = report_of(manager="then")
    then = StateIOManager(state_store=resources(folder)["state_store"], as_of=between)
    merged = dg.Definitions.merge(
        build_definitions(loans.pipeline(), resources=resources(folder)),
        dg.Definitions(assets=[asset], resources={"io_manager": dg.mem_io_manager, "then": then}),
    )
    job = merged.resolve_implicit_global_asset_job_def().get_subset(asset_selection={asset.key})
    result = job.execute_in_process(instance=instance, tags={"mao/workflow": "loans/one"})
    assert result.output_for_node("report") == {"approval": 3}


def test_the_io_manager_never_writes(desk):
    @dg.asset(key=["loans", "report"])
    def report() -> int:
        return 1

    io = StateIOManager(state_store=StateStoreResource(root=str(desk / "state")))
    with pytest.raises(WiringError, match="only agents seal"):
        dg.materialize([report], resources={"io_manager": io})
    assert not (desk / "state").exists()


def snapshot_of(folder, workflow, agent):
    return folder / "state" / store(folder).effective(workflow)[agent].path


def chain_checks(job, instance, *agents, name="chain_integrity", **options):
    keys = {dg.AssetCheckKey(dg.AssetKey(["loans", agent]), name) for agent in agents}
    result = job.get_subset(asset_selection=set(), asset_check_selection=keys).execute_in_process(instance=instance, **options)
    return {e.asset_key.path[-1]: e for e in result.get_asset_check_evaluations()}


def test_a_changed_byte_fails_the_chain_check_of_its_agent(desk):
    with dg.DagsterInstance.ephemeral() as instance:
        job = job_of(desk)
        whole = job.execute_in_process(instance=instance)
        run_along = [e for e in whole.get_asset_check_evaluations() if e.check_name == "chain_integrity"]
        assert len(run_along) == 4
        assert all(e.passed for e in run_along)
        (workflow,) = store(desk).workflows()
        snapshot = snapshot_of(desk, workflow, "credit_score")
        data = bytearray(snapshot.read_bytes())
        data[len(data) // 2] ^= 1
        snapshot.write_bytes(data)
        found = chain_checks(job, instance, "credit_score", "approval")
    assert {agent: e.passed for agent, e in found.items()} == {"credit_score": False, "approval": True}
    (finding,) = found["credit_score"].metadata["findings"].records
    assert finding.data["kind"] == "file_changed"
    assert finding.data["file"].endswith(snapshot.name)


def test_the_chain_check_of_a_partition_looks_at_its_workflow_only(desk):
    write(desk, days={"monday": [700], "tuesday": [620]})
    with dg.DagsterInstance.ephemeral() as instance:
        job = job_of(desk, partitions_def=DAYS)
        for day in ("monday", "tuesday"):
            job.execute_in_process(instance=instance, partition_key=day)
        snapshot = snapshot_of(desk, "loans/monday", "approval")
        snapshot.unlink()
        found = {day: chain_checks(job, instance, "approval", partition_key=day)["approval"] for day in ("monday", "tuesday")}
        (everywhere,) = chain_checks(job, instance, "approval", name="chain_integrity_all").values()
        assert chain_checks(job, instance, "approval") == {}, "there is no partition to speak of"
    assert {day: (e.passed, e.partition) for day, e in found.items()} == {"monday": (False, "monday"), "tuesday": (True, "tuesday")}
    assert (everywhere.passed, everywhere.partition) == (False, None), "the one that the UI executes alone"
    assert [row.data["workflow"] for row in everywhere.metadata["findings"].records] == ["loans/monday"]


def test_a_cut_tail_shows_because_the_event_log_remembers(desk, tmp_path):
    """The state log without its last version is a perfect chain; only the seal digest on the materialisation knows better."""
    write(desk, days={"monday": [700]})
    with dg.DagsterInstance.ephemeral() as instance:
        job = job_of(desk, partitions_def=DAYS)
        subset = job.get_subset(asset_selection={dg.AssetKey(["loans", a]) for a in ("applications", "credit_score")})
        subset.execute_in_process(instance=instance, partition_key="monday")
        shutil.copytree(desk / "state", tmp_path / "before")
        job.execute_in_process(instance=instance, partition_key="monday")
        shutil.rmtree(desk / "state")
        shutil.copytree(tmp_path / "before", desk / "state")
        found = chain_checks(job, instance, "approval", "applications", partition_key="monday")
    assert not found["approval"].passed
    assert "anchor_missing" in {row.data["kind"] for row in found["approval"].metadata["findings"].records}


def test_the_chain_check_of_what_never_ran_has_nothing_to_say(desk):
    with dg.DagsterInstance.ephemeral() as instance:
        (evaluation,) = chain_checks(job_of(desk), instance, "approval").values()
    assert (evaluation.passed, evaluation.description) == (True, "Nothing was sealed yet.")


@pytest.mark.slow
def test_definitions_validate_accepts_a_module(desk):
    module = desk / "loans_module.py"
    module.write_text(f"from pathlib import Path\nfrom tests.dagster import loans\ndefs = loans.definitions(Path({str(desk)!r}))\n")
    command = [sys.executable, "-m", "dagster", "definitions", "validate", "-f", str(module), "-d", str(Path.cwd())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "successful" in done.stderr + done.stdout
