"""nearest_low_rank against the SVD of the whitened matrix, planted truth and its own error curve."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch

from kronfold.base.errors import InputError, ShapeError
from kronfold.structures.low_rank import LowRankLinear, LowRankSpec, nearest_low_rank, pivoted, tail_energies
from kronfold.structures.weighting import Weighting, root

EXACT = 1e-9
SHAPES = [(12, 20), (20, 12), (9, 9)]


def random_matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size: int, rank: int, seed: int) -> torch.Tensor:
    """E[x xᵀ] of `rank` samples with unequal scales."""
    samples = random_matrix(rank, size, seed=seed) * torch.logspace(0, -2, size, dtype=torch.float64)
    return samples.T @ samples / rank


def square_root(matrix: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(scipy.linalg.sqrtm(matrix.numpy()).real)


WEIGHTINGS = {
    "none": lambda shape: None,
    "inputs": lambda shape: Weighting(moment(shape[1], 60, 1)),
    "outputs": lambda shape: Weighting(None, moment(shape[0], 60, 2)),
    "both": lambda shape: Weighting(moment(shape[1], 60, 1), moment(shape[0], 60, 2)),
    "deficient": lambda shape: Weighting(moment(shape[1], 4, 1), moment(shape[0], 5, 2)),
}


@pytest.mark.parametrize("kind", WEIGHTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_error_is_the_tail_of_the_whitened_singular_values(shape, kind):
    weight, weighting = random_matrix(*shape), WEIGHTINGS[kind](shape)
    damped = (weighting or Weighting()).checked(shape)
    h = torch.eye(shape[1], dtype=torch.float64) if damped.inputs is None else damped.inputs
    g = torch.eye(shape[0], dtype=torch.float64) if damped.outputs is None else damped.outputs
    values = torch.linalg.svdvals(square_root(g) @ weight @ square_root(h))
    energies = tail_energies(weight, damped)
    assert energies.shape == (min(shape) + 1,)
    for rank in range(1, min(shape) + 1):
        fit = nearest_low_rank(weight, LowRankSpec(*shape, rank), weighting)
        delta = weight - fit.to_dense()
        squared = float(torch.trace(g @ delta @ h @ delta.T))
        expected = float(values[rank:].square().sum())
        total = float(values.square().sum())
        assert squared == pytest.approx(expected, abs=1e-10 * total)
        assert float(energies[rank]) == pytest.approx(squared, abs=1e-10 * total)
        assert fit.relative_error == pytest.approx((max(0.0, squared) / total) ** 0.5, abs=1e-6)
        assert fit.history == [fit.relative_error]
    assert float(energies[0]) == pytest.approx(total)


@pytest.mark.parametrize("kind", WEIGHTINGS)
@pytest.mark.parametrize("shape", SHAPES)
def test_planted_low_rank_is_recovered(shape, kind):
    for rank in (1, 4):
        weight = random_matrix(shape[0], rank, seed=3) @ random_matrix(rank, shape[1], seed=4)
        for asked in (rank, rank + 3):  # a rank above the true one must not hurt
            fit = nearest_low_rank(weight, LowRankSpec(*shape, asked), WEIGHTINGS[kind](shape))
            assert (weight - fit.to_dense()).norm() < EXACT * weight.norm()
            assert torch.isfinite(fit.mix).all()


def test_undamped_deficient_moment_is_fitted_where_it_has_mass():
    """Without damping H = X Xᵀ of few samples: the outputs on those samples are what counts."""
    weight = random_matrix(12, 20)
    for count in (1, 3, 8):
        samples = random_matrix(20, count, seed=5)
        fit = nearest_low_rank(weight, LowRankSpec(12, 20, count), Weighting(samples @ samples.T, damping=0.0))
        assert (weight @ samples - fit.to_dense() @ samples).norm() < 1e-6 * (weight @ samples).norm()
        assert fit.to_dense().norm() < 2 * weight.norm()


@pytest.mark.parametrize("size", [6, 13])
@pytest.mark.parametrize("lacking", [0, 1, 2])
def test_root_and_inverse_of_deficient_moments(size, lacking):
    for seed in range(20):
        samples = random_matrix(size, size - lacking, seed=seed)
        matrix = samples @ samples.T
        factor, inverse = root(matrix)
        torch.testing.assert_close(factor @ factor.T, matrix, rtol=0, atol=1e-11)
        torch.testing.assert_close(factor @ inverse @ matrix, matrix, rtol=0, atol=1e-8)
        smallest = float(torch.linalg.eigvalsh(matrix)[lacking])
        assert inverse.norm() <= 1.01 * (size / smallest) ** 0.5


@pytest.mark.parametrize(("out_features", "rank"), [(12, 3), (12, 12), (7, 1)])
def test_pivot_form_is_the_product_of_the_factors(out_features, rank):
    left, right = random_matrix(out_features, rank, seed=1), random_matrix(rank, 20, seed=2)
    pivots, mix, gather = pivoted(left, right)
    assert pivots.shape == (rank, 20)
    assert mix.shape == (out_features - rank, rank)
    product = left @ right
    torch.testing.assert_close(torch.cat([pivots, mix @ pivots])[gather], product, rtol=0, atol=EXACT)
    own_rows = (product[None] - pivots[:, None]).norm(dim=2).min(dim=1).values
    assert own_rows.max() < EXACT  # the pivots are rows of the product


def test_layer_holds_the_fit():
    weight, bias = random_matrix(12, 20), random_matrix(12)
    fit = nearest_low_rank(weight, LowRankSpec(12, 20, 5))
    layer = LowRankLinear.from_fit(fit, bias, torch.float64)
    torch.testing.assert_close(layer.dense_weight(), fit.to_dense(), rtol=0, atol=1e-12)
    assert torch.equal(layer.bias, bias)
    assert LowRankLinear.from_fit(fit).bias is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_weights_are_solved_in_float64(dtype):
    weight = random_matrix(12, 20).to(dtype)
    spec = LowRankSpec(12, 20, 3)
    fit = nearest_low_rank(weight, spec, Weighting(moment(20, 60, 1).float()))
    assert fit.pivots.dtype == torch.float64
    again = nearest_low_rank(weight.double(), spec, Weighting(moment(20, 60, 1).float()))
    assert fit.relative_error == again.relative_error


GOOD = random_matrix(6, 8)
BAD = [
    (random_matrix(8, 6), None, ShapeError, "describes a weight"),
    (GOOD.index_fill(0, torch.tensor([1]), float("nan")), None, InputError, "NaN or infinite"),
    (torch.zeros(6, 8), None, InputError, "all zeros"),
    (GOOD, Weighting(torch.eye(6)), ShapeError, "input second moment.*8 input features"),
    (GOOD, Weighting(None, torch.eye(8)), ShapeError, "output second moment.*6 output features"),
    (GOOD, Weighting(torch.full((8, 8), float("nan"))), InputError, "input second moment.*NaN"),
    (GOOD, Weighting(None, torch.full((6, 6), float("inf"))), InputError, "output second moment.*infinite"),
    (GOOD, Weighting(-torch.eye(8)), InputError, "negative"),
    (GOOD, Weighting(torch.zeros(8, 8)), InputError, "never used this weight"),
]


@pytest.mark.parametrize(("weight", "weighting", "error", "text"), BAD)
def test_what_cannot_be_fitted_is_named(weight, weighting, error, text):
    with pytest.raises(error, match=text):
        nearest_low_rank(weight, LowRankSpec(6, 8, 2), weighting)
