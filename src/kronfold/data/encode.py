"""Much text to token ids: in batches that keep every core busy, long texts in pieces, kept by content between runs."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from kronfold.base.files import sha256_of_source
from kronfold.data.sources import parts_of
from kronfold.data.text_pieces import may_be_split, pieces_of_parts
from kronfold.data.token_cache import TokenCache, token_cache

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
