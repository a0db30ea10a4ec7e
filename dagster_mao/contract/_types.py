"""From a pydantic model to a tree of types, each with its column type, its constraints, and whether polars can judge it.

The tree is read from the model's core schema, the form that pydantic itself validates by: there `Optional[conint(ge=5)]`, `Interval` and
config limits have become one thing, and a node that is not known here is seen as such. Nothing unknown is ever taken for "any value": it is
judged by pydantic, row by row (`exact` False), or, where no Delta column can hold it, refused when the contract is defined.
"""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import math
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, get_args

import polars as pl
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from dagster_mao.contract._markers import Personal
from dagster_mao.errors import ContractDefinitionError

BOUNDS = ("gt", "ge", "lt", "le")
UTC = pl.Datetime("us", "UTC")
NAIVE = pl.Datetime("us")
DECIMAL_SCALE = 18  # of a Decimal that does not say its decimal_places: twenty digits before the point, eighteen after


@dataclass(frozen=True)
class Field:
    """One field of a model: its column or struct member. `default` is the column's value, PydanticUndefined where the field is required."""

    name: str
    type: Type
    personal: bool = False
    description: str | None = None
    default: Any = PydanticUndefined
    alias: str | None = None


@dataclass(frozen=True)
class Type:
    """What a column holds. `exact`: polars' verdict over `constraints` is pydantic's. `encode` makes the column's value of Python's.

    `modes` says where validators stand (pydantic's words: after, before, wrap). What a "before" or "wrap" makes of a value keeps the
    constraints; the value itself, which is what the column holds, need not.
    """

    name: str
    dtype: pl.DataType
    encode: Callable[[Any], Any]
    constraints: dict[str, Any] = field(default_factory=dict)
    nullable: bool = False
    exact: bool = True
    fields: tuple[Field, ...] = ()
    item: Type | None = None
    modes: tuple[str, ...] = ()

    @property
    def decided(self) -> bool:
        """Whether polars alone decides, all the way down."""
        return self.exact and all(f.type.decided for f in self.fields) and (self.item is None or self.item.decided)


@dataclass(frozen=True)
class _Scope:
    """Where in the schema we are: whose definitions and config hold, and what to call the place in an error."""

    model: str
    path: str
    definitions: Mapping[str, Any]
    config: Mapping[str, Any]
    seen: frozenset[str] = frozenset()

    def at(self, path: str) -> _Scope:
        return replace(self, path=f"{self.path}.{path}" if self.path else path)

    def refuse(self, what: str, fix: str) -> NoReturn:
        raise ContractDefinitionError(f"contract {self.model}: {what}", field=self.path or None, fix=fix)


def fields_of(model: type[BaseModel]) -> tuple[Field, ...]:
    """The fields of a model, in order. Raises ContractDefinitionError naming the field that no Delta column can hold."""
    core: Any = model.__pydantic_core_schema__
    scope = _Scope(model.__name__, "", definitions_of(core), {})
    return _model(core, scope).fields


def definitions_of(core: Mapping[str, Any]) -> dict[str, Any]:
    """The shared parts of a core schema by their reference."""
    return {d["ref"]: d for d in core.get("definitions", ())}


def is_personal(annotation: Any) -> bool:
    """Whether `Personal` stands anywhere in the annotation, inside Optional, list and Annotated too."""
    return annotation is Personal or any(is_personal(arg) for arg in get_args(annotation)) or Personal in _metadata(annotation)


def _metadata(annotation: Any) -> tuple[Any, ...]:
    return tuple(getattr(annotation, "__metadata__", ()))


def _compile(schema: Mapping[str, Any], scope: _Scope) -> Type:
    compiler = _COMPILERS.get(schema["type"])
    if compiler is None:
        scope.refuse(f"no Delta column can hold this type ({schema['type']})", _ADVICE.get(schema["type"], _ADVICE_ELSE))
    return _admitting(compiler(schema, scope), scope)


