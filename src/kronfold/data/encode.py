"""Long texts in pieces that tokenise to exactly what the whole text does, so that several cores can share one text.

A piece ends after an ASCII letter and before a space. There no word that a tokenizer of the kinds listed here looks at
goes on: each of them starts a new word at that space, by its own rule, whatever follows and whatever came before. So
the words of the pieces are the words of the text, and a model sees nothing but words. A tokenizer with any part that is
not listed gets its texts whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from kronfold.base.errors import InputError
from kronfold.base.files import UNFINISHED, atomic_file, cache_directory, sha256_of_source
from kronfold.data.sources import parts_of

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


# Token ids kept on disk by content: the same text under the same tokenizer is tokenised once per machine.
#
# An entry is a .npy file (1-D, uint16 or uint32) with the SHA-256 of its numbers behind them, named by the hash of what
# it was made from, in `$KRONFOLD_CACHE/tokens` (`~/.cache/kronfold/tokens`). It is written under another name first, so
# several processes may share the place, and what does not match its own hash is made anew. Deleting the directory is
# always safe. `$KRONFOLD_TOKEN_CACHE_GB` bounds it (8 by default; the entries unused for longest go first); 0 switches
# it off.


LIMIT = "KRONFOLD_TOKEN_CACHE_GB"
_USUAL_GB = 8.0
_BETWEEN_TRIMS = 1 << 28  # bytes written before the whole is measured again
_ABANDONED = 86_400.0  # seconds after which an unfinished file has no writer any more
_DIGEST = hashlib.sha256().digest_size


def token_cache() -> TokenCache | None:
    """The cache of this machine, None where it is switched off. Raises InputError for a limit that is no number."""
    text = os.environ.get(LIMIT) or str(_USUAL_GB)
    try:
        gigabytes = float(text)
    except ValueError:
        raise InputError(f"${LIMIT} is {text!r}; give a number of gigabytes, 0 for no cache.") from None
    return TokenCache(cache_directory() / "tokens", int(gigabytes * 1e9)) if gigabytes > 0 else None


class TokenCache:
    """Arrays of token ids by key, at most about `limit` bytes. A place that cannot be written keeps nothing."""

    def __init__(self, place: Path, limit: int) -> None:
        self.place = place
        self.limit = limit
        self._written = _BETWEEN_TRIMS  # the first entry of a process looks at the whole

    def get(self, key: str, dtype: np.dtype) -> np.ndarray | None:
        """The entry, mapped into memory; None when there is none, or a damaged one."""
        path = self._path(key)
        try:
            ids = np.load(path, mmap_mode="r", allow_pickle=False)
            with path.open("rb") as file:
                file.seek(-_DIGEST, os.SEEK_END)
                digest = file.read()
            if ids.ndim != 1 or ids.dtype != dtype or hashlib.sha256(ids.data).digest() != digest:
                return None
            os.utime(path)  # used now; the oldest go first
        except (OSError, ValueError, EOFError):
            return None
        return ids

    def put(self, key: str, ids: np.ndarray) -> None:
        """Keep `ids` (1-D). Nothing happens when it cannot be written: the caller has them anyway."""
        try:
            with atomic_file(self._path(key)) as file:
                np.save(file, ids, allow_pickle=False)
                file.write(hashlib.sha256(ids.data).digest())
        except OSError:
            return
        self._written += ids.nbytes
        if self._written >= _BETWEEN_TRIMS:
            self._written = 0
            self.trim()

    def trim(self) -> None:
        """Delete the entries unused for longest until the rest fits the limit, and what killed writers left."""
        now, found = time.time(), []
        for path in self.place.glob("*"):
            with contextlib.suppress(OSError):  # another process may delete it meanwhile
                stat = path.stat()
                if path.suffix == ".npy":
                    found.append((stat.st_mtime, stat.st_size, path))
                elif path.suffix == UNFINISHED and now - stat.st_mtime > _ABANDONED:
                    path.unlink()
        excess = sum(size for _, size, _ in found) - self.limit
        for _, size, path in sorted(found):
            if excess <= 0:
                return
            with contextlib.suppress(OSError):
                path.unlink()
            excess -= size

    def _path(self, key: str) -> Path:
        return self.place / f"{key}.npy"


# Much text to token ids: in batches that keep every core busy, long texts in pieces, kept by content between runs.


_FIRST = 1 << 12  # characters of the first batch; each is twice the one before, so little is read in vain
_MOST = 1 << 22  # until this
PIECE = 1 << 16  # characters, from which a text is cut
WORTH_KEEPING = 1 << 16  # characters, from which looking a batch up takes less time than tokenising it

Piece = tuple[str, bool]  # a text or a part of it, and whether its document ends with it


def encode_documents(documents: Iterable[str], tokenizer: Any) -> Iterator[np.ndarray]:
    """Token ids of each document (1-D, uint16 or uint32), without special tokens; nothing is kept on disk."""
    encoder = Encoder(tokenizer)
    begun: list[np.ndarray] = []
    for batch in encoder.batches(documents):
        for ids, (_, ends) in zip(encoder.ids([text for text, _ in batch]), batch, strict=True):
            begun.append(np.array(ids, dtype=encoder.dtype))
            if ends:
                yield np.concatenate(begun)
                begun = []


def token_stream(
    documents: Iterable[str], tokenizer: Any, end: int | None = None, *, most: int | None = None
) -> Iterator[np.ndarray]:
    """Token ids of all documents one after the other, in arrays of any length (1-D, uint16 or uint32).

    Without special tokens, but `end` after every document. What was tokenised before comes from the token cache.
    `most`: tokens that are wanted at most; no more of a long text is held than can be needed for so many.
    """
    encoder = Encoder(tokenizer)
    cache, made_by = token_cache(), ""
    for batch in encoder.batches(documents, most):
        if cache is None or sum(len(text) for text, _ in batch) < WORTH_KEEPING:
            yield encoder.joined(batch, end)
            continue
        made_by = made_by or encoder.fingerprint()
        if not made_by:
            cache = None
        yield _kept(encoder, batch, end, cache, made_by)


def _kept(encoder: Encoder, batch: list[Piece], end: int | None, cache: TokenCache | None, made_by: str) -> np.ndarray:
    if cache is None:
        return encoder.joined(batch, end)
    digest = hashlib.sha256(f"{made_by} {end}".encode())
    for text, ends in batch:
        content = text.encode("utf-8", "surrogatepass")
        digest.update(f" {len(content)} {ends} ".encode())
        digest.update(content)
    key = digest.hexdigest()
    found = cache.get(key, encoder.dtype)
    if found is None:
        found = encoder.joined(batch, end)
        cache.put(key, found)
    return found


class Encoder:
    """A tokenizer, and what is known of it: may texts be split, what are its ids a function of."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= np.iinfo(np.uint16).max + 1 else np.uint32)
        self.backend = _plain_backend(tokenizer)
        self.splits = self.backend is not None and may_be_split(self.backend)

    def batches(self, documents: Iterable[str], most: int | None = None) -> Iterator[list[Piece]]:
        """The documents, long ones in pieces, in batches of growing size. `most`: as in `token_stream`."""
        batch: list[Piece] = []
        size, wanted = 0, _FIRST
        for piece in self._pieces(documents, most):
            batch.append(piece)
            size += len(piece[0]) + 1
            if size >= wanted:
                yield batch
                batch, size, wanted = [], 0, min(2 * wanted, _MOST)
        if batch:
            yield batch

    def _pieces(self, documents: Iterable[str], most: int | None) -> Iterator[Piece]:
        # No entry of the vocabulary is longer, so this many characters hold the tokens that are wanted.
        enough = None if most is None else max(PIECE, most * max(map(len, self.tokenizer.get_vocab())))
        parts = ((text, ends) for text, ends, _ in parts_of(documents))
        return pieces_of_parts(parts, PIECE if self.splits else None, enough)

    def ids(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text, without special tokens; several at a time where the tokenizer can."""
        if self.backend is None:
            return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        self.tokenizer("", add_special_tokens=False)  # sets truncation, padding and the like as a call of it would
        return [one.ids for one in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def joined(self, batch: list[Piece], end: int | None) -> np.ndarray:
        """The ids of a batch in one array, `end` where a document ends."""
        found = self.ids([text for text, _ in batch])
        tail = [] if end is None else [end]
        parts = chain.from_iterable((ids, tail if ends else []) for ids, (_, ends) in zip(found, batch, strict=True))
        return np.fromiter(chain.from_iterable(parts), dtype=self.dtype)

    def fingerprint(self) -> str:
        """Hash of all that the ids depend on beside the text; "" when that cannot be told."""
        name = f"{type(self.tokenizer).__module__}.{type(self.tokenizer).__qualname__}"
        try:
            if self.backend is None:
                with tempfile.TemporaryDirectory() as place:
                    self.tokenizer.save_pretrained(place)
                    content = sha256_of_source(Path(place))
            elif getattr(self.backend.model, "dropout", None):
                return ""
            else:
                import tokenizers

                self.tokenizer("", add_special_tokens=False)
                content = f"{tokenizers.__version__} {self.backend.encode_special_tokens} {self.backend.to_str()}"
        except Exception:  # not every tokenizer can be written down
            return ""
        return hashlib.sha256(f"{name} {content}".encode()).hexdigest()


def _plain_backend(tokenizer: Any) -> Any:
    """The `tokenizers.Tokenizer` that does all the work of `tokenizer`, None when Python code may have a part in it."""
    from transformers import PreTrainedTokenizerFast

    kind, usual = type(tokenizer), PreTrainedTokenizerFast
    if not isinstance(tokenizer, usual):
        return None
    own = any(getattr(kind, name) is not getattr(usual, name) for name in ("__call__", "_encode_plus"))
    return None if own else tokenizer.backend_tokenizer
