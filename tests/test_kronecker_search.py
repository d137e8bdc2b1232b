"""permuted_kronecker: one contract for every method, shape and side; brute force and planted permutations."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch

from kronfold.base.errors import InputError, ShapeError
from kronfold.structures.kronecker import KroneckerSpec, matrix, moves, nearest_kronecker
from kronfold.structures.kronecker.permutations import METHODS, permuted_kronecker
from kronfold.structures.kronecker.search import nested_specs

EXACT = 1e-9


@functools.cache
def heavy_matrix(out: int, in_: int, seed: int = 0) -> torch.Tensor:
    """Correlated rows and columns of very unequal size, as trained weights have."""
    g = torch.Generator().manual_seed(seed)
    low = torch.randn(out, 6, generator=g, dtype=torch.float64) @ torch.randn(6, in_, generator=g, dtype=torch.float64)
    noise = torch.randn(out, in_, generator=g, dtype=torch.float64)
    rows = torch.randn(out, 1, generator=g, dtype=torch.float64).exp()
    return rows * (low + 2.0 * noise)


def planted(spec: KroneckerSpec, noise: float, seed: int = 0) -> torch.Tensor:
    """A Kronecker sum plus noise (relative), its rows and columns shuffled where the spec searches."""
    g = torch.Generator().manual_seed(seed)
    a = torch.randn(spec.rank, *spec.a, generator=g, dtype=torch.float64)
    b = torch.rand(spec.rank, *spec.b, generator=g, dtype=torch.float64) + 0.5
    clean = matrix.to_dense(a, b)
    dirt = torch.randn(spec.shape, generator=g, dtype=torch.float64)
    weight = clean / clean.norm() + noise * dirt / dirt.norm()
    if spec.searches_out:
        weight = weight[torch.randperm(spec.out_features, generator=g)]
    if spec.searches_in:
        weight = weight[:, torch.randperm(spec.in_features, generator=g)]
    return weight


# shape, block, rank, permute_in, permute_out
CONTRACT = [
    ((24, 16), (1, 2), 1, True, True),
    ((24, 16), (2, 1), 1, True, True),
    ((24, 16), (1, 4), 2, True, True),
    ((24, 16), (4, 2), 4, True, True),
    ((24, 16), (3, 4), 5, True, True),
    ((24, 16), (4, 2), 3, True, False),
    ((24, 16), (4, 2), 3, False, True),
    ((24, 16), (4, 2), 3, False, False),
    ((24, 16), (24, 2), 1, True, True),
    ((24, 16), (2, 16), 2, True, True),
    ((24, 16), (1, 1), 1, True, True),
    ((24, 16), (12, 8), 4, True, True),
    ((15, 21), (5, 3), 2, True, True),
    ((97, 6), (1, 3), 1, True, True),
    ((6, 98), (1, 2), 1, True, True),
    ((6, 98), (2, 1), 2, True, True),
]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("shape", "block", "rank", "permute_in", "permute_out"), CONTRACT)
def test_contract(method, shape, block, rank, permute_in, permute_out):
    spec = KroneckerSpec.for_weight(shape, block, rank, permute_in=permute_in, permute_out=permute_out)
    weight = heavy_matrix(*shape)
    fit = permuted_kronecker(weight, spec, seed=3, method=method, max_sweeps=6)
    plain = nearest_kronecker(weight, spec)

    measured = float((weight - fit.to_dense()).norm() / weight.norm())
    assert fit.relative_error == pytest.approx(measured, abs=EXACT)
    assert fit.relative_error <= plain.relative_error + 1e-12
    assert all(later <= earlier for earlier, later in itertools.pairwise(fit.history))
    assert fit.history[0] == pytest.approx(plain.relative_error, abs=1e-7)
    assert fit.history[-1] == fit.relative_error
    assert (fit.perm_in is None) == (not spec.searches_in)
    assert (fit.perm_out is None) == (not spec.searches_out)
    for perm, size in ((fit.perm_in, shape[1]), (fit.perm_out, shape[0])):
        assert perm is None or torch.equal(perm.sort().values, torch.arange(size))
    assert fit.spec == spec


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_same_answer(method):
    spec = KroneckerSpec(a=(6, 8), b=(4, 2), rank=4)
    weight = heavy_matrix(24, 16)
    before = torch.get_rng_state()
    first = permuted_kronecker(weight, spec, seed=5, method=method)
    torch.rand(3)  # the global stream plays no part
    again = permuted_kronecker(weight, spec, seed=5, method=method)
    torch.set_rng_state(before)
    assert torch.equal(first.perm_in, again.perm_in)
    assert torch.equal(first.perm_out, again.perm_out)
    assert torch.equal(first.a, again.a)
    assert first.history == again.history


def pairings(items: list[int]):
    """Every way to write `items` as ordered pairs, the order of the pairs aside."""
    if not items:
        yield []
        return
    first = items[0]
    for other in items[1:]:
        rest = [i for i in items[1:] if i != other]
        for tail in pairings(rest):
            yield [first, other, *tail]
            yield [other, first, *tail]


@pytest.mark.parametrize("seed", range(4))
def test_pairs_match_brute_force(seed):
    weight = heavy_matrix(5, 8, seed=seed)
    spec = KroneckerSpec(a=(5, 4), b=(1, 2))
    best = min(nearest_kronecker(weight[:, perm], spec).relative_error for perm in pairings(list(range(8))))
    assert permuted_kronecker(weight, spec).relative_error == pytest.approx(best, abs=1e-7)


@pytest.mark.parametrize("seed", range(2))
def test_two_sides_match_brute_force(seed):
    weight = heavy_matrix(4, 4, seed=seed + 10)
    spec = KroneckerSpec(a=(2, 2), b=(2, 2))
    best = min(
        nearest_kronecker(weight[rows][:, cols], spec).relative_error
        for rows in pairings(list(range(4)))
        for cols in pairings(list(range(4)))
    )
    found = min(permuted_kronecker(weight, spec, seed=s).relative_error for s in range(4))
    assert found == pytest.approx(best, abs=1e-7)


PLANTED = [  # spec, noise, how many times the noise floor may remain
    (KroneckerSpec(a=(24, 16), b=(1, 2)), 0.05, 1.05),
    (KroneckerSpec(a=(12, 30), b=(3, 1)), 0.05, 1.05),
    (KroneckerSpec(a=(16, 24), b=(2, 2)), 0.05, 1.05),
    (KroneckerSpec(a=(16, 12), b=(4, 2), permute_in=False), 0.05, 1.05),
    (KroneckerSpec(a=(96, 64), b=(4, 2)), 0.05, 1.05),
    (KroneckerSpec(a=(12, 16), b=(2, 4), permute_out=False), 0.05, 2.0),  # a local optimum: 0.096
]


@pytest.mark.parametrize(("spec", "noise", "slack"), PLANTED)
def test_planted_permutations_are_found(spec, noise, slack):
    weight = planted(spec, noise)
    plain = nearest_kronecker(weight, spec).relative_error
    found = permuted_kronecker(weight, spec).relative_error
    assert plain > 5 * noise
    assert found < slack * noise


NESTED = [  # smaller family, larger family
    (((1, 2), 1), ((4, 2), 4)),
    (((1, 2), 1), ((2, 2), 2)),
    (((2, 1), 1), ((2, 4), 4)),
    (((1, 2), 1), ((1, 4), 2)),
    (((4, 2), 2), ((4, 2), 3)),
    (((2, 2), 1), ((4, 4), 5)),
]


@pytest.mark.parametrize(("small", "large"), NESTED)
@pytest.mark.parametrize("seed", range(2))
def test_a_larger_family_is_never_worse(small, large, seed):
    weight = heavy_matrix(32, 24, seed=seed)
    errors = [
        permuted_kronecker(weight, KroneckerSpec.for_weight((32, 24), b, rank), seed=seed).relative_error
        for b, rank in (small, large)
    ]
    assert errors[1] <= errors[0] + 1e-12


def test_large_weights_still_seed_from_one_sided_families():
    spec = KroneckerSpec(a=(192, 384), b=(4, 2), rank=4)
    assert {(s.b, s.rank) for s in nested_specs(spec)} == {((1, 2), 1), ((4, 1), 2)}
    assert all(s.shape == spec.shape for s in nested_specs(spec))


def test_a_permutation_really_helps_on_trained_like_weights():
    weight = heavy_matrix(96, 64)
    spec = KroneckerSpec(a=(24, 32), b=(4, 2), rank=4)
    errors = {m: permuted_kronecker(weight, spec, method=m).relative_error for m in METHODS}
    plain = nearest_kronecker(weight, spec).relative_error
    assert errors["auto"] < 0.8 * plain
    assert errors["auto"] == min(errors.values())


def test_large_sides_are_worked_on_in_parts(monkeypatch):
    largest = []
    original = moves.linear_sum_assignment

    def watched(cost, maximize):
        largest.append(max(cost.shape))
        return original(cost, maximize=maximize)

    monkeypatch.setattr(moves, "linear_sum_assignment", watched)
    monkeypatch.setattr(moves, "GROUPS_AT_ONCE", 16)
    weight = heavy_matrix(600, 8)
    spec = KroneckerSpec(a=(200, 4), b=(3, 2), rank=2)
    for method in METHODS:
        fit = permuted_kronecker(weight, spec, method=method, max_sweeps=2)
        assert fit.relative_error < nearest_kronecker(weight, spec).relative_error
    assert max(largest) <= 16


def test_a_side_that_is_not_searched_may_be_huge():
    weight = heavy_matrix(20000, 12)
    spec = KroneckerSpec(a=(20000, 6), b=(1, 2))
    fit = permuted_kronecker(weight, spec)
    measured = float((weight - fit.to_dense()).norm() / weight.norm())
    assert fit.relative_error == pytest.approx(measured, abs=EXACT)
    assert fit.relative_error < nearest_kronecker(weight, spec).relative_error


def test_stops_at_the_accuracy_asked_for():
    weight = heavy_matrix(96, 64)
    spec = KroneckerSpec(a=(24, 32), b=(4, 2), rank=4)
    plain = nearest_kronecker(weight, spec).relative_error
    full = permuted_kronecker(weight, spec)
    target = (plain + full.relative_error) / 2
    early = permuted_kronecker(weight, spec, target_error=target)
    assert full.relative_error < early.relative_error <= target
    assert len(early.history) < len(full.history)
    at_once = permuted_kronecker(weight, spec, target_error=plain + 1e-6)
    assert torch.equal(at_once.perm_in, torch.arange(64))
    assert at_once.relative_error == pytest.approx(plain, abs=1e-12)


def test_a_looser_tolerance_stops_sooner():
    weight = heavy_matrix(96, 64)
    spec = KroneckerSpec(a=(24, 32), b=(4, 2), rank=4)
    loose, tight = (permuted_kronecker(weight, spec, method="grouping", tolerance=t) for t in (0.5, 1e-5))
    assert len(loose.history) < len(tight.history)
    assert tight.relative_error < loose.relative_error


@pytest.mark.parametrize("scale", [1e-150, 1e-20, 1e20])
def test_scale_of_the_weight_does_not_matter(scale):
    spec = KroneckerSpec(a=(12, 8), b=(2, 2), rank=2)
    errors = [permuted_kronecker(heavy_matrix(24, 16) * s, spec).relative_error for s in (1.0, scale)]
    assert errors[0] == pytest.approx(errors[1], abs=0.02)  # rounding may tip the search into a near optimum


# float64 needs no conversion, but a copy all the same
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_the_weight_and_the_thread_count_are_left_as_they_were(dtype):
    weight = heavy_matrix(24, 16).to(dtype)
    copy, threads = weight.clone(), torch.get_num_threads()
    fit = permuted_kronecker(weight, KroneckerSpec(a=(6, 8), b=(4, 2), rank=2))
    assert torch.equal(weight, copy)
    assert torch.get_num_threads() == threads
    measured = float((weight.double() - fit.to_dense()).norm() / weight.double().norm())
    assert fit.relative_error == pytest.approx(measured, abs=EXACT)


GOOD = heavy_matrix(8, 6)
SPEC = KroneckerSpec(a=(4, 3), b=(2, 2))
BAD = [
    (torch.full((8, 6), float("nan")), {}, InputError, "NaN or infinite"),
    (torch.full((8, 6), float("-inf")), {}, InputError, "48 values that are NaN or infinite"),
    (torch.zeros(8, 6), {}, InputError, "all zeros"),
    (heavy_matrix(8, 9), {}, ShapeError, "nearest allowed: 1, 3"),
    (heavy_matrix(8, 6)[0], {}, ShapeError, "must be a matrix"),
    (GOOD, {"method": "asignment"}, InputError, "Did you mean 'assignment'"),
    (GOOD, {"tolerance": -1.0}, InputError, "tolerance must be zero or more; got -1.0"),
    (GOOD, {"target_error": float("nan")}, InputError, "target_error must be zero or more"),
    (GOOD, {"max_sweeps": -2}, InputError, "max_sweeps must be zero or more"),
]


@pytest.mark.parametrize(("weight", "options", "error", "text"), BAD)
def test_bad_input_is_named(weight, options, error, text):
    with pytest.raises(error, match=text):
        permuted_kronecker(weight, SPEC, **options)


def test_a_rank_above_the_maximum_names_the_maximum():
    with pytest.raises(ShapeError, match="above the maximum 4"):
        KroneckerSpec(a=(4, 3), b=(2, 2), rank=5)
