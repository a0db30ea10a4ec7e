"""A contract: a pydantic model, compiled once into the column types and the rules that a batch of its records keeps."""

from __future__ import annotations

import datetime as dt
import hashlib
import inspect
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property, partial
from typing import Annotated, Any, Generic, TypeVar, cast

import polars as pl
from pydantic import AliasChoices, BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import PydanticUndefined, SchemaValidator, to_jsonable_python

from dagster_mao.contract._check import Judge, check, conformed, rule_of, schema_failures, sift
from dagster_mao.contract._evolve import upgraded
from dagster_mao.contract._json import dumped, loaded, restoring
from dagster_mao.contract._markers import FromFallback, Key
from dagster_mao.contract._rules import Rule, rules_of
from dagster_mao.contract._types import Field, Type, definitions_of, dtype_text, fields_of, has_model_validators, modes_of
from dagster_mao.contract._values import EXTRAS, MICROSECOND, UndecodableError, decode_struct, encoded
from dagster_mao.contract._verdict import MASK, Refused, RuleFailure, Sifted, Verdict, plain, text_of
from dagster_mao.errors import ContractDefinitionError, InvalidRecordsError

M = TypeVar("M", bound=BaseModel)
CHUNK = 10_000  # records turned into columns at a time
_OF_TEXT = {"str_strip_whitespace", "str_to_lower", "str_to_upper", "coerce_numbers_to_str"}  # config that makes another key of a text

_contracts: dict[type[BaseModel], Contract[Any]] = {}


