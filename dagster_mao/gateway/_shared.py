"""The shared store: one SQL database for what all processes must agree on at once (breakers, limits, journal, leases, answers).

SQLite by default, PostgreSQL by URL. Importing this module imports SQLAlchemy: only what makes a call does.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import sqlalchemy as sa
from sqlalchemy.engine import URL, make_url

from dagster_mao.errors import StoreError

METADATA = sa.MetaData()  # each module of this room declares its tables here; they are made on the first use after that
_BUSY_SECONDS = 30.0
_SETUP_LOCK = 0x6D616F  # of PostgreSQL's advisory locks
_COPIES, _COPY_AGAIN = 50, 0.1  # tries to copy a database that is written to, and seconds between two
_SECRET = ("password", "passfile", "sslpassword", "sslkey")


class SharedStore:
    """A database that all processes share. `url`: the path of an SQLite file, or a URL as SQLAlchemy writes them.

    Making the object touches nothing. It can be pickled, and used by threads; a child process, forked or spawned, opens connections of its
    own. `clock` is the host's, in seconds since the epoch, which counts with SQLite only.
    """

    def __init__(self, url: str | os.PathLike[str], *, clock: Callable[[], float] = time.time) -> None:
        self._url = _parsed(os.fspath(url))
        self._clock = clock
        self._lock = threading.RLock()  # SQLite has one writer: threads of a process take turns here, sooner than by its busy timeout
        self._engine: sa.Engine | None = None
        self._made: frozenset[str] = frozenset()
        _STORES[id(self)] = self

    @property
    def url(self) -> str:
        """The URL, with its password: to open the same store elsewhere, never to be shown."""
        return self._url.render_as_string(hide_password=False)

    @property
    def name(self) -> str:
        """The URL, without its password."""
        shown = self._url.set(password=None).difference_update_query(_SECRET)
        return shown.render_as_string(hide_password=True)

    @property
    def file(self) -> Path | None:
        """The SQLite file; None with PostgreSQL."""
        return Path(str(self._url.database)) if self._is_sqlite else None

    @contextmanager
    def transaction(self, *, durable: bool = True) -> Iterator[sa.Connection]:
        """A transaction that writes, committed at the end of the block, rolled back by an exception.

        SQLite: nobody else writes meanwhile. PostgreSQL: READ COMMITTED; lock what is read to be changed (`with_for_update`). Once it is
        committed it survives the death of any process, and with `durable` also power loss (an fsync). Not to be nested, nor held across
        an `await`. Raises `StoreError`.
        """
        with self._connected("BEGIN IMMEDIATE", durable) as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A transaction that reads and waits for no writer. Raises `StoreError`."""
        with self._connected("BEGIN", False) as connection:
            yield connection

    def now(self, connection: sa.Connection) -> float:
        """Seconds since the epoch by the database's clock: PostgreSQL's own, so that hosts need not agree; SQLite is one host."""
        if self._is_sqlite:
            return self._clock()
        return float(connection.scalar(_POSTGRES_NOW) or 0.0)

    def holds(self, table: sa.Table) -> bool:
        """Whether the database is there and has the table; makes neither. Raises `StoreError`."""
        if self.file is not None and not self.file.exists():
            return False
        with self._driver_errors_told():
            return sa.inspect(self._opened()).has_table(table.name)

    def close(self) -> None:
        """Closes the connections of this process that nobody uses; the next use opens others."""
        with self._lock:
            if self._engine is not None:
                self._engine.dispose()

    def __reduce__(self) -> Any:
        return (_remade, (self.url, self._clock))

    # -- connections -----------------------------------------------------------------------------------------------------------------

    @property
    def _is_sqlite(self) -> bool:
        return self._url.get_backend_name() == "sqlite"

    @contextmanager
    def _connected(self, begin: str, durable: bool) -> Iterator[sa.Connection]:
        if not self._is_sqlite:
            with self._driver_errors_told(), self._ready().connect() as connection, connection.begin():
                if not durable:
                    connection.exec_driver_sql("SET LOCAL synchronous_commit = off")
                yield connection
            return
        with self._lock, self._driver_errors_told(), self._ready().connect() as connection:
            connection.execution_options(mao_begin=begin, mao_synchronous="FULL" if durable else "NORMAL")
            with connection.begin():
                yield connection

    def _opened(self) -> sa.Engine:
        with self._lock:
            if self._engine is None:
                try:
                    self._engine = _sqlite(self._url) if self._is_sqlite else _postgres(self._url)
                except (ImportError, sa.exc.NoSuchModuleError) as error:
                    self._unusable(f"its driver is not installed: {error}", error, fix='pip install "dagster-mao[postgres]"')
            return self._engine

    def _ready(self) -> sa.Engine:
        """An engine on a database that has all tables declared so far. Processes that come first at the same time take turns."""
        wanted = frozenset(METADATA.tables)
        if wanted <= self._made and self._engine is not None:
            return self._engine
        with self._lock:
            engine = self._opened()
            if self.file is not None:
                try:
                    self.file.parent.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    self._unusable(str(error.strerror or error), error)
                self._write_ahead(engine)
            if not wanted <= set(sa.inspect(engine).get_table_names()):  # else there is no writer to wait for
                with engine.connect() as connection:
                    connection.execution_options(mao_begin="BEGIN IMMEDIATE", mao_synchronous="FULL")
                    with connection.begin():
                        if not self._is_sqlite:
                            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_SETUP_LOCK)))
                        METADATA.create_all(connection)
            self._made = wanted
            return engine

    def _write_ahead(self, engine: sa.Engine) -> None:
        """The mode in which readers wait for nobody; the file keeps it. Switching to it takes no busy timeout, so one is made here."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                with engine.connect() as connection:
                    connection.execution_options(mao_begin=None)  # it is done outside of any transaction
                    mode = connection.exec_driver_sql("PRAGMA journal_mode=WAL").scalar()
            except sa.exc.OperationalError as error:
                if "locked" not in str(error.orig) or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
                continue
            if mode != "wal":
                self._unusable("SQLite cannot keep a write-ahead log there", fix="take a file on a local disk, or PostgreSQL by URL")
            return

    @contextmanager
    def _driver_errors_told(self) -> Iterator[None]:
        try:
            yield
        except sa.exc.DBAPIError as error:
            told = str(error.orig).strip().partition("\n")[0]  # the further lines may quote values
            self._unusable(f"{type(error.orig).__name__}: {told}", error)
        except sa.exc.TimeoutError as error:
            self._unusable("all connections of this process are in use", error)

    def _unusable(self, why: str, cause: BaseException | None = None, *, fix: str | None = None) -> NoReturn:
        fix = fix or "check that it is up, that this user may write there, and that there is space"
        raise StoreError(f"The shared database {self.name} cannot be used: {why}", fix=fix) from cause


def read_only(url: str, folder: Path, *tables: str) -> SharedStore | None:
    """The same database, to be read and left as it is; None where it, or one of the tables, is not there yet.

    An SQLite file is copied into the folder: to open it would change it, or the files beside it. Raises `StoreError` when it is written
    to faster than it can be copied.
    """
    shared = SharedStore(url)
    if shared.file is not None:
        return SharedStore(_copied(shared.file, folder)) if shared.file.exists() else None
    if not all(shared.holds(METADATA.tables[table]) for table in tables):
        return None
    with shared._lock:
        shared._made = frozenset(METADATA.tables)  # nothing is to be made there
    return shared


def _copied(file: Path, folder: Path) -> Path:
    """A copy of an SQLite file with its write-ahead log, of one moment: neither changed while they were copied."""
    sources = [file, file.with_name(f"{file.name}-wal")]
    for _ in range(_COPIES):
        before = [_stamp(source) for source in sources]
        for source in sources:
            (folder / source.name).unlink(missing_ok=True)
            with suppress(FileNotFoundError):
                shutil.copyfile(source, folder / source.name)
        if before == [_stamp(source) for source in sources]:
            return folder / file.name
        time.sleep(_COPY_AGAIN)
    raise StoreError(f"The shared database {file} cannot be copied: it changes all the time", fix="try again when less is running")


def _stamp(file: Path) -> tuple[int, int] | None:
    try:
        told = file.stat()
    except FileNotFoundError:
        return None
    return told.st_mtime_ns, told.st_size


_POSTGRES_NOW = sa.text("SELECT CAST(extract(epoch FROM clock_timestamp()) AS double precision)")


def _parsed(text: str) -> URL:
    try:
        url = make_url(text) if "://" in text else URL.create("sqlite", database=text)
    except (sa.exc.ArgumentError, ValueError) as error:
        # What is no URL is not repeated: a password may be in it.
        fix = "write postgresql://user@host/database, or the path of a file"
        raise StoreError("The shared database's URL cannot be read", fix=fix) from error
    if url.drivername in ("postgres", "postgresql"):
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise StoreError(f"The shared database is {url.get_backend_name()!r}", fix="take SQLite or PostgreSQL")
    if url.get_backend_name() == "postgresql":
        return url
    if not url.database or url.database == ":memory:":
        raise StoreError("The shared database is in memory, which no other process shares", fix="name a file")
    return url.set(database=str(Path(url.database).expanduser().absolute()))


def _sqlite(url: URL) -> sa.Engine:
    engine = sa.create_engine(
        url, hide_parameters=True, pool_size=1, max_overflow=1, connect_args={"timeout": _BUSY_SECONDS, "check_same_thread": False}
    )

    @sa.event.listens_for(engine, "connect")
    def connected(raw: Any, _: Any) -> None:
        raw.isolation_level = None  # we say BEGIN ourselves

    @sa.event.listens_for(engine, "begin")
    def begun(connection: sa.Connection) -> None:
        options = connection.get_execution_options()
        if (begin := options.get("mao_begin", "BEGIN")) is not None:
            connection.exec_driver_sql(f"PRAGMA synchronous={options.get('mao_synchronous', 'NORMAL')}")
            connection.exec_driver_sql(begin)

    return engine


def _postgres(url: URL) -> sa.Engine:
    # Few connections: the server's (100 by default) are for all processes together.
    return sa.create_engine(url, hide_parameters=True, isolation_level="READ COMMITTED", pool_size=2, max_overflow=3, pool_pre_ping=True)


def _remade(url: str, clock: Callable[[], float]) -> SharedStore:
    return SharedStore(url, clock=clock)


# -- forks ---------------------------------------------------------------------------------------------------------------------------

# A connection must not cross a fork: SQLite's locks belong to the process, and a socket has one owner. So a fork waits for the transactions
# of other threads, and nothing is open when it happens.
_STORES: weakref.WeakValueDictionary[int, SharedStore] = weakref.WeakValueDictionary()


class _Forking(threading.local):
    """What a thread holds while it forks: several may at once."""

    def __init__(self) -> None:
        self.stores: list[SharedStore] = []


_forking = _Forking()


def _stores() -> list[SharedStore]:
    # The references first, in one step: other threads go on making stores. In one order, so that two who fork do not wait for each other.
    there = [store for reference in _STORES.valuerefs() if (store := reference()) is not None]
    return sorted(there, key=id)


def _before_fork() -> None:
    _forking.stores = _stores()
    for store in _forking.stores:
        store._lock.acquire()
        if store._engine is not None:
            store._engine.dispose()


def _after_fork_in_parent() -> None:
    while _forking.stores:
        _forking.stores.pop()._lock.release()


def _after_fork_in_child() -> None:
    for store in _stores():  # one that was made meanwhile, too
        store._lock = threading.RLock()
        if store._engine is not None:
            store._engine.dispose(close=False)
            store._engine = None
    _forking.stores = []


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent, after_in_child=_after_fork_in_child)
