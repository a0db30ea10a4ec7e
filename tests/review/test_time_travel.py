"""Time travel: what was there at a moment, and what was effective then."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import polars as pl
import pytest
from pydantic import BaseModel, Field
from typer.testing import CliRunner

import dagster_mao as mao
from dagster_mao.cli import app
from dagster_mao.errors import UnknownVersionError
from dagster_mao.review import as_of, history, parse_reference, resolve, sealed
from dagster_mao.review.quarantine import accounts, discard, refusals
from dagster_mao.state import CALLS_SCHEMA, Seal, StateStore, moment, there
from dagster_mao.state import effective as effective_of
from tests.sealed import MONDAY, PIPELINE, PLAN, SECRET, TUESDAY, applications, seal_attempt

UTC = dt.timezone.utc
Moments = dict[str, dt.datetime]


def now() -> dt.datetime:
    return dt.datetime.now(UTC)


def since(seals: Sequence[Seal]) -> dt.datetime:
    """A moment after these, and before whatever is sealed next."""
    while (moment := now()) <= seals[-1].sealed_at:
        pass
    return moment


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[StateStore, Moments]:
    """Monday: an attempt, another one that replaced it, which was undone later. Tuesday came between the two."""
    store = StateStore(tmp_path_factory.mktemp("travel"))
    moments = {"before": now()}
    moments["first"] = since(seal_attempt(store, "2026-01-05", "first", applications(1000.0, 9000.0)))
    moments["tuesday"] = since(seal_attempt(store, "2026-01-06", "first", applications(1.0)))
    begun = seal_attempt(store, "2026-01-05", "second", applications(1000.0, 9500.0), only=PLAN[:2])
    moments["halfway"] = since(begun)
    moments["second"] = since(seal_attempt(store, "2026-01-05", "second", applications(1000.0, 9500.0)))
    fence = store.fence(MONDAY, attempt="second", run_id="undo")
    store.compensated(MONDAY, fence=fence)
    moments["undone"] = since(store.seals(MONDAY))
    return store, moments


def versions(state: dict[str, Seal]) -> dict[str, int]:
    return {agent: seal.version for agent, seal in state.items()}


# -- semantics -----------------------------------------------------------------------------------------------------------------------

BY_MOMENT = [
    ("before", {}),
    ("first", {"application": 0, "score": 1, "decision": 2}),
    ("halfway", {"application": 0, "score": 1, "decision": 2}),
    ("second", {"application": 3, "score": 4, "decision": 5}),
    ("undone", {"application": 0, "score": 1, "decision": 2}),
]


@pytest.mark.parametrize(("name", "expected"), BY_MOMENT)
def test_what_was_effective_then(told: tuple[StateStore, Moments], name: str, expected: dict[str, int]) -> None:
    """A later compensation does not count. The naive way, to take the effective state and leave out what came later, forgets `second`."""
    store, moments = told
    assert versions(store.effective(MONDAY, as_of=moments[name])) == expected
    assert versions(as_of(store, MONDAY, moments[name])[MONDAY]) == expected
    assert versions(as_of(store, PIPELINE, moments[name]).get(MONDAY, {})) == expected


def test_the_naive_way_forgets_what_was_undone_since(told: tuple[StateStore, Moments]) -> None:
    store, moments = told
    naive = {agent: seal for agent, seal in effective_of(store.seals(MONDAY)).items() if seal.sealed_at <= moments["second"]}
    assert versions(naive) != dict(BY_MOMENT)["second"]


def test_of_a_pipeline_only_what_had_something_effective(told: tuple[StateStore, Moments]) -> None:
    store, moments = told
    assert list(as_of(store, PIPELINE, moments["before"])) == []
    assert list(as_of(store, PIPELINE, moments["first"])) == [MONDAY]
    assert list(as_of(store, PIPELINE)) == [MONDAY, TUESDAY]
    assert as_of(store, PIPELINE)[MONDAY] == store.effective(MONDAY)
    with pytest.raises(UnknownVersionError, match="no pipeline 'loan'"):
        as_of(store, "loan")


def test_as_of_a_version(told: tuple[StateStore, Moments]) -> None:
    store, _ = told
    assert versions(store.effective(MONDAY, as_of=4)) == {"application": 0, "score": 1, "decision": 2}
    assert versions(store.effective(MONDAY, as_of=5)) == {"application": 3, "score": 4, "decision": 5}
    with pytest.raises(UnknownVersionError, match="No version 8: it has versions 0 to 7"):
        store.effective(MONDAY, as_of=8)


def test_the_moment_itself_counts(told: tuple[StateStore, Moments]) -> None:
    store, _ = told
    seals = store.seals(MONDAY)
    assert len(there(seals, seals[2].sealed_at)) == 3
    assert len(there(seals, seals[2].sealed_at - dt.timedelta(microseconds=1))) == 2


def test_no_version_is_there_before_those_before_it(told: tuple[StateStore, Moments]) -> None:
    """One host's clock is a day ahead: what was sealed after it is not shown without it, though its own clock says that it was there."""
    store, moments = told
    skewed = [
        seal.model_copy(update={"sealed_at": seal.sealed_at + dt.timedelta(days=1)}) if seal.version == 1 else seal
        for seal in store.seals(MONDAY)
    ]
    assert [seal.version for seal in skewed if seal.sealed_at <= moments["first"]] == [0, 2]
    assert [seal.version for seal in there(skewed, moments["first"])] == [0]


