"""Long texts in pieces that tokenise to exactly what the whole text does, so that several cores can share one text.

A piece ends after an ASCII letter and before a space. There no word that a tokenizer of the kinds listed here looks at
goes on: each of them starts a new word at that space, by its own rule, whatever follows and whatever came before. So
the words of the pieces are the words of the text, and a model sees nothing but words. A tokenizer with any part that is
not listed gets its texts whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

_PLACE = re.compile("[A-Za-z](?= )")

# Patterns of Split. In none of them does an alternative go from a letter on to a space, and a match that ends in a
# letter does not depend on what follows: the only lookahead stands behind white space.
_WORDS_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_WORDS_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PATTERNS = {
    _WORDS_GPT_2,
    "'(?:[sdmt]|ll|ve|re)" + _WORDS_GPT_2.removeprefix("'s|'t|'re|'ve|'m|'ll|'d"),  # the same, written shorter
    _WORDS_LLAMA_3,
    _WORDS_LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}"),  # Qwen2
}
_NORMALIZERS = {"NFC", "NFD", "NFKC", "NFKD", "Lowercase"}  # a space composes with nothing before it


def pieces(text: str, least: int) -> Iterator[str]:
    """`text` in order, in pieces of at least `least` characters where places for that are found."""
    return (piece for piece, _ in pieces_of_parts([(text, True)], least))


def pieces_of_parts(
    parts: Iterable[tuple[str, bool]], least: int | None, most: int | None = None
) -> Iterator[tuple[str, bool]]:
    """The pieces of texts that come in parts, each with whether its text ends there. How parts are cut changes nothing.

    `least`: characters of a piece; None cuts nowhere. `most`: what grows beyond it without a place is cut anywhere, so
    that no text fills the memory.
    """
    held, searched = "", 0
    for part, ends in parts:
        held += part
        start = 0
        while least is not None and (found := _PLACE.search(held, max(start + least - 1, searched))):
            yield held[start : found.end()], False
            start = found.end()
        held = held[start:]
        searched = max(0, len(held) - 1)  # of the last character it is not known yet what follows
        if ends or (most is not None and len(held) > most):
            yield held, ends
            held, searched = "", 0


def may_be_split(backend: Any) -> bool:
    """Whether `pieces` are exact for a `tokenizers.Tokenizer`."""
    try:
        pre_tokenizer = _described(backend.pre_tokenizer)
        normalizer = _described(backend.normalizer)
    except Exception:  # a part written in Python cannot be described
        return False
    return (
        all(part["type"] in _NORMALIZERS for part in _parts(normalizer, "normalizers"))
        and _starts_at_spaces(_parts(pre_tokenizer, "pretokenizers"))
        and not getattr(backend.model, "dropout", None)  # random: nothing would be equal
        and all(_stays_apart(token) for token in backend.get_added_tokens_decoder().values())
    )


def _described(part: Any) -> dict[str, Any]:
    return json.loads(part.__getstate__()) if part is not None else {}


def _parts(described: dict[str, Any], key: str) -> list[dict[str, Any]]:
    if described.get("type") == "Sequence":
        return [inner for part in described[key] for inner in _parts(part, key)]
    return [described] if described else []


def _starts_at_spaces(parts: list[dict[str, Any]]) -> bool:
    """All parts judge a character by its neighbours in the word alone, and one starts a word at every such space."""
    starting = 0
    for part in parts:
        kind = part["type"]
        if kind == "ByteLevel":
            if not starting and not part.get("use_regex", True):
                return False  # what comes after it sees no space any more
            starting += 1
        elif kind == "Metaspace":
            if not part.get("split", True) or part is not parts[0]:
                return False
            starting += 1
        elif kind == "Split":
            known = part["pattern"].get("Regex") in _PATTERNS
            if not known or part["behavior"] != "Isolated" or part["invert"]:
                return False
            starting += 1
        elif kind != "Digits":
            return False
    return starting > 0


def _stays_apart(token: Any) -> bool:
    """An added token that neither goes over such a place nor takes the space after itself."""
    return not re.search(r"\S\s", token.content) and not (token.rstrip and re.search("[A-Za-z]$", token.content))
