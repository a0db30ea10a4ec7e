"""A question to a model and the turns until its answer: what is sent, and what is made of what comes back. No network here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, Literal, NamedTuple, NoReturn, TypeVar

from pydantic import BaseModel, ValidationError

from dagster_mao.contract import Contract, FromFallback, Key, by_name, has_personal, hide
from dagster_mao.errors import MalformedAnswerError, WiringError

M = TypeVar("M", bound=BaseModel)
OutputMode = Literal["schema", "tool", "prompt"]

_TOOL = "answer"
_ROOT = "record"  # where an error is said to be that belongs to no field


class Reply(NamedTuple):
    """What came back for one request. `text` is the answer as it was written; `refused`, that the model would not give one."""

    text: str
    model: str | None = None
    input_tokens: int = 0
    output_tokens: int = 0
    cut: bool = False  # at the limit of tokens
    refused: bool = False


class Conversation(Generic[M]):
    """One question, until a reply is a record of the contract.

    `body` is what to send next, as the endpoint takes it; `take` is told what came back.
    """

    def __init__(self, contract: type[M], given: Mapping[str, Any], *, turns: int, mode: OutputMode, body: Mapping[str, Any]) -> None:
        self._contract, self._given, self._turns, self._mode = contract, given, turns, mode
        self._withheld = withheld(contract, given)
        self._taken = 0
        self._body = dict(body)

    @property
    def body(self) -> dict[str, Any]:
        return self._body

    def take(self, reply: Reply) -> M | None:
        """The record; None where the reply is none, and `body` now says why it is not.

        Raises `MalformedAnswerError` when there are no turns left or the model refused, and pydantic's `ValidationError` when it is
        what the author gave that breaks the contract, which no further turn would mend.
        """
        self._taken += 1
        made = self._made(reply)
        if not isinstance(made, _Malformed):
            return made
        if reply.refused or self._taken >= self._turns:
            raise self._given_up(made)
        self._body = {**self._body, "messages": [*self._body["messages"], *self._correction(reply, made.said)]}
        return None

    def _made(self, reply: Reply) -> M | _Malformed:
        if reply.refused:
            return _Malformed("it refused to answer", "")
        answered = parsed(reply.text)
        if answered is None and reply.cut:
            return _Malformed("cut off at the limit of tokens", "Your answer was cut off. Answer again, and be shorter.")
        if answered is None:
            return _Malformed("no JSON object", "Your answer is no JSON object. Answer again, with one JSON object and nothing else.")
        data = {**{name: value for name, value in answered.items() if name not in self._withheld}, **self._given}
        try:
            # By the names that the schema spoke of. What came as JSON has no dates: a strict contract is about records, not about this.
            return self._contract.model_validate(data, strict=False, by_alias=False, by_name=True)
        except ValidationError as error:
            if any(one["loc"] and one["loc"][0] in self._given for one in error.errors(include_url=False, include_input=False)):
                raise
            return self._broken(error)

    def _broken(self, error: ValidationError) -> _Malformed:
        told, said = dict[str, None](), list[str]()
        fields = self._contract.model_fields
        for one in error.errors(include_url=False, include_context=False, include_input=False):
            # A location may be a word of the model's: an extra field, the key of a mapping.
            where = one["loc"][0] if one["loc"] and one["loc"][0] in fields else _ROOT
            told[f"{where}: {one['type']}"] = None
            # A validator of the whole record may quote what the author gave, and the model was not sent.
            message = "the record as a whole breaks a rule" if not one["loc"] and self._quotes_personal() else one["msg"]
            said.append(f"- {'.'.join(map(str, one['loc'])) or _ROOT}: {message}")
        rules = "\n".join(said)
        return _Malformed("; ".join(told), f"Your answer is not valid:\n{rules}\nAnswer again, with the whole JSON object.")

    def _quotes_personal(self) -> bool:
        fields = by_name(_described(self._contract))
        return any(has_personal(fields[name]) for name in self._given)

    def _correction(self, reply: Reply, said: str) -> list[dict[str, Any]]:
        """The reply and what is wrong with it, as further messages."""
        answered = parsed(reply.text)
        text = reply.text if answered is None else written(answered)
        if self._mode != "tool":
            return [{"role": "assistant", "content": text}, {"role": "user", "content": said}]
        call = f"{_TOOL}-{self._taken}"
        function = {"name": _TOOL, "arguments": text}
        return [
            {"role": "assistant", "tool_calls": [{"id": call, "type": "function", "function": function}]},
            {"role": "tool", "tool_call_id": call, "content": said},
        ]

    def _given_up(self, malformed: _Malformed) -> MalformedAnswerError:
        turns = "one turn" if self._taken == 1 else f"{self._taken} turns"
        return MalformedAnswerError(
            f"{self._body['model']} did not answer with a {self._contract.__name__} in {turns} ({malformed.told})",
            fix="say in the instructions what it gets wrong, allow more `corrections`, loosen the contract, or ask another model",
        )


class _Malformed(NamedTuple):
    """A reply that is no record: what is `told` in an error, without its values, and what is `said` to the model."""

    told: str
    said: str


# -- what is sent ------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """How a question is put to the endpoint: everything but the question."""

    model: str
    mode: OutputMode
    strict: bool
    temperature: float | None
    seed: int | None
    parameters: Mapping[str, Any]

    def body(self, contract: type[BaseModel], given: Iterable[str], instructions: str, content: str) -> dict[str, Any]:
        """The body of the first request."""
        schema = asked(contract, frozenset(given), self.strict)
        system = instructions
        if self.mode == "prompt":
            system += f"\n\nAnswer with one JSON object and nothing else. Its JSON schema is:\n{written(schema)}"
        messages = [{"role": "system", "content": system}, {"role": "user", "content": content}]
        return {
            "model": self.model,
            "messages": messages if content else [{"role": "user", "content": system}],
            **self._answered_by(contract, schema),
            **({} if self.temperature is None else {"temperature": self.temperature}),
            **({} if self.seed is None else {"seed": self.seed}),
            **self.parameters,
        }

    def _answered_by(self, contract: type[BaseModel], schema: Mapping[str, Any]) -> dict[str, Any]:
        if self.mode == "schema":
            described = {"name": contract.__name__, "schema": schema, "strict": self.strict}
            return {"response_format": {"type": "json_schema", "json_schema": described}}
        if self.mode == "tool":
            function = {"name": _TOOL, "description": f"The answer: a {contract.__name__}.", "parameters": schema, "strict": self.strict}
            choice = {"type": "function", "function": {"name": _TOOL}}
            return {"tools": [{"type": "function", "function": function}], "tool_choice": choice}
        return {"response_format": {"type": "json_object"}}


def content_of(inputs: Sequence[Any], *, send_personal: bool) -> str:
    """The inputs as the text of a message: records as JSON under the name of their contract, text as it is."""
    return "\n\n".join(_shown(value, send_personal) for value in inputs)


def _shown(value: Any, send_personal: bool) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, BaseModel):
        return f"{type(value).__name__}:\n{written(_sendable(value, send_personal))}"
    if isinstance(value, Sequence) and value and all(isinstance(one, BaseModel) for one in value):
        return f"{type(value[0]).__name__}, {len(value)} of them:\n{written([_sendable(one, send_personal) for one in value])}"
    raise WiringError(
        f"A model is asked about a {type(value).__name__}",
        field="inputs",
        fix="give records of a contract, lists of them, or text",
    )


def _sendable(record: BaseModel, send_personal: bool) -> Any:
    """The record's fields, by name. What is computed from them is left out: it may tell what is masked."""
    dumped = record.model_dump(mode="json", by_alias=False, exclude_computed_fields=True)
    return dumped if send_personal else hide(_described(type(record)), dumped)


