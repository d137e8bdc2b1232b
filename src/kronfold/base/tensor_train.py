"""The spec of an embedding whose rows are tensor trains, one for each token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from kronfold.base.errors import ShapeError
from kronfold.base.specs import Pair, divisors


def balanced_factors(width: int, count: int) -> tuple[int, ...]:
    """`width` as a product of `count` factors above 1, as equal as they can be, ascending: 768 in 3 is (8, 8, 12).

    Raises ShapeError when it has fewer prime factors than that.
    """
    found = _factorisations(width, count, 2)
    if not found:
        raise ShapeError(f"Width {width} is no product of {count} factors above 1; ask for fewer cores.")
    return min(found, key=lambda factors: (sum(factors), factors))


def _factorisations(width: int, count: int, least: int) -> list[tuple[int, ...]]:
    if count == 1:
        return [(width,)] if width >= least else []
    return [
        (first, *rest)
        for first in divisors(width)
        if first >= least and first**count <= width
        for rest in _factorisations(width // first, count - 1, first)
    ]


@dataclass(frozen=True)
class TensorTrainSpec:
    """An embedding (V, embedding_dim): each row, seen as a tensor of shape `dims`, is a tensor train of its own.

    Row v at (i_1, ..., i_N) is `G_1[v, :, i_1] G_2[v, :, i_2] ... G_N[v, :, i_N]`, core k being
    (ranks[k-1], dims[k], ranks[k]) with outer ranks 1 (Oseledets 2011; TensorGPT, arXiv 2307.00526).

    Args:
        num_embeddings: V. dims: their product is the width. ranks: between neighbouring cores, one fewer than dims.

    Raises:
        ShapeError: sizes below 1, unequal numbers, a rank above what its two cores can use.
    """

    structure: ClassVar[str] = "tensor_train"
    num_embeddings: int
    dims: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "dims", tuple(int(n) for n in self.dims))
        object.__setattr__(self, "ranks", tuple(int(n) for n in self.ranks))
        if len(self.dims) < 2 or len(self.ranks) != len(self.dims) - 1:
            raise ShapeError(
                f"Tensor train: dims {list(self.dims)} and ranks {list(self.ranks)}; give two dims or more, and one "
                "rank between each two of them."
            )
        if min(self.num_embeddings, *self.dims, *self.ranks) < 1:
            raise ShapeError(f"Tensor train: dims {list(self.dims)}, ranks {list(self.ranks)}: all must be at least 1.")
        for left, size, right in self.core_shapes:
            if right > left * size or left > size * right:
                raise ShapeError(
                    f"Tensor train: a core of {size} between ranks {left} and {right} cannot use them; neither may be "
                    f"more than {size} times the other."
                )

    @classmethod
    def for_ratio(cls, shape: Pair, ratio: float, cores: int = 2) -> TensorTrainSpec:
        """The spec of `cores` balanced dims with the highest ranks, kept equal as far as that goes, that hold at most
        `ratio` of the dense numbers. Raises ShapeError when even ranks of 1 hold more."""
        if not 0 < ratio <= 1:
            raise ShapeError(f"ratio {ratio} must lie in (0, 1]: the share of the embedding's numbers that is kept.")
        dims = balanced_factors(shape[1], cores)
        found = cls(shape[0], dims, (1,) * (cores - 1))
        budget = ratio * shape[0] * shape[1]
        if found.held_parameters > budget:
            raise ShapeError(
                f"Tensor trains over {list(dims)} hold at least {sum(dims)} numbers a token, "
                f"{sum(dims) / shape[1]:.3f} of {shape[1]}; ratio {ratio} is below that."
            )
        while (larger := found.raised(budget)) is not None:
            found = larger
        return found

    def raised(self, budget: float) -> TensorTrainSpec | None:
        """With one rank raised by 1, the lowest that can be within the budget; None when none can."""
        for bond in sorted(range(len(self.ranks)), key=lambda k: self.ranks[k]):
            ranks = tuple(rank + (k == bond) for k, rank in enumerate(self.ranks))
            try:
                larger = TensorTrainSpec(self.num_embeddings, self.dims, ranks)
            except ShapeError:
                continue
            if larger.held_parameters <= budget:
                return larger
        return None

    @property
    def core_shapes(self) -> list[tuple[int, int, int]]:
        """(rank before, size, rank after) of each core of a token."""
        bonds = (1, *self.ranks, 1)
        return [(bonds[k], size, bonds[k + 1]) for k, size in enumerate(self.dims)]

    @property
    def embedding_dim(self) -> int:
        return math.prod(self.dims)

    @property
    def shape(self) -> Pair:
        return (self.num_embeddings, self.embedding_dim)

    @property
    def held_parameters(self) -> int:
        """V times the sum of the core sizes."""
        return self.num_embeddings * sum(math.prod(core) for core in self.core_shapes)

    @property
    def index_count(self) -> int:
        return 0

    @property
    def expand_macs(self) -> int:
        """Multiply-accumulates to make one row from its cores, from the first core on."""
        done, total = self.dims[0], 0
        for before, size, after in self.core_shapes[1:]:
            total += done * before * size * after
            done *= size
        return total

    def check_weight(self, shape: Pair) -> None:
        """Raises ShapeError unless an embedding of `shape` (V, width) is what this spec describes."""
        if tuple(shape) != self.shape:
            raise ShapeError(
                f"Tensor train describes an embedding {self.shape} (tokens, width), but the weight is {tuple(shape)}."
            )

    def to_dict(self) -> dict[str, Any]:
        return {"num_embeddings": self.num_embeddings, "dims": list(self.dims), "ranks": list(self.ranks)}

    def label(self) -> str:
        """Short text for tables, e.g. `rows 8x8x12, ranks 3, 4`."""
        return f"rows {'x'.join(map(str, self.dims))}, ranks {', '.join(map(str, self.ranks))}"
