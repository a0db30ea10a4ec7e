"""One agent's way from its pins to its seal."""

from __future__ import annotations

import datetime as dt
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import chain
from typing import TYPE_CHECKING, Any

import polars as pl
from pydantic import BaseModel

from dagster_mao.agent import Agent, Input
from dagster_mao.boundary._aside import INPUT_SIDE, OUTPUT_SIDE, Aside
from dagster_mao.boundary._checks import BREAKER, OUTPUT, PINNED_BASE, Check, Severity, input_check, judged, refusal, with_failures
from dagster_mao.boundary._deferrals import Deferrals
from dagster_mao.boundary._expect import expected
from dagster_mao.boundary._failure import cause, failed
from dagster_mao.boundary._inputs import CHUNK_RECORDS
from dagster_mao.boundary._scratch import Scratch, Spool
from dagster_mao.contract import Contract, RuleFailure, Sifted, Verdict
from dagster_mao.errors import (
    AgentFailedError,
    BreakerOpenError,
    FencedError,
    IncompatibleContractError,
    InvalidRecordsError,
    MaoError,
    PinError,
    StaleStateError,
    TamperedError,
)
from dagster_mao.gateway import Policy
from dagster_mao.state import Attempt, CallSummary, Provenance, Seal, Staged, StateStore, refuse_reader, staged

if TYPE_CHECKING:
    from dagster_mao.boundary._judging import Judging

_SAMPLES = 5
_LIBRARY_VERSION = version("dagster-mao")


@dataclass(frozen=True)
class Outcome:
    """What became of a step. `reused`: the same output had been sealed by this attempt before, so no version was added.

    `calls`: what its calls came to.
    """

    seal: Seal
    checks: tuple[Check, ...]
    reused: bool
    calls: CallSummary = field(default_factory=CallSummary)


