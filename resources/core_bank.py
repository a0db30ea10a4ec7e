"""The bank that the credit agents act on: small, but its ledger shows every effect that is missing or that was asked for twice."""

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import dagster as dg
from pydantic import PrivateAttr

SCHEMA = """
PRAGMA journal_mode = WAL;
CREATE TABLE IF NOT EXISTS ledger (
    entry INTEGER PRIMARY KEY, posted_at TEXT NOT NULL, key TEXT NOT NULL, kind TEXT NOT NULL,
    application_id TEXT NOT NULL, amount INTEGER NOT NULL, took_effect INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS cancellations (
    entry INTEGER PRIMARY KEY, posted_at TEXT NOT NULL, key TEXT NOT NULL, epoch INTEGER NOT NULL, took_effect INTEGER NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS one_effect_per_key ON ledger (key) WHERE took_effect;
CREATE UNIQUE INDEX IF NOT EXISTS one_undoing_per_key ON cancellations (key) WHERE took_effect;
CREATE INDEX IF NOT EXISTS cancelled ON cancellations (key, epoch);
CREATE TRIGGER IF NOT EXISTS no_update BEFORE UPDATE ON ledger BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS no_delete BEFORE DELETE ON ledger BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS no_change BEFORE UPDATE ON cancellations BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
CREATE TRIGGER IF NOT EXISTS no_loss BEFORE DELETE ON cancellations BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""


class CoreBank(dg.ConfigurableResource):
    """A core bank in one SQLite file. Amounts are DM.

    Everything asked of it is posted to the ledger under an idempotency key. The first posting under a key takes effect; a repeat is
    written down and takes none. So it is with cancellations; what is cancelled before it was asked for takes no effect later either.
    """

    path: str
    _lock: threading.Lock = PrivateAttr(default_factory=threading.Lock)
    _connection: sqlite3.Connection | None = PrivateAttr(default=None)

    def post(self, key: str, kind: str, application_id: str, amount: int = 0, *, epoch: int = 0) -> bool:
        """Asks for an effect (`inquiry`, `reservation`, `offer`), and says whether this posting is the one that took effect.

        Raises: ValueError when the key was used for something else before (doing nothing in silence would leave the wrong amount reserved),
        or was cancelled in this epoch or a later one: whoever asks comes too late.
        """
        with self._ledger() as ledger:
            first = ledger.execute("SELECT kind, application_id, amount FROM ledger WHERE key = ? AND took_effect", (key,)).fetchone()
            if first not in (None, (kind, application_id, amount)):
                raise ValueError(f"the key {key!r} stands for {first}, not for {(kind, application_id, amount)}")
            if ledger.execute("SELECT 1 FROM cancellations WHERE key = ? AND epoch >= ?", (key, epoch)).fetchone():
                raise ValueError(f"the key {key!r} was cancelled")
            ledger.execute(
                "INSERT INTO ledger (posted_at, key, kind, application_id, amount, took_effect) VALUES (?, ?, ?, ?, ?, ?)",
                (_now(), key, kind, application_id, amount, first is None),
            )
        return first is None

    def cancel(self, key: str, epoch: int = 0) -> bool:
        """Takes an effect back, and refuses it from then on; says whether this cancellation is the one that took effect."""
        with self._ledger() as ledger:
            took = "SELECT EXISTS (SELECT 1 FROM ledger WHERE key = ?1 AND took_effect)"
            took += " AND NOT EXISTS (SELECT 1 FROM cancellations WHERE key = ?1 AND took_effect)"
            (takes_effect,) = ledger.execute(took, (key,)).fetchone()
            ledger.execute(
                "INSERT INTO cancellations (posted_at, key, epoch, took_effect) VALUES (?, ?, ?, ?)", (_now(), key, epoch, takes_effect)
            )
        return bool(takes_effect)

    def totals(self) -> list[tuple[str, int, int, int, int]]:
        """For each kind of effect: kind, how many stand, their amount, how many repeats took no effect, and how many were cancelled."""
        with self._ledger() as ledger:
            return ledger.execute(
                "SELECT kind, sum(e.took_effect AND c.key IS NULL), sum(amount * (e.took_effect AND c.key IS NULL)),"
                " sum(NOT e.took_effect), sum(e.took_effect AND c.key IS NOT NULL)"
                " FROM ledger e LEFT JOIN (SELECT key FROM cancellations WHERE took_effect) c ON c.key = e.key"
                " GROUP BY kind ORDER BY min(entry)"
            ).fetchall()

    @contextmanager
    def _ledger(self) -> Iterator[sqlite3.Connection]:
        """One transaction that has the write lock from its start, so that two writers cannot both believe to be the first."""
        with self._lock:
            if self._connection is None:
                self._connection = self._open()
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _open(self) -> sqlite3.Connection:
        Path(self.path).parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(self.path, timeout=60, isolation_level=None, check_same_thread=False)
        connection.executescript(SCHEMA)
        return connection

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:
        # A posting may still be under way in a thread that nobody waits for: the step failed, or the call timed out.
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat()
