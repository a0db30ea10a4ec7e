"""The loan agents on some days, as a code location for a real daemon: everything in the folder that BACKFILL_FOLDER names."""

import os
from pathlib import Path

import dagster as dg

from tests.dagster import loans

FOLDER, DAYS, SINGLE = "BACKFILL_FOLDER", "BACKFILL_DAYS", "BACKFILL_SINGLE_RUN"


def partitions(count: int) -> dg.DailyPartitionsDefinition:
    many = dg.DailyPartitionsDefinition(start_date="2025-01-01", end_date="2026-01-01").get_partition_keys()
    return dg.DailyPartitionsDefinition(start_date=many[0], end_date=many[count])


if FOLDER in os.environ:
    policy = dg.BackfillPolicy.single_run() if SINGLE in os.environ else None
    days = partitions(int(os.environ[DAYS]))

    @dg.asset(key_prefix="loans", deps=[dg.AssetKey(["loans", "approval"])], partitions_def=days)
    def report() -> None:
        """Below the pipeline, and with no policy of its own."""

    defs = dg.Definitions.merge(
        loans.definitions(Path(os.environ[FOLDER]), backfill_policy=policy, partitions_def=days),
        dg.Definitions(assets=[report], executor=dg.in_process_executor),
    )
