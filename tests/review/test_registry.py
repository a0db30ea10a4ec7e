"""Which versions of agents have sealed, what changed between them, and who may read what they seal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import dagster as dg
import polars as pl
import pytest
from pydantic import BaseModel, Field
from typer.testing import CliRunner

import dagster_mao as mao
from dagster_mao.choreography import drain, enter
from dagster_mao.cli import app
from dagster_mao.dagster import StateStoreResource
from dagster_mao.dagster.assets import IO_MANAGER
from dagster_mao.errors import ReaderRefusedError, TamperedError, WiringError
from dagster_mao.review.registry import agent_diff, agent_versions
from dagster_mao.state.verify import verify


class Item(BaseModel):
    id: Annotated[str, mao.Key]
    amount: int


class Score(BaseModel):
    id: Annotated[str, mao.Key]
    points: int


class Bounded(BaseModel):
    __qualname__ = "Score"
    id: Annotated[str, mao.Key]
    points: int = Field(ge=0)


Bounded.__name__ = "Score"
ITEMS = [Item(id="a", amount=1)]


@mao.agent
def items() -> list[Item]:
    return ITEMS


def pipeline(output: type[BaseModel] = Score, *, readers: list[str] | None = None, **options: Any) -> mao.Pipeline:
    def execute(items: Item) -> Any:
        return output(id=items.id, points=items.amount)

    execute.__annotations__["return"] = output
    score = mao.agent(name="score", readers=readers, **options)(execute)

    @mao.agent
    def report(score: Score) -> Score:
        return score

    return mao.Pipeline("loans", entry=items, agents=[score, report])


def seal(store: mao.StateStore, day: str, *args: Any, **options: Any) -> None:
    mao.run(pipeline(*args, **options), store=store, workflow=day)


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("DAGSTER_MAO_ROOT", "DAGSTER_MAO_DATABASE", "DAGSTER_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)


def call(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result.output


def test_a_version_names_what_its_agent_was_and_a_release_is_told_by_what_it_changed(local_store: mao.StateStore) -> None:
    first = mao.Policy(timeout=10)
    seal(local_store, "1", version="7", owners=["team:risk"], policy=first, model="m-1")
    seal(local_store, "2", version="7", owners=["team:risk"], policy=first, model="m-1")
    assert len(agent_versions(local_store, "loans", "score")) == 1, "the same declaration is registered once"
    seal(local_store, "3", Bounded, version="8", owners=["team:risk"], policy=mao.Policy(timeout=30), model="m-2")
    before, after = agent_versions(local_store, "loans", "score")
    assert (before.seals, before.first.reference, before.owners) == (2, "loans/1@1", ("team:risk",))
    assert (after.seals, after.first.reference) == (1, "loans/3@1")
    told = agent_diff(before, after)
    assert told.declared == {"agent_version": ("7", "8"), "model": ("m-1", "m-2"), "policy.timeout": (10, 30)}
    assert [change.field for change in told.contract] == ["points"]
    for seal_ in local_store.seals("loans/3"):
        declared = local_store.registered(seal_)
        assert declared is not None
        assert (declared["name"], declared["contract"]["hash"]) == (seal_.agent, seal_.contract_hash)


def test_the_command_lists_and_compares(local_store: mao.StateStore) -> None:
    seal(local_store, "1", version="7", owners=["team:risk"])
    call("agents", "diff", "loans/score", "--root", local_store.root, code=1)
    seal(local_store, "2", version="8", owners=["team:risk"])
    told = call("agents", "list", "loans/score", "--root", local_store.root)
    assert [line.split()[:3] for line in told.splitlines()[1:]] == [["loans/score", "7", "Score"], ["loans/score", "8", "Score"]]
    assert "team:risk" in told
    told = call("agents", "diff", "loans/score", "--root", local_store.root, code=1)
    assert any(line.split() == ["agent_version", "7", "8"] for line in told.splitlines())
    ids = [one["registration"] for one in json.loads(call("agents", "list", "loans/score", "--json", "--root", local_store.root))]
    assert "declares the same" in call("agents", "diff", "loans/score", ids[0][:12], ids[0], "--root", local_store.root)
    assert "begins with 'zz'" in call("agents", "diff", "loans/score", "zz", "--root", local_store.root, code=1)
    assert "Nothing was sealed by loans/nobody" in call("agents", "list", "loans/nobody", "--root", local_store.root, code=1)


def test_a_declaration_that_was_changed_is_found(local_store: mao.StateStore) -> None:
    seal(local_store, "1", version="7")
    assert verify(local_store).good
    last = local_store.seals("loans/1")[1]
    file = Path(local_store.root, "registry", "loans", "score", f"{last.registration}.json")
    told = file.read_text()
    file.write_text(told.replace('"agent_version":"7"', '"agent_version":"8"'))
    with pytest.raises(TamperedError, match="not what was registered"):
        local_store.registered(last)
    assert [finding.kind for finding in verify(local_store).findings] == ["file_changed"]
    file.unlink()
    assert [finding.kind for finding in verify(local_store).findings] == ["file_missing"]


def test_who_is_not_named_may_not_read_at_load() -> None:
    pipeline(readers=["report"])
    with pytest.raises(WiringError, match=r"'report' reads 'score', which is for nobody") as refused:
        pipeline(readers=[])
    assert (refused.value.agent, refused.value.field) == ("report", "score")
    with pytest.raises(WiringError, match="is one string"):
        pipeline(readers="report")  # type: ignore[arg-type]


def test_who_is_not_named_may_not_read_in_another_code_location_either(local_store: mao.StateStore) -> None:
    @mao.agent(readers=["audit"])
    def score(items: Item) -> Score:
        return Score(id=items.id, points=1)

    @mao.agent
    def letters(score: Score) -> Score:
        return score

    @mao.agent
    def audit(score: Score) -> Score:
        return score

    here = mao.Pipeline("loans", entry=items, agents=[score], mode="choreography")
    enter(local_store, here, ITEMS, workflow="1")
    drain(local_store, here)
    there = mao.Pipeline("loans", listens={"score": Score}, agents=[letters, audit], mode="choreography")
    drain(local_store, there)
    assert [one.agent for one in local_store.seals("loans/1")] == ["items", "score", "audit"]


def test_an_asset_that_is_not_named_may_not_read(tmp_path: Path) -> None:
    @mao.agent(readers=["books/ledger"])
    def score(items: Item) -> Score:
        return Score(id=items.id, points=1)

    def asset(name: str) -> Any:
        @dg.asset(name=name, key_prefix="books", ins={"score": dg.AssetIn(dg.AssetKey(["loans", "score"]), input_manager_key=IO_MANAGER)})
        def reads(score: pl.DataFrame) -> int:
            return score.height

        return reads

    loans = mao.Pipeline("loans", entry=items, agents=[score])
    store = StateStoreResource(root=str(tmp_path / "state"))
    defs = dg.Definitions.merge(
        loans.build_definitions(resources={"state_store": store}), dg.Definitions(assets=[asset("ledger"), asset("letters")])
    )
    with dg.DagsterInstance.ephemeral() as instance:
        run = defs.resolve_implicit_global_asset_job_def().execute_in_process(instance=instance, raise_on_error=False)
    steps = {event.step_key for event in run.all_events if event.is_step_success}
    assert "books__ledger" in steps
    (failure,) = [event for event in run.all_events if event.is_step_failure]
    assert failure.step_key == "books__letters"
    assert ReaderRefusedError.__name__ in str(failure.event_specific_data)
