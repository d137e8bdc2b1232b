"""Specs: frozen descriptions of a structured matrix. A spec knows its sizes; it holds no numbers.

Canonical orientation everywhere: a weight is (out_features, in_features), as in `nn.Linear`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from kronfold.base.errors import ShapeError
from kronfold.structures.spec import Pair, divisors


@dataclass(frozen=True)
class KroneckerSpec:
    """`W ≈ P_outᵀ (Σ_{k=1..rank} A_k ⊗ B_k) P_in` with A_k of shape `a`, B_k of shape `b`.

    Args:
        a: (out_a, in_a), shape of each A_k.
        b: (out_b, in_b), shape of each B_k ("the block").
        rank: number of terms; at most `max_rank`.
        permute_in: look for a permutation of the input features. No effect where in_b or in_a is 1.
        permute_out: the same for the output features.

    Raises:
        ShapeError: a size below 1, or a rank above `max_rank`.
    """

    structure: ClassVar[str] = "kronecker"
    a: Pair
    b: Pair
    rank: int = 1
    permute_in: bool = True
    permute_out: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "a", (int(self.a[0]), int(self.a[1])))
        object.__setattr__(self, "b", (int(self.b[0]), int(self.b[1])))
        if min(*self.a, *self.b, self.rank) < 1:
            raise ShapeError(f"Kronecker spec a={self.a} b={self.b} rank={self.rank}: every size must be at least 1.")
        if self.rank > self.max_rank:
            raise ShapeError(
                f"Kronecker rank {self.rank} is above the maximum {self.max_rank} for a={self.a} b={self.b} "
                f"(the smaller of {self.a[0] * self.a[1]} and {self.b[0] * self.b[1]}); "
                f"use rank {self.max_rank} or less."
            )

    @classmethod
    def for_weight(cls, shape: Pair, b: Pair, rank: int = 1, **flags: bool) -> KroneckerSpec:
        """The spec with block `b` for a weight of `shape` (out, in). Raises ShapeError with the nearest blocks."""
        for side, size, block in (("out", shape[0], b[0]), ("in", shape[1], b[1])):
            if block < 1 or size % block:
                near = sorted(divisors(size), key=lambda d: (abs(d - block), d))[:4]
                raise ShapeError(
                    f"Block size {block} does not divide the {side}_features {size} of a weight {tuple(shape)}; "
                    f"nearest allowed: {', '.join(map(str, sorted(near)))}."
                )
        return cls(a=(shape[0] // b[0], shape[1] // b[1]), b=b, rank=rank, **flags)

    @property
    def out_features(self) -> int:
        return self.a[0] * self.b[0]

    @property
    def in_features(self) -> int:
        return self.a[1] * self.b[1]

    @property
    def shape(self) -> Pair:
        return (self.out_features, self.in_features)

    @property
    def max_rank(self) -> int:
        """Rank at which every matrix is represented exactly: min(out_a·in_a, out_b·in_b)."""
        return min(self.a[0] * self.a[1], self.b[0] * self.b[1])

    @property
    def held_parameters(self) -> int:
        """Numbers in all A_k and B_k; permutations are integers and counted beside this, in `index_count`."""
        return self.rank * (self.a[0] * self.a[1] + self.b[0] * self.b[1])

    @property
    def searches_in(self) -> bool:
        """An input permutation is wanted and can change something (both in_a and in_b exceed 1)."""
        return self.permute_in and self.a[1] > 1 and self.b[1] > 1

    @property
    def searches_out(self) -> bool:
        return self.permute_out and self.a[0] > 1 and self.b[0] > 1

    @property
    def index_count(self) -> int:
        """Stored permutation entries (int32 each)."""
        return self.searches_in * self.in_features + self.searches_out * self.out_features

    def check_weight(self, shape: Pair) -> None:
        """Raises ShapeError unless a weight of `shape` (out, in) is exactly what this spec factors."""
        if tuple(shape) == self.shape:
            return
        message = (
            f"Spec a={self.a} b={self.b} describes a weight {self.shape}, but the weight is {tuple(shape)} "
            "(out_features, in_features)."
        )
        try:
            fixed = KroneckerSpec.for_weight((shape[0], shape[1]), self.b, 1)
            message += f" With b={self.b} use a={fixed.a}."
        except ShapeError as error:
            message += f" {error}"
        raise ShapeError(message)

    def to_dict(self) -> dict[str, Any]:
        d = asdict(self)
        return {
            "a": list(d["a"]),
            "b": list(d["b"]),
            **{k: d[k] for k in ("rank", "permute_in", "permute_out")},
        }

    def label(self) -> str:
        """Short text for tables, e.g. `4 x (192, 384)⊗(4, 2)`."""
        return f"{self.rank} x {self.a}⊗{self.b}"
