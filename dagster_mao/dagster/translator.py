"""How an agent is shown as a Dagster asset: override one method to change it."""

import dagster as dg

from dagster_mao.agent import Agent
from dagster_mao.dagster.metadata import of_agent
from dagster_mao.dagster.quarantine import of_quarantining, quarantine_key
from dagster_mao.pipeline import Pipeline

_KINDS = ("delta", "polars")


class AgentTranslator:
    """Maps agents to asset specs, as dagster-dbt's translator maps models.

    Subclass it, call `super().get_asset_spec(...)` and change what comes back (`spec.replace_attributes(...)`,
    `spec.merge_attributes(...)`). The key stays `[pipeline, agent]`: the state log knows the agent by these names.
    """

    def get_asset_spec(self, agent: Agent, pipeline: Pipeline) -> dg.AssetSpec:
        """The spec of an agent (the entry that wraps an existing asset too); upstreams and checks are added by the wiring."""
        return dg.AssetSpec(
            key=[pipeline.name, agent.name],
            description=agent.description,
            group_name=pipeline.name,
            code_version=agent.agent_version,
            owners=list(agent.owners or pipeline.owners),
            tags={**pipeline.tags, **agent.tags},
            kinds={*agent.kinds, *_KINDS},
            metadata=of_agent(pipeline, agent),
            partitions_def=pipeline.partitions_def,
        )

    def get_quarantine_spec(self, agent: Agent, pipeline: Pipeline) -> dg.AssetSpec:
        """The spec of the quarantine beside an agent that declares one: group, owners and tags are the agent's."""
        return self.get_asset_spec(agent, pipeline).replace_attributes(
            key=quarantine_key(pipeline.name, agent.name),
            description=f"Records that broke a contract at the boundary of `{agent.name}`, each with its reasons. "
            f"`dagster-mao quarantine list {pipeline.name}/…` shows them, and what was decided on them.",
            kinds={"delta", "quarantine"},
            metadata=of_quarantining(pipeline, agent),
        )
