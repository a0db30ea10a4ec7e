"""A pipeline with effects whose last agent may fail, importable by name: `applications` -> `booking`, which books at the bank -> `letter`.

Everything lies in the folder that BOOKINGS_FOLDER names; while it holds a file `outage`, the last agent fails.
"""

from pathlib import Path
from typing import Annotated, Any

import dagster as dg
from pydantic import BaseModel

import dagster_mao as mao
from tests.journal.bank import Bank

FOLDER = "BOOKINGS_FOLDER"


class Desk(dg.ConfigurableResource[Any]):
    folder: str

    def bank(self) -> Bank:
        return Bank(Path(self.folder) / "bank.db")

    @property
    def outage(self) -> bool:
        return (Path(self.folder) / "outage").exists()


class Application(BaseModel):
    id: Annotated[str, mao.Key]


@mao.agent
def applications() -> list[Application]:
    return [Application(id="A1"), Application(id="A2")]


class Booking(mao.Agent):
    def execute(self, ctx: mao.AgentContext, applications: Application, *, desk: Desk) -> Application:
        ctx.effect("booking", lambda effect: desk.bank().do(effect.key, "booking", effect.record, effect.epoch))
        return applications

    def compensate(self, undo: mao.Undo, *, desk: Desk) -> None:
        for effect in undo.effects:
            desk.bank().cancel(effect.key, undo.epoch)


class Letter(mao.Agent):
    def execute(self, ctx: mao.AgentContext, booking: Application, *, desk: Desk) -> Application:
        ctx.effect("letter", lambda effect: desk.bank().do(effect.key, "letter", effect.record, effect.epoch))
        if desk.outage and booking.id == "A2":
            raise ConnectionError
        return booking

    def compensate(self, undo: mao.Undo, *, desk: Desk) -> None:
        for effect in undo.effects:
            desk.bank().cancel(effect.key, undo.epoch)


BOOKINGS = mao.Pipeline("bookings", entry=applications, agents=[Booking, Letter])


def definitions() -> dg.Definitions:
    # Dagster keeps a reconstructed job for the whole process, so where it works must not be fixed when it is made.
    given = {"desk": Desk(folder=dg.EnvVar(FOLDER)), "state_store": mao.StateStoreResource(root=dg.EnvVar("BOOKINGS_STATE"))}
    made: dg.Definitions = BOOKINGS.build_definitions(resources=given)
    return dg.Definitions.merge(made, dg.Definitions(executor=dg.in_process_executor))


def bookings_job() -> dg.JobDefinition:
    return definitions().resolve_job_def("bookings_job")
