"""The journal's tables. Importing this imports SQLAlchemy."""

from __future__ import annotations

import sqlalchemy as sa

from dagster_mao.gateway._shared import METADATA

_ID = sa.BigInteger().with_variant(sa.Integer, "sqlite")

STEPS = sa.Table(
    "mao_steps",
    METADATA,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("pipeline", sa.Text, nullable=False),
    sa.Column("workflow_id", sa.Text, nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("attempt", sa.Text, nullable=False),
    sa.Column("run_id", sa.Text, nullable=False),
    sa.Column("agent", sa.Text, nullable=False),
    sa.Column("parents", sa.Text, nullable=False),  # the versions it pinned, as JSON
    sa.Column("personal", sa.Boolean, nullable=False),  # records stand as hashes
    sa.Column("seconds", sa.Double),  # that one try of a call may take; null where nothing ends it
    sa.Column("state", sa.Text, nullable=False),  # running, sealing, sealed, failed
    sa.Column("error", sa.Text),  # the class of what it failed by
    sa.Column("version", sa.BigInteger),  # that it sealed
    sa.Column("started", sa.Double, nullable=False),
    sa.Column("ended", sa.Double),
    sa.Column("fenced", sa.Boolean, nullable=False),  # it may do nothing more
    sa.Column("undone_to", sa.BigInteger, nullable=False),  # the last of its pages whose effects are undone
    sa.Column("late", sa.Boolean, nullable=False),  # it has pages beyond
    sa.Column("settled", sa.Boolean, nullable=False),  # completed with nothing left to undo, or in the hands of a saga
    sqlite_autoincrement=True,
)
sa.Index("mao_steps_of", STEPS.c.workflow_id, STEPS.c.attempt)
_open = sa.or_(STEPS.c.settled.is_(False), STEPS.c.late.is_(True))
sa.Index("mao_steps_open", STEPS.c.pipeline, sqlite_where=_open, postgresql_where=_open)

# Pages and not a row per effect: a tenth of the time and space, and nothing ever asks for one effect of one record by SQL.
PAGES = sa.Table(
    "mao_pages",
    METADATA,
    sa.Column("id", _ID, primary_key=True),  # in the order of the commits of a workflow
    sa.Column("step", _ID, nullable=False, index=True),
    sa.Column("at", sa.Double, nullable=False),
    sa.Column("item", _ID),  # the one call that a page from another process of the step is about
    sa.Column("keys", sa.LargeBinary, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),
    sqlite_autoincrement=True,
)

_of_a_call = PAGES.c.item.is_not(None)
sa.Index("mao_pages_of_a_call", PAGES.c.step, PAGES.c.item, sqlite_where=_of_a_call, postgresql_where=_of_a_call)

SAGAS = sa.Table(
    "mao_sagas",
    METADATA,
    sa.Column("id", _ID, primary_key=True),
    sa.Column("pipeline", sa.Text, nullable=False),
    sa.Column("workflow_id", sa.Text, nullable=False),
    sa.Column("attempt", sa.Text, nullable=False),  # what it did is undone
    sa.Column("superseded_by", sa.Text, nullable=False),  # the later attempt that changed its records' inputs; "" where all of it is undone
    sa.Column("state", sa.Text, nullable=False),  # requested, running, compensated, incomplete, void
    sa.Column("why", sa.Text),
    sa.Column("requested_by", sa.Text),  # a run
    sa.Column("owner", sa.Text),
    sa.Column("generation", sa.BigInteger, nullable=False),  # of compensators: the earlier ones may write no more
    sa.Column("lease_until", sa.Double),
    sa.Column("tries", sa.Integer, nullable=False),
    sa.Column("asked", sa.Double, nullable=False),
    sa.Column("fenced", sa.Double),  # since when its steps can begin no effect; of what is superseded: since when it is marked
    sa.Column("ended_epoch", sa.Integer),  # the epoch that its fence ended
    sa.Column("fence", sa.BigInteger),  # the version of the fence
    sa.Column("concluded", sa.Double),
    sa.UniqueConstraint("workflow_id", "attempt", "superseded_by"),
    sqlite_autoincrement=True,
)
_unfinished = SAGAS.c.state.in_(("requested", "running", "incomplete"))
sa.Index("mao_sagas_open", SAGAS.c.pipeline, sqlite_where=_unfinished, postgresql_where=_unfinished)

UNDOS = sa.Table(
    "mao_undos",
    METADATA,
    sa.Column("saga", _ID, primary_key=True, autoincrement=False),
    sa.Column("agent", sa.Text, primary_key=True),
    sa.Column("place", sa.Integer, nullable=False),  # in the order
    sa.Column("state", sa.Text, nullable=False),  # pending, running, done, failed, kept
    sa.Column("effects", sa.BigInteger, nullable=False),  # undone, over all tries
    sa.Column("error", sa.Text),  # the class of the last one
    sa.Column("tries", sa.Integer, nullable=False),
)

COMPENSATORS = sa.Table(
    "mao_compensators",
    METADATA,
    sa.Column("pipeline", sa.Text, primary_key=True),
    sa.Column("agent", sa.Text, primary_key=True),
    sa.Column("seen", sa.Double, nullable=False),  # when a code location that has the agent looked last, while something was left to undo
)
