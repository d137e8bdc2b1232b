"""Data-aware Kronecker fits: dense least-squares oracles, monotone histories, planted sums, exact move gains."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from kronfold.base.errors import InputError, ShapeError
from kronfold.decompose.weighting import Weighting, root
from kronfold.structures.kronecker import KroneckerSpec, matrix, nearest_kronecker, permuted_kronecker
from kronfold.structures.kronecker.als import Problem, a_step, b_step, sweep, weighted_fit, with_orthonormal_b
from kronfold.structures.kronecker.search import Options
from kronfold.structures.kronecker.weighted_moves import WeightedSearch, moved, rearrangements


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(n: int, samples: int = 0, seed: int = 1) -> torch.Tensor:
    """Second moment of correlated inputs of unequal size; rank deficient for few samples."""
    x = normal(samples or 3 * n, n, seed=seed) @ normal(n, n, seed=seed + 1)
    x = x * normal(n, seed=seed + 2).exp()
    return x.T @ x / len(x)


SHAPE = (12, 8)
CASES = [((3, 2), 2), ((2, 4), 3), ((1, 2), 1), ((2, 1), 1), ((4, 2), 4)]
OUTPUTS = {"none": None, "diagonal": normal(12, seed=5).exp(), "full": moment(12, seed=6)}


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize(("block", "rank"), CASES)
def test_history_never_rises_and_the_error_is_as_measured(block, rank, outputs):
    spec = KroneckerSpec.for_weight(SHAPE, block, rank)
    weight, weighting = normal(*SHAPE), Weighting(moment(8), OUTPUTS[outputs])
    fit = nearest_kronecker(weight, spec, weighting)
    damped = weighting.checked(SHAPE)
    assert all(later <= earlier for earlier, later in itertools.pairwise(fit.history))
    assert fit.relative_error == pytest.approx(damped.relative_error(weight, fit.to_dense()), abs=1e-10)
    plain = nearest_kronecker(weight, spec)
    assert fit.history[0] == pytest.approx(damped.relative_error(weight, plain.to_dense()), abs=1e-10)
    assert fit.relative_error < fit.history[0]
    assert torch.allclose(fit.a.flatten(1).norm(dim=1), fit.b.flatten(1).norm(dim=1))


@pytest.mark.parametrize("weighting", [Weighting(), Weighting(torch.eye(8)), Weighting(None, torch.ones(12))])
@pytest.mark.parametrize(("block", "rank"), CASES)
def test_identity_weighting_is_the_plain_solver(block, rank, weighting):
    spec = KroneckerSpec.for_weight(SHAPE, block, rank)
    plain, fit = nearest_kronecker(normal(*SHAPE), spec), nearest_kronecker(normal(*SHAPE), spec, weighting)
    torch.testing.assert_close(fit.to_dense(), plain.to_dense(), atol=1e-9, rtol=0)
    assert fit.relative_error == pytest.approx(plain.relative_error, abs=1e-9)


def oracle(problem: Problem, fixed: torch.Tensor, free: torch.Tensor, side: str) -> torch.Tensor:
    """numpy's least squares on the explicit design matrix; the best approximation for one fixed side."""
    left = torch.eye(len(problem.weight), dtype=torch.float64)
    if problem.weighting.outputs is not None:
        outputs = problem.weighting.outputs
        left = root(torch.diag(outputs) if outputs.dim() == 1 else outputs)[0]
    right = root(problem.moment)[0]
    dense = []
    for index in range(free.numel()):
        unit = torch.zeros(free.numel(), dtype=torch.float64)
        unit[index] = 1.0
        pair = (unit.view_as(free), fixed) if side == "a" else (fixed, unit.view_as(free))
        dense.append(matrix.to_dense(*pair))
    design = torch.stack([(left.T @ d @ right).reshape(-1) for d in dense], dim=1)
    target = (left.T @ problem.weight @ right).reshape(-1)
    solution = torch.from_numpy(np.linalg.lstsq(design.numpy(), target.numpy(), rcond=None)[0])
    return torch.stack(dense, dim=-1) @ solution


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize(("block", "rank"), CASES)
def test_half_steps_match_dense_least_squares(block, rank, outputs, monkeypatch):
    monkeypatch.setattr("kronfold.structures.kronecker.als.CG_STEPS", 400)  # to the end
    spec = KroneckerSpec.for_weight(SHAPE, block, rank)
    problem = Problem.of(normal(*SHAPE), Weighting(moment(8), OUTPUTS[outputs]).checked(SHAPE))
    a, b = with_orthonormal_b(normal(rank, *spec.a, seed=3), normal(rank, *spec.b, seed=4))
    a = a_step(problem, a, b)
    torch.testing.assert_close(matrix.to_dense(a, b), oracle(problem, b, a, "a"), atol=1e-6, rtol=1e-6)
    b, a = with_orthonormal_b(b, a)
    b, error = b_step(problem, a, b)
    torch.testing.assert_close(matrix.to_dense(a, b), oracle(problem, a, b, "b"), atol=1e-6, rtol=1e-6)
    assert error**0.5 == pytest.approx(problem.relative_error(a, b), abs=1e-9)


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_few_conjugate_gradients_never_lose(outputs):
    spec = KroneckerSpec.for_weight(SHAPE, (2, 2), 2)
    problem = Problem.of(normal(*SHAPE), Weighting(moment(8), OUTPUTS[outputs]).checked(SHAPE))
    a, b = normal(2, *spec.a, seed=3), normal(2, *spec.b, seed=4)
    errors = [problem.relative_error(a, b)]
    for _ in range(6):
        a, b, error = sweep(problem, a, b)
        errors.append(error)
    assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(errors))


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize(("block", "rank"), CASES)
def test_planted_sums_are_recovered(block, rank, outputs):
    spec = KroneckerSpec.for_weight(SHAPE, block, rank)
    weight = matrix.to_dense(normal(rank, *spec.a), normal(rank, *spec.b, seed=2))
    weighting = Weighting(moment(8), OUTPUTS[outputs])
    for fit in (nearest_kronecker(weight, spec, weighting), permuted_kronecker(weight, spec, weighting=weighting)):
        assert fit.relative_error < 1e-8
        torch.testing.assert_close(fit.to_dense(), weight, atol=1e-7, rtol=0)


