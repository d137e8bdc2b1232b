"""nearest_kronecker against singular values, planted truth and tensorly."""

from __future__ import annotations

import numpy as np
import pytest
import tensorly.decomposition
import torch

from kronfold.base.errors import InputError, ShapeError
from kronfold.structures.kronecker import KroneckerSpec, matrix, nearest_kronecker, nearest_kronecker_batch, van_loan

EXACT = 1e-9  # float64; measured at most 2e-13

# shape, block, rank: tall, wide, square, block 1 on either side, block larger than A, full rank
SHAPES = [
    ((12, 20), (2, 5), 1),
    ((12, 20), (2, 5), 4),
    ((12, 20), (1, 2), 2),
    ((12, 20), (3, 1), 3),
    ((24, 8), (6, 4), 3),
    ((24, 8), (12, 8), 2),
    ((9, 9), (3, 3), 9),
    ((5, 7), (1, 1), 1),
    ((5, 7), (5, 7), 1),
]


def random_matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("shape", "block", "rank"), SHAPES)
def test_error_is_the_tail_of_the_singular_values(shape, block, rank):
    weight = random_matrix(*shape)
    spec = KroneckerSpec.for_weight(shape, block, rank)
    fit = nearest_kronecker(weight, spec)
    values = torch.linalg.svdvals(matrix.rearrange(weight, *block))
    expected = float(values[rank:].norm() / values.norm())
    assert fit.relative_error == pytest.approx(expected, abs=EXACT)
    measured = float((weight - fit.to_dense()).norm() / weight.norm())
    assert fit.relative_error == pytest.approx(measured, abs=EXACT)
    assert fit.history == [fit.relative_error]
    assert fit.perm_in is None
    assert fit.perm_out is None


@pytest.mark.parametrize("gram_size", [1024, 2])
@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-5])
def test_planted_sums_are_recovered(gram_size, spread, monkeypatch):
    # gram_size 2 forces the routes without a Gram matrix; spread is the size of each term over the one before
    monkeypatch.setattr(van_loan, "GRAM_SIZE", gram_size)
    for rank in (1, 2, 3):
        a = random_matrix(rank, 8, 6, seed=1) * spread ** torch.arange(rank).view(-1, 1, 1)
        weight = matrix.to_dense(a, random_matrix(rank, 5, 4, seed=2))
        fit = nearest_kronecker(weight, KroneckerSpec(a=(8, 6), b=(5, 4), rank=rank))
        assert fit.relative_error < EXACT
        torch.testing.assert_close(fit.to_dense(), weight, rtol=0, atol=EXACT * float(weight.norm()))


@pytest.mark.parametrize("scale", [1e-150, 1e-30, 1e30, 1e150])
def test_scale_of_the_weight_does_not_matter(scale):
    weight = random_matrix(12, 20)
    spec = KroneckerSpec(a=(6, 4), b=(2, 5), rank=2)
    assert nearest_kronecker(weight * scale, spec).relative_error == pytest.approx(
        nearest_kronecker(weight, spec).relative_error, abs=EXACT
    )


@pytest.mark.parametrize("gram_size", [1024, 2])
def test_wide_and_square_rearrangements_agree_with_the_svd(gram_size, monkeypatch):
    monkeypatch.setattr(van_loan, "GRAM_SIZE", gram_size)
    for shape, block in (((40, 60), (20, 15)), ((60, 60), (6, 10)), ((36, 30), (6, 5))):
        weight = random_matrix(*shape)
        values = torch.linalg.svdvals(matrix.rearrange(weight, *block))
        fit = nearest_kronecker(weight, KroneckerSpec.for_weight(shape, block, 2))
        assert fit.relative_error == pytest.approx(float(values[2:].norm() / values.norm()), abs=EXACT)