_ADVICE_ELSE = "use str, int, float, bool, date, datetime, Decimal, bytes, UUID, an Enum or Literal, a nested model or a list of these"
_ADVICE = {
    "any": "say which type the field has",
    "union": "give the field one type",
    "time": "use datetime, or str",
    "timedelta": "use a number of seconds: float, or int",
    "dict": "use a nested model, or a list of nested models with a name and a value",
    "set": "use list[...]: a set has no order, so equal sets would have different digests",
    "frozenset": "use list[...]: a set has no order, so equal sets would have different digests",
    "function-plain": "use AfterValidator or BeforeValidator on a type that a column can hold",
}


# --- containers and wrappers -----------------------------------------------------------------------------------------------------------


def _definition_ref(schema: Mapping[str, Any], scope: _Scope) -> Type:
    ref = schema["schema_ref"]
    if ref in scope.seen:
        scope.refuse("the model contains itself, and no Delta column is that deep", "refer to the other record by its key")
    return _compile(scope.definitions[ref], replace(scope, seen=scope.seen | {ref}))


def _inner(schema: Mapping[str, Any], scope: _Scope) -> Type:
    return _compile(schema["schema"], replace(scope, definitions={**scope.definitions, **definitions_of(schema)}))


def _nullable(schema: Mapping[str, Any], scope: _Scope) -> Type:
    return replace(_compile(schema["schema"], scope), nullable=True)


def _function(schema: Mapping[str, Any], scope: _Scope) -> Type:
    # A validator may refuse, repair or replace what the inner type says, so only pydantic knows. The column's type is the inner one's.
    inner = _compile(schema["schema"], scope)
    return replace(inner, exact=False, modes=_modes(*inner.modes, schema["type"].removeprefix("function-")))


def _modes(*modes: str) -> tuple[str, ...]:
    return tuple(sorted(set(modes)))


