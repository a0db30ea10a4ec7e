"""What is kept is known again under the same key and fingerprint, and told to the call log once, on SQLite and PostgreSQL."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import sqlite3
import stat
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, multiple, rule, run_state_machine_as_test

from dagster_mao.errors import StoreError
from dagster_mao.gateway import Answers, CallRecord, idempotency_key
from dagster_mao.gateway import _answers as module
from dagster_mao.gateway._shared import SharedStore
from tests.gateway.crew import until

DAY = 86400.0
SECRET = "Zaphod-4711"


def answers(shared: SharedStore, **changed: Any) -> Answers:
    given: dict[str, Any] = {
        "pipeline": "credit",
        "workflow_id": "credit/2026-01-01",
        "agent": "scores",
        "fingerprint": "v1",
        "attempt": "attempt-1",
        "run_id": "run-1",
        "keep": 7 * DAY,
    }
    return Answers(shared, **{**given, **changed})


def key(n: object) -> str:
    return idempotency_key("credit/2026-01-01", 0, "scores", f"app-{n}", "digest")


def told(**changed: Any) -> CallRecord:
    said = CallRecord(1, time.time(), 0.25, "answered", model="m", input_tokens=7, output_tokens=3, cost=0.1, breaker="closed")
    return said._replace(**changed)


def rows(shared: SharedStore, table: sa.Table = module._ANSWERS) -> int:
    with shared.reading() as connection:
        return int(connection.scalar(sa.select(sa.func.count()).select_from(table)) or 0)


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "mao-answers"]


# -- keys ----------------------------------------------------------------------------------------------------------------------------

PARTS = st.tuples(st.text(), st.integers(0, 99), st.text(), st.none() | st.text(), st.text())


@given(PARTS, PARTS)
def test_two_calls_have_one_key_only_if_they_are_the_same(one: Any, other: Any) -> None:
    assert (idempotency_key(*one) == idempotency_key(*other)) == (one == other)


def test_a_key_is_what_the_other_side_has_kept() -> None:
    """It must never change."""
    assert idempotency_key("w", 0, "a", "r", "d") == hashlib.sha256(b"1:w1:01:a1:r1:d").hexdigest()
    assert idempotency_key("w", 0, "a", None, "d") == hashlib.sha256(b"1:w1:01:a-1:d").hexdigest()


# -- known again ---------------------------------------------------------------------------------------------------------------------


def test_what_was_kept_is_known_to_the_next_step(shared: SharedStore) -> None:
    said = told()
    with answers(shared) as first:
        first.keep(key(1), "app-1", b"\x00one", said)
    with answers(shared, attempt="attempt-2", run_id="run-2") as second:
        assert second.known([key(1), key(2)]) == {key(1): (b"\x00one", said, "attempt-1", "run-1")}
        assert second.known([]) == {}


def test_tasks_and_threads_keep_at_once(shared: SharedStore) -> None:
    with answers(shared) as kept:

        async def tasks() -> None:
            await asyncio.gather(*[kept.akeep(key(n), f"app-{n}", b"%d" % n, told()) for n in range(100)])

        threads = [threading.Thread(target=kept.keep, args=(key(n), f"app-{n}", b"%d" % n, told())) for n in range(100, 140)]
        for thread in threads:
            thread.start()
        asyncio.run(tasks())
        for thread in threads:
            thread.join()
    with answers(shared) as again:
        known = again.known([key(n) for n in range(140)])
    assert {k: a.value for k, a in known.items()} == {key(n): b"%d" % n for n in range(140)}


def test_what_tasks_wait_for_together_is_one_commit(shared: SharedStore) -> None:
    with answers(shared) as kept:
        kept.keep(key(0), None, b"", told())

        async def tasks() -> None:
            await asyncio.gather(*[kept.akeep(key(n), None, b"", told()) for n in range(1, 17)])

        with commits(kept) as made:
            asyncio.run(tasks())
    assert sum(made) == 16
    assert len(made) <= 3


@contextmanager
def commits(kept: Answers) -> Iterator[list[int]]:
    """How many answers each commit has."""
    made: list[int] = []
    commit = kept._commit

    def noted(**how: Any) -> Any:
        batch = commit(**how)
        made.extend([len(batch.rows)] * bool(batch.rows))  # one that makes a pause durable may have none
        return batch

    kept._commit = noted  # type: ignore[method-assign]
    yield made


FRESH = {"fresh": True, "attempt": "attempt-2"}


@pytest.mark.parametrize("other", [{"fingerprint": "v2"}, {"workflow_id": "credit/2026-01-02"}, {"agent": "frauds"}, FRESH])
def test_another_agent_version_or_a_fresh_run_is_not_answered(shared: SharedStore, other: dict[str, Any]) -> None:
    with answers(shared) as first:
        first.keep(key(1), "app-1", b"one", told())
    with answers(shared, **other) as second:
        assert second.known([key(1)]) == {}


def test_what_a_fresh_run_was_answered_replaces_the_old_answer(shared: SharedStore) -> None:
    with answers(shared) as first:
        first.keep(key(1), "app-1", b"old", told())
    with answers(shared, **FRESH) as fresh:
        fresh.keep(key(1), "app-1", b"new", told())
    with answers(shared, **FRESH, run_id="run-3") as again:
        assert again.known([key(1)])[key(1)].value == b"new", "the same attempt goes on after a crash: what it paid for itself, it has"
    with answers(shared) as second:
        assert second.known([key(1)])[key(1)].value == b"new"


def test_a_zombie_does_not_replace_what_a_later_step_was_answered(shared: SharedStore) -> None:
    with answers(shared, run_id="zombie") as zombie, answers(shared, run_id="next") as following:
        zombie.keep(key(0), None, b"", told())
        following.keep(key(1), None, b"next", told())
        zombie.keep(key(1), None, b"zombie", told())
        assert zombie.known([key(1)])[key(1)].value == b"next"
    with answers(shared) as after:
        assert after.known([key(1)])[key(1)].value == b"next"
        assert sorted((each.run_id, each.key) for each in after.unlogged()) == sorted(
            [("zombie", key(0)), ("zombie", key(1)), ("next", key(1))]
        )


def test_any_text_is_a_record(shared: SharedStore) -> None:
    """A key with a NUL, which PostgreSQL has no text for, or that is no UTF-8; a model's name, likewise."""
    texts = ["a\x00b", "\ud800", "ключ", ""]
    with answers(shared) as first:
        for text in texts:
            first.keep(key(text), text, text.encode("utf-8", "surrogatepass"), told(model=text, cost=float("inf")))
    with answers(shared) as second:
        assert {each.record for each in second.unlogged()} == set(texts)
        known = second.known([key(text) for text in texts])
    assert {answer.value.decode("utf-8", "surrogatepass") for answer in known.values()} == set(texts)
    assert {answer.told.cost for answer in known.values()} == {float("inf")}


