"""What an agent's judges say of its batch, before the seal: a judge is called as an agent is, about the records of a sample.

A call is one vote on one record. So it passes the gateway under the judge's own policy, is logged, traced, kept and found again like any
call of an agent, under the name `agent.judge`.
"""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import polars as pl
from pydantic import BaseModel

from dagster_mao.agent import Agent, AgentContext, Input, Judge, NoEffects, Shape, Verdict, check_asked
from dagster_mao.boundary._call import Calls, RecordCalls
from dagster_mao.boundary._checks import Check, Severity
from dagster_mao.boundary._policy import in_force
from dagster_mao.boundary._rehearsal import Rehearsal, WouldBe
from dagster_mao.boundary._scratch import Scratch
from dagster_mao.configuration import config_digest
from dagster_mao.contract import MASK, Contract, has_personal, hide
from dagster_mao.errors import MaoError
from dagster_mao.gateway import CallKeys, Gateway, Policy, overheard, total
from dagster_mao.state import VERDICTS_SCHEMA, Attempt, Beside, Seal, StateStore

SHOWN = 5  # records that a check shows
_REASON = 500  # characters of a reason that a check shows
VERDICTS = "verdicts"
"""Under this name a check's metadata has the records that did not pass."""


class Vote(BaseModel):
    """One answer of a judge about one record, with what it used."""

    record: str | None
    reason: str
    passed: bool
    score: float
    model: str | None
    input_tokens: int
    output_tokens: int
    cost: float


def judge_policy(agent: Agent, judge: Judge, changes: Mapping[str, Mapping[str, Any]]) -> Policy:
    """The policy of a judge with what an operator changes of it, under the name `agent.judge`; changes for all are not for judges."""
    name = f"{agent.name}.{judge.name}"
    return in_force(judge.policy, {name: changes[name]} if name in changes else {}, name)


def sample_of(keys: pl.LazyFrame, size: int) -> list[str]:
    """The records that are judged, by their keys as text (`keys` has one column): those whose sha256 is lowest.

    The same keys give the same sample, in whatever order, and a record stays in the sample while it is in the batch and no lower one comes.
    """
    texts = keys.select(pl.nth(0).cast(pl.String)).collect(engine="streaming").to_series()
    if len(texts) <= size:
        return sorted(texts.to_list())
    return sorted(heapq.nsmallest(size, texts, key=lambda key: (hashlib.sha256(key.encode()).digest(), key)))


# -- what a judge said ---------------------------------------------------------------------------------------------------------------


