"""A token embedding held in Kronecker levels, and the language-model head that reads a structured embedding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kronfold.base.errors import CheckpointError, ShapeError
from kronfold.structures.layer import Structured, StructuredEmbedding, dense_rows
from kronfold.structures.permutations import drop_identity, inverse, permuted
from kronfold.structures.rates import linear, tokens_of
from kronfold.structures.registry import Structure, Where


class ColumnExpansion(nn.Module):
    """One Kronecker level of an embedding: width·rank stored columns become width·block columns.

    With A = [A_1 ... A_rank] of shape (V, rank·width), the level stands for `Σ_k A_k ⊗ b_k` with its columns gathered:
    the row factor of every B_k is 1, so only columns are mixed.

    Parameters: `b` (rank, block). Buffer: `gather` (width·block,) int32, or None.
    """

    gather: Tensor | None

    def __init__(
        self,
        width: int,
        block: int,
        rank: int = 1,
        permute: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.width, self.block, self.rank = width, block, rank
        self.b = nn.Parameter(torch.full((rank, block), block**-0.5, device=device, dtype=dtype))
        identity = torch.arange(width * block, dtype=torch.int32, device=device)
        self.register_buffer("gather", identity if permute else None)

    @property
    def in_width(self) -> int:
        return self.rank * self.width

    @property
    def out_width(self) -> int:
        return self.width * self.block

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., rank·width); returns (..., width·block)."""
        terms = x.reshape(*x.shape[:-1], self.rank, self.width)
        wide = torch.einsum("...rw,rn->...wn", terms, self.b).reshape(*x.shape[:-1], self.out_width)
        return wide if self.gather is None else permuted(wide, self.gather)

    def contract(self, hidden: Tensor) -> Tensor:
        """hidden · Gᵀ of this level: (..., width·block) -> (..., rank·width)."""
        if self.gather is not None:
            hidden = permuted(hidden, inverse(self.gather))
        blocks = hidden.reshape(*hidden.shape[:-1], self.width, self.block)
        return torch.einsum("...wn,rn->...rw", blocks, self.b).reshape(*hidden.shape[:-1], self.in_width)

    def to_spec(self) -> dict[str, Any]:
        return {"block": self.block, "rank": self.rank, "permute": self.gather is not None}


