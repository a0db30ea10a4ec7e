"""Whether what a producer promises can keep what a consumer demands.

Both are read from `Contract.describe()`, so that a contract recorded with a snapshot can be compared as well as one at hand. Values are
compared as sets: the producer's bounds, lengths and members against the consumer's. Two sets that do not meet are a contradiction, even
where null, or an empty list, would be in both: nobody wires agents together for that.
"""

from __future__ import annotations

import datetime as dt
import decimal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from dagster_mao.contract._types import BOUNDS, interval, spell, spelled

Kind = Literal["contradiction", "stricter", "unproven"]


@dataclass(frozen=True)
class Difference:
    """One point where the consumer demands what the producer does not promise.

    `field` is a path ("income.amount", "sources[]"); `kind` is "contradiction" (no value of the producer's passes), "stricter" (some do not
    pass: enforced at the boundary) or "unproven" (patterns, validators: known only with the data); `detail` says it in words.
    """

    field: str
    kind: Kind
    detail: str


def compare(producer: dict[str, Any], consumer: dict[str, Any]) -> list[Difference]:
    """What `consumer` demands beyond `producer`, both as `Contract.describe()` gives them. Empty: every promised batch passes."""
    if _identical(producer, consumer):
        return []
    differences = list(_compare_fields(producer["fields"], consumer["fields"], ""))
    if consumer["key"] is not None and consumer["key"] != producer["key"]:
        detail = f"must be unique: it is the consumer's key, and the producer's is {producer['key'] or 'none'}"
        differences.append(Difference(consumer["key"], "stricter", detail))
    if consumer["validators"] and not any(d.kind == "unproven" for d in differences) and not _field_validators(consumer):
        differences.append(Difference(consumer["name"], "unproven", "the model has validators over the whole record"))
    return differences


def _identical(producer: dict[str, Any], consumer: dict[str, Any]) -> bool:
    return {**producer, "fields": _bare(producer["fields"])} == {**consumer, "fields": _bare(consumer["fields"])}


def _bare(described: Any) -> Any:
    if isinstance(described, dict):
        return {k: _bare(v) for k, v in described.items() if k not in {"description", "personal"}}
    return [_bare(v) for v in described] if isinstance(described, list) else described


def _field_validators(consumer: dict[str, Any]) -> bool:
    return any(_judged(f) for f in consumer["fields"])


def _judged(node: dict[str, Any]) -> bool:
    return node["validators"] or any(_judged(f) for f in node.get("fields", ())) or ("items" in node and _judged(node["items"]))


def _compare_fields(producer: list[dict[str, Any]], consumer: list[dict[str, Any]], path: str) -> Iterator[Difference]:
    promised = {f["name"]: f for f in producer}
    for wanted in consumer:
        where = path + wanted["name"]
        if wanted["name"] not in promised:
            yield Difference(where, "contradiction", f"missing: the producer has {', '.join(promised)}")
        else:
            yield from _compare(promised[wanted["name"]], wanted, where)


def _compare(promised: dict[str, Any], wanted: dict[str, Any], where: str) -> Iterator[Difference]:
    if promised["dtype"] != wanted["dtype"]:
        yield from _other_type(promised, wanted, where)
        return
    if promised["nullable"] and not wanted["nullable"]:
        yield Difference(where, "stricter", "may be null for the producer, not for the consumer")
    if not _same_demands(promised, wanted):
        yield from _compare_values(promised, wanted, where)
    if "fields" in wanted:
        yield from _compare_fields(promised.get("fields", []), wanted["fields"], where + ".")
    if "items" in wanted and "items" in promised:
        yield from _compare(promised["items"], wanted["items"], where + "[]")


