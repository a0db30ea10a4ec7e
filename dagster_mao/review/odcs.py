"""A sealed contract as a data contract of the Open Data Contract Standard (Bitol, v3.2), by the standard's own models.

The package is an extra, `dagster-mao[odcs]`, and is imported when a contract is exported.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from dagster_mao.contract import MASK, spell
from dagster_mao.errors import MaoError
from dagster_mao.state.seal import Seal

API_VERSION = "v3.2.0"


def odcs(seal: Seal) -> str:
    """The contract of a sealed version as YAML of the standard. Raises `MaoError` when there is none, or the extra is not installed."""
    try:
        models = importlib.import_module("open_data_contract_standard.model")
    except ImportError as error:
        raise MaoError("The Open Data Contract Standard's package is not here", fix="pip install 'dagster-mao[odcs]'") from error
    if not seal.path:
        raise MaoError(f"{seal.reference} is a {seal.kind} and has no contract", workflow=seal.workflow_id)
    exported: str = models.OpenDataContractStandard.model_validate(_contract(seal, json.loads(seal.contract_schema))).to_yaml()
    return exported


def _contract(seal: Seal, described: Mapping[str, Any]) -> dict[str, Any]:
    purpose = described.get("description")
    return {
        "apiVersion": API_VERSION,
        "kind": "DataContract",
        "id": f"{seal.pipeline}.{seal.agent}",
        "name": seal.contract,
        "version": seal.contract_version,
        "status": "active",
        "dataProduct": seal.pipeline,
        **({"description": {"purpose": purpose}} if purpose else {}),
        "schema": [
            {
                "name": seal.agent,
                "physicalName": seal.table,
                "physicalType": "table",
                "logicalType": "object",
                **({"description": purpose} if purpose else {}),
                "properties": [_field(f, key=f["name"] == seal.key) for f in described["fields"]],
                **({"quality": [_rule("the validators of the model pass")]} if described.get("modes") else {}),
            }
        ],
        "customProperties": _custom(contractHash=seal.contract_hash, stateVersion=seal.reference, sealDigest=seal.seal_digest),
    }


def _field(field: Mapping[str, Any], *, key: bool = False) -> dict[str, Any]:
    told = {"name": field["name"], **_node(field)}
    if key:
        told |= {"primaryKey": True, "primaryKeyPosition": 1, "unique": True}
    if field.get("personal"):
        told |= {"classification": "confidential", "tags": ["personal"]}
    if field.get("description"):
        told["description"] = field["description"]
    if "default" in field and field["default"] != MASK:
        # As JSON text: null is a default too, and the standard's models leave out what is null.
        told["customProperties"] = _custom(default=json.dumps(field["default"]))
    return told


def _node(node: Mapping[str, Any]) -> dict[str, Any]:
    logical = _logical(node)
    options = dict(_options(node, logical))
    rules = [_rule(text) for text in _rules(node, options)]
    members = node["constraints"].get("one_of")
    return {
        **({"logicalType": logical} if logical else {}),
        "physicalType": _physical(node),
        "required": not node["nullable"],
        **({"logicalTypeOptions": options} if options else {}),
        **({"enum": [{"value": value} for value in members]} if members else {}),
        **({"quality": rules} if rules else {}),
        **({"properties": [_field(f) for f in node["fields"]]} if "fields" in node else {}),
        **({"items": _node(node["items"])} if "items" in node else {}),
    }


_LOGICAL = {
    "Int64": "integer",
    "Float64": "number",
    "Boolean": "boolean",
    "String": "string",
    "Binary": "string",
    "Date": "date",
    "Time": "time",
    "Datetime": "timestamp",
    "Decimal": "number",
    "Struct": "object",
    "List": "array",
}
_DELTA = {
    "Int64": "long",
    "Float64": "double",
    "Boolean": "boolean",
    "String": "string",
    "Binary": "binary",
    "Date": "date",
    "Datetime(us, UTC)": "timestamp",
    "Datetime(us)": "timestamp_ntz",
}


def _logical(node: Mapping[str, Any]) -> str | None:
    return _LOGICAL.get(node["dtype"].partition("(")[0])


def _physical(node: Mapping[str, Any]) -> str:
    """The type of the Delta column."""
    dtype: str = node["dtype"]
    if dtype.startswith("Decimal"):
        return dtype.lower().replace(" ", "")
    return {"Struct": "struct", "List": "array"}.get(dtype.partition("(")[0]) or _DELTA.get(dtype, dtype)


_BOUNDS = {"ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum"}
_STRING = {"min_length": "minLength", "max_length": "maxLength", "pattern": "pattern"}
_FORMATS = {"uuid": "uuid", "url": "uri", "bytes": "binary"}
_NAMES: dict[str | None, dict[str, str]] = {
    "string": _STRING,
    "array": {"min_length": "minItems", "max_length": "maxItems"},
    "integer": {**_BOUNDS, "multiple_of": "multipleOf"},
    "number": {**_BOUNDS, "multiple_of": "multipleOf"},
    "date": _BOUNDS,
    "time": _BOUNDS,
    "timestamp": _BOUNDS,
}


def _options(node: Mapping[str, Any], logical: str | None) -> Iterator[tuple[str, Any]]:
    for name, option in _NAMES.get(logical, {}).items():
        value = node["constraints"].get(name)
        value = _number(value) if logical in {"integer", "number"} else value
        if value is not None:
            yield option, value
    if logical == "string" and node["type"] in _FORMATS:
        yield "format", _FORMATS[node["type"]]
    if logical == "integer":
        yield "format", "i64"
    if node["type"] == "set":
        yield "uniqueItems", True
    if logical == "timestamp":
        yield "timezone", node["dtype"].endswith("UTC)")


def _number(value: Any) -> int | float | None:
    """A bound as JSON has numbers: decimals are described as text, and infinity bounds nothing."""
    number = float(value) if isinstance(value, str) else value
    if not isinstance(number, (int, float)) or not math.isfinite(number):
        return None
    return int(number) if float(number).is_integer() and abs(number) < 2**53 else number


def _rules(node: Mapping[str, Any], options: Mapping[str, Any]) -> Iterator[str]:
    """What the standard has no word for, in ours."""
    said = _NAMES.get(_logical(node), {})
    for name, value in node["constraints"].items():
        if name != "one_of" and said.get(name) not in options:
            yield spell(name, value)
    if node.get("modes"):
        yield "the validators of the field pass"


def _rule(text: str) -> dict[str, str]:
    return {"type": "text", "description": text}


def _custom(**values: Any) -> list[dict[str, Any]]:
    return [{"property": name, "value": value} for name, value in values.items()]
