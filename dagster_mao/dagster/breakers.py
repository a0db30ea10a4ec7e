"""How breakers stand, between runs too: a sensor that tells each opening and closing on the assets whose calls they guard."""

import datetime as dt
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import BaseModel, ConfigDict, ValidationError

from dagster_mao.boundary import BREAKER, in_force
from dagster_mao.dagster.policies import POLICIES, PolicyOverrides
from dagster_mao.dagster.resources import STATE_STORE
from dagster_mao.gateway import shared_store
from dagster_mao.pipeline import Pipeline

if TYPE_CHECKING:
    from dagster_mao.gateway._breaker import BreakerState
    from dagster_mao.gateway._news import News
    from dagster_mao.gateway._shared import SharedStore

_ALERTS_KEPT = 100  # that wait for an alert function that fails: the newest


class BreakerAlert(BaseModel):
    """A breaker opened: no calls are made for these agents. `why`: class of the error, or what was said by hand, `by` whom."""

    model_config = ConfigDict(frozen=True)

    pipeline: str
    breaker: str
    agents: tuple[str, ...]
    since: dt.datetime
    why: str
    by: str | None = None

    def __str__(self) -> str:
        whose = f"{self.pipeline}: {', '.join(self.agents)}"
        return f"{whose}: the circuit breaker {self.breaker!r} is open since {_utc(self.since)} ({_reason(self.why, self.by)})"


class _Told(BaseModel):
    """What was told of a breaker: its events up to a number, the last as open or closed."""

    number: int
    is_open: bool


class _Cursor(BaseModel):
    told: dict[str, _Told] = {}
    alerts: list[BreakerAlert] = []  # not delivered yet


def build_breaker_sensor(
    pipeline: Pipeline,
    alert: Callable[[BreakerAlert], object] | None = None,
    *,
    minimum_interval_seconds: int = 30,
    default_status: dg.DefaultSensorStatus = dg.DefaultSensorStatus.RUNNING,
) -> dg.SensorDefinition:
    """The sensor `<pipeline>_breakers`: reports each opening and closing of a breaker, once, as the check `breaker` of its agents' assets.

    So the UI shows an open breaker, since when and why, also when no run met it, and that it closed again. `alert` is called for each
    opening (`str(alert)` is a sentence to send on); where it raises, it is called again at the next tick, until it returns. An outage is
    one opening, however many probes fail in it. A breaker that is open when the sensor first runs is reported too.

    It runs from the start: it starts no runs and writes nothing but what the UI is to show. It requires the resources `state_store` and
    `policies`. Raises `WiringError` when an override makes no policy.
    """

    @dg.sensor(
        name=f"{pipeline.name}_breakers",
        description="Reports when a circuit breaker opens or closes, on the assets whose calls it guards.",
        minimum_interval_seconds=minimum_interval_seconds,
        default_status=default_status,
        required_resource_keys={STATE_STORE, POLICIES},
    )
    def breakers_sensor(context: dg.SensorEvaluationContext) -> Any:
        database = getattr(context.resources, STATE_STORE).store().database
        if database is None:
            return dg.SkipReason("No shared database is named, so there are no breakers.")
        overrides: PolicyOverrides = getattr(context.resources, POLICIES)
        guarded = guarded_by(pipeline, overrides.of(pipeline))
        cursor = _parsed(context.cursor)
        changes, standing = _look(shared_store(database), guarded, cursor)
        events = [event for change in changes for event in _evaluations(pipeline, guarded, change)]
        # A step that found all its answers kept asked no breaker, and its check says so: one that stands open is told again after it.
        told = [event for change in standing for event in _evaluations(pipeline, guarded, change)]
        events += [event for event in told if _is_told_passed(context.instance, event)]
        if alert is not None:
            opened = [_alert(pipeline, guarded, change) for change in changes if change.is_open]
            cursor.alerts = _deliver(alert, [*cursor.alerts, *opened], context.log)
        return dg.SensorResult(asset_events=events, cursor=cursor.model_dump_json(), skip_reason=_summary(changes, cursor))

    return breakers_sensor


def guarded_agents(pipeline: Pipeline) -> list[str]:
    """The agents whose own policy has a breaker: those whose assets have the check."""
    return [name for name, agent in pipeline.agents.items() if agent.policy is not None and agent.policy.breaker is not None]


