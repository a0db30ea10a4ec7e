"""An object store is for many hosts, an SQLite file for one: together they are refused, unless all runs are said to be on one host."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest

import dagster_mao as mao
from dagster_mao.dagster import StateStoreResource
from dagster_mao.state import StateStore

BUCKET = "s3://bucket/prefix"
FILES = pytest.mark.parametrize("file", ["/var/shared.db", "shared.db", "sqlite:////var/shared.db", "sqlite+pysqlite:////var/shared.db"])


@FILES
def test_a_store_for_many_hosts_with_a_database_for_one_is_refused(file: str) -> None:
    with pytest.raises(mao.WiringError, match=r"s3://bucket/prefix.*PostgreSQL.*single_host=True") as caught:
        StateStore(BUCKET, database=file)
    assert caught.value.field == "database"
    assert StateStore(BUCKET, database=file, single_host=True).database == file


@pytest.mark.parametrize("url", ["postgresql://db/mao", "postgresql+psycopg://db/mao", "postgres://db/mao"])
def test_a_database_that_all_hosts_reach_is_taken(url: str, tmp_path: Path) -> None:
    assert StateStore(BUCKET, database=url).database == url
    assert StateStore(tmp_path, database=url).database == url


def test_a_folder_and_an_object_store_without_a_database_are_as_they_were(tmp_path: Path) -> None:
    assert StateStore(tmp_path).database == str(tmp_path / "shared.db")
    assert StateStore(tmp_path, database="other.db").database == "other.db"
    assert StateStore(BUCKET).database is None


@FILES
def test_as_a_resource_it_is_refused_when_the_code_location_loads(file: str) -> None:
    with pytest.raises(mao.WiringError, match="single_host=True"):
        StateStoreResource(root=BUCKET, database=file)
    assert StateStoreResource(root=BUCKET, database=file, single_host=True).store().database == file


def test_what_the_environment_says_is_refused_when_the_run_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROOT_OF_STATE", BUCKET)
    used = []

    @dg.op
    def use(state_store: StateStoreResource) -> None:
        used.append(state_store)

    @dg.job(resource_defs={"state_store": StateStoreResource(root=dg.EnvVar("ROOT_OF_STATE"), database="shared.db")})
    def job() -> None:
        use()

    with pytest.raises(dg.DagsterError) as caught:
        job.execute_in_process()
    assert isinstance(caught.value.__cause__, mao.WiringError)
    assert not used
