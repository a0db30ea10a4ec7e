"""The policy that is in force for an agent: its own, as an operator changed it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dagster_mao.gateway import Policy

EVERY = "*"
UNKEPT = Policy(keep_answers=0)
"""What is in force for an agent that declares no policy: nothing is shared, nothing kept, and its calls are logged."""


def in_force(policy: Policy | None, changes: Mapping[str, Mapping[str, Any]], agent: str) -> Policy:
    """An agent's policy with the changes for all, and its own, which count more. Raises `WiringError` when they make none."""
    return (policy or UNKEPT).overridden(changes.get(EVERY), changes.get(agent), agent=agent)
