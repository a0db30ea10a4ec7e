"""Where the project keeps what it makes: everything lies under .mao/, so that removing that directory starts afresh."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def dagster_home() -> Path:
    """The Dagster instance's directory, made and configured if it is not there yet.

    `DAGSTER_HOME` overrides it; a directory that somebody else set up is left as it is.
    """
    own = ROOT / ".mao" / "dagster_home"
    home = Path(os.environ.setdefault("DAGSTER_HOME", str(own)))
    if home == own or not home.exists():
        home.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "tools" / "dagster.yaml", home / "dagster.yaml")
    return home
