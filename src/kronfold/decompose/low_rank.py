"""The best low-rank approximation of a weight under a quadratic form, and its pivoted factors.

With roots H = R Rᵀ and G = S Sᵀ the weighted error of Ŵ is the plain error of Sᵀ Ŵ R against Sᵀ W R, so the truncated
SVD of the latter is the exact optimum (Eckart and Young 1936; with G = I this is the truncation-aware whitening of
SVD-LLM, arXiv 2403.07378, section 3). The singular vectors of one side come from a Gram matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import scipy.linalg
import torch
from torch import Tensor

from kronfold.base.specs import LowRankSpec
from kronfold.decompose.weighting import Weighting, check_weight, root


@dataclass
class LowRankFit:
    """`weight ≈ cat([pivots, mix @ pivots])[gather_out]`.

    Attributes:
        spec: sizes and rank. pivots: (rank, in_features), float64. mix: (out_features - rank, rank), float64.
        gather_out: (out_features,) int64.
        relative_error: as `Weighting.relative_error`, unitless; the plain Frobenius one without a weighting.
        history: one entry; there is no iteration.
    """

    spec: LowRankSpec
    pivots: Tensor
    mix: Tensor
    gather_out: Tensor
    relative_error: float
    history: list[float] = field(default_factory=list)

    def to_dense(self) -> Tensor:
        """(out_features, in_features), float64."""
        return torch.cat([self.pivots, self.mix @ self.pivots])[self.gather_out]


def nearest_low_rank(weight: Tensor, spec: LowRankSpec, weighting: Weighting | None = None) -> LowRankFit:
    """The exact minimiser of the weighted error among matrices of rank `spec.rank`.

    Args:
        weight: (out_features, in_features), any floating dtype; worked on in float64 on the CPU.
        weighting: H and G; None is the plain Frobenius norm.

    Raises:
        ShapeError, InputError: the weight does not fit the spec or is not finite; the statistics do not fit.
    """
    weight = check_weight(weight, spec).double()
    weighting = (weighting or Weighting()).checked(spec.shape)
    left, right = truncated(weight, spec.rank, weighting)
    pivots, mix, gather = pivoted(left, right)
    fit = LowRankFit(spec, pivots, mix, gather, 0.0)
    fit.relative_error = weighting.relative_error(weight, fit.to_dense())
    fit.history = [fit.relative_error]
    return fit


def truncated(weight: Tensor, rank: int, weighting: Weighting) -> tuple[Tensor, Tensor]:
    """Factors (out, rank) and (rank, in) of the optimum; `weighting` as `Weighting.checked` returns it."""
    whitened = weight
    if weighting.inputs is not None:
        right_root, right_inverse = root(weighting.inputs)
        whitened = whitened @ right_root
    if weighting.outputs is not None:
        whitened = _rooted(weighting.outputs, whitened)
    if whitened.shape[0] <= whitened.shape[1]:
        left = torch.linalg.eigh(whitened @ whitened.T).eigenvectors[:, -rank:]
        right = left.T @ whitened
    else:
        basis = torch.linalg.eigh(whitened.T @ whitened).eigenvectors[:, -rank:]
        left, right = whitened @ basis, basis.T
    if weighting.inputs is not None:
        right = right @ right_inverse
    if weighting.outputs is not None:
        left = _rooted(weighting.outputs, left, inverse=True)
    return left, right


def _rooted(outputs: Tensor, matrix: Tensor, inverse: bool = False) -> Tensor:
    """Sᵀ matrix for G = S Sᵀ, or S⁻ᵀ matrix; `outputs` is G (out, out) or its diagonal (out,), matrix (out, n)."""
    if outputs.dim() == 1:
        scale = outputs.rsqrt() if inverse else outputs.sqrt()
        return scale[:, None] * matrix
    factor, inverted = root(outputs)
    return (inverted if inverse else factor).T @ matrix


def tail_energies(weight: Tensor, weighting: Weighting) -> Tensor:
    """Weighted squared error of the optimum at every rank 0 .. min(out, in): (min + 1,) float64, falling to 0.

    The sensitivity curve of a weight: half of it is the predicted loss increase in nats when H and G are those of
    K-FAC. `weighting` as `Weighting.checked` returns it.
    """
    whitened = weight.double()
    if weighting.inputs is not None:
        whitened = whitened @ root(weighting.inputs)[0]
    if weighting.outputs is not None:
        whitened = _rooted(weighting.outputs, whitened)
    gram = whitened @ whitened.T if whitened.shape[0] <= whitened.shape[1] else whitened.T @ whitened
    energies = torch.linalg.eigvalsh(gram).clamp_min(0)  # ascending: the smallest are lost first
    return torch.cat([energies.cumsum(0).flip(0), energies.new_zeros(1)])


def pivoted(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`left @ right` by rows of its own: pivots (rank, in), mix (out - rank, rank), gather (out,).

    The rows are chosen by a QR factorisation with column pivoting of leftᵀ, which keeps `mix` small.
    """
    rank = left.shape[1]
    triangular, order = scipy.linalg.qr(left.T.numpy(), mode="r", pivoting=True)
    order = torch.from_numpy(order).long()
    # leftᵀ[:, order] = Q [R1, R2], so the other rows are (R1⁻¹ R2)ᵀ times the pivot rows.
    square, rest = triangular[:, :rank], triangular[:, rank:]
    diagonal = abs(square.diagonal())
    if diagonal.min() > 1e-12 * diagonal.max():
        mix = scipy.linalg.solve_triangular(square, rest).T
    else:  # the true rank is below the one asked for
        mix = (scipy.linalg.pinv(square) @ rest).T
    gather = torch.argsort(order)
    return left[order[:rank]] @ right, torch.from_numpy(mix.copy()), gather