@dataclass
class Judgement:
    """What one judge said of a batch of so many `rows`: its `votes` by record, and why there is no verdict on others."""

    judge: Judge
    rows: int
    sample: Sequence[str | None]
    model: str | None
    personal: bool  # it was sent personal fields
    hidden: bool  # the key is personal
    policy: Policy | None = None  # in force, where an operator changed the judge's own
    votes: dict[str | None, list[Vote]] = field(default_factory=dict)
    unjudged: dict[str | None, str] = field(default_factory=dict)

    def is_open(self, record: str | None) -> bool:
        """Whether another vote could still decide: the first passes alone, after that the majority of all counts."""
        votes = self.votes.get(record, [])
        if not votes:
            return True
        most = self.judge.votes // 2
        yes = sum(vote.passed for vote in votes)
        return not votes[0].passed and yes <= most and len(votes) - yes <= most

    def passed(self, record: str | None) -> bool:
        votes = self.votes[record]
        return votes[0].passed or 2 * sum(vote.passed for vote in votes) > len(votes)

    def score(self, record: str | None) -> float:
        votes = self.votes[record]
        return sum(vote.score for vote in votes) / len(votes)

    @property
    def judged(self) -> list[str | None]:
        """The records with a verdict, in the order of the sample."""
        return [record for record in self.sample if record in self.votes and record not in self.unjudged]

    @property
    def reached(self) -> bool:
        """Whether as large a share of the judged records passed as is asked for; also where none was judged."""
        judged = self.judged
        return not judged or sum(map(self.passed, judged)) / len(judged) >= self.judge.min_share

    def summary(self) -> dict[str, Any]:
        """Its numbers, as the seal keeps them; score and share are None where nothing was judged."""
        judged, every = self.judged, [vote for votes in self.votes.values() for vote in votes]
        models = sorted({vote.model for vote in every if vote.model}) or ([self.model] if self.model else [])
        passed = sum(map(self.passed, judged))
        return {
            "score": round(sum(map(self.score, judged)) / len(judged), 6) if judged else None,
            "share_passed": round(passed / len(judged), 6) if judged else None,
            "judged": len(judged),
            "passed": passed,
            "not_judged": len(self.unjudged),
            "rows": self.rows,
            "votes": len(every),
            "input_tokens": sum(vote.input_tokens for vote in every),
            "output_tokens": sum(vote.output_tokens for vote in every),
            "cost": round(sum(vote.cost for vote in every), 9),
            "model": ", ".join(models) or None,
            "version": self.judge.version,
            **({"policy": self.policy.describe()} if self.policy is not None else {}),
        }

    def check(self) -> Check:
        """The verdict on the batch."""
        told, judge = self.summary(), self.judge
        reached = self.reached
        severity: Severity = judge.severity if not reached or judge.required else "warn"
        facts = {name: value for name, value in told.items() if value is not None}
        shown = {VERDICTS: self._shown()} if self.unjudged or told["passed"] < told["judged"] else {}
        return Check(judge.check, reached and not self.unjudged, self._told(told, reached), {**facts, **shown}, severity)

    def _told(self, told: Mapping[str, Any], reached: bool) -> str:
        if not self.rows:
            return "Nothing to judge: the batch is empty"
        of = f" of {self.rows:,}" if self.rows > len(self.sample) else ""
        parts = []
        if told["judged"]:
            asked = "" if reached else f", and {self.judge.min_share:.1%} are asked for"
            parts = [f"{told['passed']:,} of {told['judged']:,} judged records pass ({told['share_passed']:.1%}){asked}"]
            parts += [f"score {told['score']:.3f}"]
        if self.unjudged:
            why = ", ".join(sorted(set(self.unjudged.values())))
            parts.append(f"{len(self.unjudged):,} of the sample not judged: {why}")
        return f"{'; '.join(parts)}. Sample: {len(self.sample):,}{of} records"

    def _shown(self) -> list[dict[str, Any]]:
        """The first records that did not pass, or were not judged: what may be shown of them."""
        rows: list[dict[str, Any]] = []
        for record in [*(record for record in self.judged if not self.passed(record)), *self.unjudged][:SHOWN]:
            votes = self.votes.get(record, [])
            reason = next((vote.reason for vote in votes if not vote.passed), "")
            named = MASK if self.hidden else record
            if record in self.unjudged:
                rows.append({"record": named, "votes": "", "score": None, "reason": f"not judged: {self.unjudged[record]}"})
                continue
            said = f"{sum(vote.passed for vote in votes)} of {len(votes)} pass it"
            reason = MASK if self.personal else reason[:_REASON]
            rows.append({"record": named, "votes": said, "score": round(self.score(record), 6), "reason": reason})
        return rows

    def rows_of(self) -> list[dict[str, Any]]:
        """As `VERDICTS_SCHEMA` says, in the order of the sample."""
        about = {"judge": self.judge.name, "version": self.judge.version, "personal": self.personal}
        found = []
        for record in self.sample:
            for number, vote in enumerate(self.votes.get(record, ()), 1):
                found.append({**about, "vote": number, **vote.model_dump()})
            if record in self.unjudged:
                found.append({**about, "record": record, "unjudged": self.unjudged[record], "model": self.model})
        return found


# -- asking --------------------------------------------------------------------------------------------------------------------------


