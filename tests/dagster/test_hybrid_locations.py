"""Hybrid mode over three code locations of one instance: what fails in one is undone in all of them, in the reverse order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa

import dagster_mao as mao
from dagster_mao.choreography import redeliver
from dagster_mao.gateway import shared_store
from dagster_mao.journal._tables import COMPENSATORS, SAGAS
from dagster_mao.saga import sagas, unfinished
from tests.choreography.loans import Application, Ledger, applications
from tests.dagster.theatre import EAGER, Theatre
from tests.journal.bank import FencingBank

HYBRID: dict[str, Any] = {"mode": "hybrid", "micro_batch": EAGER}


class Acting(mao.Agent):
    def act(self, ctx: mao.AgentContext, record: str, bank: FencingBank) -> None:
        ctx.effect(self.name, lambda effect: bank.do(effect.key, self.name, record, effect.epoch), compares_epoch=True)

    def compensate(self, undo: mao.Undo, *, bank: FencingBank) -> None:
        for effect in undo.effects:
            bank.cancel(effect.key, undo.epoch)


class Inquiry(Acting):
    """Asks about each applicant, which others can see."""

    def execute(self, ctx: mao.AgentContext, applications: Application, *, bank: FencingBank) -> Application:
        self.act(ctx, applications.id, bank)
        return applications


@mao.agent
def rating(inquiry: mao.LazyFrame[Application]) -> mao.LazyFrame[Application]:
    return inquiry


class Letter(Acting):
    """Writes to each applicant; fails when it is told to, after that."""

    def execute(self, ctx: mao.AgentContext, rating: Application, *, bank: FencingBank, ledger: Ledger) -> Application:
        self.act(ctx, rating.id, bank)
        ledger.note("letter", ctx.workflow_id)
        return rating


class Stages:
    """Three teams' code locations: the second only reads."""

    def __init__(self, folder: Path, instance: dg.DagsterInstance, elsewhere: tuple[str, ...]) -> None:
        self.bank, self.instance = FencingBank(folder / "bank.db"), instance
        given = {"bank": dg.ResourceDefinition.hardcoded_resource(self.bank)}
        pipelines = [
            mao.Pipeline("loans", entry=applications, agents=[Inquiry], elsewhere=elsewhere, **HYBRID),
            mao.Pipeline("loans", listens={"inquiry": Application}, agents=[rating], **HYBRID),
            mao.Pipeline("loans", listens={"rating": Application}, agents=[Letter], **HYBRID),
        ]
        self.first, self.second, self.third = (Theatre(folder, instance, pipeline, **given) for pipeline in pipelines)
        self.store, self.ledger = self.first.store, self.first.ledger

    def play(self) -> None:
        for stage in (self.first, self.second, self.third):
            stage.play()

    def compensate(self, stage: Theatre) -> dg.ExecuteInProcessResult | str | None:
        """A tick of its sensor, and the run that it asks for; else why there is none."""
        requests = stage.tick("loans_compensation")
        return stage.launch(requests[0]) if requests else stage.reasons["loans_compensation"]

    def undone(self) -> list[str]:
        """What was cancelled, in order, by the kind of it."""
        with self.bank._connected() as connection:
            known = dict(connection.execute("SELECT key, max(kind) FROM ledger GROUP BY key"))
        return [known[key] for key in self.bank.asked("cancel")]

    def long_ago(self) -> None:
        """As if an hour had passed since whatever was noted."""
        with shared_store(str(self.store.database)).transaction() as connection:
            connection.execute(sa.update(SAGAS).values(fenced=SAGAS.c.fenced - 3600))
            connection.execute(sa.update(COMPENSATORS).values(seen=COMPENSATORS.c.seen - 3600))


