"""What the user names as evaluation text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from kronfold.base.errors import InputError
from kronfold.data.sources import documents


def open_text(source: str) -> Path | Iterable[str]:
    """A local file or directory as a Path (some protocols read its lines), a `datasets` id as its documents.

    Raises DataError when a local source is missing or of an unknown kind.
    """
    found = documents(source)
    return Path(source) if Path(source).exists() else found


def named_texts(given: Sequence[str]) -> dict[str, str]:
    """Texts written NAME=PATH by name; a bare PATH is called like its file. Raises InputError for a name twice."""
    found: dict[str, str] = {}
    for entry in given:
        name, sign, path = entry.partition("=")
        if not sign or Path(entry).exists():
            name, path = Path(entry).name.partition(".")[0], entry
        if not name or not path:
            raise InputError(f"Text {entry}: write NAME=PATH, for example wikitext2=wiki.test.txt.")
        if name in found:
            raise InputError(f"Two texts are called {name!r}: {found[name]} and {path}. Name them, as NAME=PATH.")
        found[name] = path
    return found