class Judging:
    """The judges of one step. A context manager, around the seal: their calls are logged and traced at its end.

    Raises `WiringError` for a judge that cannot be asked: before the agent is paid for.
    """

    def __init__(
        self,
        store: StateStore,
        agent: Agent,
        attempt: Attempt,
        context: AgentContext,
        resources: Mapping[str, Any],
        scratch: Scratch,
        read: Mapping[str, pl.LazyFrame],
        *,
        policies: Mapping[str, Mapping[str, Any]],
        fresh: bool = False,
        rehearsal: Rehearsal | None = None,
        judges: Sequence[Judge] | None = None,
    ) -> None:
        self._store, self._agent, self._attempt, self._context = store, agent, attempt, context
        self._resources, self._scratch, self._read = resources, scratch, read
        self._fresh, self._rehearsal = fresh, rehearsal
        self._judges = agent.panel if judges is None else judges
        self._policies = {judge.name: judge_policy(agent, judge, policies) for judge in self._judges}
        self._ends = ExitStack()
        self._calls: list[Calls] = []
        self.judgements: list[Judgement] = []
        for judge in self._judges:
            check_asked(agent, judge, resources)
            Gateway(self._policies[judge.name], f"{attempt.pipeline}.{agent.name}.{judge.name}", store.database)

    def __enter__(self) -> Judging:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        came_to = error.calls if isinstance(error, MaoError) else None
        self._ends.__exit__(kind, error, trace)
        if isinstance(error, MaoError):
            error.calls = came_to  # what the agent's own calls came to

    def sealed(self, seal: Seal) -> None:
        """The version that they judged."""
        for calls in self._calls:
            calls.sealed = seal

    def judge(self, batch: pl.LazyFrame, rows: int) -> list[Judgement]:
        """What each says of the batch. Whatever a judge does not answer is not judged, and says why."""
        samples: dict[int, list[str | None]] = {}
        for judge in self._judges:
            if judge.sample not in samples:
                samples[judge.sample] = self._sample(batch, rows, judge.sample)
            self.judgements.append(self._asked(judge, batch, rows, samples[judge.sample]))
        return self.judgements

    def frame(self) -> pl.DataFrame:
        """All of it, to be sealed."""
        return pl.DataFrame([row for one in self.judgements for row in one.rows_of()], schema=VERDICTS_SCHEMA)

    def summary(self) -> str:
        """The numbers by judge, as JSON."""
        return json.dumps({one.judge.name: one.summary() for one in self.judgements}, sort_keys=True)

    def _sample(self, batch: pl.LazyFrame, rows: int, size: int) -> list[str | None]:
        if self._agent.output.key is None:
            return [None] if rows else []
        return [*sample_of(batch.select(self._agent.output.key), size)]

    def _asked(self, judge: Judge, batch: pl.LazyFrame, rows: int, sample: Sequence[str | None]) -> Judgement:
        case = _case(self._agent, judge)
        llm = self._resources.get(judge.llm) if judge.ask is None else None
        sends = judge.send_personal and bool(getattr(llm, "send_personal", True))
        contract = self._agent.output
        told = Judgement(
            judge=judge,
            rows=rows,
            sample=sample,
            model=judge.model or (getattr(llm, "model", None) or None),
            personal=sends and any(has_personal(one.contract.describe()) for one in case),
            hidden=contract.key in contract.personal,
            policy=None if self._policies[judge.name] == judge.policy else self._policies[judge.name],
        )
        if not sample:
            return told
        asked = _AskedAsync(self._agent, judge, case, sends) if judge.is_async else _Asked(self._agent, judge, case, sends)
        frames = {self._agent.name: batch, **{name: self._read[name] for name in judge.reads}}
        calls = self._opened(judge, asked, llm)
        self._vote(told, calls, asked, frames)
        with calls.telling("the calls of a judge whose step was killed were not logged"):
            calls.summary()
        return told

    def _opened(self, judge: Judge, asked: _Asked, llm: Any) -> Calls:
        policy = self._policies[judge.name]
        calls = Calls(
            self._store,
            asked,
            self._attempt,
            replace(policy, when_open="defer") if policy.breaker else policy,
            replace(self._context, agent=asked.name, having=NoEffects(asked.name)),
            self._resources,
            self._scratch,
            {},
            # What makes its words others: the model that is asked and how, and what it may see.
            config=json.dumps([config_digest({} if llm is None else {judge.llm: llm}), judge.send_personal, self._agent.output.hash]),
            fresh=self._fresh,
            rehearsal=self._rehearsal,
        )
        self._calls.append(calls)
        return self._ends.enter_context(calls)

    def _vote(self, told: Judgement, calls: Calls, asked: _Asked, frames: Mapping[str, pl.LazyFrame]) -> None:
        pending = list(told.sample)
        for number in range(1, told.judge.votes + 1):
            # Another vote is another call, with a key of its own.
            asked.vote, calls.keys = number, CallKeys(self._attempt.workflow_id, self._attempt.epoch, f"{asked.name}#{number}")
            unanswered = _Unanswered()
            try:
                for votes in RecordCalls(calls, unanswered).run(_of(asked.inputs, frames, pending)):
                    for vote in votes:
                        if isinstance(vote, Vote):
                            told.votes.setdefault(vote.record, []).append(vote)
            except MaoError as error:  # a judge never costs a batch that was made and paid for
                # What an author's code says may quote a record.
                is_told = error.tells_no_values or not any(has_personal(one.contract.describe()) for one in asked.inputs)
                why = f"{type(error).__name__}: {error.what}" if is_told else type(error).__name__
                unanswered.why |= {record: why for record in pending if len(told.votes.get(record, ())) < number}
            told.unjudged |= unanswered.why
            pending = [record for record in pending if record not in told.unjudged and told.is_open(record)]
            if not pending:
                return


def asked_about(
    store: Beside,
    agent: Agent,
    judge: Judge,
    attempt: Attempt,
    context: AgentContext,
    resources: Mapping[str, Any],
    batch: pl.LazyFrame,
    rows: int,
    read: Mapping[str, pl.LazyFrame],
) -> Judgement:
    """What one judge says of a batch, asked live, in a store that is thrown away: nothing is kept, and nobody's breaker opens."""
    rehearsal = Rehearsal(WouldBe(personal=True))
    options: dict[str, Any] = {"policies": {}, "rehearsal": rehearsal, "judges": [judge]}
    with Scratch(store) as scratch, Judging(store, agent, attempt, context, resources, scratch, read, **options) as judging:
        (told,) = judging.judge(batch, rows)
    return told


