"""What a gateway tells of a call, for calls on which nothing is enforced: at a third of the cost."""

from __future__ import annotations

import time

from dagster_mao.gateway._policy import Policy
from dagster_mao.gateway._record import CallRecord, Used, class_of, sink, total


def enforces_nothing(policy: Policy) -> bool:
    """Whether a call under this policy is only metered."""
    return not (policy.is_shared or policy.retries or policy.timeout is not None or policy.fallback is not None)


class Meter:
    """Meters the calls of one thread, one after the other, while its block lasts.

    For each call: take `perf_counter` before and after it; where it failed, or `used` is not empty, `told` makes its record; of any other
    there is nothing to say but `started_at` and how long it took.
    """

    def __init__(self) -> None:
        self.used: list[Used] = []
        self._ahead = time.time() - time.perf_counter()

    def started_at(self, begun: float) -> float:
        """Seconds since the epoch at a reading of `perf_counter`."""
        return self._ahead + begun

    def told(self, begun: float, ended: float, error: BaseException | None = None) -> CallRecord:
        used = total(self.used) if self.used else Used()
        self.used.clear()
        failed = None if error is None else class_of(error)
        return CallRecord._make((1, self._ahead + begun, ended - begun, "failed" if failed else "answered", failed, *used.columns(), None))

    def __enter__(self) -> Meter:
        self._token = sink.set(self.used.append)
        return self

    def __exit__(self, *_: object) -> None:
        sink.reset(self._token)