def modes_of(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> tuple[str, ...]:
    """Where the validators of a model as a whole stand. An `__init__` of its own is a "wrap", `model_post_init` an "after"."""
    modes: list[str] = []
    while schema["type"] != "model-fields":
        if schema["type"].startswith("function-"):
            modes.append(schema["type"].removeprefix("function-"))
        modes += [mode for name, mode in (("custom_init", "wrap"), ("post_init", "after")) if schema.get(name)]
        schema = definitions[schema["schema_ref"]] if schema["type"] == "definition-ref" else schema["schema"]
    return _modes(*modes)


def _union(schema: Mapping[str, Any], scope: _Scope) -> Type:
    choices = [_compile(c[0] if isinstance(c, tuple) else c, scope) for c in schema["choices"]]
    dtypes = {str(c.dtype) for c in choices}
    if len(dtypes) != 1:
        scope.refuse(f"a column has one type, not {' or '.join(sorted(dtypes))}", _ADVICE["union"])
    names = sorted({c.name for c in choices})
    return replace(
        choices[0],
        name=" | ".join(names),
        constraints={},
        exact=False,
        nullable=any(c.nullable for c in choices),
        modes=_modes(*(mode for c in choices for mode in c.modes)),
        encode=_encode_first([c.encode for c in choices]),
    )


def _model(schema: Mapping[str, Any], scope: _Scope) -> Type:
    given = schema
    while schema["type"] in {"definitions", "function-before", "function-after", "function-wrap"}:
        schema = schema["schema"]
    if schema["type"] == "definition-ref":
        ref = schema["schema_ref"]
        return _model(scope.definitions[ref], replace(scope, seen=scope.seen | {ref}))
    if schema["type"] != "model" or schema.get("root_model"):
        scope.refuse("this is no model with fields", "use a pydantic BaseModel with fields (not a RootModel)")
    model, config = schema["cls"], schema.get("config", {})
    body = schema["schema"]
    while body["type"] != "model-fields":
        body = body["schema"]
    inside = replace(scope, config=config)
    if config.get("extra_fields_behavior") == "allow" or body.get("extra_behavior") == "allow":
        scope.refuse(
            f"{model.__name__} takes extra fields, which no column would hold", "set extra='ignore' or 'forbid' in its model_config"
        )
    fields = tuple(_field(name, f["schema"], model, inside.at(name)) for name, f in body["fields"].items())
    if not fields:
        scope.refuse(f"{model.__name__} has no fields", "give it at least one")
    dtype = pl.Struct({f.name: f.type.dtype for f in fields})
    definitions = {**scope.definitions, **definitions_of(given)}
    return Type(
        "model",
        dtype,
        _encode_model(model, fields),
        fields=fields,
        exact=not has_model_validators(schema),
        modes=modes_of(given, definitions),
    )


def _field(name: str, schema: Mapping[str, Any], model: type[BaseModel], scope: _Scope) -> Field:
    info = model.model_fields[name]
    personal = Personal in info.metadata or is_personal(info.annotation)
    kind = _compile(schema, scope)
    alias = info.validation_alias if isinstance(info.validation_alias, str) else info.alias
    return Field(name, kind, personal, info.description, _default(info, kind), alias)


_EMPTY = (list, tuple, set, frozenset, dict)


def _default(info: Any, node: Type) -> Any:
    """The default as the column's value, PydanticUndefined when there is none that is the same each time and fits the column.

    Of the factories only those of empty containers count: what another one made would change from one reading to the next.
    """
    if info.default_factory is not None and info.default_factory not in _EMPTY:
        return PydanticUndefined
    value = info.default if info.default_factory is None else info.default_factory()
    try:
        return value if value is PydanticUndefined else encoded(value, node)
    except (TypeError, ValueError):
        return PydanticUndefined


def has_model_validators(schema: Mapping[str, Any]) -> bool:
    """Whether a model judges by more than its fields: a post-init, an `__init__` of its own, or a wrapper between it and its fields."""
    return bool(schema.get("custom_init") or schema.get("post_init") or schema["schema"]["type"] != "model-fields")


def _list(schema: Mapping[str, Any], scope: _Scope) -> Type:
    if "items_schema" not in schema:
        scope.refuse("the list does not say what it holds", "say list[str], list[int], list[Model], ...")
    item = _compile(schema["items_schema"], replace(scope, path=scope.path + "[]"))
    return Type("list", pl.List(item.dtype), _encode_list(item.encode), _some(schema, "min_length", "max_length"), item=item)


def _tuple(schema: Mapping[str, Any], scope: _Scope) -> Type:
    if schema.get("variadic_item_index") != 0 or len(schema["items_schema"]) != 1:
        scope.refuse("a tuple of different things is no column", "use a nested model, or list[...]")
    return _list({**schema, "items_schema": schema["items_schema"][0]}, scope)


# --- scalars ---------------------------------------------------------------------------------------------------------------------------


def _int(schema: Mapping[str, Any], scope: _Scope) -> Type:
    return Type("int", pl.Int64(), _encode_int, _some(schema, *BOUNDS, "multiple_of"))


def _float(schema: Mapping[str, Any], scope: _Scope) -> Type:
    constraints = _some(schema, *BOUNDS, "multiple_of")
    if schema.get("allow_inf_nan", scope.config.get("allow_inf_nan", True)) is False:
        constraints["finite"] = True
    # pydantic takes the remainder with C's fmod; polars computes x - floor(x/m)*m, which is another number for large x.
    return Type("float", pl.Float64(), _encode_float, constraints, exact="multiple_of" not in constraints)


def _bool(schema: Mapping[str, Any], scope: _Scope) -> Type:
    return Type("bool", pl.Boolean(), _encode_exactly(bool))


def _str(schema: Mapping[str, Any], scope: _Scope) -> Type:
    config = {key[4:]: value for key, value in scope.config.items() if key.startswith("str_")}
    merged = {**config, **schema}
    constraints = _some(merged, "min_length", "max_length", "pattern")
    changes = {key: True for key in ("strip_whitespace", "to_lower", "to_upper") if merged.get(key)}
    pattern = constraints.get("pattern")
    exact = not changes
    if pattern is not None:
        engine = merged.get("regex_engine", scope.config.get("regex_engine", "rust-regex"))
        exact = exact and engine == "rust-regex" and isinstance(pattern, str) and _polars_reads(pattern)
        constraints["pattern"] = pattern if isinstance(pattern, str) else pattern.pattern
    return Type("str", pl.String(), _encode_exactly(str), {**constraints, **changes}, exact=exact)


def _polars_reads(pattern: str) -> bool:
    try:
        pl.Series([""]).str.contains(pattern)
    except pl.exceptions.ComputeError:
        return False
    return True


def _bytes(schema: Mapping[str, Any], scope: _Scope) -> Type:
    return Type("bytes", pl.Binary(), _encode_exactly(bytes), _some(schema, "min_length", "max_length"))


def _date(schema: Mapping[str, Any], scope: _Scope) -> Type:
    constraints = _some(schema, *BOUNDS, "now_op")
    return Type("date", pl.Date(), _encode_date, constraints, exact="now_op" not in constraints)


def _datetime(schema: Mapping[str, Any], scope: _Scope) -> Type:
    """A datetime without further word is an instant (UTC, microseconds); `NaiveDatetime` is a wall clock's reading."""
    zone = schema.get("tz_constraint", "aware")
    if zone not in {"aware", "naive"}:
        scope.refuse("a column cannot hold one offset only", "use AwareDatetime; it is stored as the same instant in UTC")
    constraints = _some(schema, *BOUNDS, "now_op")
    comparable = all((constraints[b].tzinfo is not None) == (zone == "aware") for b in BOUNDS if b in constraints)
    dtype, encode = (UTC, _encode_aware) if zone == "aware" else (NAIVE, _encode_naive)
    return Type("datetime", dtype, encode, constraints, exact=comparable and "now_op" not in constraints)


def _decimal(schema: Mapping[str, Any], scope: _Scope) -> Type:
    constraints = _some(schema, *BOUNDS, "multiple_of", "max_digits", "decimal_places")
    scale = constraints.get("decimal_places", DECIMAL_SCALE)
    digits = constraints.get("max_digits")
    if scale > 38 or (digits or 0) > 38:
        scope.refuse("a Delta decimal has at most 38 digits", "set max_digits and decimal_places to at most 38, or use str")
    for bound in BOUNDS:
        if bound in constraints:
            constraints[bound] = decimal.Decimal(str(constraints[bound]))
    exact = "multiple_of" not in constraints and all(_has_scale(constraints[b], scale) for b in BOUNDS if b in constraints)
    exact = exact and (digits is None or ("decimal_places" in constraints and digits >= scale))
    return Type("decimal", pl.Decimal(38, scale), _encode_decimal(scale), constraints, exact=exact)


def _has_scale(value: decimal.Decimal, scale: int) -> bool:
    if not value.is_finite():
        return False
    digits, exponent = value.as_tuple().digits, int(value.as_tuple().exponent)
    return -exponent <= scale and len(digits) + exponent + scale <= 38


def _uuid(schema: Mapping[str, Any], scope: _Scope) -> Type:
    constraints = _some(schema, "version")
    return Type("uuid", pl.String(), _encode_uuid, constraints, exact=not constraints)


def _url(schema: Mapping[str, Any], scope: _Scope) -> Type:
    return Type("url", pl.String(), str, exact=False)


def _literal(schema: Mapping[str, Any], scope: _Scope) -> Type:
    return _one_of(schema["expected"], scope)


def _enum(schema: Mapping[str, Any], scope: _Scope) -> Type:
    one_of = _one_of(schema["members"], scope)
    return one_of if schema.get("missing") is None else replace(one_of, exact=False, modes=("wrap",))


def _one_of(members: Iterable[Any], scope: _Scope) -> Type:
    values = [m.value if isinstance(m, enum.Enum) else m for m in members]
    nullable = None in values
    values = [v for v in values if v is not None]
    kinds: set[type] = {type(v) for v in values}
    dtypes: dict[type, pl.DataType] = {str: pl.String(), int: pl.Int64(), bool: pl.Boolean()}
    if len(kinds) != 1 or not kinds <= dtypes.keys():
        scope.refuse("its values are not all str, all int or all bool", "give all members one type")
    kind = kinds.pop()
    if kind is int and not all(fits_64_bits(v) for v in values):
        scope.refuse("a value does not fit 64 bits", "use str")
    return Type("enum", dtypes[kind], _encode_member(kind), {"one_of": sorted(values)}, nullable=nullable)


def _some(schema: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: schema[name] for name in names if schema.get(name) is not None}


_COMPILERS: dict[str, Callable[[Mapping[str, Any], _Scope], Type]] = {
    "definition-ref": _definition_ref,
    "definitions": _inner,
    "default": _inner,
    "nullable": _nullable,
    "function-after": _function,
    "function-before": _function,
    "function-wrap": _function,
    "union": _union,
    "model": _model,
    "list": _list,
    "tuple": _tuple,
    "int": _int,
    "float": _float,
    "bool": _bool,
    "str": _str,
    "bytes": _bytes,
    "date": _date,
    "datetime": _datetime,
    "decimal": _decimal,
    "uuid": _uuid,
    "url": _url,
    "literal": _literal,
    "enum": _enum,
}


# --- bounds that admit nothing ---------------------------------------------------------------------------------------------------------


def interval(constraints: Mapping[str, Any], *, whole: bool) -> tuple[Any, bool, Any, bool]:
    """The bounds as (lower, lower is excluded, upper, upper is excluded); None is unbounded. `whole` numbers have closed bounds."""
    lower, upper = constraints.get("ge"), constraints.get("le")
    below = above = False
    if (gt := constraints.get("gt")) is not None and (lower is None or gt >= lower):
        lower, below = gt, True
    if (lt := constraints.get("lt")) is not None and (upper is None or lt <= upper):
        upper, above = lt, True
    if whole and below and lower is not None:
        lower, below = lower + 1, False
    if whole and above and upper is not None:
        upper, above = upper - 1, False
    return lower, below, upper, above


def _admitting(node: Type, scope: _Scope) -> Type:
    constraints = node.constraints
    if any(b in constraints for b in BOUNDS):
        lower, below, upper, above = interval(constraints, whole=node.name == "int")
        if lower is not None and upper is not None and (lower > upper or (lower == upper and (below or above))):
            scope.refuse(f"the bounds admit nothing ({spelled(constraints)})", "swap or widen them")
        if any(isinstance(constraints.get(b), float) and math.isnan(constraints[b]) for b in BOUNDS):
            scope.refuse("a bound that is NaN admits nothing", "use a number")
        if node.name == "int" and ((lower is not None and lower >= 2**63) or (upper is not None and upper < -(2**63))):
            scope.refuse(f"the bounds admit nothing that fits 64 bits ({spelled(constraints)})", "widen them, or use str")
    if constraints.get("min_length", 0) > constraints.get("max_length", math.inf):
        scope.refuse(f"the lengths admit nothing ({spelled(constraints)})", "swap or widen them")
    return node


def fits_64_bits(value: int) -> bool:
    """Whether an Int64 column holds the number."""
    return -(2**63) <= value < 2**63


def dtype_text(dtype: Any) -> str:
    """A column type in words of our own: they are part of a contract's hash, and polars may spell its types anew."""
    if isinstance(dtype, pl.Struct):
        return "Struct(" + ", ".join(f"{f.name}: {dtype_text(f.dtype)}" for f in dtype.fields) + ")"
    if isinstance(dtype, pl.List):
        return f"List({dtype_text(dtype.inner)})"
    if isinstance(dtype, pl.Datetime):
        return f"Datetime({dtype.time_unit}" + (f", {dtype.time_zone})" if dtype.time_zone else ")")
    if isinstance(dtype, pl.Decimal):
        return f"Decimal({dtype.precision}, {dtype.scale})"
    return str(dtype)


def spelled(constraints: Mapping[str, Any]) -> str:
    """The constraints as one line for people."""
    return ", ".join(spell(name, value) for name, value in constraints.items())


def spell(name: str, value: Any) -> str:
    """One constraint as the name of its rule: `ge 300`, `max_length 5`, `one of 'a', 'b'`."""
    if name == "one_of":
        return "one of " + ", ".join(repr(v) for v in value)
    if value is True:
        return name
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return f"{'in the' if name == 'now_op' else name} {value}"


# --- from Python's values to the column's ----------------------------------------------------------------------------------------------
# polars casts in silence where it builds a column (Decimal("1.005") to 1.00, 2.5 to 2 inside a struct, naive to UTC, True to 1), so each
# value's type is looked at here. What does not fit raises TypeError or ValueError; the text never shows the value.


def _encode_exactly(kind: type) -> Callable[[Any], Any]:
    def encode(value: Any) -> Any:
        if type(value) is kind:
            return value
        if isinstance(value, kind):
            return kind(value)
        raise TypeError(f"is {_kind(value)}, not {kind.__name__}")

    encode.plain = frozenset({kind})  # type: ignore[attr-defined]
    return encode


def _encode_int(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"is {_kind(value)}, not int")
    if not fits_64_bits(value):
        raise ValueError("does not fit 64 bits")
    return int(value)


def _encode_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"is {_kind(value)}, not float")
    return float(value)


