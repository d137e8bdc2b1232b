"""The structures there are: name -> spec, module, solver. A new structure is one nn file, one decompose file, one line.

`dense`, `fused`, `factorized_embedding` and `tied_head` are containers that specs of a whole model
may name; only entries with a `fit` can be asked for in a recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kronfold.base.errors import RecipeError
from kronfold.base.registry import Registry
from kronfold.base.specs import GroupedEmbeddingSpec, KroneckerSpec, LowRankSpec, Pair
from kronfold.decompose.fit import Fit
from kronfold.decompose.grouped_embedding import grouped_embedding
from kronfold.decompose.low_rank import nearest_low_rank
from kronfold.decompose.nearest import nearest_kronecker
from kronfold.decompose.permute import permuted_kronecker
from kronfold.decompose.weighting import Weighting
from kronfold.nn import KroneckerLinear, LowRankLinear
from kronfold.nn.structured import StructuredLinear


@dataclass(frozen=True)
class Structure:
    """Attributes:
    spec: class of its spec. module: class of its layer.
    fit: (weight (out, in), spec, seed, weighting or None) -> the solver's result (`relative_error`, `to_dense`).
    ask: (shape of the weight, what a recipe entry says) -> spec. Raises RecipeError or ShapeError.
    for_embedding: it replaces an embedding, not a linear layer.
    """

    spec: Any = None
    module: type[StructuredLinear] | None = None
    fit: Callable[[Tensor, Any, int, Weighting | None], Any] | None = None
    ask: Callable[[Pair, Mapping[str, Any]], Any] | None = None
    for_embedding: bool = False

    def read_spec(self, spec: Mapping[str, Any]) -> Any:
        """The typed spec from its dict form (keys `structure`, ...)."""
        assert self.spec is not None
        return self.spec(**{key: value for key, value in spec.items() if key != "structure"})


def fit_kronecker(weight: Tensor, spec: KroneckerSpec, seed: int, weighting: Weighting | None) -> Fit:
    """Search permutations on the sides the spec asks for; without any, the nearest sum."""
    if spec.searches_in or spec.searches_out:
        return permuted_kronecker(weight, spec, seed=seed, **_given(weighting))
    return nearest_kronecker(weight, spec, **_given(weighting))


def _given(w):
    return {} if w is None else {"weighting": w}


def ask_kronecker(shape: Pair, entry: Mapping[str, Any]) -> KroneckerSpec:
    """`block` (out_b, in_b), `rank` (default 1), `permute`."""
    if entry.get("block") is None:
        raise RecipeError("structure kronecker needs a block: [out_b, in_b], e.g. [4, 2]")
    if entry.get("ratio") is not None:
        raise RecipeError("structure kronecker takes block and rank, not ratio")
    permute = entry.get("permute", "both")
    flags = {"permute_in": permute in ("in", "both"), "permute_out": permute in ("out", "both")}
    return KroneckerSpec.for_weight(shape, entry["block"], entry.get("rank") or 1, **flags)


def ask_low_rank(shape: Pair, entry: Mapping[str, Any]) -> LowRankSpec:
    """`rank`, or `ratio`: the share of the weight's numbers that is kept."""
    if entry.get("block") is not None:
        raise RecipeError("structure low_rank takes rank or ratio, not block")
    if (entry.get("rank") is None) == (entry.get("ratio") is None):
        raise RecipeError("structure low_rank needs either rank: N or ratio: R (the share of numbers kept)")
    if entry.get("rank") is not None:
        return LowRankSpec(shape[0], shape[1], entry["rank"])
    return LowRankSpec.for_ratio(shape, entry["ratio"])


def ask_grouped(shape: Pair, entry: Mapping[str, Any]) -> GroupedEmbeddingSpec:
    """One group (a plain low-rank embedding) of `rank` or `ratio`; groups by frequency come from the planner."""
    found = ask_low_rank(shape, entry)
    return GroupedEmbeddingSpec((shape[0],), (found.rank,), shape[1])


STRUCTURES: Registry[Structure] = Registry("structure")
STRUCTURES.register("kronecker", Structure(KroneckerSpec, KroneckerLinear, fit_kronecker, ask_kronecker))
STRUCTURES.register(
    "low_rank", Structure(LowRankSpec, LowRankLinear, lambda w, s, _seed, h: nearest_low_rank(w, s, h), ask_low_rank)
)
STRUCTURES.register(
    "grouped_embedding",
    Structure(
        GroupedEmbeddingSpec, None, lambda w, s, _seed, h: grouped_embedding(w, s, h), ask_grouped, for_embedding=True
    ),
)
for container in ("dense", "fused", "factorized_embedding", "tied_head"):
    STRUCTURES.register(container, Structure())
