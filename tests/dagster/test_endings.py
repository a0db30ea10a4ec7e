"""Is an attempt over? By the run list, and by the processes of runs that nobody saw die."""

import subprocess
import sys
import uuid

import dagster as dg
import pytest
from dagster._core.events import EngineEventData

from dagster_mao.dagster import endings
from dagster_mao.dagster.endings import ending, is_gone

SETTINGS = {"run_retries": {"enabled": True, "max_retries": 1}}


@pytest.fixture
def instance(tmp_path):
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield instance


def run(instance, status=dg.DagsterRunStatus.STARTED, *, root=None, **tags):
    again = {"root_run_id": root.run_id, "parent_run_id": root.run_id} if root else {}
    links = {f"dagster/{name}": value for name, value in again.items()}
    made = dg.DagsterRun(job_name="j", run_id=str(uuid.uuid4()), status=status, tags={**links, **tags}, **again)
    instance.add_run(made)
    return made


def executed_by(instance, run, pid):
    data = EngineEventData.in_process(pid)
    instance.report_engine_event(f"Executing steps in process (pid: {pid})", run, data)


def test_an_attempt_is_over_when_all_its_runs_have_ended(instance):
    root = run(instance, dg.DagsterRunStatus.FAILURE)
    assert ending(instance, root.run_id).waits_for is None
    again = run(instance, dg.DagsterRunStatus.STARTED, root=root)
    assert ending(instance, root.run_id).waits_for == f"run {again.run_id} is STARTED"
    instance.report_run_canceled(again)
    found = ending(instance, root.run_id)
    assert (found.waits_for, found.failed.run_id, len(found.runs)) == (None, again.run_id, 2)


def test_a_run_that_was_deleted_leaves_its_re_executions(instance):
    root = run(instance, dg.DagsterRunStatus.FAILURE)
    again = run(instance, dg.DagsterRunStatus.SUCCESS, root=root)
    instance.delete_run(root.run_id)
    found = ending(instance, root.run_id)
    assert [one.run_id for one in found.runs] == [again.run_id]
    assert found.failed is None
    assert ending(instance, "somebody's").runs == []


def test_a_run_whose_process_is_gone_is_marked_as_failed(instance):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        root = run(instance)
        assert not is_gone(instance, root), "nothing is known of its process"
        executed_by(instance, root, process.pid)
        assert ending(instance, root.run_id).waits_for == f"run {root.run_id} is STARTED"
        process.kill()
        while "Z" not in subprocess.run(["ps", "-o", "stat=", "-p", str(process.pid)], capture_output=True, text=True, check=True).stdout:
            pass
        assert is_gone(instance, root), "dead, though nobody has taken note"
    found = ending(instance, root.run_id)
    assert (found.waits_for, found.failed.status) == (None, dg.DagsterRunStatus.FAILURE)
    assert ending(instance, root.run_id).runs[0].status == dg.DagsterRunStatus.FAILURE


def test_another_process_with_the_same_number_is_another_process(instance, monkeypatch):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        root = run(instance)
        executed_by(instance, root, process.pid)
        assert not is_gone(instance, root)
        pid, told = endings._process(instance, root)
        monkeypatch.setattr(endings, "_process", lambda *_: (pid, told - 3600))
        assert is_gone(instance, root)
        process.kill()


def test_what_ran_elsewhere_is_not_judged_from_here(instance):
    """Another launcher's run has a process number of another host; the event log of this instance is a file of this host."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    local, remote = run(instance), run(instance, **{".dagster/grpc_info": "{}"})
    for one in (local, remote):
        executed_by(instance, one, process.pid)
    assert is_gone(instance, local)
    with dg.DagsterInstance.ephemeral() as other:  # its launcher is no default launcher, its event log no file
        for one in (local, remote):
            other.add_run(one)
            executed_by(other, one, process.pid)
            assert not is_gone(other, one)


def failed_under_retries(instance, **changes):
    made = run(instance)
    instance.report_run_failed(made)
    record = instance.get_run_record_by_id(made.run_id)
    assert record.dagster_run.tags["dagster/will_retry"] == "true"
    return record


def test_a_promised_retry_is_waited_for_while_somebody_keeps_the_promise(tmp_path, monkeypatch):
    with dg.DagsterInstance.local_temp(str(tmp_path), overrides=SETTINGS) as instance:
        record = failed_under_retries(instance)
        attempt = record.dagster_run.run_id
        assert ending(instance, attempt).waits_for is None, "no code server launched it, so the daemon cannot"
        monkeypatch.setattr(endings, "_is_kept", lambda *_: True)
        assert ending(instance, attempt).waits_for == f"run {attempt} will be retried"
        with monkeypatch.context() as later:
            later.setattr(endings.time, "time", lambda: record.end_time + 601)
            assert ending(instance, attempt).waits_for is None, "not for ever"
            assert ending(instance, attempt, retried_within=700).waits_for == f"run {attempt} will be retried"
        instance.add_run_tags(attempt, {"dagster/auto_retry_run_id": "the retry"})
        assert ending(instance, attempt).waits_for is None


def test_between_a_failure_and_the_word_whether_it_will_be_retried_nothing_is_decided(tmp_path, monkeypatch):
    with dg.DagsterInstance.local_temp(str(tmp_path), overrides=SETTINGS) as instance:
        root = run(instance, dg.DagsterRunStatus.FAILURE)  # as it is found before its tag is there
        assert ending(instance, root.run_id).waits_for == f"run {root.run_id} will be retried"
    with dg.DagsterInstance.ephemeral() as instance:
        root = run(instance, dg.DagsterRunStatus.FAILURE)
        assert ending(instance, root.run_id).waits_for is None, "no retries here"


def test_a_run_that_never_started_is_not_waited_for_for_ever(instance, monkeypatch):
    root = run(instance, dg.DagsterRunStatus.STARTING)
    assert ending(instance, root.run_id).waits_for == f"run {root.run_id} is STARTING"
    created = instance.get_run_record_by_id(root.run_id).create_timestamp.timestamp()
    monkeypatch.setattr(endings.time, "time", lambda: created + 601)
    assert ending(instance, root.run_id).waits_for is None