def test_history_as_of(told: tuple[StateStore, Moments]) -> None:
    store, moments = told
    assert [seal.version for seal in history(store, MONDAY, as_of=moments["halfway"])] == [0, 1, 2, 3, 4]
    assert len(history(store, as_of=moments["tuesday"])) == 6
    assert history(store, as_of=moments["before"]) == []
    assert [seal.version for seal in history(store, MONDAY, as_of=1)] == [0, 1]


def test_one_version_is_meant(told: tuple[StateStore, Moments]) -> None:
    store, moments = told
    at = moments["second"].isoformat()
    assert sealed(store, f"{MONDAY}@4").version == 4
    assert sealed(store, f"{MONDAY}@{at}", agent="score").version == 4
    assert sealed(store, MONDAY, agent="score").version == 1
    with pytest.raises(UnknownVersionError, match="not one version"):
        sealed(store, f"{MONDAY}@{at}")
    with pytest.raises(UnknownVersionError, match="is by score, not by decision"):
        sealed(store, f"{MONDAY}@4", agent="decision")
    with pytest.raises(UnknownVersionError, match="at that moment it had nothing"):
        sealed(store, f"{MONDAY}@{moments['before'].isoformat()}", agent="score")


def test_only_the_versions_that_are_asked_for_are_read_whole(told: tuple[StateStore, Moments], monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest of a pipeline's log is read in seven columns, and never made seals of."""
    store, moments = told
    made: list[Any] = []
    validate = Seal.model_validate
    monkeypatch.setattr(Seal, "model_validate", lambda row: made.append(row) or validate(row))
    found = as_of(store, PIPELINE, moments["second"])
    assert len(made) == sum(map(len, found.values())) == 6
    made.clear()
    store.seal_at(MONDAY, 4)
    assert len(made) == 1


# -- how it is written ---------------------------------------------------------------------------------------------------------------

AT = dt.datetime(2026, 3, 3, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("2026-03-03T12:00Z", AT),
        ("2026-03-03 12:00Z", AT),
        ("2026-03-03T12:00:00Z", AT),
        ("2026-03-03T13:00+01:00", AT),
        ("2026-03-03T13:00+0100", AT),
        ("2026-03-03T07:00-05", AT),
        ("2026-03-03T12:00:00.5Z", AT + dt.timedelta(milliseconds=500)),
        ("2026-03-03T12:00:00.123456+00:00", AT + dt.timedelta(microseconds=123456)),
    ],
)
def test_moments(text: str, meant: dt.datetime) -> None:
    assert moment(text) == meant
    assert parse_reference(f"loans/a@{text}") == ("loans/a", meant)


