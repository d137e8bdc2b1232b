"""The nearest Kronecker sum with factors whose entries are of one size, a start for training (Krony-PT).

Krony-PT (arXiv 2412.12351) starts from a "modified Van Loan decomposition", in its summary an "adaptive normalization"
of the factors. How it normalises was not to be had when this was written; what follows is inferred: the product stays
the nearest one, and its scale is shared out so that A_k and B_k have entries of equal root mean square. An optimiser
with steps of one size for all entries (Adam) then changes both factors at one relative pace; with equal norms, as
`nearest_kronecker` gives them, the few entries of B_k are hundreds of times larger than those of A_k.
"""

from __future__ import annotations

from dataclasses import replace

from kronfold.decompose.fit import Fit


def with_equal_entries(fit: Fit) -> Fit:
    """The same approximation (`to_dense` unchanged) with rms(A_k) = rms(B_k) for every term k; zero terms stay zero."""
    rms_a = fit.a.square().mean(dim=(1, 2), keepdim=True).sqrt()
    rms_b = fit.b.square().mean(dim=(1, 2), keepdim=True).sqrt()
    scale = (rms_b / rms_a).sqrt().nan_to_num(nan=1.0, posinf=1.0).clamp_min(1e-150)
    return replace(fit, a=fit.a * scale, b=fit.b / scale)
