"""Permutations as index tensors: `x[..., perm]`."""

from __future__ import annotations

import torch
from torch import Tensor


def drop_identity(perm: Tensor | None) -> Tensor | None:
    """The permutation, or None when it changes nothing (so that no gather is held or run for it)."""
    if perm is None or torch.equal(perm.cpu(), torch.arange(perm.numel(), dtype=perm.dtype)):
        return None
    return perm