def _of(inputs: Sequence[Input], frames: Mapping[str, pl.LazyFrame], records: Sequence[str | None]) -> dict[str, pl.LazyFrame]:
    """Of each frame the rows of these records; of one without a key, its row."""
    keys = pl.Series([record for record in records if record is not None], dtype=pl.String).implode()

    def chosen(one: Input) -> pl.LazyFrame:
        key, frame = one.contract.key, frames[one.upstream]
        return frame if key is None else frame.filter(pl.col(key).cast(pl.String).is_in(keys))

    return {one.upstream: chosen(one) for one in inputs}


def _case(agent: Agent, judge: Judge) -> tuple[Input, ...]:
    """What a judge is sent about one record: the agent's own, first, and what it had read."""
    own = Input("said", agent.name, agent.output, Shape.RECORD, required=True)
    read = {one.upstream: one for one in agent.inputs}
    return (own, *(Input(f"read_{name}", name, read[name].contract, Shape.RECORD, required=False) for name in judge.reads))


class _Unanswered:
    """Where the records go on which there was no vote: as the calls of a step see it."""

    def __init__(self) -> None:
        self.why: dict[str | None, str] = {}
        self.aside = self.deferrals = self

    def may_set_aside(self, more: int) -> bool:
        return True

    def refuse_share(self) -> None: ...

    def add(self, record: str, why: str) -> None:
        self.why[record] = f"the breaker {why} is open"

    def add_unmade(self, contract: Contract[Any], key: Any, error: Exception) -> None:
        self.add_failed(key, f"execute: {type(error).__name__}", (), {})

    def add_failed(self, key: Any, rule: str, inputs: Sequence[Input], row: Mapping[str, Any]) -> None:
        self.why[None if key is None else str(key)] = rule.removeprefix("execute: ")


class _Asked(Agent):
    """A judge as the calls of a step see it: an agent that makes a vote of a record, and of what belongs to it."""

    def __init__(self, agent: Agent, judge: Judge, case: tuple[Input, ...], send_personal: bool) -> None:
        self.vote = 1
        self._judge, self._case, self._send_personal = judge, case, send_personal
        self.name, self.version, self.model, self.concurrency = f"{agent.name}.{judge.name}", judge.version, judge.model, judge.concurrency
        self.description = f"Judges what {agent.name} said: {judge.name}"
        # What is else read from the signature of `execute`.
        names = tuple(one.parameter for one in case)
        vars(self).update(inputs=case, output=Contract.of(Vote), output_shape=Shape.RECORD, _binding=(True, names, judge.resources, False))

    def execute(self, ctx: AgentContext, *case: Any, **resources: Any) -> Any:
        """The vote."""
        ask = self._judge.ask
        assert ask is not None
        with overheard() as used:
            said = ask(self._judge.rubric, self._sent(case))
        return self._vote_of(ctx, said, used)

    def _sent(self, case: Sequence[Any]) -> dict[str, Any]:
        """What is sent: data, apart from what is asked of it."""
        shown = [self._shown(one, value) for one, value in zip(self._case, case, strict=True)]
        read = {one.upstream: value for one, value in zip(self._case[1:], shown[1:], strict=True)}
        return {"agent": self._case[0].upstream, "said": shown[0], **({"read": read} if read else {})}

    def _shown(self, one: Input, value: Any) -> Any:
        if value is None:
            return None
        # What is computed from fields is left out: it may tell what is masked.
        told = value.model_dump(mode="json", by_alias=False, exclude_computed_fields=True)
        return told if self._send_personal else hide(one.contract.describe(), told)

    def _vote_of(self, ctx: AgentContext, said: Any, used: Sequence[Any]) -> Vote:
        verdict = Verdict.model_validate(said)
        came_to = total(used)
        model, came_in, came_out, cost = came_to.columns()
        return Vote(
            record=ctx.record,
            reason=verdict.reason,
            passed=verdict.passed,
            score=verdict.score,
            model=model or self.model,
            input_tokens=came_in,
            output_tokens=came_out,
            cost=cost,
        )


class _AskedAsync(_Asked):
    """The same, awaited: a model, or an async function."""

    async def execute(self, ctx: AgentContext, *case: Any, **resources: Any) -> Vote:
        """The vote."""
        judge, sent = self._judge, self._sent(case)
        with overheard() as used:
            if judge.ask is not None:
                said = await judge.ask(judge.rubric, sent)
            else:
                llm = resources[judge.llm]
                # Another vote is asked for by another seed: the same request may be answered by the same answer.
                seed = None if self.vote == 1 else int(getattr(llm, "seed", None) or 0) + self.vote - 1
                said = await llm.ask(Verdict, judge.instructions, json.dumps(sent, ensure_ascii=False), model=judge.model, seed=seed)
        return self._vote_of(ctx, said, used)
