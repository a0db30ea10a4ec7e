"""Choreography under a real daemon and two code locations: each version is processed once by each subscriber, whatever is killed."""

from __future__ import annotations

import random
import time
from pathlib import Path

import dagster as dg
import pytest

from dagster_mao.choreography import enter
from dagster_mao.state import StateStore
from tests.choreography.loans import Ledger, batch, once, sealed
from tests.dagster.deployment import Deployment, deployed, until
from tests.dagster.stage import FOLDER, loans

MODULES = ["tests.dagster.stage", "tests.dagster.stage_elsewhere"]
AGENTS = ("score", "income", "risk", "notify")
QUEUE = "run_coordinator: {module: dagster, class: QueuedRunCoordinator, config: {max_concurrent_runs: 3}}\n"
ONE_RUN = QUEUE.replace("runs: 3", "runs: 1")
PATIENCE = 900.0  # seconds in which a busy machine has started all these processes


def arrive(store: StateStore, workflows: list[str]) -> None:
    for workflow in workflows:
        enter(store, loans(), batch(100.0), workflow=workflow)


def drained(store: StateStore, workflows: list[str]) -> bool:
    return sealed(store) == once(*workflows, agents=AGENTS)


def settled(deployment: Deployment) -> bool:
    return all(run.is_finished for run in deployment.instance.get_runs())


@pytest.mark.long
@pytest.mark.timeout(2 * PATIENCE)
def test_two_code_locations_drain_a_backlog_once_though_all_processes_are_killed_in_the_middle(tmp_path: Path) -> None:
    store, workflows = StateStore(tmp_path / "state"), ["w0", "w1", "w2"]
    arrive(store, workflows)
    with deployed(tmp_path / "home", MODULES, {FOLDER: str(tmp_path)}, ONE_RUN) as deployment:
        until(lambda: sealed(store), "the first seal", PATIENCE)
        deployment.kill_all()
        deployment.start()
        until(lambda: drained(store, workflows), "the backlog", PATIENCE)
        until(lambda: settled(deployment), "the end of all runs", PATIENCE)
        runs = deployment.instance.get_runs()
    executions = Ledger(tmp_path).executions
    assert executions.keys() == once(*workflows, agents=AGENTS).keys()
    assert sum(executions.values()) <= len(workflows) * len(AGENTS) + 4, "again is done only what was at work when it was killed"
    by_job = {run.job_name for run in runs}
    assert by_job == {f"loans__{agent}_job" for agent in AGENTS}
    tagged = [run.job_name for run in runs if "mao/workflow.w0" in run.tags]
    assert set(tagged) == by_job, "the run list is filtered by a workflow, over both code locations"
    with dg.DagsterInstance.from_config(str(tmp_path / "home")) as instance:
        (newest,) = instance.fetch_materializations(dg.AssetKey(["loans", "notify"]), limit=1).records
    assert newest.asset_materialization is not None


@pytest.mark.long
@pytest.mark.timeout(6 * PATIENCE)
@pytest.mark.parametrize("seed", [1, 2])
def test_under_dagster_dev_a_backlog_is_drained_once_though_everything_is_killed_again_and_again(tmp_path: Path, seed: int) -> None:
    store, workflows = StateStore(tmp_path / "state"), [f"w{number:03}" for number in range(40)]
    dice = random.Random(seed)
    arrive(store, workflows)
    with deployed(tmp_path / "home", MODULES, {FOLDER: str(tmp_path)}, QUEUE, is_dev=True) as deployment:
        for share in (0.05, 0.2, 0.4, 0.6, 0.8):
            wanted = int(share * len(workflows) * len(AGENTS))
            until(lambda wanted=wanted: sum(sealed(store).values()) >= wanted, f"{wanted} seals", PATIENCE)
            time.sleep(dice.uniform(0, 3))  # somewhere between two seals, or while nothing goes on
            (deployment.kill_all if dice.random() < 0.6 else deployment.kill_daemon)()
            deployment.start()
        until(lambda: drained(store, workflows), "the backlog", PATIENCE)
    assert max(Ledger(tmp_path).executions.values()) <= 3
