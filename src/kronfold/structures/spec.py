"""What every spec answers: a frozen description of a structured matrix that knows its sizes and holds no numbers.

Canonical orientation everywhere: a weight is (out_features, in_features), as in `nn.Linear`; an embedding is
(vocabulary, width). No torch here.
"""

from __future__ import annotations

from typing import Any, ClassVar, Protocol

Pair = tuple[int, int]


class Spec(Protocol):
    """Attributes:
    structure: the name in recipes, plans and checkpoints. shape: of the weight it describes.
    held_parameters: numbers held. index_count: integers held beside them (int32 each), such as permutations.
    """

    structure: ClassVar[str]

    @property
    def shape(self) -> Pair: ...

    @property
    def held_parameters(self) -> int: ...

    @property
    def index_count(self) -> int: ...

    def check_weight(self, shape: Pair) -> None:
        """Raises ShapeError unless a weight of `shape` is what this spec describes."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data from which `Structure.read_spec` makes the spec again; without `structure`."""
        ...

    def label(self) -> str:
        """Short text for tables."""
        ...


def divisors(n: int) -> list[int]:
    """All positive divisors of `n`, ascending."""
    small = [d for d in range(1, int(n**0.5) + 1) if n % d == 0]
    return sorted({*small, *(n // d for d in small)})