def test_agrees_with_tensor_train_matrices():
    # A 2-core TT matrix of rank r is a sum of r Kronecker products (tensorly: independent code)
    weight = random_matrix(12, 20)
    for rank in (1, 2, 5):
        tensor = weight.view(4, 3, 5, 4)  # (out_a, out_b, in_a, in_b)
        train = tensorly.decomposition.tensor_train_matrix(tensor.numpy(), rank=[1, rank, 1])
        error = np.linalg.norm(train.to_matrix() - weight.numpy()) / float(weight.norm())
        fit = nearest_kronecker(weight, KroneckerSpec(a=(4, 5), b=(3, 4), rank=rank))
        assert fit.relative_error == pytest.approx(error, abs=EXACT)
        np.testing.assert_allclose(fit.to_dense().numpy(), train.to_matrix(), atol=1e-9)


def test_factors_are_balanced_ordered_and_signed():
    fit = nearest_kronecker(random_matrix(12, 20), KroneckerSpec(a=(6, 4), b=(2, 5), rank=4))
    a, b = fit.a.flatten(1), fit.b.flatten(1)
    torch.testing.assert_close(a.norm(dim=1), b.norm(dim=1), rtol=1e-12, atol=0)
    assert (a.norm(dim=1).diff() <= 0).all()
    assert (b.gather(1, b.abs().argmax(1, keepdim=True)) > 0).all()
    assert fit.a.shape == (4, 6, 4)
    assert fit.b.shape == (4, 2, 5)
    assert fit.a.dtype == torch.float64


def test_terms_that_are_not_needed_are_zero_and_finite():
    weight = torch.kron(random_matrix(4, 3), torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64))
    fit = nearest_kronecker(weight, KroneckerSpec(a=(4, 3), b=(2, 2), rank=3))
    assert torch.isfinite(fit.a).all()
    assert torch.isfinite(fit.b).all()
    assert fit.a[1:].abs().max() < 1e-7
    assert fit.relative_error < EXACT


def test_batch_equals_single_and_chunks_change_nothing(monkeypatch):
    weights = random_matrix(3, 24, 20)
    spec = KroneckerSpec(a=(12, 10), b=(2, 2), rank=2)
    single = [nearest_kronecker(w, spec) for w in weights]
    monkeypatch.setattr(van_loan, "CHUNK_NUMBERS", 64)
    for fits in (nearest_kronecker_batch(weights, spec), nearest_kronecker_batch(list(weights), spec)):
        for one, many in zip(single, fits, strict=True):
            torch.testing.assert_close(one.to_dense(), many.to_dense(), rtol=0, atol=1e-12)
            assert one.relative_error == pytest.approx(many.relative_error, abs=1e-12)
    assert nearest_kronecker_batch([], spec) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_weights_are_solved_in_float64(dtype):
    weight = random_matrix(12, 20).to(dtype).requires_grad_()
    spec = KroneckerSpec(a=(6, 4), b=(2, 5), rank=3)
    fit = nearest_kronecker(weight, spec)
    assert fit.relative_error == nearest_kronecker(weight.double(), spec).relative_error
    assert not fit.a.requires_grad


SPEC = KroneckerSpec(a=(4, 3), b=(2, 2))
GOOD = random_matrix(8, 6)
BAD = [
    (torch.full((8, 6), float("nan")), InputError, "NaN or infinite"),
    (GOOD.index_fill(0, torch.tensor([1]), float("inf")), InputError, "6 values that are NaN or infinite"),
    (torch.zeros(8, 6), InputError, "all zeros"),
    (torch.ones(8, 6, dtype=torch.int8), InputError, "floating-point"),
    (random_matrix(6, 8), ShapeError, "With b=\\(2, 2\\) use a=\\(3, 4\\)"),
    (random_matrix(8, 7), ShapeError, "nearest allowed"),
    (random_matrix(48), ShapeError, "must be a matrix"),
    (random_matrix(2, 8, 6), ShapeError, "must be a matrix"),
]


@pytest.mark.parametrize(("weight", "error", "text"), BAD)
def test_bad_weights_are_named(weight, error, text):
    with pytest.raises(error, match=text):
        nearest_kronecker(weight, SPEC)
    with pytest.raises(error, match=text):
        nearest_kronecker_batch([GOOD, weight], SPEC)
