"""Judges at the boundary: who is asked about what, what becomes of the votes, and that none of it costs a batch."""

from __future__ import annotations

import json
import random
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

import dagster_mao as mao
from dagster_mao.boundary._judging import Judgement, Vote, sample_of
from dagster_mao.state import VERDICTS_SCHEMA
from dagster_mao.state.verify import verify
from tests.judged import COMPLAINTS, SECRET, Asked, Complaint, Reply, check_of, complaints, desk, polite, replies


def judged(*judges, records=COMPLAINTS, store=None, root=None, says=None, policies=None, **declared):
    store = store or mao.StateStore(root)
    pipeline = desk(*judges, **({"says": says} if says else {}), **declared)
    return mao.run(pipeline, records, store=store, workflow="monday", policies=policies)


# -- votes -----------------------------------------------------------------------------------------------------------------------------


def test_who_passes_at_once_is_asked_about_once(tmp_path):
    ask = Asked()
    result = judged(polite(ask), root=tmp_path)
    check = check_of(result)
    assert (check.passed, len(ask.sent)) == (True, 12)
    assert check.metadata["score"] == pytest.approx(0.9)
    assert (check.metadata["share_passed"], check.metadata["judged"], check.metadata["votes"]) == (1.0, 12, 12)
    assert (check.metadata["input_tokens"], check.metadata["output_tokens"], check.metadata["cost"]) == (1200, 120, 6.0)
    assert check.metadata["model"] == "small-judge"


@pytest.mark.parametrize(
    ("answers", "passed", "votes"),
    [("y", True, 1), ("nn", False, 2), ("nyy", True, 3), ("nyn", False, 3)],
)
def test_the_majority_decides_after_a_first_no(tmp_path, answers, passed, votes):
    ask = Asked(lambda record, time: record != "c3" or answers[time - 1] == "y")
    result = judged(polite(ask), root=tmp_path)
    assert ask.count("c3") == votes
    check = check_of(result)
    assert (check.passed, check.metadata["passed"]) == (passed, 12 if passed else 11)
    rows = result.store.verdicts(result.seals["replies"]).filter(pl.col("record") == "c3")
    assert rows["passed"].to_list() == [answer == "y" for answer in answers]
    assert rows["vote"].to_list() == list(range(1, votes + 1))


@settings(deadline=None)
@given(odd=st.integers(0, 4).map(lambda n: 2 * n + 1), answers=st.lists(st.booleans(), min_size=9, max_size=9))
def test_stopping_early_decides_as_asking_to_the_end(odd, answers):
    """The naive judge asks all votes and counts; ours asks no further once the majority is known. They never differ."""
    told = Judgement(judge=mao.Judge("any", rubric="any", votes=odd), rows=1, sample=["r"], model=None, personal=False, hidden=False)
    asked = 0
    while told.is_open("r"):
        vote = Vote(record="r", reason="", passed=answers[asked], score=0.5, model=None, input_tokens=0, output_tokens=0, cost=0.0)
        told.votes.setdefault("r", []).append(vote)
        asked += 1
    assert asked <= odd
    assert told.passed("r") == (answers[0] or 2 * sum(answers[:odd]) > odd)


def test_a_share_may_be_asked_for(tmp_path):
    ask = Asked(lambda record, time: record not in ("c1", "c2", "c3"))
    result = judged(polite(ask, min_share=0.75), mao.Judge("strict", rubric="x", ask=ask, min_share=0.76), root=tmp_path)
    assert check_of(result).passed
    failed = check_of(result, "judge_strict")
    assert not failed.passed
    assert failed.description.startswith("9 of 12 judged records pass (75.0%), and 76.0% are asked for")


# -- the sample ------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=20, deadline=None)
@given(keys=st.sets(st.text(max_size=5), max_size=60), size=st.integers(1, 60), more=st.sets(st.text(max_size=5), max_size=20))
def test_the_sample_is_of_the_keys_and_of_nothing_else(keys, size, more):
    def drawn(of):
        shuffled = random.sample(sorted(of), len(of))
        return sample_of(pl.LazyFrame({"key": pl.Series(shuffled, dtype=pl.String)}), size)

    sample = drawn(keys)
    assert sample == drawn(keys)
    assert len(set(sample)) == len(sample) == min(size, len(keys))
    assert set(sample) <= keys
    # A record leaves the sample only for others: what grows keeps being compared by the same records.
    assert set(drawn(keys | more)) & keys <= set(sample)


