"""Databases for the journal: those of the gateway's tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from dagster_mao.gateway._shared import SharedStore
from tests.gateway.conftest import postgres, postgres_url, shared
from tests.journal.bank import Bank, FencingBank
from tests.journal.world import World

__all__ = ["postgres", "postgres_url", "shared"]


@pytest.fixture(params=[Bank, FencingBank])
def bank(request: pytest.FixtureRequest, tmp_path: Path) -> Bank:
    """One that knows nothing of epochs, and one that compares them."""
    made: Bank = request.param(tmp_path / "bank.db")
    return made


@pytest.fixture
def world(tmp_path: Path, shared: SharedStore, bank: Bank) -> World:
    return World(tmp_path / "state", bank, shared.url)