@pytest.mark.parametrize(
    ("text", "why"),
    [("2026-03-03", "no time"), ("2026-03-03T12:00", "no time zone"), ("2026-13-03T12:00Z", "month"), ("yesterday", "no moment")],
)
def test_what_is_no_moment(text: str, why: str) -> None:
    with pytest.raises(UnknownVersionError, match=why):
        moment(text)


def test_a_moment_without_a_zone_or_to_come_is_refused(told: tuple[StateStore, Moments]) -> None:
    store, _ = told
    with pytest.raises(UnknownVersionError, match="no time zone"):
        store.effective(MONDAY, as_of=dt.datetime(2026, 3, 3))  # noqa: DTZ001
    with pytest.raises(UnknownVersionError, match="not come yet"):
        store.effective(MONDAY, as_of=now() + dt.timedelta(hours=1))


def test_a_workflow_whose_name_ends_like_a_moment(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    seal_attempt(store, "v@2026-03-03", "first", applications(1.0))
    assert resolve(store, f"{PIPELINE}/v@2026-03-03") == (f"{PIPELINE}/v@2026-03-03", None)
    assert resolve(store, f"{PIPELINE}/v@2026-03-03@1") == (f"{PIPELINE}/v@2026-03-03", 1)
    with pytest.raises(UnknownVersionError, match="no time"):
        resolve(store, f"{PIPELINE}/w@2026-03-03")


# -- the command line ----------------------------------------------------------------------------------------------------------------


def call(store: StateStore, *arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [*arguments, "--root", store.root], env={"COLUMNS": "120", "NO_COLOR": "1"})
    assert result.exit_code == code, result.output
    return result


def as_json(store: StateStore, *arguments: str, code: int = 0) -> Any:
    return json.loads(call(store, *arguments, "--json", code=code).stdout)


@pytest.mark.parametrize("way", ["option", "reference"])
def test_show_then(told: tuple[StateStore, Moments], way: str) -> None:
    store, moments = told
    at = moments["second"].isoformat()
    said = [MONDAY, "--as-of", at] if way == "option" else [f"{MONDAY}@{at}"]
    state = as_json(store, "show", *said)
    assert (state["head"], [version["version"] for version in state["versions"]]) == (5, [3, 4, 5])
    assert f"{moments['second']:%Y-%m-%d %H:%M:%S} UTC" in call(store, "show", *said).stdout
    assert as_json(store, "show", *said, "--agent", "score")["version"] == 4
    found = as_json(store, "show", *said, "--record", "A2")
    assert found["versions"][0]["records"][0]["amount"] == 9500.0
    assert SECRET not in call(store, "show", *said, "--record", "A2").stdout


def test_show_a_pipeline_then(told: tuple[StateStore, Moments]) -> None:
    store, moments = told
    at = moments["second"].isoformat()
    found = as_json(store, "show", PIPELINE, "--as-of", at)["versions"]
    assert [(one["workflow_id"], one["version"]) for one in found] == [*((MONDAY, n) for n in (3, 4, 5)), *((TUESDAY, n) for n in range(3))]
    assert TUESDAY in call(store, "show", PIPELINE, "--as-of", at, "--agent", "score").stdout
    assert "No attempt had completed" in call(store, "show", PIPELINE, "--as-of", moments["before"].isoformat()).stdout


def test_show_before_anything(told: tuple[StateStore, Moments]) -> None:
    store, moments = told
    assert "Nothing was sealed yet" in call(store, "show", f"{MONDAY}@{moments['before'].isoformat()}").stdout


def test_history_then(told: tuple[StateStore, Moments]) -> None:
    store, moments = told
    at = moments["halfway"].isoformat()
    assert [one["version"] for one in as_json(store, "history", f"{MONDAY}@{at}")] == [0, 1, 2, 3, 4]
    assert [one["version"] for one in as_json(store, "history", f"{MONDAY}@1")] == [0, 1]
    assert len(as_json(store, "history", "--as-of", at)) == 8


def test_diff_then(told: tuple[StateStore, Moments]) -> None:
    store, moments = told
    first, second = (f"{MONDAY}@{moments[name].isoformat()}" for name in ("first", "second"))
    found = as_json(store, "diff", first, second, "--agent", "application", code=1)
    assert (found["left"]["version"], found["right"]["version"], found["changed"]) == (0, 3, 1)
    assert as_json(store, "diff", first, MONDAY, "--agent", "score")["equal"]
    assert "names no version" in call(store, "diff", first, second, code=2).stderr


def test_calls_then(told: tuple[StateStore, Moments]) -> None:
    store, moments = told
    known = {"workflow_id": MONDAY, "agent": "score", "call": "c", "run_id": "r", "outcome": "answered", "number": [1, 2]}
    blank = {name: None for name in CALLS_SCHEMA if name not in known}
    rows = pl.DataFrame({**known, **blank, "started": [moments["first"], moments["second"]]}, schema=CALLS_SCHEMA)
    numbers = [pl.col(name).fill_null(0) for name in ("latency_seconds", "cost", "epoch", "input_tokens", "output_tokens")]
    assert store.add_calls(PIPELINE, "score", rows.with_columns(numbers))
    assert len(as_json(store, "calls", f"{MONDAY}@{moments['halfway'].isoformat()}")["calls"]) == 1
    assert len(as_json(store, "calls", MONDAY, "--as-of", moments["second"].isoformat())["calls"]) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", f"{MONDAY}@3", "--as-of", "2026-03-03T12:00Z"],
        ["history", f"{MONDAY}@3", "--as-of", "2026-03-03T12:00Z"],
        ["calls", f"{MONDAY}@3", "--as-of", "2026-03-03T12:00Z"],
        ["show", MONDAY, "--as-of", "2026-03-03"],
        ["show", MONDAY, "--as-of", "2999-03-03T12:00Z"],
        ["quarantine", "list", "--as-of", "yesterday"],
    ],
)
def test_what_is_said_twice_or_wrong_is_a_wrong_usage(told: tuple[StateStore, Moments], arguments: list[str]) -> None:
    call(told[0], *arguments, code=2)