def test_the_same_records_are_judged_again_and_the_check_says_how_many(tmp_path):
    first, second = Asked(), Asked()
    check = check_of(judged(polite(first, sample=5), root=tmp_path / "a"))
    judged(polite(second, sample=5), records=list(reversed(COMPLAINTS)), root=tmp_path / "b")
    assert sorted(first.records) == sorted(second.records)
    assert len(first.records) == 5
    assert "Sample: 5 of 12 records" in check.description
    assert (check.metadata["judged"], check.metadata["rows"]) == (5, 12)


def test_an_empty_batch(tmp_path):
    ask = Asked()
    empty = check_of(judged(polite(ask), records=[], root=tmp_path / "a"))
    assert (empty.passed, empty.description, ask.sent) == (True, "Nothing to judge: the batch is empty", [])


def test_a_batch_of_one_record_without_a_key(tmp_path):
    class Report(BaseModel):
        text: str

    seen = []

    def ask(rubric, case):
        seen.append(case)
        return mao.Verdict(reason="short", passed=True, score=1.0)

    @mao.agent(judges=[mao.Judge("short", rubric="It is short.", ask=ask)])
    def report() -> Report:
        return Report(text="All is well.")

    result = mao.run(mao.Pipeline("desk", entry=report, agents=[]), store=mao.StateStore(tmp_path))
    (check,) = [one for one in result.checks["report"] if one.name == "judge_short"]
    assert check.passed
    assert seen == [{"agent": "report", "said": {"text": "All is well."}}]
    assert result.store.verdicts(result.seals["report"])["record"].to_list() == [None]


# -- what it is sent ---------------------------------------------------------------------------------------------------------------------


def test_personal_fields_are_masked_also_those_of_what_was_read(tmp_path):
    ask = Asked()
    judged(polite(ask, reads=["complaints"]), root=tmp_path)
    case = next(case for case in ask.sent if case["said"]["number"] == "c3")
    assert case == {
        "agent": "replies",
        "said": {"number": "c3", "to": "***", "text": "Sorry, c3."},
        "read": {"complaints": {"number": "c3", "name": "***", "text": "It broke, 3 times."}},
    }
    assert SECRET not in json.dumps(ask.sent)


def test_who_was_sent_personal_fields_may_quote_them_and_is_not_quoted(tmp_path, caplog):
    caplog.set_level("DEBUG")
    ask = Asked(lambda record, time: False)
    result = judged(polite(ask, send_personal=True), root=tmp_path)
    assert SECRET in json.dumps(ask.sent)
    shown = check_of(result).metadata["verdicts"]
    assert {row["reason"] for row in shown} == {"***"}
    assert "Number c" not in caplog.text
    rows = result.store.verdicts(result.seals["replies"])
    assert rows["personal"].all()
    assert rows["reason"].str.starts_with("Number c").all()


# -- what becomes of the batch ---------------------------------------------------------------------------------------------------------


def test_a_bad_verdict_warns_and_the_batch_goes_on(tmp_path):
    result = judged(polite(Asked(lambda record, time: False)), root=tmp_path)
    check = check_of(result)
    assert (check.passed, check.severity) == (False, "warn")
    assert len(check.metadata["verdicts"]) == 5
    assert check.metadata["verdicts"][0]["reason"].startswith("Number c")
    assert result["replies"].height == 12


def test_with_severity_error_it_refuses_the_batch(tmp_path):
    store = mao.StateStore(tmp_path)
    with pytest.raises(mao.BatchRefusedError, match="judge_polite") as refused:
        judged(polite(Asked(lambda record, time: False), severity="error"), store=store)
    assert [check.name for check in refused.value.checks][-1] == "judge_polite"
    assert [seal.agent for seal in store.seals("desk/monday")] == ["complaints"]
    assert SECRET not in str(refused.value)


def down(rubric, case):
    raise ConnectionError(f"no route for {case}")


@pytest.mark.parametrize("severity", ["warn", "error"])
def test_a_judge_that_does_not_answer_costs_no_batch(tmp_path, severity):
    result = judged(polite(down, severity=severity), root=tmp_path)
    check = check_of(result)
    assert (check.passed, check.severity) == (False, "warn")
    assert "12 of the sample not judged: ConnectionError" in check.description
    assert "score" not in check.metadata
    assert result["replies"].height == 12
    rows = result.store.verdicts(result.seals["replies"])
    assert (rows["unjudged"].unique().to_list(), rows["passed"].null_count()) == (["ConnectionError"], 12)
    assert json.loads(result.seals["replies"].judged)["polite"]["not_judged"] == 12