def test_rank_deficient_moments():
    weight, spec = normal(*SHAPE), KroneckerSpec.for_weight(SHAPE, (2, 2), 2)
    for weighting in (Weighting(moment(8, samples=3)), Weighting(moment(8, samples=3), damping=0.0)):
        fit = nearest_kronecker(weight, spec, weighting)
        assert torch.isfinite(fit.to_dense()).all()
        assert fit.relative_error < 0.2 * fit.history[0]
        assert permuted_kronecker(weight, spec, weighting=weighting).relative_error <= fit.relative_error + 1e-9


def test_the_order_of_the_features_does_not_matter():
    """Groups and slots shuffled alike in W, H and G: the same approximation, shuffled."""
    weight, spec, weighting = (
        normal(*SHAPE),
        KroneckerSpec.for_weight(SHAPE, (2, 2), 2),
        Weighting(moment(8), OUTPUTS["full"]),
    )
    rows = torch.tensor([4, 1, 0, 5, 3, 2])[:, None] * 2 + torch.tensor([1, 0])
    cols = torch.tensor([2, 0, 3, 1])[:, None] * 2 + torch.tensor([1, 0])
    rows, cols = rows.reshape(-1), cols.reshape(-1)
    fit = nearest_kronecker(weight, spec, weighting)
    shuffled = nearest_kronecker(weight[rows][:, cols], spec, weighting.arranged(rows, cols))
    torch.testing.assert_close(shuffled.to_dense(), fit.to_dense()[rows][:, cols], atol=1e-8, rtol=0)


@pytest.mark.parametrize("outputs", OUTPUTS)
@pytest.mark.parametrize(("block", "rank"), CASES)
def test_the_weighted_search_beats_refitting_what_the_blind_search_finds(block, rank, outputs):
    spec = KroneckerSpec.for_weight(SHAPE, block, rank)
    weight, weighting = normal(*SHAPE), Weighting(moment(8), OUTPUTS[outputs])
    fit = permuted_kronecker(weight, spec, seed=2, weighting=weighting)
    again = permuted_kronecker(weight, spec, seed=2, weighting=weighting)
    damped = weighting.checked(SHAPE)
    blind = weighted_fit(weight, damped, permuted_kronecker(weight, spec, seed=2))
    assert fit.relative_error <= blind.relative_error + 1e-9
    assert fit.relative_error == pytest.approx(damped.relative_error(weight, fit.to_dense()), abs=1e-9)
    assert all(later <= earlier for earlier, later in itertools.pairwise(fit.history))
    assert fit.history[-1] == fit.relative_error
    assert torch.equal(fit.a, again.a)
    assert fit.history == again.history
    assert (fit.perm_in is None) == (not spec.searches_in)
    assert (fit.perm_out is None) == (not spec.searches_out)


GAINS = [((3, 2), 2, None), ((2, 4), 3, None), ((1, 2), 1, OUTPUTS["diagonal"]), ((1, 4), 2, None)]


