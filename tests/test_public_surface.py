"""The public surface, spelled out: whoever changes it changes this test, and knows that users will notice."""

import subprocess
import sys

import pytest

import dagster_mao as mao
from dagster_mao import errors

EAGER = {
    "Advice",
    "Agent",
    "AgentContext",
    "Breaker",
    "DataFrame",
    "Effect",
    "Expectations",
    "ExternalEntry",
    "FromFallback",
    "Judge",
    "Key",
    "NotDoneError",
    "LazyFrame",
    "MicroBatch",
    "Personal",
    "Pipeline",
    "Policy",
    "PolicyOverrides",
    "Quarantine",
    "Result",
    "Resubmission",
    "Seal",
    "StateStore",
    "TransientError",
    "Undo",
    "Verdict",
    "advise",
    "agent",
    "as_of",
    "bisect",
    "replay",
    "resubmit",
    "run",
    "submit",
    "usage",
}
ERRORS = {
    "AgentCallError",
    "AgentFailedError",
    "AnswerNotFrozenError",
    "BatchRefusedError",
    "BreakerOpenError",
    "CallProcessError",
    "CallTimeoutError",
    "ContractDefinitionError",
    "EventsRefusedError",
    "FencedError",
    "IncompatibleContractError",
    "InvalidRecordsError",
    "LLMRequestError",
    "MalformedAnswerError",
    "MaoError",
    "PartitionsFailedError",
    "PinError",
    "RateLimitError",
    "ReaderRefusedError",
    "StaleStateError",
    "StoreError",
    "TamperedError",
    "UnknownBreakerError",
    "UnknownVersionError",
    "WiringError",
}
FROM_DAGSTER_SIDE = {"LLM", "AgentTranslator", "StateIOManager", "StateStoreResource", "build_asset", "build_definitions"}


def test_the_public_surface():
    assert set(mao.__all__) == EAGER | ERRORS | FROM_DAGSTER_SIDE
    assert list(mao.__all__) == sorted(mao.__all__, key=lambda name: (not name.isupper(), name))  # as ruff sorts them
    assert set(mao.__all__) <= set(dir(mao))


@pytest.mark.parametrize("name", sorted(EAGER | ERRORS))
def test_every_name_is_there(name):
    assert getattr(mao, name) is not None


def test_every_error_is_public():
    assert {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, errors.MaoError)} == ERRORS


def test_the_functions_are_not_hidden_by_the_modules_of_the_same_name():
    """`dagster_mao.agent` and `dagster_mao.run` are modules too; importing them must not put them in the functions' place."""
    code = (
        "import dagster_mao as mao, dagster_mao.agent, dagster_mao.run, dagster_mao.pipeline; print(callable(mao.agent), callable(mao.run))"
    )
    assert _python(code) == "True True"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Pipelin"):
        _ = mao.Pipelin


def test_importing_the_package_does_not_import_dagster():
    code = "import sys, dagster_mao; print([name for name in ('dagster', 'dagster_mao.dagster', 'typer') if name in sys.modules])"
    assert _python(code) == "[]"


def test_importing_the_package_imports_neither_sql_nor_breakers():
    """What makes no call, or needs nothing shared, does not pay for it."""
    code = "import sys, dagster_mao, dagster_mao.gateway; print([name for name in ('sqlalchemy', 'pybreaker') if name in sys.modules])"
    assert _python(code) == "[]"


def test_the_client_of_models_is_imported_by_steps_that_ask_one():
    code = "import sys, dagster_mao as mao; mao.LLM(model='m'); print([name for name in ('openai', 'httpx2') if name in sys.modules])"
    assert _python(code) == "[]"


def test_the_dagster_side_is_one_attribute_away():
    code = f"import dagster_mao as mao; print(all(getattr(mao, name) for name in {sorted(FROM_DAGSTER_SIDE)}))"
    assert _python(code) == "True"


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
