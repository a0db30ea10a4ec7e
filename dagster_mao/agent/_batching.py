"""How what waits is cut into batches that one run takes: a declaration of agents, of pipelines and of inboxes."""

from __future__ import annotations

from dataclasses import dataclass

from dagster_mao.errors import WiringError


@dataclass(frozen=True)
class MicroBatch:
    """One run takes up to `size` of what waits, and does not wait for more than `wait` seconds for as many.

    In choreography what waits are workflows; each is a version of its own, and one that fails does not fail the others. It is tried again
    up to `redeliveries` times by itself, and by hand after that. For an inbox they are events, and a batch of them becomes one workflow.
    """

    size: int = 500
    wait: float = 5.0
    redeliveries: int = 0

    def __post_init__(self) -> None:
        for name, least, kinds in (("size", 1, int), ("wait", 0, (int, float)), ("redeliveries", 0, int)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value < float("inf"):
                unit = " of seconds" if name == "wait" else ""
                raise WiringError(f"`{name}` of a micro-batch is {value!r}", field=name, fix=f"a number{unit} from {least} on")
