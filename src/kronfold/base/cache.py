"""Where kronfold keeps what it can make again: calibration statistics, token ids."""

from __future__ import annotations

import os
from pathlib import Path


def cache_directory() -> Path:
    """`$KRONFOLD_CACHE`, else `~/.cache/kronfold`."""
    return Path(os.environ.get("KRONFOLD_CACHE") or Path.home() / ".cache" / "kronfold")
