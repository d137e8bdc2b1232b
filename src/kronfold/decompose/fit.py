"""What a Kronecker solver returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kronfold.base.specs import KroneckerSpec
from kronfold.ops import kronecker


@dataclass
class Fit:
    """Factors of `weight ≈ P_outᵀ (Σ_k A_k ⊗ B_k) P_in`, i.e. `weight[perm_out][:, perm_in] ≈ Σ_k A_k ⊗ B_k`.

    Attributes:
        spec: the shapes that were asked for.
        a: (rank, out_a, in_a), float64. b: (rank, out_b, in_b), float64. Each pair A_k, B_k has equal norms.
        perm_in: (in_features,) int64, or None where the input side was not permuted.
        perm_out: (out_features,) int64, or None.
        relative_error: ‖W − Ŵ‖ / ‖W‖, Frobenius (weighted, if a weighting was given), unitless, exact.
        history: relative errors as the search went on, never rising; the last is `relative_error`.
    """

    spec: KroneckerSpec
    a: Tensor
    b: Tensor
    perm_in: Tensor | None
    perm_out: Tensor | None
    relative_error: float
    history: list[float] = field(default_factory=list)

    def to_dense(self) -> Tensor:
        """The approximation in the source's own order: (out_features, in_features), float64."""
        dense = kronecker.to_dense(self.a, self.b)
        if self.perm_out is not None:
            dense = dense[torch.argsort(self.perm_out)]
        if self.perm_in is not None:
            dense = dense[:, torch.argsort(self.perm_in)]
        return dense
