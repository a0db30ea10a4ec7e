"""What workers need, imported once: they are forked off a process that has it."""

import alembic.command  # noqa: F401
import dagster._core.storage.event_log.sqlite.sqlite_event_log
import dagster._core.storage.local_compute_log_manager
import dagster._core.storage.runs.sqlite.sqlite_run_storage
import dagster._core.storage.schedules.sqlite.sqlite_schedule_storage  # noqa: F401

import dagster_mao.boundary
import dagster_mao.journal._calling
import dagster_mao.journal._sagas
import dagster_mao.saga  # noqa: F401