# -- the call log --------------------------------------------------------------------------------------------------------------------


def test_what_a_killed_step_did_not_log_is_handed_out_once(shared: SharedStore) -> None:
    said = told()
    killed = answers(shared, about={"epoch": 3})
    killed.keep(key(1), "app-1", b"one", said)
    killed.logged()
    killed.keep(key(2), "app-2", b"two", said)
    killed.keep(key(3), None, b"three", said)
    with answers(shared, workflow_id="credit/2026-01-02") as another:
        assert list(another.unlogged()) == []
    with answers(shared, fingerprint="v2", run_id="run-2") as following:
        following.keep(key(4), None, b"four", said)
        assert list(following.unlogged()) == [
            (key(2), "app-2", said, "attempt-1", "run-1", {"epoch": 3}),
            (key(3), None, said, "attempt-1", "run-1", {"epoch": 3}),
        ]
        following.logged()
        assert list(following.unlogged()) == []
    with answers(shared) as last:
        assert list(last.unlogged()) == []
    killed.close()


def test_what_was_handed_out_and_not_logged_is_handed_out_again(shared: SharedStore) -> None:
    with answers(shared) as killed:
        killed.keep(key(1), "app-1", b"one", told())
    with answers(shared) as failing:
        assert [each.key for each in failing.unlogged()] == [key(1)]
    with answers(shared) as following:
        assert [each.key for each in following.unlogged()] == [key(1)]


