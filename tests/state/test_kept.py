"""Kept frames: what is read is what was kept, or nothing; and they go when they are old."""

from __future__ import annotations

import polars as pl
import pytest

from dagster_mao.state import KeptFile, KeptFrames, StateStore, staged
from tests.stores import on_every_store

FRAME = pl.DataFrame({"id": ["a", "é"], "points": [0.5, float("nan")]})


def kept(store: StateStore, name: str = "one") -> tuple[KeptFrames, KeptFile]:
    frames = KeptFrames(store.objects, "credit", "score")
    with staged(store.objects, FRAME) as batch:
        return frames, frames.keep(name, batch)


@on_every_store
def test_what_was_kept_is_read(store: StateStore) -> None:
    frames, file = kept(store)
    found = frames.read(KeptFile.model_validate_json(file.model_dump_json()))
    assert found is not None
    assert found.collect().equals(FRAME)
    assert store.seals("credit/day") == []


def test_a_file_that_is_gone_or_changed_is_no_answer(store: StateStore) -> None:
    frames, file = kept(store)
    data = bytearray(store.objects.get(file.path))
    data[20] ^= 1
    store.objects.put(file.path, bytes(data))
    assert frames.read(file) is None
    store.objects.remove(file.path)
    assert frames.read(file) is None


def test_a_large_file_is_read_in_place_and_compared_all_the_same(local_store: StateStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dagster_mao.state.kept._WHOLE_BYTES", 0)
    frames, file = kept(local_store)
    found = frames.read(file)
    assert found is not None
    assert found.collect().equals(FRAME)
    assert frames.read(file.model_copy(update={"digest": "0" * 64})) is None
    local_store.objects.remove(file.path)
    assert frames.read(file) is None


@on_every_store
def test_old_frames_are_removed_and_those_of_others_are_not(store: StateStore) -> None:
    frames, file = kept(store)
    with staged(store.objects, FRAME) as batch:
        other = KeptFrames(store.objects, "credit", "scores").keep("one", batch)
    frames.forget(3600)
    assert store.objects.exists(file.path)
    frames.forget(-3600)
    frames.forget(-3600)
    assert not store.objects.exists(file.path)
    assert store.objects.exists(other.path)