class Contract(Generic[M]):
    """What both sides of a boundary hold a batch to. Make one with `Contract.of(Model)`.

    Attributes: the pydantic `model`; its `name`; its `version` (the model's `__contract_version__`, "1" if it has none); `key`, the field
    marked `mao.Key`, or None; `personal`, the fields marked `mao.Personal` and those that hold a secret; `from_fallback`, the field marked
    `mao.FromFallback`, or None; `schema`, the exact column types, in field order; `fields`, the same as a tree with the constraints;
    `closed`, whether extra="forbid" refuses columns that it has not.

    Columns have the names of the fields, whatever their aliases. What extra="allow" lets in is one more column, `model_extra`. Computed
    fields are no columns: they follow from what is there, and are computed again when it is read.
    """

    def __init__(self, model: type[M]) -> None:
        if not (isinstance(model, type) and issubclass(model, BaseModel) and model is not BaseModel):
            raise ContractDefinitionError(f"{model!r} is no contract", fix="annotate with a pydantic BaseModel of your own")
        model.model_rebuild()
        self.model = model
        self.name = model.__name__
        self.version = getattr(model, "__contract_version__", "1")
        if not isinstance(self.version, str):
            raise ContractDefinitionError(f"contract {self.name}: its version is no text", fix='write __contract_version__ = "2"')
        self.fields = fields_of(model)
        self.key = self._key()
        self.from_fallback = self._from_fallback()
        self.closed = model.model_config.get("extra") == "forbid"
        self.personal = frozenset(f.name for f in self.fields if f.personal)
        self.schema = pl.Schema({f.name: f.type.dtype for f in self.fields})
        self.judges = tuple(_judges(model, self.fields))
        judged = {column for judge in self.judges for column in judge.columns}
        self.rules: tuple[Rule, ...] = tuple(rule for f in self.fields for rule in rules_of(f, decided=f.name not in judged))

    @classmethod
    def of(cls, model: type[M]) -> Contract[M]:
        """The contract of a model; the same object for the same model.

        Raises ContractDefinitionError, naming field and fix: two keys, a key that is not str or int, a type that no Delta column can hold,
        constraints that admit nothing.
        """
        if model not in _contracts:
            _contracts[model] = cls(model)
        return _contracts[model]

    def __repr__(self) -> str:
        return f"Contract({self.name}, version {self.version!r}, {len(self.fields)} fields)"

    def __reduce__(self) -> Any:
        return (Contract.of, (self.model,))

    def field(self, name: str) -> Field:
        """The field of that name. Raises KeyError."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Field]:
        return {f.name: f for f in self.fields}

    def _key(self) -> str | None:
        keys = [name for name, info in self.model.model_fields.items() if Key in info.metadata]
        if len(keys) > 1:
            raise ContractDefinitionError(
                f"contract {self.name}: two keys, {keys[0]!r} and {keys[1]!r}", field=keys[1], fix="mark one field with mao.Key"
            )
        for name in keys:
            kind = next(f.type for f in self.fields if f.name == name)
            if kind.name not in {"str", "int"} or kind.nullable:
                what = "optional" if kind.nullable else f"of type {kind.name}"
                raise ContractDefinitionError(
                    f"contract {self.name}: its key is {what}", field=name, fix="make the key a str or an int, always present"
                )
        return keys[0] if keys else None

    def _from_fallback(self) -> str | None:
        names = [name for name, info in self.model.model_fields.items() if FromFallback in info.metadata]
        if len(names) > 1:
            what = f"contract {self.name}: {names[0]!r} and {names[1]!r} both say what the fallback answered"
            raise ContractDefinitionError(what, field=names[1], fix="mark one field with mao.FromFallback")
        for name in names:
            kind = next(f.type for f in self.fields if f.name == name)
            if kind.name != "bool" or kind.nullable:
                fix = f"write `{name}: Annotated[bool, mao.FromFallback] = False`"
                raise ContractDefinitionError(f"contract {self.name}: a yes or no that is no bool", field=name, fix=fix)
        return names[0] if names else None

    # --- what it says ------------------------------------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """The contract as JSON-able data: name, version, key, fields with types and constraints, and whether validators judge too.

        Where there are any: `default` of a field (without one it is required), `modes` of validators, `description`s, `from_fallback`.
        """
        core: Any = self.model.__pydantic_core_schema__
        modes = modes_of(core, definitions_of(core))
        return {
            **({"description": inspect.cleandoc(self.model.__doc__)} if self.model.__doc__ else {}),
            **({"modes": list(modes)} if modes else {}),
            "name": self.name,
            "version": self.version,
            "key": self.key,
            "fields": [_describe_field(f) for f in self.fields],
            "validators": bool(self.judges),
            **({"from_fallback": self.from_fallback} if self.from_fallback else {}),
        }

    @cached_property
    def hash(self) -> str:
        """sha256 (hex) over what the contract demands: no descriptions, nothing that changes with a release of Python or pydantic."""
        canonical = json.dumps(_without_descriptions(self.describe()), sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode()).hexdigest()

    # --- what it does ------------------------------------------------------------------------------------------------------------------

    def check(self, frame: pl.LazyFrame | pl.DataFrame, *, samples: int = 5, exact: bool = False) -> Verdict:
        """Judge a batch: columns, every rule, the key's uniqueness. Up to `samples` records are shown per broken rule.

        The verdict on a row is pydantic's verdict on the record. A column has the declared type exactly, or holds nothing but nulls in a
        field that may be null. `exact` refuses columns that the contract does not have, as a model with extra="forbid" does anyway. A batch
        that passes is read once, streaming, so it may be larger than memory; with validators that pydantic must run, once more, in chunks.
        It changes no value.
        """
        return check(self, frame, samples, exact)

    def select(self, frame: pl.LazyFrame) -> pl.LazyFrame:
        """The contract's own columns, in its order. Raises InvalidRecordsError when one is missing or of another type."""
        present = frame.collect_schema()
        if wrong := schema_failures(self, present, exact=False):
            raise InvalidRecordsError(
                f"contract {self.name}: {wrong[0][0]}", field=wrong[0][1], fix="bring the columns that the contract declares"
            )
        return conformed(frame, present, self.schema).select(self.schema.names())

    def upgrade(self, frame: pl.LazyFrame, recorded: Mapping[str, Any]) -> pl.LazyFrame:
        """Rows sealed under the contract that `recorded` describes, as rows of this one: its columns, in its order, exactly typed.

        What the rows lack is filled in with the fields' defaults, what this contract has not is left out, at any depth. No value changes.
        Raises IncompatibleContractError, naming field and reason, when they cannot be read: a field without a default is missing, a type or
        the key is another, or no value that the one allows passes the other. Bounds that are only narrower are for `check` to judge, with
        the rows.
        """
        return upgraded(self, frame, recorded)

    def to_frame(self, records: Iterable[M | Mapping[str, Any]]) -> pl.DataFrame:
        """Records as columns of the exact schema.

        Mappings are validated by pydantic on the way; models are taken as they are, for `check` to judge. Raises InvalidRecordsError naming
        position and field (never the value) of a record that pydantic refuses or that a column cannot hold.
        """
        frames, position, rest = [], 0, iter(records)
        while chunk := list(itertools.islice(rest, CHUNK)):
            frames.append(self._chunk(chunk, position))
            position += len(chunk)
        return pl.concat(frames, rechunk=True) if frames else pl.DataFrame(schema=self.schema)

    def sift(self, frame: pl.LazyFrame | pl.DataFrame, *, samples: int = 5, exact: bool = False) -> Sifted:
        """Part a batch into the records that keep the contract and the others, with the rules that each of them broke.

        The verdict is `check`'s, and so are the arguments. Every row of a doubled key is broken. Where the columns themselves are wrong (a
        failure whose rule begins with "schema:") no row can be told from another: both sides are empty. A batch that passes costs what
        `check` costs; the broken rows are held in memory, the valid ones are not.
        """
        return sift(self, frame, samples, exact)

    def sift_records(self, records: Iterable[Any]) -> tuple[pl.DataFrame, list[Refused]]:
        """Records as columns of the exact schema, as `to_frame` makes them, and, apart, those that cannot be rows, with their reasons.

        Of the rows, `sift` is still to judge: models are taken as they are.
        """
        frames, refused, position, rest = [pl.DataFrame(schema=self.schema)], list[Refused](), 0, iter(records)
        while chunk := list(itertools.islice(rest, CHUNK)):
            try:
                frames.append(self._chunk(chunk, position))
            except Exception:
                # One of them is no row (or its validator crashed): each by itself, then.
                made = list[M]()
                for i, record in enumerate(chunk, position):
                    model, refusals = self._model_of(record)
                    if model is not None and not refusals:
                        made.append(model)
                    else:
                        rules = tuple(sorted({rule for rule, _ in refusals}))
                        refused.append(Refused(i, self.key_of(record), rules, text_of(record)))
                if made:
                    frames.append(self._chunk(made, position))
            position += len(chunk)
        return pl.concat(frames, rechunk=True), refused

    def check_records(self, records: Iterable[Any], *, samples: int = 5) -> Verdict:
        """Judge records before they are columns: everything that `to_frame` would refuse, by rule, not only the first.

        Of the rest, `check` judges the frame. Samples as there: up to `samples` per rule, personal values masked.
        """
        counts: Counter[tuple[str, str | None]] = Counter()
        shown: dict[tuple[str, str | None], list[dict[str, Any]]] = {}
        rows = failed = 0
        for record in records:
            _, refusals = self._model_of(record)
            counts.update(refusals)
            for refusal in refusals:
                if counts[refusal] <= samples:
                    shown.setdefault(refusal, []).append(self._sample(record, refusal[1]))
            rows, failed = rows + 1, failed + bool(refusals)
        failures = tuple(RuleFailure(rule, name, count, tuple(shown[rule, name])) for (rule, name), count in counts.items())
        return Verdict(self.name, rows, failed, failures)

    def rules_broken(self, error: ValidationError) -> tuple[str, ...]:
        """The names of the rules that pydantic found broken when somebody made this model, sorted. No value is in them."""
        return tuple(sorted({rule for rule, _ in self._rules_of(error)}))

    def _rules_of(self, error: ValidationError) -> list[tuple[str, str | None]]:
        """Rule and top-level field of everything that pydantic refused, each once."""
        return list(dict.fromkeys(rule_of(self.fields, e) for e in error.errors(include_url=False)))

    def parsed(self, text: str | bytes) -> M | None:
        """A record that was written as JSON, by the names of its fields or their aliases; None for what is none of this contract."""
        try:
            return self.model.model_validate_json(text, by_name=True, by_alias=True)
        except Exception:  # what a validator raises, too
            return None

    def _model_of(self, record: Any) -> tuple[M | None, list[tuple[str, str | None]]]:
        """The record as a model, and what keeps it from being a row."""
        model = record
        if isinstance(record, Mapping):
            try:
                model = self.model.model_validate(dict(record), by_name=True, by_alias=True)
            except ValidationError as refused:
                return None, self._rules_of(refused)
            except Exception as error:
                return None, [(f"record: {type(error).__name__}", None)]
        elif not isinstance(record, self.model):
            return None, [(f"record: {type(record).__name__}, not {self.name}", None)]
        return model, [(f"{f.name}: {why}", f.name) for f in self.fields if (why := _unfit(getattr(model, f.name, None), f.type))]

    def names_of(self, field: str) -> tuple[str, ...]:
        """Under which names a record may bring the field: its own, and its aliases. Raises KeyError."""
        info = self.model.model_fields[field]
        aliases = info.validation_alias.choices if isinstance(info.validation_alias, AliasChoices) else (info.validation_alias, info.alias)
        return (field, *(alias for alias in aliases if isinstance(alias, str)))

    def key_of(self, record: Any) -> Any:
        """The key of a record that may be no row, as it would be in one (of "7 " and 7.0, 7), so that it is known when it comes twice.

        None for what has none.
        """
        if self.key is None or not isinstance(record, (Mapping, BaseModel)):
            return None
        if isinstance(record, BaseModel):
            return getattr(record, self.key, None)
        came_in = next((record[name] for name in self.names_of(self.key) if name in record), None)
        try:
            return self._key_alone.validate_python(came_in)
        except Exception:  # what a validator raises, too
            return came_in

    @cached_property
    def _key_alone(self) -> TypeAdapter[Any]:
        info = self.model.model_fields[str(self.key)]
        annotated, parts = cast(Any, Annotated), (info.annotation, *info.metadata)
        config = {name: value for name, value in self.model.model_config.items() if name in _OF_TEXT}
        return TypeAdapter(annotated[parts], config=cast(ConfigDict, config))

    def _sample(self, record: Any, name: str | None) -> dict[str, Any]:
        values = record if isinstance(record, Mapping) else vars(record) if isinstance(record, BaseModel) else {}
        wanted = [one for one in dict.fromkeys((self.key, name)) if one in self._by_name and one in values]
        return {one: MASK if _hides(self._by_name[one]) else plain(values[one]) for one in wanted if one}

    def _chunk(self, chunk: Sequence[M | Mapping[str, Any]], start: int) -> pl.DataFrame:
        models = [r if isinstance(r, self.model) else self._validated(r, start + i) for i, r in enumerate(chunk)]
        return pl.DataFrame({f.name: self._column(f, models, start) for f in self.fields}, schema=self.schema)

    def _validated(self, record: Any, position: int) -> M:
        if isinstance(record, BaseModel) or not isinstance(record, Mapping):
            raise InvalidRecordsError(
                f"record {position} is a {type(record).__name__}, not a {self.name}", fix=f"hand in {self.name} models or dicts"
            )
        try:
            return self.model.model_validate(dict(record), by_name=True, by_alias=True)
        except ValidationError as refused:
            raise _refused(position, self.name, refused) from None

    def _column(self, field: Field, models: list[M], start: int) -> pl.Series:
        values = [getattr(m, field.name, None) for m in models]
        try:
            if not {type(v) for v in values} <= getattr(field.type.encode, "plain", frozenset()) | {type(None)}:
                return pl.Series(field.name, [encoded(v, field.type) for v in values], dtype=field.type.dtype, strict=True)
            return pl.Series(field.name, values, dtype=field.type.dtype, strict=True)
        except Exception:
            # The error of polars (text that is no UTF-8, say) would show the value.
            unfit = ((i, why) for i, v in enumerate(values) if (why := _unfit(v, field.type)))
            i, why = next(unfit, (0, f"does not fit the column type {dtype_text(field.type.dtype)}"))
            what = f"record {start + i} is no {self.name}: its {field.name} {why}"
            raise InvalidRecordsError(what, field=field.name, fix="correct the record, or the model") from None

    def from_frame(self, frame: pl.DataFrame) -> Iterator[M]:
        """The rows as validated models, one by one.

        Raises InvalidRecordsError: wrong columns, or a row that pydantic refuses, by position and field.
        """
        rows = self.select(frame.lazy()).collect()
        validate, (_, decode) = _validator(self.model), self._loading
        for position, row in enumerate(rows.iter_rows(named=True)):
            try:
                model = validate(row if decode is None else decode(row))
            except ValidationError as refused:
                raise _refused(position, self.name, refused) from None
            except UndecodableError as refused:
                what = f"record {position} is no {self.name}: {refused.rule}"
                raise InvalidRecordsError(what, field=refused.path, fix="correct the record, or the model") from None
            yield model

    def dump(self, record: M) -> bytes:
        """A record as JSON: what `load` makes of it is what a snapshot would give back. Not masked.

        Raises TypeError or ValueError for a record that cannot be a row.
        """
        return dumped({f.name: encoded(getattr(record, f.name, None), f.type) for f in self.fields})

    def load(self, data: bytes) -> M:
        """The record that `dump` wrote, validated. Raises InvalidRecordsError, naming no value, when it does not keep the contract."""
        restore, decode = self._loading
        try:
            row = loaded(data, restore)
            return cast(M, _validator(self.model)(row if decode is None else decode(row)))
        except ValidationError as refused:
            raise _refused(0, self.name, refused) from None
        except (UndecodableError, ValueError, ArithmeticError, AttributeError, TypeError) as error:
            what = f"what was kept is no {self.name} ({type(error).__name__})"
            raise InvalidRecordsError(what, fix="call the agent again") from None

    @cached_property
    def _loading(self) -> tuple[Any, Any]:
        return restoring(self.schema), decode_struct(self.fields)


