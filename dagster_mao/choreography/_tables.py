"""What subscribers and inboxes share through SQL. Importing this imports SQLAlchemy.

All but the events of an inbox can be lost: the state log says what was sealed, and the rest is read from it again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from dagster_mao.errors import StoreError
from dagster_mao.gateway import shared_store
from dagster_mao.gateway._shared import METADATA, SharedStore
from dagster_mao.state import StateStore

_PART = 500  # names or rows per statement
_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")

SUBSCRIBERS = sa.Table(
    "mao_subscribers",
    METADATA,
    sa.Column("pipeline", sa.Text, primary_key=True),
    sa.Column("agent", sa.Text, primary_key=True),
    sa.Column("cursor", sa.Text, nullable=False),  # of the log: what was sealed before is among the deliveries
    sa.Column("beat", sa.Double, nullable=False),  # when it last looked
    sa.Column("every", sa.Double),  # the seconds after which it means to look again
)

DELIVERIES = sa.Table(
    "mao_deliveries",
    METADATA,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("pipeline", sa.Text, nullable=False),
    sa.Column("agent", sa.Text, nullable=False),
    sa.Column("workflow_id", sa.Text, nullable=False),
    sa.Column("parents", sa.Text, nullable=False),  # `Due.digest`
    sa.Column("attempt", sa.Text, nullable=False),
    sa.Column("since", sa.Double, nullable=False),  # when the last of the parents was sealed, by its sealer's clock
    sa.Column("state", sa.Text, nullable=False),  # waiting, claimed, done, failed, void
    sa.Column("not_before", sa.Double, nullable=False),  # a waiting one is not claimed earlier
    sa.Column("batch", sa.Text),  # that claimed it last
    sa.Column("run_id", sa.Text),  # that worked on it last
    sa.Column("tries", sa.Integer, nullable=False),  # begun
    sa.Column("refused", sa.Integer, nullable=False),  # times that it came to a run and had been done
    sa.Column("error", sa.Text),  # the class of what it failed by last
    sa.Column("at", sa.Double, nullable=False),  # of the last change
    sa.UniqueConstraint("pipeline", "agent", "workflow_id", "parents"),  # the claim: one row, whoever comes first
    sqlite_autoincrement=True,
)
_open = DELIVERIES.c.state != "done"
sa.Index("mao_deliveries_open", DELIVERIES.c.pipeline, DELIVERIES.c.agent, DELIVERIES.c.state, sqlite_where=_open, postgresql_where=_open)
sa.Index("mao_deliveries_batch", DELIVERIES.c.batch)

JOINS = sa.Table(
    "mao_joins",
    METADATA,
    sa.Column("pipeline", sa.Text, primary_key=True),
    sa.Column("agent", sa.Text, primary_key=True),
    sa.Column("workflow_id", sa.Text, primary_key=True),
    sa.Column("missing", sa.Text, nullable=False),  # names of agents, as JSON: what of that which it reads is not sealed
    sa.Column("since", sa.Double, nullable=False),  # when the first of the others was
)

BATCHES = sa.Table(
    "mao_batches",
    METADATA,
    sa.Column("id", sa.Text, primary_key=True),
    sa.Column("pipeline", sa.Text, nullable=False),
    sa.Column("agent", sa.Text, nullable=False),  # the subscriber, or the entry that an inbox feeds
    sa.Column("size", sa.Integer, nullable=False),
    sa.Column("generation", sa.Integer, nullable=False),  # counts the runs that had it: an earlier one may write no more
    sa.Column("run_id", sa.Text),  # that has it; null until a run has begun
    sa.Column("lease", sa.Double),  # until when that run is believed to be alive; where no run has it, when the last one was found dead
    sa.Column("made", sa.Double, nullable=False),
    sa.Column("is_open", sa.Boolean, nullable=False),
)
_unfinished = BATCHES.c.is_open.is_(True)
sa.Index("mao_batches_open", BATCHES.c.pipeline, BATCHES.c.agent, sqlite_where=_unfinished, postgresql_where=_unfinished)

INBOX = sa.Table(
    "mao_inbox",
    METADATA,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("pipeline", sa.Text, nullable=False),
    sa.Column("key", sa.Text, nullable=False),  # sha256 of the record's key
    sa.Column("digest", sa.Text, nullable=False),  # of what it says, as its contract reads it
    sa.Column("payload", sa.Text, nullable=False),  # the record, as JSON
    sa.Column("at", sa.Double, nullable=False),  # when it was accepted
    sa.Column("batch", sa.Text),  # that it was cut into; set once
    sa.Column("is_open", sa.Boolean, nullable=False),  # until the entry of that batch is sealed
    sa.UniqueConstraint("pipeline", "key"),
    sqlite_autoincrement=True,
)
_unsealed = INBOX.c.is_open.is_(True)
sa.Index("mao_inbox_open", INBOX.c.pipeline, INBOX.c.batch, INBOX.c.id, sqlite_where=_unsealed, postgresql_where=_unsealed)


def shared(store: StateStore) -> SharedStore:
    """The database of a state store. Raises `StoreError` where there is none."""
    if store.database is None:
        raise StoreError("Choreography and inboxes need the SQL database", fix="give the state store `database=`, a PostgreSQL URL")
    return shared_store(store.database)


def insert_if_absent(connection: sa.Connection, table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> None:
    """Inserts those rows that are not there yet, as the table's uniqueness says."""
    if rows:
        make = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
        connection.execute(make(table).on_conflict_do_nothing(), [dict(row) for row in rows])


def parts(whole: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """What is long, in pieces that one statement takes."""
    return (whole[start : start + _PART] for start in range(0, len(whole), _PART))
