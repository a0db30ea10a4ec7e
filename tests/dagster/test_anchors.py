"""Anchors: the seal digests in a real event log."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from dagster_mao.dagster import anchors
from dagster_mao.dagster.anchors import SEAL_DIGEST, STATE_VERSION, is_home, opened, read_anchors
from dagster_mao.errors import StoreError
from dagster_mao.state.verify import Anchor


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def report(instance: dg.DagsterInstance, key: list[str], metadata: dict[str, str], partition: str | None = None) -> None:
    instance.report_runless_asset_event(dg.AssetMaterialization(key, metadata=metadata, partition=partition))


def sealed(workflow: str, version: int, digest: str, **more: str) -> dict[str, str]:
    return {SEAL_DIGEST: digest, STATE_VERSION: f"{workflow}@{version}", **more}


def found(read: list[Anchor]) -> set[tuple[str, int, str, str | None]]:
    return {(anchor.workflow_id, anchor.version, anchor.seal_digest, anchor.uri) for anchor in read}


def test_every_materialisation_counts_not_only_the_newest(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anchors, "_PAGE", 2)
    for version in range(5):
        report(instance, ["loans", "score"], sealed("loans/a@b", version, f"d{version}", **{"dagster/uri": "/s/tables/loans/score"}))
    assert found(read_anchors(instance, ["loans"])) == {("loans/a@b", n, f"d{n}", "/s/tables/loans/score") for n in range(5)}


def test_agents_under_another_key_are_found_by_their_metadata(instance: dg.DagsterInstance) -> None:
    """A translator may have renamed them, or the whole pipeline may be gone from the log."""
    report(instance, ["team", "renamed"], sealed("loans/a", 0, "d0"), partition="a")
    report(instance, ["other"], {"rows": "1"})
    assert found(read_anchors(instance)) == {("loans/a", 0, "d0", None)}


def test_a_materialisation_by_hand_hides_none_of_a_known_pipeline(instance: dg.DagsterInstance) -> None:
    report(instance, ["loans", "score"], sealed("loans/a", 0, "d0"))
    report(instance, ["loans", "score"], {"note": "reported in the UI"})
    assert found(read_anchors(instance, ["loans"])) == {("loans/a", 0, "d0", None)}


def test_the_assets_can_be_chosen(instance: dg.DagsterInstance) -> None:
    for agent in ("score", "decision"):
        report(instance, ["loans", agent], sealed("loans/a", 0, agent))
    assert [anchor.seal_digest for anchor in read_anchors(instance, asset_keys=[dg.AssetKey(["loans", "score"])])] == ["score"]


def test_metadata_that_is_none_of_ours_is_passed_over(instance: dg.DagsterInstance) -> None:
    for metadata in ({SEAL_DIGEST: "d"}, {SEAL_DIGEST: "d", STATE_VERSION: "nonsense"}, {SEAL_DIGEST: "d", STATE_VERSION: "a@x"}):
        report(instance, ["loans", "score"], metadata)
    assert read_anchors(instance, ["loans"]) == []


def test_an_event_log_that_cannot_be_read_is_our_error(instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such column: kind\nand more")

    monkeypatch.setattr(dg.DagsterInstance, "fetch_materializations", broken)
    report(instance, ["loans", "score"], sealed("loans/a", 0, "d"))
    with pytest.raises(StoreError, match=r"cannot be read: no such column: kind\. Fix"):
        read_anchors(instance, ["loans"])


def test_only_a_home_is_opened_and_none_is_made(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="No Dagster instance"), opened(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
    assert not is_home(tmp_path / "absent")
    (tmp_path / "dagster.yaml").write_text("")
    with opened(tmp_path) as instance:
        assert read_anchors(instance) == []


def test_a_broken_home_is_our_error(tmp_path: Path) -> None:
    (tmp_path / "dagster.yaml").write_text("nonsense: true\n")
    with pytest.raises(StoreError, match="cannot be opened"), opened(tmp_path):
        pass
