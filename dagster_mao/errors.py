"""Everything that can go wrong, one class per thing a caller may want to catch.

Each message says what happened, where (agent, workflow, field) and how to mend it. Values of records never enter a message: those are
shown, masked, by the asset checks.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from itertools import islice
from typing import Any

_PARTITIONS_TOLD = 10  # the others are in the error's `partitions`


class MaoError(Exception):
    """Base of all errors of this library.

    Attributes: `what` happened, the `agent`, `workflow` and `field` it concerns (None where it concerns none), the `fix`, and, when raised
    from a boundary, the `checks` evaluated until then, and what the `calls` came to (a `CallSummary`; None where none was made).
    Raised from `mao.run`, `compensation` says what became of the effects that the attempt had had (`saga.Concluded`; None where none).

    `of_one_call`: raised in a call, it is about that call only, as what `execute` raises is, and other records may go on.
    `tells_no_values`: raised in a call, its text is shown also where the agent handles personal data; that of other errors is withheld.
    """

    checks: tuple[Any, ...] = ()
    calls: Any = None
    compensation: Any = None
    of_one_call = False
    tells_no_values = False

    def __init__(
        self,
        what: str,
        *,
        agent: str | None = None,
        workflow: str | None = None,
        field: str | None = None,
        fix: str | None = None,
    ) -> None:
        self.what, self.agent, self.workflow, self.field, self.fix = what, agent, workflow, field, fix
        super().__init__(what)

    def __str__(self) -> str:
        where = ", ".join(f"{name} {value!r}" for name in ("agent", "workflow", "field") if (value := getattr(self, name)) is not None)
        return self.what + (f" [{where}]" if where else "") + (f". Fix: {self.fix}" if self.fix else "")

    def __reduce__(self) -> Any:
        # An exception with keyword-only arguments does not survive pickling by itself, and step processes hand theirs to the parent.
        return (_restore, (type(self), self.__dict__.copy()))


def _restore(cls: type[MaoError], state: dict[str, Any]) -> MaoError:
    error = cls.__new__(cls)
    Exception.__init__(error, state["what"])
    error.__dict__.update(state)
    return error


class WiringError(MaoError):
    """The pipeline cannot work as declared: raised when the code location loads, never in the middle of a run."""


class ContractDefinitionError(WiringError):
    """A contract cannot be compiled: two keys, a type that no Delta column can hold, a bound that admits nothing."""


class IncompatibleContractError(MaoError):
    """A snapshot was sealed under a contract that its reader's contract contradicts."""


class BatchRefusedError(MaoError):
    """Records broke a contract; nothing was written. `checks` says which, and why."""


class InvalidRecordsError(MaoError):
    """What was handed in as a batch is no batch of the contract: a missing column, text in a number column, an unreadable file."""


class EventsRefusedError(MaoError):
    """Events that an inbox does not take. None of what was submitted with them is accepted: submit the others without them.

    `places`: by its place in what was submitted, why an event was refused.
    """

    places: dict[int, str] = {}


class PinError(MaoError):
    """What an agent needs cannot be pinned: nothing sealed upstream, or parents that descend from different entries."""


class ReaderRefusedError(MaoError):
    """Who reads is not among the readers that the agent named when it sealed."""


class StaleStateError(MaoError):
    """Another run sealed the same agent of the same workflow after this step pinned. Nothing of this step is visible."""


class FencedError(MaoError):
    """The workflow was fenced after this attempt pinned (a compensation began). Nothing of this step is visible.

    A second compensator gets it too: then `retry_after` is the seconds for which the first one holds the attempt at least.
    """

    retry_after: float | None = None


class TamperedError(MaoError):
    """Bytes in the store are not the bytes that were sealed, or the chain of seals is broken."""


class StoreError(MaoError):
    """The state store cannot be reached, read or written: wrong root, no permission, no space, damaged log."""


class AgentFailedError(MaoError):
    """`execute` raised. The cause is chained; the record (by key, unless the key is personal) is named."""


class PartitionsFailedError(MaoError):
    """Some partitions of a run over a range of them failed; the others are sealed.

    `partitions`: by its key, at which agent and by the class of which error one failed.
    """

    def __init__(self, partitions: Mapping[str, str], *, count: int, pipeline: str) -> None:
        self.partitions, self.count = dict(partitions), count
        told = "; ".join(f"{key} ({why})" for key, why in islice(self.partitions.items(), _PARTITIONS_TOLD))
        more = f"; and {len(partitions) - _PARTITIONS_TOLD} more" if len(partitions) > _PARTITIONS_TOLD else ""
        super().__init__(
            f"{len(partitions)} of {count} partitions of {pipeline!r} failed: {told}{more}",
            fix="mend what failed and re-execute the run from its failure: what is sealed is not done again",
        )


class AgentCallError(MaoError):
    """An agent called another agent inside `execute` (law: coordination flows through the pipeline)."""


class UnknownVersionError(MaoError):
    """No such workflow, or no such version of it."""


class BreakerOpenError(MaoError):
    """A circuit breaker is open: the call was not made.

    Attributes: the `breaker` by name, `since` when it is open, `why` (the class of the error that opened it, or what was said by hand), and
    `retry_after`: the seconds after which a call may be tried again, None when a person has to close it.
    """

    def __init__(self, breaker: str, *, since: dt.datetime, why: str, retry_after: float | None) -> None:
        self.breaker, self.since, self.why, self.retry_after = breaker, since, why, retry_after
        when = "until it is closed by hand" if retry_after is None else f"for another {retry_after:.1f} s"
        super().__init__(
            f"The circuit breaker {breaker!r} is open since {since:%Y-%m-%d %H:%M:%S} UTC ({why}): no call is made {when}",
            fix="mend what the agent calls; `dagster-mao breakers list` shows the breakers, `close` closes one at once",
        )


class UnknownBreakerError(MaoError):
    """No circuit breaker of that name has been used with this database."""


class CallTimeoutError(MaoError, TimeoutError):
    """A call did not answer within its `seconds`. It was ended where that can be done, and may still have taken effect."""

    of_one_call = True

    def __init__(self, what: str, *, seconds: float, **where: Any) -> None:
        super().__init__(what, **where)
        self.seconds = seconds


class CallProcessError(MaoError):
    """A call cannot be made in a child process, its answer cannot come back from there, or the process died of it."""

    of_one_call = True


class RateLimitError(MaoError):
    """A call wants more permits at once than its rate limit ever grants."""


class MalformedAnswerError(MaoError):
    """A model did not answer with a record of the contract in all the turns it had. What it answered is not shown; what was wrong is."""

    of_one_call = tells_no_values = True


class LLMRequestError(MaoError):
    """An endpoint will not answer a request, however often it is made (a wrong key, too long an input …). `status` is that of HTTP."""

    of_one_call = tells_no_values = True

    def __init__(self, what: str, *, status: int, **where: Any) -> None:
        super().__init__(what, **where)
        self.status = status


class AnswerNotFrozenError(MaoError):
    """Answers come from frozen ones only, and there is none for what is asked."""
