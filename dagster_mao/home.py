"""Whether a folder is a Dagster home, without importing Dagster, which takes seconds."""

from __future__ import annotations

from pathlib import Path


def is_home(folder: Path) -> bool:
    """Whether Dagster has kept history in the folder, or is configured to keep it elsewhere."""
    return any((folder / name).exists() for name in ("dagster.yaml", "history"))
