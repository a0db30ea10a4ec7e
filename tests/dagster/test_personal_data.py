"""Law 13: what a contract marks personal stands in the store, where it belongs, and in nothing else that the project writes.

Markers are planted in personal fields of every kind; everything goes wrong that can; then all files of the Dagster instance (event log, run
storage, captured output), the log lines, the error texts and the output of every command are searched for them.
"""

from __future__ import annotations

import datetime as dt
import logging
import traceback
from pathlib import Path
from typing import Annotated, Any

import dagster as dg
import polars as pl
import pytest
from pydantic import BaseModel, Field, SecretStr, field_validator
from typer.testing import CliRunner

import dagster_mao as mao
from dagster_mao.cli import app
from dagster_mao.dagster import StateStoreResource
from dagster_mao.state import StateStore

NAME, PHONE, ALIAS, NOTE, TOKEN, KEY = (f"MARKER-{word}-4f1d" for word in ("name", "phone", "alias", "note", "token", "key"))
BORN, SALARY, LONGER = dt.date(1871, 3, 17), 8675309, NAME + "x" * 80
MARKERS = (NAME, PHONE, ALIAS, NOTE, TOKEN, KEY, str(BORN), str(SALARY))


class Contact(BaseModel):
    phone: Annotated[str, mao.Personal]
    city: str


class Person(BaseModel):
    person_id: Annotated[str, mao.Key, mao.Personal]
    name: Annotated[str, mao.Personal, Field(max_length=60)]
    born: Annotated[dt.date | None, mao.Personal]
    salary: Annotated[int, mao.Personal, Field(lt=9_000_000)]
    aliases: Annotated[list[str], mao.Personal]
    notes: Annotated[dict[str, str], mao.Personal]
    contact: Contact
    token: SecretStr
    amount: float = Field(gt=0)

    @field_validator("name")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if "unknown" in name:
            raise ValueError(f"nobody knows {name}")
        return name


class Greeting(BaseModel):
    person_id: Annotated[str, mao.Key, mao.Personal]
    text: Annotated[str, mao.Personal, Field(max_length=60)]
    amount: float = Field(le=100)


def person(number: int = 0, **changes: Any) -> dict[str, Any]:
    told = {
        "person_id": f"{KEY}-{number}",
        "name": NAME,
        "born": BORN,
        "salary": SALARY,
        "aliases": [ALIAS],
        "notes": {NOTE: NOTE},
        "contact": {"phone": PHONE, "city": "Arlington"},
        "token": TOKEN,
        "amount": 1.0,
    }
    return {**told, **changes}


BAD: list[dict[str, Any]] = [
    person(1, name=LONGER),
    person(2, name=f"{NAME} unknown"),
    person(3, salary=f"{SALARY} a year"),
    person(4, born=f"{BORN} or so"),
    person(5, aliases=ALIAS, contact=PHONE),
    person(6, contact={"phone": [PHONE], "city": "x"}, ssn=NOTE),
    person(7, amount=-1),
]


@mao.agent(quarantine=mao.Quarantine(max_share=1))
def lenient() -> list[Person]:
    """Most of what it brings is quarantined."""
    return [person(), *BAD, person(200, amount=101), person(8, amount=2), person(8, amount=3)]  # type: ignore[list-item]


@mao.agent(name="lenient")
def strict() -> list[Person]:
    """The same, and nothing may be quarantined."""
    return [person(), *BAD]  # type: ignore[list-item]


@mao.agent(name="lenient")
def good() -> list[Person]:
    return [person(n) for n in range(3)]  # type: ignore[misc]


@mao.agent(quarantine=mao.Quarantine(max_share=1))
def greets(lenient: Person) -> Greeting:
    return Greeting(person_id=lenient.person_id, text=lenient.name, amount=lenient.amount)


@mao.agent
def raises(lenient: Person) -> Greeting:
    raise ValueError(f"cannot greet {lenient.name}, born {lenient.born}")


@mao.agent
async def raises_later(lenient: Person) -> Greeting:
    raise KeyError(lenient.person_id)


@mao.agent
def builds_wrongly(lenient: Person) -> Greeting:
    return Greeting.model_validate({"person_id": lenient.person_id, "text": [lenient.name], "amount": lenient.salary})


@mao.agent
def casts(lenient: mao.LazyFrame[Person]) -> mao.LazyFrame[Greeting]:
    return lenient.select("person_id", text="name", amount=pl.col("name").cast(pl.Float64))


@mao.agent
def too_long(lenient: mao.LazyFrame[Person]) -> mao.LazyFrame[Greeting]:
    return lenient.select("person_id", text=pl.col("name").repeat_by(9).list.join(""), amount=pl.lit(1000.0))


@mao.agent
def renames(lenient: mao.DataFrame[Person]) -> mao.DataFrame[Greeting]:
    return lenient.select(person_id=pl.col("name") + pl.col("person_id"), text="name", amount="amount")


@mao.agent
def returns_a_dict(lenient: Person) -> Greeting:
    return {"person_id": lenient.person_id, "text": lenient.name}  # type: ignore[return-value]


@mao.agent(expectations=[{"type": "expect_column_values_to_be_in_set", "kwargs": {"column": "text", "value_set": ["x"]}}])
def unexpected(lenient: mao.LazyFrame[Person]) -> mao.LazyFrame[Greeting]:
    return lenient.select("person_id", text="name", amount="amount")


