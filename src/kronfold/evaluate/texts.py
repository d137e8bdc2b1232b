"""What the user names as evaluation text, and how its rows become the documents that are measured."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from kronfold.base.errors import InputError
from kronfold.data.bad_rows import Reading
from kronfold.data.sources import EVALUATION, Texts, documents, encoded

Rows = Literal["auto", "lines", "documents"]
ROWS: tuple[Rows, ...] = ("auto", "lines", "documents")
_HEADING = re.compile(r"\s*(= ){1,6}\S.*( =){1,6}\s*")  # as WikiText writes it
_FEWEST_ROWS = 8  # from which blank ones among them tell lines from documents
_BLANK_SHARE = 0.05


def open_text(source: str | Path, reading: Reading = Reading()) -> Texts:  # noqa: B008 - frozen
    """The documents of a source to measure on: of a dataset `test`, else `validation`, never `train` unless named.

    Raises DataError when a source is missing, of an unknown kind, or has neither split.
    """
    return documents(source, split=EVALUATION, **asdict(reading))


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


def measured_documents(
    text: str | Iterable[str], rows: Rows, lines_are_documents: bool
) -> tuple[list[str], dict[str, Any]]:
    """The documents to measure, and the record of them (`Texts.record`, with what was joined).

    A text gives the same documents whatever it comes in: rows that are the lines of one text (`lines_of_one_text`, or
    by `rows`) are put together again. `lines_are_documents` takes such a text, and that of a .txt file, apart into
    rows as the Hugging Face WikiText has them (a line keeps its newline, a blank line is "").
    """
    if isinstance(text, str):
        groups: list[tuple[str | None, list[str]]] = [("", [encoded(text)[0]])]
    elif isinstance(text, Texts):
        groups = []
        for origin, parts in groupby(text.parts(), key=lambda part: part.rows):
            groups.append((origin, [""]))
            for part in parts:
                groups[-1][1][-1] += part.text
                if part.ends:
                    groups[-1][1].append("")
            groups[-1][1].pop()
    else:
        groups = [("rows", [encoded(row)[0] for row in text])]
    found: list[str] = []
    joined: dict[str, Any] = {}
    for origin, texts in groups:
        ends = lines_of_one_text(texts) if origin and rows != "documents" else None
        if origin and rows == "lines":
            ends = ends or "added"
        if ends:
            joined[str(origin)] = {"rows": len(texts), "line_ends": ends}
            texts = [_joined(texts, ends)]
        if lines_are_documents and (ends or origin is None):
            texts = [row for whole in texts for row in _as_rows(whole)]
        found += texts
    content = b"\xff".join(document.encode() for document in found)
    record = {
        **(text.record() if isinstance(text, Texts) else {"source": None}),
        "documents": len(found),
        "bytes": sum(len(document.encode()) for document in found),
        "sha256": hashlib.sha256(content).hexdigest(),
        "rows_joined": joined or None,
    }
    return found, record


def lines_of_one_text(rows: Sequence[str]) -> Literal["kept", "added"] | None:
    """Whether rows are the lines of one text: with their line ends "kept", or to be "added"; None for documents.

    No row has a line end inside. Then they are lines when all that are not blank end in one (as in WikiText on the
    Hugging Face hub; the last may lack it), or when none does and there are WikiText's headings (" = Title = "), or
    blank rows among at least 8: a blank row is a line of a text, never a document.
    """
    if any("\n" in row[:-1] for row in rows):
        return None
    filled = [row for row in rows if row.strip()]
    ended = sum(row.endswith("\n") for row in filled)
    if ended >= 2 and all(row.endswith("\n") for row in filled[:-1]):
        return "kept"
    if any(row.endswith("\n") for row in rows) or len(filled) < 2:
        return None
    blank = len(rows) - len(filled)
    if any(_HEADING.fullmatch(row) for row in filled):
        return "added"
    return "added" if len(rows) >= _FEWEST_ROWS and blank >= _BLANK_SHARE * len(rows) else None


def _joined(rows: Sequence[str], ends: str) -> str:
    if ends == "added":
        return "\n".join(rows) + ("\n" if rows[-1].strip() else "")
    # Where blank lines became "", WikiText's files have a space, as around all their lines.
    filled = [row for row in rows if row.strip()]
    spaced = all(row.startswith(" ") and row.endswith(" \n") for row in filled)
    return "".join(row if row.endswith("\n") or row.strip() else " \n" if spaced else "\n" for row in rows)


def _as_rows(text: str) -> list[str]:
    lines = text.split("\n")
    rows = [line + "\n" if line.strip() else "" for line in lines[:-1]]
    return rows + ([lines[-1]] if lines[-1].strip() else [])
