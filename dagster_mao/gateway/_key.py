"""The identity of a call. Of its own, because calls that keep no answers have one too, and need no SQLAlchemy."""

from __future__ import annotations

import hashlib


def idempotency_key(workflow_id: str, epoch: int, agent: str, record: str | None, inputs: str) -> str:
    """A sha256 in hex over what is meant by a call. `record`: the record's key, None for a call with frames; `inputs`: their digest."""
    told = bytearray()
    for part in (workflow_id, str(epoch), agent, record, inputs):
        if part is None:
            told += b"-"
        else:
            # With its length before it, so that no two calls run together to the same text.
            text = part.encode("utf-8", "surrogatepass")
            told += b"%d:" % len(text) + text
    return hashlib.sha256(told).hexdigest()
