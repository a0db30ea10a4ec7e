"""A Dagster deployment in processes of its own, to be killed: that of the chaos."""

from tools.chaos.deployment import Deployment, asked_for, deployed, kill, until

__all__ = ["Deployment", "asked_for", "deployed", "kill", "until"]