def _hides(field: Field) -> bool:
    """Whether anything in the field is personal: what pydantic refused need not have the shape that says where."""
    nested = (field.type, *([field.type.item] if field.type.item else []))
    return field.personal or any(_hides(inner) for node in nested for inner in node.fields)


def _unfit(value: Any, node: Type) -> str | None:
    """Why the value is none of the column's; None where it is."""
    try:
        plain_value = encoded(value, node)
    except UnicodeError:
        return "holds bytes that are no UTF-8"  # the error's own text quotes some of them
    except (TypeError, ValueError, RecursionError) as error:
        return str(error)
    except Exception as error:
        return f"cannot be written ({type(error).__name__})"
    try:
        pl.Series([plain_value], dtype=node.dtype, strict=True)
    except Exception:
        return f"does not fit the column type {dtype_text(node.dtype)}"
    return None


def _refused(position: int, name: str, refused: ValidationError) -> InvalidRecordsError:
    error = refused.errors(include_input=False, include_context=False, include_url=False)[0]
    where = ".".join(str(step) for step in error["loc"])
    return InvalidRecordsError(
        f"record {position} is no {name}: {error['type']}", field=where or None, fix="correct the record, or the model"
    )


# --- pydantic as the judge -------------------------------------------------------------------------------------------------------------


