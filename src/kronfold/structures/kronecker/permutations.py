"""Kronecker sums with permutations: `weight[perm_out][:, perm_in] ≈ Σ_k A_k ⊗ B_k`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from kronfold.base.errors import InputError, suggest
from kronfold.decompose.weighting import Weighting, check_weight
from kronfold.ops.threads import one_thread
from kronfold.structures.kronecker.matrix import Fit, KroneckerSpec
from kronfold.structures.kronecker.moves import LARGE
from kronfold.structures.kronecker.search import Options, Search, explore, from_identity, grouped
from kronfold.structures.kronecker.van_loan import nearest_kronecker
from kronfold.structures.kronecker.weighted_moves import weighted_search

FINE_STEPS = 2e-4  # tolerance of weighted moves where out_b is 1
SWEEPS_LARGE = 2  # weighted sweeps of a large weight; the first ones gain nearly all there is

METHODS: dict[str, Callable[[Search], None]] = {"auto": explore, "assignment": from_identity, "grouping": grouped}


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
            "assignment" (alternating assignment from identity), "grouping" (similarity grouping, swaps, assignment).
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

    with one_thread():  # moves are many short tensor operations
        if weighting is None:
            return _searched(weight, spec, method, options)
        weighting = weighting.checked(spec.shape)
        blind = replace(options, target_error=-1.0)  # the error asked for is a weighted one
        starts = [_searched(weight, spec, method, blind)]
        if weighting.inputs is None and weighting.outputs is None:
            return starts[0]
        if spec.searches_in or spec.searches_out:
            # another start: rows and columns scaled by what they are worth, diag(G)^{1/2} W diag(H)^{1/2}
            scaled = weight.double()
            if (outputs := weighting.outputs) is not None:
                scaled = (outputs if outputs.dim() == 1 else outputs.diagonal()).sqrt()[:, None] * scaled
            if weighting.inputs is not None:
                scaled = scaled * weighting.inputs.diagonal().sqrt()
            by_worth = _searched(scaled, spec, method, blind)
            starts.append(_fitted(weight, spec, by_worth.perm_in, by_worth.perm_out))
        is_cheap = spec.b[0] == 1
        own = FINE_STEPS if is_cheap else 10.0 * usual
        limit = max_sweeps if is_cheap or weight.numel() <= LARGE else min(max_sweeps, SWEEPS_LARGE)
        steps = replace(options, tolerance=own if tolerance is None else tolerance, max_sweeps=limit)
        return weighted_search(weight, spec, weighting, starts, steps)


def _searched(weight: Tensor, spec: KroneckerSpec, method: str, options: Options) -> Fit:
    """What a search that knows no weighting finds; the history holds its errors as it went on."""
    search = Search(weight, spec, options)
    if not search.done:
        METHODS[method](search)
    perm_in = search.best.cols.reshape(-1).clone() if "in" in search.sides else None
    perm_out = search.best.rows.reshape(-1).clone() if "out" in search.sides else None
    errors = search.history
    del search  # its copies of the weight, before the fit makes its own
    fit = _fitted(weight, spec, perm_in, perm_out)
    history = [max(error, fit.relative_error) for error in errors]
    return replace(fit, history=[*history, fit.relative_error])


def _fitted(weight: Tensor, spec: KroneckerSpec, perm_in: Tensor | None, perm_out: Tensor | None) -> Fit:
    """The nearest Kronecker sum for given permutations."""
    arranged = weight if perm_out is None else weight[perm_out]
    arranged = arranged if perm_in is None else arranged[:, perm_in]
    return replace(nearest_kronecker(arranged, spec), perm_in=perm_in, perm_out=perm_out)