@pytest.fixture
def stages(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    with dg.DagsterInstance.ephemeral() as instance:
        stages = Stages(tmp_path, instance, getattr(request, "param", ("rating", "letter")))
        stages.first.arrive("good", "bad", amounts=[100.0])
        stages.ledger.fail("letter loans/bad")
        stages.play()
        assert stages.bank.standing() == {("inquiry", "A0"): 2, ("letter", "A0"): 2}
        yield stages


def test_a_failure_is_undone_in_all_code_locations_each_by_its_own_run(stages: Stages) -> None:
    assert stages.store.effective("loans/bad") == {}
    waits = stages.compensate(stages.first)
    assert isinstance(waits, str)
    assert "what letter did is undone first, in another code location" in waits
    undone = stages.compensate(stages.third)
    assert isinstance(undone, dg.ExecuteInProcessResult)
    assert undone.success
    assert [event.step_key for event in undone.get_step_success_events()] == ["fence", "undo[letter]", "conclude"]
    assert stages.bank.standing() == {("inquiry", "A0"): 2, ("letter", "A0"): 1}
    assert stages.third.check("letter", "compensated").passed
    assert stages.compensate(stages.third) == "loans/bad, attempt {}: what inquiry did is undone first, in another code location".format(
        stages.store.seals("loans/bad")[0].attempt
    )
    last = stages.compensate(stages.first)
    assert isinstance(last, dg.ExecuteInProcessResult)
    assert last.success
    assert [event.step_key for event in last.get_step_success_events()] == ["fence", "undo[inquiry]", "conclude"]
    assert stages.undone() == ["letter", "inquiry"]
    assert stages.bank.standing() == {("inquiry", "A0"): 1, ("letter", "A0"): 1}, "the good workflow's stand"
    assert [seal.kind for seal in stages.store.seals("loans/bad")][-2:] == ["fence", "compensated"]
    assert stages.store.effective("loans/good").keys() == {"applications", "inquiry", "rating", "letter"}
    for stage in (stages.first, stages.third):
        assert stages.compensate(stage) == "Nothing is to be compensated."
    stages.play()
    assert stages.bank.standing() == {("inquiry", "A0"): 1, ("letter", "A0"): 1}, "what was fenced is nobody's any more"


def test_what_no_code_location_has_any_more_is_given_up_after_a_while_and_tried_again_when_it_is_back(stages: Stages) -> None:
    stages.long_ago()
    assert isinstance(stages.compensate(stages.first), str), "an attempt that nobody fenced was not waited for yet"
    with shared_store(str(stages.store.database)).transaction() as connection:
        connection.execute(sa.text("UPDATE mao_sagas SET asked = asked - 3600"))
        connection.execute(sa.text("UPDATE mao_steps SET started = started - 3600, ended = ended - 3600"))
        connection.execute(sa.text("UPDATE mao_pages SET at = at - 3600"))
    fenced = stages.compensate(stages.first)
    assert isinstance(fenced, dg.ExecuteInProcessResult)
    assert fenced.success, "the attempt is ended, though what comes first is not there"
    assert stages.store.seals("loans/bad")[-1].kind == "fence"
    assert stages.bank.asked("cancel") == []
    assert isinstance(stages.compensate(stages.first), str)
    stages.long_ago()
    given_up = stages.compensate(stages.first)
    assert isinstance(given_up, dg.ExecuteInProcessResult)
    assert not given_up.success
    assert stages.undone() == ["inquiry"]
    (left,) = sagas(stages.store, "loans", "loans/bad")[0].left
    assert (left.agent, left.error) == ("letter", "NobodyHasIt")
    reason = stages.compensate(stages.third)
    assert isinstance(reason, str)
    assert "--resume" in reason, "it waits for a person"


@pytest.mark.parametrize("stages", [()], indirect=True)
def test_who_listens_and_is_not_counted_on_fails_without_the_others_and_undoes_its_own(stages: Stages) -> None:
    assert stages.store.effective("loans/bad").keys() == {"applications", "inquiry", "rating"}
    assert [(one.kind, one.agents) for one in unfinished(stages.store, "loans")] == [("superseded", ("letter",))]
    assert isinstance(stages.compensate(stages.first), str)
    undone = stages.compensate(stages.third)
    assert isinstance(undone, dg.ExecuteInProcessResult)
    assert undone.success
    assert stages.bank.standing() == {("inquiry", "A0"): 2, ("letter", "A0"): 1}
    assert [seal.kind for seal in stages.store.seals("loans/bad")] == ["entry", "output", "output"], "nothing is fenced"
    assert unfinished(stages.store, "loans") == []
    stages.ledger.fail()
    redeliver(stages.store, stages.third.pipeline, "letter")
    stages.play()
    assert stages.bank.standing() == {("inquiry", "A0"): 2, ("letter", "A0"): 2}, "delivered again it is done anew"
    assert unfinished(stages.store, "loans") == []


@pytest.mark.parametrize("stages", [()], indirect=True)
def test_what_a_killed_run_of_an_agent_that_is_not_counted_on_left_is_undone_too(stages: Stages) -> None:
    """It told nobody how it ended; that its run is over is all that is known."""
    with shared_store(str(stages.store.database)).transaction() as connection:
        connection.execute(sa.text("UPDATE mao_steps SET state = 'sealing', ended = NULL WHERE state = 'failed'"))
        connection.execute(sa.text("UPDATE mao_deliveries SET state = 'failed' WHERE state = 'waiting'"))
    assert [one.kind for one in unfinished(stages.store, "loans")] == ["attempt"]
    found_dead = stages.compensate(stages.third)
    assert isinstance(found_dead, dg.ExecuteInProcessResult)
    assert found_dead.success
    undone = stages.compensate(stages.third)
    assert isinstance(undone, dg.ExecuteInProcessResult)
    assert stages.bank.standing() == {("inquiry", "A0"): 2, ("letter", "A0"): 1}
    assert unfinished(stages.store, "loans") == []