def guarded_by(pipeline: Pipeline, changes: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """By breaker, the agents whose calls it guards, under the policies that are in force with these changes."""
    found: dict[str, list[str]] = {}
    for name, agent in pipeline.agents.items():
        breaker = in_force(agent.policy, changes, name).breaker if changes or agent.policy else None
        if breaker is not None:
            found.setdefault(breaker.name or f"{pipeline.name}.{name}", []).append(name)
    return found


class _Change(BaseModel):
    """A breaker opened or closed. `retry_after` is of an open one: seconds until a call may be made, None where it waits for a person."""

    breaker: str
    is_open: bool
    at: dt.datetime
    why: str | None
    by: str | None
    calls_again_at: dt.datetime | None = None


def _look(shared: "SharedStore", guarded: Mapping[str, Sequence[str]], cursor: _Cursor) -> tuple[list[_Change], list[_Change]]:
    """What changed since the cursor, oldest first, and what stands open as it did; the cursor is moved on."""
    from dagster_mao.gateway._breaker import breakers
    from dagster_mao.gateway._news import newest, news  # SQLAlchemy, which only a tick needs

    last = newest(shared, list(guarded))
    states = {state.name: state for state in breakers(shared) if state.name in guarded}
    changes = []
    for name, number in last.items():
        told = cursor.told.get(name)
        if told is None or number < told.number:  # met for the first time, or the database is another one
            state = states.get(name)
            is_open = state is not None and state.state != "closed"
            cursor.told[name] = _Told(number=number, is_open=is_open)
            if state is not None and is_open:
                changes.append(_as_it_stands(state))
    after = {name: told.number for name, told in cursor.told.items() if name in guarded}
    changes += [change for one in news(shared, after) if (change := _follow(one, cursor)) is not None]
    changed = {change.breaker for change in changes}
    standing = [
        _as_it_stands(state)
        for name, state in states.items()
        if state.state != "closed" and cursor.told[name].is_open and name not in changed
    ]
    return [_with_hope(change, states.get(change.breaker)) for change in changes], [
        _with_hope(one, states[one.breaker]) for one in standing
    ]


def _follow(one: "News", cursor: _Cursor) -> _Change | None:
    """An event, if it opened or closed the breaker: a probe that fails leaves it open."""
    event, told = one.event, cursor.told[one.event.breaker]
    told.number = one.number
    is_open = event.event == "open" or (event.event == "half-open" and told.is_open)
    by_hand = event.by is not None and is_open
    if event.event == "half-open" or (is_open == told.is_open and not by_hand):
        return None
    told.is_open = is_open
    return _Change(breaker=event.breaker, is_open=is_open, at=event.at, why=event.why, by=event.by)


def _as_it_stands(state: "BreakerState") -> _Change:
    return _Change(breaker=state.name, is_open=True, at=state.since or dt.datetime.now(dt.timezone.utc), why=state.why, by=state.by)


def _with_hope(change: _Change, state: "BreakerState | None") -> _Change:
    if not change.is_open or state is None or state.retry_after is None:
        return change
    return change.model_copy(update={"calls_again_at": dt.datetime.now(dt.timezone.utc) + dt.timedelta(seconds=state.retry_after)})


def _evaluations(pipeline: Pipeline, guarded: Mapping[str, Sequence[str]], change: _Change) -> list[dg.AssetCheckEvaluation]:
    """One for each asset with the check. An agent that has its breaker from an override only has no such check."""
    told = f"Closed since {_utc(change.at)}: calls are made again"
    metadata: dict[str, Any] = {"breaker": change.breaker, "since": dg.MetadataValue.timestamp(change.at), "why": change.why or ""}
    if change.is_open:
        told = f"Open since {_utc(change.at)} ({_reason(change.why, change.by)}): {_until(change)}"
    if change.by:
        metadata["by"] = change.by
    with_check = set(guarded_agents(pipeline))
    return [
        dg.AssetCheckEvaluation(
            asset_key=dg.AssetKey([pipeline.name, agent]),
            check_name=BREAKER,
            passed=not change.is_open,
            severity=dg.AssetCheckSeverity.ERROR,
            description=told,
            metadata=metadata,
        )
        for agent in guarded[change.breaker]
        if agent in with_check
    ]


def _is_told_passed(instance: dg.DagsterInstance, event: dg.AssetCheckEvaluation) -> bool:
    """Whether the check says now that all is well."""
    record = instance.get_latest_asset_check_evaluation_record(event.asset_check_key)
    told = record.event.dagster_event.event_specific_data if record and record.event and record.event.dagster_event else None
    return isinstance(told, dg.AssetCheckEvaluation) and told.passed


def _until(change: _Change) -> str:
    if change.calls_again_at is None:
        return "no call is made until a person closes it"
    if change.calls_again_at <= dt.datetime.now(dt.timezone.utc):
        return "the next call is a probe"
    return f"no call is made until {_utc(change.calls_again_at)}, then one, as a probe"


def _alert(pipeline: Pipeline, guarded: Mapping[str, Sequence[str]], change: _Change) -> BreakerAlert:
    agents = tuple(guarded[change.breaker])
    return BreakerAlert(pipeline=pipeline.name, breaker=change.breaker, agents=agents, since=change.at, why=change.why or "", by=change.by)


def _deliver(alert: Callable[[BreakerAlert], object], waiting: Sequence[BreakerAlert], log: logging.Logger) -> list[BreakerAlert]:
    """Calls the alert function for each; returns those that it failed on."""
    failed = []
    for one in waiting:
        try:
            alert(one)
        except Exception as error:
            # Not its text: what alerts go through (a webhook's URL) is a secret as a rule.
            log.warning(f"The alert function raised {type(error).__name__}; it is called again at the next tick. {one}")
            failed.append(one)
    return failed[-_ALERTS_KEPT:]


def _summary(changes: Sequence[_Change], cursor: _Cursor) -> str:
    told = [f"{change.breaker} {'opened' if change.is_open else 'closed'}" for change in changes] or ["Nothing changed"]
    stopped = [name for name, one in cursor.told.items() if one.is_open]
    told += [f"open: {', '.join(stopped)}"] if stopped else []
    told += [f"{len(cursor.alerts)} alerts wait for an alert function that fails"] if cursor.alerts else []
    return "; ".join(told) + "."


def _parsed(cursor: str | None) -> _Cursor:
    try:
        return _Cursor.model_validate_json(cursor or "{}")
    except ValidationError:  # of another release, or edited: what is open is told anew
        return _Cursor()


def _reason(why: str | None, by: str | None) -> str:
    return f"{why}, by {by}" if by else why or "no reason is known"


def _utc(moment: dt.datetime) -> str:
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"
