"""A bank that counts: a ledger in SQLite that shows each effect that is missing, and each that was had twice."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

from dagster_mao.journal import NotDoneError

_SCHEMA = """
CREATE TABLE IF NOT EXISTS ledger (
    entry INTEGER PRIMARY KEY, asked TEXT NOT NULL, key TEXT NOT NULL, kind TEXT, record TEXT, epoch INTEGER, effect INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS of_key ON ledger (key);
CREATE TABLE IF NOT EXISTS cancelled (key TEXT PRIMARY KEY, epoch INTEGER NOT NULL);
"""


class RefusedError(NotDoneError):
    """The bank did not do it, for sure."""


class Bank:
    """Does a thing once per key, and cancels what it did. It does not know epochs: what was cancelled before it was asked for, it does."""

    compares_epoch = False

    def __init__(self, path: Path | str) -> None:
        self.path = str(path)
        self._connection: sqlite3.Connection | None = None

    def do(self, key: str, kind: str, record: str | None, epoch: int) -> str:
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            done = connection.execute("SELECT count(*) FROM ledger WHERE key = ? AND effect = 1", (key,)).fetchone()[0]
            if self.compares_epoch:
                row = connection.execute("SELECT epoch FROM cancelled WHERE key = ?", (key,)).fetchone()
                if row is not None and epoch < row[0]:
                    self._post(connection, "do", key, kind, record, epoch, 0)
                    connection.execute("COMMIT")
                    raise RefusedError
            self._post(connection, "do", key, kind, record, epoch, 0 if done else 1)
            connection.execute("COMMIT")
        return f"{kind} {key[:8]}"

    def cancel(self, key: str, epoch: int) -> None:
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            there = connection.execute("SELECT sum(effect) FROM ledger WHERE key = ?", (key,)).fetchone()[0] or 0
            self._post(connection, "cancel", key, None, None, epoch, -1 if there else 0)
            if self.compares_epoch:
                connection.execute(
                    "INSERT INTO cancelled VALUES (?, ?) ON CONFLICT (key) DO UPDATE SET epoch = max(epoch, excluded.epoch)", (key, epoch)
                )
            connection.execute("COMMIT")

    def _post(
        self, connection: sqlite3.Connection, asked: str, key: str, kind: str | None, record: str | None, epoch: int, effect: int
    ) -> None:
        values = (asked, key, kind, record, epoch, effect)
        connection.execute("INSERT INTO ledger (asked, key, kind, record, epoch, effect) VALUES (?, ?, ?, ?, ?, ?)", values)

    # -- the auditor -----------------------------------------------------------------------------------------------------------------

    def standing(self) -> dict[tuple[str, str], int]:
        """What stands, by kind and record: how often."""
        query = (
            "SELECT kind, record, sum(net) FROM (SELECT key, max(kind) AS kind, max(record) AS record, sum(effect) AS net FROM ledger"
            " GROUP BY key) GROUP BY kind, record HAVING sum(net) != 0"
        )
        with self._connected() as connection:
            return {(kind, record): net for kind, record, net in connection.execute(query)}

    def asked(self, what: str) -> list[str]:
        """The keys it was asked to `do` or to `cancel`, in order."""
        with self._connected() as connection:
            return [key for (key,) in connection.execute("SELECT key FROM ledger WHERE asked = ? ORDER BY entry", (what,))]

    def effects(self) -> int:
        """How many things it did, undone ones included."""
        with self._connected() as connection:
            return int(connection.execute("SELECT count(*) FROM ledger WHERE effect = 1").fetchone()[0])

    def _connected(self) -> sqlite3.Connection:
        if self._connection is None:
            self._connection = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
            self._connection.executescript("PRAGMA journal_mode=WAL; PRAGMA synchronous=OFF;" + _SCHEMA)
        return self._connection

    def __reduce__(self) -> tuple[type[Bank], tuple[str]]:
        return (type(self), (self.path,))


class FencingBank(Bank):
    """One that compares (key, epoch): what was cancelled for a later epoch is refused, also when it is asked for first."""

    compares_epoch = True


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    """Waits for what has to happen."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)