class Step:
    """One agent's way from its pins to its seal, and the checks met on it.

    `aside` are the records set aside (None without a quarantine), `deferrals` those that wait for another run.
    """

    def __init__(self, store: StateStore, agent: Agent, attempt: Attempt, scratch: Scratch) -> None:
        self._store, self._agent, self._output, self._attempt, self._scratch = store, agent, agent.output, attempt, scratch
        self._checks: dict[str, Check] = {}
        self.aside = Aside(attempt.id) if agent.quarantine else None
        self.deferrals = Deferrals(agent)
        self._came_in = 0  # records to account for; counted only where some may be set aside
        self._refused_before = 0  # of them, those set aside before the agent was called

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Whatever goes wrong inside is raised with the agent, the workflow and the checks reached until then."""
        try:
            yield
        except MaoError as error:
            if isinstance(error, (PinError, StaleStateError, FencedError, TamperedError)):
                self._checks[PINNED_BASE] = Check(PINNED_BASE, False, str(error), self._pins_metadata([]))
            if isinstance(error, BreakerOpenError) and self._has_breaker_check:
                self._checks[BREAKER] = Check(BREAKER, False, error.what, _opened(error))
            error.agent, error.workflow = error.agent or self._agent.name, error.workflow or self._attempt.workflow_id
            error.checks = tuple(self._checks.values())
            raise

    @property
    def _has_breaker_check(self) -> bool:
        """Whether the check is declared: by the agent, whatever an operator's override makes of its policy."""
        return bool(self._agent.policy and self._agent.policy.breaker)

    def tell_breaker(
        self, policy: Policy, opened: BreakerOpenError | None, fallbacks: int, closed_since: dt.datetime | None = None
    ) -> None:
        """How the breaker stood. `opened` is the refusal that the fallback, or waiting, was the answer to; None where none was refused.

        `closed_since`: when it closed after that; None where it did not.
        """
        if not self._has_breaker_check:
            return
        if opened is not None:
            waiting = f"{self.deferrals.own:,} records wait for the next run" if self.deferrals.own else ""
            instead = f"{fallbacks:,} answers are the fallback's" if fallbacks else ""
            told = "; ".join(part for part in (waiting, instead) if part) or "all its calls were answered in the end"
            facts = {**_opened(opened, closed_since), "deferred": self.deferrals.own, "fallbacks": fallbacks}
            since = f"{opened.since:%Y-%m-%d %H:%M:%S} UTC"
            stood = f"Open since {since}" if closed_since is None else f"Open from {since} to {closed_since:%Y-%m-%d %H:%M:%S} UTC"
            what = f"{stood} ({opened.why}): {told}"
            self._checks[BREAKER] = Check(BREAKER, False, what, facts, "warn")
        elif policy.breaker is None:
            self._checks[BREAKER] = Check(BREAKER, True, "No breaker in force: an operator switched it off")
        else:
            self._checks[BREAKER] = Check(BREAKER, True, "Closed: all calls were let through")

    def keep_aside(self, quarantined: pl.DataFrame) -> None:
        """Keeps in quarantine what was there before. Raises `InvalidRecordsError` when the agent declares none any more."""
        if self.aside is not None:
            self.aside.keep(quarantined)
        elif quarantined.height:
            raise InvalidRecordsError(
                f"{quarantined.height} records are in its quarantine, and it declares none any more",
                fix="declare quarantine=mao.Quarantine() again, or correct all of them",
            )

    # -- what it may read ------------------------------------------------------------------------------------------------------------

    def pin(self) -> list[Seal]:
        """The versions that it may read, one per input."""
        pinned = [self._attempt.pin(i.upstream) for i in self._agent.inputs]
        for seal in pinned:
            refuse_reader(seal, self._agent.name)
        self._attempt.require_one_entry(self._agent.name, pinned)
        self.deferrals.carry(self._store, pinned)
        told = ", ".join(f"{seal.agent}@{seal.version}" for seal in pinned) or "nothing: it is the entry"
        waiting = f"; {self.deferrals.carried:,} records wait for another run above" if self.deferrals.carried else ""
        self._checks[PINNED_BASE] = Check(PINNED_BASE, True, f"Reads {told}{waiting}", self._pins_metadata(pinned))
        return pinned

    def _pins_metadata(self, pinned: Sequence[Seal]) -> dict[str, Any]:
        attempt = self._attempt
        return {
            "workflow": attempt.workflow_id,
            "attempt": attempt.id,
            "base": attempt.base,
            "parents": [seal.as_parent.model_dump() for seal in pinned],
            **({"deferred": self.deferrals.carried} if self.deferrals.carried else {}),
        }

    def read(self, pinned: Sequence[Seal]) -> dict[str, pl.LazyFrame]:
        """By upstream, the pinned rows that keep the consumer's contract, all with the same keys."""
        inputs = self._agent.inputs
        frames = {i.upstream: self._held(i, seal) for i, seal in zip(inputs, pinned, strict=True)}
        self._refuse_if_failed()
        frames = self._without_aside(frames)
        self._align(frames)
        self._refuse_if_failed()
        frames = self._without_aside(frames)
        if self.aside is not None or self.deferrals.carried:
            self._count_in(frames)
        self._limit_share()
        return frames

    def _count_in(self, frames: Mapping[str, pl.LazyFrame]) -> None:
        driver = _driver(self._agent, frames)
        if driver is None:
            return
        left = _count(driver[1])
        if not left and self.deferrals.carried:
            raise PinError(
                f"All {self.deferrals.carried:,} records that it could read wait for another run",
                agent=self._agent.name,
                workflow=self._attempt.workflow_id,
                fix="materialise the agents above it again: they ask only for what was not answered",
            )
        self._refused_before = self._quarantined()
        self._came_in = left + self._refused_before + self.deferrals.told

    def left_out(self) -> list[str]:
        """Keys of records that are in what was pinned, and are not given to the agent."""
        aside = self.aside.keys if self.aside is not None else set()
        return sorted({*aside, *self.deferrals.carried_records})

    def _held(self, wanted: Input, seal: Seal) -> pl.LazyFrame:
        """One upstream's rows, held to the consumer's contract."""
        contract, rows = wanted.contract, self.deferrals.without(self._upgraded(wanted, seal), wanted.contract.key)
        # The producer's check of the very same contract on the very same bytes is in the seal.
        proven = seal.contract_hash == contract.hash
        if proven:
            waiting = bool(self.deferrals.carried and contract.key)
            verdict = Verdict(contract.name, _count(rows) if waiting else seal.row_count, 0, ())
        elif self.aside is None:
            verdict = contract.check(rows)
        else:
            sifted = contract.sift(rows)
            verdict, rows = sifted.verdict, sifted.valid
            self.aside.add_rows(INPUT_SIDE, wanted.upstream, contract, sifted.broken)
        failures = [*verdict.failures, *_one_record(contract, verdict.rows)]
        self._judge(input_check(wanted.upstream), contract, verdict, failures, reads=seal.reference, proven=proven)
        return rows

    def _upgraded(self, wanted: Input, seal: Seal) -> pl.LazyFrame:
        """The rows as rows of the consumer's contract, which may be younger than the one they were sealed under."""
        try:
            return wanted.contract.upgrade(self._store.read(seal), json.loads(seal.contract_schema))
        except IncompatibleContractError as error:
            error.what = f"{seal.reference}: {error.what}"
            error.fix = f"materialise {seal.agent} again under the new contract, or {error.fix}"
            check = input_check(wanted.upstream)
            self._checks[check] = Check(check, False, error.what, {"contract": wanted.contract.name, "reads": seal.reference})
            raise

    def _align(self, frames: Mapping[str, pl.LazyFrame]) -> None:
        """Every keyed upstream must have the same records; one that may lack some (`| None`) must still know no others."""
        keyed = [i for i in self._agent.inputs if i.contract.key]
        if len(keyed) < 2:
            return
        keys = {i.upstream: _keys(frames[i.upstream], i.contract) for i in keyed}
        for wanted in keyed:
            if not wanted.required:
                continue
            for other in keyed:
                absent = _absent(keys[other.upstream], keys[wanted.upstream])
                if len(absent):
                    rule = f"record in {other.upstream}, missing here"
                    self._add_failures(input_check(wanted.upstream), wanted.contract, [_key_failure(rule, wanted.contract, absent)])
                    if self.aside is not None:
                        self.aside.add_keys(INPUT_SIDE, wanted.upstream, wanted.contract, absent, rule)

    def _without_aside(self, frames: Mapping[str, pl.LazyFrame]) -> dict[str, pl.LazyFrame]:
        """A record that was set aside on one side is not read on any."""
        if self.aside is None or not self.aside.keys:
            return dict(frames)
        keys = pl.Series(sorted(self.aside.keys)).implode()
        named = {i.upstream: i.contract.key for i in self._agent.inputs}
        return {
            upstream: frame.filter(~pl.col(key).cast(pl.String).is_in(keys)) if (key := named[upstream]) else frame
            for upstream, frame in frames.items()
        }

    # -- what it made ----------------------------------------------------------------------------------------------------------------

    def as_frame(self, result: Any, *, from_fallback: bool | None = None) -> pl.LazyFrame:
        """What an agent returned, as a frame of the output contract's columns. Its values are judged later, its columns and dtypes here.

        `from_fallback` says who answered, for the field that is marked so; None for records that were handed in, which say it themselves.
        """
        if isinstance(result, (pl.LazyFrame, pl.DataFrame)):
            frame = result.lazy()
        elif isinstance(result, BaseModel):
            frame = self._to_frame([[result]])
        elif isinstance(result, Iterable) and not isinstance(result, (str, bytes, Mapping)) and not hasattr(result, "__arrow_c_stream__"):
            frame = self._to_frame(_chunks(result))
        else:
            # Another library's frame is iterable, by the names of its columns: they are no records, and no quarantine is to have them.
            what = f"It returned {type(result).__name__}, neither records nor a polars frame"
            raise AgentFailedError(what, agent=self._agent.name, fix=f"return {self._output.name} records or a frame of them")
        if from_fallback is not None and self._output.from_fallback is not None:
            frame = frame.with_columns(pl.lit(from_fallback).alias(self._output.from_fallback))
        try:
            schema = frame.collect_schema()
        except pl.exceptions.PolarsError as error:
            raise failed(self._agent, error) from cause(self._agent, error)
        failures = self._output.check(pl.DataFrame(schema=schema), exact=True).failures
        if failures:
            self._judge(OUTPUT, self._output, Verdict(self._output.name, 0, 0, failures), failures)
            self._refuse_if_failed()
        if schema == self._output.schema and schema.names() == self._output.schema.names():
            return frame
        nulls = [pl.col(name).cast(self._output.schema[name]) for name, dtype in schema.items() if dtype == pl.Null]
        return frame.with_columns(nulls).select(list(self._output.schema))

    def of_records(self, answered: Iterable[Sequence[BaseModel]]) -> pl.LazyFrame:
        """What a record-wise agent answered, chunk by chunk, as a frame of the output contract's columns."""
        return self._to_frame(answered, called=True)

    def rows_of(self, records: Sequence[Any]) -> pl.DataFrame | None:
        """Records as rows; None where one of them can be no row."""
        rows, refused = self._output.sift_records(records)
        return None if refused else rows

    def _to_frame(self, chunks: Iterable[Sequence[Any]], *, called: bool = False) -> pl.LazyFrame:
        rows, rest = Spool(self._scratch, self._output.schema), iter(chunks)
        for chunk in rest:
            if self.aside is not None:
                made, refused = self._output.sift_records(chunk)
                self.aside.add_refused(OUTPUT_SIDE, self._output, refused)
                rows.append(made)
                continue
            try:
                rows.append(self._output.to_frame(chunk))
            except InvalidRecordsError:
                # All of them are judged, unless that would be further calls.
                verdict = self._output.check_records(chunk if called else chain(chunk, chain.from_iterable(rest)))
                self._judge(OUTPUT, self._output, verdict, verdict.failures)
                self._refuse_if_failed()
        return rows.scan()

    def seal(
        self,
        frame: pl.LazyFrame | Staged,
        pinned: Sequence[Seal],
        read: Mapping[str, pl.LazyFrame],
        *,
        started: float,
        policy: Policy | None = None,
        overridden: bool = False,
        opened: BreakerOpenError | None = None,
        closed_since: dt.datetime | None = None,
        answered_instead: bool = False,
        summary: CallSummary | None = None,
        judging: Judging | None = None,
        **provenance: Any,
    ) -> Outcome:
        """Holds the batch to the output contract and makes it a version, with what was set aside and what waits beside it.

        `opened` is the breaker's refusal that the `policy` in force had an answer to, `closed_since` when it closed after that, `summary`
        what the calls came to. `judging` asks the agent's judges.
        """
        contract = self._output
        if policy is not None:
            self.tell_breaker(policy, opened, 0, closed_since)
        with ExitStack() as files:
            batch = frame if isinstance(frame, Staged) else files.enter_context(sunk(self._store, self._agent, frame))
            rows, kept = self._judge_output(batch.scan(), read)
            self._refuse_if_failed()
            if not self._agent.inputs:
                self._came_in = rows + self._quarantined()
            self._limit_share()
            self._tell_aside()
            if not rows and not self._quarantined() and self.deferrals.own and opened is not None:
                raise opened
            if kept is not None:
                batch = files.enter_context(sunk(self._store, self._agent, kept))
            fallbacks = self._fallbacks(batch) if answered_instead else 0
            if policy is not None:
                self.tell_breaker(policy, opened, fallbacks, closed_since)
            self._expect(batch, rows)
            verdicts = self._judged(judging, batch, rows, files) if judging is not None and self._agent.panel else None
            sealed, reused = self._attempt.seal(
                self._agent.name,
                batch,
                row_count=rows,
                schema=contract.schema,
                parents=[seal.as_parent for seal in pinned],
                quarantine=self._staged_aside(files),
                quarantined=self._quarantined(),
                deferred=self._staged_deferred(files),
                deferred_count=self.deferrals.told,
                verdicts=verdicts,
                provenance=Provenance(
                    contract=contract.name,
                    contract_version=contract.version,
                    contract_hash=contract.hash,
                    contract_schema=json.dumps(contract.describe(), sort_keys=True),
                    key=contract.key,
                    latency_seconds=round(time.perf_counter() - started, 6),
                    library_version=_LIBRARY_VERSION,
                    fallbacks=fallbacks or None,
                    policy=json.dumps(policy.describe(), sort_keys=True) if policy is not None and overridden else None,
                    judged=judging.summary() if judging is not None and judging.judgements else None,
                    usage=summary.model_dump_json() if summary is not None and summary != CallSummary() else None,
                    **provenance,
                ),
            )
        if judging is not None:
            judging.sealed(sealed)
        return Outcome(sealed, tuple(self._checks.values()), reused, summary or CallSummary())

    def _fallbacks(self, batch: Staged) -> int:
        """How many of the rows to be sealed are the fallback's."""
        answered = pl.col(str(self._output.from_fallback))
        return int(batch.scan().select(answered.sum()).collect(engine="streaming").item())

    def _staged_deferred(self, files: ExitStack) -> Staged | None:
        return files.enter_context(staged(self._store.objects, self.deferrals.frame())) if self.deferrals.told else None

    def _judge_output(self, batch: pl.LazyFrame, read: Mapping[str, pl.LazyFrame]) -> tuple[int, pl.LazyFrame | None]:
        """How many rows keep the contract; and these rows, where they are not all."""
        contract, kept = self._output, None
        refused = [] if self.aside is None else self.aside.failures(contract, OUTPUT_SIDE, _SAMPLES)
        if self.aside is None:
            verdict = contract.check(batch, exact=True)
        else:
            sifted = self._without_doubled(contract.sift(batch, exact=True))
            verdict, kept = sifted.verdict, sifted.valid if sifted.broken.height else None
            self.aside.add_rows(OUTPUT_SIDE, None, contract, sifted.broken)
        self._judge(OUTPUT, contract, verdict, [*refused, *verdict.failures, *_one_record(contract, verdict.rows)])
        driver = _driver(self._agent, read)
        if driver and driver[0] == contract.key and (self._checks[OUTPUT].passed or self.aside is not None):
            self._require_conserved(driver[1], _keys(batch, contract))
        return verdict.rows - (verdict.failed_rows if kept is not None else 0), kept

    def _expect(self, batch: Staged, rows: int) -> None:
        """Holds what would be sealed to what the agent expects of it as a whole."""
        self._checks |= {check.name: check for check in expected(self._store, self._agent, self._attempt, batch, rows)}
        self._refuse_if_failed()

    def _judged(self, judging: Judging, batch: Staged, rows: int, files: ExitStack) -> Staged | None:
        """What the judges say of it, as a file to be sealed; None where they had nothing to say."""
        self._checks |= {check.name: check for check in (one.check() for one in judging.judge(batch.scan(), rows))}
        self._refuse_if_failed()
        said = judging.frame()
        return files.enter_context(staged(self._store.objects, said)) if said.height else None

    def _without_doubled(self, sifted: Sifted) -> Sifted:
        """Without the rows under the key of a record that could be no row: a doubled key is doubled, however bad one of its records is."""
        key, contract = str(self._output.key), self._output
        if self.aside is None or not self.aside.keys or self._agent.inputs:
            return sifted
        is_doubled = pl.col(key).cast(pl.String).is_in(pl.Series(sorted(self.aside.keys)).implode())
        doubled = sifted.valid.filter(is_doubled).collect(engine="streaming")
        if doubled.is_empty():
            return sifted
        rule = f"{key}: unique"
        failure = _key_failure(rule, contract, doubled[key])
        verdict = replace(
            sifted.verdict, failed_rows=sifted.verdict.failed_rows + doubled.height, failures=(*sifted.verdict.failures, failure)
        )
        rows = pl.Series("_row", [None] * doubled.height, dtype=sifted.broken.schema["_row"])  # where it stood is not known any more
        broken = doubled.with_columns(rows, pl.Series("_rules", [[rule]] * doubled.height, dtype=pl.List(pl.String)))
        return Sifted(verdict, sifted.valid.filter(~is_doubled), pl.concat([sifted.broken, broken.select(sifted.broken.columns)]))

    def _require_conserved(self, given: pl.LazyFrame, made: pl.LazyFrame) -> None:
        """Exactly one record for every record that was read."""
        contract, alien = self._output, _absent(made, given)
        if len(alien):
            self._add_failures(OUTPUT, contract, [_key_failure("record returned, but never read", contract, alien)], "error")
        lost, rule = self.deferrals.without_own(_absent(given, made)), "record read, but not returned"
        if self.aside is not None:
            lost = lost.filter(~lost.cast(pl.String).is_in(pl.Series(sorted(self.aside.keys), dtype=pl.String).implode()))
            self.aside.add_keys(OUTPUT_SIDE, None, contract, lost, rule)
        if len(lost):
            self._add_failures(OUTPUT, contract, [_key_failure(rule, contract, lost)])

    # -- what it set aside -----------------------------------------------------------------------------------------------------------

    def _quarantined(self) -> int:
        """Records, not refusals: of an entry each refused row is one, elsewhere a record is what was read under one key."""
        if self.aside is None:
            return 0
        return len(self.aside.keys) if self._agent.inputs else len(self.aside)

    def _tell_aside(self) -> None:
        """How many were kept out, and wait, stands beside the rows, which are those that could be judged as rows."""
        check, told = self._checks[OUTPUT], dict[str, int]()
        if self.aside is not None:
            told["quarantined"] = self._quarantined()
        if self.deferrals.told:
            told["deferred"] = self.deferrals.told
        self._checks[OUTPUT] = replace(check, metadata={**check.metadata, **told})

    def _staged_aside(self, files: ExitStack) -> Staged | None:
        return files.enter_context(staged(self._store.objects, self.aside.frame())) if self.aside else None

    def may_set_aside(self, more: int) -> bool:
        """Whether the declared share can still be kept when so many of the records are set aside that the agent was called with."""
        return self._agent.quarantine is not None and not self._is_past(self._refused_before + more)

    def refuse_share(self) -> None:
        """Refuses the batch, in the middle of the agent's calls, for what was set aside until now."""
        if self.aside is not None:
            failures = self.aside.failures(self._output, OUTPUT_SIDE, _SAMPLES)
            self._judge(OUTPUT, self._output, Verdict(self._output.name, 0, 0, ()), failures)
            self._limit_share()

    def _is_past(self, quarantined: int) -> bool:
        # Divided, as whoever wrote 0.29 meant 29 of 100: the product with 100 is a little less than 29.
        assert self._agent.quarantine is not None
        return bool(self._came_in) and quarantined / self._came_in > self._agent.quarantine.max_share

    def _limit_share(self) -> None:
        """Fails the batch after all when more is set aside than was declared."""
        if self._agent.quarantine is None or not self._is_past(self._quarantined()):
            return
        share = f"{self._quarantined()} of {self._came_in} records; at most {self._agent.quarantine.max_share:.1%} may be quarantined"
        for name, check in self._checks.items():
            if not check.passed:
                self._checks[name] = replace(check, severity="error", description=f"{check.description}; {share}")
        self._refuse_if_failed()

    # -- verdicts --------------------------------------------------------------------------------------------------------------------

    def _judge(self, name: str, contract: Contract[Any], verdict: Verdict, failures: Sequence[RuleFailure], **facts: Any) -> None:
        # What is wrong with the batch as a whole cannot be set aside record by record.
        whole = any(failure.rule.startswith("schema:") or (failure.field is None and not contract.key) for failure in failures)
        self._checks[name] = judged(name, contract, verdict, failures, "error" if whole else self._severity, **facts)

    @property
    def _severity(self) -> Severity:
        return "error" if self.aside is None else "warn"

    def _add_failures(self, name: str, contract: Contract[Any], failures: Sequence[RuleFailure], severity: Severity | None = None) -> None:
        self._checks[name] = with_failures(self._checks[name], contract, failures, severity or self._severity)

    def _refuse_if_failed(self) -> None:
        for check in self._checks.values():
            if not check.passed and check.severity == "error":
                raise refusal(check, agent=self._agent.name, workflow=self._attempt.workflow_id)


