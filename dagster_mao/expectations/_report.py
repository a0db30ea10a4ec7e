"""The findings of a suite as a page that opens anywhere: one file, no script, nothing loaded from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from dagster_mao.expectations._suite import Finding

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 75em; padding: 0 1em; color: #1b1f24; background: #fff }
h1 { font-size: 1.4em }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2em 1em }
dd { margin: 0; overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .5em .6em; border-bottom: 1px solid #d1d9e0 }
code { font: 13px ui-monospace, monospace; overflow-wrap: anywhere }
th, dt, small, .skipped { color: #59636e; font-weight: normal }
td:first-child { white-space: nowrap }
.passed { color: #1a7f37 }
.error { color: #d1242f }
.warn { color: #9a6700 }
"""
_NUMBERS = ("element_count", "unexpected_count", "unexpected_percent", "missing_count")


def report(title: str, facts: Mapping[str, Any], findings: Sequence[Finding]) -> str:
    """The page, as HTML. `facts` says of which batch the findings are; what was masked in the findings is masked here."""
    counts = {state: sum(_state(one) == state for one in findings) for state in ("passed", "error", "warn", "skipped")}
    words = {"passed": "passed", "error": "failed", "warn": "warned", "skipped": "not judged"}
    told = {**facts, "expectations": ", ".join(f"{count} {words[state]}" for state, count in counts.items() if count)}
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>" for name, value in told.items())
    rows = "".join(map(_row, findings))
    head = "".join(f"<th>{name}</th>" for name in ("", "Expectation", "Arguments", "Observed", "Severity"))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style></head>\n'
        f"<body><h1>{escape(title)}</h1>\n<dl>{listed}</dl>\n<table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></body></html>\n"
    )


def _state(one: Finding) -> str:
    return "skipped" if "skipped" in one.metadata else "passed" if one.passed else one.severity


def _row(one: Finding) -> str:
    state = _state(one)
    mark = {"passed": "✓ passed", "error": "✗ failed", "warn": "! warned", "skipped": "- not judged"}[state]
    arguments = "<br>".join(f"<code>{escape(name)} = {escape(_text(value))}</code>" for name, value in one.metadata["arguments"].items())
    numbers = [f"{name.replace('_', ' ')} {_text(one.metadata[name])}" for name in _NUMBERS if name in one.metadata]
    samples = [_text(sample) for reason in one.metadata.get("reasons", ()) for sample in reason["samples"]]
    observed = f"{escape(one.description)}<br><small>{escape(', '.join(numbers))}</small>"
    observed += "".join(f"<br><code>{escape(sample)}</code>" for sample in samples)
    cells = (
        f'<span class="{state}">{mark}</span>',
        f"<b>{escape(one.name)}</b><br><small>{escape(one.metadata['expectation'])}</small>",
        arguments,
        observed,
        escape(one.metadata["gx_severity"]),
    )
    return f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
