"""A token embedding of frequency groups, each of its own low rank: many numbers for common tokens, few for rare.

The error of row v counts in proportion to the frequency f_v of its token, both where the row is looked up and where it
makes a logit; along the columns it counts by a metric M. Within a group of rank r the optimum is the truncated SVD of
`diag(f)^{1/2} E R`, with M = R Rᵀ (block-wise weighted low rank: GroupReduce, Chen et al. 2018, arXiv 1806.06950,
section 3.2, with a column metric added; the pivoted factors are ours).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kronfold.base.errors import InputError, ShapeError
from kronfold.structures.layer import StructuredEmbedding, plain_weight, product, product_weight
from kronfold.structures.low_rank import ask_low_rank, pivoted
from kronfold.structures.permutations import inverse, permuted
from kronfold.structures.rates import linear, rates_for, tokens_of
from kronfold.structures.registry import FP16_BYTES, INDEX_BYTES, Kind, Structure, Unit
from kronfold.structures.spec import Pair
from kronfold.structures.weighting import Weighting, check_weight, root

GROUP_SHARES = (1 / 48, 1 / 24, 1 / 12, 1 / 6, 1 / 4, 1 / 3, 1 / 2, 2 / 3, 1.0)  # cumulated shares of the vocabulary


@dataclass(frozen=True)
class GroupedEmbeddingSpec:
    """An embedding (V, embedding_dim) in groups of tokens, each of its own rank (pivoted, as `LowRankSpec`).

    Args:
        sizes: tokens of each group, most frequent first; they sum to V. ranks: one per group.

    Raises:
        ShapeError: unequal numbers of sizes and ranks, a size below 1, a rank beyond the width or the group.
    """

    structure: ClassVar[str] = "grouped_embedding"
    sizes: tuple[int, ...]
    ranks: tuple[int, ...]
    embedding_dim: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(int(n) for n in self.sizes))
        object.__setattr__(self, "ranks", tuple(int(n) for n in self.ranks))
        if len(self.sizes) != len(self.ranks) or not self.sizes or min(*self.sizes, *self.ranks) < 1:
            raise ShapeError(
                f"Grouped embedding: sizes {list(self.sizes)} and ranks {list(self.ranks)} must be equally many and "
                "at least 1."
            )
        width = self.embedding_dim
        if any(r > width or (r > size and r != width) for size, r in zip(self.sizes, self.ranks, strict=True)):
            raise ShapeError(
                f"Grouped embedding: ranks {list(self.ranks)} must not exceed the group sizes {list(self.sizes)}, nor "
                f"the width {width}; a group that stays dense has rank {width} whatever its size."
            )

    @property
    def shape(self) -> Pair:
        return (sum(self.sizes), self.embedding_dim)

    @property
    def held_parameters(self) -> int:
        pairs = zip(self.sizes, self.ranks, strict=True)
        return sum(rank * (size + self.embedding_dim - rank) for size, rank in pairs)

    @property
    def macs_per_token(self) -> int:
        """Multiply-accumulates to expand one looked-up row: every group takes part."""
        return sum(rank * (self.embedding_dim - rank) for rank in self.ranks)

    @property
    def head_macs(self) -> int:
        """Multiply-accumulates of the logits of one token."""
        return self.macs_per_token + sum(size * rank for size, rank in zip(self.sizes, self.ranks, strict=True))

    @property
    def index_count(self) -> int:
        """Stored integers (int32 each): the place of each token, and of each column in groups below full rank."""
        below = sum(rank < self.embedding_dim for rank in self.ranks)
        return sum(self.sizes) + below * self.embedding_dim

    def check_weight(self, shape: Pair) -> None:
        """Raises ShapeError unless an embedding of `shape` (V, width) is what this spec describes."""
        if tuple(shape) != self.shape:
            raise ShapeError(
                f"Grouped embedding describes a weight {self.shape} (tokens, width), but the weight is {tuple(shape)}."
            )

    def to_dict(self) -> dict[str, Any]:
        return {"sizes": list(self.sizes), "ranks": list(self.ranks), "embedding_dim": self.embedding_dim}

    def label(self) -> str:
        """Short text for tables: rank of the most and of the least frequent tokens."""
        if len(self.ranks) == 1:
            return f"rank {self.ranks[0]} of {self.embedding_dim}"
        return f"{len(self.ranks)} groups, rank {self.ranks[0]} to {self.ranks[-1]} of {self.embedding_dim}"


Group = tuple[Tensor, Tensor, Tensor]


@dataclass
class GroupedEmbeddingFit:
    """Attributes:
    position: (V,) int64, the place of each token in the groups' order.
    groups: per group rows (size, rank), mix (rank, width - rank), gather (width,), as `EmbeddingGroup` holds them.
    relative_error: `sqrt(Σ_v f_v ΔᵀMΔ / Σ_v f_v eᵀMe)`, unitless.
    """

    spec: GroupedEmbeddingSpec
    position: Tensor
    groups: list[Group]
    relative_error: float
    history: list[float] = field(default_factory=list)

    def to_dense(self) -> Tensor:
        """(V, width), float64."""
        blocks = [torch.cat([rows, rows @ mix], dim=1)[:, gather] for rows, mix, gather in self.groups]
        return torch.cat(blocks)[self.position]


def grouped_embedding(
    weight: Tensor, spec: GroupedEmbeddingSpec, weighting: Weighting | None = None
) -> GroupedEmbeddingFit:
    """The optimum for each group; groups are runs of tokens in falling order of frequency.

    Args:
        weight: (V, width), any floating dtype; worked on in float64 on the CPU.
        weighting: `outputs` (V,) the token frequencies f (any scale), `inputs` (width, width) the metric M;
            None stands for equal frequencies (then tokens keep their order) or the identity.

    Raises:
        ShapeError, InputError: the weight or the statistics do not fit the spec, or are not finite.
    """
    weight = check_weight(weight, spec).double()
    frequencies, metric = _checked(weighting or Weighting(), spec.shape)
    right_root, right_inverse = root(metric)
    groups, lost, total = [], 0.0, 0.0
    order = by_frequency(frequencies)
    for tokens, rank in zip(order.split(list(spec.sizes)), spec.ranks, strict=True):
        whitened = frequencies[tokens].sqrt()[:, None] * weight[tokens] @ right_root
        total += float(whitened.square().sum())
        if rank == spec.embedding_dim:  # dense, and exact
            groups.append((weight[tokens], weight.new_zeros(rank, 0), torch.arange(rank)))
            continue
        basis = torch.linalg.eigh(whitened.T @ whitened).eigenvectors[:, -rank:]
        groups.append(_factors(weight[tokens], basis, right_root, right_inverse))
        lost += float((whitened - whitened @ basis @ basis.T).square().sum())
    error = (lost / total) ** 0.5
    return GroupedEmbeddingFit(spec, torch.argsort(order), groups, error, [error])


def _factors(rows: Tensor, basis: Tensor, right_root: Tensor, right_inverse: Tensor) -> Group:
    """Rows (size, width) of one group in the subspace `basis` (width, rank) of the whitened columns, by some of their
    own columns."""
    left, right = rows @ right_root @ basis, basis.T @ right_inverse
    # E_gᵀ = rightᵀ leftᵀ by rows of its own, which are columns of E_g.
    columns, mix, gather = pivoted(right.T.contiguous(), left.T)
    return columns.T, mix.T, gather


def group_energies(weight: Tensor, sizes: Sequence[int], weighting: Weighting) -> list[Tensor]:
    """For each group the weighted squared error at every rank 0 .. width: (width + 1,) float64, falling to 0."""
    weight = weight.detach().double()
    frequencies, metric = _checked(weighting, (weight.shape[0], weight.shape[1]))
    right_root = root(metric)[0]
    curves = []
    for tokens in by_frequency(frequencies).split(list(sizes)):
        whitened = frequencies[tokens].sqrt()[:, None] * weight[tokens] @ right_root
        energies = torch.linalg.eigvalsh(whitened.T @ whitened).clamp_min(0)
        curves.append(torch.cat([energies.cumsum(0).flip(0), energies.new_zeros(1)]))
    return curves


def by_frequency(frequencies: Tensor) -> Tensor:
    """Token ids from the most to the least frequent; equal ones keep their order."""
    return torch.argsort(frequencies, descending=True, stable=True)


def _checked(weighting: Weighting, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    frequencies = weighting.outputs
    if frequencies is None:
        frequencies = torch.ones(shape[0], dtype=torch.float64)
    if tuple(frequencies.shape) != (shape[0],):
        raise ShapeError(
            f"Token frequencies {tuple(frequencies.shape)} do not fit an embedding of {shape[0]} tokens. "
            "Were the statistics taken with another tokenizer or model?"
        )
    frequencies = frequencies.detach().to("cpu", torch.float64)
    if not torch.isfinite(frequencies).all() or bool((frequencies < 0).any()) or not frequencies.any():
        raise InputError(
            f"The token frequencies of {shape[0]} tokens hold NaN, infinite or negative numbers, or are all zero. "
            "Count the tokens of the calibration text again; a token that never occurs has frequency 0."
        )
    # A token that was never seen still counts a little, or its row would be free to become anything.
    frequencies = frequencies.clamp_min(1e-6 * float(frequencies.mean()))
    metric = replace(weighting, outputs=None).checked(shape).inputs
    return frequencies, torch.eye(shape[1], dtype=torch.float64) if metric is None else metric


class EmbeddingGroup(nn.Module):
    """`rows [I, mix]`, columns gathered: tokens of one group as `rank` columns of theirs and the others made from them.

    Parameter: `rows` (size, rank), a table to look up. Module: `mix`, an `nn.Linear` (width - rank -> rank) as logits
    use it, whose weight is that matrix (rank, width - rank). Buffer (int32): `gather` (width,), where in
    [row, row · mix] each column stands. A group of full rank holds neither mix nor gather.
    """

    gather: Tensor | None
    mix: nn.Linear | None

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
        self.register_module("mix", None if full else product(width - rank, rank, device, dtype))
        if self.mix is not None:
            nn.init.normal_(self.mix.weight, std=rank**-0.5)
        self.register_buffer("gather", None if full else torch.arange(width, dtype=torch.int32, device=device))

    def expand(self, rows: Tensor) -> Tensor:
        """(..., rank) -> (..., width)."""
        if self.mix is None or self.gather is None:
            return rows
        return permuted(torch.cat([rows, rows @ product_weight(self.mix, self.width - self.rank)], dim=-1), self.gather)

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
            rest = own[..., self.rank :]
            mix = plain_weight(self.mix)
            hidden = own[..., : self.rank] + (self.mix(rest) if mix is None else linear(rest, mix))
        return linear(hidden, self.rows)


class GroupedEmbedding(StructuredEmbedding):
    """An embedding (V, width) whose tokens are split into groups, each held as a matrix of low rank.

    Args:
        sizes: tokens in each group; they sum to V. ranks: rank of each group, at most its size and the width.
        embedding_dim: width of the looked-up vectors.

    Parameters: `groups.i.rows`, `groups.i.mix.weight`. Buffer (int32): `position` (V,), the place of a token in the
    order in which the groups store them.

    Raises:
        ShapeError: a rank beyond the width or the group, or unequal numbers of sizes and ranks.
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
            return linear(hidden, self.dense_weight())
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
        return float(self.spec.macs_per_token)

    def head_macs(self) -> float:
        return float(self.spec.head_macs)

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
        """`fit`: a a `GroupedEmbeddingFit`."""
        new = cls.from_spec(fit.spec.to_dict(), device, dtype)
        with torch.no_grad():
            new.position.copy_(fit.position)
            for group, (rows, mix, gather) in zip(new.groups, fit.groups, strict=True):
                group.rows.copy_(rows)
                if group.mix is not None and group.gather is not None:
                    group.mix.weight.copy_(mix)
                    group.gather.copy_(gather)
        return new

    def to_spec(self) -> dict[str, Any]:
        return {"structure": "grouped_embedding", **self.spec.to_dict()}

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, sizes {self.sizes}, ranks {self.ranks}"


