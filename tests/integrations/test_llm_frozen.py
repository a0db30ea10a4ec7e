"""Frozen answers: the same pipeline without key and network, from files that a review can read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import dagster_mao as mao
from dagster_mao.integrations import llm as llm_module
from tests.integrations.articles import ARTICLES, AUTHOR, BAD, GOOD, PROMPT, Article, Summary, articles, pipeline, summary_sync
from tests.integrations.llm_server import KEY, LLMServer, Request, answer

ARTICLE = ARTICLES[0]
MODEL = "gpt-4o-mini"


def recorder(server: LLMServer, folder: Path, **settings: Any) -> mao.LLM:
    return mao.LLM(**{"model": MODEL, "base_url": server.url, "api_key": KEY, "frozen": str(folder), "record": True, **settings})


def frozen(folder: Path, **settings: Any) -> mao.LLM:
    return mao.LLM(**{"model": MODEL, "frozen": str(folder), **settings})


def by_number(request: Request) -> Any:
    """Another answer for each article."""
    return answer({"summary": "Of " + request.last[-20:-2], "stars": 3})


def test_what_was_recorded_is_answered_without_endpoint_and_key(server, tmp_path):
    server.otherwise = by_number
    live = mao.run(pipeline(), resources={"llm": recorder(server, tmp_path)})
    asked = len(server.requests)
    offline = mao.run(pipeline(), resources={"llm": frozen(tmp_path)})
    assert offline.records("summary") == live.records("summary")
    # An agent that is not async asks the same thing.
    assert mao.run(pipeline(summary_sync), resources={"llm": frozen(tmp_path)}).records("summary") == live.records("summary")
    assert len(server.requests) == asked == 4
    assert len(list(tmp_path.iterdir())) == 4


def test_frozen_answers_need_no_client_library(server, tmp_path):
    server.otherwise = by_number
    recorder(server, tmp_path).ask_sync(Summary, PROMPT, ARTICLE)
    code = f"""
