"""The structures there are: name -> spec, module, solver. A new structure is one nn file, one decompose file, one line.

`dense`, `fused`, `factorized_embedding` and `tied_head` are containers that specs of a whole model may name; only
entries with a `fit` can be asked for in a recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kronfold.base.registry import Registry
from kronfold.base.specs import KroneckerSpec
from kronfold.decompose.fit import Fit
from kronfold.decompose.nearest import nearest_kronecker
from kronfold.decompose.permute import permuted_kronecker
from kronfold.nn import KroneckerLinear


@dataclass(frozen=True)
class Structure:
    """Attributes:
    spec: class of its spec. module: class of its layer (`from_spec`, `from_factors`).
    fit: (weight (out, in), spec, seed) -> Fit.
    """

    spec: type[KroneckerSpec] | None = None
    module: type[KroneckerLinear] | None = None
    fit: Callable[[Tensor, KroneckerSpec, int], Fit] | None = None

    def read_spec(self, spec: Mapping[str, Any]) -> KroneckerSpec:
        """The typed spec from its dict form (keys `structure`, ...)."""
        assert self.spec is not None
        return self.spec(**{key: value for key, value in spec.items() if key != "structure"})


def fit_kronecker(weight: Tensor, spec: KroneckerSpec, seed: int) -> Fit:
    """Search permutations on the sides the spec asks for; without any, the closed-form nearest sum."""
    if spec.searches_in or spec.searches_out:
        return permuted_kronecker(weight, spec, seed=seed)
    return nearest_kronecker(weight, spec)


STRUCTURES: Registry[Structure] = Registry("structure")
STRUCTURES.register("kronecker", Structure(KroneckerSpec, KroneckerLinear, fit_kronecker))
for container in ("dense", "fused", "factorized_embedding", "tied_head"):
    STRUCTURES.register(container, Structure())
