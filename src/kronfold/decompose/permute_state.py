"""What a permutation search works on: the matrix, an arrangement of its rows and columns, and the best fit for it.

Rows are dealt into out_a groups of out_b slots, columns into in_a groups of in_b slots. For a fixed arrangement
the best factors span a subspace of the blocks ("basis", out_b·in_b by rank); for a fixed basis, a side's
arrangement is a grouping problem (see permute_gains). A search alternates the two, and neither step can lose.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from kronfold.base.specs import KroneckerSpec
from kronfold.decompose.nearest import right_basis

Side = Literal["in", "out"]
# (x, basis, groups, generator) -> new groups; see permute_gains for the shapes
Move = Callable[[Tensor, Tensor, Tensor, torch.Generator], Tensor]

PATIENT = 1 << 14  # numbers in a matrix, up to which a search ends only after three idle sweeps


@dataclass(frozen=True)
class Arrangement:
    """rows (out_a, out_b) and cols (in_a, in_b) int64; basis (out_b, in_b, rank) float64; its relative error."""

    rows: Tensor
    cols: Tensor
    basis: Tensor
    error: float


@dataclass(frozen=True)
class Options:
    """How long to look: stop a start when a sweep gains less than `tolerance` of the error, or at `target_error`."""

    seed: int
    tolerance: float
    target_error: float
    max_sweeps: int


class Search:
    """One search: the matrix at norm 1, the random stream, the best arrangement so far, and the history.

    `asked` is the spec given; `matrix` and `spec` are their compact equivalents (see `compact`).
    """

    def __init__(self, weight: Tensor, asked: KroneckerSpec, options: Options) -> None:
        largest = torch.linalg.vector_norm(weight, torch.inf).double()
        # one float64 copy, changed in place; squares of very small or large weights stay finite
        self.source = weight.to(torch.float64, copy=True).div_(largest)
        self.source.div_(self.source.norm())
        self.asked = asked
        self.matrix, self.spec = compact(self.source, asked)
        self.options = options
        self.generator = torch.Generator().manual_seed(options.seed)
        # with few groups one random exchange often finds nothing although the next would
        self._patience = 3 if self.matrix.numel() <= PATIENT else 1
        self._single = self.matrix.float()  # moves are judged in float32, fits and errors in float64
        self._single_t = self._single.T.contiguous() if asked.searches_in else self._single.T
        (out_a, in_a), (out_b, in_b) = self.spec.a, self.spec.b
        self.identity = self.fit(
            torch.arange(out_a * out_b).view(out_a, out_b), torch.arange(in_a * in_b).view(in_a, in_b)
        )
        self.best = self.identity
        self.history = [self.best.error]

    @property
    def sides(self) -> list[Side]:
        """The sides whose permutation is searched."""
        wanted: list[tuple[Side, bool]] = [("in", self.spec.searches_in), ("out", self.spec.searches_out)]
        return [side for side, searched in wanted if searched]

    @property
    def done(self) -> bool:
        """Nothing is left to gain: no side to search, or the error asked for is reached."""
        return not self.sides or self.best.error <= self.options.target_error

    def fit(self, rows: Tensor, cols: Tensor) -> Arrangement:
        """The best basis for an arrangement, and its error."""
        (out_a, out_b), (in_a, in_b) = rows.shape, cols.shape
        # R(W)ᵀ slot by slot: the same numbers as kronecker.rearrange of the arranged matrix, copied in long runs
        slots = self.matrix.index_select(0, rows.T.reshape(-1)).index_select(1, cols.T.reshape(-1))
        slots = slots.view(out_b, out_a, in_b, in_a).transpose(1, 2).reshape(out_b * in_b, out_a * in_a)
        r = slots.T
        basis = right_basis(r, self.spec.rank)
        scores = r @ basis
        lost = 1.0 - float(scores.square().sum())
        if lost < 1e-6:  # the difference cancels; measure the residual itself
            lost = float((r - scores @ basis.T).square().sum())
        return Arrangement(rows, cols, basis.reshape(*self.spec.b, self.spec.rank), lost**0.5)

    def accept(self, state: Arrangement) -> None:
        """Note a state the search has reached; the history keeps the best error so far and so never rises."""
        if state.error < self.best.error:
            self.best = state
        self.history.append(self.best.error)

    def view(self, state: Arrangement, side: Side) -> tuple[Tensor, Tensor, Tensor]:
        """(x, basis, groups) of one side, the other side arranged as in `state`; shapes in permute_gains."""
        if side == "out":
            x = self._single.index_select(1, state.cols.reshape(-1)).view(-1, *state.cols.shape)
            return x, state.basis.float(), state.rows
        x = self._single_t.index_select(1, state.rows.reshape(-1)).view(-1, *state.rows.shape)
        return x, state.basis.float().transpose(0, 1).contiguous(), state.cols

    def refit(self, state: Arrangement, side: Side, groups: Tensor) -> Arrangement:
        """`state` with new groups on one side."""
        return self.fit(groups, state.cols) if side == "out" else self.fit(state.rows, groups)

    def apply(self, state: Arrangement, side: Side, move: Move) -> Arrangement:
        """Try a move on one side; keep the result only where the error, in float64, is really lower."""
        moved = self.refit(state, side, move(*self.view(state, side), self.generator))
        return moved if moved.error < state.error else state

    def sweep(self, state: Arrangement, moves: list[Move]) -> Arrangement:
        """Every move once on every searched side."""
        for side in self.sides:
            for move in moves:
                state = self.apply(state, side, move)
        self.accept(state)
        return state

    def descend(self, state: Arrangement, moves: list[Move], sweeps: int | None = None) -> Arrangement:
        """Sweep until the tolerance, the target error or the number of sweeps is reached."""
        self.accept(state)
        idle = 0
        for _ in range(self.options.max_sweeps if sweeps is None else sweeps):
            if self.done:
                break
            before = state.error
            state = self.sweep(state, moves)
            idle = idle + 1 if before - state.error <= self.options.tolerance * before else 0
            if idle == self._patience:
                break
        return state


def compact(weight: Tensor, spec: KroneckerSpec) -> tuple[Tensor, KroneckerSpec]:
    """An equivalent, smaller matrix where a side is not searched, and its spec.

    An orthogonal map of the block-row index i1 changes neither the error nor the basis, so an out side that keeps
    its order may be replaced by a square root of a Gram matrix: a (50257, 768) weight with out_b = 1 becomes
    (768, 768). The same holds for the in side.
    """
    (out_a, in_a), (out_b, in_b) = spec.a, spec.b
    if not spec.searches_out and out_a > out_b * in_a * in_b:
        root = _gram_root(weight.reshape(out_a, -1))
        weight, out_a = root.reshape(-1, in_a * in_b), root.shape[0]
    if not spec.searches_in and in_a > in_b * out_a * out_b:
        root = _gram_root(weight.reshape(-1, in_a, in_b).permute(1, 2, 0).reshape(in_a, -1))
        in_a = root.shape[0]
        weight = root.view(in_a, in_b, -1).permute(2, 0, 1).reshape(-1, in_a * in_b)
    rank = min(spec.rank, out_a * in_a, out_b * in_b)
    return weight.contiguous(), replace(spec, a=(out_a, in_a), rank=rank)


def _gram_root(tall: Tensor) -> Tensor:
    """Square S with SᵀS = TᵀT for a tall T; from the Gram matrix, several times faster than a QR."""
    values, vectors = torch.linalg.eigh(tall.T @ tall)
    return values.clamp_min(0.0).sqrt()[:, None] * vectors.T
