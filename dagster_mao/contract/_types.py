"""From a pydantic model to a tree of types, each with its column type, its constraints, and whether polars can judge it.

The tree is read from the model's core schema, the form that pydantic itself validates by: there `Optional[conint(ge=5)]`, `Interval` and
config limits have become one thing, and a node that is not known here is seen as such. Nothing unknown is ever taken for "any value": it is
judged by pydantic, row by row (`exact` False), or, where it is no data at all, refused when the contract is defined.

What Delta has no column for is kept in another: a dict as a list of entries, a set as a sorted list, a timedelta as microseconds, a time
and whatever is made from text as that text, and what has no one type (a union, `Any`, a tuple of different things, a model in itself) as
JSON text. docs/adr/0007 has the table.
"""

from __future__ import annotations

import dataclasses
import decimal
import enum
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, partial
from types import UnionType
from typing import Annotated, Any, NoReturn, Union, get_args, get_origin

import polars as pl
from pydantic import BaseModel, ByteSize, EncodedBytes, EncodedStr, RootModel, TypeAdapter
from pydantic.types import Secret, SecretBytes, SecretStr
from pydantic_core import PydanticUndefined, SchemaValidator

from dagster_mao.contract import _values as values
from dagster_mao.contract._markers import Personal
from dagster_mao.contract._values import encoded, fits_64_bits, has_scale
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
    """What a column holds. `exact`: polars' verdict over `constraints` is pydantic's. `encode` makes the column's value of Python's,
    `decode` what pydantic judges of the column's (None: that is the same). `item` is what a list holds; of a dict, an entry with the fields
    `key` and `value`. `json`: it is JSON text. `choices` are a union's, where they have no type in common.

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
    decode: Callable[[Any], Any] | None = None
    json: bool = False
    choices: tuple[Type, ...] = ()

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
    annotation: Any = None  # what the user wrote there, where that is known; of use where the schema says nothing
    branched: bool = False  # in one of several schemas for the same thing, which alone does not say what pydantic takes

    def at(self, path: str, annotation: Any = None) -> _Scope:
        return replace(self, path=f"{self.path}.{path}" if self.path else path, annotation=annotation)

    def into(self, path: str, position: int | None = 0) -> _Scope:
        """The scope of what the annotation holds at this position."""
        args = get_args(_plain_annotation(self.annotation))
        inside = args[position] if position is not None and len(args) > position else None
        return replace(self, path=self.path + path, annotation=inside)

    def judge(self, schema: Mapping[str, Any]) -> Callable[[Any], Any]:
        """pydantic's verdict by this part of the schema alone; made when it is first asked for."""

        @cache
        def validator() -> SchemaValidator:
            whole: Any = {"type": "definitions", "schema": schema, "definitions": list(self.definitions.values())}
            return SchemaValidator(whole if self.definitions else schema, dict(self.config))  # type: ignore[arg-type]

        return lambda value: validator().validate_python(value, strict=False, by_name=True, by_alias=False)

    def refuse(self, what: str, fix: str) -> NoReturn:
        raise ContractDefinitionError(f"contract {self.model}: {what}", field=self.path or None, fix=fix)


def fields_of(model: type[BaseModel]) -> tuple[Field, ...]:
    """The fields of a model, in order. Raises ContractDefinitionError naming the field that no Delta column can hold."""
    core: Any = model.__pydantic_core_schema__
    return _model(core, _Scope(model.__name__, "", definitions_of(core), {}, annotation=model)).fields


def definitions_of(core: Mapping[str, Any]) -> dict[str, Any]:
    """The shared parts of a core schema by their reference."""
    return {d["ref"]: d for d in core.get("definitions", ())}


