"""Vectorised 2-opt: the gain of swapping any two members from one matrix product, many swaps per sweep.

Swaps that touch different groups do not see each other, so their gains add up exactly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kronfold.decompose.permute_gains import chunks, energies, sums

MEMBERS_AT_ONCE = 1024  # the score matrix is at most this square
ROUNDS = 4  # mutual-best rounds per score matrix


def swap(x: Tensor, basis: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
    """One sweep of improving swaps in disjoint groups; shapes in permute_gains."""
    groups = groups.clone()
    for part in chunks(groups, MEMBERS_AT_ONCE, x[0].numel(), generator):
        groups[part] = _swap(x, basis, groups[part])
    return groups


def _swap(x: Tensor, basis: Tensor, groups: Tensor) -> Tensor:
    g, k = groups.shape
    worth = _worth(x, basis, groups)  # [place, member], both in the order of groups.reshape(-1)
    own = worth.diagonal()
    gain = (worth - own[:, None]) + (worth - own[:, None]).T  # members at places p and q change places
    tables = gain.view(g, k, g, k).permute(0, 2, 1, 3).reshape(g, g, k * k)
    best, which = tables.max(dim=2)
    best.fill_diagonal_(-torch.inf)  # two slots of one group: the gains above do not hold
    groups = groups.clone()
    noise = 1e-6 * float(own.abs().max())
    for _ in range(ROUNDS):
        top, partner = best.max(dim=1)
        index = torch.arange(g)
        chosen = (partner[partner] == index) & (index < partner) & (top > noise)
        if not chosen.any():
            break
        p, q = index[chosen], partner[chosen]
        slot_p, slot_q = which[p, q] // k, which[p, q] % k
        groups[p, slot_p], groups[q, slot_q] = groups[q, slot_q], groups[p, slot_p]
        used = torch.cat([p, q])
        best[used] = -torch.inf
        best[:, used] = -torch.inf
    return groups


def _worth(x: Tensor, basis: Tensor, groups: Tensor) -> Tensor:
    """[p, q]: what the member now at place q would bring at place p."""
    total = sums(x, basis, groups)
    flat = x[groups.reshape(-1)].flatten(1)
    worth = flat.new_empty(*groups.shape, len(flat))
    alone = energies(x[groups.reshape(-1)], basis)
    for t in range(groups.shape[1]):
        rest = total - x[groups[:, t]] @ basis[t]
        worth[:, t] = alone[:, t] + 2.0 * (rest @ basis[t].T).flatten(1) @ flat.T
    return worth.flatten(0, 1)
