"""What judges said, looked back at: in the dossier, on the command line, in the registry, by bisect."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from typer.testing import CliRunner

import dagster_mao as mao
from dagster_mao.cli import app
from dagster_mao.review.calls import calls
from dagster_mao.review.dossier import Disclosure, as_json, dossier
from dagster_mao.review.judging import AskedJudge
from dagster_mao.review.page import as_html
from dagster_mao.review.registry import agent_diff, agent_versions
from dagster_mao.review.verdicts import votes
from tests.judged import COMPLAINTS, Asked, desk, polite


@pytest.fixture(scope="module")
def monday(tmp_path_factory):
    """One that was judged, and one record of which did not pass. For reading only."""
    return sealed(tmp_path_factory.mktemp("monday"), polite(Asked(not_three)))


def sealed(root, *judges, workflow="monday", says=None):
    pipeline = desk(*judges, **({"says": says} if says else {}))
    return mao.run(pipeline, COMPLAINTS[:4], store=mao.StateStore(root), workflow=workflow)


def cli(root, *arguments):
    return CliRunner().invoke(app, [*arguments, "--root", str(root)], catch_exceptions=False)


def not_three(record, time):
    return record != "c3"


def test_the_dossier_shows_the_rubric_the_votes_and_why(tmp_path):
    def quoting(rubric, case):
        return mao.Verdict(reason="It says <script>alert(1)</script>.", passed=case["said"]["number"] != "c3", score=0.25)

    result = sealed(tmp_path, polite(quoting))
    told = dossier(result.store, "desk/monday", record="c3")
    page = as_html(told)
    assert "The reply is polite." in page
    assert "It says &lt;script&gt;" in page
    assert "<script>" not in page
    (version,) = [one for one in as_json(told)["versions"] if one["votes"]]
    assert version["judged"]["polite"]["passed"] == 3
    assert [(vote["record"], vote["vote"], vote["passed"]) for vote in version["votes"]] == [("c3", 1, False), ("c3", 2, False)]


def test_of_a_whole_workflow_those_who_did_not_pass_come_first(monday):
    told = votes(monday.store, monday.seals["replies"], limit=3)
    assert [(vote["record"], vote["passed"]) for vote in told] == [("c3", False), ("c3", False), ("c0", True)]


def test_reasons_that_may_quote_personal_data_are_shown_to_whom_it_is_shown(tmp_path):
    result = sealed(tmp_path, polite(Asked(not_three), send_personal=True))
    store = result.store
    assert "Number c3" not in as_html(dossier(store, "desk/monday", record="c3"))
    assert {vote["reason"] for vote in votes(store, result.seals["replies"])} == {"***"}
    page = as_html(dossier(store, "desk/monday", record="c3", disclosure=Disclosure("auditor", "complaint 4711")))
    assert "Number c3 is not polite." in page


def test_verdicts_that_were_tampered_with_are_left_out_with_a_note(tmp_path):
    result = sealed(tmp_path, polite(Asked()))
    path = tmp_path / str(result.seals["replies"].verdicts_path)
    path.write_bytes(path.read_bytes()[:-1])
    told = dossier(result.store, "desk/monday")
    assert not told.is_intact
    assert any("What judges said of desk/monday@1 cannot be read" in note for note in told.notes)


def test_the_command_line_shows_scores_and_votes(monday):
    root = monday.store.root
    shown = cli(root, "judges", "desk/monday").output
    assert "polite" in shown
    assert "75.0%" in shown
    assert "3 of 4 records pass, score 0.750" in cli(root, "show", "desk/monday@1").output
    told = json.loads(cli(root, "judges", "desk/monday@1", "--record", "c3", "--json").output)
    assert [(one["reference"], one["judge"], one["passed"]) for one in told["judged"]] == [("desk/monday@1", "polite", 3)]
    assert [vote["reason"] for vote in told["votes"]] == ["Number c3 is not polite."] * 2
    nothing = CliRunner().invoke(app, ["judges", "desk/monday@0", "--root", root])
    assert nothing.exit_code != 0


def test_the_calls_of_a_version_are_its_judges_too(monday):
    assert set(calls(monday.store, "desk/monday", 1)["agent"]) == {"replies", "replies.polite"}
    assert set(calls(monday.store, "desk/monday", 1, agent="replies")["agent"]) == {"replies"}


def test_another_rubric_is_another_version_of_the_agent(tmp_path):
    sealed(tmp_path, polite(Asked()))
    sealed(tmp_path, polite(Asked(), rubric="The reply is short.", votes=5))
    before, after = agent_versions(mao.StateStore(tmp_path), "desk", "replies")
    changed = agent_diff(before, after).declared
    assert set(changed) == {"judges.polite.rubric", "judges.polite.version", "judges.polite.votes"}
    assert changed["judges.polite.rubric"] == ("The reply is polite.", "The reply is short.")
    assert "judges.polite.rubric" in cli(tmp_path, "agents", "diff", "desk/replies").output


def test_a_replay_asks_no_judge(tmp_path):
    ask = Asked()
    result = sealed(tmp_path, polite(ask))
    asked = len(ask.sent)
    found = mao.replay(result.store, desk(polite(ask)), result.seals["replies"])
    assert found.same
    assert len(ask.sent) == asked


# -- bisect ------------------------------------------------------------------------------------------------------------------------------

RUDE_SINCE = 3


@pytest.fixture(scope="module")
def days(tmp_path_factory):
    """A history of several days, in which one release became rude. Its replies tell the days apart. For reading only."""
    root = tmp_path_factory.mktemp("days")
    for day in range(7):
        rude = "It is your own fault." if day >= RUDE_SINCE else "Sorry."
        sealed(root, workflow=f"day-{day}", says=lambda one, day=day, rude=rude: f"{rude} {one.number} {day}")
    return mao.StateStore(root)


def sorry(rubric, case):
    return mao.Verdict(reason="", passed="Sorry" in case["said"]["text"], score=1.0)


def test_bisect_asks_a_judge_about_the_samples_of_few_versions(days):
    store = days
    good = AskedJudge(desk(polite(sorry, sample=2)), "replies", "polite")
    found = mao.bisect(store, "desk", good, agent="replies")
    assert (found.verdict, found.first_bad.workflow_id) == ("found", f"desk/day-{RUDE_SINCE}")
    assert (found.ends, found.searched, len(good.judgements)) == (2, 3, 5)
    assert {len(told.sample) for told in good.judgements} == {2}
    assert store.callers("desk") == ["replies"]  # nothing was logged, kept or sealed


def test_a_judge_that_wavers_is_asked_several_times(days):
    asked = Counter()

    def wavering(rubric, case):
        """Wrong the first time about each text, and right afterwards."""
        asked[case["said"]["text"]] += 1
        return mao.Verdict(reason="", passed=("Sorry" in case["said"]["text"]) is (asked[case["said"]["text"]] > 1), score=0.5)

    good = AskedJudge(desk(polite(wavering, votes=1)), "replies", "polite")
    found = mao.bisect(days, "desk", good, agent="replies", last="desk/day-2@1", repeat=3)
    assert (found.verdict, [probe.votes for probe in found.probes]) == ("never_bad", [2, 2])
    assert all(probe.is_noisy for probe in found.probes)


def test_what_the_agent_had_read_is_read_from_the_versions_that_it_had_read(monday):
    seen = []

    def reading(rubric, case):
        seen.append(case["read"]["complaints"]["text"])
        return mao.Verdict(reason="", passed=True, score=1.0)

    good = AskedJudge(desk(polite(reading, reads=["complaints"])), "replies", "polite")
    assert good(monday.store, monday.seals["replies"])
    assert sorted(seen) == [one.text for one in COMPLAINTS[:4]]


def test_a_version_that_could_not_be_judged_is_neither_good_nor_bad(monday):

    def down(rubric, case):
        raise ConnectionError

    with pytest.raises(mao.UnknownVersionError, match="not judged"):
        AskedJudge(desk(polite(down)), "replies", "polite")(monday.store, monday.seals["replies"])
    with pytest.raises(mao.WiringError, match="does not judge"):
        AskedJudge(desk(polite(sorry)), "replies", "polite")(monday.store, monday.seals["complaints"])
    with pytest.raises(mao.WiringError, match="no judge 'rude'"):
        AskedJudge(desk(polite(sorry)), "replies", "rude")


MODULE = """
import dagster_mao as mao
from tests.judged import desk, polite
from tests.review.test_verdicts import sorry

pipeline = desk(polite(sorry))
"""


def test_the_command_line_bisects_by_a_judge(days, tmp_path, monkeypatch):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "judged_desk.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path / "code")
    done = cli(days.root, "bisect", "desk", "--judge", "replies.polite", "--pipeline", "judged_desk:pipeline", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["first_bad"]["workflow_id"] == f"desk/day-{RUDE_SINCE}"
    assert json.loads(done.output)["judge"]["votes"] > 0
    wrong = CliRunner().invoke(app, ["bisect", "desk", "--judge", "polite", "--root", days.root])
    assert wrong.exit_code == 2