class Application(BaseModel):
    id: Annotated[str, mao.Key]
    amount: float


class Small(Application):
    amount: float = Field(lt=1000)


@mao.agent
def applications_() -> list[Application]:
    return []


@mao.agent(quarantine=mao.Quarantine(max_share=0.5), ins={"entry": "applications_"})
def small(entry: Small) -> Small:
    return entry


def test_what_was_in_quarantine_then(tmp_path: Path) -> None:
    """A record that was open at the time, and was discarded later, was open."""
    store = StateStore(tmp_path)
    pipeline = mao.Pipeline("desk", entry=applications_, agents=[small])
    records = [{"id": "A1", "amount": 1.0}, {"id": "A2", "amount": 2000.0}]
    seal = mao.run(pipeline, records, store=store, workflow="day").seals["small"]
    then = since([seal])
    discard(store, refusals(store, "desk/day"), why="sent twice", by="me")
    assert [one.status for one in refusals(store, "desk/day")] == ["discarded"]
    assert [one.status for one in refusals(store, "desk/day", as_of=then)] == ["open"]
    assert (accounts(store, seal).discarded, accounts(store, seal, as_of=then).discarded) == (1, 0)
    assert len(as_json(store, "quarantine", "list", "desk/day", "--as-of", then.isoformat())) == 1
    assert as_json(store, "quarantine", "show", seal.reference, "--as-of", then.isoformat())["discarded"] == 0
    assert as_json(store, "quarantine", "list", "desk/day") == []
