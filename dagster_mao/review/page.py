"""A dossier as one HTML page that needs nothing else: no network, no script. It opens from a mail, and prints."""

from __future__ import annotations

import datetime as dt
import json
from functools import lru_cache
from importlib.resources import files
from typing import Any

import jinja2
from rich.filesize import decimal

from dagster_mao.review.calls import told_of
from dagster_mao.review.dossier import Dossier, finding_text
from dagster_mao.review.lineage import lineage_svg

_TEMPLATE = "dossier.html.jinja"


def as_html(told: Dossier) -> str:
    """The page. Everything in it that comes from data is escaped, and its policy lets no browser run or load anything."""
    links = {v.seal.version: f"#v{v.seal.version}" for v in told.versions}
    picture = lineage_svg([v.seal for v in told.versions if v.is_effective], links)
    return _template().render(told=told, picture=picture, lines=finding_text)


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    source = files("dagster_mao.review").joinpath(_TEMPLATE).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"moment": _moment, "value": _value, "calls": told_of, "bytes": decimal, "count": "{:,}".format}
    return environment.from_string(source)


def _moment(at: dt.datetime | None) -> str:
    return "" if at is None else f"{at.astimezone(dt.timezone.utc):%Y-%m-%d %H:%M:%S}"


def _value(value: Any) -> str:
    """A value in a table, for people."""
    if value is None:
        return "\u2013"
    if isinstance(value, float):
        return f"{value:.10g}"
    if isinstance(value, dt.datetime):
        return _moment(value)
    if isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value):
        return "; ".join(value)
    return json.dumps(value, default=str, ensure_ascii=False) if isinstance(value, (dict, list, tuple)) else str(value)
