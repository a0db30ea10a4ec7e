"""Asset checks that Dagster's event log has, by the version that they are of: a predicate for `bisect`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import dagster as dg

from dagster_mao.dagster.anchors import STATE_VERSION
from dagster_mao.errors import UnknownVersionError
from dagster_mao.state import Seal, StateStore

_PAGE = 1000


class RecordedCheck:
    """Whether an asset check of an agent passed for a version: any that was told, by a boundary, a judge, or somebody's own code.

    The last evaluation counts that names the version (metadata `mao/state_version`); else the last one of its partition that was told by
    the run which sealed it, or that is of that run's materialisation. Raises `UnknownVersionError` where there is none.
    """

    of_rows = False

    def __init__(self, instance: dg.DagsterInstance, pipeline: str, agent: str, name: str) -> None:
        self.name = f"check {name}"
        self._key = dg.AssetCheckKey(dg.AssetKey([pipeline, agent]), name)
        self._pages = self._read(instance)
        self._by_version: dict[str, bool] = {}
        self._by_run: dict[tuple[str, str | None], bool] = {}

    def __call__(self, store: StateStore, seal: Seal) -> bool:
        key = seal.workflow_id.removeprefix(f"{seal.pipeline}/")
        while (found := self._told(seal, key)) is None:
            if next(self._pages, None) is None:
                raise UnknownVersionError(
                    f"Dagster's event log has no evaluation of {self._key.name!r} for {seal.reference}",
                    agent=seal.agent,
                    workflow=seal.workflow_id,
                    fix="name a check that is evaluated for every version, or ends between which it was",
                )
        return found

    def _told(self, seal: Seal, key: str) -> bool | None:
        """The newest of those that were read; pages come newest first, so that nothing that is read later takes its place."""
        found = (self._by_version.get(seal.reference), self._by_run.get((seal.run_id, key)), self._by_run.get((seal.run_id, None)))
        return next((passed for passed in found if passed is not None), None)

    def _read(self, instance: dg.DagsterInstance) -> Iterator[bool]:
        """Page by page, the newest first: as far as somebody asks."""
        cursor: int | None = None
        while page := instance.event_log_storage.get_asset_check_execution_history(self._key, limit=_PAGE, cursor=cursor):
            for record in page:
                self._note(record)
            cursor = page[-1].id
            yield True

    def _note(self, record: Any) -> None:
        event = record.event
        told = event.dagster_event.asset_check_evaluation_data if event and event.dagster_event else None
        if not isinstance(told, dg.AssetCheckEvaluation):
            return
        if STATE_VERSION in told.metadata:
            self._by_version.setdefault(str(told.metadata[STATE_VERSION].value), told.passed)
            return
        target = told.target_materialization_data
        for run in dict.fromkeys([event.run_id, *([target.run_id] if target else [])]):
            self._by_run.setdefault((run, told.partition), told.passed)
