"""Where the state lies: options, then the environment, then the project's pyproject.toml."""

from __future__ import annotations

import datetime as dt
import importlib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from dagster_mao.cli._app import DATABASE, ROOT
from dagster_mao.cli._print import misused
from dagster_mao.errors import StoreError, UnknownVersionError, WiringError
from dagster_mao.pipeline import Pipeline
from dagster_mao.state import When, moment, passed
from dagster_mao.state.store import StateStore

if TYPE_CHECKING:
    from dagster_mao.gateway._shared import SharedStore

T = TypeVar("T")


def open_store(root: str | None, storage_option: Sequence[str] | None, *, damaged: bool = False) -> StateStore:
    """The store that options, environment and project say. Raises `StoreError` when there is no state in it; creates nothing.

    With `damaged`, a store that has lost its log is still one, to be looked into.
    """
    options = _options(storage_option)
    configured, _ = project()
    place, by = _root(root)
    if not place:
        raise _unnamed()
    store = StateStore(place, {**configured.get("storage_options", {}), **options})
    if not any(_holds(store, folder) for folder in (("state_log", "tables") if damaged else ("state_log",))):
        raise StoreError(f"There is no state at {store.root} (named by {by})", fix="run the pipeline first, or name another root")
    return store


def _root(root: str | None) -> tuple[str, str]:
    """The root of the store, and what says so; empty when nothing does."""
    configured, where = project()
    said = [(root, "--root"), (os.environ.get(ROOT), f"${ROOT}"), (placed(configured.get("root"), where), str(where))]
    return next(((place, by) for place, by in said if place), ("", ""))


def open_shared(database: str | None, root: str | None, *, unused: bool = False) -> SharedStore:
    """The shared database that options, environment and project say, by default the one in a local root. Raises `StoreError` when there
    is none; creates nothing.

    With `unused`, a store that has state need not have made its database yet.
    """
    from dagster_mao.gateway._shared import SharedStore  # imports SQLAlchemy, which few commands need

    url, store = _database(database), None
    if not url and (place := _root(root)[0]):
        store = StateStore(place)
        url = store.database
    if not url:
        fix = f"give --database, set {DATABASE}, or put database under [tool.dagster-mao] in pyproject.toml"
        raise StoreError("No shared database is named", fix=fix)
    shared = SharedStore(url)
    if shared.file is not None and not shared.file.exists() and not (unused and store and _holds(store, "state_log")):
        fix = "it is made by the first call of an agent with a breaker or a rate limit; or name another by --database"
        raise StoreError(f"There is no shared database at {shared.file}", fix=fix)
    return shared


def store_to_write(root: str | None, storage_option: Sequence[str] | None, database: str | None) -> StateStore:
    """The store that options, environment and project say, with its shared database. Nothing need be there yet; makes nothing."""
    place, _ = _root(root)
    if not place:
        raise _unnamed()
    return StateStore(place, {**project()[0].get("storage_options", {}), **_options(storage_option)}, database=_database(database))


def _unnamed() -> StoreError:
    fix = f"give --root, set {ROOT}, or put root under [tool.dagster-mao] in pyproject.toml"
    return StoreError("No state store is named", fix=fix)


def _database(database: str | None) -> str | None:
    """The URL of the shared database; None where only the store says."""
    configured, where = project()
    return database or os.environ.get(DATABASE) or placed(_relative(configured.get("database")), where)


def _relative(url: str | None) -> str | None:
    """The path of an SQLite URL that counts from somewhere: in pyproject.toml that is the file's folder."""
    found = re.fullmatch(r"sqlite(?:\+\w+)?:///([^/?][^?]*)", url or "")
    return found[1] if found else url


def _holds(store: StateStore, folder: str) -> bool:
    return next(iter(store.objects.list(folder)), None) is not None


def _options(pairs: Iterable[str] | None) -> dict[str, str]:
    options = {}
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not (name and equals):
            misused(f"--storage-option takes KEY=VALUE, not {pair!r}")
        options[name] = value
    return options


def project() -> tuple[dict[str, Any], Path]:
    """[tool.dagster-mao] of the nearest pyproject.toml upward that has one, and that file."""
    here = Path.cwd()
    for folder in (here, *here.parents):
        file = folder / "pyproject.toml"
        if file.is_file():
            try:
                table = _toml(file).get("tool", {}).get("dagster-mao")
            except (OSError, ValueError) as error:
                raise StoreError(f"{file} cannot be read: {error}", fix="mend it, or work with --root from another folder") from error
            if table is not None:
                return dict(table), file
    return {}, here / "pyproject.toml"


