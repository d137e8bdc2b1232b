"""Permutations under a weighted error: moves proposed with the A's eliminated, kept where a refit is really better.

Starts are searches that do not know the metric, on the weight and on the weight with its rows and columns scaled by
what they are worth; scaling a column says how much it matters, but not what it can be told from, hence the moves.

**Columns.** The A's are regression coefficients: with X = W's block rows (out_a, out_b·in), the metric M = 1 ⊗ H and
the regressor matrix Φ (out_b·in, rank·in_a) made of the B's, A = X M Φ N⁻¹ with N = Φᵀ M Φ. Take two groups out
(regressors J) and put φ in their place. By the inverse of a partitioned matrix the metric left to them is F + Y C Yᵀ,
with F = M − M Φ N⁻¹ Φᵀ M, Y = M Φ N⁻¹ at J and C = (N⁻¹ at JJ)⁻¹, and the target left is D M + A_J C Yᵀ with the
residual D = X − A Φᵀ. So every rearrangement costs a few products of matrices the size of two groups.

**Rows.** For fixed B's and columns, and equal rows (no G), N = L Lᵀ does not depend on how the rows are arranged. The
objective falls by Σ_groups ‖S_g‖², S_g = Σ_slots V[slot, member], where V[s, c] is row c of W H contracted with line s
of the B's, times L⁻ᵀ: exact, as in moves.py, but with N in place of the identity.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kronfold.decompose.weighting import Weighting
from kronfold.structures.kronecker import als
from kronfold.structures.kronecker.als import Problem, a_normal, a_step, cholesky, with_orthonormal_b
from kronfold.structures.kronecker.matrix import Fit, KroneckerSpec, to_dense
from kronfold.structures.kronecker.moves import chunks, match, mutual_best
from kronfold.structures.kronecker.search import Options

ROUGH_SWEEPS = 4  # of refitting for the starts that nothing is promised about
NUMBERS = 1 << 24  # entries of the small systems solved per call; bounds its time


def weighted_search(
    weight: Tensor, spec: KroneckerSpec, weighting: Weighting, starts: list[Fit], options: Options
) -> Fit:
    """Search on from fits of `weight` under a checked weighting; never worse than `weighted_fit` of the first.

    The history starts with the weighted error of the first start and never rises.
    """
    search = WeightedSearch(weight, spec, weighting, options)
    tried = []
    for number, start in enumerate(starts):
        state, errors = search.begin(start, als.SWEEPS if number == 0 else ROUGH_SWEEPS)
        if number == 0:
            search.history += errors
        search.note(state)
        tried.append(search.step(state) if len(starts) > 1 and not search.done else state)

    state = min(tried, key=lambda state: state.error)
    for _ in range(options.max_sweeps):
        if search.done:
            break
        before = state.error
        state = search.step(state)
        if before - state.error <= options.tolerance * before:
            break

    best = search.best
    perm_out = best.rows.reshape(-1).clone() if spec.searches_out else None
    perm_in = best.cols.reshape(-1).clone() if spec.searches_in else None
    a = best.a * search.scale
    if search.is_compact:
        arranged = weight.double() if perm_in is None else weight.double()[:, perm_in]
        blank = torch.zeros(spec.rank, *spec.a, dtype=torch.float64)
        a = a_step(Problem.of(arranged, weighting.arranged(None, perm_in)), blank, best.b)
    fit = als.weighted_fit(weight, weighting, Fit(spec, a, best.b, perm_in, perm_out, best.error))
    history = [max(error, fit.relative_error) for error in search.history]
    return replace(fit, history=[*history, fit.relative_error])


@dataclass(frozen=True)
class State:
    """rows (out_a, out_b), cols (in_a, in_b), factors as in Fit, and the weighted relative error."""

    rows: Tensor
    cols: Tensor
    a: Tensor
    b: Tensor
    error: float


class WeightedSearch:
    """The problem in the order the weight came in, the random stream, the best state so far, and the history."""

    def __init__(self, weight: Tensor, spec: KroneckerSpec, weighting: Weighting, options: Options) -> None:
        self.spec, self.options = spec, options
        self.generator = torch.Generator().manual_seed(options.seed)
        self.scale = float(weight.abs().max())
        matrix = weight.double() / self.scale
        # for out_b = 1 the rows count through Wᵀ G W alone, so a tall weight may be replaced by a square root of it
        self.is_compact = spec.b[0] == 1 and spec.a[0] > spec.in_features
        if self.is_compact:
            values, vectors = torch.linalg.eigh(matrix.T @ weighting.times_outputs(matrix))
            matrix = values.clamp_min(0.0).sqrt()[:, None] * vectors.T
            weighting = replace(weighting, outputs=None)
        self.problem = Problem.of(matrix, weighting)
        self.history: list[float] = []
        self.best: State

    @property
    def done(self) -> bool:
        searched = self.spec.searches_in or self.spec.searches_out
        return not searched or self.best.error <= self.options.target_error

    def begin(self, start: Fit, sweeps: int) -> tuple[State, list[float]]:
        """A start with its factors fitted, and its errors on the way."""
        rows = torch.arange(len(self.problem.weight)) if start.perm_out is None else start.perm_out
        cols = torch.arange(self.spec.in_features) if start.perm_in is None else start.perm_in
        problem = self.problem.arranged(rows, cols)
        a, b = with_orthonormal_b(start.a / self.scale, start.b)
        if self.is_compact:
            a = a_step(problem, problem.weight.new_zeros(b.shape[0], len(rows), self.spec.a[1]), b)
        a, b, history = als.descend(problem, a, b, sweeps)
        return State(rows.view(-1, self.spec.b[0]), cols.view(self.spec.a[1], -1), a, b, history[-1]), history

    def note(self, state: State) -> None:
        """Keep the best; the history holds the best error so far."""
        if not hasattr(self, "best") or state.error < self.best.error:
            self.best = state
        self.history.append(min(self.best.error, *self.history[-1:]))

    def step(self, state: State) -> State:
        """Moves on both sides, then a sweep of refitting."""
        if self.spec.searches_in:
            problem = self.problem.arranged(state.rows.reshape(-1), state.cols.reshape(-1))
            moves = rearrangements(problem, *with_orthonormal_b(state.a, state.b), self.generator)
            while moves:  # all proposed moves, or the better half, and so on: together they may overshoot
                better = self._refit(state, state.rows, moved(state.cols, moves))
                if better is not state:
                    state = better
                    break
                moves = moves[: len(moves) // 2]
        if self.spec.searches_out:
            problem = self.problem.arranged(torch.arange(len(self.problem.weight)), state.cols.reshape(-1))
            _, b = with_orthonormal_b(state.a, state.b)
            state = self._refit(state, exchange_rows(problem, b, state.rows, self.generator), state.cols)
        state = self._refit(state, state.rows, state.cols)
        self.note(state)
        return state

    def _refit(self, state: State, rows: Tensor, cols: Tensor) -> State:
        """`state`, or the same factors refitted to this arrangement where that is better."""
        a, b, error = als.sweep(self.problem.arranged(rows.reshape(-1), cols.reshape(-1)), state.a, state.b)
        return State(rows, cols, a, b, error) if error < state.error else state


@dataclass(frozen=True)
class ColumnMove:
    """Two groups, and the order in which their 2·in_b members are put back; what that gains in squared error."""

    gain: float
    groups: tuple[int, int]
    order: tuple[int, ...]


def moved(groups: Tensor, moves: list[ColumnMove]) -> Tensor:
    """`groups` (in_a, in_b) after these moves."""
    groups = groups.clone()
    for move in moves:
        pair = torch.tensor(move.groups)
        groups[pair] = groups[pair].reshape(-1)[list(move.order)].view(2, -1)
    return groups


def rearrangements(problem: Problem, a: Tensor, b: Tensor, generator: torch.Generator) -> list[ColumnMove]:
    """Improving moves on disjoint groups of columns of the arranged `problem`, best first.

    The first is exact where the rows are worth the same; others, taken with it, influence each other.
    """
    (rank, out_b, in_b), in_a = b.shape, a.shape[2]
    gains = _ColumnGains(problem, a, b)
    per_pair = len(gains.orders) * (2 * rank) ** 2 + (2 * in_b * out_b) ** 2
    size = max(2, min(in_a, 2 * NUMBERS // (in_a * per_pair)))
    moves = []
    for part in torch.randperm(in_a, generator=generator).split(size):
        if len(part) > 1:
            moves += list(gains.best(part))
    return sorted(moves, key=lambda move: -move.gain)


class _ColumnGains:
    """The matrices of the module's docstring ("Columns") that all pairs of groups share; columns arranged in groups."""

    def __init__(self, problem: Problem, a: Tensor, b: Tensor) -> None:
        _, out_b, in_b = b.shape
        in_a = a.shape[2]
        self.b, self.moment, self.in_a = b, problem.moment, in_a
        a = a_step(problem, a, b)
        self.inverse = torch.cholesky_inverse(cholesky(a_normal(problem.moment, b)))  # N⁻¹, index (k, j)
        residual = (problem.weight - to_dense(a, b)) @ problem.moment
        outputs = problem.weighting.outputs
        if outputs is None:
            importance = torch.ones(len(problem.weight) // out_b, dtype=torch.float64)
        else:  # √ of the mean of G's diagonal over a block row; exact for out_b = 1 and a diagonal G
            diagonal = outputs if outputs.dim() == 1 else outputs.diagonal()
            importance = diagonal.view(-1, out_b).mean(1).sqrt()
        self.target = residual.view(-1, out_b, in_a, in_b) * importance[:, None, None, None]  # D M, rows weighted
        self.a = a.transpose(0, 1) * importance[:, None, None]  # (out_a, rank, in_a)
        # M Φ, split as (out_b, in, rank, in_a)
        columns = problem.moment.view(in_a * in_b, in_a, in_b)
        self.image = torch.einsum("xju,ksu->sxkj", columns, b).contiguous()

        # ways to put back the members of two groups: all of them for pairs, else every exchange of two members
        start = tuple(range(2 * in_b))
        if in_b == 2:  # not counting which of the two groups is which
            self.orders = [p for p in itertools.permutations(start) if 0 in p[:2] and p != start]
        else:
            swaps = itertools.combinations(start, 2)
            self.orders = [tuple({p: q, q: p}.get(i, i) for i in start) for p, q in swaps]

    def best(self, part: Tensor) -> Iterator[ColumnMove]:
        """The best rearrangement of pairs of groups out of `part` (m,), for pairs that choose each other."""
        rank, out_b, in_b = self.b.shape
        first, second = torch.triu_indices(len(part), len(part), offset=1)
        metric, score = self._blocks(part, first, second)

        def energy(order: tuple[int, ...]) -> Tensor:
            """tr((φᵀ metric φ)⁻¹ φᵀ score φ) of every pair, its members put back in this order."""
            phi = self.b.new_zeros(2, out_b, in_b, 2, rank)  # the regressors on these members
            for place, member in enumerate(order):
                group, slot = divmod(place, in_b)
                phi[member // in_b, :, member % in_b, group] += self.b[:, :, slot].T
            phi = phi.view(2 * out_b * in_b, 2 * rank)
            n, s = phi.T @ metric @ phi, phi.T @ score @ phi
            if rank > 1:
                return torch.linalg.solve(n, s).diagonal(dim1=1, dim2=2).sum(1)
            trace = n[:, 0, 0] * s[:, 1, 1] + n[:, 1, 1] * s[:, 0, 0] - 2 * n[:, 0, 1] * s[:, 0, 1]
            return trace / (n[:, 0, 0] * n[:, 1, 1] - n[:, 0, 1].square())

        base = energy(tuple(range(2 * in_b)))
        gains = torch.stack([energy(order) for order in self.orders]) - base
        top, which = gains.max(0)
        table = torch.full((len(part), len(part)), -torch.inf, dtype=top.dtype)
        table[first, second] = table[second, first] = top
        choice = torch.zeros_like(table, dtype=torch.long)
        choice[first, second] = which
        for ps, qs in mutual_best(table, 1e-9 * float(base.abs().max())):
            for p, q in zip(ps.tolist(), qs.tolist(), strict=True):
                groups = (int(part[p]), int(part[q]))
                yield ColumnMove(float(table[p, q]), groups, self.orders[int(choice[p, q])])

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
        metric = metric - share @ image.T  # F
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
        metric = block(metric, at, at) + block(share, at, on) @ y  # F + Y C Yᵀ
        cross = block(target.T @ a, at, on) @ y
        score = block(target.T @ target, at, at) + cross + cross.transpose(1, 2)
        return metric, score + y.transpose(1, 2) @ block(a.T @ a, on, on) @ y


def exchange_rows(problem: Problem, b: Tensor, groups: Tensor, generator: torch.Generator) -> Tensor:
    """New groups (out_a, out_b) for the rows of `problem`, whose columns are arranged and whose rows are not.

    Every group gives up the member of one random slot and all are handed back optimally, out_b times over. With
    weighted outputs a row counts by the diagonal of G: a proposal then, no longer exact.
    """
    _, k, in_b = b.shape
    product, outputs = problem.product, problem.weighting.outputs
    if outputs is not None:
        product = product * (outputs if outputs.dim() == 1 else outputs.diagonal()).sqrt()[:, None]
    factor = cholesky(a_normal(problem.moment, b)).float()
    blocks = product.float().view(len(product), -1, in_b)
    lines = [(blocks @ b[:, s].T.float()).transpose(1, 2).flatten(1) for s in range(k)]
    # V of the module's docstring ("Rows"): (out_b, out, rank·in_a)
    images = torch.stack([torch.linalg.solve_triangular(factor, line.T, upper=False).T for line in lines])

    groups = groups.clone()
    for part in chunks(groups, groups.numel(), images.shape[-1], generator):
        dealt = groups[part]
        g = len(dealt)
        total = images[torch.arange(k), dealt].sum(1)  # S, (g, rank·in_a)
        for _ in range(k):
            slots = torch.randint(k, (g,), generator=generator)
            loose = dealt.gather(1, slots[:, None])[:, 0]
            rest = total - images[slots, loose]
            gain = images.new_empty(g, g)
            for s in range(k):
                here = slots == s
                candidates = images[s, loose]
                gain[here] = 2.0 * rest[here] @ candidates.T + candidates.square().sum(1)
            taken = loose[match(gain)]
            dealt = dealt.scatter(1, slots[:, None], taken[:, None])
            total = rest + images[slots, taken]
        groups[part] = dealt
    return groups
