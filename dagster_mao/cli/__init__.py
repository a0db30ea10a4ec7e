"""The command line: what happened in a store, read without the pipeline's code. One module per family of commands.

Exit codes (`bisect` has others): 0 good, 1 a bad answer (findings, differences, nothing by that name, a store that cannot be read), 2 wrong
usage.
"""

from dagster_mao.cli import (  # each registers its commands
    agents,
    audit,
    bisect,
    breakers,
    calls,
    choreography,
    compensate,
    judges,
    look,
    quarantine,
    replay,
    step,
    verify,
)
from dagster_mao.cli._app import app

__all__ = [
    "agents",
    "app",
    "audit",
    "bisect",
    "breakers",
    "calls",
    "choreography",
    "compensate",
    "judges",
    "look",
    "quarantine",
    "replay",
    "step",
    "verify",
]
