"""The state store as a Dagster resource."""

from functools import lru_cache
from typing import Any

import dagster as dg
from pydantic import Field

from dagster_mao.state import StateStore

STATE_STORE = "state_store"
"""The resource key under which the assets look for the store."""


class StateStoreResource(dg.ConfigurableResource[Any]):
    """Where the pipeline's state lies. Give it to `Definitions` under the key `state_store`."""

    root: str = Field(
        description="A folder or an object-store URI (`s3://bucket/prefix`). A relative folder is taken from the working directory."
    )
    storage_options: dict[str, str] = Field(
        default={}, description="What delta-rs takes for an object store: `AWS_ENDPOINT_URL`, `AWS_REGION` …"
    )

    database: str = Field(
        default="",
        description="What processes share at once (breakers, limits) is here: `postgresql://user@host/database`, or the path of an SQLite "
        "file. By default `shared.db` in a local root; SQLite is for one host.",
    )

    def store(self) -> StateStore:
        """The store; opening it touches nothing. Raises `StoreError` when the root cannot be one."""
        return _store(self.root, tuple(sorted(self.storage_options.items())), self.database)


@lru_cache(maxsize=32)
def _store(root: str, options: tuple[tuple[str, str], ...], database: str) -> StateStore:
    return StateStore(root, dict(options), database=database or None)