def _other_type(promised: dict[str, Any], wanted: dict[str, Any], where: str) -> Iterator[Difference]:
    """The innermost place where the types part, so that the message is about one field and not about two long structs."""
    inner: list[Difference] = []
    if "fields" in promised and "fields" in wanted:
        inner = [d for d in _compare_fields(promised["fields"], wanted["fields"], where + ".") if d.kind == "contradiction"]
    elif "items" in promised and "items" in wanted:
        inner = [d for d in _compare(promised["items"], wanted["items"], where + "[]") if d.kind == "contradiction"]
    detail = f"is {promised['dtype']} for the producer, {wanted['dtype']} for the consumer"
    yield from inner or [Difference(where, "contradiction", detail)]


def _same_demands(promised: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return not wanted["validators"] and promised["type"] == wanted["type"] and promised["constraints"] == wanted["constraints"]


def _compare_values(promised: dict[str, Any], wanted: dict[str, Any], where: str) -> Iterator[Difference]:
    ours, theirs = _readable(promised), _readable(wanted)
    members = ours.get("one_of")
    for check in _CHECKS:
        if (difference := check(ours, theirs, members, wanted["type"])) is not None:
            yield Difference(where, *difference)
    if wanted["validators"] and not (promised["type"] == wanted["type"] and ours == theirs and _OPAQUE & theirs.keys()):
        yield Difference(where, "unproven", "the consumer validates it with pydantic" + (f" ({spelled(theirs)})" if theirs else ""))
    elif wanted["type"] != promised["type"] and "one_of" not in theirs and wanted["type"] not in _PLAIN:
        yield Difference(where, "stricter", f"must be a {wanted['type']}, which the producer's {promised['type']} need not be")


# Constraints that pydantic judges, but whose words say all there is to them: equal words, equal demands.
_OPAQUE = {"now_op", "multiple_of", "strip_whitespace", "to_lower", "to_upper", "max_digits", "version", "pattern"}
_PLAIN = {"str", "int", "float", "bool", "bytes", "date", "datetime", "decimal", "model", "list"}

Found = tuple[Kind, str]
Check = Callable[[dict[str, Any], dict[str, Any], "list[Any] | None", str], "Found | None"]


def _check_bounds(ours: dict[str, Any], theirs: dict[str, Any], members: list[Any] | None, kind: str) -> Found | None:
    if not any(b in theirs for b in BOUNDS):
        return None
    whole = kind == "int"
    lower, below, upper, above = interval(theirs, whole=whole)
    if members is not None:
        return _of_members(members, lambda v: _inside(v, lower, below, upper, above), spelled(_only(theirs, BOUNDS)))
    our_lower, our_below, our_upper, our_above = interval(ours, whole=whole)
    words = f"{spelled(_only(theirs, BOUNDS))}; the producer promises {spelled(_only(ours, BOUNDS)) or 'no bound'}"
    if _apart(our_upper, our_above, lower, below) or _apart(upper, above, our_lower, our_below):
        return "contradiction", words
    wider_below = lower is not None and (our_lower is None or our_lower < lower or (our_lower == lower and below and not our_below))
    wider_above = upper is not None and (our_upper is None or our_upper > upper or (our_upper == upper and above and not our_above))
    # A bound refuses NaN whatever its value, so a producer without any bound may send what this one refuses.
    return ("stricter", words) if wider_below or wider_above else None


def _apart(upper: Any, above: bool, lower: Any, below: bool) -> bool:
    return upper is not None and lower is not None and (upper < lower or (upper == lower and (above or below)))


def _inside(value: Any, lower: Any, below: bool, upper: Any, above: bool) -> bool:
    low = lower is None or value > lower or (value == lower and not below)
    return low and (upper is None or value < upper or (value == upper and not above))


def _of_members(members: list[Any], passes: Callable[[Any], bool], words: str) -> Found | None:
    kept = [m for m in members if passes(m)]
    if len(kept) == len(members):
        return None
    refused = ", ".join(repr(m) for m in members if m not in kept)
    return ("stricter", f"{words}: refuses {refused}") if kept else ("contradiction", f"{words}: refuses all of {refused}")


def _check_lengths(ours: dict[str, Any], theirs: dict[str, Any], members: list[Any] | None, kind: str) -> Found | None:
    low, high = theirs.get("min_length", 0), theirs.get("max_length", float("inf"))
    if not _only(theirs, _LENGTHS):
        return None
    words = spelled(_only(theirs, _LENGTHS))
    if members is not None:
        return _of_members(members, lambda v: low <= len(v) <= high, words)
    our_low, our_high = ours.get("min_length", 0), ours.get("max_length", float("inf"))
    words += f"; the producer promises {spelled(_only(ours, _LENGTHS)) or 'no length'}"
    if our_high < low or our_low > high:
        return "contradiction", words
    return ("stricter", words) if our_low < low or our_high > high else None


def _check_members(ours: dict[str, Any], theirs: dict[str, Any], members: list[Any] | None, kind: str) -> Found | None:
    if "one_of" not in theirs:
        return None
    words = spell("one_of", theirs["one_of"])
    if members is not None:
        return _of_members(members, lambda v: v in theirs["one_of"], words)
    if any(b in ours for b in BOUNDS):
        bounds = interval(ours, whole=all(isinstance(v, int) for v in theirs["one_of"]))
        possible = [v for v in theirs["one_of"] if _inside(v, *bounds)]
    else:
        possible = [
            v for v in theirs["one_of"] if not isinstance(v, str) or ours.get("min_length", 0) <= len(v) <= ours.get("max_length", len(v))
        ]
    if not possible:
        return "contradiction", f"{words}; the producer promises {spelled(ours)}"
    # bool has two values, and a consumer may name both.
    return None if {True, False} == set(theirs["one_of"]) and isinstance(theirs["one_of"][0], bool) else ("stricter", words)


def _check_multiple(ours: dict[str, Any], theirs: dict[str, Any], members: list[Any] | None, kind: str) -> Found | None:
    step = theirs.get("multiple_of")
    if step is None or kind != "int":
        return None
    if members is not None:
        return _of_members(members, lambda v: v % step == 0, spell("multiple_of", step))
    return None if ours.get("multiple_of", 1) % step == 0 else ("stricter", spell("multiple_of", step))


def _check_finite(ours: dict[str, Any], theirs: dict[str, Any], members: list[Any] | None, kind: str) -> Found | None:
    bounded = bool({"gt", "ge"} & ours.keys()) and bool({"lt", "le"} & ours.keys())
    return ("stricter", "must be finite") if theirs.get("finite") and not (ours.get("finite") or bounded) else None


def _check_digits(ours: dict[str, Any], theirs: dict[str, Any], members: list[Any] | None, kind: str) -> Found | None:
    digits = theirs.get("max_digits")
    return ("stricter", spell("max_digits", digits)) if digits is not None and ours.get("max_digits", 39) > digits else None


def _check_pattern(ours: dict[str, Any], theirs: dict[str, Any], members: list[Any] | None, kind: str) -> Found | None:
    pattern = theirs.get("pattern")
    return ("unproven", spell("pattern", pattern)) if pattern is not None and pattern != ours.get("pattern") else None


_LENGTHS = ("min_length", "max_length")
_CHECKS: tuple[Check, ...] = (_check_bounds, _check_lengths, _check_members, _check_multiple, _check_finite, _check_digits, _check_pattern)


def _only(constraints: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: constraints[name] for name in names if name in constraints}


def _readable(node: dict[str, Any]) -> dict[str, Any]:
    """The constraints with their bounds as values again: JSON has neither dates nor decimals nor infinities."""
    parse = _PARSERS.get(node["type"])
    if parse is None:
        return dict(node["constraints"])
    return {name: parse(value) if name in BOUNDS and isinstance(value, str) else value for name, value in node["constraints"].items()}


_PARSERS: dict[str, Callable[[str], Any]] = {
    "float": float,
    "date": dt.date.fromisoformat,
    "datetime": dt.datetime.fromisoformat,
    "decimal": decimal.Decimal,
}
