"""Krony-PT's two starts: the nearest sum rescaled, and half of the weight's own entries."""

from __future__ import annotations

import json

import pytest
import torch

import kronfold as kf
import pico
from kronfold.base.errors import InputError, RecipeError, ShapeError
from kronfold.decompose.weighting import Weighting
from kronfold.options import read
from kronfold.planner.plan import Plan
from kronfold.planner.recipe import Recipe
from kronfold.structures.kronecker import KroneckerSpec, nearest_kronecker, pruned_kronecker, with_equal_entries


def weight(rows=12, columns=8) -> torch.Tensor:
    return torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def recipe(**changes) -> Recipe:
    entry = {"modules": "role:mlp_in", "block": [1, 2], "permute": "none", **changes}
    return read(Recipe, {"name": "mine", "stages": [{"name": "one", "compress": [entry]}]}, "Recipe mine")


@pytest.mark.parametrize("rank", [1, 3])
def test_equal_entries_keep_the_product(rank):
    nearest = nearest_kronecker(weight(), KroneckerSpec((6, 4), (2, 2), rank))
    scaled = with_equal_entries(nearest)
    torch.testing.assert_close(scaled.to_dense(), nearest.to_dense(), rtol=0, atol=1e-12)
    rms = [factor.square().mean(dim=(1, 2)).sqrt() for factor in (scaled.a, scaled.b)]
    torch.testing.assert_close(rms[0], rms[1], rtol=1e-12, atol=0)
    # by hand: norms are equal before, so rms(A)/rms(B) = sqrt(4 / 24); its fourth root is the factor on A
    torch.testing.assert_close(scaled.a, nearest.a * (24 / 4) ** 0.25, rtol=1e-12, atol=0)
    assert scaled.relative_error == nearest.relative_error


def test_equal_entries_of_a_term_that_is_not_needed():
    planted = torch.kron(weight(6, 4), weight(2, 2))
    scaled = with_equal_entries(nearest_kronecker(planted, KroneckerSpec((6, 4), (2, 2), 2)))
    assert torch.isfinite(scaled.a).all()
    assert torch.isfinite(scaled.b).all()
    torch.testing.assert_close(scaled.to_dense(), planted, rtol=0, atol=1e-9)
    scaled = with_equal_entries(pruned_kronecker(torch.eye(4, dtype=torch.float64), KroneckerSpec((2, 2), (2, 2), 2)))
    torch.testing.assert_close(scaled.to_dense(), torch.diag(torch.tensor([1.0, 0, 1, 0]).double()))


@pytest.mark.parametrize(
    ("block", "kept"),
    [((1, 2), (slice(None), slice(0, None, 2))), ((2, 1), (slice(0, None, 2), slice(None)))],
)
def test_pruning_keeps_the_even_half(block, kept):
    full = weight()
    fit = pruned_kronecker(full, KroneckerSpec.for_weight((12, 8), block))
    expected = torch.zeros_like(full)
    expected[kept] = full[kept]
    assert torch.equal(fit.to_dense(), expected)
    assert torch.equal(fit.a[0], full[kept])
    error = float((full - expected).norm() / full.norm())
    assert fit.relative_error == pytest.approx(error, abs=1e-12)
    nearest = nearest_kronecker(full, fit.spec)
    assert nearest.relative_error < fit.relative_error


def test_pruning_of_more_terms_keeps_more():
    full = weight()
    fit = pruned_kronecker(full, KroneckerSpec((6, 4), (2, 2), 3))
    naive = full.clone()
    naive[1::2, 1::2] = 0
    assert torch.equal(fit.to_dense(), naive)
    assert torch.equal(pruned_kronecker(full, KroneckerSpec((6, 4), (2, 2), 4)).to_dense(), full)


def test_pruning_reports_the_weighted_error():
    full, moment = weight(), torch.diag(torch.arange(1.0, 9.0)).double()
    weighting = Weighting(inputs=moment, damping=0.0)
    fit = pruned_kronecker(full, KroneckerSpec((12, 4), (1, 2)), weighting)
    lost = (full[:, 1::2].square() * moment.diagonal()[1::2]).sum() / (full.square() * moment.diagonal()).sum()
    assert fit.relative_error == pytest.approx(float(lost.sqrt()), abs=1e-12)


@pytest.mark.parametrize("broken", [torch.full((12, 8), float("nan")), torch.zeros(12, 8)])
def test_pruning_refuses_broken_weights(broken):
    with pytest.raises(InputError):
        pruned_kronecker(broken, KroneckerSpec((12, 4), (1, 2)))
    with pytest.raises(ShapeError):
        pruned_kronecker(weight(6, 8), KroneckerSpec((12, 4), (1, 2)))


def test_a_recipe_chooses_the_start(teacher, tmp_path):
    students = {init: kf.compress(teacher, recipe(init=init)) for init in ("van_loan", "modified_van_loan", "pruning")}
    layers = {init: student.transformer.h[0].mlp.c_fc for init, student in students.items()}
    own = teacher.transformer.h[0].mlp.c_fc.weight.T
    assert torch.equal(layers["pruning"].dense_weight()[:, ::2], own[:, ::2])
    assert not layers["pruning"].dense_weight()[:, 1::2].any()
    nearest = layers["van_loan"].dense_weight()
    torch.testing.assert_close(layers["modified_van_loan"].dense_weight(), nearest, rtol=0, atol=1e-6)
    assert not torch.allclose(layers["modified_van_loan"].b, layers["van_loan"].b)
    # what a checkpoint says of the layer is the same; how it was fitted is said by the plan
    specs = {json.dumps(layer.to_spec()) for layer in layers.values()}
    assert len(specs) == 1
    made = kf.plan(teacher, recipe(init="pruning"))
    assert {row.spec["init"] for row in made.rows} == {"pruning"}
    made.save(tmp_path / "plan.json")
    again = kf.compress(teacher, Plan.load(tmp_path / "plan.json"))
    assert torch.equal(again.transformer.h[0].mlp.c_fc.dense_weight(), layers["pruning"].dense_weight())
    assert "init" not in kf.plan(teacher, recipe(), errors=False).rows[0].spec


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "prunning"}, "init: Input should be 'van_loan', 'modified_van_loan' or 'pruning'"),
        ({"init": "pruning", "permute": "in"}, "say `permute: none`"),
        ({"init": "pruning", "structure": "low_rank", "rank": 2}, "init belongs to structure kronecker"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(RecipeError, match=message):
        kf.plan(pico.config(), recipe(**changes))
