"""What a model is asked, and what becomes of its answers."""

from __future__ import annotations

import asyncio
import datetime as dt
import json
import pickle
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, Literal

import dagster as dg
import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, computed_field, model_validator

import dagster_mao as mao
from dagster_mao.integrations import llm as llm_module
from tests.integrations.articles import ARTICLES, AUTHOR, BAD, GOOD, PROMPT, Article, Summary
from tests.integrations.llm_server import KEY, LLMServer, answer

ARTICLE = ARTICLES[0]
MODES: list[Literal["schema", "tool", "prompt"]] = ["schema", "tool", "prompt"]


def ask(llm: mao.LLM, *about: Any, contract: type[BaseModel] = Summary, prompt: str = PROMPT, **options: Any) -> Any:
    """One question, async and outside of any pipeline."""
    return asyncio.run(llm.ask(contract, prompt, *(about or (ARTICLE,)), **options))


def llm_at(server: LLMServer, **settings: Any) -> mao.LLM:
    return mao.LLM(**{"model": "gpt-4o-mini", "base_url": server.url, "api_key": KEY, **settings})


@pytest.mark.parametrize("mode", MODES)
def test_an_answer_is_a_record_of_the_contract(server, mode):
    server.then(answer(GOOD))
    assert ask(llm_at(server, output_mode=mode)) == Summary(article_id="a0", **GOOD)
    (request,) = server.requests
    assert request.path == "/v1/chat/completions"
    assert request.headers["authorization"] == f"Bearer {KEY}"
    assert request.body["model"] == "gpt-4o-mini"
    assert request.body["temperature"] == 0.0
    assert "seed" not in request.body
    assert [message["role"] for message in request.body["messages"]] == ["system", "user"]
    assert PROMPT in request.text
    assert '"text":"article number 0"' in request.text


def test_the_sync_form_asks_the_same(server):
    server.then(answer(GOOD), answer(GOOD))
    llm = llm_at(server)
    assert llm.ask_sync(Summary, PROMPT, ARTICLE) == ask(llm)
    assert server.requests[0].body == server.requests[1].body


def test_one_resource_serves_one_loop_after_the_other(server):
    """Connections belong to a loop: one that is over must not be in the way of the next, and its connections are closed with it."""
    server.otherwise = lambda _: answer(GOOD)
    llm = llm_at(server)

    async def together() -> list[Summary]:
        return await asyncio.gather(*(llm.ask(Summary, PROMPT, article) for article in ARTICLES))

    for _ in range(3):
        assert [one.article_id for one in asyncio.run(together())] == ["a0", "a1", "a2", "a3"]
    assert not llm._live()._clients


def test_threads_share_one_resource(server):
    server.otherwise = lambda _: answer(GOOD)
    llm = llm_at(server)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda article: llm.ask_sync(Summary, PROMPT, article), ARTICLES * 8))
    assert [one.article_id for one in made] == [article.article_id for article in ARTICLES] * 8


# -- what the model may say --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_model_can_change_neither_the_key_nor_what_is_given_nor_what_the_platform_sets(server, mode):
    server.then(answer({**GOOD, "article_id": "another", "from_fallback": True, "stars": 1}))
    llm = llm_at(server, output_mode=mode)
    assert ask(llm, given={"stars": 5}) == Summary(article_id="a0", summary="It says something.", stars=5, from_fallback=False)


def test_a_model_is_not_asked_for_what_it_may_not_say(server):
    server.otherwise = lambda _: answer(GOOD)
    ask(llm_at(server))
    schema = server.requests[0].body["response_format"]["json_schema"]["schema"]
    assert list(schema["properties"]) == ["summary", "stars"]
    assert schema["required"] == ["summary", "stars"]
    ask(llm_at(server, output_mode="tool"), given={"stars": 3})
    parameters = server.requests[1].body["tools"][0]["function"]["parameters"]
    assert list(parameters["properties"]) == ["summary"]


def test_the_key_is_of_the_first_record_that_has_it_or_given():
    class Note(BaseModel):
        article_id: str

    from dagster_mao.integrations._conversation import taken_from

    assert taken_from(Summary, ("text", Note(article_id="n"), ARTICLE), {}) == {"article_id": "n"}
    assert taken_from(Summary, (ARTICLE,), {"article_id": "mine"}) == {"article_id": "mine"}
    assert taken_from(Note, (ARTICLE,), {}) == {}  # no key