_encode_float.plain = frozenset({float})  # type: ignore[attr-defined]


def _encode_date(value: Any) -> dt.date:
    if not isinstance(value, dt.date) or isinstance(value, dt.datetime):
        raise TypeError(f"is {_kind(value)}, not date")
    return value


def _encode_aware(value: Any) -> dt.datetime:
    if not isinstance(value, dt.datetime):
        raise TypeError(f"is {_kind(value)}, not datetime")
    if value.utcoffset() is None:
        raise ValueError("is a datetime without a time zone (annotate NaiveDatetime if that is meant)")
    return value.astimezone(dt.timezone.utc)


def _encode_naive(value: Any) -> dt.datetime:
    if not isinstance(value, dt.datetime):
        raise TypeError(f"is {_kind(value)}, not datetime")
    if value.tzinfo is not None:
        raise ValueError("is a datetime with a time zone (annotate AwareDatetime if that is meant)")
    return value


def _encode_decimal(scale: int) -> Callable[[Any], Any]:
    def encode(value: Any) -> decimal.Decimal:
        if not isinstance(value, decimal.Decimal):
            raise TypeError(f"is {_kind(value)}, not Decimal")
        if not value.is_finite() or not _has_scale(value if not value else _normal(value), scale):
            raise ValueError(f"does not fit a decimal of 38 digits, {scale} of them after the point")
        return value

    return encode


