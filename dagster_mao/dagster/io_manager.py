"""Agents' snapshots for plain Dagster assets, pinned like an agent's own reads."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import dagster as dg
import polars as pl

from dagster_mao.correlation import Whose, WorkflowLog
from dagster_mao.dagster.anchors import STATE_VERSION
from dagster_mao.dagster.quarantine import QUARANTINE_OF
from dagster_mao.dagster.resources import StateStoreResource
from dagster_mao.dagster.runs import open_attempt
from dagster_mao.errors import PinError, WiringError
from dagster_mao.state import Attempt, Seal


class StateIOManager(dg.ConfigurableIOManager):
    """Loads what an agent sealed, or its quarantine: as `pl.DataFrame` when the parameter is annotated so, else as `pl.LazyFrame`.

    A run reads what it sealed itself; what it does not set out to seal, from the effective state as it was when the run first looked. A
    plain asset whose partition maps to several partitions of the agent gets a dict of frames by partition key. It never writes: agents
    seal.
    """

    state_store: dg.ResourceDependency[StateStoreResource]

    def load_input(self, context: dg.InputContext) -> Any:
        if not context.has_asset_partitions:
            return self._frame(context, self._pinned(context, None))
        pinned = {key: self._pinned(context, key) for key in context.asset_partition_keys}
        if len(pinned) == 1:
            return self._frame(context, *pinned.values())
        for seal in pinned.values():  # Dagster takes input metadata for one partition only
            log = WorkflowLog(context.log, Whose(seal.workflow_id))
            log.info(f"Read {seal.agent} as of {seal.reference}, {seal.digest}")
        return {key: self._rows(context, seal) for key, seal in pinned.items()}

    def handle_output(self, context: dg.OutputContext, obj: Any) -> None:
        """Raises `WiringError`: only agents make state versions."""
        raise WiringError(
            f"{context.get_asset_identifier()[-1]!r} returned a value to the state store, where only agents seal",
            fix="give this asset another io_manager_key",
        )

    def _pinned(self, context: dg.InputContext, partition_key: str | None) -> Seal:
        pipeline, agent = _named(context, context.asset_key)
        run = context.step_context.dagster_run
        attempt = open_attempt(self.state_store.store(), context.instance, run, pipeline=pipeline, partition_key=partition_key)
        pinned = attempt.pin(agent)
        others = [other for other in _agents_read(context, pipeline) if other != agent]
        attempt.require_one_entry(context.step_context.node_handle.name, [pinned, *_pinnable(attempt, others)])
        return pinned

    def _frame(self, context: dg.InputContext, seal: Seal) -> pl.DataFrame | pl.LazyFrame:
        aside = _is_quarantine(context, context.asset_key)
        what = f"the quarantine of {seal.agent}" if aside else seal.agent
        context.add_input_metadata(_told(seal, aside), description=f"Read {what} as of {seal.reference}")
        return self._rows(context, seal)

    def _rows(self, context: dg.InputContext, seal: Seal) -> pl.DataFrame | pl.LazyFrame:
        store = self.state_store.store()
        rows = store.quarantine(seal).lazy() if _is_quarantine(context, context.asset_key) else store.read(seal)
        return rows.collect() if context.dagster_type.typing_type is pl.DataFrame else rows


def _agents_read(context: dg.InputContext, pipeline: str) -> list[str]:
    """Whatever else of the pipeline the same step reads: rows of two agents must be about the same batch."""
    node = context.step_context.job_def.asset_layer.get_assets_def_for_node(context.step_context.node_handle)
    keys = node.keys_by_input_name.values() if node is not None else ()
    return [_named(context, key)[1] for key in keys if len(key.path) == 2 and key.path[0] == pipeline]


def _pinnable(attempt: Attempt, names: Iterable[str]) -> Iterator[Seal]:
    for name in names:
        with suppress(PinError):  # no agent, or one whose own load says so
            yield attempt.pin(name)


def _named(context: dg.InputContext, key: dg.AssetKey) -> tuple[str, str]:
    """Pipeline and agent, of an agent's asset or of the quarantine beside it."""
    if len(key.path) != 2:
        raise WiringError(f"{key.to_user_string()!r} is no agent's asset", fix="use this IO manager for assets of a pipeline only")
    return key.path[0], str(_spec_metadata(context, key).get(QUARANTINE_OF, key.path[1]))


def _is_quarantine(context: dg.InputContext, key: dg.AssetKey) -> bool:
    return QUARANTINE_OF in _spec_metadata(context, key)


def _spec_metadata(context: dg.InputContext, key: dg.AssetKey) -> Mapping[str, Any]:
    layer = context.step_context.job_def.asset_layer
    return layer.get(key).metadata if layer.has(key) else {}


def _told(seal: Seal, aside: bool) -> dict[str, Any]:
    digest, rows = (seal.quarantine_digest, seal.quarantined) if aside else (seal.digest, seal.row_count)
    return {STATE_VERSION: seal.reference, "mao/digest": digest, "dagster/row_count": rows}