def _chunks(records: Iterable[Any]) -> Iterator[list[Any]]:
    chunk: list[Any] = []
    for record in records:
        chunk.append(record)
        if len(chunk) == CHUNK_RECORDS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _opened(error: BreakerOpenError, closed_since: dt.datetime | None = None) -> dict[str, Any]:
    told = {"breaker": error.breaker, "since": error.since.isoformat(), "why": error.why}
    if closed_since is not None:
        return {**told, "closed": closed_since.isoformat()}
    return {**told, "retry_after_seconds": error.retry_after}


def _count(frame: pl.LazyFrame) -> int:
    return int(frame.select(pl.len()).collect(engine="streaming").item())


@contextmanager
def sunk(store: StateStore, agent: Agent, frame: pl.LazyFrame) -> Iterator[Staged]:
    """The frame evaluated into a file that is gone at the end, unless it was adopted."""
    # Only what evaluating the agent's own expressions raises is the agent's failure; the disk's comes as a StoreError.
    context = staged(store.objects, frame)
    try:
        batch = context.__enter__()
    except MaoError:
        raise
    except Exception as error:
        raise failed(agent, error) from cause(agent, error)
    try:
        yield batch
    finally:
        context.__exit__(None, None, None)


def _keys(frame: pl.LazyFrame, contract: Contract[Any]) -> pl.LazyFrame:
    """The keys of a batch, as the column `key`; lazy, because a batch may be larger than memory."""
    return frame.select(pl.col(str(contract.key)).alias("key"))


