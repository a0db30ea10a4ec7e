"""Agents' snapshots for plain Dagster assets, pinned like an agent's own reads."""

import datetime as dt
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from typing import Any

import dagster as dg
import polars as pl
from pydantic import Field

from dagster_mao.correlation import Whose, WorkflowLog
from dagster_mao.dagster.anchors import STATE_VERSION
from dagster_mao.dagster.quarantine import QUARANTINE_OF
from dagster_mao.dagster.resources import StateStoreResource
from dagster_mao.dagster.runs import open_attempt, tagged_workflow
from dagster_mao.errors import PinError, UnknownVersionError, WiringError
from dagster_mao.review import as_of, resolve, sealed
from dagster_mao.review.history import chosen
from dagster_mao.state import Attempt, Seal, StateStore, effective, is_moment, moment, refuse_reader, require_one_entry

AS_OF = "mao/as_of"
"""Of an input's metadata, or as a tag of a run: the moment, or the version, that is read instead of what is effective."""


class StateIOManager(dg.ConfigurableIOManager):
    """Loads what an agent sealed, or its quarantine: as `pl.DataFrame` when the parameter is annotated so, else as `pl.LazyFrame`.

    A run reads what it sealed itself; what it does not set out to seal, from the effective state as it was when the run first looked. A
    plain asset whose partition maps to several partitions of the agent gets a dict of frames by partition key. It never writes: agents
    seal.

    Time travel: with `as_of`, what was effective at a moment (`2026-03-03T12:00Z`), or one version (`workflow@3`), is read instead. It is
    said of one input by `dg.AssetIn(metadata={"mao/as_of": …})`, of a run by the tag `mao/as_of`, of all by `as_of` here; the first of
    these that is there counts. Agents are not touched by it: they read what they pin.
    """

    state_store: dg.ResourceDependency[StateStoreResource]
    as_of: str = Field(default="", description="Read what was effective at this moment, `2026-03-03T12:00Z`, and not what is now.")

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
        of_input = context.definition_metadata.get(AS_OF)
        if said := str(of_input or run.tags.get(AS_OF) or self.as_of):
            key = partition_key if partition_key is not None else tagged_workflow(run.tags, pipeline)
            together = [] if of_input else _agents_read(context, pipeline)
            then = _then(self.state_store.store(), said, pipeline, key, agent, together, context.step_context.node_handle.name)
            refuse_reader(then, *_names(context))
            return then
        attempt = open_attempt(self.state_store.store(), context.instance, run, pipeline=pipeline, partition_key=partition_key)
        pinned = attempt.pin(agent)
        refuse_reader(pinned, *_names(context))
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


def _then(store: StateStore, said: str, pipeline: str, key: str | None, agent: str, together: Iterable[str], reader: str) -> Seal:
    """The version that is meant. Raises `UnknownVersionError` where there is none, `PinError` where `together` are about other batches."""
    if not is_moment(said):
        if resolve(store, said)[1] is None:
            raise UnknownVersionError(f"{said!r} names no version and no moment", agent=agent, fix="write workflow@3, or 2026-03-03T12:00Z")
        found = sealed(store, said, agent=agent)
        if found.pipeline != pipeline:
            raise UnknownVersionError(f"{said!r} is of another pipeline than {pipeline!r}", agent=agent, fix="name a workflow of its own")
        return found
    when = moment(said)
    workflow = f"{pipeline}/{key}" if key is not None else _last_then(store, pipeline, when)
    seals = store.seals(workflow, as_of=when)
    pinned = chosen(store, workflow, when, agent)[0]
    state = effective(seals)
    others = [state[other] for other in together if other in state and other != agent]
    require_one_entry(seals, reader, [pinned, *others], fix="read as of another moment, or each input as of its own")
    return pinned


def _last_then(store: StateStore, pipeline: str, when: dt.datetime) -> str:
    """The workflow that was sealed last of those that had something effective."""
    states = as_of(store, pipeline, when)
    if not states:
        raise UnknownVersionError(f"No attempt of {pipeline!r} had completed at {when.isoformat()}", fix="name a later moment")
    return max(states, key=lambda workflow: (max(seal.sealed_at for seal in states[workflow].values()), workflow))


def _agents_read(context: dg.InputContext, pipeline: str) -> list[str]:
    """Whatever else of the pipeline the same step reads: rows of two agents must be about the same batch."""
    node = context.step_context.job_def.asset_layer.get_assets_def_for_node(context.step_context.node_handle)
    keys = node.keys_by_input_name.values() if node is not None else ()
    return [_named(context, key)[1] for key in keys if len(key.path) == 2 and key.path[0] == pipeline]


def _names(context: dg.InputContext) -> list[str]:
    """What whoever reads may go by among the readers that an agent names: its assets' keys, as "a/b" or by their ends; its op."""
    node = context.step_context.job_def.asset_layer.get_assets_def_for_node(context.step_context.node_handle)
    keys = sorted(node.keys) if node is not None else []
    return [*(key.to_user_string() for key in keys), *(key.path[-1] for key in keys), context.step_context.node_handle.name]


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
