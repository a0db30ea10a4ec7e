"""Language models behind any OpenAI-compatible endpoint, as a resource of agents: `mao.LLM`. The extra `[llm]`."""

import importlib.util
import os
import threading
import warnings
from collections.abc import Generator, Mapping
from typing import Any, TypeVar
from urllib.parse import urlsplit

import dagster as dg
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from dagster_mao.agent import current
from dagster_mao.errors import WiringError
from dagster_mao.gateway import usage
from dagster_mao.integrations._conversation import Conversation, OutputMode, Reply, Request, content_of, taken_from
from dagster_mao.integrations._frozen import FrozenAnswers, digest_of

M = TypeVar("M", bound=BaseModel)

OPENAI = "https://api.openai.com/v1"
_MILLION = 1_000_000
_NOTHING_FROZEN = "no-frozen-answers"  # a folder that is not there
_OWN = frozenset({"messages", "model", "n", "response_format", "seed", "stream", "temperature", "tool_choice", "tools"})


class LLM(dg.ConfigurableResource[Any]):
    """A language model behind an OpenAI-compatible endpoint, which answers with records of a contract.

    An agent takes it as a keyword-only parameter; in Dagster it is a resource, elsewhere `mao.run(resources={"llm": mao.LLM(…)})`. The
    model that an agent declares (`@mao.agent(model=…)`) is the one that is asked, else the resource's.

    What a call used is told to the gateway. Errors: `mao.TransientError` for what the gateway may try again (429, 5xx, silence, a cut
    connection, garbage), with the seconds that the endpoint asked to wait; `mao.LLMRequestError` for what it may not (401, 400 …);
    `mao.MalformedAnswerError` when the answers kept breaking the contract.
    """

    model_config = ConfigDict(hide_input_in_errors=True, extra="forbid")

    model: str = Field(default="", description="The model to ask where the agent declares none.")
    base_url: str = Field(default=OPENAI, description="The endpoint, up to before `/chat/completions`.")
    api_key: str = Field(
        default="",
        repr=False,
        exclude=True,  # from dumps, and so from digests
        json_schema_extra={"dagster__is_secret": True},
        description='The key of the endpoint: `dg.EnvVar("OPENAI_API_KEY")`. Nothing is taken from the environment unasked.',
    )
    temperature: float | None = Field(default=0.0, description="None sends none: some models take no other than their own.")
    seed: int | None = Field(default=None, description="Sent with each request, where the endpoint knows seeds.")
    parameters: dict[str, Any] = Field(default={}, description='More of the request\'s parameters, as in {"max_tokens": 500}.')
    output_mode: OutputMode = Field(
        default="schema",
        description="How the model is told the contract: as the JSON `schema` of its response, as the parameters of a `tool` that it must "
        "call, or in the `prompt`.",
    )
    strict: bool = Field(default=False, description="Ask for the endpoint's strict mode. Not every contract can be asked for so.")
    corrections: int = Field(default=2, ge=0, description="How often a malformed answer is given back to the model, with what is wrong.")
    timeout: float = Field(default=120.0, gt=0, description="Seconds of silence after which a request is given up.")
    input_price: float = Field(default=0.0, ge=0, description="Of a million input tokens, in the currency of all costs.")
    output_price: float = Field(default=0.0, ge=0, description="Of a million output tokens.")
    send_personal: bool = Field(
        default=False, description="Whether this endpoint may be sent the fields marked `mao.Personal`; else they are masked."
    )
    frozen: str = Field(
        default="",
        description="A folder of frozen answers. They are all there is: neither endpoint nor key are used, a missing one is an error.",
    )
    record: bool = Field(default=False, description="Ask the endpoint for answers that are missing in `frozen`, and freeze them.")

    _endpoint: Any = PrivateAttr(default=None)
    _lock: Any = PrivateAttr(default_factory=threading.Lock)

    def model_post_init(self, context: Any, /) -> None:
        """Refuses, when the code is loaded, what could not work."""
        super().model_post_init(context)
        if own := sorted(_OWN.intersection(self.parameters)):
            raise WiringError(f"`parameters` of an LLM has {own[0]!r}", field="parameters", fix=f"{own[0]!r} is not set there")
        if not isinstance(self.base_url, dg.EnvVar) and "@" in urlsplit(self.base_url).netloc:
            raise WiringError("The `base_url` of an LLM holds a password", field="base_url", fix="give it as api_key=dg.EnvVar(…)")
        if self.record and not self.frozen:
            raise WiringError("An LLM is to record answers, and nothing says where", field="frozen", fix="name a folder: frozen=…")
        if (self.record or not self.frozen) and importlib.util.find_spec("openai") is None:
            raise WiringError("An LLM needs the client of the extra [llm]", field="llm", fix='pip install "dagster-mao[llm]"')

    async def ask(
        self,
        contract: type[M],
        instructions: str,
        *about: Any,
        given: Mapping[str, Any] | None = None,
        model: str | None = None,
        temperature: float | None = None,
        seed: int | None = None,
    ) -> M:
        """A record of the contract, made by a model that was told the instructions and what they are about.

        `about`: records, lists of records, or text. Records are sent as JSON, what is marked `mao.Personal` as "***" (unless
        `send_personal`); text is sent as it is. The model fills in the fields of the contract but for those in `given`, whose values are
        taken as they are, and for the key, which is that of the first record in `about` that has it. Neither can be changed by the model.

        A reply that breaks the contract is given back, with what is wrong, `corrections` times. Raises what the class says;
        `AnswerNotFrozenError` for a missing frozen answer; pydantic's `ValidationError` when it is `given` or the key that breaks the
        contract; `WiringError` when nothing says the key, or which model to ask.
        """
        turns = self._turns(contract, instructions, about, given, model, temperature, seed)
        try:
            request = next(turns)
            while True:
                request = turns.send(await self._live().apost(*request))
        except StopIteration as answered:
            return answered.value  # type: ignore[no-any-return]

    def ask_sync(
        self,
        contract: type[M],
        instructions: str,
        *about: Any,
        given: Mapping[str, Any] | None = None,
        model: str | None = None,
        temperature: float | None = None,
        seed: int | None = None,
    ) -> M:
        """As `ask`, for agents that are not async."""
        turns = self._turns(contract, instructions, about, given, model, temperature, seed)
        try:
            request = next(turns)
            while True:
                request = turns.send(self._live().post(*request))
        except StopIteration as answered:
            return answered.value  # type: ignore[no-any-return]

    def _turns(
        self,
        contract: type[M],
        instructions: str,
        about: tuple[Any, ...],
        given: Mapping[str, Any] | None,
        model: str | None,
        temperature: float | None,
        seed: int | None,
    ) -> Generator[tuple[dict[str, Any], dict[str, str]], Reply, M]:
        """Requests to be made, as bodies and headers, until a reply is the record."""
        caller, context = current()
        fixed = taken_from(contract, about, given or {})
        request = Request(
            model=model or (caller.model if caller else None) or self._value("model") or self._unnamed(),
            mode=self.output_mode,
            strict=self.strict,
            temperature=self.temperature if temperature is None else temperature,
            seed=self.seed if seed is None else seed,
            parameters=self.parameters,
        )
        body = request.body(contract, fixed, instructions, content_of(about, send_personal=self.send_personal))
        conversation = Conversation(contract, fixed, turns=1 + self.corrections, mode=self.output_mode, body=body)
        call, frozen = getattr(context, "idempotency_key", None), FrozenAnswers(self._value("frozen")) if self.frozen else None
        while True:
            body, digest = conversation.body, digest_of(conversation.body)
            reply = frozen.find(contract.__name__, digest) if frozen else None
            if reply is not None:
                usage(model=reply.model, input_tokens=0, output_tokens=0)  # nothing was used, which is known
            elif frozen and not self.record:
                raise frozen.missing(contract.__name__, digest)
            else:
                if frozen:
                    frozen.prepare()
                # One call may ask several things: what is asked is part of the key.
                reply = yield body, {"Idempotency-Key": f"{call}-{digest[:12]}"} if call else {}
                self._tell(reply)
                if frozen:
                    frozen.keep(contract.__name__, digest, body, reply)
            if (record := conversation.take(reply)) is not None:
                return record

    def _tell(self, reply: Reply) -> None:
        cost = (reply.input_tokens * self.input_price + reply.output_tokens * self.output_price) / _MILLION
        usage(model=reply.model, input_tokens=reply.input_tokens, output_tokens=reply.output_tokens, cost=cost)

    def _unnamed(self) -> str:
        raise WiringError("Nothing says which model to ask", field="model", fix='@mao.agent(model="…"), or mao.LLM(model="…")')

    # -- what it is made of --------------------------------------------------------------------------------------------------------------

    def _value(self, name: str) -> Any:
        """A setting; outside of Dagster, which does so itself, an environment variable is looked up here."""
        value = getattr(self, name)
        if not isinstance(value, dg.EnvVar):
            return value
        if (found := os.environ.get(value.env_var_name)) is None:
            raise WiringError(f"The environment variable {value.env_var_name!r} is not set", field=name, fix="set it")
        return found

    def _live(self) -> Any:
        with self._lock:
            if self._endpoint is None:
                # The client takes most of a second to import: steps that ask a model pay for it.
                from dagster_mao.integrations._endpoint import Endpoint

                self._endpoint = Endpoint(self._value("base_url"), self._value("api_key"), self.timeout)
            return self._endpoint

    def __mao_config__(self) -> dict[str, Any]:
        """What of the configuration makes an answer another one. Not the key, so that a new one is no reason to pay again."""
        names = ("model", "base_url", "temperature", "seed", "parameters", "output_mode", "strict", "send_personal")
        frozen = FrozenAnswers(self._value("frozen")).digest() if self.frozen and not self.record else None
        return {**{name: self._value(name) for name in names}, "frozen": frozen}

    def __mao_frozen__(self) -> "LLM":
        """The same model, of which only frozen answers are to be had: for replays, which ask nobody. Without a folder all are missing."""
        settings = {name: getattr(self, name) for name in type(self).model_fields}
        return _made(type(self), {**settings, "record": False, "frozen": self.frozen or _NOTHING_FROZEN})

    def get_resource_definition(self) -> Any:
        """In Dagster: what it makes of the resource, when the code location loads."""
        if self.api_key and not isinstance(self.api_key, dg.EnvVar):
            what = "The api_key of an LLM is written down: the UI masks it, and Dagster's snapshots of jobs keep it"
            warnings.warn(f'{what}. Fix: api_key=dg.EnvVar("…")', stacklevel=2)
        return super().get_resource_definition()

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """In Dagster: imports the client before the first call, whose timeout would pay for it."""
        if not self.frozen or self.record:
            self._live()

    def teardown_after_execution(self, context: dg.InitResourceContext) -> None:
        """In Dagster: closes the connections."""
        with self._lock:
            if self._endpoint is not None:
                self._endpoint.close()

    def __reduce__(self) -> Any:
        # For a child process: settings travel, connections do not.
        return (_made, (type(self), {name: getattr(self, name) for name in type(self).model_fields}))


def _made(cls: type[LLM], settings: dict[str, Any]) -> LLM:
    return cls(**settings)
