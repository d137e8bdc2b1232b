"""Similarity grouping: groups of members that look alike, then 2-opt swaps, assignment, and swaps again."""

from __future__ import annotations

import torch
from torch import Tensor

from kronfold.decompose.permute_assignment import assign
from kronfold.decompose.permute_gains import chunks
from kronfold.decompose.permute_state import Arrangement, Search
from kronfold.decompose.permute_swaps import MEMBERS_AT_ONCE, swap


def grouped(search: Search) -> None:
    """Method "grouping": similar rows and columns together, refined by swaps and alternating assignment."""
    state = similar(search)
    state = search.descend(state, [swap])
    search.descend(state, [assign, swap])


def similar(search: Search) -> Arrangement:
    """Both searched sides grouped by similarity; the columns first, then the rows as these columns show them."""
    state = search.identity
    for side in search.sides:
        x, _, groups = search.view(state, side)
        groups = groups.clone()
        for part in chunks(groups, MEMBERS_AT_ONCE, x[0].numel(), search.generator):
            groups[part] = _greedy(x, groups[part])
        state = search.refit(state, side, groups)
    return state


def _greedy(x: Tensor, groups: Tensor) -> Tensor:
    """Largest member first: it takes the k − 1 free members that point its way most; by size into the slots."""
    g, k = groups.shape
    names = groups.reshape(-1)
    flat = x[names].flatten(1)
    size = flat.norm(dim=1)
    likeness = flat @ (flat / size.clamp_min(1e-30)[:, None]).T  # [leader, follower], cosine up to the leader's size
    order = size.argsort(descending=True, stable=True)
    place = order.argsort()
    likeness.fill_diagonal_(-torch.inf)
    free = [True] * len(names)
    result = []
    for leader in order.tolist():
        if not free[leader]:
            continue
        group = [leader, *likeness[leader].topk(k - 1).indices.tolist()]
        likeness[:, group] = -torch.inf
        for member in group:
            free[member] = False
        result.append(group)
    dealt = torch.tensor(result).view(g, k)
    return names[dealt.gather(1, place[dealt].argsort(dim=1))]