def _normal(value: decimal.Decimal) -> decimal.Decimal:
    # Decimal.normalize() would round to the context's precision of 28 digits.
    sign, digits, exponent = value.as_tuple()
    while len(digits) > 1 and digits[-1] == 0:
        digits, exponent = digits[:-1], int(exponent) + 1
    return decimal.Decimal((sign, digits, int(exponent)))


def _encode_uuid(value: Any) -> str:
    if not isinstance(value, uuid.UUID):
        raise TypeError(f"is {_kind(value)}, not UUID")
    return str(value)


def _encode_member(kind: type) -> Callable[[Any], Any]:
    def encode(value: Any) -> Any:
        plain = value.value if isinstance(value, enum.Enum) else value
        if plain is not None and type(plain) is not kind:
            raise TypeError(f"is {_kind(value)}, not {kind.__name__}")
        return plain

    return encode


def _encode_model(model: type[BaseModel], fields: tuple[Field, ...]) -> Callable[[Any], Any]:
    def encode(value: Any) -> dict[str, Any]:
        if not isinstance(value, model):
            raise TypeError(f"is {_kind(value)}, not {model.__name__}")
        return {f.name: encoded(getattr(value, f.name, None), f.type) for f in fields}

    return encode


def _encode_list(item: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def encode(value: Any) -> list[Any]:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"is {_kind(value)}, not list")
        return [None if v is None else item(v) for v in value]

    return encode


def _encode_first(encoders: list[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    def encode(value: Any) -> Any:
        for each in encoders:
            try:
                return each(value)
            except (TypeError, ValueError):
                continue
        raise TypeError(f"is {_kind(value)}, which is none of the types of its union")

    return encode


def encoded(value: Any, node: Type) -> Any:
    """The column's value of a Python value; None stays None (that it may be is a rule, not a type). Raises TypeError or ValueError."""
    return None if value is None else node.encode(value)


def _kind(value: Any) -> str:
    return type(value).__name__
