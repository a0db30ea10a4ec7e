"""The shared store: nothing is lost, by whatever number of processes, forked or not, and it says what is wrong without its password."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path

import pytest
import sqlalchemy as sa

from dagster_mao.errors import StoreError
from dagster_mao.gateway._shared import METADATA, SharedStore, _after_fork_in_parent, _before_fork
from tests.gateway.crew import Member

COUNTERS = sa.Table("test_counters", METADATA, sa.Column("name", sa.Text, primary_key=True), sa.Column("n", sa.Integer, nullable=False))


def count(shared: SharedStore, times: int = 1) -> None:
    """Reads a number and writes the next one."""
    for _ in range(times):
        with shared.transaction(durable=False) as connection:
            n = connection.scalar(sa.select(COUNTERS.c.n).with_for_update())
            connection.execute(sa.update(COUNTERS).values(n=n + 1))


def started(shared: SharedStore) -> None:
    with shared.transaction() as connection:
        connection.execute(sa.insert(COUNTERS).values(name="x", n=0))


def counted(shared: SharedStore) -> int:
    with shared.reading() as connection:
        return int(connection.scalar(sa.select(COUNTERS.c.n)) or 0)


def test_eight_processes_make_the_tables_and_lose_no_update(crew: list[Member], shared: SharedStore) -> None:
    for member in crew:
        member.start("run", _open, shared.url)
    assert [member.reply() for member in crew] == [None] * 8
    started(shared)
    for member in crew:
        member.start("run", _count, shared.url)
    assert [member.reply() for member in crew] == [None] * 8
    assert counted(shared) == 200


def _open(url: str) -> None:
    with SharedStore(url).transaction():
        pass


def _count(url: str) -> None:
    count(SharedStore(url), 25)


def test_a_fork_while_a_thread_writes(shared: SharedStore) -> None:
    """Both go on, each on connections of its own."""
    started(shared)
    stop, done = threading.Event(), []

    def write() -> None:
        while not stop.is_set():
            count(shared)
            done.append(1)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(10):
            pid = os.fork()
            if pid == 0:
                try:
                    count(shared, 5)
                    os._exit(0)
                except BaseException:
                    os._exit(1)
            assert os.waitpid(pid, 0)[1] == 0
    finally:
        stop.set()
        thread.join()
    assert counted(shared) == len(done) + 50


def test_two_threads_that_fork_at_once_each_let_go_of_what_they_held(tmp_path: Path) -> None:
    """The first forks and lets go while the second waits for its turn."""
    shared = SharedStore(tmp_path / "shared.db")
    begun, ended = threading.Event(), threading.Event()

    def fork() -> None:
        begun.set()
        _before_fork()
        _after_fork_in_parent()
        ended.set()

    _before_fork()
    second = threading.Thread(target=fork)
    second.start()
    assert begun.wait(60)
    _after_fork_in_parent()
    second.join(60)
    assert ended.is_set()
    other = threading.Thread(target=started, args=(shared,))
    other.start()
    other.join(60)
    assert counted(shared) == 0, "nobody holds it any more"


def forked() -> int:
    """As `os.fork`, which filelock, that Dagster brings, refuses while another thread forks."""
    while True:
        try:
            return os.fork()
        except RuntimeError as error:
            if "filelock" not in str(error):
                raise


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_threads_fork_and_write(shared: SharedStore) -> None:
    started(shared)
    failed = []

    def forks() -> None:
        for _ in range(5):
            pid = forked()
            if pid == 0:
                try:
                    count(shared, 2)
                    os._exit(0)
                except BaseException:
                    os._exit(1)
            failed.append(os.waitpid(pid, 0)[1])
            count(shared)

    threads = [threading.Thread(target=forks) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert failed == [0] * 20
    assert counted(shared) == 60


def test_an_error_in_the_block_rolls_back(shared: SharedStore) -> None:
    def broken() -> None:
        with shared.transaction() as connection:
            connection.execute(sa.update(COUNTERS).values(n=7))
            raise KeyError

    started(shared)
    with pytest.raises(KeyError):
        broken()
    assert counted(shared) == 0


def test_readers_wait_for_no_writer(shared: SharedStore) -> None:
    """Nor does a process that opens the store meanwhile."""
    started(shared)
    other = SharedStore(shared.url)
    with shared.transaction() as connection:
        connection.execute(sa.update(COUNTERS).values(n=7))
        assert counted(other) == 0
    assert counted(other) == 7
    other.close()


def test_it_can_be_pickled(shared: SharedStore) -> None:
    started(shared)
    other = pickle.loads(pickle.dumps(shared))  # noqa: S301
    count(other)
    assert counted(shared) == 1
    other.close()


def test_making_one_touches_nothing(tmp_path: Path) -> None:
    shared = SharedStore(tmp_path / "below" / "shared.db")
    assert not shared.holds(COUNTERS)
    assert list(tmp_path.iterdir()) == []
    started(shared)
    assert shared.holds(COUNTERS)


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", ":memory:", "mysql://user:hunter2@host/db", "p:hunter2://@@["])
def test_what_no_process_can_share_is_refused(url: str) -> None:
    with pytest.raises(StoreError) as refused:
        SharedStore(url)
    assert "hunter2" not in str(refused.value)


def test_what_is_wrong_is_told_without_the_password(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "text.db").write_text("no database, but more than a hundred bytes of something else: " * 9)
    urls = [tmp_path / "file" / "shared.db", tmp_path / "text.db", "postgresql://ford:hunter2@127.0.0.1:1/x?password=hunter2"]
    for url in urls:
        with pytest.raises(StoreError, match="cannot be used") as refused:
            started(SharedStore(url))
        assert "hunter2" not in f"{refused.value} {refused.value.__cause__}"


def test_a_failing_statement_quotes_no_values(shared: SharedStore) -> None:
    started(shared)
    with pytest.raises(StoreError) as refused, shared.transaction() as connection:
        connection.execute(sa.insert(COUNTERS).values(name="x", n=4711))
    assert "4711" not in f"{refused.value} {refused.value.__cause__}"
