"""Where the project keeps what it makes: everything lies under .mao/, so that removing that directory starts afresh."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def dagster_home() -> Path:
    """The Dagster instance's directory, made and configured if it is not there yet; `DAGSTER_HOME` overrides it."""
    home = Path(os.environ.setdefault("DAGSTER_HOME", str(ROOT / ".mao" / "dagster_home")))
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "dagster.yaml").exists():
        shutil.copy(ROOT / "tools" / "dagster.yaml", home / "dagster.yaml")
    return home
