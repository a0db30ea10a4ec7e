"""An effect as its author sees it, and the keys that tell effects apart. Imports nothing heavy: agents need it when they are declared."""

from __future__ import annotations

import datetime as dt
import hashlib
from typing import Any, Literal, NamedTuple

EffectState = Literal["intended", "done", "unknown"]


class NotDoneError(Exception):
    """Raised in the function of an effect that certainly did not happen: refused before anything was sent, rolled back, answered with no.

    Whatever else such a function raises leaves it unknown whether the effect happened.
    """


class Effect(NamedTuple):
    """One effect on the world outside: what the function of `ctx.effect` is handed, and what `compensate` finds in `undo.effects`.

    `key` (sha256, hex) is the same whenever the same effect is asked for: hand it to the target as its idempotency key. `epoch` is
    the fencing token that goes with it. `record` is the key of the record at hand, `row` the row of `ctx.effects`. In an undo, `state` is
    "done", or "unknown" where nobody can say whether it happened, `result` what the function returned, and `deadline` the time (UTC) until
    which an unknown one may still happen; None without a timeout.
    """

    key: str
    epoch: int
    name: str
    record: str | None = None
    state: EffectState = "intended"
    result: Any = None
    deadline: dt.datetime | None = None
    row: Any = None


def effect_key(call: str, name: str, n: int = 0, again: int = 0) -> str:
    """The key of the n-th effect of this name in a call, which is known by its own idempotency key.

    `again` counts how often that effect was undone within the epoch: a target that remembers keys would not do it another time.
    """
    return _key("effect", call, name, n, again)


def batch_key(workflow_id: str, epoch: int, agent: str, name: str, record: str, digest: str, again: int = 0) -> str:
    """The key of an effect about one record of a batch: of its own row, not of the batch, so that an unchanged row keeps it."""
    return _key("batch", workflow_id, epoch, agent, name, record, digest, again)


def hidden(workflow_id: str, record: str) -> str:
    """What stands for a record whose key is personal."""
    return _key("record", workflow_id, record)


def _key(*parts: str | int) -> str:
    # Each with its length before it, so that no two run together to the same text.
    texts = map(str, parts)
    return hashlib.sha256("".join(f"{len(text)}:{text}" for text in texts).encode("utf-8", "surrogatepass")).hexdigest()
