"""The identity of a call. Of its own, because calls that keep no answers have one too, and need no SQLAlchemy."""

from __future__ import annotations

import hashlib


def idempotency_key(workflow_id: str, epoch: int, agent: str, record: str | None, inputs: str) -> str:
    """A sha256 in hex over what is meant by a call. `record`: the record's key, None for a call with frames; `inputs`: their digest."""
    return CallKeys(workflow_id, epoch, agent)(record, inputs)


class CallKeys:
    """`idempotency_key` of one agent's calls in one workflow and epoch: what they have in common is hashed once."""

    def __init__(self, workflow_id: str, epoch: int, agent: str) -> None:
        self._begun = hashlib.sha256(_part(workflow_id) + _part(str(epoch)) + _part(agent))

    def __call__(self, record: str | None, inputs: str) -> str:
        told = self._begun.copy()
        if record is not None and record.isascii() and inputs.isascii():  # as `_part` has it, in half the time
            told.update(f"{len(record)}:{record}{len(inputs)}:{inputs}".encode())
        else:
            told.update((b"-" if record is None else _part(record)) + _part(inputs))
        return told.hexdigest()


def _part(text: str) -> bytes:
    # With its length before it, so that no two calls run together to the same text.
    data = text.encode("utf-8", "surrogatepass")
    return b"%d:%b" % (len(data), data)
