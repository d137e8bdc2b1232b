"""Random exchange: a large neighbourhood search whose neighbourhood is a whole assignment problem.

Every group gives up the member of one slot, drawn at random, and all of these members are handed back optimally:
unlike `assign`, members change slots. For groups of two, an exact pair score also lets the pair choose its order;
repeated, this comes close to a maximum-weight matching at a fraction of its cost.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kronfold.decompose.permute_gains import chunks, energies, match, refill, sums

PAIR_ROUNDS = 2


def exchange(x: Tensor, basis: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
    """Enough rounds that every member is loose once on average (pairs: PAIR_ROUNDS); shapes in permute_gains."""
    groups = groups.clone()
    for part in chunks(groups, x.shape[0], x[0].numel(), generator):
        if groups.shape[1] == 2:
            groups[part] = _exchange_pairs(x, basis, groups[part], generator)
        else:
            groups[part] = _exchange(x, basis, groups[part], generator)
    return groups


def _exchange(x: Tensor, basis: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
    g, k = groups.shape
    total = sums(x, basis, groups)
    for _ in range(k):
        slots = torch.randint(k, (g,), generator=generator)
        groups, total = refill(x, basis, groups, slots, total)
    return groups


def _exchange_pairs(x: Tensor, basis: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
    """Groups of two: the energy of every ordered pair at once, then repeated matching between random halves."""
    names = groups.reshape(-1)
    x = x[names]
    alone = energies(x, basis)
    cross = x.flatten(1) @ (x @ (basis[1] @ basis[0].T)).flatten(1).T
    ordered = alone[:, :1] + alone[:, 1] + 2.0 * cross  # [c, d]: c in slot 0, d in slot 1
    either = torch.maximum(ordered, ordered.T)
    first, second = torch.arange(len(names)).view(-1, 2).unbind(1)
    for _ in range(PAIR_ROUNDS):
        turn = torch.rand(len(first), generator=generator) < 0.5
        stay, loose = torch.where(turn, second, first), torch.where(turn, first, second)
        loose = loose[match(either[stay][:, loose])]
        keep = ordered[stay, loose] >= ordered[loose, stay]
        first, second = torch.where(keep, stay, loose), torch.where(keep, loose, stay)
    return names[torch.stack([first, second], dim=1)]