@lru_cache(maxsize=256)
def _described(contract: type[BaseModel]) -> dict[str, Any]:
    return Contract.of(contract).describe()


# -- what a model is asked for -----------------------------------------------------------------------------------------------------------


def taken_from(contract: type[BaseModel], inputs: Sequence[Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """What the author gave, and the key, which is that of the record asked about.

    Raises `WiringError` for what is no field of the contract, and when nothing says what the key is.
    """
    if alien := next((name for name in given if name not in contract.model_fields), None):
        raise WiringError(f"`given` names {alien!r}, which {contract.__name__} does not have", field=alien, fix="name a field of it")
    key = next((name for name, info in contract.model_fields.items() if Key in info.metadata), None)
    if key is None or key in given:
        return dict(given)
    for one in inputs:
        if isinstance(one, BaseModel) and key in type(one).model_fields:
            return {key: getattr(one, key), **given}
    raise WiringError(
        f"Nothing says the key of the {contract.__name__} that a model is asked for",
        field=key,
        fix=f"ask about a record that has {key!r}, or say it: given={{{key!r}: …}}. A model is never asked for a key",
    )


def withheld(contract: type[BaseModel], given: Iterable[str]) -> frozenset[str]:
    """The names that are not the model's to fill in, those of aliases among them."""
    names = {*given, *_set_by_platform(contract)}
    aliases = {alias for name in names for alias in (contract.model_fields[name].alias, contract.model_fields[name].validation_alias)}
    return frozenset(names | {alias for alias in aliases if isinstance(alias, str)})


def _set_by_platform(contract: type[BaseModel]) -> set[str]:
    return {name for name, info in contract.model_fields.items() if FromFallback in info.metadata}


@lru_cache(maxsize=256)
def asked(contract: type[BaseModel], given: frozenset[str], strict: bool) -> dict[str, Any]:
    """The JSON schema of what is left for the model to fill in. Raises `WiringError` when nothing is."""
    schema = contract.model_json_schema(by_alias=False)
    schema = {**schema.get("$defs", {}).get(contract.__name__, {}), **schema} if "$ref" in schema else schema
    names = [name for name in contract.model_fields if name not in given and name not in _set_by_platform(contract)]
    if not names:
        raise WiringError(f"A model is asked for a {contract.__name__}, all of whose fields are given", field="given", fix="give fewer")
    properties = {name: schema["properties"][name] for name in names}
    made = {
        **{word: value for word, value in schema.items() if word not in {"$ref", "$defs", "properties", "required"}},
        "properties": properties,
        "required": [name for name in schema.get("required", []) if name in properties],
    }
    definitions = _needed(properties, schema.get("$defs", {}))
    made = {"$defs": definitions, **made} if definitions else made
    return _strict(made) if strict else made


def _needed(part: Any, definitions: Mapping[str, Any]) -> dict[str, Any]:
    """The definitions that a part of the schema refers to, at any depth."""
    needed, parts = dict[str, Any](), [part]
    while parts:
        one = parts.pop()
        if isinstance(one, Mapping):
            name = str(one.get("$ref", "")).removeprefix("#/$defs/")
            if name in definitions and name not in needed:
                needed[name] = definitions[name]
                parts.append(definitions[name])
            parts.extend(one.values())
        elif isinstance(one, list):
            parts.extend(one)
    return {name: needed[name] for name in definitions if name in needed}


def _strict(part: Any) -> Any:
    """The schema as an endpoint's strict mode wants it: every field is there, and no other."""
    if isinstance(part, list):
        return [_strict(one) for one in part]
    if not isinstance(part, Mapping):
        return part
    made = {word: _strict(value) for word, value in part.items()}
    if isinstance(part.get("properties"), Mapping) and part.get("type") == "object":
        for field in made["properties"].values():
            field.pop("default", None)
        made |= {"required": list(part["properties"]), "additionalProperties": False}
    return made


# -- JSON --------------------------------------------------------------------------------------------------------------------------------


def written(value: Any) -> str:
    """Compact JSON of a value, the same for the same value."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    # A model may write half of a surrogate pair, which no UTF-8 can hold.
    return text.encode("utf-8", "replace").decode()


def parsed(text: str) -> dict[str, Any] | None:
    """The JSON object in a model's text: all of it, or what stands between other words. None when there is none."""
    for candidate in (text, text[text.find("{") : text.rfind("}") + 1]):
        try:
            value = json.loads(candidate, parse_constant=_refused)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    return None


def _refused(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
