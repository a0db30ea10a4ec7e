"""From Python's values to the column's, and back to what pydantic judges.

polars casts in silence where it builds a column (Decimal("1.005") to 1.00, 2.5 to 2 inside a struct, naive to UTC, True to 1), so each
value's type is looked at here. What does not fit raises TypeError or ValueError; the text never shows the value.
"""

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import itertools
import json
import math
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, RootModel
from pydantic_core import to_jsonable_python

if TYPE_CHECKING:
    from dagster_mao.contract._types import Field, Type

Encode = Callable[[Any], Any]
MICROSECOND = dt.timedelta(microseconds=1)
EXTRAS = "model_extra"  # where what a model takes beyond its fields is kept; pydantic lets no field have this name


class UndecodableError(Exception):
    """A column's value that stands for none of Python's: `rule` says what it should have been, in the words of a rule, `path` where."""

    def __init__(self, rule: str, path: str = "") -> None:
        super().__init__(rule)
        self.rule, self.path = rule, path

    def within(self, step: str) -> UndecodableError:
        joint = "" if not self.path or self.path.startswith("[") else "."
        return UndecodableError(self.rule, f"{step}{joint}{self.path}")


def encoded(value: Any, node: Type) -> Any:
    """The column's value of a Python value; None stays None (that it may be is a rule, not a type). Raises TypeError or ValueError."""
    return None if value is None else node.encode(value)


def decoded(value: Any, decode: Encode | None, step: str = "") -> Any:
    """What pydantic is to judge for a column's value, `step` being where it is. Raises UndecodableError."""
    if value is None or decode is None:
        return value
    try:
        return decode(value)
    except UndecodableError as error:
        raise error.within(step) from None


def fits_64_bits(value: int) -> bool:
    """Whether an Int64 column holds the number."""
    return -(2**63) <= value < 2**63


def has_scale(value: decimal.Decimal, scale: int) -> bool:
    """Whether a column of 38 digits, so many of them after the point, holds the number."""
    if not value.is_finite():
        return False
    digits, exponent = value.as_tuple().digits, int(value.as_tuple().exponent)
    return -exponent <= scale and len(digits) + exponent + scale <= 38


# --- scalars ---------------------------------------------------------------------------------------------------------------------------


def encode_exactly(kind: type) -> Callable[[Any], Any]:
    def encode(value: Any) -> Any:
        if type(value) is kind:
            return value
        if isinstance(value, kind):
            return kind(value) if kind is not str else str.__str__(value)  # of a str that is an Enum, the value
        raise TypeError(f"is {_kind(value)}, not {kind.__name__}")

    encode.plain = frozenset({kind})  # type: ignore[attr-defined]
    return encode


def encode_int(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"is {_kind(value)}, not int")
    if not fits_64_bits(value):
        raise ValueError("does not fit 64 bits")
    return int(value)


encode_int.plain = frozenset({int})  # type: ignore[attr-defined]  # what does not fit, the column refuses


def encode_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"is {_kind(value)}, not float")
    if (number := float(value)) != value and isinstance(value, int):
        raise ValueError("is an int that no float equals")
    return number


encode_float.plain = frozenset({float})  # type: ignore[attr-defined]


def encode_date(value: Any) -> dt.date:
    if not isinstance(value, dt.date) or isinstance(value, dt.datetime):
        raise TypeError(f"is {_kind(value)}, not date")
    return value


def encode_aware(value: Any) -> dt.datetime:
    if not isinstance(value, dt.datetime):
        raise TypeError(f"is {_kind(value)}, not datetime")
    if value.utcoffset() is None:
        raise ValueError("is a datetime without a time zone (annotate NaiveDatetime if that is meant)")
    try:
        return value.astimezone(dt.timezone.utc)
    except OverflowError:
        raise ValueError("is in year 0 or 10000 of UTC, which Python does not have") from None


def encode_naive(value: Any) -> dt.datetime:
    if not isinstance(value, dt.datetime):
        raise TypeError(f"is {_kind(value)}, not datetime")
    if value.tzinfo is not None:
        raise ValueError("is a datetime with a time zone (annotate AwareDatetime if that is meant)")
    return value


def encode_decimal(scale: int) -> Callable[[Any], Any]:
    def encode(value: Any) -> decimal.Decimal:
        if not isinstance(value, decimal.Decimal):
            raise TypeError(f"is {_kind(value)}, not Decimal")
        if not value.is_finite() or not has_scale(value if not value else _normal(value), scale):
            raise ValueError(f"does not fit a decimal of 38 digits, {scale} of them after the point")
        return value

    return encode


def _normal(value: decimal.Decimal) -> decimal.Decimal:
    # Decimal.normalize() would round to the context's precision of 28 digits.
    sign, digits, exponent = value.as_tuple()
    while len(digits) > 1 and digits[-1] == 0:
        digits, exponent = digits[:-1], int(exponent) + 1
    return decimal.Decimal((sign, digits, int(exponent)))


