"""The checks of a boundary: their names, their verdicts, and what a step says when one of them stops it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from dagster_mao.agent import Agent
from dagster_mao.contract import Contract, RuleFailure, Verdict
from dagster_mao.errors import BatchRefusedError

PINNED_BASE, BREAKER, OUTPUT = "pinned_base", "breaker", "output"

Severity = Literal["error", "warn"]


@dataclass(frozen=True)
class Check:
    """The verdict of one boundary check. `metadata` is JSON: what was compared, and, where it failed, `reasons` with masked samples.

    One that failed with `severity` "warn" did not stop the batch.
    """

    name: str
    passed: bool
    description: str
    metadata: dict[str, Any] = field(default_factory=dict)
    severity: Severity = "error"


def input_check(upstream: str) -> str:
    """Name of the check of one upstream's records against the consumer's contract."""
    return f"input_{upstream}"


def check_names(agent: Agent) -> list[str]:
    """The checks that every step of this agent evaluates, in order."""
    guarded = [BREAKER] if agent.policy and agent.policy.breaker else []
    asked = [*(e.name for e in agent.suite.expectations), *(judge.check for judge in agent.panel)]
    return [PINNED_BASE, *(input_check(i.upstream) for i in agent.inputs), *guarded, OUTPUT, *asked]


def judged(
    name: str, contract: Contract[Any], verdict: Verdict, failures: Sequence[RuleFailure], severity: Severity, **facts: Any
) -> Check:
    """The check that a contract's verdict and the boundary's own rules (both in `failures`) make."""
    metadata = {
        "contract": contract.name,
        "contract_version": contract.version,
        "contract_hash": contract.hash,
        "rows": verdict.rows,
        "failed_rows": verdict.failed_rows,
        "reasons": [_reason(failure) for failure in failures],
        **facts,
    }
    return Check(name, not failures, _told(contract, verdict, failures), metadata, severity)


def with_failures(check: Check, contract: Contract[Any], failures: Sequence[RuleFailure], severity: Severity) -> Check:
    """The check, failed also by what was found after it was judged."""
    reasons = [*check.metadata["reasons"], *(_reason(failure) for failure in failures)]
    told = _broken(contract, [reason["rule"] for reason in reasons])
    worst: Severity = "error" if "error" in (severity, "warn" if check.passed else check.severity) else "warn"
    return Check(check.name, False, told, {**check.metadata, "reasons": reasons}, worst)


def _told(contract: Contract[Any], verdict: Verdict, failures: Sequence[RuleFailure]) -> str:
    return _broken(contract, [f.rule for f in failures]) if failures else f"{verdict.rows} records keep {contract.name}"


def _broken(contract: Contract[Any], rules: Sequence[str]) -> str:
    more = f" and {len(rules) - 1} more rules" if len(rules) > 1 else ""
    return f"{contract.name} broken: {rules[0]}{more}"


def refusal(check: Check, *, agent: str, workflow: str) -> BatchRefusedError:
    """What a failed check of severity "error" makes of the step."""
    reason: dict[str, Any] = next(iter(check.metadata.get("reasons", ())), {"count": 0, "field": None})
    broken = reason["count"]
    count = f" ({broken:,} record{'s' if broken > 1 else ''})" if broken else ""
    return BatchRefusedError(
        f"The batch was refused at {check.name!r}: {check.description}{count}",
        agent=agent,
        workflow=workflow,
        field=reason["field"],
        fix="mend the records or the contract and run again; nothing was sealed",
    )


def _reason(failure: RuleFailure) -> dict[str, Any]:
    return {"rule": failure.rule, "field": failure.field, "count": failure.count, "samples": [dict(sample) for sample in failure.samples]}
