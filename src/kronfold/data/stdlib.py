"""Technical documentation to plain English paragraphs: examples, tables, signatures and markup fall away."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kronfold.base.errors import DataError
from kronfold.base.files import explain_write_errors
from kronfold.base.job import Job

_RULE = re.compile(r"^[=\-~*^+#_.|\s]{3,}$")
_BULLET = re.compile(r"^(?:[*\-+•o]|\(?[0-9a-z][.)])\s+(?=\S)")
_SIGNATURE = re.compile(r"^[\w.\[\], ]*\w\(.*\)?(?:\s*->.*)?$")
_ROLE = re.compile(r":[a-z:+\-]+:`~?([^`<]+?)(?:\s*<[^`]*>)?`")
_QUOTED = re.compile(r"``([^`]+)``|`([^`']+)[`']_{0,2}")
_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}(\w[^*\n]*?\w|\w)\*{1,2}(?![\w*])")
_SPACES = re.compile(r"\s+")
_WORD = re.compile(r"[^\W\d_]{2,}(?:'[a-z]+)?")
_PROSE_MARKS = frozenset(" ,.'\"-()")
_MINIMUM_WORDS = 4
_PROSE_SHARE = 0.91  # letters and common punctuation among the characters of a paragraph
_WORD_SHARE = 0.66  # plain words among the space-separated pieces


def paragraphs(text: str) -> list[str]:
    """The English paragraphs of one docstring or help topic, each on a single line, in order.

    Doctests, literal blocks, tables, headings, signatures and lines full of symbols are dropped; reST roles,
    quotes and emphasis lose their marks; hard-wrapped lines are joined. May be empty. Unicode is kept.
    """
    kept: list[str] = []
    for index, block in enumerate(_blocks(inspect.cleandoc(text))):
        paragraph = _plain(" ".join(block))
        if index == 0 and paragraph:
            paragraph = _as_sentence(paragraph)
        if _is_prose(paragraph):
            kept.append(paragraph)
    return kept


def _blocks(text: str) -> Iterator[list[str]]:
    """Runs of stripped lines that belong together: split at blank lines, list items and changes of indent."""
    block: list[str] = []
    indent = 0  # of the current block's first line
    literal: int | None = None  # after "::", deeper lines are code until the indent comes back
    doctest = False
    for raw in [*text.expandtabs().splitlines(), ""]:
        line, depth = raw.strip(), len(raw) - len(raw.lstrip())
        if not line:
            doctest = False
            if block and block[-1].endswith("::"):
                literal = indent
            yield from ([block] if block else [])
            block = []
            continue
        if literal is not None and depth > literal:
            continue
        literal = None
        doctest = doctest or line.startswith(">>>")
        if doctest or _is_layout(line):
            block = []
            continue
        bullet = _BULLET.match(line)
        if block and (bullet or abs(depth - indent) > 4):
            yield block
            block = []
        if not block:
            indent = depth
        block.append(line[bullet.end() :] if bullet else line)


def _is_layout(line: str) -> bool:
    """A rule under a heading, a table row, a directive, a grammar rule or a bare signature."""
    return bool(
        _RULE.match(line)
        or line.startswith((".. ", "|", "+-", "$", ":param", ":type", ":return", "@"))
        or "::=" in line
        or re.search(r"\S {3,}\S", line)
        or (_SIGNATURE.match(line) and not line.endswith((".", ",", ")")) and "(" in line)
        or re.fullmatch(r"[\w.]+\(.*\)(?:\s*->.*)?", line)
    )


def _plain(text: str) -> str:
    text = _ROLE.sub(r"\1", text)
    text = _QUOTED.sub(lambda match: match.group(1) or match.group(2), text)
    text = _EMPHASIS.sub(r"\1", text)
    text = _SPACES.sub(" ", text).strip()
    if text.endswith(":"):  # what it announces was an example or a list that may be gone
        text = text.rstrip(": ") + "."
    return text


def _as_sentence(text: str) -> str:
    """A docstring's summary line often lacks its capital or its full stop; later paragraphs are left as they are."""
    start = text[0].upper() if text[:2].isalpha() and " " in text else text[0]
    end = "." if text[-1].isalnum() and " -- " not in text else ""
    return start + text[1:] + end


def _is_prose(text: str) -> bool:
    pieces = text.split(" ")
    if len(pieces) < _MINIMUM_WORDS or not text.endswith((".", "!", "?", '."', ".)")):
        return False
    if not text[0].isupper() and text[0] not in "\"'(_":  # a small letter: the tail of something dropped
        return False
    letters = sum(c.isalpha() or c in _PROSE_MARKS for c in text) / len(text)
    words = sum(bool(_WORD.fullmatch(piece.strip(".,:;()\"'!?"))) or piece in ("a", "A", "I") for piece in pieces)
    return letters >= _PROSE_SHARE and words >= _WORD_SHARE * len(pieces)