def test_what_a_living_step_logged_itself_is_not_handed_out_again(shared: SharedStore) -> None:
    """Another one took it for killed, and says later that it logged less."""
    with answers(shared, run_id="living") as living, answers(shared, run_id="other") as other:
        living.keep(key(1), None, b"", told())
        assert len(list(other.unlogged())) == 1
        living.keep(key(2), None, b"", told())
        living.logged()
        other.logged()
        assert list(other.unlogged()) == []


def test_pages_are_read_to_their_end(shared: SharedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PAGE", 3)
    monkeypatch.setattr(module, "_LOOKED_UP", 2)
    with answers(shared) as first:
        for n in range(9):
            first.keep(key(n), None, b"%d" % n, told())
    with answers(shared) as second:
        assert len(second.known([key(n) for n in range(12)])) == 9
        assert [each.key for each in second.unlogged()] == [key(n) for n in range(9)]


# -- against a dict ------------------------------------------------------------------------------------------------------------------


class Modelled(RuleBasedStateMachine):
    """Steps that keep, look up, log, close and are killed, in any order, against lists and a dict."""

    shared: SharedStore
    steps = Bundle("steps")
    keys = st.sampled_from([key(n) for n in (0, 1, 2, 3, "child")])

    def __init__(self) -> None:
        super().__init__()
        self.pipeline = uuid.uuid4().hex
        self.begun: list[dict[str, Any]] = []  # steps that have kept something, in this order

    @rule(target=steps, fingerprint=st.sampled_from("ab"), fresh=st.booleans(), attempt=st.sampled_from("xy"))
    def begin(self, fingerprint: str, fresh: bool, attempt: str) -> Any:
        run_id = uuid.uuid4().hex
        of = {"run_id": run_id, "fingerprint": fingerprint, "fresh": fresh, "attempt": attempt}
        return {"step": answers(self.shared, pipeline=self.pipeline, **of), **of, "kept": [], "logged": 0, "handed": []}

    @rule(one=steps, asked=st.lists(st.tuples(keys, st.binary(max_size=3), st.booleans()), min_size=1, max_size=4), together=st.booleans())
    def keep(self, one: Any, asked: Any, together: bool) -> None:
        given = [(k, None, value, told(started=time.time() - (8 * DAY if old else 0))) for k, value, old in asked]
        if all(step is not one for step in self.begun):
            self.begun.append(one)
        if together:

            async def tasks() -> None:
                await asyncio.gather(*[one["step"].akeep(*each) for each in given])

            asyncio.run(tasks())
        else:
            for each in given:
                one["step"].keep(*each)
        one["kept"] += [(k, value, said) for k, _, value, said in given]

    @rule(one=steps, asked=st.sets(keys))
    def look(self, one: Any, asked: set[str]) -> None:
        found = {k: (answer.value, answer.run_id) for k, answer in one["step"].known(sorted(asked)).items()}
        model = {}
        for step in self.begun:
            if step is one or (one["fresh"] and step["attempt"] != one["attempt"]):
                continue
            for k, value, said in step["kept"]:
                if step["fingerprint"] == one["fingerprint"] and k in asked:
                    model[k] = (value, step["run_id"], said.started > time.time() - 7 * DAY)
        assert found == {k: (value, run_id) for k, (value, run_id, is_young) in model.items() if is_young}

    @rule(one=steps)
    def hand_out(self, one: Any) -> None:
        others = [step for step in self.begun if step is not one]
        handed = [(step["run_id"], k, said) for step in others for k, _, said in step["kept"][step["logged"] :]]
        assert [(each.run_id, each.key, each.told) for each in one["step"].unlogged()] == handed
        one["handed"] = [(step, len(step["kept"])) for step in others]

    @rule(one=steps)
    def log(self, one: Any) -> None:
        one["step"].logged()
        one["logged"] = len(one["kept"])
        for step, number in one["handed"]:
            step["logged"] = max(step["logged"], number)
        one["handed"] = []

    @rule(one=consumes(steps))
    def end(self, one: Any) -> None:
        one["step"].close()

    @rule(one=consumes(steps))
    def die(self, one: Any) -> None:
        one["step"]._drop_line()

    @rule(target=steps, one=consumes(steps))
    def outlive_a_fork(self, one: Any) -> Any:
        """The child keeps something too, as another step."""
        pid = os.fork()
        if pid == 0:
            with_code(lambda: one["step"].keep(key("child"), None, b"child", told()))
        assert os.waitpid(pid, 0)[1] == 0
        with one["step"]._shared.reading() as connection:
            said = connection.scalar(sa.select(module._ANSWERS.c.told).order_by(module._ANSWERS.c.id.desc()).limit(1))
        self.begun.append({**one, "kept": [(key("child"), b"child", module._record(said))], "logged": 0})
        return multiple(one)


def with_code(does: Callable[[], object]) -> None:
    """In a forked child."""
    try:
        does()
        os._exit(0)
    except BaseException:
        os._exit(1)


def test_against_a_dict(shared: SharedStore) -> None:
    machine = type("Here", (Modelled,), {"shared": shared})
    quick = settings(max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck))
    run_state_machine_as_test(machine, settings=quick)


