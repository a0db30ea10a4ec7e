"""A pipeline of one paid agent, importable by name, so that its runs can be executed again. All of it lies in SHOP_FOLDER."""

import os
from pathlib import Path
from typing import Annotated

import dagster as dg
from pydantic import BaseModel

import dagster_mao as mao
from dagster_mao.dagster import StateStoreResource, build_definitions


class Item(BaseModel):
    item_id: Annotated[str, mao.Key]


class Till(dg.ConfigurableResource):
    """The other side: writes down who asked, and is down for item "b" while there is a file `down`."""

    folder: str

    def ask(self, item: str) -> None:
        with (Path(self.folder) / "asked").open("a") as asked:
            asked.write(item)
        if item == "b" and (Path(self.folder) / "down").exists():
            raise ConnectionError


@mao.agent
def entry() -> list[Item]:
    return [Item(item_id="a"), Item(item_id="b")]


@mao.agent(policy=mao.Policy())
def paid(entry: Item, *, till: Till) -> Item:
    till.ask(entry.item_id)
    return entry


def shop_job() -> dg.JobDefinition:
    given = {"till": Till(folder=dg.EnvVar("SHOP_FOLDER")), "state_store": StateStoreResource(root=dg.EnvVar("SHOP_STATE"))}
    defs = build_definitions(mao.Pipeline("shop", entry=entry, agents=[paid]), resources=given)
    return dg.Definitions.merge(defs, dg.Definitions(executor=dg.in_process_executor)).resolve_job_def("shop_job")


def asked() -> str:
    """The items in the order in which they were asked for."""
    return (Path(os.environ["SHOP_FOLDER"]) / "asked").read_text()
