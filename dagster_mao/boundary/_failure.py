"""What becomes of errors of the agent's own: who they concern is said, and no value of a record."""

from __future__ import annotations

from pydantic import ValidationError

from dagster_mao.agent import Agent
from dagster_mao.boundary._one import WrongAnswerError
from dagster_mao.contract import has_personal
from dagster_mao.errors import AgentFailedError


def failed(agent: Agent, error: BaseException, record: str = "", instead: BaseException | None = None) -> AgentFailedError:
    """What the step raises: `raise failed(agent, error) from cause(agent, error)`. `instead`: how its fallback failed, too."""
    name = agent.output.name
    if isinstance(error, WrongAnswerError):
        what, fix = error.told(record), f"return what it declares: {name}"
    else:
        what, fix = f"execute raised {type(error).__name__}{record}", "see the cause in the step's log; the batch was not sealed"
    if instead is not None:
        how = f"returned {instead.args[0]}" if isinstance(instead, WrongAnswerError) else f"raised {type(instead).__name__}"
        what += f", and its fallback {how}"
    return AgentFailedError(what, agent=agent.name, fix=fix)


def cause(agent: Agent, error: BaseException) -> BaseException | None:
    """The error as it may be chained.

    Its text may hold the values at hand. So where a contract of the agent has personal fields, only types and tracebacks are kept, which
    rules pydantic found broken, and the text of errors that say of themselves `tells_no_values`.
    """
    if isinstance(error, WrongAnswerError):
        return error.__context__
    contracts = [agent.output, *(i.contract for i in agent.inputs)]
    return _withheld(error) if any(has_personal(contract.describe()) for contract in contracts) else error


def _withheld(error: BaseException) -> BaseException:
    if isinstance(error, ValidationError):
        told = _rules(error)
    elif getattr(error, "tells_no_values", False):
        told = str(error)
    else:
        told = "its text is withheld: the agent handles personal data"
    made = RuntimeError(f"{type(error).__name__}: {told}").with_traceback(error.__traceback__)
    inner = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    made.__cause__ = None if inner is None else _withheld(inner)
    return made


def _rules(error: ValidationError) -> str:
    # The first step only: further down, a location may be the key of a mapping, which came with the data.
    broken = dict.fromkeys(f"{e['loc'][0] if e['loc'] else 'record'}: {e['type']}" for e in error.errors(include_input=False))
    return f"{error.error_count()} validation errors for {error.title}: {'; '.join(broken)}"