def _validator(model: type[M]) -> Any:
    # The column types were compared exactly, so lax mode converts representations only: the text of a UUID, the value of an Enum. Columns
    # have the names of the fields, whatever the aliases.
    return partial(model.__pydantic_validator__.validate_python, strict=False, by_name=True, by_alias=False)


def _judges(model: type[BaseModel], fields: tuple[Field, ...]) -> Iterator[Judge]:
    """Who decides what polars cannot: nobody, one judge per such field, or one for the whole record where fields depend on each other."""
    core: Any = model.__pydantic_core_schema__
    definitions = definitions_of(core)
    while core["type"] in {"definitions", "definition-ref"}:
        core = core["schema"] if core["type"] == "definitions" else definitions[core["schema_ref"]]
    whole = core["type"] != "model" or has_model_validators(core) or any(f.name == EXTRAS for f in fields)
    if whole or any(_needs_siblings(f["schema"], definitions) for f in core["schema"]["fields"].values()):
        yield Judge(None, tuple(f.name for f in fields), decode_struct(fields), _validator(model), fields)
        return
    for field in fields:
        if not field.type.decided:
            schema: Any = core["schema"]["fields"][field.name]["schema"]
            if definitions:
                schema = {"type": "definitions", "schema": schema, "definitions": list(definitions.values())}
            validator = SchemaValidator(schema, core.get("config"))
            yield Judge(field.name, (field.name,), field.type.decode, _field_validator(validator), fields)


