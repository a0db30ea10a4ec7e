"""Whether what a producer promises can keep what a consumer demands.

Both are read from `Contract.describe()`, so that a contract recorded with a snapshot can be compared as well as one at hand. Values are
compared as sets: the producer's bounds, lengths and members against the consumer's. Two sets that do not meet are a contradiction, even
where null, or an empty list, would be in both: nobody wires agents together for that.
"""

from __future__ import annotations

import datetime as dt
import decimal
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dagster_mao.contract._masking import MASK
from dagster_mao.contract._types import BOUNDS, interval, spell, spelled

Kind = Literal["contradiction", "stricter", "unproven"]
Found = tuple[Kind, str]


@dataclass(frozen=True)
class Difference:
    """One point where the consumer demands what the producer does not promise.

    `field` is a path ("income.amount", "sources[]"); `kind` is "contradiction" (no value of the producer's passes), "stricter" (some do not
    pass: enforced at the boundary) or "unproven" (patterns, validators: known only with the data); `detail` says it in words.
    """

    field: str
    kind: Kind
    detail: str


def compare(producer: Mapping[str, Any], consumer: Mapping[str, Any]) -> list[Difference]:
    """What `consumer` demands beyond `producer`, both as `Contract.describe()` gives them. Empty: every promised batch passes.

    A field that the producer lacks is a contradiction even if the consumer has a default for it: of two that are wired together, a name
    that one of them misspelled must not become a column of defaults.
    """
    return [] if _identical(producer, consumer) else [*differences(producer, consumer, fill=False), *key_differences(producer, consumer)]


def readable(recorded: Mapping[str, Any], reader: Mapping[str, Any]) -> list[Difference]:
    """As `compare`, of rows recorded under an earlier contract: fields with a default are filled in where they are missing."""
    return [] if _identical(recorded, reader) else [*differences(recorded, reader, fill=True), *key_differences(recorded, reader)]


def differences(producer: Mapping[str, Any], consumer: Mapping[str, Any], *, fill: bool) -> list[Difference]:
    """All but the key."""
    loose = rewrites(producer) or rewrites(consumer)
    found = list(_compare_fields(producer["fields"], consumer["fields"], "", _How(fill, values=not loose)))
    if consumer.get("modes") or rewrites(producer) or (consumer["validators"] and not _told(found) and not _field_validators(consumer)):
        whose = "consumer" if consumer["validators"] else "producer"
        found.append(Difference(consumer["name"], "unproven", f"the {whose} has validators over the whole record"))
    return found


def key_differences(producer: Mapping[str, Any], consumer: Mapping[str, Any]) -> list[Difference]:
    """The consumer's key is unique, which the producer promises of its own only."""
    if consumer["key"] in (None, producer["key"]):
        return []
    detail = f"must be unique: it is the consumer's key, and the producer's is {producer['key'] or 'none'}"
    return [Difference(consumer["key"], "stricter", detail)]


@dataclass(frozen=True)
class _How:
    """How to compare: whether defaults stand in for what is missing, and whether the values are compared or the types only."""

    fill: bool
    values: bool


def _identical(producer: Mapping[str, Any], consumer: Mapping[str, Any]) -> bool:
    return bool(_bare({**producer}) == _bare({**consumer}))


def _bare(described: Any) -> Any:
    if isinstance(described, dict):
        return {k: _bare(v) for k, v in described.items() if k not in {"description", "personal", "default"}}
    return [_bare(v) for v in described] if isinstance(described, list) else described


def _told(found: list[Difference]) -> bool:
    return any(d.kind == "unproven" for d in found)


def _field_validators(consumer: Mapping[str, Any]) -> bool:
    return any(_judged(f) for f in consumer["fields"])


def _judged(node: Mapping[str, Any]) -> bool:
    return node["validators"] or any(_judged(f) for f in node.get("fields", ())) or ("items" in node and _judged(node["items"]))


def rewrites(node: Mapping[str, Any]) -> bool:
    """Whether Python code may make another value of the column's before it is judged: then the constraints hold of that other value."""
    return bool(_REWRITING.intersection(node.get("modes", ())))


def _compare_fields(
    producer: Sequence[Mapping[str, Any]], consumer: Sequence[Mapping[str, Any]], path: str, how: _How
) -> Iterator[Difference]:
    promised = {f["name"]: f for f in producer}
    for wanted in consumer:
        where = path + wanted["name"]
        if wanted["name"] in promised:
            yield from _compare(promised[wanted["name"]], wanted, where, how)
        elif not how.fill:
            yield Difference(where, "contradiction", f"missing: the producer has {', '.join(promised)}")
        elif "default" not in wanted:
            yield Difference(where, "contradiction", "missing, and it has no default")
        else:
            yield from _default_refused(wanted, where)