def _driver(agent: Agent, frames: Mapping[str, pl.LazyFrame]) -> tuple[str, pl.LazyFrame] | None:
    """Name of the key, and the keys, of the upstream whose records the agent must account for."""
    for wanted in agent.inputs:
        if wanted.contract.key and wanted.required:
            return wanted.contract.key, _keys(frames[wanted.upstream], wanted.contract)
    return None


def _absent(keys: pl.LazyFrame, among: pl.LazyFrame) -> pl.Series:
    """The keys that are not among the others, sorted. Equal columns, the usual case, are compared streaming, and nothing is held."""
    counts = [side.select(pl.len()).collect(engine="streaming").item() for side in (keys, among)]
    side_by_side = pl.concat([keys.select(one="key"), among.select(other="key")], how="horizontal")
    if counts[0] == counts[1] and side_by_side.select(pl.col("one").eq_missing(pl.col("other")).all()).collect(engine="streaming").item():
        return pl.Series("key", [])
    # Sorted, because a streaming join keeps no order, and what is set aside is sealed: the same records, the same bytes.
    return keys.join(among, on="key", how="anti").sort("key").collect(engine="streaming").to_series()


def _key_failure(rule: str, contract: Contract[Any], keys: pl.Series) -> RuleFailure:
    key = str(contract.key)
    shown = ["***"] * min(len(keys), _SAMPLES) if key in contract.personal else keys.head(_SAMPLES).to_list()
    return RuleFailure(rule, key, len(keys), tuple({key: value} for value in shown))


def _one_record(contract: Contract[Any], rows: int) -> list[RuleFailure]:
    if contract.key or rows == 1:
        return []
    return [RuleFailure("exactly one record, as the contract has no key", None, rows, ())]
