"""The records that a step sets aside because its agent declares a quarantine, as they are found."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import polars as pl
from pydantic import ValidationError
from pydantic_core import to_json

from dagster_mao.contract import Contract, Refused, RuleFailure, hide
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
        rules = broken["_rules"].to_list()
        for row, its_rules in zip(broken.select(contract.schema.names()).iter_rows(named=True), rules, strict=True):
            self._add(row.get(str(contract.key)), side, upstream, its_rules, _json(row), contract)

    def add_refused(self, side: str, contract: Contract[Any], refused: Iterable[Refused]) -> None:
        """Records that could not even be rows."""
        for one in refused:
            self._add(one.key, side, None, one.rules, one.values, contract)

    def add_keys(self, side: str, upstream: str | None, contract: Contract[Any], keys: Iterable[Any], rule: str) -> None:
        """Records of which there is nothing but the key: missing on one side."""
        for key in keys:
            self._add(key, side, upstream, [rule], _json({str(contract.key): key}), contract)

    def add_unmade(self, contract: Contract[Any], key: Any, error: ValidationError) -> None:
        """A record whose output the agent's own code could not make: what pydantic refused, by field."""
        refused = {".".join(map(str, e["loc"])) or "record": e["input"] for e in error.errors(include_url=False)}
        self._add(key, OUTPUT_SIDE, None, contract.rules_broken(error), _json(refused), contract)

    def keep(self, quarantined: pl.DataFrame) -> None:
        """What was set aside before, as it was: judged again from its JSON it might be another record."""
        self._rows += quarantined.select(QUARANTINE_SCHEMA.names()).to_dicts()
        self.keys |= set(quarantined["record"].drop_nulls())

    def _add(self, key: Any, side: str, upstream: str | None, rules: Iterable[str], values: str, contract: Contract[Any]) -> None:
        record = None if key is None else str(key)
        if record is not None:
            self.keys.add(record)
        self._rows.append(
            {
                "record": record,
                "side": side,
                "upstream": upstream,
                "rules": list(rules),
                "values": values,
                "masked": _masked(values, contract),
                "digest": hashlib.sha256(values.encode()).hexdigest(),
                "attempt": self._attempt,
            }
        )


def _failure(contract: Contract[Any], rule: str, rows: Sequence[Mapping[str, Any]], samples: int) -> RuleFailure:
    name = re.split(r"[:.\[]", rule)[0]
    field = name if name in contract.schema else None
    shown = [json.loads(row["masked"]) for row in rows[:samples]]
    told = [{k: v for k, v in one.items() if k.partition(".")[0] in (contract.key, field)} for one in shown]
    keyed = contract.key is not None and contract.key not in contract.personal
    for one, row in zip(told, rows, strict=False):
        if keyed and row["record"] is not None:
            one[str(contract.key)] = row["record"]
    return RuleFailure(rule, field, len(rows), tuple(told))


def _json(row: Mapping[str, Any]) -> str:
    return to_json(row, inf_nan_mode="strings", bytes_mode="base64", fallback=str).decode()


def _masked(values: str, contract: Contract[Any]) -> str:
    told = json.loads(values)
    if not isinstance(told, dict):
        return _json({"record": hide(None, told)})
    fields = {field["name"]: field for field in contract.describe()["fields"]}
    # What came in under a name that the contract does not have may be anything: it is masked.
    return _json({name: hide(fields.get(name.partition(".")[0]), value) for name, value in told.items()})
