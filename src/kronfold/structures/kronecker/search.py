"""The search for permutations: alternate between the best factors for an arrangement and better arrangements for them.

Rows are dealt into out_a groups of out_b slots, columns into in_a groups of in_b slots. For a fixed arrangement the
best factors span a subspace of the blocks ("basis", out_b·in_b by rank; Van Loan and Pitsianis 1993); for a fixed
basis, a side's arrangement is a grouping problem, which the moves of moves.py improve. Neither step can lose.

TQCompressor (arXiv 2401.16367, section 3) asks for the permutations but does not publish its search; the methods here
are compared in benchmarks/permutation_search.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kronfold.base.specs import divisors
from kronfold.structures.kronecker.matrix import KroneckerSpec
from kronfold.structures.kronecker.moves import LARGE, alike, assign, exchange, swap
from kronfold.structures.kronecker.van_loan import right_basis

PATIENT = 1 << 14  # numbers in a matrix, up to which a search ends only after three idle sweeps
TINY = 1 << 8  # numbers in the weight, up to which a search restarts from random arrangements
TINY_RESTARTS = 6
SMALL = 1 << 15  # numbers in the weight times rank, up to which every nested family is searched

Side = Literal["in", "out"]
Move = Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]  # (x, basis, groups, generator) -> new groups


@dataclass(frozen=True)
class Options:
    """How long to look: stop a start when a sweep gains less than `tolerance` of the error, or at `target_error`."""

    seed: int
    tolerance: float
    target_error: float
    max_sweeps: int


@dataclass(frozen=True)
class Arrangement:
    """rows (out_a, out_b) and cols (in_a, in_b) int64; basis (out_b, in_b, rank) float64; its relative error."""

    rows: Tensor
    cols: Tensor
    basis: Tensor
    error: float


class Search:
    """One search: the matrix at norm 1, the random stream, the best arrangement so far, and the history.

    Attributes:
        asked: the spec given. source: the weight (out, in) at norm 1, float64.
        matrix, spec: their compact equivalents (see `_compact`). sides: those whose permutation is searched.
        identity: the order the weight came in. history: the best error so far, after every sweep; it never rises.
    """

    def __init__(self, weight: Tensor, asked: KroneckerSpec, options: Options) -> None:
        largest = torch.linalg.vector_norm(weight, torch.inf).double()
        # one float64 copy, changed in place; squares of very small or large weights stay finite
        self.source = weight.to(torch.float64, copy=True).div_(largest)
        self.source.div_(self.source.norm())
        self.asked = asked
        self.matrix, self.spec = _compact(self.source, asked)
        self.options = options
        self.generator = torch.Generator().manual_seed(options.seed)
        wanted: list[tuple[Side, bool]] = [("in", asked.searches_in), ("out", asked.searches_out)]
        self.sides = [side for side, searched in wanted if searched]
        # with few groups one random exchange often finds nothing although the next would
        self._patience = 3 if self.matrix.numel() <= PATIENT else 1
        self._single = self.matrix.float()  # moves are judged in float32, fits and errors in float64
        self._single_t = self._single.T.contiguous() if asked.searches_in else self._single.T
        rows, cols = torch.arange(self.spec.out_features), torch.arange(self.spec.in_features)
        self.identity = self.fit(rows.view(-1, self.spec.b[0]), cols.view(-1, self.spec.b[1]))
        self.best = self.identity
        self.history = [self.best.error]

    @property
    def done(self) -> bool:
        """Nothing is left to gain: no side to search, or the error asked for is reached."""
        return not self.sides or self.best.error <= self.options.target_error

    def fit(self, rows: Tensor, cols: Tensor) -> Arrangement:
        """The best basis for an arrangement, and its error."""
        (out_a, out_b), (in_a, in_b) = rows.shape, cols.shape
        # R(W)ᵀ slot by slot: the same numbers as `rearrange` of the arranged matrix, copied in long runs
        slots = self.matrix.index_select(0, rows.T.reshape(-1)).index_select(1, cols.T.reshape(-1))
        slots = slots.view(out_b, out_a, in_b, in_a).transpose(1, 2).reshape(out_b * in_b, out_a * in_a)
        r = slots.T
        basis = right_basis(r, self.spec.rank)
        scores = r @ basis
        lost = 1.0 - float(scores.square().sum())
        if lost < 1e-6:  # the difference cancels; measure the residual itself
            lost = float((r - scores @ basis.T).square().sum())
        return Arrangement(rows, cols, basis.reshape(*self.spec.b, self.spec.rank), lost**0.5)

    def view(self, state: Arrangement, side: Side) -> tuple[Tensor, Tensor, Tensor]:
        """(x, basis, groups) of one side, the other side arranged as in `state`; shapes in moves.py."""
        if side == "out":
            x = self._single.index_select(1, state.cols.reshape(-1)).view(-1, *state.cols.shape)
            return x, state.basis.float(), state.rows
        x = self._single_t.index_select(1, state.rows.reshape(-1)).view(-1, *state.rows.shape)
        return x, state.basis.float().transpose(0, 1).contiguous(), state.cols

    def moved(self, state: Arrangement, side: Side, move: Move) -> Arrangement:
        """`state` after a move on one side, better or worse, with its best basis."""
        groups = move(*self.view(state, side), self.generator)
        return self.fit(groups, state.cols) if side == "out" else self.fit(state.rows, groups)

    def arranged(self, deal: Callable[[Side, Tensor], Tensor]) -> Arrangement:
        """The identity with the groups of every searched side replaced by what `deal` makes of them, out side first."""
        rows = deal("out", self.identity.rows) if "out" in self.sides else self.identity.rows
        cols = deal("in", self.identity.cols) if "in" in self.sides else self.identity.cols
        return self.fit(rows, cols)

    def descend(self, state: Arrangement, moves: list[Move], sweeps: int | None = None) -> Arrangement:
        """Every move once on every searched side, until the tolerance, the target or the number of sweeps is reached.

        A move is kept only where the error, in float64, is really lower.
        """
        self.accept(state)
        idle = 0
        for _ in range(self.options.max_sweeps if sweeps is None else sweeps):
            if self.done:
                break
            before = state.error
            for side in self.sides:
                for move in moves:
                    moved = self.moved(state, side, move)
                    state = moved if moved.error < state.error else state
            self.accept(state)
            idle = idle + 1 if before - state.error <= self.options.tolerance * before else 0
            if idle == self._patience:
                break
        return state

    def accept(self, state: Arrangement) -> None:
        """Note a state the search has reached."""
        if state.error < self.best.error:
            self.best = state
        self.history.append(self.best.error)


def _compact(weight: Tensor, spec: KroneckerSpec) -> tuple[Tensor, KroneckerSpec]:
    """An equivalent, smaller matrix where a side is not searched, and its spec.

    An orthogonal map of the block-row index i1 changes neither the error nor the basis, so an out side that keeps
    its order may be replaced by a square root of a Gram matrix: a (50257, 768) weight with out_b = 1 becomes
    (768, 768). The same holds for the in side.
    """

    def gram_root(tall: Tensor) -> Tensor:
        """Square S with SᵀS = TᵀT; from the Gram matrix, several times faster than a QR."""
        values, vectors = torch.linalg.eigh(tall.T @ tall)
        return values.clamp_min(0.0).sqrt()[:, None] * vectors.T

    (out_a, in_a), (out_b, in_b) = spec.a, spec.b
    if not spec.searches_out and out_a > out_b * in_a * in_b:
        root = gram_root(weight.reshape(out_a, -1))
        weight, out_a = root.reshape(-1, in_a * in_b), root.shape[0]
    if not spec.searches_in and in_a > in_b * out_a * out_b:
        root = gram_root(weight.reshape(-1, in_a, in_b).permute(1, 2, 0).reshape(in_a, -1))
        in_a = root.shape[0]
        weight = root.view(in_a, in_b, -1).permute(2, 0, 1).reshape(-1, in_a * in_b)
    rank = min(spec.rank, out_a * in_a, out_b * in_b)
    return weight.contiguous(), replace(spec, a=(out_a, in_a), rank=rank)


def explore(search: Search, memo: dict[tuple[tuple[int, int], int], Arrangement] | None = None) -> None:
    """Some sweeps from every start, then the best goes on to the end; nested families are searched in full first.

    A small weight can afford the other methods too, and every start to its end; a larger one gives each start a
    single sweep, which tells them apart well.

    Args:
        memo: (block, rank) of a nested family -> the best found for it; a family can be reached in several ways.
    """
    memo = {} if memo is None else memo
    small = _is_small(search.asked)
    if small:
        from_identity(search)
        grouped(search)

    def by_size(side: Side, groups: Tensor) -> Tensor:
        return _dealt(search.matrix.square().sum(1 if side == "out" else 0), groups.shape[1])

    starts = [search.arranged(by_size), _similar(search)]
    if search.source.numel() <= TINY:  # a local optimum is likely and a restart costs nothing
        starts += [shuffled(search) for _ in range(TINY_RESTARTS)]
    families = nested_specs(search.asked)
    if small or not families:
        starts.append(search.identity)
    for spec in families:
        key = (spec.b, spec.rank)
        if key not in memo:
            nested = Search(search.source, spec, search.options)
            explore(nested, memo)
            memo[key] = nested.best
        starts.append(_widened(search, spec, memo[key]))

    tried = [search.descend(start, [exchange], None if small else 1) for start in starts]
    best = search.descend(min(tried, key=lambda state: state.error), [exchange])
    if search.matrix.numel() <= LARGE:
        search.descend(best, [assign, swap])


def from_identity(search: Search) -> None:
    """Alternate the sides from the order the weight came in, by assignment."""
    search.descend(search.identity, [assign])


def grouped(search: Search) -> None:
    """Similar rows and columns together, refined by swaps, then by assignment and swaps."""
    state = search.descend(_similar(search), [swap])
    search.descend(state, [assign, swap])


def _similar(search: Search) -> Arrangement:
    """Searched sides grouped by similarity; the columns first, then the rows as these columns show them."""
    state = search.identity
    for side in search.sides:
        state = search.moved(state, side, alike)
    return state


def shuffled(search: Search) -> Arrangement:
    """A random arrangement of the searched sides."""
    return search.arranged(lambda _, groups: torch.randperm(groups.numel(), generator=search.generator).view_as(groups))


def _is_small(spec: KroneckerSpec) -> bool:
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
    small = _is_small(spec)
    contained: list[tuple[int, int, int]] = []
    if small and rank > 1:
        contained.append((out_b, in_b, rank - 1))
    stepwise = small or out_b == 1 or in_b == 1
    if out_b > 1:
        step = divisors(out_b)[1] if stepwise else out_b
        contained.append((out_b // step, in_b, rank // step))
    if in_b > 1:
        step = divisors(in_b)[1] if stepwise else in_b
        contained.append((out_b, in_b // step, rank // step))
    shape = spec.shape
    return [
        replace(spec, a=(shape[0] // p, shape[1] // q), b=(p, q), rank=r)
        for p, q, r in contained
        if r >= 1 and (p, q) != (1, 1)
    ]


def _widened(search: Search, family: KroneckerSpec, nested: Arrangement) -> Arrangement:
    """What was found for a nested family, its groups joined to the larger groups of `search`.

    Any joining keeps the family's error, so the groups are dealt by size, where the larger family gains most.
    """
    energy = search.source.square()

    def joined(side: Side, groups: Tensor) -> Tensor:
        size = energy.sum(1 if side == "out" else 0)
        block, small = (family.b[0], nested.rows) if side == "out" else (family.b[1], nested.cols)
        if block == 1:
            small = torch.arange(len(size)).view(-1, 1)  # of a side the family does not search, only a compact form
        share = groups.shape[1] // small.shape[1]
        if share == 1:
            return small
        return small[_dealt(size[small].sum(1), share)].reshape(-1, groups.shape[1])

    return search.arranged(joined)


def _dealt(size: Tensor, slots: int) -> Tensor:
    """Indices by falling size, dealt slot by slot, so that slots differ most: (len(size) / slots, slots)."""
    return size.argsort(descending=True, stable=True).view(slots, -1).T.contiguous()
