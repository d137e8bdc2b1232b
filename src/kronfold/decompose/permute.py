"""Kronecker sums with permutations: `weight[perm_out][:, perm_in] ≈ Σ_k A_k ⊗ B_k`.

TQCompressor (arXiv 2401.16367, section 3) asks for the permutations but does not publish its search; the methods
here are compared in benchmarks/permutation_search.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from kronfold.base.errors import InputError, suggest
from kronfold.base.specs import KroneckerSpec
from kronfold.decompose.fit import Fit
from kronfold.decompose.nearest import check_weight, nearest_kronecker
from kronfold.decompose.permute_annealing import anneal
from kronfold.decompose.permute_assignment import assign, from_identity
from kronfold.decompose.permute_exchange import exchange
from kronfold.decompose.permute_grouping import grouped, similar
from kronfold.decompose.permute_starts import by_size, nested_specs, widened
from kronfold.decompose.permute_state import Arrangement, Move, Options, Search
from kronfold.decompose.permute_swaps import swap

TRIAL_SWEEPS = 2  # given to every start of the default before the best goes on

Memo = dict[tuple[tuple[int, int], int], Search]


def permuted_kronecker(
    weight: Tensor,
    spec: KroneckerSpec,
    *,
    seed: int = 0,
    method: str = "auto",
    tolerance: float = 3e-4,
    target_error: float | None = None,
    max_sweeps: int = 40,
) -> Fit:
    """Factors and permutations for `weight`; never worse than `nearest_kronecker`, the same for the same seed.

    Args:
        weight: (out_features, in_features), any floating dtype.
        spec: shapes, rank, and which sides to permute; a side whose block is 1 is skipped.
        seed: of the only random numbers used.
        method: "auto" (random exchange from several starts and from nested families, the best is kept),
            "assignment" (alternating assignment from identity), "annealing" (restarts and simulated annealing),
            "grouping" (similarity grouping, swaps, assignment).
        tolerance: a start ends when a sweep over the sides lowers its error by less than this share of it.
        target_error: stop as soon as the relative error is at most this; None looks as far as `tolerance` goes.
        max_sweeps: limit on sweeps per start.

    Returns:
        Fit; `perm_in` or `perm_out` is None for a side that was not searched. `history` starts with the identity's
        error and never rises.

    Raises:
        ShapeError, InputError: as `nearest_kronecker`; InputError also for an unknown method or a bad limit.
    """
    if method not in METHODS:
        raise InputError(f"Unknown permutation search {method!r}. {suggest(method, METHODS)}")
    for name, value in (("tolerance", tolerance), ("target_error", target_error), ("max_sweeps", max_sweeps)):
        if value is not None and not value >= 0:
            raise InputError(f"{name} must be zero or more; got {value}.")
    weight = check_weight(weight, spec)
    options = Options(seed, tolerance, -1.0 if target_error is None else target_error, max_sweeps)
    search = Search(weight, spec, options)
    if not search.done:
        METHODS[method](search)
    return _finish(weight, search)


def _finish(weight: Tensor, search: Search) -> Fit:
    perm_out = search.best.rows.reshape(-1).clone() if "out" in search.sides else None
    perm_in = search.best.cols.reshape(-1).clone() if "in" in search.sides else None
    arranged = weight if perm_out is None else weight[perm_out]
    arranged = arranged if perm_in is None else arranged[:, perm_in]
    fit = nearest_kronecker(arranged, search.asked)
    history = [max(error, fit.relative_error) for error in search.history]
    return replace(fit, perm_in=perm_in, perm_out=perm_out, history=[*history, fit.relative_error])


def _auto(search: Search) -> Arrangement:
    return _explore(search, {})


def _explore(search: Search, memo: Memo) -> Arrangement:
    """Every start a few sweeps, the best of them to the end; nested families are searched in full first."""
    starts = [search.identity, by_size(search), similar(search)]
    for spec in nested_specs(search.asked):
        key = (spec.b, spec.rank)
        if key not in memo:
            memo[key] = Search(search.source, spec, search.options)
            _explore(memo[key], memo)
        starts.append(widened(search, memo[key]))
    tried = [search.descend(start, [exchange], TRIAL_SWEEPS) for start in starts]
    best = min(tried, key=lambda state: state.error)
    best = search.descend(best, [exchange])
    return search.descend(best, [assign, swap])


METHODS: dict[str, Callable[[Search], Arrangement]] = {
    "assignment": from_identity,
    "annealing": anneal,
    "grouping": grouped,
    "auto": _auto,
}
