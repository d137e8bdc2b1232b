"""Documents to token blocks of equal length, the training unit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from kronfold.base.errors import DataError
from kronfold.data.encode import token_stream
from kronfold.data.sources import record_of


class TokenBlocks(Dataset[dict[str, torch.Tensor]]):
    """A map-style dataset of packed blocks: item i is {"input_ids": (block_size,), "labels": the same}, int64.

    `ids`: (blocks, block_size) uint16 or uint32. The labels are not shifted; `transformers` models shift inside.
    Order is fixed, so that the Trainer's seeded sampler can shuffle it and resume at any position.
    `read`: what the source says was read for them (`Texts.record`), None for texts that came from elsewhere.
    """

    def __init__(self, ids: np.ndarray, read: dict[str, Any] | None = None) -> None:
        self.ids = ids
        self.read = read

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = torch.from_numpy(self.ids[index].astype(np.int64))
        return {"input_ids": block, "labels": block}

    @property
    def tokens(self) -> int:
        """Tokens held: blocks times block_size."""
        return int(self.ids.size)

    @property
    def sha256(self) -> str:
        """Hex SHA-256 of the token ids as little-endian uint32: equal for equal data, whatever the storage."""
        return hashlib.sha256(self.ids.astype("<u4").tobytes()).hexdigest()


def pack(documents: Iterable[str], tokenizer: Any, block_size: int, *, max_tokens: int | None = None) -> TokenBlocks:
    """Tokenise, join with the end-of-text token after every document, cut into blocks of `block_size` tokens.

    The rest that does not fill a block is dropped. `max_tokens`: read no further than this many tokens (rounded
    down to whole blocks). Raises DataError for a tokenizer without end-of-text token or less than one block.
    """
    if tokenizer.eos_token_id is None:
        raise DataError("The tokenizer has no end-of-text token; set tokenizer.eos_token before packing.")
    if max_tokens is not None and max_tokens < block_size:
        raise DataError(f"max_tokens is {max_tokens}, less than one block of {block_size} tokens. Give more.")
    pieces: list[np.ndarray] = []
    count = 0
    for ids in token_stream(documents, tokenizer, tokenizer.eos_token_id, most=max_tokens):
        pieces.append(ids)
        count += len(ids)
        if max_tokens is not None and count >= max_tokens:
            break
    kept = (count if max_tokens is None else min(count, max_tokens)) // block_size
    if kept == 0:
        raise DataError(
            f"The text holds {count} tokens, less than one block of {block_size}. Give more text or a smaller block."
        )
    flat = np.concatenate(pieces)[: kept * block_size]
    return TokenBlocks(flat.reshape(kept, block_size), record_of(documents))
