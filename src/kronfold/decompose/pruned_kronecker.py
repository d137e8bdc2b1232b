"""Kronecker factors that keep some of a weight's own entries and drop the others: Krony-PT's pruning start.

Krony-PT (arXiv 2412.12351) halves a feed-forward weight "deterministically (either pick even or odd rows)" and finds
that start better for training than the nearest product at 95M parameters. As a Kronecker product: with B = (1, 0) the
product A ⊗ B has the entries of A in the even columns and zeros in the odd ones, so A is those columns of the weight.
For other blocks and ranks we read it as: term k keeps position k of every block (row by row), B_k being 1 there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kronfold.base.specs import KroneckerSpec
from kronfold.decompose.fit import Fit
from kronfold.structures.weighting import Weighting, check_weight


def pruned_kronecker(weight: Tensor, spec: KroneckerSpec, weighting: Weighting | None = None) -> Fit:
    """Factors whose sum is `weight` at the first `rank` positions of every block, and 0 at the others.

    Args:
        weight: (out_features, in_features), any floating dtype; worked on in float64 on the CPU.
        spec: shapes and rank; of block (1, 2) the even columns are kept, of (2, 1) the even rows.
        weighting: only for the error that is reported; the choice does not depend on data.

    Raises:
        ShapeError, InputError: as `nearest_kronecker`.
    """
    weight = check_weight(weight, spec).double()
    positions = spec.b[0] * spec.b[1]  # at least the rank, the spec saw to that
    a = torch.stack([weight[k // spec.b[1] :: spec.b[0], k % spec.b[1] :: spec.b[1]] for k in range(spec.rank)])
    b = torch.eye(positions, dtype=torch.float64)[: spec.rank].reshape(spec.rank, *spec.b)
    fit = Fit(spec=spec, a=a.contiguous(), b=b, perm_in=None, perm_out=None, relative_error=0.0)
    fit.relative_error = (weighting or Weighting()).checked(spec.shape).relative_error(weight, fit.to_dense())
    fit.history = [fit.relative_error]
    return fit