def encode_uuid(value: Any) -> str:
    if not isinstance(value, uuid.UUID):
        raise TypeError(f"is {_kind(value)}, not UUID")
    return str(value)


def encode_member(kind: type) -> Callable[[Any], Any]:
    def encode(value: Any) -> Any:
        plain = value.value if isinstance(value, enum.Enum) else value
        if plain is not None and type(plain) is not kind:
            raise TypeError(f"is {_kind(value)}, not {kind.__name__}")
        return plain

    return encode


def encode_timedelta(value: Any) -> int:
    """Microseconds: Delta has no durations."""
    if not isinstance(value, dt.timedelta):
        raise TypeError(f"is {_kind(value)}, not timedelta")
    microseconds = value // MICROSECOND
    if not fits_64_bits(microseconds):
        raise ValueError("does not fit 64 bits of microseconds")
    return microseconds


def decode_timedelta(value: int) -> dt.timedelta:
    return dt.timedelta(microseconds=value)


def encode_time(value: Any) -> str:
    """ISO text: Delta has no times of day, and a number would lose their offset."""
    if not isinstance(value, dt.time):
        raise TypeError(f"is {_kind(value)}, not time")
    if value.tzinfo is not None and value.utcoffset() is None:
        raise ValueError("is a time in a zone whose offset depends on the day (use a fixed offset)")
    return value.isoformat()


def encode_none(value: Any) -> None:
    raise TypeError(f"is {_kind(value)}, not None")


# --- structs, lists, sets, dicts -------------------------------------------------------------------------------------------------------


def encode_struct(cls: type, fields: Sequence[Field]) -> Encode:
    """A model, a dataclass or a typed dict, as a struct of its fields."""

    def encode(value: Any) -> dict[str, Any]:
        if not isinstance(value, cls):
            raise TypeError(f"is {_kind(value)}, not {cls.__name__}")
        if isinstance(value, dict):
            return {f.name: encoded(value.get(f.name), f.type) for f in fields}
        return {f.name: encoded(getattr(value, f.name, None), f.type) for f in fields}

    return encode


def decode_struct(fields: Sequence[Field]) -> Encode | None:
    """A row, or a struct, as what pydantic judges; None where that is the row itself."""
    changed = {f.name: f.type.decode for f in fields if f.type.decode is not None}
    if not changed:
        return None
    names = [f.name for f in fields if f.name != EXTRAS]

    def decode(value: Mapping[str, Any]) -> dict[str, Any]:
        if EXTRAS not in changed:
            return {name: decoded(v, changed.get(name), name) for name, v in value.items()}
        extras = decoded(value[EXTRAS], changed[EXTRAS], EXTRAS) or {}
        if not extras.keys().isdisjoint(names):
            raise UndecodableError("extra fields that are no fields", EXTRAS)
        return {**{name: decoded(value[name], changed.get(name), name) for name in names}, **extras}

    return decode


def encode_extras(value: Any) -> str | None:
    """What a model holds beyond its fields, as the text of a JSON object; None where there is nothing."""
    if not value:
        return None
    text = json_text(value)
    if not same(json.loads(text), value):
        raise ValueError("holds what JSON would change")
    return text


def decode_extras(value: str) -> dict[str, Any]:
    extras = decode_json(value)
    if not isinstance(extras, dict):
        raise UndecodableError("a JSON object")
    return extras


def encode_list(item: Encode) -> Encode:
    def encode(value: Any) -> list[Any]:
        if not isinstance(value, (list, tuple, collections.deque)):
            raise TypeError(f"is {_kind(value)}, not list")
        return [None if v is None else item(v) for v in value]

    return encode


def decode_list(item: Encode | None) -> Encode | None:
    return None if item is None else lambda value: [decoded(v, item, "[]") for v in value]


def encode_set(item: Encode) -> Encode:
    """Sorted as polars sorts, so that equal sets have equal bytes."""

    def encode(value: Any) -> list[Any]:
        if not isinstance(value, (set, frozenset)):
            raise TypeError(f"is {_kind(value)}, not set")
        return sorted((None if v is None else item(v) for v in value), key=_rank)

    return encode


def decode_set(value: list[Any]) -> list[Any]:
    ranks = [_rank(v) for v in value]
    if any(one >= other for one, other in itertools.pairwise(ranks)):
        raise UndecodableError(SORTED)
    return value


SORTED, KEYS_UNIQUE = "sorted, each once", "keys unique"


def _rank(value: Any) -> tuple[Any, ...]:
    # None first, NaN last, as polars has it.
    if isinstance(value, float):
        return (1, math.isnan(value), 0.0 if math.isnan(value) else value)
    return (0,) if value is None else (1, value)


def encode_dict(key: Encode, value_type: Type) -> Encode:
    """A list of entries, in order."""

    def encode(value: Any) -> list[dict[str, Any]]:
        if not isinstance(value, Mapping):
            raise TypeError(f"is {_kind(value)}, not dict")
        return [{"key": None if k is None else key(k), "value": encoded(v, value_type)} for k, v in value.items()]

    return encode


