"""Kronecker sums with permutations: `weight[perm_out][:, perm_in] ≈ Σ_k A_k ⊗ B_k`.

TQCompressor (arXiv 2401.16367, section 3) asks for the permutations but does not publish its search; the methods
here are compared in benchmarks/permutation_search.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from kronfold.base.errors import InputError, suggest
from kronfold.base.specs import KroneckerSpec
from kronfold.decompose.fit import Fit
from kronfold.decompose.nearest import check_weight, nearest_kronecker
from kronfold.decompose.permute_annealing import anneal
from kronfold.decompose.permute_assignment import assign, from_identity
from kronfold.decompose.permute_exchange import exchange
from kronfold.decompose.permute_gains import LARGE
from kronfold.decompose.permute_grouping import grouped, similar
from kronfold.decompose.permute_starts import by_size, is_small, nested_specs, restarts, widened
from kronfold.decompose.permute_state import Arrangement, Options, Search
from kronfold.decompose.permute_swaps import swap
from kronfold.decompose.permute_weighted import scaled, weighted_search
from kronfold.structures.weighting import Weighting

FINE_STEPS = 2e-4  # tolerance of weighted moves where out_b is 1
SWEEPS_LARGE = 2  # weighted sweeps of a large weight; the first ones gain nearly all there is

Memo = dict[tuple[tuple[int, int], int], Arrangement]  # (block, rank) of a nested family -> the best found for it


def permuted_kronecker(
    weight: Tensor,
    spec: KroneckerSpec,
    *,
    seed: int = 0,
    weighting: Weighting | None = None,
    method: str = "auto",
    tolerance: float | None = None,
    target_error: float | None = None,
    max_sweeps: int = 40,
) -> Fit:
    """Factors and permutations for `weight`; never worse than `nearest_kronecker`, the same for the same seed.

    Args:
        weight: (out_features, in_features), any floating dtype.
        spec: shapes, rank, and which sides to permute; a side whose block is 1 is skipped.
        seed: of the only random numbers used.
        weighting: what errors cost. With one, searches that do not know it give the starts, and moves that do go on
            from there; errors are weighted, by the damped moments, and the result is never worse than the weighted
            fit of what the search without a weighting finds.
        method: "auto" (random exchange from several starts and from nested families; the best is kept),
            "assignment" (alternating assignment from identity), "annealing" (restarts and simulated annealing),
            "grouping" (similarity grouping, swaps, assignment).
        tolerance: a start ends when a sweep over the sides lowers its error by less than this share of it.
            None means 5e-4, and 2e-3 for weights above a million numbers; ten times that for the moves under a
            weighting, whose sweeps cost and gain more, but 2e-4 where out_b is 1 and they cost little.
        target_error: stop as soon as the relative error is at most this; None looks as far as `tolerance` goes.
        max_sweeps: limit on sweeps per start; under a weighting at most 2 after the starts for weights above a million
            numbers, unless out_b is 1.

    Returns:
        Fit; `perm_in` or `perm_out` is None for a side that was not searched. `history` starts with the identity's
        error, or with a weighting with the weighted error of the search without it, and never rises.

    Raises:
        ShapeError, InputError: as `nearest_kronecker`; InputError also for an unknown method or a bad limit.
    """
    if method not in METHODS:
        raise InputError(f"Unknown permutation search {method!r}. {suggest(method, METHODS)}")
    for name, value in (("tolerance", tolerance), ("target_error", target_error), ("max_sweeps", max_sweeps)):
        if value is not None and not value >= 0:
            raise InputError(f"{name} must be zero or more; got {value}.")
    weight = check_weight(weight, spec)
    usual = 5e-4 if weight.numel() <= LARGE else 2e-3
    share = usual if tolerance is None else tolerance
    options = Options(seed, share, -1.0 if target_error is None else target_error, max_sweeps)
    with one_thread():
        if weighting is None:
            return _searched(weight, spec, method, options)
        is_cheap = spec.b[0] == 1
        own = FINE_STEPS if is_cheap else 10.0 * usual
        limit = max_sweeps if is_cheap or weight.numel() <= LARGE else min(max_sweeps, SWEEPS_LARGE)
        steps = replace(options, tolerance=own if tolerance is None else tolerance, max_sweeps=limit)
        return _weighted(weight, spec, weighting.checked(spec.shape), method, (options, steps))


def _searched(weight: Tensor, spec: KroneckerSpec, method: str, options: Options) -> Fit:
    # in a function of its own: the search's copies of the weight end with it
    perm_in, perm_out, errors = _permutations(weight, spec, method, options)
    fit = _fitted(weight, spec, perm_in, perm_out)
    history = [max(error, fit.relative_error) for error in errors]
    return replace(fit, history=[*history, fit.relative_error])


def _permutations(
    weight: Tensor, spec: KroneckerSpec, method: str, options: Options
) -> tuple[Tensor | None, Tensor | None, list[float]]:
    """(perm_in, perm_out, errors as the search went on)."""
    search = Search(weight, spec, options)
    if not search.done:
        METHODS[method](search)
    perm_in = search.best.cols.reshape(-1).clone() if "in" in search.sides else None
    perm_out = search.best.rows.reshape(-1).clone() if "out" in search.sides else None
    return perm_in, perm_out, search.history


def _weighted(
    weight: Tensor, spec: KroneckerSpec, weighting: Weighting, method: str, options: tuple[Options, Options]
) -> Fit:
    """`options` of the searches that give the starts, and of the one that goes on under the weighting."""
    blind = replace(options[0], target_error=-1.0)  # the error asked for is a weighted one
    starts = [_searched(weight, spec, method, blind)]
    if weighting.inputs is None and weighting.outputs is None:
        return starts[0]
    if spec.searches_in or spec.searches_out:
        by_worth = _searched(scaled(weight, weighting), spec, method, blind)
        starts.append(_fitted(weight, spec, by_worth.perm_in, by_worth.perm_out))
    return weighted_search(weight, spec, weighting, starts, options[1])


def _fitted(weight: Tensor, spec: KroneckerSpec, perm_in: Tensor | None, perm_out: Tensor | None) -> Fit:
    """The nearest Kronecker sum for given permutations."""
    arranged = weight if perm_out is None else weight[perm_out]
    arranged = arranged if perm_in is None else arranged[:, perm_in]
    return replace(nearest_kronecker(arranged, spec), perm_in=perm_in, perm_out=perm_out)


def _auto(search: Search) -> None:
    _explore(search, {})


def _explore(search: Search, memo: Memo) -> None:
    """Some sweeps from every start, then the best goes on to the end; nested families are searched in full first.

    A small weight can afford the other methods too, and every start to its end; a larger one gives each start a
    single sweep, which tells them apart well.
    """
    small = is_small(search.asked)
    if small:
        from_identity(search)
        grouped(search)
    starts = [by_size(search), similar(search), *restarts(search)]
    families = nested_specs(search.asked)
    if small or not families:
        starts.append(search.identity)
    for spec in families:
        key = (spec.b, spec.rank)
        if key not in memo:
            nested = Search(search.source, spec, search.options)
            _explore(nested, memo)
            memo[key] = nested.best
        starts.append(widened(search, spec, memo[key]))
    tried = [search.descend(start, [exchange], None if small else 1) for start in starts]
    best = search.descend(min(tried, key=lambda state: state.error), [exchange])
    if search.matrix.numel() <= LARGE:
        search.descend(best, [assign, swap])


@contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread, here and in threads begun inside.

    Moves are many short tensor operations: a second thread gains little, and on a busy machine costs tenfold.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


METHODS: dict[str, Callable[[Search], None]] = {
    "assignment": from_identity,
    "annealing": anneal,
    "grouping": grouped,
    "auto": _auto,
}
