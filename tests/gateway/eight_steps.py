"""A Dagster job whose eight steps, processes of the multiprocess executor, call one side that fails, each through a circuit breaker.

What they do is counted by the witness: the side that they call.
"""

import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import dagster as dg
import pybreaker

from dagster_mao.errors import BreakerOpenError
from dagster_mao.gateway import Breaker, Gateway, Policy, shared_store
from dagster_mao.gateway._breaker import events
from dagster_mao.gateway._shared import SharedStore
from tests.gateway.crew import ENGINES, Use

STEPS = 8
DECLARED = Breaker(fail_max=5, reset_timeout=1.0, name="bureau")


class ThroughTheGateway:
    """Calls as the platform makes them for an agent with such a policy."""

    def __init__(self, database: Path) -> None:
        self._database = str(database)
        self._gateway = Gateway(Policy(breaker=DECLARED), "shop.asking", self._database)

    def call(self, function: Any) -> None:
        self._gateway.call(function)

    def opens(self) -> int:
        told = events(shared_store(self._database), "bureau", limit=1000)
        return sum(event.event == "open" and event.process.endswith(f":{os.getpid()}") for event in told)


class Witness(dg.ConfigurableResource[Any]):
    """The side that is called. `kind` is that of the breaker that the calls go through."""

    url: str
    kind: str
    folder: str

    def breaker(self) -> Any:
        database = Path(self.folder) / f"{self.kind.replace(' ', '_')}.db"
        if self.kind == "ours":
            return ThroughTheGateway(database)
        return ENGINES[self.kind](Use(self.kind, SharedStore(database), DECLARED, "bureau"))

    def hear(self, what: str, step: str) -> None:
        """Raises ConnectionError where it fails, as it always does at first."""
        try:
            urllib.request.urlopen(f"{self.url}/{self.kind.replace(' ', '_')}/{what}/{step}", timeout=120).read()
        except urllib.error.HTTPError as error:
            raise ConnectionError(error.code) from None


@dg.op
def asking(context: dg.OpExecutionContext, witness: Witness) -> None:
    name, breaker = context.op_handle.name, witness.breaker()

    def is_called(what: str) -> bool:
        try:
            breaker.call(lambda: witness.hear(what, name))
        except (BreakerOpenError, pybreaker.CircuitBreakerError):
            return False
        except ConnectionError:
            return True
        return True

    while is_called("failing"):
        pass
    witness.hear("refused", name)
    witness.hear("coming", name)
    while not is_called("probing"):
        witness.hear("refused-again", name)
    for _ in range(breaker.opens()):
        witness.hear("opened", name)


@dg.job(
    resource_defs={"witness": Witness.configure_at_launch()},
    executor_def=dg.multiprocess_executor.configured(
        # One process imports everything, and the steps are its forks.
        {"max_concurrent": STEPS, "start_method": {"forkserver": {"preload_modules": ["tests.gateway.eight_steps"]}}}
    ),
)
def eight_steps() -> None:
    for number in range(STEPS):
        asking.alias(f"asking_{number}")()


def main(folder: str, url: str, *kinds: str) -> None:
    """Runs the job once per kind of breaker, in an instance below the folder."""
    with dg.DagsterInstance.local_temp(folder) as instance:
        for kind in kinds:
            config = {"resources": {"witness": {"config": {"url": url, "kind": kind, "folder": folder}}}}
            assert dg.execute_job(dg.reconstructable(eight_steps), instance, run_config=config, raise_on_error=False).success
