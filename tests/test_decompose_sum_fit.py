"""Backfitting against planted sums, the single structures at the same share, and by measured error."""

from __future__ import annotations

import pytest
import torch

from kronfold.base.errors import InputError, ShapeError
from kronfold.base.specs import LowRankSpec, SumSpec
from kronfold.decompose.low_rank import nearest_low_rank
from kronfold.decompose.sum_fit import sum_fit
from kronfold.decompose.weighting import Weighting
from kronfold.nn import SumLinear
from kronfold.structures.kronecker import KroneckerSpec, nearest_kronecker

SHAPE = (24, 32)
LOW = LowRankSpec(*SHAPE, 3)
KRONECKER = KroneckerSpec.for_weight(SHAPE, (2, 2), 1)
OTHER = KroneckerSpec.for_weight(SHAPE, (6, 8), 2)


def random_matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def planted_low_rank() -> torch.Tensor:
    return random_matrix(24, 3, seed=1) @ random_matrix(3, 32, seed=2)


def planted_kronecker() -> torch.Tensor:
    return torch.kron(random_matrix(12, 16, seed=3), random_matrix(2, 2, seed=4))


def moments() -> Weighting:
    x = random_matrix(200, 32, seed=5) * torch.logspace(0, -1.5, 32, dtype=torch.float64)
    g = random_matrix(200, 24, seed=6) * torch.logspace(0, -1.0, 24, dtype=torch.float64)
    return Weighting(x.T @ x / 200, g.T @ g / 200)


SUMS = {
    "low rank, Kronecker": ((LOW, KRONECKER), (nearest_low_rank, nearest_kronecker)),
    "Kronecker, low rank": ((KRONECKER, LOW), (nearest_kronecker, nearest_low_rank)),
    "two Kronecker": ((KRONECKER, OTHER), (nearest_kronecker, nearest_kronecker)),
    "three": ((LOW, KRONECKER, OTHER), (nearest_low_rank, nearest_kronecker, nearest_kronecker)),
}
each = pytest.mark.parametrize("name", SUMS)


@each
@pytest.mark.parametrize("weighting", [None, moments()], ids=["plain", "weighted"])
def test_error_is_measured_never_rises_and_beats_every_single_term(name, weighting):
    weight = random_matrix(*SHAPE)
    terms, fits = SUMS[name]
    fit = sum_fit(weight, SumSpec(terms), fits, weighting)
    metric = (weighting or Weighting()).checked(SHAPE)
    assert fit.relative_error == pytest.approx(metric.relative_error(weight, fit.to_dense()), abs=1e-9)
    assert fit.history[-1] == fit.relative_error
    assert all(later <= earlier for earlier, later in zip(fit.history, fit.history[1:], strict=False))
    for spec, solve in zip(terms, fits, strict=True):
        assert fit.relative_error < solve(weight, spec, weighting).relative_error
    layer = SumLinear.from_fit(fit, dtype=torch.float64)
    torch.testing.assert_close(layer.dense_weight(), fit.to_dense(), rtol=0, atol=1e-12)
    assert sum(p.numel() for p in layer.parameters()) == SumSpec(terms).held_parameters


@pytest.mark.parametrize("name", ["low rank, Kronecker", "Kronecker, low rank"])
@pytest.mark.parametrize("weighting", [None, moments()], ids=["plain", "weighted"])
def test_planted_sum_is_recovered_up_to_its_noise(name, weighting):
    noise = 0.1 * random_matrix(*SHAPE, seed=9)
    weight = planted_low_rank() + planted_kronecker() + noise
    terms, fits = SUMS[name]
    fit = sum_fit(weight, SumSpec(terms), fits, weighting, sweeps=200)
    floor = (weighting or Weighting()).checked(SHAPE).relative_error(weight, weight - noise)
    assert fit.relative_error <= 1.01 * floor


def test_planted_sum_without_noise_is_recovered(monkeypatch):
    monkeypatch.setattr("kronfold.decompose.sum_fit.TOLERANCE", 0.0)
    weight = planted_low_rank() + planted_kronecker()
    terms, fits = SUMS["low rank, Kronecker"]
    fit = sum_fit(weight, SumSpec(terms), fits, sweeps=400)
    assert (weight - fit.to_dense()).norm() < 1e-6 * weight.norm()


def test_a_solver_that_makes_things_worse_is_not_followed():
    """Random low-rank matrices after the first call: the first fits stay."""
    weight, calls = random_matrix(*SHAPE), []

    def careless(target, spec, weighting):
        calls.append(1)
        return nearest_low_rank(target if len(calls) == 1 else random_matrix(*SHAPE, seed=len(calls)), spec, weighting)

    fit = sum_fit(weight, SumSpec((LOW, LOW)), (careless, nearest_low_rank))
    assert all(later <= earlier for earlier, later in zip(fit.history, fit.history[1:], strict=False))
    six = nearest_low_rank(weight, LowRankSpec(*SHAPE, 6))  # two of rank 3, one after the other, are one of rank 6
    assert fit.relative_error == pytest.approx(six.relative_error, abs=1e-9)


def test_equal_input_gives_equal_output_in_any_dtype():
    weight = random_matrix(*SHAPE).to(torch.bfloat16)
    terms, fits = SUMS["three"]
    first, again = (sum_fit(w, SumSpec(terms), fits) for w in (weight, weight.double()))
    assert torch.equal(first.to_dense(), again.to_dense())


GOOD = random_matrix(*SHAPE)
BAD = [
    (random_matrix(32, 24), None, ShapeError, "describes a weight"),
    (GOOD.index_fill(0, torch.tensor([1]), float("nan")), None, InputError, "NaN or infinite"),
    (torch.zeros(SHAPE), None, InputError, "all zeros"),
    (GOOD, Weighting(torch.eye(24)), ShapeError, "32 input features"),
    (GOOD, Weighting(None, torch.full((24, 24), float("nan"))), InputError, "NaN"),
]


@pytest.mark.parametrize(("weight", "weighting", "error", "text"), BAD)
def test_what_cannot_be_fitted_is_named(weight, weighting, error, text):
    terms, fits = SUMS["low rank, Kronecker"]
    with pytest.raises(error, match=text):
        sum_fit(weight, SumSpec(terms), fits, weighting)


def test_a_weight_that_the_first_term_gives_exactly():
    weight = torch.zeros(SHAPE, dtype=torch.float64)
    weight[0, 0] = 1.0
    with pytest.raises(InputError, match="nothing is left for term 1"):
        sum_fit(weight, SumSpec((LOW, KRONECKER)), (nearest_low_rank, nearest_kronecker))