def test_unless_a_verdict_is_required(tmp_path):
    with pytest.raises(mao.BatchRefusedError, match="not judged"):
        judged(polite(down, severity="error", required=True), root=tmp_path)


def test_an_open_breaker_leaves_the_rest_of_the_sample_alone(tmp_path):
    calls = []

    def failing(rubric, case):
        calls.append(case)
        raise ConnectionError

    policy = mao.Policy(breaker=mao.Breaker(fail_max=3, reset_timeout=3600))
    check = check_of(judged(polite(failing, policy=policy), root=tmp_path))
    assert len(calls) == 3
    assert "the breaker desk.replies.polite is open" in check.description
    check_of(judged(polite(failing, policy=policy), store=mao.StateStore(tmp_path)))  # shared, as every breaker is
    assert len(calls) == 3


def test_what_is_no_verdict_is_none(tmp_path):
    check = check_of(judged(polite(lambda rubric, case: "fine"), root=tmp_path))
    assert "12 of the sample not judged: ValidationError" in check.description


def test_a_judge_of_whom_half_is_unanswered_warns_with_both(tmp_path):
    def ask(rubric, case):
        if case["said"]["number"] > "c5":
            raise TimeoutError
        return mao.Verdict(reason="", passed=True, score=1)

    check = check_of(judged(polite(ask), root=tmp_path))
    assert (check.passed, check.severity) == (False, "warn")
    assert check.metadata["judged"] + check.metadata["not_judged"] == 12
    assert "not judged: TimeoutError" in check.description


def test_a_batch_that_breaks_its_contract_is_not_judged(tmp_path):
    ask = Asked()
    pipeline = mao.Pipeline("desk", entry=desk().entry, agents=[replies(polite(ask), says=lambda one: 3)])  # type: ignore[arg-type, return-value]
    with pytest.raises(mao.MaoError):
        mao.run(pipeline, COMPLAINTS, store=mao.StateStore(tmp_path))
    assert ask.sent == []


# -- what is kept --------------------------------------------------------------------------------------------------------------------


def test_votes_are_sealed_beside_the_version(tmp_path):
    result = judged(polite(Asked(lambda record, time: record != "c3")), root=tmp_path)
    seal, store = result.seals["replies"], result.store
    rows = store.verdicts(seal)
    assert rows.schema == VERDICTS_SCHEMA
    assert rows.height == 13
    assert seal.verdicts_path in {file.path for file in seal.files}
    assert verify(store).good
    file = Path(store.root, str(seal.verdicts_path))
    file.write_bytes(file.read_bytes().replace(b"small-judge", b"large-judge"))
    assert [(found.kind, found.file) for found in verify(store).findings] == [("file_changed", seal.verdicts_path)]
    with pytest.raises(mao.TamperedError):
        store.verdicts(seal)


def test_an_agent_without_judges_seals_what_it_did_before(tmp_path):
    seal = judged(root=tmp_path).seals["replies"]
    assert (seal.judged, seal.verdicts_path) == (None, None)
    assert "judges" not in mao.StateStore(tmp_path).registered(seal)


def calls_of(store):
    return store.calls("desk", "replies.polite").sort("started").collect()


def test_every_vote_is_a_call_in_a_table_of_the_judges_own(tmp_path):
    result = judged(polite(Asked(lambda record, time: record != "c3")), root=tmp_path)
    rows = calls_of(result.store)
    assert rows.height == 13
    assert set(rows["agent"]) == {"replies.polite"}
    assert rows.filter(pl.col("record") == "c3")["call"].n_unique() == 2
    assert rows["cost"].sum() == pytest.approx(6.5)
    assert result.store.callers("desk") == ["replies", "replies.polite"]


def test_what_was_answered_is_not_asked_again_unless_something_is_another(tmp_path):
    store, ask = mao.StateStore(tmp_path), Asked(lambda record, time: record != "c3")
    first = judged(polite(ask), store=store)
    assert len(ask.sent) == 13
    again = judged(polite(ask), store=store)
    assert len(ask.sent) == 13
    assert check_of(again).metadata == check_of(first).metadata
    assert set(calls_of(store)["outcome"]) == {"answered", "reused"}
    judged(polite(ask, rubric="The reply is short."), store=store)
    assert len(ask.sent) == 26
    judged(polite(ask), store=store, says=lambda one: f"Sorry, {one.number}!" if one.number == "c4" else f"Sorry, {one.number}.")
    assert len(ask.sent) == 27


