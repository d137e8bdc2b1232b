"""The order in which blocks are seen: one long seeded stream, so that a position is just a number."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import Dataset


class ShuffledStream(Dataset):
    """Exactly `length` items: `data` shuffled, then shuffled anew, and so on, as one map-style dataset.

    Read from first to last, every batch is full and item i depends on (seed, i) only, not on how items are
    grouped into batches, micro-batches or processes. So a run resumes exactly, and any split of the global
    batch sees the same data.

    `start`: items of the stream that earlier stages have read; item 0 here is item `start` of the whole.
    """

    def __init__(self, data: Dataset, length: int, seed: int, start: int = 0) -> None:
        self.data = data
        self.length = length
        self.seed = seed
        self.start = start
        self._epoch = -1
        self._order: list[int] = []

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < self.length:
            raise IndexError(index)
        size = len(self.data)  # type: ignore[arg-type]
        epoch, position = divmod(self.start + index, size)
        if epoch != self._epoch:
            # One generator per epoch; an odd multiplier keeps (seed, epoch) pairs of neighbouring seeds
            # apart.
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
            self._order = self._shuffled(epoch, size, generator)
            self._epoch = epoch
        return self.data[self._order[position]]

    def _shuffled(self, epoch: int, size: int, generator: torch.Generator) -> list[int]:
        """The order of one epoch (from 0)."""
        return torch.randperm(size, generator=generator).tolist()
