"""Bisect: the first bad version, with as few looks as can be."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import dagster as dg
import polars as pl
import pytest
from pydantic import BaseModel, Field
from typer.testing import CliRunner

import dagster_mao as mao
from dagster_mao.cli import app
from dagster_mao.dagster.recorded import RecordedCheck
from dagster_mao.errors import TamperedError, UnknownVersionError, WiringError
from dagster_mao.review import bisect
from dagster_mao.review.predicates import Expression
from dagster_mao.state import Seal, StateStore
from dagster_mao.state.objects import Objects
from tests.sealed import PIPELINE, SECRET, applications, seal_attempt

RULE = "amount < 5000"
FIRST_BAD, COUNT = 23, 40


def release(store: StateStore, goods: Sequence[bool | None], *, day: str | None = None) -> list[Seal]:
    """A version per day (or all of one day): good, bad, or without a record; the bad ones by another release of the agent."""
    found: list[Seal] = []
    for place, good in enumerate(goods):
        frame = applications(1.0).clear() if good is None else applications((1000.0 if good else 9000.0) + place, 1.0)
        found += seal_attempt(
            store,
            day or f"d{place:03}",
            f"attempt-{place}",
            frame,
            agent_version="2" if good is False else "1",
            only=["application"],
        )
    return found


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> tuple[StateStore, list[Seal]]:
    store = StateStore(tmp_path_factory.mktemp("long"))
    return store, release(store, [place < FIRST_BAD for place in range(COUNT)])


def history(path: Path, pattern: str) -> StateStore:
    """`gbbg`: good, bad, bad, good."""
    store = StateStore(path)
    release(store, [{"g": True, "b": False, "-": None}[one] for one in pattern])
    return store


def of_agent(store: StateStore, good: Any = RULE, **options: Any) -> mao.review.Bisection:
    return bisect(store, PIPELINE, good, agent="application", **options)


# -- the search ----------------------------------------------------------------------------------------------------------------------


def test_the_first_bad_version_over_many_workflows(long: tuple[StateStore, list[Seal]]) -> None:
    store, seals = long
    found = of_agent(store)
    assert (found.verdict, found.candidates, found.is_monotone) == ("found", COUNT, True)
    assert found.first_bad == seals[FIRST_BAD]
    assert found.last_good == seals[FIRST_BAD - 1]
    assert found.ends == 2
    assert found.searched <= math.ceil(math.log2(COUNT - 1))
    assert ("application", "code", "1", "2") in [(one.agent, one.what, one.before, one.after) for one in found.changes]


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 9, 16, 17, 33, 100, 1000, 9_999, 10_000, 10_001])
def test_never_more_looks_than_promised(count: int) -> None:
    """Wherever the first bad one is: the two ends, and ceil(log2(n - 1)) between them, which for 10 000 are 14."""
    from dagster_mao.review.bisect import Candidate, _Looking, _searched

    class Store:
        def seals_at(self, versions: Any) -> dict[Any, Any]:
            return {one: _Seal(one[1]) for one in versions}

    class _Seal:
        def __init__(self, version: int) -> None:
            self.version, self.reference, self.parents, self.agent = version, f"w@{version}", (), "a"

        def __getattr__(self, name: str) -> Any:
            return ""

    at: Any = None
    candidates = [Candidate("w", n, "output", "a", at, 1, str(n), "") for n in range(count)]
    for first in sorted({1, 2, count // 3, count // 2, count - 2, count - 1} & set(range(1, count))):

        class Before:
            name, of_rows = "before", True

            def __call__(self, store: Any, seal: Any, first: int = first) -> bool:
                return seal.version < first

        found = _searched(Store(), _Looking(Store(), Before(), candidates, 1), 0)  # type: ignore[arg-type]
        assert found.first_bad is not None
        assert found.first_bad.version == first
        assert (found.ends, len(found.probes)) == (2, 2 + found.searched)
        assert found.searched <= math.ceil(math.log2(max(count - 1, 1)))
    assert count != 10_000 or math.ceil(math.log2(count - 1)) == 14


def test_only_what_is_looked_at_is_read(long: tuple[StateStore, list[Seal]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the log seven columns and the rows of the versions that are looked at; of these their files once, and one column of them."""
    store, _ = long
    files, columns, rows = Counter[str](), Counter[Any](), Counter[str]()
    get, read, validate = Objects.get, pl.read_parquet, Seal.model_validate
    monkeypatch.setattr(Objects, "get", lambda self, path: (files.update([path]), get(self, path))[1])
    monkeypatch.setattr(
        pl, "read_parquet", lambda source, **given: (columns.update([tuple(given.get("columns") or ["all"])]), read(source, **given))[1]
    )
    monkeypatch.setattr(Seal, "model_validate", lambda row: (rows.update([row["workflow_id"]]), validate(row))[1])
    found = of_agent(store)
    snapshots = {path: times for path, times in files.items() if path.startswith("tables/")}
    assert len(snapshots) == len(found.probes) <= 2 + math.ceil(math.log2(COUNT - 1))
    assert set(snapshots.values()) == {1}
    assert columns == {("amount",): len(found.probes)}
    assert sum(rows.values()) == len(found.probes)