class FactorizedEmbedding(StructuredEmbedding):
    """An embedding `E = weight · G`, where G (width, embedding_dim) is the product of the levels' small factors.

    Args:
        num_embeddings: vocabulary size V. embedding_dim: width of the looked-up vectors.
        levels: from the outermost (whose output is the embedding) inwards, dicts with `block` (how many columns one
            stored column serves), `rank` (default 1) and `permute` (default False).

    Parameters: `weight` (V, stored width), `levels.i.b`. TQCompressor's embedding is two levels of block 2:
    50257 x 192 numbers and two factors of 2.

    Raises:
        ShapeError: a block that does not divide the width it meets.
    """

    weight: nn.Parameter

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        levels: Sequence[dict[str, Any]],
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        width, built = embedding_dim, []
        for level in levels:
            if width % level["block"]:
                raise ShapeError(
                    f"Embedding level {dict(level)}: block {level['block']} does not divide width {width}."
                )
            arguments = {"rank": 1, "permute": False, **level}
            built.append(ColumnExpansion(width // level["block"], **arguments, device=device, dtype=dtype))
            width = built[-1].in_width
        self.levels: Sequence[ColumnExpansion] = nn.ModuleList(built)  # type: ignore[assignment]
        self.weight = nn.Parameter(torch.empty(num_embeddings, width, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)

    def expansion(self) -> Tensor:
        """G, (stored width, embedding_dim). Small (192 x 768 for GPT-2), so calls with many tokens build it anew."""
        g = torch.eye(self.weight.shape[1], device=self.weight.device, dtype=self.weight.dtype)
        for level in reversed(self.levels):
            g = level(g)
        return g

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (...) integers; returns (..., embedding_dim)."""
        rows = F.embedding(ids, self.weight)
        if ids.numel() >= rows.shape[-1]:
            return rows @ self.expansion()
        for level in reversed(self.levels):
            rows = level(rows)
        return rows

    def project(self, hidden: Tensor) -> Tensor:
        """`hidden · Eᵀ` without forming E: (..., embedding_dim) -> (..., V)."""
        if tokens_of(hidden) >= self.weight.shape[1]:
            return linear(linear(hidden, self.expansion()), self.weight)
        for level in self.levels:
            hidden = level.contract(hidden)
        return linear(hidden, self.weight)

    def dense_weight(self) -> Tensor:
        """E, (V, embedding_dim)."""
        return self.weight @ self.expansion()

    def macs_per_token(self) -> float:
        """Multiply-accumulates to expand one looked-up row."""
        return self.weight.shape[1] * self.embedding_dim

    def head_macs(self) -> float:
        """Multiply-accumulates of the logits of one token."""
        return self.weight.shape[1] * (self.embedding_dim + self.num_embeddings)

    def site_weight(self) -> Tensor:
        """The stored matrix: a later structure becomes one more level inside."""
        return self.weight.detach()

    @property
    def site_shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def site_metric(self, metric: Tensor) -> Tensor:
        """An error D in the stored columns is D G behind the expansion."""
        expansion = self.expansion().detach().to(metric)
        return expansion @ metric @ expansion.T

    def gather_place(self, side: str) -> tuple[nn.Module, str] | None:
        """Only the outermost level's; without levels the columns themselves are reordered."""
        return (self.levels[0], "gather") if side == "out" and len(self.levels) else None

    def permute_outputs(self, perm: Tensor) -> None:
        """Reorder the columns of E in place; a head tied to it reorders its inputs alike. perm: (embedding_dim,)."""
        perm = perm.to(self.weight.device)
        if not self.levels:
            with torch.no_grad():
                self.weight.copy_(self.weight[:, perm])
            return
        outermost = self.levels[0]
        gather = perm if outermost.gather is None else outermost.gather[perm]
        outermost.gather = drop_identity(gather.int())

    def add_level(self, b: Tensor, perm: Tensor | None, weight: Tensor) -> FactorizedEmbedding:
        """A new module with one more (innermost) level: `self.weight[:, perm] ≈ Σ_k weight_k ⊗ b[k]`.

        Args:
            b: (rank, block). perm: (stored width,) or None. weight: (rank, V, stored width / block).
        """
        perm = drop_identity(perm)
        new = self.with_empty_level(b.shape[1], b.shape[0], perm is not None)
        with torch.no_grad():
            for old, copy in zip(self.levels, new.levels, strict=False):
                copy.load_state_dict(old.state_dict())
            innermost = new.levels[-1]
            innermost.b.copy_(b)
            if innermost.gather is not None and perm is not None:
                innermost.gather.copy_(torch.argsort(perm))
            new.weight.copy_(weight.permute(1, 0, 2).flatten(1))
        return new

    @classmethod
    def of(cls, embedding: nn.Module) -> FactorizedEmbedding:
        """An embedding as one in levels: itself if it is one, else with no levels yet and exactly its weight."""
        if isinstance(embedding, FactorizedEmbedding):
            return embedding
        weight = dense_rows(embedding)
        new = cls(weight.shape[0], weight.shape[1], [], device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            new.weight.copy_(weight)
        return new

    def with_empty_level(self, block: int, rank: int, permute: bool) -> FactorizedEmbedding:
        """A new module with one more (innermost) level and numbers of its own; also on the meta device."""
        levels = [*(level.to_spec() for level in self.levels), {"block": block, "rank": rank, "permute": permute}]
        return FactorizedEmbedding(
            self.num_embeddings, self.embedding_dim, levels, self.weight.device, self.weight.dtype
        )

    def to_spec(self) -> dict[str, Any]:
        levels = [level.to_spec() for level in self.levels]
        return {"structure": "factorized_embedding", "levels": levels}

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, stored width {self.weight.shape[1]}"


class TiedHead(Structured):
    """The LM head that reads a structured embedding: logits = hidden · Eᵀ. It holds nothing itself.

    The embedding is kept outside the module tree, so it appears once in memory, in the state dict and in the optimiser;
    `copy.deepcopy` of the whole model keeps the tie.
    """

    def __init__(self, embedding: StructuredEmbedding) -> None:
        super().__init__()
        self._source = (embedding,)  # a tuple is no submodule

    @property
    def embedding(self) -> StructuredEmbedding:
        return self._source[0]

    @property
    def reads(self) -> nn.Module:
        return self.embedding

    def permute_inputs(self, perm: Tensor) -> None:
        """Nothing to do: the embedding it reads is reordered itself."""

    @property
    def in_features(self) -> int:
        return self.embedding.embedding_dim

    @property
    def out_features(self) -> int:
        return self.embedding.num_embeddings

    def source_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters the logits depend on, all held by the embedding."""
        return self.embedding.parameters()

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden: (..., embedding_dim); returns logits (..., V)."""
        return self.embedding.project(hidden)

    def macs_per_token(self) -> float:
        return self.embedding.head_macs()

    def to_spec(self) -> dict[str, Any]:
        return {"structure": "tied_head"}

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, reads the embedding"


class _FactorizedEmbedding(Structure):
    """A container: what an embedding is once a structure became a level of it (Kronecker products do)."""

    name = "factorized_embedding"
    replaces = ("embedding",)
    may_be_term = False

    def build(self, content: Mapping[str, Any], where: Where) -> nn.Module:
        self.check_place(where)
        return FactorizedEmbedding(*where.shape, content["levels"], **where.factory)


class _TiedHead(Structure):
    name = "tied_head"
    may_be_term = False

    def build(self, content: Mapping[str, Any], where: Where) -> nn.Module:
        if not isinstance(where.embedding, StructuredEmbedding):
            raise CheckpointError("a tied_head stands at the LM head and needs a structured embedding to read")
        return TiedHead(where.embedding)


STRUCTURE, TIED_HEAD = _FactorizedEmbedding(), _TiedHead()
