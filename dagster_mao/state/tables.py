"""Opening a Delta table while others append to it and drop the commits behind a checkpoint."""

from __future__ import annotations

import time

from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from dagster_mao.state.objects import Objects, reaching

# Seconds before each look. Between the listing and the read of a commit another process may have dropped it: the next look finds the newer
# checkpoint. What a second of looks does not find is damage.
_LOOKS = (0.0, 0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4)


def open_table(objects: Objects, path: str, *, evidence: str) -> DeltaTable | None:
    """A handle on the table as it is now; None when it does not exist, which is when no file lies below `evidence`.

    Raises `StoreError` when the store cannot be reached or the table is damaged.
    """
    with reaching(objects.root):
        for wait in _LOOKS:
            time.sleep(wait)
            try:
                return DeltaTable(objects.url(path), storage_options=objects.storage_options)
            except TableNotFoundError as error:
                if not any(True for _ in objects.list(evidence)):
                    return None
                failure: Exception = error
            except (DeltaError, FileNotFoundError) as error:
                failure = error
        raise failure
