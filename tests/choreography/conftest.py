"""A ledger, and stores whose database is an SQLite file or a real PostgreSQL."""

from __future__ import annotations

from pathlib import Path

import pytest

from dagster_mao.state import StateStore
from tests.choreography.loans import Ledger
from tests.gateway.conftest import postgres, postgres_url

__all__ = ["postgres", "postgres_url"]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path)


@pytest.fixture(params=["sqlite", "postgres"])
def shared_state(request: pytest.FixtureRequest, tmp_path: Path) -> StateStore:
    """An empty store, once with each database."""
    url = None if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    return StateStore(tmp_path / "state", database=url)
