"""The last transactions of a Delta table by application id, in one read: delta-rs reads the log anew for each id that it is asked about."""

from __future__ import annotations

import io
import json
import re

import polars as pl
from deltalake import DeltaTable
from polars.exceptions import PanicException

from dagster_mao.errors import TamperedError
from dagster_mao.state.objects import Objects

_CHECKPOINT = re.compile(r"(\d{20})\.checkpoint\.parquet")
_FEW = 20  # ids, that delta-rs is asked about one by one


def transactions(objects: Objects, path: str, table: DeltaTable, ids: frozenset[str]) -> dict[str, int | None]:
    """By id, the version of its last transaction as the handle has it; None of one that has none."""
    if len(ids) > _FEW and (found := _read(objects, f"{path}/_delta_log", table.version())) is not None:
        return {one: found.get(one) for one in ids}
    return {one: table.transaction_version(one) for one in ids}


def _read(objects: Objects, folder: str, version: int) -> dict[str, int] | None:
    """By id: the last checkpoint until that version, and the commits since; None where they are not there, or are none that we know."""
    names = (path.rpartition("/")[2] for path in objects.list(folder))
    checkpoints = (int(named[1]) for name in names if (named := _CHECKPOINT.fullmatch(name)))
    last = max((one for one in checkpoints if one <= version), default=-1)
    found = dict[str, int]()
    try:
        if last >= 0:
            rows = pl.read_parquet(io.BytesIO(objects.get(f"{folder}/{last:020d}.checkpoint.parquet")), columns=["txn"])
            found |= dict(rows["txn"].drop_nulls().struct.unnest().select("appId", "version").drop_nulls().iter_rows())
        for commit in range(last + 1, version + 1):
            lines = (json.loads(line) for line in objects.get(f"{folder}/{commit:020d}.json").splitlines())
            found |= {told["txn"]["appId"]: int(told["txn"]["version"]) for told in lines if "txn" in told}
    except (TamperedError, ValueError, KeyError, TypeError, AttributeError, pl.exceptions.PolarsError, PanicException):
        return None  # dropped behind a later checkpoint meanwhile, or written by another release of Delta, or damaged
    return found