def _compare(promised: Mapping[str, Any], wanted: Mapping[str, Any], where: str, how: _How) -> Iterator[Difference]:
    structs, lists = ("fields" in promised and "fields" in wanted), ("items" in promised and "items" in wanted)
    if promised["dtype"] != wanted["dtype"] and not structs and not lists:
        detail = f"is {promised['dtype']} for the producer, {wanted['dtype']} for the consumer"
        yield Difference(where, "contradiction", detail)
        return
    if how.values and (rewrites(promised) or rewrites(wanted)):
        how = _How(how.fill, values=False)
        if _demands(wanted):
            whose = "consumer" if wanted["validators"] else "producer"
            yield Difference(where, "unproven", f"a validator of the {whose} may change the value before it is judged")
    elif how.values:
        if promised["nullable"] and not wanted["nullable"]:
            yield Difference(where, "stricter", "may be null for the producer, not for the consumer")
        if not _same_demands(promised, wanted):
            yield from (Difference(where, *found) for found in _compare_values(promised, wanted))
    if structs:
        yield from _compare_fields(promised["fields"], wanted["fields"], where + ".", how)
    if lists:
        yield from _compare(promised["items"], wanted["items"], where + "[]", how)


def _demands(wanted: Mapping[str, Any]) -> bool:
    return bool(wanted["validators"] or wanted["constraints"] or not wanted["nullable"] or wanted["type"] not in _PLAIN)