def is_personal(annotation: Any, *, deep: bool = False, seen: frozenset[Any] = frozenset()) -> bool:
    """Whether `Personal`, or a secret, is anywhere in the annotation, inside Optional, list and Annotated too; `deep`: in models too."""
    if annotation is Personal or Personal in getattr(annotation, "__metadata__", ()):
        return True
    kind = get_origin(annotation) or annotation
    if isinstance(kind, type) and issubclass(kind, (SecretStr, SecretBytes, Secret)):
        return True
    inner: list[Any] = [*get_args(annotation), getattr(annotation, "__value__", None)]
    if isinstance(annotation, type) and annotation not in seen:
        if issubclass(annotation, BaseModel) and (deep or issubclass(annotation, RootModel)):
            if any(Personal in info.metadata for info in annotation.model_fields.values()):
                return True
            inner += [info.annotation for info in annotation.model_fields.values()]
        elif deep:
            inner += getattr(annotation, "__annotations__", {}).values()
    return any(is_personal(one, deep=deep, seen=seen | {annotation}) for one in inner if one is not None and one is not annotation)


def _plain_annotation(annotation: Any) -> Any:
    """The annotation without `Annotated` and `| None`."""
    if get_origin(annotation) is Annotated:
        return _plain_annotation(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        choices = [arg for arg in get_args(annotation) if arg is not type(None)]
        return _plain_annotation(choices[0]) if len(choices) == 1 else annotation
    return annotation


def _compile(schema: Mapping[str, Any], scope: _Scope) -> Type:
    kind = schema["type"]
    if kind in _NO_DATA:
        scope.refuse(f"no Delta column can hold this type ({kind})", _NO_DATA[kind])
    node = _COMPILERS.get(kind, _json)(schema, scope)
    if kind in _SAYS and any(value not in (None, False) for name, value in schema.items() if name not in _SAYS[kind] | _SILENT):
        node = replace(node, exact=False)  # a word that is not known here
    return _admitting(node, scope)


_NO_DATA = {
    "callable": "name what is to be called, as str",
    "is-instance": "say which data the object is made from: give it a type that pydantic validates",
    "is-subclass": "name the class, as str",
    "generator": "use list[...]: a generator is gone once it is read",
}


# --- containers and wrappers -----------------------------------------------------------------------------------------------------------


def _definition_ref(schema: Mapping[str, Any], scope: _Scope) -> Type:
    ref = schema["schema_ref"]
    if ref in scope.seen:
        return _json(schema, scope)  # it contains itself, and no column is that deep
    return _compile(scope.definitions[ref], replace(scope, seen=scope.seen | {ref}))


def _inner(schema: Mapping[str, Any], scope: _Scope) -> Type:
    inner = _compile(schema["schema"], replace(scope, definitions={**scope.definitions, **definitions_of(schema)}))
    # A default that stands in for what is refused: then nothing is.
    return inner if schema.get("on_error", "raise") == "raise" else replace(inner, exact=False, modes=_modes(*inner.modes, "wrap"))


def _nullable(schema: Mapping[str, Any], scope: _Scope) -> Type:
    inner = _compile(schema["schema"], scope)
    return replace(inner, nullable=True, encode=_never_null(inner.encode)) if inner.nullable else replace(inner, nullable=True)


def _never_null(encode: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Of what is None inside and may be None outside (`RootModel[int | None] | None`), the column would not say which it is."""

    def checked(value: Any) -> Any:
        if (column := encode(value)) is None:
            raise ValueError(f"is {type(value).__name__} and would be read back as None")
        return column

    return checked


def _function(schema: Mapping[str, Any], scope: _Scope) -> Type:
    # A validator may refuse, repair or replace what the inner type says, so only pydantic knows. The column's type is the inner one's.
    owner = getattr(schema["function"]["function"], "__self__", None)
    if owner is ByteSize:
        return Type("int", pl.Int64(), values.encode_int, {"ge": 0}, exact=False, modes=("after",))
    inner = _compile(schema["schema"], scope)
    encode = inner.encode
    if isinstance(owner, EncodedStr):
        encode = owner.encode_str
    elif isinstance(owner, EncodedBytes):
        encode = owner.encode
    elif not inner.json:
        from_source = partial(_from_source, inner)
        guarded = from_source if scope.branched else values.faithful(from_source, inner.decode, scope.judge(schema))
        encode = values.or_from_text(encode, guarded)
    else:
        encode = values.faithful(values.json_text, values.decode_json, scope.judge(schema))
    return replace(inner, exact=False, encode=encode, modes=_modes(*inner.modes, schema["type"].removeprefix("function-")))


def _from_source(inner: Type, value: Any) -> Any:
    """The column's value of an object that a validator made: of what a secret holds, or of the text that the object is written as."""
    if hasattr(value, "get_secret_value"):
        return encoded(value.get_secret_value(), inner)
    if inner.dtype != pl.String():
        raise TypeError(f"is {type(value).__name__}, not {inner.name}")
    return values.as_text(value)


def _plain_function(schema: Mapping[str, Any], scope: _Scope) -> Type:
    """A validator alone: the column is the one of the annotation, if that says anything; otherwise text, of a class, or JSON."""
    annotation = _plain_annotation(scope.annotation)
    if annotation is _AS_TEXT:
        from_text = values.as_text if scope.branched else values.faithful(values.as_text, None, scope.judge(schema))
        return Type("text", pl.String(), from_text, exact=False)
    if annotation is None or isinstance(annotation, str):
        return _json(schema, scope)
    inner: Any = TypeAdapter(annotation).core_schema
    # The judge is this validator, not the annotation's own; and if that is a validator alone as well, it makes its objects from text.
    judge = schema if inner["type"] == "function-plain" else inner
    node = _compile(judge, replace(scope, definitions={**scope.definitions, **definitions_of(inner)}, annotation=_AS_TEXT))
    return replace(node, exact=False, nullable=not scope.branched, modes=_modes(*node.modes, "wrap"))


_AS_TEXT = object()


def _branch(name: str) -> Callable[[Mapping[str, Any], _Scope], Type]:
    """Where pydantic has a schema for Python and one for JSON, or one for each strictness: the column is of the one that is plain data."""

    def compile_branch(schema: Mapping[str, Any], scope: _Scope) -> Type:
        inner = _compile(schema[name] if name != "steps" else schema["steps"][0], replace(scope, branched=True))
        if scope.branched:
            return replace(inner, exact=False)
        return replace(inner, exact=False, encode=values.faithful(inner.encode, inner.decode, scope.judge(schema)))

    return compile_branch


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
    given = schema["choices"].values() if isinstance(schema["choices"], dict) else schema["choices"]
    choices = [_compile(c[0] if isinstance(c, tuple) else c, replace(scope, annotation=None)) for c in given]
    modes = _modes(*(mode for c in choices for mode in c.modes))
    if len({str(c.dtype) for c in choices}) > 1 or any(c.decode for c in choices):
        return replace(_json(schema, scope), choices=tuple(choices), nullable=any(c.nullable for c in choices), modes=modes)
    names = sorted({c.name for c in choices})
    return replace(
        choices[0],
        name=" | ".join(names),
        constraints={},
        exact=False,
        nullable=any(c.nullable for c in choices),
        modes=modes,
        encode=values.faithful(values.encode_first([c.encode for c in choices]), None, scope.judge(schema)),
    )


def _json(schema: Mapping[str, Any], scope: _Scope, **more: Any) -> Type:
    """What has no column of its own. What JSON has no word for, or would be read back as something else, is refused with its record."""
    kind = _JSON_NAMES.get(schema["type"], schema["type"])
    encode = values.faithful(values.json_text, values.decode_json, scope.judge(schema))
    nullable = schema["type"] in {"any", "function-plain"}
    return Type(kind, pl.String(), encode, decode=values.decode_json, exact=False, json=True, nullable=nullable, **more)


_JSON_NAMES = {"tagged-union": "union", "function-plain": "any", "definition-ref": "model", "named-tuple": "tuple", "call": "tuple"}


def _model(schema: Mapping[str, Any], scope: _Scope) -> Type:
    given = schema
    while schema["type"] in {"definitions", "function-before", "function-after", "function-wrap"}:
        schema = schema["schema"]
    if schema["type"] == "definition-ref":
        ref = schema["schema_ref"]
        return _model(scope.definitions[ref], replace(scope, seen=scope.seen | {ref}))
    if schema["type"] != "model" or (schema.get("root_model") and scope.annotation is schema["cls"] and not scope.path):
        scope.refuse("this is no model with fields", "use a pydantic BaseModel with fields (not a RootModel)")
    model, config = schema["cls"], schema.get("config", {})
    definitions = {**scope.definitions, **definitions_of(given)}
    inside = replace(scope, config=config, definitions=definitions)
    if schema.get("root_model"):
        return _root(schema, replace(inside, annotation=model.model_fields["root"].annotation))
    exact, modes = not has_model_validators(schema), modes_of(given, definitions)
    body = schema["schema"]
    while body["type"] != "model-fields":
        body = body["schema"]
    fields = [_field(name, f["schema"], model.model_fields[name], inside) for name, f in body["fields"].items()]
    if config.get("extra_fields_behavior") == "allow" or body.get("extra_behavior") == "allow":
        fields.append(_extras(body))
        exact = exact and not body.get("extras_schema")
    if not fields:
        scope.refuse(f"{model.__name__} has no fields", "give it at least one")
    return replace(_struct(model, tuple(fields)), exact=exact, modes=modes)


def _struct(cls: type, fields: tuple[Field, ...]) -> Type:
    dtype = pl.Struct({f.name: f.type.dtype for f in fields})
    return Type("model", dtype, values.encode_struct(cls, fields), fields=fields, decode=values.decode_struct(fields))


def _extras(body: Mapping[str, Any]) -> Field:
    """What extra="allow" lets in beside the fields: JSON text of an object, null where there is nothing."""
    text = Type("extras", pl.String(), values.encode_extras, decode=values.decode_extras, exact=False, json=True, nullable=True)
    return Field(values.EXTRAS, text, personal=True, description="what came in beside the fields", default=None)


def _root(schema: Mapping[str, Any], scope: _Scope) -> Type:
    """A RootModel is the column of its root."""
    inner = _compile(schema["schema"], scope)
    model, exact = schema["cls"], inner.exact and not (schema.get("custom_init") or schema.get("post_init"))

    def encode(value: Any) -> Any:
        if not isinstance(value, model):
            raise TypeError(f"is {type(value).__name__}, not {model.__name__}")
        return encoded(value.root, inner)

    return replace(inner, exact=exact, encode=encode)


def _dataclass(schema: Mapping[str, Any], scope: _Scope) -> Type:
    body = schema["schema"]
    while body["type"] != "dataclass-args":
        body = body["schema"]
    exact = schema["schema"]["type"] == "dataclass-args" and not schema.get("post_init")
    if not body["fields"] or any(f.get("init_only") or f.get("init") is False for f in body["fields"]):
        return _json(schema, scope)
    annotations = {f.name: f.type for f in dataclasses.fields(schema["cls"])}
    inside = replace(scope, config=schema.get("config", scope.config))
    fields = [_member(f["name"], f, annotations[f["name"]], inside) for f in body["fields"]]
    return replace(_struct(schema["cls"], tuple(fields)), exact=exact)


def _typed_dict(schema: Mapping[str, Any], scope: _Scope) -> Type:
    inside = replace(scope, config=schema.get("config", scope.config))
    every = schema.get("total", True)
    behaviour = schema.get("extra_behavior", inside.config.get("extra_fields_behavior"))
    if not schema["fields"] or behaviour == "allow" or not all(f.get("required", every) for f in schema["fields"].values()):
        return _json(schema, scope)  # a column cannot tell a key that is not there from one that is None
    annotations = getattr(schema.get("cls"), "__annotations__", {})
    return _struct(dict, tuple(_member(name, f, annotations.get(name), inside) for name, f in schema["fields"].items()))


def _member(name: str, schema: Mapping[str, Any], annotation: Any, scope: _Scope) -> Field:
    """A field of a dataclass or a typed dict."""
    node = _compile(schema["schema"], scope.at(name, None if isinstance(annotation, str) else annotation))
    alias = schema.get("validation_alias")
    return Field(name, node, is_personal(annotation, deep=node.json), None, PydanticUndefined, alias if isinstance(alias, str) else None)


def _field(name: str, schema: Mapping[str, Any], info: Any, scope: _Scope) -> Field:
    node = _compile(schema, scope.at(name, info.annotation))
    personal = Personal in info.metadata or is_personal(info.annotation, deep=_has_json(node))
    alias = info.validation_alias if isinstance(info.validation_alias, str) else info.alias
    return Field(name, node, personal, info.description, _default(info, node), alias)


def _has_json(node: Type) -> bool:
    """Whether JSON text is in the column by itself, not as a member that says for itself whether it is personal."""
    return node.json or (node.item is not None and (_has_json(node.item) or any(_has_json(f.type) for f in node.item.fields)))


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
    item = _compile(schema.get("items_schema", {"type": "any"}), scope.into("[]"))
    if item.json:
        return _json(schema, scope, item=item)
    encode, constraints = values.encode_list(item.encode), _some(schema, "min_length", "max_length")
    return Type("list", pl.List(item.dtype), encode, constraints, item=item, decode=values.decode_list(item.decode))


def _deque(schema: Mapping[str, Any], scope: _Scope) -> Type:
    node = _list(schema, scope)
    return replace(node, exact=False, encode=values.faithful(node.encode, node.decode, scope.judge(schema)))


def _tuple(schema: Mapping[str, Any], scope: _Scope) -> Type:
    """A list, if its items are of one kind; of different ones, JSON text."""
    items = schema["items_schema"]
    if schema.get("variadic_item_index") == 0 and len(items) == 1:
        node = _list({**schema, "items_schema": items[0]}, scope)
        return _json(schema, scope, item=node.item) if node.json else node
    if "variadic_item_index" in schema or not items or any(item != items[0] for item in items) or items[0]["type"] == "default":
        return _json(schema, scope)
    node = _list({"type": "list", "items_schema": items[0], "min_length": len(items), "max_length": len(items)}, scope)
    return _json(schema, scope) if node.json else node


def _set(schema: Mapping[str, Any], scope: _Scope) -> Type:
    item = _compile(schema.get("items_schema", {"type": "any"}), scope.into("[]"))
    if item.json or item.decode or item.fields or item.item:
        return _json(schema, scope)
    encode = values.faithful(values.encode_set(item.encode), values.decode_set, scope.judge(schema))
    return Type("set", pl.List(item.dtype), encode, _some(schema, "min_length", "max_length"), item=item, decode=values.decode_set)


def _dict(schema: Mapping[str, Any], scope: _Scope) -> Type:
    """A list of entries. Delta has maps, but polars does not."""
    key = _compile(schema.get("keys_schema", {"type": "any"}), scope.into("[].key"))
    value = _compile(schema.get("values_schema", {"type": "any"}), scope.into("[].value", 1))
    if key.json or key.fields or key.item or value.json:
        return _json(schema, scope, item=value)
    fields = (Field("key", key), Field("value", value))
    entry = Type("entry", pl.Struct({f.name: f.type.dtype for f in fields}), _no_entry, fields=fields)
    encode = values.encode_dict(key.encode, value)
    constraints = _some(schema, "min_length", "max_length")
    decode = values.decode_dict(key.decode, value.decode)
    node = Type("dict", pl.List(entry.dtype), encode, constraints, item=entry, decode=decode)
    if schema["type"] == "dict":
        return node
    return replace(node, exact=False, encode=values.faithful(encode, decode, scope.judge(schema)))


def _no_entry(value: Any) -> NoReturn:
    raise TypeError("entries are made by their dict")


# --- scalars ---------------------------------------------------------------------------------------------------------------------------


def _int(schema: Mapping[str, Any], scope: _Scope) -> Type:
    return Type("int", pl.Int64(), values.encode_int, _some(schema, *BOUNDS, "multiple_of"))


def _float(schema: Mapping[str, Any], scope: _Scope) -> Type:
    constraints = _some(schema, *BOUNDS, "multiple_of")
    if schema.get("allow_inf_nan", scope.config.get("allow_inf_nan", True)) is False:
        constraints["finite"] = True
    # pydantic takes the remainder with C's fmod; polars computes x - floor(x/m)*m, which is another number for large x.
    return Type("float", pl.Float64(), values.encode_float, constraints, exact="multiple_of" not in constraints)


def _bool(schema: Mapping[str, Any], scope: _Scope) -> Type:
    return Type("bool", pl.Boolean(), values.encode_exactly(bool))


def _str(schema: Mapping[str, Any], scope: _Scope) -> Type:
    config = {key[4:]: value for key, value in scope.config.items() if key.startswith("str_")}
    merged = {**config, **schema}
    constraints = _some(merged, "min_length", "max_length", "pattern")
    changes = {key: True for key in ("strip_whitespace", "to_lower", "to_upper") if merged.get(key)}
    pattern = constraints.get("pattern")
    exact = not changes and not merged.get("ascii_only")
    if pattern is not None:
        engine = merged.get("regex_engine", scope.config.get("regex_engine", "rust-regex"))
        exact = exact and engine == "rust-regex" and isinstance(pattern, str) and _polars_reads(pattern)
        constraints["pattern"] = pattern if isinstance(pattern, str) else pattern.pattern
    return Type("str", pl.String(), values.encode_exactly(str), {**constraints, **changes}, exact=exact)


def _polars_reads(pattern: str) -> bool:
    try:
        pl.Series([""]).str.contains(pattern)
    except pl.exceptions.ComputeError:
        return False
    return True


def _text(schema: Mapping[str, Any], scope: _Scope) -> Type:
    """What is made from text and written as text."""
    name = {"multi-host-url": "url", "fraction": "text"}.get(schema["type"], schema["type"])
    return Type(name, pl.String(), values.faithful(values.as_text, None, scope.judge(schema)), exact=False)


def _json_string(schema: Mapping[str, Any], scope: _Scope) -> Type:
    """pydantic's `Json`: the column holds the text that pydantic parses."""
    return Type("json", pl.String(), values.faithful(values.json_text, None, scope.judge(schema)), exact=False)


def _none(schema: Mapping[str, Any], scope: _Scope) -> Type:
    return Type("none", pl.String(), values.encode_none, exact=False, nullable=True)


def _timedelta(schema: Mapping[str, Any], scope: _Scope) -> Type:
    return Type("timedelta", pl.Int64(), values.encode_timedelta, _some(schema, *BOUNDS), decode=values.decode_timedelta)


def _time(schema: Mapping[str, Any], scope: _Scope) -> Type:
    return Type("time", pl.String(), values.encode_time, _some(schema, *BOUNDS), exact=False)


def _bytes(schema: Mapping[str, Any], scope: _Scope) -> Type:
    return Type("bytes", pl.Binary(), values.encode_exactly(bytes), _some(schema, "min_length", "max_length"))


def _date(schema: Mapping[str, Any], scope: _Scope) -> Type:
    constraints = _some(schema, *BOUNDS, "now_op")
    return Type("date", pl.Date(), values.encode_date, constraints, exact="now_op" not in constraints)


def _datetime(schema: Mapping[str, Any], scope: _Scope) -> Type:
    """A datetime without further word is an instant (UTC, microseconds); `NaiveDatetime` is a wall clock's reading."""
    zone = schema.get("tz_constraint", "aware")
    if zone not in {"aware", "naive"}:
        scope.refuse("a column cannot hold one offset only", "use AwareDatetime; it is stored as the same instant in UTC")
    constraints = _some(schema, *BOUNDS, "now_op")
    comparable = all((constraints[b].tzinfo is not None) == (zone == "aware") for b in BOUNDS if b in constraints)
    dtype, encode = (UTC, values.encode_aware) if zone == "aware" else (NAIVE, values.encode_naive)
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
    exact = "multiple_of" not in constraints and all(has_scale(constraints[b], scale) for b in BOUNDS if b in constraints)
    exact = exact and (digits is None or ("decimal_places" in constraints and digits >= scale))
    return Type("decimal", pl.Decimal(38, scale), values.encode_decimal(scale), constraints, exact=exact)


def _uuid(schema: Mapping[str, Any], scope: _Scope) -> Type:
    constraints = _some(schema, "version")
    return Type("uuid", pl.String(), values.encode_uuid, constraints, exact=not constraints)


def _literal(schema: Mapping[str, Any], scope: _Scope) -> Type:
    return _one_of(schema["expected"], schema, scope)


def _enum(schema: Mapping[str, Any], scope: _Scope) -> Type:
    one_of = _one_of(schema["members"], schema, scope)
    return one_of if schema.get("missing") is None else replace(one_of, exact=False, modes=("wrap",))


def _one_of(members: Iterable[Any], schema: Mapping[str, Any], scope: _Scope) -> Type:
    given = [m.value if isinstance(m, enum.Enum) else m for m in members]
    nullable, options = None in given, [v for v in given if v is not None]
    kinds: set[type] = {type(v) for v in options}
    dtypes: dict[type, pl.DataType] = {str: pl.String(), int: pl.Int64(), bool: pl.Boolean(), bytes: pl.Binary()}
    if len(kinds) != 1 or not kinds <= dtypes.keys():
        return replace(_json(schema, scope), name="enum", nullable=nullable)
    kind = kinds.pop()
    if kind is int and not all(fits_64_bits(v) for v in options):
        scope.refuse("a value does not fit 64 bits", "use str")
    return Type("enum", dtypes[kind], values.encode_member(kind), {"one_of": sorted(options)}, nullable=nullable)


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
    "function-plain": _plain_function,
    "lax-or-strict": _branch("strict_schema"),
    "json-or-python": _branch("json_schema"),
    "chain": _branch("steps"),
    "custom-error": _branch("schema"),
    "union": _union,
    "tagged-union": _union,
    "model": _model,
    "dataclass": _dataclass,
    "typed-dict": _typed_dict,
    "list": _list,
    "deque": _deque,
    "tuple": _tuple,
    "set": _set,
    "frozenset": _set,
    "dict": _dict,
    "ordered-dict": _dict,
    "counter": _dict,
    "none": _none,
    "int": _int,
    "float": _float,
    "bool": _bool,
    "str": _str,
    "bytes": _bytes,
    "date": _date,
    "time": _time,
    "datetime": _datetime,
    "timedelta": _timedelta,
    "decimal": _decimal,
    "complex": _text,
    "fraction": _text,
    "uuid": _uuid,
    "url": _text,
    "multi-host-url": _text,
    "json": _json_string,
    "literal": _literal,
    "enum": _enum,
}

# What each kind of schema may say and polars can judge, or need not: whatever else it says is pydantic's to judge.
_SILENT = {"type", "ref", "metadata", "serialization", "strict", "fail_fast", "microseconds_precision", "coerce_numbers_to_str"}
_SIZED = {"items_schema", "keys_schema", "values_schema", "variadic_item_index", "min_length", "max_length"}
_SAYS: dict[str, set[str]] = {
    "int": {*BOUNDS, "multiple_of"},
    "float": {*BOUNDS, "multiple_of", "allow_inf_nan"},
    "bool": set(),
    "str": {"min_length", "max_length", "pattern", "strip_whitespace", "to_lower", "to_upper", "regex_engine"},
    "bytes": {"min_length", "max_length"},
    "date": {*BOUNDS, "now_op", "now_utc_offset"},
    "datetime": {*BOUNDS, "now_op", "now_utc_offset", "tz_constraint"},
    "timedelta": set(BOUNDS),
    "decimal": {*BOUNDS, "multiple_of", "max_digits", "decimal_places", "allow_inf_nan"},
    "uuid": {"version"},
    "literal": {"expected"},
    "enum": {"cls", "members", "sub_type", "missing"},
    "list": _SIZED,
    "tuple": _SIZED,
    "set": _SIZED,
    "frozenset": _SIZED,
    "dict": _SIZED,
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
        if node.name == "timedelta":
            lower, upper = (None if bound is None else bound // values.MICROSECOND for bound in (lower, upper))
        if node.dtype == pl.Int64() and ((lower is not None and lower >= 2**63) or (upper is not None and upper < -(2**63))):
            scope.refuse(f"the bounds admit nothing that fits 64 bits ({spelled(constraints)})", "widen them, or use str")
    if constraints.get("min_length", 0) > constraints.get("max_length", math.inf):
        scope.refuse(f"the lengths admit nothing ({spelled(constraints)})", "swap or widen them")
    return node


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
