"""What an error in a weight costs: the quadratic form every data-aware solver minimises.

For a linear layer y = W x the expected squared error of the outputs is `tr((W − Ŵ) H (W − Ŵ)ᵀ)` with the second moment
H = E[x xᵀ]. With the second moment G = E[g gᵀ] of the loss gradient at the outputs it becomes
`tr(G (W − Ŵ) H (W − Ŵ)ᵀ)`: twice the second-order increase of the loss where G and H are independent (K-FAC; Martens
and Grosse 2015, arXiv 1503.05671, equation 23).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kronfold.base.errors import InputError, ShapeError

DAMPING = 1e-4  # of the mean of the diagonal; keeps directions the calibration text never showed from being free


@dataclass(frozen=True)
class Weighting:
    """Attributes:
    inputs: H (in_features, in_features), positive semidefinite; None stands for the identity.
    outputs: G (out_features, out_features), positive semidefinite; or its diagonal alone, (out_features,), as for an
        embedding, whose rows are worth as much as their tokens are frequent; None stands for the identity.
    damping: what is added to the diagonal of either, as a share of its mean.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None
    damping: float = DAMPING

    def checked(self, shape: tuple[int, int]) -> Weighting:
        """The same in float64 on the CPU, symmetric and damped, once it is known to fit a weight of `shape` (out, in).

        Raises ShapeError: another size. InputError: NaN, infinities, a negative diagonal, or only zeros.
        """
        return replace(
            self,
            inputs=_damped(self.inputs, shape[1], "input", self.damping),
            outputs=_damped(self.outputs, shape[0], "output", self.damping),
            damping=0.0,
        )

    def squared_error(self, residual: Tensor) -> float:
        """`tr(G D H Dᵀ)` of a residual D (out_features, in_features), float64."""
        right = residual if self.inputs is None else residual @ self.inputs
        return max(0.0, float((self.times_outputs(residual) * right).sum()))

    def times_outputs(self, matrix: Tensor) -> Tensor:
        """G matrix, for a matrix (out_features, n)."""
        if self.outputs is None:
            return matrix
        return self.outputs[:, None] * matrix if self.outputs.dim() == 1 else self.outputs @ matrix

    def arranged(self, perm_out: Tensor | None, perm_in: Tensor | None) -> Weighting:
        """The weighting of `weight[perm_out][:, perm_in]`; None leaves a side in its order."""
        inputs, outputs = self.inputs, self.outputs
        if inputs is not None and perm_in is not None:
            inputs = inputs[perm_in][:, perm_in]
        if outputs is not None and perm_out is not None:
            outputs = outputs[perm_out]
            outputs = outputs if outputs.dim() == 1 else outputs[:, perm_out]
        return replace(self, inputs=inputs, outputs=outputs)

    def relative_error(self, weight: Tensor, approximation: Tensor) -> float:
        """`sqrt(tr(G D H Dᵀ) / tr(G W H Wᵀ))` with D = W − Ŵ, unitless. 0 where the weight itself costs nothing."""
        total = self.squared_error(weight)
        return (self.squared_error(weight - approximation) / total) ** 0.5 if total else 0.0


def check_weight(weight: Tensor, spec: Any) -> Tensor:
    """`weight` detached on the CPU in its own dtype, once it is known to fit `spec`, a typed spec of any structure.

    Raises ShapeError: not a matrix of the spec's shape. InputError: not floating point, NaN or infinities, only zeros.
    """
    if weight.dim() != 2:
        raise ShapeError(
            f"A weight must be a matrix (out_features, in_features); got shape {tuple(weight.shape)}. "
            "Pass one layer at a time, or nearest_kronecker_batch for a stack."
        )
    spec.check_weight((weight.shape[0], weight.shape[1]))
    if not weight.is_floating_point():
        raise InputError(
            f"A weight must hold floating-point numbers; got {weight.dtype}. Dequantise it or call .float() first."
        )
    if not torch.isfinite(weight).all():
        bad = int((~torch.isfinite(weight)).sum())
        raise InputError(
            f"The weight {tuple(weight.shape)} holds {bad} values that are NaN or infinite; only finite numbers can "
            "be decomposed. Check the checkpoint, or a cast to float16 that overflowed."
        )
    if not weight.any():
        raise InputError(
            f"The weight {tuple(weight.shape)} is all zeros: its relative error is undefined. "
            "Leave this layer out of the plan."
        )
    return weight.detach().cpu()


def covariance(second: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """E[(x − E x)(y − E y)ᵀ] from `second` = E[x yᵀ], `left` = E[x] and `right` = E[y]; float64.

    Where x and y are the same and hardly vary, rounding must not leave a negative variance.
    """
    centred = second.double() - torch.outer(left.double(), right.double())
    if left is right:
        centred.diagonal().clamp_min_(0)
    return centred


def _damped(moment: Tensor | None, size: int, side: str, damping: float) -> Tensor | None:
    if moment is None:
        return None
    is_vector = side == "output" and moment.dim() == 1
    if tuple(moment.shape) != ((size,) if is_vector else (size, size)):
        raise ShapeError(
            f"The {side} second moment is {tuple(moment.shape)}, but this weight has {size} {side} features. "
            "Were the statistics taken on another model or another site?"
        )
    moment = moment.detach().to("cpu", torch.float64)
    diagonal = moment if is_vector else moment.diagonal()
    if not torch.isfinite(moment).all() or bool((diagonal < 0).any()):
        raise InputError(
            f"The {side} second moment {tuple(moment.shape)} holds NaN, infinite or negative entries on its diagonal. "
            "Calibrate again in float32; a model that overflows on the calibration text cannot be fitted to it."
        )
    mean = float(diagonal.mean())
    if mean == 0.0:
        raise InputError(
            f"The {side} second moment {tuple(moment.shape)} is all zeros: the calibration text never used this "
            "weight. Leave the site out, or calibrate on other text."
        )
    if is_vector:
        return moment + damping * mean
    return (moment + moment.T) / 2 + damping * mean * torch.eye(size, dtype=torch.float64)


def root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """R and R⁻¹ with R Rᵀ = moment (n, n), float64. By Cholesky; by eigenvectors where that fails (rank deficient).

    The inverse is then the pseudo-inverse on the directions above 1e-12 of the largest.
    """
    factor, failed = torch.linalg.cholesky_ex(moment)
    pivots = factor.diagonal()
    # Rounding lets many a singular matrix through, with a last pivot of 1e-8 that would rule the inverse.
    if not int(failed) and pivots.min() > 1e-6 * pivots.max():
        identity = torch.eye(moment.shape[0], dtype=moment.dtype)
        return factor, torch.linalg.solve_triangular(factor, identity, upper=False)
    values, vectors = torch.linalg.eigh(moment)
    alive = values > 1e-12 * values[-1]
    sizes = torch.where(alive, values.clamp_min(0).sqrt(), 0.0)
    inverse = torch.where(alive, 1 / sizes.clamp_min(1e-300), 0.0)
    return vectors * sizes, (vectors * inverse).T