def decode_dict(key: Encode | None, value: Encode | None) -> Encode:
    def decode(entries: list[dict[str, Any]]) -> dict[Any, Any]:
        if None in entries:
            raise UndecodableError("not null", "[]")
        made = {decoded(e["key"], key, "[].key"): decoded(e["value"], value, "[].value") for e in entries}
        if len(made) < len(entries):
            raise UndecodableError(KEYS_UNIQUE)
        return made

    return decode


def encode_first(encoders: Sequence[Encode]) -> Encode:
    def encode(value: Any) -> Any:
        for each in encoders:
            try:
                return each(value)
            except (TypeError, ValueError):
                continue
        raise TypeError(f"is {_kind(value)}, which is none of the types of its union")

    return encode


# --- JSON text -------------------------------------------------------------------------------------------------------------------------


def json_text(value: Any) -> str:
    """The value as JSON text. Raises TypeError for what JSON has no word for."""
    return json.dumps(_jsonable(value), ensure_ascii=False, separators=(",", ":"))


def decode_json(text: str) -> Any:
    """Raises UndecodableError."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UndecodableError("json") from None


def _jsonable(value: Any) -> Any:
    if value is None or type(value) in (bool, int, float, str):
        return value
    for kinds, convert in _JSONABLE:
        if isinstance(value, kinds):
            return convert(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, type) or callable(value):
        raise TypeError(f"holds a {_kind(value)}, which JSON text cannot")
    return as_text(value)


def _model_jsonable(model: BaseModel) -> Any:
    if isinstance(model, RootModel):
        return _jsonable(model.root)
    return {name: _jsonable(v) for name, v in {**vars(model), **(model.__pydantic_extra__ or {})}.items()}


def _key(value: Any) -> str:
    plain = _jsonable(value)
    return plain if isinstance(plain, str) else json.dumps(plain)


_JSONABLE: tuple[tuple[Any, Encode], ...] = (
    (enum.Enum, lambda v: _jsonable(v.value)),
    (BaseModel, _model_jsonable),
    (Mapping, lambda v: {_key(k): _jsonable(item) for k, item in v.items()}),
    ((list, tuple, collections.deque), lambda v: [_jsonable(item) for item in v]),
    ((set, frozenset), lambda v: sorted((_jsonable(item) for item in v), key=json.dumps)),
    (bytes, lambda v: v.decode()),
    ((dt.date, dt.time), lambda v: v.isoformat()),
    (dt.timedelta, to_jsonable_python),
    (str, str),
    (int, int),
    (float, float),
)


def as_text(value: Any) -> str:
    """The text that a value is made from: a path, an address, a secret. Raises ValueError where it has none."""
    if hasattr(value, "get_secret_value"):
        return as_text(value.get_secret_value())
    try:
        return value.pattern if isinstance(value, re.Pattern) else str(value)
    except Exception as error:  # of its own: what it says may be the value
        raise ValueError(f"has no text ({type(error).__name__})") from None


# --- what comes back is what went in ---------------------------------------------------------------------------------------------------


def faithful(encode: Encode, decode: Encode | None, validate: Encode) -> Encode:
    """`encode`, refusing what pydantic would read back as something else."""

    def checked(value: Any) -> Any:
        column = encode(value)
        try:
            back = validate(decoded(column, decode))
        except Exception as error:
            raise ValueError(f"would not be read back from its column ({type(error).__name__})") from None
        if not same(back, value):
            what = f"as {_kind(back)}" if type(back) is not type(value) else "changed"
            raise ValueError(f"is {_kind(value)} and would be read back {what}")
        return column

    return checked


def or_from_text(encode: Encode, from_text: Encode) -> Encode:
    """`encode`, and, where a validator made of the column's value something else, the text or the secret that it was made of."""

    def either(value: Any) -> Any:
        try:
            return encode(value)
        except (TypeError, ValueError):
            try:
                return from_text(value)
            except (TypeError, ValueError):
                pass
            raise

    if hasattr(encode, "plain"):
        either.plain = encode.plain  # type: ignore[attr-defined]
    return either


def same(one: Any, other: Any) -> bool:
    """Equal, and of the same types all the way down. NaN is NaN."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return one == other or (math.isnan(one) and math.isnan(other))
    if isinstance(one, (list, tuple, collections.deque)):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return same(list(one), list(other)) and same(list(one.values()), list(other.values()))
    if isinstance(one, (set, frozenset)):
        return bool(one == other) and sorted(map(_kind, one)) == sorted(map(_kind, other))
    if isinstance(one, BaseModel):
        return same(vars(one), vars(other)) and same(one.__pydantic_extra__, other.__pydantic_extra__)
    return bool(one == other)


def _kind(value: Any) -> str:
    return type(value).__name__