def _field_validator(validator: SchemaValidator) -> Any:
    return lambda value: validator.validate_python(value, strict=False, by_name=True, by_alias=False)


def _needs_siblings(schema: Any, definitions: Mapping[str, Any]) -> bool:
    """Whether a validator in this field takes `info`, and so may look at the fields before it. A nested model has its own."""
    if isinstance(schema, list):
        return any(_needs_siblings(s, definitions) for s in schema)
    if not isinstance(schema, dict) or schema.get("type") == "model":
        return False
    if schema.get("type") == "definition-ref":
        return _needs_siblings(definitions[schema["schema_ref"]], definitions)
    if str(schema.get("type", "")).startswith("function-") and schema["function"]["type"] == "with-info":
        return True
    return any(_needs_siblings(value, definitions) for key, value in schema.items() if key not in {"metadata", "serialization", "function"})


# --- describing ------------------------------------------------------------------------------------------------------------------------


def _describe_field(field: Field) -> dict[str, Any]:
    described = {"name": field.name, **_describe(field.type), "personal": field.personal}
    if field.default is not PydanticUndefined:
        shown = MASK if _hides(field) and field.default not in (None, [], {}) else field.default
        described["default"] = to_jsonable_python(shown, inf_nan_mode="strings", bytes_mode="base64", fallback=str)
    return described if field.description is None else {**described, "description": field.description}