TROUBLES = [(good, a) for a in (raises, raises_later, builds_wrongly, casts, too_long, renames, returns_a_dict, unexpected)]
PIPELINES = [(lenient, [greets]), (good, [greets]), (strict, [greets]), (good, [a for _, a in TROUBLES])]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def written(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By where it stands, all that was written outside the store while everything ran, and whether the runs ended well."""
    logs = _Lines()
    logging.getLogger().addHandler(logs)
    with dg.DagsterInstance.local_temp(str(home)) as instance:
        for number, (entry, greeters) in enumerate(PIPELINES):
            pipeline = mao.Pipeline(f"people_{number}", entry=entry, agents=greeters)
            defs = pipeline.build_definitions(resources={"state_store": StateStoreResource(root=str(home.parent / "personal-state"))})
            result = defs.resolve_job_def(f"people_{number}_job").execute_in_process(instance=instance, raise_on_error=False)
    failed = {event.step_key for event in result.all_events if event.is_step_failure}
    assert failed == {f"people_3__{agent.name}" for _, agent in TROUBLES}, "each of them did what it should not"
    logging.getLogger().removeHandler(logs)
    texts = {str(file): file.read_bytes().decode(errors="replace") for file in home.rglob("*") if file.is_file()}
    return {**texts, "log lines": "\n".join(logs.lines), **_commands(str(home.parent / "personal-state"))}


class _Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(logging.Formatter().format(record))


def _commands(root: str) -> dict[str, str]:
    store = StateStore(root)
    (workflow,) = store.workflows("people_0")
    again = store.workflows("people_1")[0]
    calls = [
        ["history"],
        ["show", workflow],
        ["show", f"{workflow}@0", "--rows", "9"],
        ["show", f"{workflow}@1", "--json"],
        ["show", f"{workflow}@0", "--contract"],
        ["diff", f"{workflow}@0", f"{again}@0"],
        ["diff", f"{workflow}@1", f"{again}@1", "--json"],
        ["verify"],
        ["quarantine", "list"],
        ["quarantine", "list", "--json"],
        ["quarantine", "show", f"{workflow}@0"],
        ["quarantine", "show", f"{workflow}@1", "--json"],
        ["quarantine", "resubmit", f"{workflow}@0", "--record", "nobody", "--set", "amount=1"],
    ]
    said = {}
    for call in calls:
        result = CliRunner().invoke(app, [*call, "--root", root], env={"COLUMNS": "300"})
        assert result.exception is None or isinstance(result.exception, SystemExit), traceback.format_exception(result.exception)
        assert result.exit_code != 2, result.output + result.stderr  # wrong usage would show nothing, and prove nothing
        said["dagster-mao " + " ".join(call)] = result.output + result.stderr
    return said


def test_no_marker_is_found_outside_the_store(written: dict[str, str]) -> None:
    found = {(where, marker) for where, text in written.items() for marker in MARKERS if marker in text}
    assert not found


def test_what_was_searched_is_what_was_written(written: dict[str, str]) -> None:
    """Or else the search above would find nothing because it looks at nothing."""
    everything = "\n".join(written.values())
    assert "Arlington" in everything  # not personal, and printed
    for reason in (
        "name: max_length 60",
        "amount: gt 0",
        "execute raised ValueError",
        "execute raised KeyError",
        "record returned, but never read",
    ):
        assert reason in everything
    assert any("event" in where or "runs" in where for where in written)


def test_the_search_finds_what_an_agent_logs_itself(tmp_path: Path) -> None:
    """The naive way: what an agent writes to its own log is the agent's to mind."""

    @mao.agent(name="greets")
    def talks(ctx: mao.AgentContext, lenient: Person) -> Greeting:
        ctx.log.info("greeting %s", lenient.name)
        return Greeting(person_id=lenient.person_id, text="", amount=1)

    (tmp_path / "home").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "home")) as instance:
        pipeline = mao.Pipeline("people", entry=good, agents=[talks])
        defs = pipeline.build_definitions(resources={"state_store": StateStoreResource(root=str(tmp_path / "state"))})
        assert defs.resolve_job_def("people_job").execute_in_process(instance=instance).success
    assert any(NAME.encode() in file.read_bytes() for file in (tmp_path / "home").rglob("*") if file.is_file())


def test_the_store_holds_what_is_personal(written: dict[str, str], home: Path) -> None:
    store = StateStore(home.parent / "personal-state")
    (workflow,) = store.workflows("people_0")
    assert store.read(store.seal_at(workflow, 0)).collect()["name"].to_list() == [NAME, NAME]
    assert all(KEY in key for key in store.quarantine(store.seal_at(workflow, 0))["record"])


@pytest.mark.parametrize(("entry", "greeter"), [(strict, greets), *TROUBLES[:-1]])
def test_errors_of_plain_python_show_nothing_either(entry: mao.Agent, greeter: mao.Agent) -> None:
    with pytest.raises(mao.MaoError) as caught:
        mao.run(mao.Pipeline("people", entry=entry, agents=[greeter]))
    told = "".join(traceback.format_exception(caught.value)) + repr(caught.value) + str(caught.value.checks)
    assert not [marker for marker in MARKERS if marker in told]
