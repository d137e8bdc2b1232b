"""Alternating assignment: slot by slot, all groups hand out their members of that slot again, optimally.

With the other slots fixed this is a linear assignment problem, the present arrangement is feasible, and so the
captured energy cannot fall (for the basis at hand; refitting the basis cannot lose either).
"""

from __future__ import annotations

import torch
from torch import Tensor

from kronfold.decompose.permute_gains import chunks, refill, sums
from kronfold.decompose.permute_state import Search


def assign(x: Tensor, basis: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
    """One pass over the slots; shapes in permute_gains."""
    groups = groups.clone()
    for part in chunks(groups, x.shape[0], x[0].numel(), generator):
        dealt = groups[part]
        total = sums(x, basis, dealt)
        for slot in range(groups.shape[1]):
            dealt, total = refill(x, basis, dealt, torch.full((len(part),), slot), total)
        groups[part] = dealt
    return groups


def from_identity(search: Search) -> None:
    """Method "assignment": alternate the sides from the order the weight came in."""
    search.descend(search.identity, [assign])