def _describe(node: Type) -> dict[str, Any]:
    described: dict[str, Any] = {
        "type": node.name,
        "dtype": dtype_text(node.dtype),
        "nullable": node.nullable,
        "constraints": {name: _canonical(value, node) for name, value in node.constraints.items()},
        "validators": not node.exact,
    }
    if node.modes:
        described["modes"] = list(node.modes)
    if node.fields:
        described["fields"] = [_describe_field(f) for f in node.fields]
    if node.item is not None:
        described["items"] = _describe(node.item)
    if node.json:
        described["json"] = True
    if node.choices:
        described["choices"] = [_describe(choice) for choice in node.choices]
    return described


def _canonical(value: Any, node: Type) -> Any:
    if isinstance(value, list):
        return [plain(v) for v in value]
    if node.name == "float" and not isinstance(value, bool):
        value = float(value)
    return plain(value // MICROSECOND if isinstance(value, dt.timedelta) else value)


# `from_fallback` is the platform's to keep.
_NO_DEMANDS = {"description", "default", "modes", "from_fallback"}


def _without_descriptions(described: Any) -> Any:
    if isinstance(described, dict):
        # A default fills in what is not there; what is there is judged all the same.
        return {k: _without_descriptions(v) for k, v in described.items() if k not in _NO_DEMANDS}
    return [_without_descriptions(v) for v in described] if isinstance(described, list) else described
