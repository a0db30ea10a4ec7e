"""The seal digests that Dagster's event log holds: what `verify` compares the state log with.

The event log is a second witness because it is written by another program to another place; whoever can change both can still deceive.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg

from dagster_mao.errors import StoreError
from dagster_mao.home import is_home
from dagster_mao.state.verify import Anchor

SEAL_DIGEST = "mao/seal_digest"
STATE_VERSION = "mao/state_version"
_URI = "dagster/uri"
_PAGE = 1000


def read_anchors(
    instance: dg.DagsterInstance, pipelines: Iterable[str] = (), *, asset_keys: Iterable[dg.AssetKey] | None = None
) -> list[Anchor]:
    """Every anchor in the event log: of the assets given, else of all assets that ever were agents.

    An asset counts as an agent when its key starts with one of `pipelines` or its newest materialisation carries a seal digest. So a
    workflow or a pipeline that vanished from the state log is still looked for, and other people's events are not paged through. Raises
    `StoreError` when the event log cannot be read.
    """
    try:
        keys = _agents(instance, frozenset(pipelines)) if asset_keys is None else asset_keys
        return [anchor for key in keys for entry in _materializations(instance, key) if (anchor := _anchor(entry)) is not None]
    except Exception as error:  # a database driver's, Dagster's own: there is no one class for them
        fix = "check the instance's storage; after an upgrade of Dagster run `dagster instance migrate`"
        raise StoreError(f"Dagster's event log cannot be read: {_first_line(error)}", fix=fix) from error


@contextmanager
def opened(home: str | Path) -> Iterator[dg.DagsterInstance]:
    """The instance of a Dagster home. Raises `StoreError` when the folder is none; never makes one of it."""
    folder = Path(home).expanduser().absolute()
    if not is_home(folder):
        raise StoreError(f"No Dagster instance at {folder}", fix="give the folder that DAGSTER_HOME names when the pipeline runs")
    try:
        instance = dg.DagsterInstance.from_config(str(folder))
    except Exception as error:  # configuration, storage, permissions: Dagster has no one class for them
        raise StoreError(
            f"The Dagster instance at {folder} cannot be opened: {_first_line(error)}", fix="check its dagster.yaml"
        ) from error
    with instance:
        yield instance


def _agents(instance: dg.DagsterInstance, pipelines: frozenset[str]) -> list[dg.AssetKey]:
    keys = list(instance.all_asset_keys())
    newest = instance.get_latest_materialization_events(keys)
    return [key for key in keys if key.path[0] in pipelines or SEAL_DIGEST in _metadata(newest.get(key))]


def _materializations(instance: dg.DagsterInstance, key: dg.AssetKey) -> Iterator[Any]:
    cursor: str | None = None
    while True:
        page = instance.fetch_materializations(key, limit=_PAGE, cursor=cursor, ascending=True)
        yield from (record.event_log_entry for record in page.records)
        if not page.has_more:
            return
        cursor = page.cursor


def _metadata(entry: Any) -> dict[str, Any]:
    materialization = entry.asset_materialization if entry is not None else None
    return {} if materialization is None else {name: value.value for name, value in materialization.metadata.items()}


def _anchor(entry: Any) -> Anchor | None:
    metadata = _metadata(entry)
    digest, reference, uri = (metadata.get(name) for name in (SEAL_DIGEST, STATE_VERSION, _URI))
    workflow_id, _, version = str(reference or "").rpartition("@")
    if not digest or not workflow_id or not version.isdecimal():
        return None
    return Anchor(workflow_id, int(version), str(digest), str(uri) if uri else None, str(entry.run_id))


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