def test_an_operator_changes_the_policy_of_a_judge_by_its_name(tmp_path):
    tries = []

    def failing(rubric, case):
        tries.append(case)
        raise mao.TransientError("later")

    pipeline, store = desk(polite(failing, policy=mao.Policy(retries=2))), mao.StateStore(tmp_path)
    mao.run(pipeline, COMPLAINTS[:1], store=store, policies={"replies.polite": {"retries": 0}, "*": {"retries": 1}})
    assert len(tries) == 1
    judged_by = json.loads(store.seals(store.workflows("desk")[0])[-1].judged)["polite"]
    assert judged_by["policy"]["retries"] == 0
    with pytest.raises(mao.WiringError, match="isolate"):
        mao.run(pipeline, COMPLAINTS[:1], store=store, policies={"replies.polite": {"isolate": True, "timeout": 1}})
    with pytest.raises(mao.WiringError):
        mao.run(pipeline, COMPLAINTS[:1], store=store, policies={"replies.rude": {"retries": 0}})


# -- wiring ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("judges", "what"),
    [
        ([polite(print, votes=2)], "a majority of 2 votes cannot be told"),
        ([polite(print, votes=0)], "a majority of 0 votes"),
        ([polite(print, sample=0)], "`sample` is 0"),
        ([polite(print), polite(print)], "two judges are called 'polite'"),
        ([mao.Judge("Polite", rubric="x")], "no name of a judge"),
        ([polite(print, rubric=" ")], "has no rubric"),
        ([polite(print, rubric=Path("nowhere.md"))], "cannot be read"),
        ([polite(print, reads=["letters"])], "to read 'letters'"),
        ([polite(print, model="gpt")], "a model, and a function"),
        ([polite("print")], "`ask` is str"),
        ([polite(print, min_share=1.1)], "`min_share` is 1.1"),
        ([polite(print, severity="fatal")], "`severity` is 'fatal'"),
        ([polite(print, required=True)], "it is required, and only warns"),
        ([polite(print, policy=mao.Policy(isolate=True, timeout=1))], "a policy with `isolate`"),
        (["polite"], "str is no judge"),
    ],
)
def test_wrong_wiring_fails_at_load_and_names_the_agent(judges, what):
    with pytest.raises(mao.WiringError, match=what.replace("(", r"\(")) as wrong:
        desk(*judges)
    assert (wrong.value.agent, bool(wrong.value.fix), bool(wrong.value.field)) == ("replies", True, True)


def test_one_judge_is_no_list():
    with pytest.raises(mao.WiringError, match="no list of judges"):
        mao.Pipeline("desk", entry=desk().entry, agents=[_with(polite(print))])


def _with(judges):
    agent = replies()
    agent.judges = judges
    return agent


@pytest.mark.parametrize(
    ("resources", "what"),
    [({}, "the resource 'llm', which nobody provides"), ({"llm": object()}, "cannot ask the resource 'llm', a object")],
)
def test_a_judge_that_cannot_be_asked_is_told_before_the_agent_is_paid_for(tmp_path, resources, what):
    called = []
    pipeline = desk(polite(), says=lambda one: called.append(one) or "Sorry.")
    with pytest.raises(mao.WiringError, match=what):
        mao.run(pipeline, COMPLAINTS, store=mao.StateStore(tmp_path), resources=resources)
    assert called == []


def test_the_class_form_declares_judges_too(tmp_path):
    asked = Asked()

    class Replies(mao.Agent):
        judges = [polite(asked)]

        def execute(self, complaints: Complaint) -> Reply:
            return Reply(number=complaints.number, to=complaints.name, text="Sorry.")

    result = mao.run(mao.Pipeline("desk", entry=complaints, agents=[Replies()]), COMPLAINTS[:2], store=mao.StateStore(tmp_path))
    assert check_of(result).passed
    assert len(asked.sent) == 2


def test_a_rubric_in_a_file_of_its_own_is_no_code_of_the_agent(tmp_path):
    rubric = tmp_path / "rubric.md"
    rubric.write_text("The reply is polite.")
    before = desk(polite(print, rubric=rubric)).node("replies")
    rubric.write_text("The reply is short.")
    after = desk(polite(print, rubric=rubric)).node("replies")
    assert before.agent_version == after.agent_version
    assert before.panel[0].version != after.panel[0].version
