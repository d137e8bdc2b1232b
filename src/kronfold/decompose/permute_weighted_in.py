"""Input features of a weighted fit: exact gains of rearranging two groups, all A's refitted.

The A's are regression coefficients: with X = W's block rows (out_a, out_b·in), the metric M = 1 ⊗ H and the regressor
matrix Φ (out_b·in, rank·in_a) made of the B's, A = X M Φ N⁻¹ with N = Φᵀ M Φ. Take two groups out (regressors J) and
put φ in their place. By the inverse of a partitioned matrix the metric left to them is F + Y C Yᵀ, with
F = M − M Φ N⁻¹ Φᵀ M, Y = M Φ N⁻¹ at J and C = (N⁻¹ at JJ)⁻¹, and the target left is D M + A_J C Yᵀ with the residual
D = X − A Φᵀ. So every rearrangement costs a few products of matrices the size of two groups.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kronfold.decompose.kronecker_als import Problem, a_normal, a_step, cholesky
from kronfold.ops import kronecker

NUMBERS = 1 << 24  # entries of the small systems solved per call; bounds its time
ROUNDS = 4  # mutual-best rounds


@dataclass(frozen=True)
class Move:
    """Two groups, and the order in which their 2·in_b members are put back; what that gains in squared error."""

    gain: float
    groups: tuple[int, int]
    order: tuple[int, ...]


def orders(in_b: int) -> list[tuple[int, ...]]:
    """Ways to put back the members of two groups: all of them for pairs, else every exchange of two members."""
    if in_b == 2:  # not counting which of the two groups is which
        return [p for p in itertools.permutations(range(4)) if 0 in p[:2] and p != (0, 1, 2, 3)]
    swaps = []
    for p, q in itertools.combinations(range(2 * in_b), 2):
        order = list(range(2 * in_b))
        order[p], order[q] = q, p
        swaps.append(tuple(order))
    return swaps


def rearrangements(problem: Problem, a: Tensor, b: Tensor, generator: torch.Generator) -> list[Move]:
    """Improving moves on disjoint groups of columns of the arranged `problem`, best first.

    The first is exact where the rows are worth the same; others, taken with it, influence each other.
    """
    frame = _Frame(problem, a, b)
    in_a, in_b = a.shape[2], b.shape[2]
    per_pair = len(orders(in_b)) * (2 * b.shape[0]) ** 2 + (2 * in_b * b.shape[1]) ** 2
    size = max(2, min(in_a, 2 * NUMBERS // (in_a * per_pair)))
    moves = []
    for part in torch.randperm(in_a, generator=generator).split(size):
        if len(part) > 1:
            moves += list(frame.best(part))
    return sorted(moves, key=lambda move: -move.gain)


def moved(groups: Tensor, moves: list[Move]) -> Tensor:
    """`groups` (in_a, in_b) after these moves."""
    groups = groups.clone()
    for move in moves:
        pair = torch.tensor(move.groups)
        groups[pair] = groups[pair].reshape(-1)[list(move.order)].view(2, -1)
    return groups


class _Frame:
    """The matrices of the module's docstring that all pairs of groups share; columns arranged in groups."""

    def __init__(self, problem: Problem, a: Tensor, b: Tensor) -> None:
        _, out_b, in_b = b.shape
        in_a = a.shape[2]
        self.b, self.moment, self.in_a = b, problem.moment, in_a
        a = a_step(problem, a, b)
        self.inverse = torch.cholesky_inverse(cholesky(a_normal(problem.moment, b)))  # N⁻¹, index (k, j)
        residual = (problem.weight - kronecker.to_dense(a, b)) @ problem.moment
        self.importance = _row_importance(problem, out_b)
        self.target = residual.view(-1, out_b, in_a, in_b) * self.importance[:, None, None, None]  # D M, rows weighted
        self.a = a.transpose(0, 1) * self.importance[:, None, None]  # (out_a, rank, in_a)
        # M Φ, split as (out_b, in, rank, in_a)
        columns = problem.moment.view(in_a * in_b, in_a, in_b)
        self.image = torch.einsum("xju,ksu->sxkj", columns, b).contiguous()

    def best(self, part: Tensor) -> Iterator[Move]:
        """The best rearrangement of pairs of groups out of `part` (m,), for pairs that choose each other."""
        in_b = self.b.shape[2]
        first, second = torch.triu_indices(len(part), len(part), offset=1)
        metric, score = self._blocks(part, first, second)
        base = _energy(metric, score, self._regressors(tuple(range(2 * in_b))))
        choices = orders(in_b)
        gains = torch.stack([_energy(metric, score, self._regressors(order)) for order in choices]) - base
        top, which = gains.max(0)
        floor = 1e-9 * float(base.abs().max())
        table = torch.full((len(part), len(part)), -torch.inf, dtype=top.dtype)
        table[first, second] = table[second, first] = top
        choice = torch.zeros_like(table, dtype=torch.long)
        choice[first, second] = which
        for p, q in _mutual(table, floor):
            groups = (int(part[p]), int(part[q]))
            yield Move(float(table[p, q]), groups, choices[int(choice[p, q])])

    def _blocks(self, part: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """For every pair: the metric left to it, and the Gram matrix of the target left, on its members.

        Both (pairs, w, w) with w = 2·out_b·in_b, index (group, out slot, in slot).
        """
        rank, out_b, in_b = self.b.shape
        m, w = len(part), out_b * in_b
        members = (part[:, None] * in_b + torch.arange(in_b)).reshape(-1)
        terms = (torch.arange(rank) * self.in_a + part[:, None]).reshape(-1)  # index (group, k) -> (k, j)
        image = self.image[:, members].view(out_b, m, in_b, -1).transpose(0, 1).reshape(m * w, -1)
        own = torch.block_diag(*[torch.eye(1, dtype=image.dtype)] * out_b)
        metric = self.moment[members][:, members].view(m, in_b, m, in_b)
        metric = torch.einsum("sv,gthu->gsthvu", own, metric).reshape(m * w, m * w)
        share = image @ self.inverse
        metric = metric - share @ image.T
        share = share[:, terms]  # Y
        target = self.target[:, :, part].transpose(1, 2).reshape(-1, m * w)
        a = self.a[:, :, part].transpose(1, 2).reshape(len(target), -1)
        both = torch.stack([first, second], dim=1)
        at = (both[:, :, None] * w + torch.arange(w)).flatten(1)
        on = (both[:, :, None] * rank + torch.arange(rank)).flatten(1)

        def block(matrix: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
            return matrix[rows[:, :, None], cols[:, None, :]]

        inverse = self.inverse[terms][:, terms]
        y = torch.linalg.solve(block(inverse, on, on), block(share, at, on).transpose(1, 2))  # C Yᵀ
        metric = block(metric, at, at) + block(share, at, on) @ y
        cross = block(target.T @ a, at, on) @ y
        score = block(target.T @ target, at, at) + cross + cross.transpose(1, 2)
        return metric, score + y.transpose(1, 2) @ block(a.T @ a, on, on) @ y

    def _regressors(self, order: tuple[int, ...]) -> Tensor:
        """φ (w, 2·rank) on the members of two groups, put back in this order."""
        rank, out_b, in_b = self.b.shape
        phi = self.b.new_zeros(2, out_b, in_b, 2, rank)
        for place, member in enumerate(order):
            group, slot = divmod(place, in_b)
            phi[member // in_b, :, member % in_b, group] += self.b[:, :, slot].T
        return phi.view(2 * out_b * in_b, 2 * rank)


def _row_importance(problem: Problem, out_b: int) -> Tensor:
    """√ of the mean of G's diagonal over a block row: (out_a,). Exact for out_b = 1 and a diagonal G."""
    outputs = problem.weighting.outputs
    if outputs is None:
        return torch.ones(len(problem.weight) // out_b, dtype=torch.float64)
    diagonal = outputs if outputs.dim() == 1 else outputs.diagonal()
    return diagonal.view(-1, out_b).mean(1).sqrt()


def _energy(metric: Tensor, score: Tensor, phi: Tensor) -> Tensor:
    """tr((φᵀ metric φ)⁻¹ φᵀ score φ) of every pair."""
    normal, right = phi.T @ metric @ phi, phi.T @ score @ phi
    if normal.shape[-1] == 2:
        cofactor = (
            normal[:, 0, 0] * right[:, 1, 1] + normal[:, 1, 1] * right[:, 0, 0] - 2 * normal[:, 0, 1] * right[:, 0, 1]
        )
        return cofactor / (normal[:, 0, 0] * normal[:, 1, 1] - normal[:, 0, 1].square())
    return torch.linalg.solve(normal, right).diagonal(dim1=1, dim2=2).sum(1)


def _mutual(table: Tensor, floor: float) -> Iterator[tuple[int, int]]:
    """Pairs (p < q) with the best gain for both, a few rounds over; a member is used once."""
    index = torch.arange(len(table))
    table = table.clone()
    for _ in range(ROUNDS):
        top, partner = table.max(1)
        chosen = (partner[partner] == index) & (index < partner) & (top > floor)
        if not chosen.any():
            return
        p, q = index[chosen], partner[chosen]
        yield from zip(p.tolist(), q.tolist(), strict=True)
        used = torch.cat([p, q])
        table[used] = -torch.inf
        table[:, used] = -torch.inf