def test_along_a_workflow(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    release(store, [True, True, True, False, False], day="one")
    found = bisect(store, f"{PIPELINE}/one", RULE)
    assert found.first_bad is not None
    assert found.first_bad.version == 3
    assert bisect(store, f"{PIPELINE}/one", RULE, agent="application", first="1", last="3").candidates == 3


def test_versions_by_several_agents_need_a_name(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    for attempt, amount in enumerate([1.0, 9000.0]):
        seal_attempt(store, "one", f"a{attempt}", applications(amount))
    with pytest.raises(UnknownVersionError, match="no field 'score'"):
        bisect(store, f"{PIPELINE}/one", "score < 500")
    found = bisect(store, f"{PIPELINE}/one", "score < 500", agent="score")
    assert found.first_bad is not None
    assert found.first_bad.version == 4


def test_the_ends_by_reference_and_by_moment(long: tuple[StateStore, list[Seal]]) -> None:
    store, seals = long
    found = of_agent(store, first=seals[10].reference, last=seals[30].sealed_at.isoformat())
    assert (found.first.reference, found.last.reference, found.candidates) == (seals[10].reference, seals[30].reference, 21)
    with pytest.raises(UnknownVersionError, match="none of the versions"):
        of_agent(store, first=f"{PIPELINE}/d999@0")
    with pytest.raises(UnknownVersionError, match="does not come before"):
        of_agent(store, first=seals[30].reference, last=seals[10].reference)


def test_versions_without_a_record_say_nothing_about_records(tmp_path: Path) -> None:
    """An empty batch would be good, and hide that the release before it broke."""
    found = of_agent(history(tmp_path, "ggb-b-"))
    assert found.candidates == 4
    assert found.first_bad is not None
    assert found.first_bad.workflow_id == f"{PIPELINE}/d002"
    assert of_agent(history(tmp_path / "f", "gb-"), lambda rows: rows.collect().height > 0).candidates == 3


# -- histories that turn otherwise ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pattern", "verdict"), [("gggg", "never_bad"), ("bbbb", "always_bad"), ("bbgg", "not_monotone")])
def test_both_ends_are_looked_at_first(tmp_path: Path, pattern: str, verdict: str) -> None:
    found = of_agent(history(tmp_path, pattern))
    assert (found.verdict, found.first_bad, len(found.probes)) == (verdict, None, 2)
    assert found.is_monotone == (verdict != "not_monotone")


def test_a_history_that_turns_twice_is_found_by_spot_checks_and_told_by_linear(tmp_path: Path) -> None:
    store = history(tmp_path, "gbgggggbb")
    assert of_agent(store).is_monotone  # nobody looked there
    checked = of_agent(store, spot_checks=9)
    assert not checked.is_monotone
    assert checked.against == ((f"{PIPELINE}/d001@0", f"{PIPELINE}/d006@0"),)
    assert (checked.searched, checked.spot_checked) == (3, 4)
    through = of_agent(store, linear=True)
    assert through.turns == tuple(f"{PIPELINE}/d00{n}@0" for n in (1, 2, 7))
    assert through.first_bad is not None
    assert through.first_bad.workflow_id == f"{PIPELINE}/d001"
    assert not through.is_monotone


def test_the_same_content_is_not_read_twice_and_contradicts_for_nothing(tmp_path: Path) -> None:
    """What was sealed again, byte for byte, has the same answer: a bad version before a good one is seen without a further look."""
    store = StateStore(tmp_path)
    for place, amount in enumerate([1.0, 2.0, 9000.0, 1.0, 9001.0]):
        seal_attempt(store, f"d{place}", "a", applications(amount), only=["application"])
    found = of_agent(store)
    assert found.against == ((f"{PIPELINE}/d2@0", f"{PIPELINE}/d3@0"),)
    assert not found.is_monotone


def test_a_noisy_predicate_is_asked_several_times_and_the_majority_counts(long: tuple[StateStore, list[Seal]]) -> None:
    store, seals = long
    times = Counter[int]()

    def sometimes(rows: pl.LazyFrame, seal: Seal) -> bool:
        place = int(seal.workflow_id[-3:])
        times[place] += 1
        return (place < FIRST_BAD) != (times[place] % 3 == 0)

    found = of_agent(store, sometimes, repeat=5)
    assert found.first_bad == seals[FIRST_BAD]
    assert found.asked == 5 * len(found.probes)
    assert all(probe.is_noisy for probe in found.probes)
    with pytest.raises(WiringError, match="majority of 4"):
        of_agent(store, sometimes, repeat=4)


# -- predicates ----------------------------------------------------------------------------------------------------------------------


class SmallApplication(BaseModel):
    id: Annotated[str, mao.Key]
    name: str
    amount: float = Field(lt=5000)


def is_small(rows: pl.LazyFrame) -> bool:
    return bool(rows.select((pl.col("amount") < 5000).all()).collect().item())


@pytest.mark.parametrize(
    "good",
    [RULE, pl.col("amount") < 5000, "max(amount) < 5000", "contact.city = 'Arlington' and amount < 5e3", is_small, SmallApplication],
)
def test_what_says_that_a_version_is_good(tmp_path: Path, good: Any) -> None:
    found = of_agent(history(tmp_path, "ggbb"), good)
    assert found.first_bad is not None
    assert found.first_bad.workflow_id == f"{PIPELINE}/d002"


def test_null_is_not_true(tmp_path: Path) -> None:
    store = StateStore(tmp_path)
    for place, amount in enumerate([1.0, None]):
        seal_attempt(store, f"d{place}", "a", applications(1.0).with_columns(amount=pl.lit(amount, pl.Float64)), only=["application"])
    assert of_agent(store).verdict == "found"
    assert of_agent(store, "amount < 5000 or amount is null").verdict == "never_bad"


@pytest.mark.parametrize(
    "text",
    [
        "amount < (SELECT max(a) FROM read_csv('{file}'))",
        "amount in (from read_csv('{file}'))",
        "amount in ( FROM read_csv('{file}'))",
        "exists(from read_csv('{file}'))",
        "amount < (with a as (from read_csv('{file}')) from a)",
        "amount < 5000; drop table x",
        "",
        "amount <",
    ],
)
def test_an_expression_asks_for_nothing_but_the_rows(tmp_path: Path, text: str) -> None:
    """polars' own parser opens any file that a subquery names, and quotes it in its error."""
    file = tmp_path / "secret.csv"
    file.write_text(f"{SECRET}\n1\n")
    with pytest.raises(WiringError) as error:
        Expression(text.replace("{file}", str(file)))
    assert SECRET not in str(error.value)


def test_a_predicate_that_says_neither_yes_nor_no(long: tuple[StateStore, list[Seal]]) -> None:
    store, seals = long
    with pytest.raises(WiringError, match="Float64, and not yes or no"):
        of_agent(store, "amount")
    with pytest.raises(WiringError, match=f"returned NoneType about {seals[0].reference}"):
        of_agent(store, lambda rows: None)
    with pytest.raises(WiringError, match="raised ZeroDivisionError") as error:
        of_agent(store, lambda rows: 1 / 0)
    assert isinstance(error.value.__cause__, ZeroDivisionError)
    with pytest.raises(WiringError, match="takes 3 parameters"):
        of_agent(store, lambda rows, seal, more: True)
    with pytest.raises(WiringError, match="cannot be told"):
        of_agent(store, "amount like 'x'")
    with pytest.raises(UnknownVersionError, match="no field 'amuont'"):
        of_agent(store, "amuont < 3")


def test_a_changed_snapshot_is_no_answer(tmp_path: Path) -> None:
    store = history(tmp_path, "ggb")
    seal = store.seal_at(f"{PIPELINE}/d001", 0)
    file = tmp_path / seal.path
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(TamperedError, match="d001@0"):
        of_agent(store)


def told_by_dagster(store: StateStore, home: Path, tell: Callable[[Seal], dict[str, Any] | None]) -> None:
    home.mkdir(exist_ok=True)
    (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")
    with dg.DagsterInstance.from_config(str(home)) as instance:
        for seal in mao.review.history(store):
            if (told := tell(seal)) is not None:
                key = dg.AssetKey([PIPELINE, seal.agent])
                instance.report_runless_asset_event(dg.AssetCheckEvaluation(asset_key=key, check_name="fair", **told))


def test_an_asset_check_that_was_told_of_the_version(tmp_path: Path) -> None:
    """A judge's, or anybody's: what names the version counts, the last that was told of it."""
    store, home = history(tmp_path / "state", "ggggbb"), tmp_path / "home"
    told_by_dagster(store, home, lambda seal: {"passed": False, "metadata": {"mao/state_version": seal.reference}})
    told_by_dagster(store, home, lambda seal: {"passed": seal.workflow_id[-1] < "4", "metadata": {"mao/state_version": seal.reference}})
    with dg.DagsterInstance.from_config(str(home)) as instance:
        found = of_agent(store, RecordedCheck(instance, PIPELINE, "application", "fair"))
        assert found.first_bad is not None
        assert found.first_bad.workflow_id == f"{PIPELINE}/d004"
        with pytest.raises(UnknownVersionError, match="no evaluation of 'unfair'"):
            of_agent(store, RecordedCheck(instance, PIPELINE, "application", "unfair"))
    out = call(store, "bisect", PIPELINE, "--agent", "application", "--check", "fair", "--dagster-home", str(home)).stdout
    assert f"{PIPELINE}/d004@0" in out


def test_an_asset_check_that_was_told_by_the_run_of_the_version(tmp_path: Path) -> None:
    class One(BaseModel):
        id: Annotated[str, mao.Key]
        amount: float

    class Desk(dg.ConfigurableResource):
        amount: float

    @mao.agent(quarantine=mao.Quarantine(max_share=1))
    def entry(*, desk: Desk) -> list[One]:
        return [One(id="a", amount=1.0), *([One(id="b", amount=2.0)] * (2 if desk.amount > 2 else 1))]

    pipeline = mao.Pipeline("desk", entry=entry, agents=[], partitions_def=dg.StaticPartitionsDefinition(["d0", "d1", "d2", "d3"]))
    state = mao.StateStoreResource(root=str(tmp_path / "state"))
    with dg.DagsterInstance.ephemeral() as instance:
        for day in range(4):
            defs = mao.build_definitions(pipeline, resources={"state_store": state, "desk": Desk(amount=float(day) + 0.5)})
            job = defs.resolve_implicit_global_asset_job_def().get_subset(asset_selection=set(pipeline_assets(pipeline)))
            assert job.execute_in_process(instance=instance, partition_key=f"d{day}").success
        found = bisect(state.store(), "desk", RecordedCheck(instance, "desk", "entry", "output"), agent="entry")
    assert found.first_bad is not None
    assert found.first_bad.workflow_id == "desk/d2"


def pipeline_assets(pipeline: mao.Pipeline) -> list[dg.AssetKey]:
    names = [name for agent in pipeline.order for name in (agent, f"{agent}_quarantine")]
    return [dg.AssetKey([pipeline.name, name]) for name in names]


# -- what had changed ----------------------------------------------------------------------------------------------------------------


def test_a_release_above_shows_as_the_change_that_it_is(tmp_path: Path) -> None:
    """The agent that shows the fault is not the one that was released."""
    store = StateStore(tmp_path)

    class Number(BaseModel):
        id: Annotated[str, mao.Key]
        value: float

    @mao.agent(version="same")
    def entry() -> list[Number]:
        return []

    def doubling(version: str, factor: float) -> Any:
        @mao.agent(name="doubled", version=version)
        def doubled(entry: Number) -> Number:
            return Number(id=entry.id, value=factor * entry.value)

        return doubled

    @mao.agent(version="same")
    def total(doubled: Number) -> Number:
        return doubled

    for day, (version, factor) in enumerate([("1", 2), ("1", 2), ("2", 20), ("2", 20)]):
        pipeline = mao.Pipeline("sums", entry=entry, agents=[doubling(version, factor), total])
        mao.run(pipeline, [{"id": "a", "value": 1.0}], store=store, workflow=f"d{day}")
    found = bisect(store, "sums", "value < 10", agent="total")
    assert found.first_bad is not None
    assert found.first_bad.workflow_id == "sums/d2"
    told = [(one.agent, one.what) for one in found.changes]
    assert told == [("doubled", "code"), ("doubled", "input")]


# -- the command line ----------------------------------------------------------------------------------------------------------------


def call(store: StateStore, *arguments: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, [*arguments, "--root", store.root], env={"COLUMNS": "120", "NO_COLOR": "1"})
    assert result.exit_code == code, result.output
    return result


def test_the_answer_for_people(long: tuple[StateStore, list[Seal]]) -> None:
    store, seals = long
    out = call(store, "bisect", PIPELINE, "--agent", "application", "--holds", RULE).stdout
    bad = seals[FIRST_BAD]
    for told in (bad.reference, bad.agent, bad.run_id, "code version 2", seals[FIRST_BAD - 1].reference, "code", "2 at the ends"):
        assert told in out
    assert SECRET not in out


def test_the_answer_for_programs(long: tuple[StateStore, list[Seal]]) -> None:
    store, seals = long
    found = json.loads(call(store, "bisect", PIPELINE, "--agent", "application", "--holds", RULE, "--json").stdout)
    assert (found["verdict"], found["first_bad"]["workflow_id"]) == ("found", seals[FIRST_BAD].workflow_id)
    assert found["ends"] + found["searched"] == len(found["probes"])


@pytest.mark.parametrize(("pattern", "code"), [("ggbb", 0), ("gg", 3), ("bb", 4), ("bg", 5)])
def test_the_exit_codes(tmp_path: Path, pattern: str, code: int) -> None:
    store = history(tmp_path, pattern)
    call(store, "bisect", PIPELINE, "--agent", "application", "--holds", RULE, code=code)
    call(store, "bisect", PIPELINE, "--agent", "application", "--holds", RULE, "--json", "--linear", code=code)


def test_wrong_usage(long: tuple[StateStore, list[Seal]]) -> None:
    store, _ = long
    call(store, "bisect", PIPELINE, "--agent", "application", code=2)
    call(store, "bisect", PIPELINE, "--agent", "application", "--holds", RULE, "--function", "m:f", code=2)
    call(store, "bisect", PIPELINE, "--agent", "application", "--holds", RULE, "--repeat", "2", code=2)
    assert "whose history" in call(store, "bisect", PIPELINE, "--holds", RULE, code=1).stderr
    assert "did you mean" in call(store, "bisect", f"{PIPELINE}/d00", "--holds", RULE, code=1).stderr
    assert "no version to look at" in call(store, "bisect", PIPELINE, "--agent", "applicant", "--holds", RULE, code=1).stderr


def test_a_function_and_a_contract_by_their_place(long: tuple[StateStore, list[Seal]], tmp_path: Path, monkeypatch: Any) -> None:
    store, seals = long
    (tmp_path / "rules_of_ours.py").write_text(
        "from pydantic import BaseModel, Field\n"
        "def small(rows, seal):\n    return rows.collect()['amount'].max() < 5000\n"
        "class Small(BaseModel):\n    amount: float = Field(lt=5000)\n"
    )
    monkeypatch.chdir(tmp_path)
    for option in (["--function", "rules_of_ours:small"], ["--contract", "rules_of_ours:Small"]):
        assert seals[FIRST_BAD].reference in call(store, "bisect", PIPELINE, "--agent", "application", *option).stdout
    assert (
        "cannot be imported" in call(store, "bisect", PIPELINE, "--agent", "application", "--function", "rules_of_ours:no", code=1).stderr
    )
