"""A backfill as a single run: each partition of the range is a workflow and an attempt of its own, and fails for itself."""

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import dagster as dg
import polars as pl
import pytest
from dagster._core.definitions.automation_tick_evaluation_context import build_run_requests_with_backfill_policies
from dagster._core.definitions.data_version import StaleStatus
from dagster._core.definitions.events import AssetKeyPartitionKey
from pydantic import BaseModel

import dagster_mao as mao
from dagster_mao.boundary import run_agent
from dagster_mao.configuration import config_digest
from dagster_mao.dagster import StateStoreResource, build_definitions
from tests.dagster import loans
from tests.dagster.test_late_data import stale

DAYS = dg.DailyPartitionsDefinition(start_date="2026-01-05", end_date="2026-01-08")
KEYS = DAYS.get_partition_keys()
SINGLE = dg.BackfillPolicy.single_run()
AGENTS = loans.pipeline().order


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return at(tmp_path, monkeypatch)


def at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A desk with two applications on each day."""
    monkeypatch.setenv("LOANS_FOLDER", str(folder))
    monkeypatch.setenv("LOANS_STATE", str(folder / "state"))
    loans.write(folder, days={day: [700.0, 650.0] for day in KEYS})
    (folder / "home").mkdir(exist_ok=True)
    return folder


@pytest.fixture
def instance(desk: Path) -> Iterator[dg.DagsterInstance]:
    """Persistent: re-executions need one."""
    with dg.DagsterInstance.local_temp(str(desk / "home")) as instance:
        yield instance


@pytest.fixture(scope="module")
def decided(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A desk on which one run has decided all days: to be looked at, or copied."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = at(tmp_path_factory.mktemp("decided"), monkeypatch)
        with dg.DagsterInstance.local_temp(str(folder / "home")) as instance:
            assert execute(instance).success
    return folder


@pytest.fixture
def copied(decided: Path, desk: Path) -> Path:
    shutil.copytree(decided, desk, dirs_exist_ok=True)
    return desk


def over(first: str = KEYS[0], last: str = KEYS[-1]) -> dict[str, str]:
    """The tags by which Dagster tells a run its range of partitions."""
    return {"dagster/asset_partition_range_start": first, "dagster/asset_partition_range_end": last}


def execute(instance: dg.DagsterInstance, parent: str | None = None, **options: Any) -> dg.JobExecutionResult:
    """Runs all days as one run; with a parent, what of it did not succeed, as the UI and the daemon ask for it."""
    again = dg.ReexecutionOptions.from_failure(parent, instance) if parent else None
    tags = {**over(), **({"dagster/is_resume_retry": "true"} if parent else {})}
    job = dg.reconstructable(loans.loans_job_over_ranges)
    return dg.execute_job(job, instance=instance, reexecution_options=again, tags=tags, **options)


def store(folder: Path) -> mao.StateStore:
    return StateStoreResource(root=str(folder / "state")).store()


def materialized(result: Any) -> Counter[tuple[str, str]]:
    """How often a run told of each agent and partition."""
    events = [event.step_materialization_data.materialization for event in result.all_events if event.is_step_materialization]
    return Counter((one.asset_key.path[-1], one.partition) for one in events)


def failure(result: Any) -> Any:
    (failed,) = [event for event in result.all_events if event.event_type_value == "STEP_FAILURE"]
    return failed.step_failure_data


def every(*days: str) -> Counter[tuple[str, str]]:
    return Counter((agent, day) for agent in AGENTS for day in days)


def test_a_backfill_with_the_policy_is_one_run_of_the_whole_pipeline(desk: Path) -> None:
    defs = loans.definitions(desk, partitions_def=DAYS, backfill_policy=SINGLE)
    with dg.DagsterInstance.ephemeral() as instance:
        wanted = [AssetKeyPartitionKey(dg.AssetKey(["loans", agent]), day) for agent in AGENTS for day in KEYS]
        (request,) = build_run_requests_with_backfill_policies(wanted, defs.resolve_asset_graph(), instance)
        assert dict(request.tags) == over()
        assert set(request.asset_selection or ()) == {key.asset_key for key in wanted}


def test_every_partition_is_a_workflow_with_its_own_materialisations_and_checks(decided: Path) -> None:
    """Naive: what Dagster tells by itself, one data version for all partitions, and checks that are of none."""
    with dg.DagsterInstance.local_temp(str(decided / "home")) as instance:
        (run,) = instance.get_runs()
        told = [entry.dagster_event for entry in instance.all_logs(run.run_id) if entry.dagster_event]
    made = [event.step_materialization_data.materialization for event in told if event.is_step_materialization]
    assert Counter((one.asset_key.path[-1], one.partition) for one in made) == every(*KEYS)
    assert store(decided).workflows() == [f"loans/{day}" for day in KEYS]
    for day in KEYS:
        seals = store(decided).seals(f"loans/{day}")
        assert [seal.version for seal in seals] == [0, 1, 2, 3]
        assert {seal.attempt for seal in seals} == {run.run_id}
        assert set(store(decided).effective(f"loans/{day}")) == set(AGENTS)
        for seal in seals:
            (one,) = [one for one in made if (one.asset_key.path[-1], one.partition) == (seal.agent, day)]
            assert one.metadata["mao/state_version"].value == seal.reference
            parents = {f"dagster/input_data_version/loans/{parent.agent}": parent.digest for parent in seal.parents}
            assert {**parents, "dagster/data_version": seal.digest}.items() <= one.tags.items()
    checks = [event.event_specific_data for event in told if event.event_type_value == "ASSET_CHECK_EVALUATION"]
    assert Counter((check.asset_key.path[-1], check.partition) for check in checks if check.check_name == "output") == every(*KEYS)
    assert all(check.passed for check in checks)
    assert {f"mao/workflow.{day}" for day in KEYS} <= run.tags.keys()


def test_late_data_of_one_day_makes_what_reads_it_stale_as_after_runs_of_their_own(copied: Path, instance: dg.DagsterInstance) -> None:
    defs = loans.definitions(copied, partitions_def=DAYS, backfill_policy=SINGLE)
    late, other = KEYS[1], KEYS[2]
    assert {stale(defs, instance, agent, day) for agent in AGENTS for day in KEYS} == {StaleStatus.FRESH}
    loans.write(copied, days={day: [700.0, 650.0, *([400.0] if day == late else [])] for day in KEYS})
    whole = defs.resolve_implicit_global_asset_job_def()
    entry = [dg.AssetKey(["loans", "applications"])]
    assert whole.execute_in_process(instance=instance, partition_key=late, asset_selection=entry).success
    assert {stale(defs, instance, agent, late) for agent in ("credit_score", "verified_income")} == {StaleStatus.STALE}
    assert stale(defs, instance, "credit_score", other) == StaleStatus.FRESH
    assert execute(instance).success
    assert {stale(defs, instance, agent, day) for agent in AGENTS for day in KEYS} == {StaleStatus.FRESH}
    assert [seal.row_count for seal in store(copied).seals(f"loans/{late}") if seal.kind == "entry"] == [2, 3, 3]


@pytest.fixture(scope="module")
def partly(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One run over three days: the first is decided, the entry of the second is refused, an agent of the third fails. And its id."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = at(tmp_path_factory.mktemp("partly"), monkeypatch)
        loans.write(folder, days=dict(zip(KEYS, ([700.0], [-1.0], [200.0]), strict=True)))
        with dg.DagsterInstance.local_temp(str(folder / "home")) as instance:
            result = execute(instance)
            assert not result.success
    return folder, result.run_id


GOOD, BAD, WORSE = KEYS


def test_a_partition_that_fails_fails_alone_and_the_run_names_it(partly: tuple[Path, str]) -> None:
    folder, run_id = partly
    with dg.DagsterInstance.local_temp(str(folder / "home")) as instance:
        events = [entry.dagster_event for entry in instance.all_logs(run_id) if entry.dagster_event]
    made = [event.step_materialization_data.materialization for event in events if event.is_step_materialization]
    assert Counter((one.asset_key.path[-1], one.partition) for one in made) == every(GOOD) + Counter([("applications", WORSE)])
    (failed,) = [event.step_failure_data for event in events if event.event_type_value == "STEP_FAILURE"]
    assert failed.error.cause.cls_name == "PartitionsFailedError"
    told = failed.user_failure_data
    assert "2 of 3 partitions of 'loans' failed" in told.description
    assert f": {BAD} (applications: BatchRefusedError); {WORSE} (credit_score: BatchRefusedError)" in told.description
    metadata = {name: value.value for name, value in told.metadata.items()}
    assert metadata["failed_partitions"] == [BAD, WORSE]
    assert (metadata["failed_count"], metadata["completed_count"]) == (2, 1)
    assert [record.data["partition"] for record in told.metadata["failed"].records] == [BAD, WORSE]
    checks = [event.event_specific_data for event in events if event.event_type_value == "ASSET_CHECK_EVALUATION"]
    assert [(check.asset_key.path[-1], check.partition, check.check_name) for check in checks if not check.passed] == [
        ("applications", BAD, "output"),
        ("credit_score", WORSE, "output"),
    ]
    assert [bool(store(folder).effective(f"loans/{day}")) for day in KEYS] == [True, False, False]


def test_a_re_execution_from_failure_runs_what_failed_and_nothing_else(
    partly: tuple[Path, str], desk: Path, instance: dg.DagsterInstance
) -> None:
    """Naive: the step that did all partitions does them all again, and pays for every call again."""
    folder, first = partly
    shutil.copytree(folder, desk, dirs_exist_ok=True)
    loans.write(desk, days={BAD: [700.0]})  # the entry of another day cannot be read again
    second = execute(instance, first)
    assert not second.success, "what was sealed as the entry of the third day is what it is"
    assert materialized(second) == every(BAD)
    assert "1 of 3 partitions of 'loans' failed" in failure(second).user_failure_data.description
    assert {(seal.attempt, seal.run_id) for seal in store(desk).seals(f"loans/{BAD}")} == {(first, second.run_id)}


def test_what_a_run_sealed_that_died_before_it_told_is_told_by_its_re_execution(
    partly: tuple[Path, str], desk: Path, instance: dg.DagsterInstance
) -> None:
    folder, first = partly
    shutil.copytree(folder, desk, dirs_exist_ok=True)
    for agent in ("applications", "credit_score"):
        attempt = store(desk).open_attempt(
            pipeline="loans", attempt=first, run_id=first, plan=sorted(AGENTS), entry="applications", workflow_key=BAD
        )
        loans.write(desk, days={BAD: [700.0]})
        resources = {"desk": loans.Desk(folder=str(desk))}
        node = loans.pipeline().node(agent)
        run_agent(store(desk), node, attempt, resources=resources, config_digest=config_digest(resources), partition_key=BAD)
    second = execute(instance, first)
    assert materialized(second) == every(BAD)
    assert Counter(seal.run_id == first for seal in store(desk).seals(f"loans/{BAD}")) == {True: 2, False: 2}


def test_what_all_would_meet_ends_the_run_and_names_those_that_were_not_begun(desk: Path, instance: dg.DagsterInstance) -> None:
    """Naive: each partition has its entry sealed, and its effects, before it meets the same open breaker."""
    (desk / "outage").touch()
    guarded = {"overrides": {"credit_score": {"breaker": {"fail_max": 1, "reset_timeout": 600}}}}
    result = execute(instance, run_config={"resources": {"policies": {"config": guarded}}})
    (desk / "outage").unlink()
    told = failure(result).user_failure_data.metadata["failed"].records
    whys = [(record.data["agent"], record.data["why"]) for record in told]
    assert whys[0] == ("credit_score", "AgentFailedError")
    assert whys[1] == ("credit_score", "BreakerOpenError")
    assert whys[2:] == [("", "not begun: BreakerOpenError")]
    assert store(desk).workflows() == [f"loans/{day}" for day in KEYS[:2]]


def test_a_part_of_the_pipeline_over_a_range_and_its_plan(copied: Path, instance: dg.DagsterInstance) -> None:
    """Two agents that read the entry, and what reads both: one of their steps does all three."""
    defs = loans.definitions(copied, partitions_def=DAYS, backfill_policy=SINGLE)
    chosen = ("credit_score", "verified_income", "approval")
    job = defs.resolve_implicit_global_asset_job_def()
    result = job.execute_in_process(
        instance=instance, tags=over(KEYS[0], KEYS[1]), asset_selection=[dg.AssetKey(["loans", agent]) for agent in chosen]
    )
    assert result.success
    assert materialized(result) == Counter((agent, day) for agent in chosen for day in KEYS[:2])
    newest = store(copied).seals(f"loans/{KEYS[0]}")[4:]
    assert [seal.agent for seal in newest] == [agent for agent in AGENTS if agent in chosen]
    assert {seal.plan for seal in newest} == {tuple(sorted(chosen))}


def test_one_day_is_run_as_without_the_policy(desk: Path, instance: dg.DagsterInstance) -> None:
    defs = loans.definitions(desk, partitions_def=DAYS, backfill_policy=SINGLE)
    result = defs.resolve_job_def("loans_job").execute_in_process(instance=instance, partition_key=KEYS[0])
    assert materialized(result) == every(KEYS[0])
    started = {event.step_key for event in result.all_events if event.event_type_value == "STEP_SUCCESS"}
    assert {f"loans__{agent}" for agent in AGENTS} <= started, "a step per agent"
    assert "chain_integrity" in {check.check_name for check in result.get_asset_check_evaluations()}


def test_more_workflows_than_tags_are_in_the_log(desk: Path, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    from dagster_mao.dagster import ranges, runs

    for module in (ranges, runs):
        monkeypatch.setattr(module, "WORKFLOWS_TAGGED", 1)
    defs = loans.definitions(desk, partitions_def=DAYS, backfill_policy=SINGLE)
    job, entry = defs.resolve_implicit_global_asset_job_def(), [dg.AssetKey(["loans", "applications"])]
    result = job.execute_in_process(instance=instance, tags=over(), asset_selection=entry)
    run = instance.get_run_by_id(result.run_id)
    assert run is not None
    assert len([tag for tag in run.tags if tag.startswith("mao/workflow.")]) == 1
    (told,) = [entry.user_message for entry in instance.all_logs(result.run_id) if entry.user_message.startswith("3 workflows")]
    assert all(f"loans/{day}" in told for day in KEYS)


# -- what is told at load ------------------------------------------------------------------------------------------------------------


def test_without_partitions_or_with_a_pool_the_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(mao.WiringError, match="has no partitions"):
        loans.definitions(tmp_path, backfill_policy=SINGLE)

    @mao.agent(pool="bureau")
    def pooled(applications: loans.Application) -> loans.Score:
        raise AssertionError

    pipeline = mao.Pipeline("loans", entry=loans.applications, agents=[pooled], partitions_def=DAYS)
    with pytest.raises(mao.WiringError, match=r"cannot hold the pool 'bureau'.*agent 'pooled'"):
        build_definitions(pipeline, resources=loans.resources(tmp_path), backfill_policy=SINGLE)


# -- an existing asset as the entry --------------------------------------------------------------------------------------------------


class Row(BaseModel):
    id: Annotated[str, mao.Key]


@mao.agent
def counted(raw: Row) -> Row:
    return raw


class Days(dg.IOManager):
    """Loads a range as Dagster's own IO managers do, a dict by partition key; or, naively, as one frame."""

    def __init__(self, as_one: bool) -> None:
        self._as_one = as_one

    def handle_output(self, context: dg.OutputContext, obj: Any) -> None: ...

    def load_input(self, context: dg.InputContext) -> Mapping[str, pl.DataFrame] | pl.DataFrame:
        days = {key: pl.DataFrame({"id": [f"{key} {n}" for n in range(2)]}) for key in context.asset_partition_keys}
        return pl.concat(days.values()) if self._as_one else days


@pytest.mark.parametrize("as_one", [False, True])
def test_an_existing_asset_as_the_entry_is_loaded_by_partition_or_refused(
    tmp_path: Path, instance: dg.DagsterInstance, as_one: bool
) -> None:
    raw = dg.AssetSpec("raw", partitions_def=DAYS).with_io_manager_key("days")
    pipeline = mao.Pipeline("counting", entry=mao.ExternalEntry("raw", Row), agents=[counted], partitions_def=DAYS)
    given = {"state_store": StateStoreResource(root=str(tmp_path / "state")), "days": Days(as_one)}
    made = build_definitions(pipeline, resources=given, backfill_policy=SINGLE)
    job = dg.Definitions.merge(dg.Definitions(assets=[raw]), made).resolve_job_def("counting_job")
    result = job.execute_in_process(instance=instance, tags=over(), raise_on_error=False)
    assert result.success is not as_one
    if as_one:
        assert "raw: WiringError" in result.failure_data_for_node("counting__raw").user_failure_data.description
        return
    sealed = store(tmp_path)
    assert [sealed.read(sealed.effective(f"counting/{day}")["counted"]).collect()["id"].to_list() for day in KEYS] == [
        [f"{day} 0", f"{day} 1"] for day in KEYS
    ]
