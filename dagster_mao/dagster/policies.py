"""What operators change of agents' policies, from Dagster's side."""

from typing import Any, Optional

import dagster as dg
from pydantic import Field

from dagster_mao.overrides import changes_of
from dagster_mao.pipeline import Pipeline

POLICIES = "policies"
"""The resource key under which the assets look for overrides."""


class PolicyOverrides(dg.ConfigurableResource[Any]):
    """What is changed of agents' policies: by code, or for one run in the launchpad. Give it to `Definitions` under the key `policies`.

    By the agent's name, `pipeline.agent` where pipelines share the resource, "*" for all agents, or `agent.judge`; then the fields of
    `Policy` to change, as numbers and strings. `breaker: {fail_max: 3}` changes the breaker, `breaker: null` and `fallback: null` switch
    them off. What was in force is in the seal.
    """

    # Dagster fails on a null in a mapping whose values it knows nothing of, unless it is told that they may be null.
    overrides: dict[str, dict[str, Optional[Any]]] = Field(  # noqa: UP045
        default={},
        description="By agent's name (or `pipeline.agent`, or `*` for all): the fields of its policy to change, such as "
        "`timeout: 10`, `retries: 0`, `rate_limit: 30/minute`, `breaker: {fail_max: 3}`, `fallback: null`.",
    )

    def of(self, pipeline: Pipeline) -> dict[str, dict[str, Any]]:
        """The changes by agent of a pipeline, and "*". Raises `WiringError` for an agent or a field that there is not."""
        return changes_of(pipeline, self.overrides)
