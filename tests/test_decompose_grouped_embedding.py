"""grouped_embedding against a weighted SVD of every group, and its own error curves."""

from __future__ import annotations

import pytest
import scipy.linalg
import torch

from kronfold.base.errors import InputError, ShapeError
from kronfold.structures.grouped_embedding import (
    GroupedEmbedding,
    GroupedEmbeddingSpec,
    group_energies,
    grouped_embedding,
)
from kronfold.structures.weighting import Weighting

SPEC = GroupedEmbeddingSpec((6, 14, 20), (4, 5, 2), 8)


def random_matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def weight():
    return random_matrix(40, 8)


@pytest.fixture(scope="module")
def frequencies():
    generator = torch.Generator().manual_seed(7)
    return (1 / torch.arange(1, 41, dtype=torch.float64))[torch.randperm(40, generator=generator)]


@pytest.fixture(scope="module")
def metric():
    samples = random_matrix(30, 8, seed=1) * torch.logspace(0, -1, 8, dtype=torch.float64)
    return samples.T @ samples


@pytest.mark.parametrize("with_metric", [False, True])
def test_each_group_is_the_best_of_its_rank(weight, frequencies, metric, with_metric):
    weighting = Weighting(metric if with_metric else None, frequencies, damping=0.0)
    fit = grouped_embedding(weight, SPEC, weighting)
    m = metric if with_metric else torch.eye(8, dtype=torch.float64)
    half = torch.from_numpy(scipy.linalg.sqrtm(m.numpy()).real)
    order = sorted(range(40), key=lambda v: -float(frequencies[v]))
    curves = group_energies(weight, SPEC.sizes, weighting)
    lost = 0.0
    for i, (start, size, rank) in enumerate(zip((0, 6, 20), SPEC.sizes, SPEC.ranks, strict=True)):
        tokens = torch.tensor(order[start : start + size])
        scaled = frequencies[tokens].sqrt()[:, None] * weight[tokens] @ half
        values = torch.linalg.svdvals(scaled)
        delta = frequencies[tokens].sqrt()[:, None] * (weight - fit.to_dense())[tokens] @ half
        expected = float(values[rank:].square().sum())
        assert float(delta.square().sum()) == pytest.approx(expected, abs=1e-10)
        tails = torch.stack([values[r:].square().sum() for r in range(9)])
        torch.testing.assert_close(curves[i], tails, rtol=1e-9, atol=1e-10)
        assert torch.linalg.matrix_rank(fit.to_dense()[tokens], rtol=1e-9) == min(rank, size)
        lost += expected
    total = float((frequencies.sqrt()[:, None] * weight @ half).square().sum())
    assert fit.relative_error == pytest.approx((lost / total) ** 0.5, abs=1e-9)
    assert fit.history == [fit.relative_error]


def test_frequencies_order_the_groups_and_ties_keep_theirs(weight, frequencies):
    fit = grouped_embedding(weight, SPEC, Weighting(None, frequencies))
    assert torch.equal(torch.argsort(fit.position), torch.argsort(frequencies, descending=True))
    assert torch.equal(grouped_embedding(weight, SPEC).position, torch.arange(40))
    equal = Weighting(None, torch.full((40,), 3.0))
    assert torch.equal(grouped_embedding(weight, SPEC, equal).position, torch.arange(40))
    scaled = grouped_embedding(weight, SPEC, Weighting(None, 1e6 * frequencies))
    torch.testing.assert_close(scaled.to_dense(), fit.to_dense(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("ranks", [(6, 5, 2), (6, 8, 8), (1, 1, 1)])
def test_the_module_holds_the_fit(weight, frequencies, metric, ranks):
    spec = GroupedEmbeddingSpec((6, 14, 20), ranks, 8)
    fit = grouped_embedding(weight, spec, Weighting(metric, frequencies))
    module = GroupedEmbedding.from_fit(fit, torch.float64)
    torch.testing.assert_close(module.dense_weight(), fit.to_dense(), rtol=0, atol=1e-12)
    for i, rank in enumerate(ranks):
        if rank >= min(8, spec.sizes[i]):
            tokens = torch.argsort(fit.position).split(spec.sizes)[i]
            torch.testing.assert_close(fit.to_dense()[tokens], weight[tokens], rtol=0, atol=1e-9)


def test_planted_groups_are_recovered(frequencies):
    order = torch.argsort(frequencies, descending=True)
    weight = torch.empty(40, 8, dtype=torch.float64)
    for i, (tokens, rank) in enumerate(zip(order.split([6, 14, 20]), (4, 5, 2), strict=True)):
        weight[tokens] = random_matrix(len(tokens), rank, seed=2 * i) @ random_matrix(rank, 8, seed=2 * i + 1)
    fit = grouped_embedding(weight, GroupedEmbeddingSpec((6, 14, 20), (4, 5, 2), 8), Weighting(None, frequencies))
    assert (weight - fit.to_dense()).norm() < 1e-9 * weight.norm()


def test_a_group_of_zero_rows_is_kept(weight):
    """Padding rows of a vocabulary may all be zero."""
    padded = weight.clone()
    padded[20:] = 0
    fit = grouped_embedding(padded, GroupedEmbeddingSpec((6, 14, 20), (6, 5, 2), 8))
    assert torch.equal(fit.to_dense()[20:], padded[20:])
    assert torch.isfinite(fit.to_dense()).all()


def _with(values: torch.Tensor, entry: float) -> torch.Tensor:
    return values.index_fill(0, torch.tensor([3]), entry)


ONES = torch.ones(40, dtype=torch.float64)
BAD = [
    (Weighting(None, torch.ones(39)), ShapeError, "do not fit an embedding of 40 tokens"),
    (Weighting(None, _with(ONES, float("nan"))), InputError, "frequencies.*NaN"),
    (Weighting(None, _with(ONES, float("inf"))), InputError, "frequencies.*infinite"),
    (Weighting(None, _with(ONES, -1.0)), InputError, "frequencies.*negative"),
    (Weighting(None, 0 * ONES), InputError, "frequencies.*zero"),
    (Weighting(torch.eye(7)), ShapeError, "8 input features"),
    (Weighting(torch.full((8, 8), float("nan"))), InputError, "NaN"),
]


@pytest.mark.parametrize(("weighting", "error", "text"), BAD)
def test_statistics_that_do_not_fit_are_named(weight, weighting, error, text):
    with pytest.raises(error, match=text):
        grouped_embedding(weight, SPEC, weighting)
    with pytest.raises(error, match=text):
        group_energies(weight, SPEC.sizes, weighting)
