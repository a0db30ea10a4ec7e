"""The state store as a Dagster resource."""

from functools import lru_cache
from typing import Any

import dagster as dg
from pydantic import Field, model_validator

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
    single_host: bool = Field(
        default=False,
        description="Whether all runs are on one host. Only then may the state be in an object store and the database in an SQLite file.",
    )

    @model_validator(mode="after")
    def _loads(self) -> "StateStoreResource":
        """What cannot be a store is an error when the code location loads, unless a variable of the environment has yet to say it."""
        if not any(isinstance(value, dg.EnvVar) for value in (self.root, self.database, *self.storage_options.values())):
            StateStore(self.root, self.storage_options, database=self.database or None, single_host=self.single_host)
        return self

    def store(self) -> StateStore:
        """The store; opening it touches nothing. Raises `StoreError` when the root cannot be one, `WiringError` as `StateStore` does."""
        return _store(self.root, tuple(sorted(self.storage_options.items())), self.database, self.single_host)


@lru_cache(maxsize=32)
def _store(root: str, options: tuple[tuple[str, str], ...], database: str, single_host: bool) -> StateStore:
    return StateStore(root, dict(options), database=database or None, single_host=single_host)
