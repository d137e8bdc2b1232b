"""What weight an earlier error calls for: least squares from the inputs a layer now gets to its old outputs.

With x the original inputs, x̃ those that the compressed layers before it produce, and W the original weight, the best
weight for x̃ solves `min E‖W x − W' x̃‖² + δ‖W' − W‖²`, so `W' = (W C + δ W)(H̃ + δ I)⁻¹` with C = E[x x̃ᵀ] and
H̃ = E[x̃ x̃ᵀ]. Fitting a structure to W' under H̃ is then the same as fitting it to the original outputs, because the
residual of the least squares is orthogonal to x̃.
"""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-2  # δ as a share of the mean of the diagonal of H̃: holds W' near W where the text says little


def corrected_weight(
    weight: Tensor, cross: Tensor, moment: Tensor, ridge: float = RIDGE, drift: Tensor | None = None
) -> Tensor:
    """W' (out, in), float64.

    Args:
        weight: W (out, in). cross: C = E[x x̃ᵀ] (in, in). moment: H̃ = E[x̃ x̃ᵀ] (in, in).
        drift: E[d x̃ᵀ] (out, in), where the output is to be W x + d.
        ridge: δ over the mean of the diagonal of H̃, above 0.

    Where H̃ is all zeros nothing is known, and W' is W.
    """
    weight, cross, moment = weight.double(), cross.double(), moment.double()
    delta = ridge * float(moment.diagonal().mean())
    if delta == 0.0:
        return weight
    system = moment + delta * torch.eye(moment.shape[0], dtype=torch.float64)
    right = weight @ cross + delta * weight
    if drift is not None:
        right = right + drift.double()
    return torch.linalg.solve(system, right.T).T
