"""How agents that start by themselves stand, between runs too: a check of each one's asset, told by a sensor when it changes."""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import dagster as dg

from dagster_mao.choreography import SubscriberState, lag
from dagster_mao.dagster.assets import check_spec
from dagster_mao.dagster.checks import LAG
from dagster_mao.dagster.resources import STATE_STORE
from dagster_mao.pipeline import Pipeline

_SHOWN = 100  # stuck joins in a table of the UI
_ABOUT = (
    "Is it looked after, and does nothing wait in vain? How far it is behind, what is stuck and for whom, what failed, in all workflows."
)


def build_lag_checks(pipeline: Pipeline) -> dg.AssetChecksDefinition:
    """The check `lag` of every agent that starts by itself, and of an entry with an inbox: executed from the UI, it looks now."""

    @dg.multi_asset_check(
        name=f"{pipeline.name}__lag",
        specs=[check_spec(LAG, pipeline, agent, description=_ABOUT, blocking=False, partitioned=False) for agent in watched(pipeline)],
        required_resource_keys={STATE_STORE},
        can_subset=True,
    )
    def look(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        states = {state.agent: state for state in lag(getattr(context.resources, STATE_STORE).store(), pipeline)}
        for key in sorted(context.selected_asset_check_keys):
            agent = key.asset_key.path[-1]
            told = _verdict(states[agent], _others(pipeline, agent, states.values()))
            yield dg.AssetCheckResult(check_name=LAG, asset_key=key.asset_key, **told)

    return look


def build_lag_sensor(
    pipeline: Pipeline,
    *,
    minimum_interval_seconds: int = 60,
    default_status: dg.DefaultSensorStatus = dg.DefaultSensorStatus.RUNNING,
) -> dg.SensorDefinition:
    """The sensor `<pipeline>__lag_sensor`: tells the check `lag` of each agent that starts by itself, whenever it has changed.

    It runs from the start. It requires the resource `state_store`.
    """

    @dg.sensor(
        name=f"{pipeline.name}__lag_sensor",
        description="Tells how far agents that start by themselves are behind, what is stuck and who is dead.",
        minimum_interval_seconds=minimum_interval_seconds,
        default_status=default_status,
        required_resource_keys={STATE_STORE},
    )
    def lag_sensor(context: dg.SensorEvaluationContext) -> Any:
        states = lag(getattr(context.resources, STATE_STORE).store(), pipeline)
        told = [(state, _others(pipeline, state.agent, states)) for state in states if not state.is_elsewhere]
        before, now = _parsed(context.cursor), {state.agent: _essence(state, others) for state, others in told}
        events = [_evaluation(pipeline, *one) for one in told if before.get(one[0].agent) != now[one[0].agent]]
        unwell = [_sentence(one) if one.is_elsewhere else f"{one.agent}: {_sentence(one)}" for one in states if not one.is_healthy]
        reason = "; ".join(unwell) or f"{sum(state.due for state in states)} versions are due, and nothing is stuck."
        return dg.SensorResult(asset_events=events, cursor=json.dumps(now), skip_reason=reason)

    return lag_sensor


def watched(pipeline: Pipeline) -> list[str]:
    """The agents that have the check."""
    return [name for name in pipeline.order if name != pipeline.entry_name or pipeline.inbox is not None]


def _others(pipeline: Pipeline, agent: str, states: Iterable[SubscriberState]) -> list[SubscriberState]:
    """Agents of other code locations that are dead, or were never seen. They have no check here: the last agent's tells of them."""
    if agent != pipeline.order[-1]:
        return []
    return [state for state in states if state.is_elsewhere and (state.is_dead or state.beat is None)]


def _evaluation(pipeline: Pipeline, state: SubscriberState, others: Sequence[SubscriberState]) -> dg.AssetCheckEvaluation:
    return dg.AssetCheckEvaluation(asset_key=dg.AssetKey([pipeline.name, state.agent]), check_name=LAG, **_verdict(state, others))


def _verdict(state: SubscriberState, others: Sequence[SubscriberState]) -> dict[str, Any]:
    is_dead = state.is_dead or any(other.is_dead for other in others)
    return {
        "passed": state.is_healthy and not state.failed and not is_dead,
        "severity": dg.AssetCheckSeverity.ERROR if is_dead else dg.AssetCheckSeverity.WARN,
        "description": " ".join([_sentence(state), *(_of_another(other) for other in others)]),
        "metadata": {
            **{name: getattr(state, name) for name in ("due", "in_flight", "failed", "refused", "joining")},
            "oldest_seconds": float(state.oldest or 0.0),
            **({"last_look": dg.MetadataValue.timestamp(state.beat)} if state.beat else {}),
            **({"errors": dg.MetadataValue.json(dict(state.errors))} if state.errors else {}),
            **({"stuck": _stuck_table(state)} if state.stuck else {}),
            **({"elsewhere": dg.MetadataValue.json({other.agent: other.due for other in others})} if others else {}),
        },
    }


def _of_another(state: SubscriberState) -> str:
    waiting = f": {state.due} {'workflow waits' if state.due == 1 else 'workflows wait'} for it" if state.due else ""
    if state.beat is None:
        return f"{state.agent}, which runs elsewhere, has never been seen{waiting}."
    return f"Nobody has looked for {state.agent}, which runs elsewhere, since {state.beat:%Y-%m-%d %H:%M:%S} UTC{waiting}."


def _sentence(state: SubscriberState) -> str:
    if state.is_elsewhere:
        return _of_another(state)
    told = []
    if state.is_dead:
        when = f"since {state.beat:%Y-%m-%d %H:%M:%S} UTC" if state.beat else "ever"
        told.append(f"nobody has looked {when}: is its sensor on, and the daemon alive?")
    if state.stuck:
        first = state.stuck[0]
        told.append(f"{len(state.stuck)} joins are stuck: {first.workflow_id} waits for {', '.join(first.missing)} ({first.why})")
    if state.failed:
        told.append(f"{state.failed} failed ({', '.join(sorted(state.errors))})")
    told.append(f"{state.due} due" + (f", the oldest for {state.oldest:.0f} s" if state.oldest is not None else ""))
    return f"{'; '.join(told)}."


def _stuck_table(state: SubscriberState) -> dg.TableMetadataValue:
    names = ("workflow", "missing", "since", "why")
    rows = [
        dg.TableRecord(dict(zip(names, (one.workflow_id, ", ".join(one.missing), f"{one.since:%Y-%m-%d %H:%M:%S}", one.why), strict=True)))
        for one in state.stuck[:_SHOWN]
    ]
    return dg.MetadataValue.table(rows, schema=dg.TableSchema([dg.TableColumn(name) for name in names]))


def _essence(state: SubscriberState, others: Sequence[SubscriberState]) -> list[Any]:
    """What, when it changes, is told anew: not how old things are."""
    stuck = sorted(one.workflow_id for one in state.stuck)
    told = [state.due, state.in_flight, state.failed, state.refused, state.joining, stuck, state.is_dead]
    return [*told, *([other.agent, other.due, other.is_dead] for other in others)]


def _parsed(cursor: str | None) -> dict[str, Any]:
    try:
        told = json.loads(cursor or "{}")
    except ValueError:  # edited: everything is told anew
        return {}
    return told if isinstance(told, dict) else {}