@pytest.mark.parametrize(("block", "rank", "outputs"), GAINS)
def test_gains_of_column_moves_are_those_of_refitting(block, rank, outputs):
    shape = (12, 16)
    spec = KroneckerSpec.for_weight(shape, block, rank)
    problem = Problem.of(normal(*shape), Weighting(moment(16), outputs).checked(shape))
    a, b = with_orthonormal_b(normal(rank, *spec.a, seed=3), normal(rank, *spec.b, seed=4))
    a = a_step(problem, a, b)
    before = problem.weighting.squared_error(problem.weight - matrix.to_dense(a, b))
    moves = rearrangements(problem, a, b, torch.Generator().manual_seed(0))
    assert moves
    for move in moves:
        cols = moved(torch.arange(16).view(-1, block[1]), [move]).reshape(-1)
        after = problem.arranged(torch.arange(12), cols)
        residual = after.weight - matrix.to_dense(a_step(after, a, b), b)
        assert move.gain == pytest.approx(before - after.weighting.squared_error(residual), rel=1e-6)


def test_a_tall_embedding_is_weighted_by_its_tokens():
    """Rows that count for nothing have no say in the permutation."""
    tall, frequency = normal(400, 8), torch.zeros(400)
    pairs = normal(200, 4, seed=9)
    tall[:200] = torch.stack([pairs, 0.5 * pairs], dim=-1).reshape(200, 8)[:, [3, 0, 6, 5, 1, 4, 7, 2]]
    frequency[:200] = 1.0
    spec = KroneckerSpec.for_weight((400, 8), (1, 2), permute_out=False)
    fit = permuted_kronecker(tall, spec, weighting=Weighting(moment(8), frequency, damping=1e-9))
    assert fit.relative_error < 1e-3
    assert fit.perm_out is None
    torch.testing.assert_close(fit.to_dense()[:200], tall[:200], atol=1e-3, rtol=0)


@pytest.mark.parametrize(("block", "rank"), [((1, 2), 1), ((1, 4), 2)])
def test_a_tall_weight_reduced_to_its_square_root_is_the_same_problem(block, rank):
    tall, weighting = normal(60, 8), Weighting(moment(8), normal(60, seed=5).exp()).checked((60, 8))
    spec = KroneckerSpec.for_weight((60, 8), block, rank)
    fit = permuted_kronecker(tall, spec, weighting=weighting)
    problem = Problem.of(tall, weighting).arranged(torch.arange(60), fit.perm_in)
    whole = a_step(problem, torch.zeros(rank, *spec.a, dtype=torch.float64), with_orthonormal_b(fit.a, fit.b)[1])
    reduced = WeightedSearch(tall, spec, weighting, Options(0, 1e-3, -1.0, 5))
    assert reduced.is_compact
    state, history = reduced.begin(fit, 0)
    error = problem.relative_error(whole, with_orthonormal_b(fit.a, fit.b)[1])
    assert history[0] == pytest.approx(error, abs=1e-9)
    assert state.error == pytest.approx(error, abs=1e-9)
    assert error - 1e-9 <= fit.relative_error <= 1.001 * error  # a fit ends with a step over the B's


BAD = [
    (Weighting(torch.full((8, 8), float("nan"))), InputError, "input second moment .* holds NaN"),
    (Weighting(torch.eye(6)), ShapeError, r"input second moment is \(6, 6\), but this weight has 8 input features"),
    (Weighting(torch.ones(8)), ShapeError, r"input second moment is \(8,\)"),
    (Weighting(None, torch.ones(8)), ShapeError, r"output second moment is \(8,\), but this weight has 12 output"),
    (Weighting(None, -torch.ones(12)), InputError, "negative"),
    (Weighting(torch.zeros(8, 8)), InputError, "all zeros"),
]


@pytest.mark.parametrize("solve", [nearest_kronecker, permuted_kronecker])
@pytest.mark.parametrize(("weighting", "error", "text"), BAD)
def test_bad_moments_are_named(solve, weighting, error, text):
    with pytest.raises(error, match=text):
        solve(normal(*SHAPE), KroneckerSpec.for_weight(SHAPE, (2, 2)), weighting=weighting)


@pytest.mark.parametrize("scale", [1e-150, 1e20])
def test_the_scale_of_the_weight_does_not_matter(scale):
    spec, weighting = KroneckerSpec.for_weight(SHAPE, (2, 2), 2), Weighting(moment(8))
    fit = nearest_kronecker(normal(*SHAPE), spec, weighting)
    other = nearest_kronecker(normal(*SHAPE) * scale, spec, weighting)
    torch.testing.assert_close(other.to_dense() / scale, fit.to_dense(), atol=1e-8, rtol=0)
