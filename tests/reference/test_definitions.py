"""The code location, as Dagster's own command sees it."""

import subprocess
import sys
from pathlib import Path

import dagster as dg
from dagster._utils.schedules import cron_string_iterator

from assets.pipeline import credit
from definitions import defs


def test_dagster_validates_the_workspace():
    command = [str(Path(sys.executable).parent / "dagster"), "definitions", "validate", "-w", "workspace.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_five_agents_read_one_entry_as_the_design_says():
    graph = {agent.name: {one.upstream for one in agent.inputs} for agent in credit.agents.values()}
    entry = {"applications"}
    assert graph == {
        "applications": set(),
        "credit_score": entry,
        "income_verification": entry,
        "fraud_detection": entry,
        "risk_assessment": {"credit_score", "income_verification"},
        "approval": {"risk_assessment", "fraud_detection"},
    }


def test_every_asset_is_a_days_and_says_who_owns_it():
    for spec in defs.resolve_all_asset_specs():
        assert isinstance(spec.partitions_def, dg.DailyPartitionsDefinition), spec.key
        assert spec.group_name == "credit"
        assert spec.owners, spec.key
        assert spec.description, spec.key


def test_the_decisions_are_due_each_night_after_the_schedule_has_run():
    policies = {spec.key.path[-1]: spec.freshness_policy for spec in defs.resolve_all_asset_specs() if spec.freshness_policy}
    assert set(policies) == {"approval", "decision_report"}
    schedule = defs.get_repository_def().get_schedule_def("credit_schedule")
    for policy in policies.values():
        (deadline,) = {cron_string_iterator(0, policy.deadline_cron, "UTC").__next__().timestamp()}
        started = cron_string_iterator(0, schedule.cron_schedule, "UTC").__next__().timestamp()
        assert deadline - policy.lower_bound_delta.total_seconds() == started


def test_fairness_is_a_check_on_the_decisions_and_does_not_stop_them():
    (check,) = [spec for spec in defs.resolve_asset_graph().asset_check_keys if spec.name == "four_fifths"]
    assert check.asset_key == dg.AssetKey(["credit", "approval"])
    node = defs.resolve_asset_graph().get(check)
    assert not node.blocking


def test_days_are_decided_by_themselves_and_reports_are_switched_on_by_people():
    repository = defs.get_repository_def()
    assert repository.has_schedule_def("credit_schedule")
    assert repository.get_sensor_def("credit_reports").default_status == dg.DefaultSensorStatus.STOPPED
    assert repository.get_schedule_def("credit_schedule").default_status == dg.DefaultScheduleStatus.RUNNING
