"""Technical documentation to plain English paragraphs: examples, tables, signatures and markup fall away."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

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
