"""The records that a step sets aside because its agent declares a quarantine, as they are found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import polars as pl
from pydantic import ValidationError
from pydantic_core import to_json

from dagster_mao.agent import Input
from dagster_mao.contract import (
    MASK,
    Contract,
    Refused,
    RuleFailure,
    broken_records,
    by_field,
    by_name,
    field_of,
    has_personal,
    hide,
    text_of,
)
from dagster_mao.state import QUARANTINE_SCHEMA

INPUT_SIDE, OUTPUT_SIDE = "input", "output"


class Aside:
    """One step's quarantine. A record may be in it several times: once per side, upstream and row that was refused."""

    def __init__(self, attempt: str) -> None:
        self._attempt = attempt
        self._rows: list[dict[str, Any]] = []
        self.keys: set[str] = set()

    def __len__(self) -> int:
        return len(self._rows)

    def frame(self) -> pl.DataFrame:
        """What is to be sealed, as `QUARANTINE_SCHEMA` says."""
        return pl.DataFrame(self._rows, schema=QUARANTINE_SCHEMA)

    def failures(self, contract: Contract[Any], side: str, samples: int) -> list[RuleFailure]:
        """The rules broken on one side until now, by rule, with up to `samples` records each, masked."""
        found: dict[str, list[dict[str, Any]]] = {}
        for row in self._rows:
            if row["side"] == side:
                for rule in row["rules"]:
                    found.setdefault(rule, []).append(row)
        return [_failure(contract, rule, rows, samples) for rule, rows in found.items()]

    def add_rows(self, side: str, upstream: str | None, contract: Contract[Any], broken: pl.DataFrame) -> None:
        """Rows that `Contract.sift` found broken."""
        for row, rules in broken_records(broken):
            values = _json(row)
            self._add(row.get(str(contract.key)), side, upstream, rules, values, _masked(json.loads(values), contract))

    def add_refused(self, side: str, contract: Contract[Any], refused: Iterable[Refused]) -> None:
        """Records that could not even be rows."""
        for one in refused:
            told = json.loads(one.values)
            named = by_field(contract.fields, told) if isinstance(told, dict) else told
            self._add(one.key, side, None, one.rules, one.values, _masked(named, contract))

    def add_keys(self, side: str, upstream: str | None, contract: Contract[Any], keys: Iterable[Any], rule: str) -> None:
        """Records of which there is nothing but the key: missing on one side."""
        for key in keys:
            record = {str(contract.key): key}
            self._add(key, side, upstream, [rule], _json(record), _masked(record, contract))

    def add_unmade(self, contract: Contract[Any], key: Any, error: ValidationError) -> None:
        """A record whose output the agent's own code could not make: what pydantic refused, by field."""
        refused = {e["loc"]: e["input"] for e in error.errors(include_url=False)}
        values = text_of({_path(where): value for where, value in refused.items()})
        self._add(key, OUTPUT_SIDE, None, contract.rules_broken(error), values, _masked_parts(json.loads(values), refused, contract))

    def add_failed(self, key: Any, rule: str, inputs: Sequence[Input], row: Mapping[str, Mapping[str, Any] | None]) -> None:
        """A record whose call finally failed: its inputs, as they were read; by upstream, where there are several."""
        if len(inputs) == 1:
            (one,) = inputs
            record: dict[str, Any] = dict(row[one.upstream] or {})
            self._add(key, OUTPUT_SIDE, None, [rule], _json(record), _masked(json.loads(_json(record)), one.contract))
            return
        personal = any(i.contract.key in i.contract.personal for i in inputs)
        name = str(inputs[0].contract.key)
        told = json.loads(_json(row))
        masked = {i.upstream: json.loads(_masked(told[i.upstream], i.contract)) for i in inputs if told[i.upstream] is not None}
        self._add(key, OUTPUT_SIDE, None, [rule], _json({name: key, **row}), _json({name: MASK if personal else key, **masked}))

    def keep(self, quarantined: pl.DataFrame) -> None:
        """What was set aside before, as it was: judged again from its JSON it might be another record."""
        self._rows += quarantined.select(QUARANTINE_SCHEMA.names()).to_dicts()
        self.keys |= set(quarantined["record"].drop_nulls())

    def _add(self, key: Any, side: str, upstream: str | None, rules: Iterable[str], values: str, masked: str) -> None:
        record = None if key is None else _text(key)
        if record is not None:
            self.keys.add(record)
        self._rows.append(
            {
                "record": record,
                "side": side,
                "upstream": upstream,
                "rules": list(rules),
                "values": values,
                "masked": masked,
                "digest": hashlib.sha256(values.encode()).hexdigest(),
                "attempt": self._attempt,
            }
        )


def _failure(contract: Contract[Any], rule: str, rows: Sequence[Mapping[str, Any]], samples: int) -> RuleFailure:
    name = field_of(rule)
    field = name if name in contract.schema else None
    shown = [json.loads(row["masked"]) for row in rows[:samples]]
    told = [{k: v for k, v in one.items() if k.partition(".")[0] in (contract.key, field)} for one in shown]
    keyed = contract.key is not None and contract.key not in contract.personal
    for one, row in zip(told, rows, strict=False):
        if keyed and row["record"] is not None and one.get(str(contract.key)) != MASK:
            one[str(contract.key)] = row["record"]
    return RuleFailure(rule, field, len(rows), tuple(told))


def _text(key: Any) -> str | None:
    """The key as a column of text can hold it; None where it has no text. What came in as a key may be anything."""
    try:
        return str(key).encode("utf-8", "backslashreplace").decode()
    except Exception:
        return None


def _json(values: Any) -> str:
    return to_json(values, inf_nan_mode="strings", bytes_mode="base64", fallback=str).decode()


def _path(where: Sequence[int | str]) -> str:
    return ".".join(map(str, where)) or "record"


@lru_cache
def _described(contract: Contract[Any]) -> dict[str, Mapping[str, Any]]:
    return by_name(contract.describe())


def _masked(record: Any, contract: Contract[Any]) -> str:
    """A whole record as it may be shown. What came in under a name that the contract does not have may be anything: it is masked."""
    if not isinstance(record, dict):
        return _json({"record": MASK})
    fields = _described(contract)
    return _json({name: hide(fields.get(name), value) for name, value in record.items()})


def _masked_parts(values: Any, refused: Iterable[Sequence[int | str]], contract: Contract[Any]) -> str:
    """What was refused in a record, by where it stands, as it may be shown."""
    if not isinstance(values, dict):
        return _json({"record": MASK})
    return _json(dict(_masked_part(values[_path(where)], where, contract) for where in refused))


def _masked_part(value: Any, where: Sequence[int | str], contract: Contract[Any]) -> tuple[str, Any]:
    if not where:
        return "record", MASK
    top = str(where[0])
    if len(where) == 1:
        ((name, held),) = by_field(contract.fields, {top: value}).items()
        return name, hide(_described(contract).get(name), held)
    # Further down only what has no parts of its own, and where nothing is personal: not even the way there, which has the keys of dicts.
    meant = [_described(contract)[field.name] for field in contract.fields if top in (field.name, field.alias)]
    hidden = not meant or any(map(has_personal, meant)) or isinstance(value, (dict, list))
    return (top, MASK) if hidden else (_path(where), value)
