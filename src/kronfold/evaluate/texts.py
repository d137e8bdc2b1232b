"""What the user names as evaluation text."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kronfold.data.sources import documents


def open_text(source: str) -> Path | Iterable[str]:
    """A local file or directory as a Path (some protocols read its lines), a `datasets` id as its documents.

    Raises DataError when a local source is missing or of an unknown kind.
    """
    found = documents(source)
    return Path(source) if Path(source).exists() else found
