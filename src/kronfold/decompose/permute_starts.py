"""Where the default search starts: the identity, members dealt by size or likeness, and smaller nested families."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kronfold.base.specs import KroneckerSpec, divisors
from kronfold.decompose.permute_state import Arrangement, Search

TINY = 1 << 8  # numbers in the weight, up to which a search restarts from random arrangements
TINY_RESTARTS = 6
SMALL = 1 << 15  # numbers in the weight times rank, up to which every nested family is searched


def by_size(search: Search) -> Arrangement:
    """The largest members in slot 0 of their groups, the next in slot 1, and so on: slots then differ most."""
    matrix = search.matrix
    rows, cols = search.identity.rows, search.identity.cols
    if "out" in search.sides:
        rows = dealt(matrix.square().sum(1), rows.shape[1])
    if "in" in search.sides:
        cols = dealt(matrix.square().sum(0), cols.shape[1])
    return search.fit(rows, cols)


def shuffled(search: Search) -> Arrangement:
    """A random arrangement of the searched sides."""
    rows, cols = search.identity.rows, search.identity.cols
    if "out" in search.sides:
        rows = torch.randperm(rows.numel(), generator=search.generator).view_as(rows)
    if "in" in search.sides:
        cols = torch.randperm(cols.numel(), generator=search.generator).view_as(cols)
    return search.fit(rows, cols)


def dealt(size: Tensor, slots: int) -> Tensor:
    """Indices by falling size, dealt slot by slot: (len(size) / slots, slots)."""
    return size.argsort(descending=True, stable=True).view(slots, -1).T.contiguous()


def restarts(search: Search) -> list[Arrangement]:
    """Random arrangements, for weights so small that a local optimum is likely and a restart costs nothing."""
    if search.source.numel() > TINY:
        return []
    return [shuffled(search) for _ in range(TINY_RESTARTS)]


def is_small(spec: KroneckerSpec) -> bool:
    """Searching every start and every nested family takes no noticeable time."""
    return spec.out_features * spec.in_features * spec.rank <= SMALL


def nested_specs(spec: KroneckerSpec) -> list[KroneckerSpec]:
    """Families contained in `spec`: what they represent, `spec` represents with the same permutations.

    Σ A_k ⊗ B_k with block (out_b / p, in_b) and rank r is a sum with block (out_b, in_b) and rank p·r (B becomes
    e_s ⊗ B_k for each of the p shares s, and A its rows of share s); the same holds for the in side, and fewer
    terms are a special case. Small weights descend to every such family one prime step at a time; large ones go
    straight to the one-sided families, which are cheap.
    """
    (out_b, in_b), rank = spec.b, spec.rank
    small = is_small(spec)
    found: list[tuple[int, int, int]] = []
    if small and rank > 1:
        found.append((out_b, in_b, rank - 1))
    stepwise = small or out_b == 1 or in_b == 1
    if out_b > 1:
        step = divisors(out_b)[1] if stepwise else out_b
        found.append((out_b // step, in_b, rank // step))
    if in_b > 1:
        step = divisors(in_b)[1] if stepwise else in_b
        found.append((out_b, in_b // step, rank // step))
    shape = spec.shape
    return [
        replace(spec, a=(shape[0] // p, shape[1] // q), b=(p, q), rank=r)
        for p, q, r in found
        if r >= 1 and (p, q) != (1, 1)
    ]


def widened(search: Search, family: KroneckerSpec, found: Arrangement) -> Arrangement:
    """What was found for a nested family, its groups joined to the larger groups of `search`.

    Any joining keeps the family's error, so the groups are dealt by size, where the larger family gains most.
    """
    rows, cols = search.identity.rows, search.identity.cols
    energy = search.source.square()
    if "out" in search.sides:
        rows = _joined(found.rows if family.b[0] > 1 else None, energy.sum(1), rows.shape[1])
    if "in" in search.sides:
        cols = _joined(found.cols if family.b[1] > 1 else None, energy.sum(0), cols.shape[1])
    return search.fit(rows, cols)


def _joined(groups: Tensor | None, size: Tensor, slots: int) -> Tensor:
    """Groups of a child (None: single members) dealt by size to groups of `slots` members."""
    if groups is None:
        groups = torch.arange(len(size)).view(-1, 1)
    share = slots // groups.shape[1]
    if share == 1:
        return groups
    return groups[dealt(size[groups].sum(1), share)].reshape(-1, slots)
