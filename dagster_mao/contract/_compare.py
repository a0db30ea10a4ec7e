"""Whether what a producer promises can keep what a consumer demands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Difference:
    """One point where the consumer's contract is not the producer's.

    `kind`: "contradiction" (no value of the producer's can pass), "stricter" (some do not pass: enforced at the boundary), "unproven"
    (patterns and validators: nobody can tell before the data is there).
    """

    field: str
    kind: Literal["contradiction", "stricter", "unproven"]
    detail: str


def compare(producer: dict[str, Any], consumer: dict[str, Any]) -> list[Difference]:
    return []