def group_sizes(vocabulary: int, width: int = 1) -> list[int]:
    """Tokens per group, most frequent first; groups of frequent tokens are smaller, for they matter one by one.

    None is smaller than `width` (unless the vocabulary is): such a group could not keep its full rank.
    """
    edges = [0]
    for share in GROUP_SHARES:
        edge = round(share * vocabulary)
        if edge - edges[-1] >= width and (vocabulary - edge >= width or edge == vocabulary):
            edges.append(edge)
    edges = edges if edges[-1] == vocabulary else [*edges, vocabulary]
    return [stop - start for start, stop in pairwise(edges)]


class Grouped(Structure):
    """Recipes ask for one group (a plain low-rank embedding); groups by frequency come from the planner, which chooses
    the rank of each."""

    name = "grouped_embedding"
    spec = GroupedEmbeddingSpec
    layer = GroupedEmbedding
    replaces = ("embedding",)
    takes = ("rank", "ratio")
    may_be_term = False
    planned = ("embedding",)

    def ask(self, shape: Pair, entry: Mapping[str, Any], kind: Kind) -> GroupedEmbeddingSpec:
        return GroupedEmbeddingSpec((shape[0],), (ask_low_rank(shape, entry).rank,), shape[1])

    def sizes(self, spec: GroupedEmbeddingSpec) -> list[GroupedEmbeddingSpec]:
        """Every group at the same share of its rank, in steps of one rank of the largest."""
        width, found = spec.embedding_dim, dict[tuple[int, ...], None]()
        for step in range(1, width):
            share, pairs = step / max(spec.ranks), zip(spec.ranks, spec.sizes, strict=True)
            found[tuple(max(1, min(round(rank * share), width, size)) for rank, size in pairs)] = None
        return [replace(spec, ranks=ranks) for ranks in found]

    def fit(
        self, weight: Tensor, spec: Any, seed: int = 0, weighting: Weighting | None = None, init: str | None = None
    ) -> GroupedEmbeddingFit:
        return grouped_embedding(weight, spec, weighting)

    def slices(self, shape: Pair, kind: Kind) -> list[Pair]:
        """The groups of tokens, most frequent first."""
        return [(size, shape[1]) for size in group_sizes(*shape)]

    def choices(self, shape: Pair, kind: Kind) -> list[GroupedEmbeddingSpec]:
        """One group of this many tokens at every rank below the full one."""
        return [GroupedEmbeddingSpec((shape[0],), (rank,), shape[1]) for rank in range(1, min(shape))]

    def losses(self, weight: Tensor, weighting: Weighting, kind: Kind) -> list[Tensor]:
        sizes = group_sizes(weight.shape[0], weight.shape[1])
        curves = zip(sizes, group_energies(weight, sizes, weighting), strict=True)
        return [0.5 * energies[1 : min(size, weight.shape[1])] for size, energies in curves]

    def cost(self, choice: GroupedEmbeddingSpec, unit: Unit, tied: bool) -> float:
        """Of one group; the places of its tokens are held whatever its rank (`slice_cost`)."""
        if unit == "bytes":
            return float(FP16_BYTES * choice.held_parameters + INDEX_BYTES * (choice.index_count - choice.shape[0]))
        if unit == "macs":
            return float(choice.macs_per_token + tied * choice.head_macs)
        return float(choice.held_parameters)

    def slice_cost(self, shape: Pair, unit: Unit) -> float:
        return float(INDEX_BYTES * shape[0]) if unit == "bytes" else 0.0

    def combined(self, slices: Sequence[Pair], chosen: Sequence[Any]) -> GroupedEmbeddingSpec:
        """Neighbours that both stay dense become one group."""
        width = slices[0][1]
        sizes, ranks = list[int](), list[int]()
        for (size, _), choice in zip(slices, chosen, strict=True):
            rank = width if choice is None else choice.ranks[0]
            if ranks and ranks[-1] == rank == width:
                sizes[-1] += size
            else:
                sizes.append(size)
                ranks.append(rank)
        return GroupedEmbeddingSpec(tuple(sizes), tuple(ranks), width)


STRUCTURE = Grouped()