def _same_demands(promised: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    same = all(promised[name] == wanted[name] for name in ("type", "constraints", "validators")) and not unknown(promised, wanted)
    return same and _spoken(wanted) and _spoken(promised)


def _spoken(node: Mapping[str, Any]) -> bool:
    """Whether type and constraints say all there is to it, so that equal words are equal demands."""
    if node["constraints"].get("now_op") == "future":
        return False  # what was in the future then may not be now
    return not node["validators"] or (not node.get("modes") and (bool(_OPAQUE & node["constraints"].keys()) or node["type"] in _TOLD))


def unknown(promised: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """What one of the descriptions says otherwise, in words that are not known here: another release's."""
    names = sorted((promised.keys() | wanted.keys()) - _KNOWN)
    return [name for name in names if _bare(promised.get(name)) != _bare(wanted.get(name))]


def _compare_values(promised: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[Found]:
    ours, theirs, kind = _readable(promised), _readable(wanted), wanted["type"]
    known = {promised["type"], kind} <= _PLAIN | _SPECIAL and not (ours and _unclear(promised))
    if not known or unknown(promised, wanted) or _TRIMS & (ours.keys() | theirs.keys()):
        if theirs or wanted["validators"] or kind != promised["type"] or unknown(promised, wanted):
            yield "unproven", f"{_words(wanted)}; the producer promises {_words(promised)}"
        return
    try:
        found = [f for check in _CHECKS if (f := check(ours, theirs, ours.get("one_of"), kind)) is not None]
    except TypeError:  # an instant and a wall clock's reading
        found = [("unproven", f"{spelled(theirs)}; the producer promises {spelled(ours)}")]
    yield from _of_few(ours, theirs, found) if promised["type"] == "int" and kind in {"int", "enum"} else found
    if wanted["validators"] and not (_spoken(wanted) and all(_same(name, promised, wanted) for name in _OPAQUE & theirs.keys())):
        yield "unproven", "the consumer validates it with pydantic" + (f" ({spelled(theirs)})" if theirs else "")
    elif kind != promised["type"] and "one_of" not in theirs and kind not in _PLAIN:
        yield "stricter", f"must be a {kind}, which the producer's {promised['type']} need not be"


def _unclear(node: Mapping[str, Any]) -> bool:
    """Judged by pydantic for a reason that is not told, so that its constraints may be about something else than the column's value."""
    return bool(node["validators"] and not node.get("modes") and not _spoken(node))


def _words(node: Mapping[str, Any]) -> str:
    return ", ".join([node["type"], *(spell(name, value) for name, value in _readable(node).items())])


def _same(name: str, promised: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    # A pattern that polars could read on one side only is read by two engines, which differ.
    engines = name != "pattern" or promised["validators"] == wanted["validators"]
    return bool(engines and promised["constraints"].get(name) == wanted["constraints"][name])


FEW = 1_000  # whole numbers that are tried one by one


def _of_few(ours: dict[str, Any], theirs: dict[str, Any], found: list[Found]) -> list[Found]:
    """The same, tried out where the producer promises a short range: there bounds, members and steps can be judged together."""
    lower, _, upper, _ = interval(ours, whole=True)
    if not found or lower is None or upper is None or upper - lower >= FEW:
        return found
    values = [v for v in range(lower, upper + 1) if v % ours.get("multiple_of", 1) == 0]
    bounds, step, members = interval(theirs, whole=True), theirs.get("multiple_of", 1), theirs.get("one_of")
    passing = [v for v in values if _inside(v, *bounds) and v % step == 0 and (members is None or v in members)]
    if len(passing) == len(values):
        return []
    return found if passing else [("contradiction", words) for _, words in found[:1]]


def _default_refused(wanted: Mapping[str, Any], where: str) -> Iterator[Difference]:
    """What its own field has against a default. pydantic does not look at defaults; the check of the filled rows does."""
    kind = _judge_value(wanted["default"], wanted)
    if kind is not None:
        why = "its own field refuses its default" if kind == "contradiction" else "whether its default passes is known only with the rows"
        yield Difference(where, kind, f"missing, and {why}")


def _judge_value(value: Any, node: Mapping[str, Any]) -> Kind | None:
    if rewrites(node) or value == MASK:
        return "unproven"
    if value is None:
        return None if node["nullable"] else "contradiction"
    theirs, told = _readable(node), [_parsed(value, node["type"])]
    if node["type"] == "bytes" and theirs:
        return "unproven"  # JSON has its base64
    found = [f[0] for check in _CHECKS if (f := check({}, theirs, told, node["type"])) is not None]
    inner = value if isinstance(value, list) else []
    found += [kind for v in inner if "items" in node and (kind := _judge_value(v, node["items"])) is not None]
    members = [(value.get(f["name"]), f) for f in node.get("fields", ())] if isinstance(value, dict) else []
    found += [kind for v, f in members if (kind := _judge_value(v, f)) is not None]
    if "contradiction" in found:
        return "contradiction"
    return "unproven" if found or node["validators"] or node["type"] not in _PLAIN | _SPECIAL else None


# Constraints that pydantic judges, but whose words say all there is to them: equal words, equal demands.
_OPAQUE = {"now_op", "multiple_of", "strip_whitespace", "to_lower", "to_upper", "max_digits", "version", "pattern"}
_TRIMS = {"strip_whitespace", "to_lower", "to_upper"}
_REWRITING = {"before", "wrap", "plain"}
_SPECIAL = {"enum", "uuid", "url", "set", "dict", "time", "timedelta"}
_TOLD = {"date", "datetime", "decimal", "time", "timedelta"}  # by their constraints, whoever judges them
_JUDGING = {"type", "dtype", "nullable", "constraints", "validators", "modes", "fields", "items"}
_KNOWN = _JUDGING | {"name", "personal", "description", "default"}
_PLAIN = {"str", "int", "float", "bool", "bytes", "date", "datetime", "decimal", "model", "list", "entry"}

Check = Callable[[dict[str, Any], dict[str, Any], "list[Any] | None", str], "Found | None"]


def _check_bounds(ours: dict[str, Any], theirs: dict[str, Any], members: list[Any] | None, kind: str) -> Found | None:
    if not any(b in theirs for b in BOUNDS):
        return None
    whole = kind in {"int", "timedelta"}
    lower, below, upper, above = interval(theirs, whole=whole)
    if members is not None:
        return _of_members(members, lambda v: _inside(v, lower, below, upper, above), spelled(_only(theirs, BOUNDS)))
    our_lower, our_below, our_upper, our_above = interval(ours, whole=whole)
    if whole and (step := ours.get("multiple_of")):
        our_lower = None if our_lower is None else -(-our_lower // step) * step
        our_upper = None if our_upper is None else our_upper // step * step
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
    if not theirs.get("finite"):
        return None
    if members is not None:
        return _of_members(members, lambda v: isinstance(v, str) or math.isfinite(v), "must be finite")
    lower, below, upper, above = interval(ours, whole=False)
    low = lower is not None and (math.isfinite(lower) or (below and lower < 0))
    high = upper is not None and (math.isfinite(upper) or (above and upper > 0))
    return None if ours.get("finite") or (low and high) else ("stricter", "must be finite")


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


def _readable(node: Mapping[str, Any]) -> dict[str, Any]:
    """The constraints with their bounds as values again: JSON has neither dates nor decimals nor infinities."""
    return {name: _parsed(value, node["type"]) if name in BOUNDS else value for name, value in node["constraints"].items()}


def _parsed(value: Any, kind: str) -> Any:
    return _PARSERS[kind](value) if kind in _PARSERS and isinstance(value, str) else value


_PARSERS: dict[str, Callable[[str], Any]] = {
    "float": float,
    "date": dt.date.fromisoformat,
    "datetime": lambda text: dt.datetime.fromisoformat(text.replace("Z", "+00:00")),  # before Python 3.11 it knew no Z
    "decimal": decimal.Decimal,
    "time": dt.time.fromisoformat,
}
