"""A token embedding of frequency groups, each of its own low rank: many numbers for common tokens, few for rare."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kronfold.base.specs import GroupedEmbeddingSpec
from kronfold.ops import few_rows
from kronfold.ops.cost import rates_for, tokens_of
from kronfold.ops.permutation import inverse, permuted


class EmbeddingGroup(nn.Module):
    """`rows [I, mix]`, columns gathered: tokens of one group as `rank` columns of theirs and the others made from them.

    Parameters: `rows` (size, rank), `mix` (rank, width - rank). Buffer (int32): `gather` (width,), where in
    [row, row · mix] each column stands. A group of full rank holds neither mix nor gather.
    """

    gather: Tensor | None
    mix: nn.Parameter | None

    def __init__(
        self,
        size: int,
        width: int,
        rank: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.width, self.rank = width, rank
        self.rows = nn.Parameter(torch.empty(size, rank, device=device, dtype=dtype))
        nn.init.normal_(self.rows, std=0.02)
        full = rank == width
        mix = None if full else nn.Parameter(torch.empty(rank, width - rank, device=device, dtype=dtype))
        self.register_parameter("mix", mix)
        if mix is not None:
            nn.init.normal_(mix, std=rank**-0.5)
        self.register_buffer("gather", None if full else torch.arange(width, dtype=torch.int32, device=device))

    def expand(self, rows: Tensor) -> Tensor:
        """(..., rank) -> (..., width)."""
        if self.mix is None or self.gather is None:
            return rows
        return permuted(torch.cat([rows, rows @ self.mix], dim=-1), self.gather)

    def permute_outputs(self, perm: Tensor) -> None:
        """Reorder the columns in place. perm: (width,)."""
        perm = perm.to(self.rows.device)
        if self.gather is not None:
            self.gather.copy_(self.gather[perm])
            return
        with torch.no_grad():
            self.rows.copy_(self.rows[:, perm])

    def logits(self, hidden: Tensor) -> Tensor:
        """`hidden · Eᵀ` for the tokens of this group: (..., width) -> (..., size)."""
        if self.mix is not None and self.gather is not None:
            own = permuted(hidden, inverse(self.gather))
            hidden = own[..., : self.rank] + few_rows.linear(own[..., self.rank :], self.mix)
        return few_rows.linear(hidden, self.rows)


class GroupedEmbedding(nn.Module):
    """An embedding (V, width) whose tokens are split into groups, each held as a matrix of low rank.

    Args:
        sizes: tokens in each group; they sum to V. ranks: rank of each group, at most its size and the width.
        embedding_dim: width of the looked-up vectors.

    Parameters: `groups.i.rows`, `groups.i.mix`. Buffer (int32): `position` (V,), the place of a token in the order in
    which the groups store them.

    Raises:
        ShapeError: a rank beyond the width or the group, or unequal numbers of sizes and ranks.

    Source: block-wise low rank by token frequency is GroupReduce (Chen et al. 2018, arXiv 1806.06950); the pivoted
    factors are ours.
    """

    position: Tensor

    def __init__(
        self,
        sizes: Sequence[int],
        ranks: Sequence[int],
        embedding_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = GroupedEmbeddingSpec(tuple(sizes), tuple(ranks), embedding_dim)
        self.sizes, self.ranks = self.spec.sizes, self.spec.ranks
        self.embedding_dim, self.num_embeddings = embedding_dim, sum(self.sizes)
        self.groups: Sequence[EmbeddingGroup] = nn.ModuleList(  # type: ignore[assignment]
            EmbeddingGroup(size, embedding_dim, rank, device, dtype)
            for size, rank in zip(self.sizes, self.ranks, strict=True)
        )
        self.register_buffer("position", torch.arange(self.num_embeddings, dtype=torch.int32, device=device))

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (...) integers; returns (..., embedding_dim)."""
        place = self.position[ids]
        out = self.groups[0].rows.new_zeros(*ids.shape, self.embedding_dim)
        starts = accumulate(self.sizes, initial=0)
        for group, start, size in zip(self.groups, starts, self.sizes, strict=False):
            inside = (place >= start) & (place < start + size)
            # Every token goes through every group: no shape depends on the data, so the module compiles and exports.
            rows = F.embedding((place - start).clamp(0, size - 1), group.rows)
            out = torch.where(inside[..., None], group.expand(rows), out)
        return out

    def project(self, hidden: Tensor) -> Tensor:
        """`hidden · Eᵀ`: (..., embedding_dim) -> (..., V).

        Group by group and then gathered into the order of the tokens; where many tokens share the call and the ranks
        are high, E is built once instead, because the gather would cost more than the numbers it spares.
        """
        tokens, rates = tokens_of(hidden), rates_for(hidden)
        vocabulary, width = self.num_embeddings, self.embedding_dim
        making = (
            sum(size * rank * (width - rank) for size, rank in zip(self.sizes, self.ranks, strict=True)) * rates.mac
        )
        making += vocabulary * width * (2 * rates.row + rates.gather)  # expanded, their columns gathered, then the rows
        grouped = tokens * (self.head_macs() * rates.mac + vocabulary * (rates.row + rates.gather))
        if rates.product(tokens, width, vocabulary) + making < grouped:
            return few_rows.linear(hidden, self.dense_weight())
        stored = torch.cat([group.logits(hidden) for group in self.groups], dim=-1)
        return permuted(stored, self.position)

    def dense_weight(self) -> Tensor:
        """E, (V, embedding_dim)."""
        return permuted(torch.cat([group.expand(group.rows) for group in self.groups]), self.position, 0)

    def permute_outputs(self, perm: Tensor) -> None:
        """Reorder the columns of E in place; a head tied to it reorders its inputs alike. perm: (embedding_dim,)."""
        for group in self.groups:
            group.permute_outputs(perm)

    def macs_per_token(self) -> float:
        """Multiply-accumulates to expand one looked-up row: every group takes part."""
        return float(sum(rank * (self.embedding_dim - rank) for rank in self.ranks))

    def head_macs(self) -> float:
        """Multiply-accumulates of the logits of one token."""
        expand = sum(rank * (self.embedding_dim - rank) for rank in self.ranks)
        return float(expand + sum(size * rank for size, rank in zip(self.sizes, self.ranks, strict=True)))

    @classmethod
    def from_spec(
        cls,
        spec: dict[str, Any],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> GroupedEmbedding:
        """An empty module for `spec` (as `to_spec` gives it)."""
        return cls(spec["sizes"], spec["ranks"], spec["embedding_dim"], device, dtype)

    @classmethod
    def from_fit(cls, fit: Any, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Any:
        """`fit`: a `kronfold.decompose.grouped_embedding.GroupedEmbeddingFit`."""
        new = cls(fit.spec.sizes, fit.spec.ranks, fit.spec.embedding_dim, device, dtype)
        with torch.no_grad():
            new.position.copy_(fit.position)
            for group, (rows, mix, gather) in zip(new.groups, fit.groups, strict=True):
                group.rows.copy_(rows)
                if group.mix is not None and group.gather is not None:
                    group.mix.copy_(mix)
                    group.gather.copy_(gather)
        return new

    def to_spec(self) -> dict[str, Any]:
        return {"structure": "grouped_embedding", **self.spec.to_dict()}

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, sizes {self.sizes}, ranks {self.ranks}"