def _toml(file: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(file.read_text(encoding="utf-8"))


def placed(place: str | None, file: Path) -> str | None:
    """A path of pyproject.toml counts from that file's folder."""
    return place if not place or "://" in place else str(file.parent / place)


def moment_of(as_of: str | None) -> dt.datetime | None:
    """The moment that --as-of says. A wrong usage where it is none, or has not come yet."""
    if as_of is None:
        return None
    try:
        return passed(moment(as_of))
    except UnknownVersionError as error:
        misused(f"--as-of: {error}")


def when_of(when: When | None, as_of: str | None) -> When | None:
    """What a reference says (`workflow@n`, `workflow@2026-03-03T12:00Z`) or --as-of. A wrong usage where both do."""
    if when is not None and as_of is not None:
        misused("say it once: WORKFLOW@N, WORKFLOW@TIME or --as-of")
    return moment_of(as_of) if when is None else when


def load_pipeline(given: str | None, workflow: str) -> Pipeline:
    """The pipeline of a workflow: the one that was given as module:attribute, else the one of that name in pyproject.toml.

    Imports the user's code, with the project's folder (where pyproject.toml is, else the working directory) on the path. Raises
    `WiringError` when there is none by that name.
    """
    configured, where = project()
    places = [given] if given else list(configured.get("pipelines", ()))
    if not places:
        fix = 'give --pipeline module:attribute, or put pipelines = ["module:attribute"] under [tool.dagster-mao] in pyproject.toml'
        raise WiringError("No pipeline is named, and this takes its code", workflow=workflow, fix=fix)
    found = [imported(place, where.parent, Pipeline, "mao.Pipeline") for place in places]
    for pipeline in found:
        if workflow.startswith(f"{pipeline.name}/"):
            return pipeline
    there = ", ".join(pipeline.name for pipeline in found)
    raise WiringError(f"No pipeline that is named has this workflow; there is {there}", workflow=workflow, fix="name its own by --pipeline")


def named_pipelines(name: str) -> list[Pipeline]:
    """The pipeline at module:attribute, or those of this name in pyproject.toml: there are several where agents run in code locations of
    their own. Raises `WiringError` when there is none by that name.
    """
    configured, where = project()
    if ":" in name:
        return [imported(name, where.parent, Pipeline, "mao.Pipeline")]
    found = [imported(place, where.parent, Pipeline, "mao.Pipeline") for place in configured.get("pipelines", ())]
    if named := [pipeline for pipeline in found if pipeline.name == name]:
        return named
    there = f"there is {', '.join(pipeline.name for pipeline in found)}" if found else "none is named"
    fix = 'give module:attribute, or put pipelines = ["module:attribute"] under [tool.dagster-mao] in pyproject.toml'
    raise WiringError(f"No pipeline {name!r} is named; {there}", fix=fix)


@contextmanager
def resources_of(names: Sequence[str], definitions: str | None, doing: str) -> Iterator[dict[str, Any]]:
    """The resources of these names, as the Dagster definitions make them that are given as module:attribute or named in pyproject.toml.

    Imports Dagster where there are any. Raises `WiringError` where no definitions have them; `doing` says what takes them.
    """
    if not names:
        yield {}
        return
    import dagster as dg  # takes seconds, which what needs no resources does not pay

    configured, where = project()
    place = definitions or configured.get("definitions")
    if not place:
        fix = 'give --definitions module:attribute, or put definitions = "module:attribute" under [tool.dagster-mao] in pyproject.toml'
        raise WiringError(f"{doing} takes the resource {names[0]!r}, and no definitions are named that have it", fix=fix)
    defs = imported(place, where.parent, dg.Definitions, "dg.Definitions")
    there = dict(defs.resources or {})
    if missing := [name for name in names if name not in there]:
        raise WiringError(f"{place} has no resource {missing[0]!r}", field=missing[0], fix="name the definitions that the pipeline runs by")
    with dg.build_resources({name: there[name] for name in names}) as made:
        yield {name: getattr(made, name) for name in names}


def imported(place: str, folder: Path, kind: type[T], called: str) -> T:
    """What module:attribute names, with `folder` on the path. Raises `WiringError` when it is no `kind`, which users know as `called`."""
    module, colon, attribute = place.partition(":")
    if not (module and colon and attribute):
        misused(f"a place in the code is written module:attribute, not {place!r}")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    try:
        found = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # whatever the user's modules raise
        raise WiringError(
            f"{place} cannot be imported: {type(error).__name__}: {error}", fix=f"try `python -c 'import {module}'`"
        ) from error
    if not isinstance(found, kind):
        raise WiringError(f"{place} is a {type(found).__name__}, not a {called}", fix=f"name the variable that holds the {called}")
    return found