import sys
sys.modules["openai"] = sys.modules["httpx2"] = None
import dagster_mao as mao
from tests.integrations.articles import *
print(mao.LLM(model="{MODEL}", frozen={str(tmp_path)!r}).ask_sync(Summary, PROMPT, ARTICLES[0]).summary)
"""
    environment = {name: value for name, value in os.environ.items() if "KEY" not in name}
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**environment, "PYTHONPATH": "."})
    assert told.stdout.startswith("Of "), told.stderr


def test_the_bytes_are_the_same_whoever_records(server, tmp_path):
    server.otherwise = by_number
    for name in ("one", "other"):
        mao.run(pipeline(), resources={"llm": recorder(server, tmp_path / name)})
    one, other = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "other"))
    assert one == other
    assert all(name.startswith("Summary-") and name.endswith(".json") for name in one)


def test_a_file_says_what_was_asked_and_answered_and_neither_key_nor_personal_data(server, tmp_path):
    server.then(answer(GOOD))
    recorder(server, tmp_path).ask_sync(Summary, PROMPT, ARTICLE)
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    assert KEY not in text
    assert AUTHOR not in text
    assert text.endswith("}\n")
    found = json.loads(text)
    assert found["asked"] == server.requests[0].body
    assert found["answer"] == {"model": f"{MODEL}-2026", "json": GOOD}


@pytest.mark.parametrize(
    "changed",
    [
        lambda llm: llm.ask_sync(Summary, PROMPT + " Be brief.", ARTICLE),
        lambda llm: llm.ask_sync(Summary, PROMPT, ARTICLES[1]),
        lambda llm: llm.ask_sync(Summary, PROMPT, ARTICLE, model="another"),
        lambda llm: llm.ask_sync(Summary, PROMPT, ARTICLE, temperature=1.0),
        lambda llm: llm.ask_sync(Summary, PROMPT, ARTICLE, seed=1),
        lambda llm: llm.ask_sync(Summary, PROMPT, ARTICLE, given={"stars": 1}),  # another schema
    ],
)
def test_whatever_changes_what_is_sent_is_another_question(server, tmp_path, changed):
    server.then(answer(GOOD))
    recorder(server, tmp_path).ask_sync(Summary, PROMPT, ARTICLE)
    llm = frozen(tmp_path)
    assert llm.ask_sync(Summary, PROMPT, ARTICLE).stars == 4
    with pytest.raises(mao.AnswerNotFrozenError, match=r"No frozen answer for this Summary.* is missing; others there: 1.*record=True"):
        changed(llm)
    assert len(server.requests) == 1


def test_a_missing_answer_ends_the_run_also_with_a_quarantine(tmp_path):
    @mao.agent(name="summary", model=MODEL, quarantine=mao.Quarantine(max_share=1.0))
    async def lenient(articles: Article, *, llm: mao.LLM) -> Summary:
        return await llm.ask(Summary, PROMPT, articles)

    with pytest.raises(mao.AnswerNotFrozenError) as missing:
        mao.run(mao.Pipeline("press", entry=articles, agents=[lenient]), resources={"llm": frozen(tmp_path / "none")})
    assert missing.value.agent == "summary"
    assert not (tmp_path / "none").exists()


def test_recording_asks_only_for_what_is_missing(server, tmp_path):
    server.otherwise = by_number
    recorder(server, tmp_path).ask_sync(Summary, PROMPT, ARTICLE)
    mao.run(pipeline(), resources={"llm": recorder(server, tmp_path)})
    assert len(server.requests) == 4


def test_a_conversation_is_replayed_turn_by_turn(server, tmp_path):
    server.then(answer(BAD), answer("no JSON"), answer(GOOD))
    made = recorder(server, tmp_path).ask_sync(Summary, PROMPT, ARTICLE)
    assert frozen(tmp_path).ask_sync(Summary, PROMPT, ARTICLE) == made
    assert len(list(tmp_path.iterdir())) == 3
    with pytest.raises(mao.MalformedAnswerError):
        frozen(tmp_path, corrections=1).ask_sync(Summary, PROMPT, ARTICLE)


def test_refusals_and_cut_answers_are_frozen_as_such(server, tmp_path):
    server.then(answer("", refusal="no"), answer('{"summary": "It sa', finish="length"), answer(GOOD))
    for model in ("refuses", "cuts"):
        tries = [recorder(server, tmp_path), frozen(tmp_path)]
        if model == "refuses":
            for llm in tries:
                with pytest.raises(mao.MalformedAnswerError, match="it refused to answer"):
                    llm.ask_sync(Summary, PROMPT, ARTICLE, model=model)
        else:
            assert [llm.ask_sync(Summary, PROMPT, ARTICLE, model=model).stars for llm in tries] == [4, 4]


def test_nothing_was_used_for_a_frozen_answer(server, tmp_path, monkeypatch):
    server.then(answer(GOOD))
    recorder(server, tmp_path).ask_sync(Summary, PROMPT, ARTICLE)
    told: list[dict[str, Any]] = []
    monkeypatch.setattr(llm_module, "usage", lambda **used: told.append(used))
    frozen(tmp_path, input_price=1.0).ask_sync(Summary, PROMPT, ARTICLE)
    assert told == [{"model": f"{MODEL}-2026", "input_tokens": 0, "output_tokens": 0}]


@pytest.mark.parametrize("content", ["", "{}", '{"answer": 1}', '{"answer": {}}', "[]"])
def test_a_file_that_holds_no_answer(server, tmp_path, content):
    server.then(answer(GOOD))
    recorder(server, tmp_path).ask_sync(Summary, PROMPT, ARTICLE)
    (path,) = tmp_path.iterdir()
    path.write_text(content)
    with pytest.raises(mao.AnswerNotFrozenError, match=f"{path.name} holds no frozen answer"):
        frozen(tmp_path).ask_sync(Summary, PROMPT, ARTICLE)


def test_a_folder_that_cannot_be_written(server, tmp_path):
    server.then(answer(GOOD))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(mao.StoreError, match="cannot be frozen"):
        recorder(server, tmp_path / "file").ask_sync(Summary, PROMPT, ARTICLE)
    assert not server.requests  # nothing was paid for in vain


def test_other_frozen_answers_are_another_configuration(server, tmp_path):
    server.otherwise = by_number
    recorder(server, tmp_path).ask_sync(Summary, PROMPT, ARTICLE)
    before = frozen(tmp_path).__mao_config__()
    assert frozen(tmp_path).__mao_config__() == before
    (path,) = tmp_path.iterdir()
    path.write_text(path.read_text().replace('"stars": 3', '"stars": 2'))
    assert frozen(tmp_path).__mao_config__() != before
    # Recording is asking live: what is added meanwhile makes no other configuration.
    assert recorder(server, tmp_path).__mao_config__() == recorder(server, tmp_path / "none").__mao_config__()