def test_a_key_that_nothing_says_is_asked_of_no_model(server):
    with pytest.raises(mao.WiringError, match=r"Nothing says the key of the Summary.*article_id.*given=\{'article_id': …\}"):
        ask(llm_at(server), "only text")
    assert not server.requests


def test_given_names_fields_of_the_contract(server):
    with pytest.raises(mao.WiringError, match="'title', which Summary does not have"):
        ask(llm_at(server), given={"title": "x"})
    with pytest.raises(mao.WiringError, match="all of whose fields are given"):
        ask(llm_at(server), given=GOOD)


class Aliased(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")

    article_id: Annotated[str, mao.Key] = Field(alias="articleId")
    words: tuple[str, ...] = Field(alias="theWords")
    on: dt.date


def test_names_are_those_of_the_fields_and_a_strict_contract_takes_json(server):
    server.then(answer({"words": ["a"], "on": "2026-11-22", "articleId": "another"}))
    made = ask(llm_at(server), contract=Aliased)
    assert (made.article_id, made.words, made.on, made.model_extra) == ("a0", ("a",), dt.date(2026, 11, 22), {})
    schema = server.requests[0].body["response_format"]["json_schema"]["schema"]
    assert list(schema["properties"]) == ["words", "on"]


class Line(BaseModel):
    label: str
    amount: int = 0


class Unused(BaseModel):
    x: int


class Invoice(BaseModel):
    article_id: Annotated[str, mao.Key]
    lines: list[Line]
    unused: Unused
    note: str | None = None


def test_strict_mode_asks_for_every_field_and_no_other(server):
    server.then(answer({"lines": [{"label": "a", "amount": 1}], "note": None}))
    made = ask(llm_at(server, strict=True), contract=Invoice, given={"unused": Unused(x=1)})
    assert made == Invoice(article_id="a0", lines=[Line(label="a", amount=1)], unused=Unused(x=1))
    asked = server.requests[0].body["response_format"]["json_schema"]
    assert asked["strict"] is True
    schema, line = asked["schema"], asked["schema"]["$defs"]["Line"]
    assert (schema["required"], schema["additionalProperties"]) == (["lines", "note"], False)
    assert (line["required"], line["additionalProperties"]) == (["label", "amount"], False)
    assert "default" not in json.dumps(schema)
    assert list(schema["$defs"]) == ["Line"]


# -- what is sent ------------------------------------------------------------------------------------------------------------------------


class Holder(BaseModel):
    """Personal further down, extra fields, and a computed one."""

    model_config = ConfigDict(extra="allow")

    article_id: Annotated[str, mao.Key]
    people: list[Article]

    @computed_field
    @property
    def initial(self) -> str:
        return self.people[0].author[0]


def test_personal_fields_are_sent_masked_unless_the_endpoint_may_have_them(server):
    server.otherwise = lambda _: answer(GOOD)
    holder = Holder(article_id="a0", people=ARTICLES[:2], hidden=AUTHOR)  # type: ignore[call-arg]
    ask(llm_at(server), holder, [ARTICLE])
    assert AUTHOR not in server.requests[0].text
    assert '"author":"***"' in server.requests[0].text
    assert "initial" not in server.requests[0].text
    ask(llm_at(server, send_personal=True), holder, [ARTICLE])
    assert server.requests[1].text.count(AUTHOR) == 4
    ask(llm_at(server), f"The author is {AUTHOR}.", given={"article_id": "a0"})  # text is what its author wrote
    assert AUTHOR in server.requests[2].text


def test_a_model_is_asked_about_records_and_text(server):
    with pytest.raises(mao.WiringError, match="asked about a dict"):
        ask(llm_at(server), {"a": 1}, given={"article_id": "a0"})


def test_without_a_subject_the_instructions_are_the_message(server):
    server.then(answer(GOOD))
    asyncio.run(llm_at(server).ask(Summary, "Invent one.", given={"article_id": "a0"}))
    assert server.requests[0].body["messages"] == [{"role": "user", "content": "Invent one."}]


def test_parameters_of_the_request(server):
    server.otherwise = lambda _: answer(GOOD)
    ask(llm_at(server, temperature=None, seed=7, parameters={"max_tokens": 50}))
    body = server.requests[0].body
    assert ("temperature" in body, body["seed"], body["max_tokens"]) == (False, 7, 50)
    ask(llm_at(server), model="other", temperature=0.7, seed=1)
    body = server.requests[1].body
    assert (body["model"], body["temperature"], body["seed"]) == ("other", 0.7, 1)


# -- malformed answers -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_malformed_answer_is_given_back_with_what_is_wrong(server, mode):
    server.then(answer(BAD), answer("no JSON at all"), answer(GOOD))
    assert ask(llm_at(server, output_mode=mode)).stars == 4
    first, second, third = (request.body["messages"] for request in server.requests)
    assert second[:2] == first
    assert third[: len(second)] == second
    assert "- stars: Input should be less than or equal to 5" in second[-1]["content"]
    assert "no JSON object" in third[-1]["content"]
    if mode == "tool":
        call = second[2]["tool_calls"][0]
        assert json.loads(call["function"]["arguments"]) == BAD
        assert (second[3]["role"], second[3]["tool_call_id"]) == ("tool", call["id"])
    else:
        assert json.loads(second[2]["content"]) == BAD
        assert [message["role"] for message in second[2:]] == ["assistant", "user"]


@pytest.mark.parametrize("corrections", [0, 2])
def test_turns_are_bounded_and_the_error_shows_no_values(server, corrections):
    server.otherwise = lambda _: answer({**BAD, "a word of the model": 1})
    with pytest.raises(mao.MalformedAnswerError) as malformed:
        ask(llm_at(server, corrections=corrections))
    assert len(server.requests) == 1 + corrections
    assert "did not answer with a Summary" in str(malformed.value)
    assert "(stars: less_than_equal)" in str(malformed.value)
    assert "secret" not in str(malformed.value)
    assert malformed.value.__cause__ is malformed.value.__context__ is None  # pydantic's error quotes the answer
    assert pickle.loads(pickle.dumps(malformed.value)).what == malformed.value.what  # noqa: S301


def test_words_of_the_model_are_not_in_errors_where_it_names_fields(server):
    class Closed(BaseModel):
        model_config = ConfigDict(extra="forbid")
        article_id: Annotated[str, mao.Key]

        summary: str

    server.then(answer({"summary": "x", "secret": 1}))
    with pytest.raises(mao.MalformedAnswerError, match=r"\(record: extra_forbidden\)"):
        ask(llm_at(server, corrections=0), contract=Closed)


@pytest.mark.parametrize(
    "text",
    [
        "Sure! ```json\n" + json.dumps(GOOD) + "\n```",
        json.dumps(GOOD) + " I hope this helps.",
        "<think>hm</think>" + json.dumps(GOOD),
    ],
)
def test_json_between_other_words_is_an_answer(server, text):
    server.then(answer(text))
    assert ask(llm_at(server)).stars == 4


@pytest.mark.parametrize(
    "text", ["", "[]", '"text"', '{"summary": "x", "stars": NaN}', "{" * 100_000, '{"summary": "\\ud800", "stars": 1}']
)
def test_what_is_no_record_is_malformed(server, text):
    server.then(answer(text), answer(GOOD))
    assert ask(llm_at(server)).stars == 4
    assert len(server.requests) == 2


def test_an_answer_that_was_cut_off(server):
    server.then(answer('{"summary": "It sa', finish="length"), answer(GOOD))
    assert ask(llm_at(server)).stars == 4
    assert "cut off" in server.requests[1].last


def test_a_refusal_is_final(server):
    server.then(answer("", refusal="I cannot say."))
    with pytest.raises(mao.MalformedAnswerError, match="in one turn \\(it refused to answer\\)"):
        ask(llm_at(server))
    assert len(server.requests) == 1


def test_what_the_author_gave_wrong_is_not_the_models_to_mend(server):
    server.then(answer(GOOD))
    with pytest.raises(ValidationError) as refused:
        ask(llm_at(server), given={"stars": 9})
    assert refused.value.title == "Summary"
    assert len(server.requests) == 1


class Judged(BaseModel):
    article_id: Annotated[str, mao.Key]
    author: Annotated[str, mao.Personal]
    stars: int

    @model_validator(mode="after")
    def modest(self) -> Judged:
        if self.stars > 3:
            raise ValueError(f"{self.author} gets at most 3")
        return self


def test_what_a_validator_says_of_personal_fields_is_not_sent(server):
    server.then(answer({"stars": 4}), answer({"stars": 3}))
    assert ask(llm_at(server), contract=Judged, given={"author": AUTHOR}).stars == 3
    assert AUTHOR not in json.dumps(server.requests[1].body)
    assert "- record: the record as a whole breaks a rule" in server.requests[1].last


# -- what is told of it ------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def told(monkeypatch) -> list[dict[str, Any]]:
    """What the gateway is told."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(llm_module, "usage", lambda **used: calls.append(used))
    return calls


@pytest.mark.parametrize("sync", [False, True])
def test_every_turn_is_told_also_of_an_answer_that_stays_malformed(server, sync, told):
    server.then(answer(BAD, tokens=(1000, 20)), answer(BAD, tokens=(2000, 30)))
    llm = llm_at(server, corrections=1, input_price=2.0, output_price=10.0)
    with pytest.raises(mao.MalformedAnswerError):
        llm.ask_sync(Summary, PROMPT, ARTICLE) if sync else ask(llm)
    model = "gpt-4o-mini-2026"  # as the endpoint says
    assert told == [
        {"model": model, "input_tokens": 1000, "output_tokens": 20, "cost": pytest.approx(0.0022)},
        {"model": model, "input_tokens": 2000, "output_tokens": 30, "cost": pytest.approx(0.0043)},
    ]


def test_a_reply_without_numbers_counts_as_nothing(server, told):
    completion = {"choices": [{"message": {"content": json.dumps(GOOD)}}]}
    server.then(lambda handler, request: handler.send_json(200, completion))
    ask(llm_at(server))
    assert told == [{"model": None, "input_tokens": 0, "output_tokens": 0, "cost": 0.0}]


# -- the resource ------------------------------------------------------------------------------------------------------------------------


def test_the_key_is_not_shown(server):
    llm = llm_at(server)
    for shown in (repr(llm), str(llm), str(llm.model_dump()), llm.model_dump_json(), str(llm.__mao_config__())):
        assert KEY not in shown
        assert "gpt-4o-mini" in shown


def test_what_counts_of_the_configuration(server):
    def config(**changes: Any) -> dict[str, Any]:
        return llm_at(server, **changes).__mao_config__()

    assert config() == config(api_key="sk-rotated", timeout=1, corrections=0, input_price=3.0)
    changed: list[dict[str, Any]] = [
        {"model": "x"},
        {"base_url": "http://x/v1"},
        {"temperature": 1.0},
        {"seed": 1},
        {"parameters": {"max_tokens": 1}},
        {"output_mode": "tool"},
        {"strict": True},
        {"send_personal": True},
    ]
    assert all(config() != config(**change) for change in changed)
    json.dumps(config())


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"parameters": {"messages": []}}, "'messages'"),
        ({"base_url": "https://user:sk-x@host/v1"}, "holds a password"),
        ({"record": True}, "nothing says where"),
    ],
)
def test_what_cannot_work_is_refused_when_it_is_written(settings, what):
    with pytest.raises(mao.WiringError, match=what) as refused:
        mao.LLM(**settings)
    assert "sk-x" not in str(refused.value)


def test_a_misspelled_setting_is_refused_without_showing_values():
    with pytest.raises(ValidationError, match="modle\n  Extra inputs are not permitted") as refused:
        mao.LLM(modle="m", api_key=KEY)
    assert KEY not in str(refused.value)


def test_which_model_must_be_said_somewhere(server):
    with pytest.raises(mao.WiringError, match="which model to ask"):
        ask(llm_at(server, model=""))


def test_without_the_extra_it_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(mao.WiringError, match=r"pip install \"dagster-mao\[llm\]\""):
        mao.LLM(model="m")
    mao.LLM(model="m", frozen=str(tmp_path))  # needs none


def test_environment_variables_are_looked_up_without_dagster_too(server, monkeypatch):
    server.then(answer(GOOD))
    monkeypatch.setenv("PRESS_KEY", KEY)
    monkeypatch.setenv("PRESS_URL", server.url)
    assert ask(mao.LLM(model="m", base_url=dg.EnvVar("PRESS_URL"), api_key=dg.EnvVar("PRESS_KEY"))).stars == 4
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"
    with pytest.raises(mao.WiringError, match="'NOT_SET' is not set"):
        ask(mao.LLM(model="m", api_key=dg.EnvVar("NOT_SET")))


def test_it_travels_to_a_child_process(server):
    server.then(answer(GOOD), answer(GOOD))
    llm = llm_at(server, parameters={"top_p": 1})
    llm.ask_sync(Summary, PROMPT, ARTICLE)  # with connections
    there: mao.LLM = pickle.loads(pickle.dumps(llm))  # noqa: S301
    assert there.ask_sync(Summary, PROMPT, ARTICLE).stars == 4
    assert server.requests[0].body == server.requests[1].body


def test_the_agent_in_the_documentation_is_the_one_that_is_tested():
    shown = re.search(r"```python\n(.*?)```", Path("docs/llm.md").read_text(), re.DOTALL)
    assert shown is not None
    assert shown[1] in Path("tests/integrations/articles.py").read_text()
