"""Specs: frozen descriptions of a structured matrix. A spec knows its sizes; it holds no numbers.

Canonical orientation everywhere: a weight is (out_features, in_features), as in `nn.Linear`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from kronfold.base.errors import ShapeError

Pair = tuple[int, int]


def divisors(n: int) -> list[int]:
    """All positive divisors of `n`, ascending."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})


@dataclass(frozen=True)
class LowRankSpec:
    """A matrix (out_features, in_features) of rank `rank`, held by `rank` of its own rows and the way to the others.

    Two factors (out, rank) and (rank, in) hold rank² numbers too many: any invertible matrix may be put between them.
    Taking rank rows of the matrix itself as second factor uses that up, so the count is rank·(out + in - rank),
    never above the dense one (pivoting factorisation, arXiv 2501.19090).

    Args:
        permuted: hold where each output stands; False once a neighbour gives the outputs in the order of the factors.

    Raises:
        ShapeError: a size below 1, or a rank above the smaller side.
    """

    structure: ClassVar[str] = "low_rank"
    out_features: int
    in_features: int
    rank: int
    permuted: bool = True

    def __post_init__(self) -> None:
        if min(self.out_features, self.in_features, self.rank) < 1:
            raise ShapeError(f"Low-rank spec {self.shape} rank {self.rank}: every size must be at least 1.")
        if self.rank > min(self.shape):
            raise ShapeError(
                f"Rank {self.rank} is above the smaller side of a weight {self.shape}; use {min(self.shape)} or less."
            )

    @classmethod
    def for_ratio(cls, shape: Pair, ratio: float) -> LowRankSpec:
        """The spec of highest rank that holds at most `ratio` of the dense numbers (at least rank 1)."""
        if not 0 < ratio <= 1:
            raise ShapeError(f"ratio {ratio} must lie in (0, 1]: the share of a weight's numbers that is kept.")
        total = shape[0] + shape[1]
        budget = ratio * shape[0] * shape[1]
        # the smaller root of r(m + n - r) = budget
        rank = int((total - math.sqrt(total * total - 4 * budget)) / 2 + 1e-9)
        return cls(shape[0], shape[1], max(1, min(rank, *shape)))

    @property
    def shape(self) -> Pair:
        return (self.out_features, self.in_features)

    @property
    def held_parameters(self) -> int:
        return self.rank * (self.out_features + self.in_features - self.rank)

    @property
    def index_count(self) -> int:
        """Stored integers (int32 each): where each output comes from."""
        return self.permuted * self.out_features

    @property
    def macs_per_token(self) -> int:
        return self.held_parameters

    def check_weight(self, shape: Pair) -> None:
        """Raises ShapeError unless a weight of `shape` (out, in) is what this spec describes."""
        if tuple(shape) != self.shape:
            raise ShapeError(
                f"Low-rank spec describes a weight {self.shape}, but the weight is {tuple(shape)} "
                "(out_features, in_features)."
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def label(self) -> str:
        """Short text for tables, e.g. `rank 120 of 576`."""
        return f"rank {self.rank} of {min(self.shape)}"


@dataclass(frozen=True)
class GroupedEmbeddingSpec:
    """An embedding (V, embedding_dim) in groups of tokens, each of its own rank (pivoted, as `LowRankSpec`).

    Args:
        sizes: tokens of each group, most frequent first; they sum to V. ranks: one per group.

    Raises:
        ShapeError: unequal numbers of sizes and ranks, a size below 1, a rank beyond the width or the group.
    """

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
        too_high = [r > width or (r > size and r != width) for size, r in zip(self.sizes, self.ranks, strict=True)]
        if any(too_high):
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


@dataclass(frozen=True)
class SumSpec:
    """`W ≈ W_1 + W_2 + ...`, each term a structured matrix of its own kind and shape.

    Args:
        terms: typed specs of linear structures (no sums), two or more, all of one weight's shape.

    Raises:
        ShapeError: fewer than two terms, a sum among them, or terms of different shapes.
    """

    structure: ClassVar[str] = "sum"
    terms: Sequence[Any]

    def __post_init__(self) -> None:
        object.__setattr__(self, "terms", tuple(self.terms))
        if len(self.terms) < 2 or any(isinstance(term, SumSpec) for term in self.terms):
            raise ShapeError(
                f"A sum has two or more terms, none of them a sum; got {[term.structure for term in self.terms]}. "
                "Ask for a single structure directly."
            )
        shapes = [term.shape for term in self.terms]
        if len(set(shapes)) > 1:
            raise ShapeError(f"The terms of a sum must describe one shape (out_features, in_features); got {shapes}.")

    @property
    def shape(self) -> Pair:
        return self.terms[0].shape

    @property
    def held_parameters(self) -> int:
        return sum(term.held_parameters for term in self.terms)

    @property
    def index_count(self) -> int:
        """Stored integers of all terms (int32 each)."""
        return sum(term.index_count for term in self.terms)

    def check_weight(self, shape: Pair) -> None:
        """Raises ShapeError unless a weight of `shape` (out, in) is what every term describes."""
        for term in self.terms:
            term.check_weight(shape)

    def to_dict(self) -> dict[str, Any]:
        return {"terms": [{"structure": term.structure, **term.to_dict()} for term in self.terms]}

    def label(self) -> str:
        """Short text for tables, e.g. `rank 120 of 576 + 1 x (288, 288)⊗(2, 2)`."""
        return " + ".join(term.label() for term in self.terms)
