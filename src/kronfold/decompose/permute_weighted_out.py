"""Output features of a weighted fit: random exchange with the A's eliminated.

For fixed B's and columns, and equal rows (no G), the normal matrix N = L Lᵀ of the A's does not depend on how the
rows are arranged. The objective falls by Σ_groups ‖S_g‖², S_g = Σ_slots V[slot, member], where V[s, c] is row c of
W H contracted with line s of the B's, times L⁻ᵀ: exact, as in permute_gains, but with N in place of the identity.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kronfold.decompose.kronecker_als import Problem, a_normal, cholesky
from kronfold.decompose.permute_gains import chunks, match


def exchange_rows(problem: Problem, b: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
    """New groups (out_a, out_b) for the rows of `problem`, whose columns are arranged and whose rows are not.

    Every group gives up the member of one random slot and all are handed back optimally, out_b times over. With
    weighted outputs a row counts by the diagonal of G: a proposal then, no longer exact.
    """
    groups = groups.clone()
    images = _images(problem, b)
    for part in chunks(groups, groups.numel(), images.shape[-1], generator):
        groups[part] = _exchange(images, groups[part], generator)
    return groups


def _images(problem: Problem, b: Tensor) -> Tensor:
    """V: (out_b, out, rank·in_a), float32."""
    out_b, in_b = b.shape[1:]
    product, outputs = problem.product, problem.weighting.outputs
    if outputs is not None:
        product = product * (outputs if outputs.dim() == 1 else outputs.diagonal()).sqrt()[:, None]
    factor = cholesky(a_normal(problem.moment, b)).float()
    blocks = product.float().view(len(product), -1, in_b)
    lines = [(blocks @ b[:, s].T.float()).transpose(1, 2).flatten(1) for s in range(out_b)]
    return torch.stack([torch.linalg.solve_triangular(factor, line.T, upper=False).T for line in lines])


def _exchange(images: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
    g, k = groups.shape
    places = torch.arange(k)
    total = images[places, groups].sum(1)  # (g, rank·in_a)
    for _ in range(k):
        slots = torch.randint(k, (g,), generator=generator)
        loose = groups.gather(1, slots[:, None])[:, 0]
        rest = total - images[slots, loose]
        gain = images.new_empty(g, g)
        for s in range(k):
            here = slots == s
            candidates = images[s, loose]
            gain[here] = 2.0 * rest[here] @ candidates.T + candidates.square().sum(1)
        taken = loose[match(gain)]
        groups = groups.scatter(1, slots[:, None], taken[:, None])
        total = rest + images[slots, taken]
    return groups
