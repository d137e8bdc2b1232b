"""Permutations under a weighted error: moves proposed with the A's eliminated, kept where a refit is really better.

Starts are searches that do not know the metric, on the weight and on the weight with its rows and columns scaled by
what they are worth; scaling a column says how much it matters, but not what it can be told from, hence the moves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kronfold.base.specs import KroneckerSpec
from kronfold.decompose.fit import Fit
from kronfold.decompose.kronecker_als import (
    SWEEPS,
    Problem,
    a_step,
    descend,
    sweep,
    weighted_fit,
    with_orthonormal_b,
)
from kronfold.decompose.permute_state import Options
from kronfold.decompose.permute_weighted_in import Move, moved, rearrangements
from kronfold.decompose.permute_weighted_out import exchange_rows
from kronfold.structures.weighting import Weighting

ROUGH_SWEEPS = 4  # of refitting for the starts that nothing is promised about


@dataclass(frozen=True)
class State:
    """rows (out_a, out_b), cols (in_a, in_b), factors as in Fit, and the weighted relative error."""

    rows: Tensor
    cols: Tensor
    a: Tensor
    b: Tensor
    error: float


def scaled(weight: Tensor, weighting: Weighting) -> Tensor:
    """`diag(G)^{1/2} W diag(H)^{1/2}` (out, in), float64."""
    weight = weight.double()
    if weighting.outputs is not None:
        diagonal = weighting.outputs if weighting.outputs.dim() == 1 else weighting.outputs.diagonal()
        weight = diagonal.sqrt()[:, None] * weight
    return weight if weighting.inputs is None else weight * weighting.inputs.diagonal().sqrt()


def weighted_search(
    weight: Tensor, spec: KroneckerSpec, weighting: Weighting, starts: list[Fit], options: Options
) -> Fit:
    """Search on from fits of `weight` under a checked weighting; never worse than `weighted_fit` of the first.

    The history starts with the weighted error of the first start and never rises.
    """
    search = _Search(weight, spec, weighting, options)
    tried = []
    for number, start in enumerate(starts):
        state, errors = search.begin(start, SWEEPS if number == 0 else ROUGH_SWEEPS)
        if number == 0:
            search.history += errors
        search.note(state)
        tried.append(search.step(state) if len(starts) > 1 and not search.done else state)
    search.climb(min(tried, key=lambda state: state.error))
    best = search.best
    perm_out = best.rows.reshape(-1).clone() if spec.searches_out else None
    perm_in = best.cols.reshape(-1).clone() if spec.searches_in else None
    a = best.a * search.scale
    if search.is_compact:
        arranged = weight.double() if perm_in is None else weight.double()[:, perm_in]
        blank = torch.zeros(spec.rank, *spec.a, dtype=torch.float64)
        a = a_step(Problem.of(arranged, weighting.arranged(None, perm_in)), blank, best.b)
    found = Fit(spec, a, best.b, perm_in, perm_out, best.error)
    fit = weighted_fit(weight, weighting, found)
    history = [max(error, fit.relative_error) for error in search.history]
    return replace(fit, history=[*history, fit.relative_error])


class _Search:
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
        a, b, history = descend(problem, a, b, sweeps)
        return State(rows.view(-1, self.spec.b[0]), cols.view(self.spec.a[1], -1), a, b, history[-1]), history

    def note(self, state: State) -> None:
        """Keep the best; the history holds the best error so far."""
        if not hasattr(self, "best") or state.error < self.best.error:
            self.best = state
        self.history.append(min(self.best.error, *self.history[-1:]))

    def climb(self, state: State) -> None:
        """Steps until one gains too little."""
        for _ in range(self.options.max_sweeps):
            if self.done:
                break
            before = state.error
            state = self.step(state)
            if before - state.error <= self.options.tolerance * before:
                break

    def step(self, state: State) -> State:
        """Moves on both sides, then a sweep of refitting."""
        if self.spec.searches_in:
            state = self._columns(state)
        if self.spec.searches_out:
            state = self._rows(state)
        state = self._refit(state, state.rows, state.cols)
        self.note(state)
        return state

    def _refit(self, state: State, rows: Tensor, cols: Tensor) -> State:
        """`state`, or the same factors refitted to this arrangement where that is better."""
        a, b, error = sweep(self.problem.arranged(rows.reshape(-1), cols.reshape(-1)), state.a, state.b)
        return State(rows, cols, a, b, error) if error < state.error else state

    def _rows(self, state: State) -> State:
        problem = self.problem.arranged(torch.arange(len(self.problem.weight)), state.cols.reshape(-1))
        _, b = with_orthonormal_b(state.a, state.b)
        return self._refit(state, exchange_rows(problem, b, state.rows, self.generator), state.cols)

    def _columns(self, state: State) -> State:
        """Take all proposed moves, or half of them, and so on: together they may overshoot."""
        problem = self.problem.arranged(state.rows.reshape(-1), state.cols.reshape(-1))
        a, b = with_orthonormal_b(state.a, state.b)
        moves: list[Move] = rearrangements(problem, a, b, self.generator)
        while moves:
            better = self._refit(state, state.rows, moved(state.cols, moves))
            if better is not state:
                return better
            moves = moves[: len(moves) // 2]
        return state
