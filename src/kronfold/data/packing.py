"""Documents to token blocks of equal length, the training unit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kronfold.base.errors import DataError
from kronfold.data.bad_rows import Reading
from kronfold.data.encode import token_stream
from kronfold.data.sources import documents, record_of


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


# Windows of tokens for calibration, drawn evenly from one or several texts.


READ_AHEAD = 32  # windows are drawn from at most this many times the tokens that are needed


def calibration_windows(
    sources: Sequence[str | Path], tokenizer: Any, *, count: int = 128, window: int = 1024, seed: int = 0
) -> Tensor:
    """The windows of `draw_windows` alone."""
    return draw_windows(sources, tokenizer, count=count, window=window, seed=seed)[0]


def draw_windows(
    sources: Sequence[str | Path],
    tokenizer: Any,
    *,
    count: int = 128,
    window: int = 1024,
    seed: int = 0,
    reading: Reading = Reading(),  # noqa: B008 - frozen
) -> tuple[Tensor, list[dict[str, Any]]]:
    """(count, window) int64 token ids: windows of the texts drawn without replacement, the sources taking turns.

    Each text is read no further than 32 times the tokens wanted from it. Also returns, for each text that was read,
    what its source says of that (`Texts.record`).

    Raises:
        DataError: a text that is missing, unreadable, or too short (how many windows it holds is named).
    """
    if count < 1 or window < 2 or not sources:
        raise DataError(f"Calibration needs at least 1 window of 2 tokens from 1 text; asked for {count} of {window}.")
    shares = [len(range(i, count, len(sources))) for i in range(len(sources))]
    drawn: list[Tensor] = []
    read: list[dict[str, Any]] = []
    for i, (source, share) in enumerate(zip(sources, shares, strict=True)):
        if share == 0:
            continue
        try:
            texts = documents(source, **asdict(reading))
            blocks = pack(texts, tokenizer, window, max_tokens=READ_AHEAD * share * window)
        except DataError as error:
            named = str(source) in str(error)
            raise error if named else DataError(f"{source}: {error}") from error
        if len(blocks) < share:
            raise DataError(
                f"{source} holds {len(blocks)} windows of {window} tokens; {share} are wanted for calibration. Give "
                f"more text, or ask for fewer: --calibration-windows {len(blocks) * len(sources)}."
            )
        # In the order drawn: users of the first few windows (gradients) then see all of the text.
        pick = np.random.default_rng((seed, i)).choice(len(blocks), size=share, replace=False)
        read.append(texts.record())
        drawn.append(torch.from_numpy(blocks.ids[pick].astype(np.int64)))
    turns = [rows[j] for j in range(max(shares)) for rows in drawn if j < len(rows)]
    return torch.stack(turns), read
