"""Looking back in whatever store the state lies."""

from __future__ import annotations

import datetime as dt
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

import dagster_mao as mao
from dagster_mao.errors import AnswerNotFrozenError
from dagster_mao.gateway._shared import SharedStore
from dagster_mao.review import walk
from dagster_mao.state import StateStore
from tests.shop import Item, Price, Side, batch, pricing, shop


def doubling(factor: int) -> mao.Agent:
    @mao.agent(name="pricing", version=str(factor))
    def execute(items: Item) -> Price:
        return Price(item_id=items.item_id, price=factor * items.size)

    return execute


def test_moments_versions_and_replays(store: StateStore) -> None:
    first = mao.run(shop(doubling(2)), batch(2), store=store, workflow="d1").seals["pricing"]
    between = dt.datetime.now(dt.timezone.utc)
    for day in ("d2", "d3"):
        last = mao.run(shop(doubling(20)), batch(2), store=store, workflow=day).seals["pricing"]
    assert mao.as_of(store, "shop", between) == {"shop/d1": store.effective("shop/d1")}
    found = mao.bisect(store, "shop", "price < 10", agent="pricing")
    assert found.first_bad is not None
    assert (found.first_bad.workflow_id, found.last_good) == ("shop/d2", first)
    assert mao.replay(store, shop(doubling(20)), last).same
    assert not mao.replay(store, shop(doubling(2)), last).same
    assert [scene.seal.agent for scene in walk(store, "shop/d1")] == ["items", "pricing"]


def test_answers_of_then_are_where_the_database_is(store: StateStore) -> None:
    if store.database is None:
        pytest.skip("an object store without a database keeps no answers")
    side = Side()
    kept = shop(pricing("sync", policy=mao.Policy(), version="1"))
    seal = mao.run(kept, batch(2), store=store, workflow="d1", resources={"side": side}).seals["pricing"]
    assert mao.replay(store, kept, seal, resources={"side": side}).same
    with pytest.raises(AnswerNotFrozenError):
        mao.replay(store, shop(pricing("sync", policy=mao.Policy(), version="2")), seal, resources={"side": side})
    assert set(side.asked.values()) == {1}


def test_a_database_for_many_hosts_is_read_where_it_is(tmp_path: Path, postgres_url: str) -> None:
    """No row of it changes, and no table is made in it that is not there."""
    store = StateStore(tmp_path / "state", database=postgres_url)
    side = Side()
    kept = shop(pricing("sync", policy=mao.Policy(), version="1"))
    unkept = mao.run(shop(doubling(2)), batch(2), store=store, workflow="d0").seals["pricing"]
    with pytest.raises(AnswerNotFrozenError):
        mao.replay(store, kept, unkept, resources={"side": side})
    assert contents(postgres_url) == {}
    seal = mao.run(kept, batch(2), store=store, workflow="d1", resources={"side": side}).seals["pricing"]
    before = contents(postgres_url)
    assert before["mao_answers"]
    assert mao.replay(store, kept, seal, resources={"side": side}).same
    assert contents(postgres_url) == before
    assert set(side.asked.values()) == {1}


def contents(url: str) -> dict[str, list[Any]]:
    engine = SharedStore(url)._opened()
    tables = sa.MetaData()
    with engine.connect() as connection:
        tables.reflect(connection)
        return {name: sorted(map(str, connection.execute(sa.select(table)).all())) for name, table in tables.tables.items()}