# English prose out of the Python installation itself: help topics, docstrings, comments; no network.


_EXCLUDED = {
    *("site-packages", "dist-packages", "__pycache__", "lib-dynload", "ensurepip", "__phello__", "_pyrepl"),
    *("test", "tests", "idlelib", "lib2to3", "turtledemo", "encodings", "pydoc_data"),
}
_COMMENT = re.compile(r"\s*#+ ?(.*)")
_SPLITS = ("train", "validation")


def stdlib_documents(root: str | Path | None = None) -> Iterator[tuple[str, str]]:
    """Yield (name, text) for every help topic, docstring and longer comment that holds prose.

    Paragraphs are separated by a blank line. One that came before, in any document, is dropped, so no paragraph is
    in two documents. The order is fixed: topics by name, then files by path, then docstrings and comments by line.
    `root`: a directory of Python sources instead of the running installation (topics are then left out).
    """
    seen: set[str] = set()
    for name, raw in _raw_documents(root):
        fresh = [paragraph for paragraph in paragraphs(raw) if paragraph not in seen]
        seen.update(fresh)
        if fresh:
            yield name, "\n\n".join(fresh)


def _raw_documents(root: str | Path | None) -> Iterator[tuple[str, str]]:
    if root is None:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        yield from ((f"topic:{name}", topics[name]) for name in sorted(topics))
    library = Path(root or sysconfig.get_path("stdlib"))
    files = (path.relative_to(library) for path in library.rglob("*.py"))
    for path in sorted((p for p in files if not _is_excluded(p)), key=lambda p: p.as_posix()):
        yield from ((f"{path.as_posix()}:{line}", text) for line, text in _texts(library / path))


def _is_excluded(path: Path) -> bool:
    return any(part in _EXCLUDED or part.startswith("config-") for part in path.parts)


def _texts(path: Path) -> list[tuple[int, str]]:
    """(line, text) of the docstrings and of the comment blocks of two lines and more, by line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escape sequences inside the files are not our concern
            tree = ast.parse(content := path.read_bytes())
        lines = content.decode().splitlines()
    except (SyntaxError, ValueError, OSError):  # templates and files of an older encoding: a handful, no loss
        return []
    found = _comments(lines)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text:
                found.append((getattr(node, "lineno", 1), text))
    return sorted(found)


def _comments(lines: list[str]) -> list[tuple[int, str]]:
    found: list[tuple[int, str]] = []
    block: list[str] = []
    for number, line in enumerate([*lines, ""]):
        comment = _COMMENT.match(line)
        if comment:
            block.append(comment.group(1))
            continue
        if len(block) > 1:  # one-liners narrate code; longer ones explain
            found.append((number - len(block) + 1, "\n".join(block)))
        block = []
    return found


def split_of(text: str, holdout: float) -> str:
    """ "validation" for a share `holdout` of all texts, "train" otherwise, decided by SHA-256 of the text alone."""
    share = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
    return "validation" if share < holdout else "train"


def extract_stdlib(
    output_dir: str | Path,
    holdout: float = 0.04,
    overwrite: bool = False,
    root: str | Path | None = None,
) -> dict[str, Any]:
    """Write train.jsonl, validation.jsonl (rows of "text" and "source") and manifest.json; return the manifest.

    `holdout`: share of documents in validation, in [0, 1). The result depends on the Python version, which the
    manifest names together with documents, bytes (of text, UTF-8) and SHA-256 per split. Written atomically.
    Raises DataError (no prose found, holdout out of range), OutputError (the place is taken or not writable).
    """
    if not 0 <= holdout < 1:
        raise DataError(f"holdout is {holdout}; give a share of documents from 0 up to, not including, 1.")
    rows: dict[str, list[str]] = {split: [] for split in _SPLITS}
    text_bytes = dict.fromkeys(_SPLITS, 0)
    for source, text in stdlib_documents(root):
        split = split_of(text, holdout)
        rows[split].append(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")
        text_bytes[split] += len(text.encode())
    if not rows["train"]:
        raise DataError(
            f"No documentation prose found under {root or sysconfig.get_path('stdlib')}. "
            "This Python comes without sources or with docstrings stripped; use a standard installation."
        )
    manifest: dict[str, Any] = {"python": platform.python_version(), "holdout": holdout, "splits": {}}
    with Job.open(output_dir, "stdlib", inputs=[root], overwrite=overwrite, resumable=False) as job:
        job.begin()
        for split in _SPLITS:
            content = "".join(rows[split]).encode()
            with explain_write_errors(output_dir):
                (job.result / f"{split}.jsonl").write_bytes(content)
            manifest["splits"][split] = {
                "documents": len(rows[split]),
                "bytes": text_bytes[split],
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        job.finish(manifest, "manifest.json")
    return manifest