# -- what survives -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def durable(shared: SharedStore) -> list[str]:
    """Grows by one with each commit that is flushed to disk."""
    made: list[str] = []
    with shared.transaction():
        pass

    @sa.event.listens_for(shared._engine, "commit")
    def committed(connection: sa.Connection) -> None:
        if connection.dialect.name == "sqlite":
            if connection.get_execution_options().get("mao_synchronous") == "FULL":
                made.append("")
        elif connection.exec_driver_sql("SHOW synchronous_commit").scalar() == "on":
            made.append("")

    return made


def test_power_loss_costs_a_second_at_most(shared: SharedStore, durable: list[str]) -> None:
    """Without any further call, what was kept is flushed; with many, not more than once in a second, and at the end."""
    begun = time.monotonic()
    with answers(shared) as kept:
        for n in range(50):
            kept.keep(key(n), None, b"", told())
        assert 1 <= len(durable) <= 2 + time.monotonic() - begun
        assert kept._dirty
        until(lambda: not kept._dirty)
        seen = len(durable)
        kept.keep(key(50), None, b"", told())
        kept.close()
        assert len(durable) > seen or not kept._dirty
        flushed = len(durable)
    assert len(durable) == flushed, "an end is an end"
    with answers(shared) as idle:
        idle.known([key(1)])
    assert len(durable) == flushed, "what keeps nothing flushes nothing"


