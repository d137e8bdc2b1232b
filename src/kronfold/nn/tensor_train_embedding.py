"""A token embedding whose rows are tensor trains: every token holds small cores of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kronfold.base.tensor_train import TensorTrainSpec

CHUNK_NUMBERS = 1 << 22  # numbers of dense rows made at a time where logits are worked out (16 MiB in float32)


class TensorTrainEmbedding(nn.Module):
    """Row v is the tensor train of the cores `cores.k[v]`, read as a vector.

    Args:
        num_embeddings: V. dims: the shape a row is seen as. ranks: between the cores.

    Parameters: `cores.k` (V, rank before, dims[k], rank after).

    Raises:
        ShapeError: as `TensorTrainSpec`.

    Source: TensorGPT, arXiv 2307.00526: each token's row is decomposed by itself.
    """

    def __init__(
        self,
        num_embeddings: int,
        dims: Sequence[int],
        ranks: Sequence[int],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = TensorTrainSpec(num_embeddings, tuple(dims), tuple(ranks))
        self.num_embeddings, self.embedding_dim = self.spec.shape
        self.cores: Sequence[nn.Parameter] = nn.ParameterList(  # type: ignore[assignment]
            nn.Parameter(torch.empty(num_embeddings, *core, device=device, dtype=dtype))
            for core in self.spec.core_shapes
        )
        # the variance of a row's entries is the product of the cores' variances and of the ranks summed over
        spread = (0.02 / math.sqrt(math.prod(ranks))) ** (1 / len(self.spec.dims))
        for core in self.cores:
            nn.init.normal_(core, std=spread)

    def _rows(self, cores: Sequence[Tensor]) -> Tensor:
        """Rows of n tokens from their cores (n, before, size, after): (n, embedding_dim)."""
        rows = cores[0].flatten(1, 2)
        for core in cores[1:]:
            rows = torch.bmm(rows, core.flatten(2)).reshape(rows.shape[0], -1, core.shape[3])
        return rows.flatten(1)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (...) integers; returns (..., embedding_dim)."""
        own = [F.embedding(ids.flatten(), core.flatten(1)).unflatten(1, core.shape[1:]) for core in self.cores]
        return self._rows(own).reshape(*ids.shape, self.embedding_dim)

    def _chunks(self) -> Iterator[list[Tensor]]:
        """The cores of a few tokens at a time."""
        size = max(1, CHUNK_NUMBERS // self.embedding_dim)
        return (list(cores) for cores in zip(*(core.split(size) for core in self.cores), strict=True))

    def _logits(self, hidden: Tensor, *cores: Tensor) -> Tensor:
        return F.linear(hidden, self._rows(cores))

    def project(self, hidden: Tensor) -> Tensor:
        """`hidden · Eᵀ`: (..., embedding_dim) -> (..., V). Dense rows are made a chunk at a time, and made again for
        gradients, so that no dense E stands in memory."""
        if self.num_embeddings * self.embedding_dim <= CHUNK_NUMBERS:
            return self._logits(hidden, *self.cores)
        if not torch.is_grad_enabled():
            return torch.cat([self._logits(hidden, *cores) for cores in self._chunks()], dim=-1)
        made = [checkpoint(self._logits, hidden, *cores, use_reentrant=False) for cores in self._chunks()]
        return torch.cat(made, dim=-1)

    def dense_weight(self) -> Tensor:
        """E, (V, embedding_dim)."""
        return torch.cat([self._rows(cores) for cores in self._chunks()])

    def macs_per_token(self) -> float:
        """Multiply-accumulates to expand one looked-up row."""
        return float(self.spec.expand_macs)

    def head_macs(self) -> float:
        """Multiply-accumulates of the logits of one token when many share the call; each call also makes the rows
        anew, V times `spec.expand_macs`."""
        return float(self.num_embeddings * self.embedding_dim)

    @classmethod
    def from_spec(
        cls,
        spec: dict[str, Any],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> TensorTrainEmbedding:
        """A module of the right shapes for `spec` (as `to_spec` gives it)."""
        return cls(spec["num_embeddings"], spec["dims"], spec["ranks"], device, dtype)

    @classmethod
    def from_fit(cls, fit: Any, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Any:
        """`fit`: a `kronfold.decompose.tensor_train.TensorTrainFit`."""
        new = cls(fit.spec.num_embeddings, fit.spec.dims, fit.spec.ranks, device, dtype)
        with torch.no_grad():
            for core, found in zip(new.cores, fit.cores, strict=True):
                core.copy_(found)
        return new

    def to_spec(self) -> dict[str, Any]:
        return {"structure": "tensor_train", **self.spec.to_dict()}

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, dims {self.spec.dims}, ranks {self.spec.ranks}"
