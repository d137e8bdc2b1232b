"""Windows of tokens for calibration, drawn evenly from one or several texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kronfold.base.errors import DataError
from kronfold.data.bad_rows import Reading
from kronfold.data.packing import pack
from kronfold.data.sources import documents

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