def test_a_slow_agents_answers_are_flushed_at_once(shared: SharedStore, durable: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A second between two answers: each is durable when `keep` returns."""
    monkeypatch.setattr(module, "SYNC_EVERY", 0.0)
    with answers(shared) as kept:
        for n in range(5):
            kept.keep(key(n), None, b"", told())
            assert len(durable) == n + 1


_HANG_UP = """SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND application_name = 'hung up'"""


def test_a_lost_connection_is_made_anew(postgres_url: str) -> None:
    shared = SharedStore(f"{postgres_url}&application_name=hung%20up")
    with answers(shared) as kept:
        kept.keep(key(1), None, b"", told())
        kept.keep(key(2), None, b"", told())
        with SharedStore(postgres_url).transaction() as connection:
            assert connection.exec_driver_sql(_HANG_UP).all(), "there was a connection to lose"
        kept.keep(key(3), None, b"", told())
        kept.keep(key(4), None, b"", told())
    with answers(shared) as again:
        assert set(again.known([key(n) for n in range(9)])) == {key(n) for n in (1, 2, 3, 4)}


# -- forgetting ----------------------------------------------------------------------------------------------------------------------


def pass_time(shared: SharedStore, seconds: float) -> None:
    with shared.transaction() as connection:
        columns = module._STEPS.c.last, module._STEPS.c.until
        connection.execute(sa.update(module._STEPS).values({column: column - seconds for column in columns}))


def test_old_answers_are_forgotten_in_bites(shared: SharedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BITE", 10)
    for workflow in ("credit/1", "credit/2"):
        with answers(shared, workflow_id=workflow) as old:
            for n in range(12):
                old.keep(key(n), None, b"", told())
    pass_time(shared, 8 * DAY)
    with answers(shared) as young:
        young.keep(key(0), None, b"", told())
        young._forget = lambda: None  # type: ignore[method-assign]
    bites: list[int] = []

    @sa.event.listens_for(shared._engine, "after_cursor_execute")
    def executed(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if statement.startswith("DELETE FROM mao_answers"):
            bites.append(cursor.rowcount)

    answers(shared).close()
    assert bites == [10, 2, 10, 2]
    assert rows(shared) == 1
    assert rows(shared, module._STEPS) == 1


@pytest.mark.parametrize(("days", "forgotten"), [(2, False), (8, True)])
def test_answers_of_an_agent_that_is_gone_are_forgotten_too(shared: SharedStore, days: int, forgotten: bool) -> None:
    """By whoever comes, when it would have forgotten them itself; its successor may keep its own for a shorter time."""
    with answers(shared, agent="gone") as gone:
        gone.keep(key(1), None, b"", told())
    pass_time(shared, days * DAY)
    answers(shared, keep=DAY).close()
    assert rows(shared) == (not forgotten)


def test_an_agent_that_keeps_for_a_shorter_time_now_forgets_the_older_ones(shared: SharedStore) -> None:
    with answers(shared) as long:
        long.keep(key(1), None, b"", told())
    pass_time(shared, 2 * DAY)
    answers(shared, keep=DAY).close()
    assert rows(shared) == 0


def test_a_long_close_forgets_a_part(shared: SharedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BITE", 2)
    with answers(shared) as old:
        for n in range(50):
            old.keep(key(n), None, b"", told())
    pass_time(shared, 8 * DAY)
    answers(shared).close()
    assert 0 < rows(shared) < 50
    for _ in range(3):
        answers(shared).close()
    assert rows(shared) == 0


def test_a_step_that_was_forgotten_while_it_lived_goes_on(shared: SharedStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with answers(shared) as silent:
        silent.keep(key(1), None, b"one", told())
        pass_time(shared, 8 * DAY)
        answers(shared).close()
        assert rows(shared) == 0
        silent._synced -= module.SYNC_EVERY  # it was silent for days
        silent.keep(key(2), None, b"two", told())
        silent.keep(key(3), None, b"three", told())
    with answers(shared) as following:
        assert set(following.known([key(1), key(2), key(3)])) == {key(2), key(3)}


def test_a_living_step_is_let_alone(shared: SharedStore) -> None:
    """However short its answers are to be kept: else it would write where nobody looks."""
    with answers(shared, keep=1e-6) as living:
        living.keep(key(1), None, b"", told())
        answers(shared, keep=1e-6).close()
        assert rows(shared, module._STEPS) == 1
        assert answers(shared, keep=1e-6).known([key(1)]) == {}


# -- what it leaves behind -----------------------------------------------------------------------------------------------------------


def test_threads_end_with_close(shared: SharedStore) -> None:
    before = workers()
    with answers(shared) as kept:
        asyncio.run(kept.akeep(key(1), None, b"", told()))
        assert len(workers()) == len(before) + 1
    assert workers() == before
    with pytest.raises(RuntimeError, match="closed"):
        kept.keep(key(1), None, b"", told())
    kept.close()


def test_a_process_ends_without_close(tmp_path: Path) -> None:
    code = """
import asyncio, sys
from tests.gateway.test_answers import answers, key, told
from dagster_mao.gateway._shared import SharedStore
kept = answers(SharedStore(sys.argv[1]))
async def tasks():
    await asyncio.gather(*[kept.akeep(key(n), None, b"", told()) for n in range(9)])
asyncio.run(tasks())
"""
    database = tmp_path / "shared.db"
    subprocess.run([sys.executable, "-c", code, str(database)], check=True, timeout=120)
    assert rows(SharedStore(database)) == 9


def test_a_cancelled_task_holds_up_nobody(shared: SharedStore) -> None:
    async def tasks(kept: Answers) -> None:
        some = [asyncio.ensure_future(kept.akeep(key(n), None, b"", told())) for n in range(4)]
        await asyncio.sleep(0)
        some[1].cancel()
        done = await asyncio.gather(*some, return_exceptions=True)
        assert [type(each) for each in done] == [type(None), asyncio.CancelledError, type(None), type(None)]

    with answers(shared) as kept:
        asyncio.run(tasks(kept))
    with answers(shared) as again:
        assert len(again.known([key(n) for n in range(4)])) == 4, "it was paid for"


def test_forks_while_threads_keep(shared: SharedStore) -> None:
    """Both go on, as steps of their own, on connections of their own."""
    stop, done = threading.Event(), []
    with answers(shared) as kept:

        def write(which: int) -> None:
            while not stop.is_set():
                n = f"{which}-{len(done)}"
                kept.keep(key(n), None, b"", told())
                done.append(n)

        threads = [threading.Thread(target=write, args=(which,)) for which in range(3)]
        for thread in threads:
            thread.start()
        try:
            for child in range(8):
                pid = os.fork()
                if pid == 0:
                    with_code(lambda n=child: [kept.keep(key(f"child {n} {i}"), None, b"", told()) for i in range(3)])  # type: ignore[misc]
                assert os.waitpid(pid, 0)[1] == 0
        finally:
            stop.set()
            for thread in threads:
                thread.join()
    wanted = {key(n) for n in done} | {key(f"child {n} {i}") for n in range(8) for i in range(3)}
    with answers(shared) as following:
        assert set(following.known(sorted(wanted))) == wanted


def test_errors_and_logs_say_nothing_of_values(shared: SharedStore, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    value = SECRET.encode()
    with answers(shared) as kept:
        kept.keep(key(1), SECRET, value, told())
        kept.keep(key(2), SECRET, value, told())
        with shared.transaction() as connection:
            connection.exec_driver_sql("ALTER TABLE mao_answers RENAME TO elsewhere")
        with pytest.raises(StoreError) as alone:
            kept.keep(key(3), SECRET, value, told())
        with pytest.raises(StoreError) as together:
            asyncio.run(kept.akeep(key(4), SECRET, value, told()))
        with shared.transaction() as connection:
            connection.exec_driver_sql("ALTER TABLE elsewhere RENAME TO mao_answers")
        kept.keep(key(5), SECRET, value, told())
    with answers(shared) as again:
        assert set(again.known([key(n) for n in range(9)])) == {key(1), key(2), key(5)}
    for raised in (alone.value, together.value):
        chain = []
        error: BaseException | None = raised
        while error is not None:
            chain.append(str(error))
            error = error.__cause__ or error.__context__
        assert SECRET not in "".join(chain)
        assert value.hex() not in "".join(chain)
    assert SECRET not in caplog.text


def test_nobody_else_can_read_them_than_could_before(tmp_path: Path) -> None:
    """The file, and the two beside it, have the permissions that the process's umask gives."""
    umask = os.umask(0o077)
    try:
        with answers(SharedStore(tmp_path / "shared.db")) as kept:
            kept.keep(key(1), None, SECRET.encode(), told())
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    finally:
        os.umask(umask)
    assert set(modes.values()) == {0o600}
    assert {"shared.db", "shared.db-wal"} <= set(modes)


# -- facts it stands on --------------------------------------------------------------------------------------------------------------


def test_facts_of_sqlite(tmp_path: Path) -> None:
    """An id is never given twice: a step that was forgotten must not write into its successor's answers."""
    shared = SharedStore(tmp_path / "shared.db")
    with answers(shared) as first:
        first.keep(key(1), None, b"", told())
    pass_time(shared, 8 * DAY)
    answers(shared).close()
    assert rows(shared, module._STEPS) == 0
    with answers(shared) as second:
        second.keep(key(1), None, b"", told())
        assert (first._step, second._step) == (1, 2)


def test_a_temporary_database_of_sqlite_leaves_nothing() -> None:
    """However large it is, it is a file without a name: the index of known answers dies with its process."""
    made = sqlite3.connect("")
    made.execute("PRAGMA cache_size=10")
    made.execute("CREATE TABLE t (a)")
    made.executemany("INSERT INTO t VALUES (?)", [(b"x" * 1000,) for _ in range(1000)])
    opened = [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    assert any("etilqs" in name and name.endswith("(deleted)") for name in opened)
    made.close()
