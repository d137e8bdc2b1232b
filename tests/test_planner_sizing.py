"""Recipes brought to a size: exact counts, nothing left that would still fit, honest notes where it cannot be done."""

from __future__ import annotations

from itertools import product

import pytest

import kronfold as kf
import pico
from kronfold.planner import planning, sizing
from kronfold.planner.recipe import Recipe
from kronfold.planner.sizing import plan_at_size


def recipe(*entries: dict, name: str = "x") -> Recipe:
    stages = [{"name": f"s{i}", "compress": [entry]} for i, entry in enumerate(entries)]
    return Recipe.model_validate({"name": name, "stages": stages})


LOW_RANK = recipe({"modules": ["role:mlp_in", "role:mlp_out"], "structure": "low_rank", "ratio": 0.5})
HALVES = recipe({"modules": ["role:attention_in", "role:mlp_in"], "block": [1, 2], "permute": "none"})
CASES = {"tqcompressor": "tqcompressor", "low rank": LOW_RANK, "halves": HALVES}


@pytest.fixture(scope="module")
def model():
    return pico.gpt2(n_layer=2)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("share", [0.3, 0.6, 0.75, 0.85, 0.95])
def test_the_plan_holds_what_it_says(model, case, share):
    whole = sum(p.numel() for p in model.parameters())
    sized = plan_at_size(model, CASES[case], share * whole)
    student = kf.compress(model, sized.plan)
    assert sum(p.numel() for p in student.parameters()) == sized.plan.held_parameters
    difference = abs(sized.plan.held_parameters - share * whole)
    assert sized.reached == (difference <= sizing.TOLERANCE * share * whole)
    assert ("out of reach" in sized.note) == (not sized.reached)


@pytest.mark.parametrize("share", [0.7, 0.8, 0.9])
def test_nothing_that_would_still_fit_is_left(model, share):
    whole = sum(p.numel() for p in model.parameters())
    plan = plan_at_size(model, LOW_RANK, share * whole, tolerance=0.0).plan
    assert plan.held_parameters <= share * whole
    for row in plan.rows:
        spec = row.spec
        one_more = (spec.rank + 1) * (spec.out_features + spec.in_features - spec.rank - 1)
        assert plan.held_parameters + one_more - row.held_parameters > share * whole


def test_a_plan_of_few_sizes_against_every_choice(model):
    """Rank-one halves come in one size: what is left to choose is which stay dense. Brute force knows the best sum."""
    whole = sum(p.numel() for p in model.parameters())
    written = planning.plan_of_shapes(model, HALVES)
    gains = [row.teacher_parameters - row.held_parameters for row in written.rows]
    for share in (0.85, 0.88, 0.91, 0.94, 0.97):
        totals = [whole - sum(g for g, on in zip(gains, choice, strict=True) if on)
                  for choice in product((0, 1), repeat=len(gains))]  # fmt: skip
        best = max((total for total in totals if total <= share * whole), default=min(totals))
        found = plan_at_size(model, HALVES, share * whole, tolerance=0.0).plan.held_parameters
        smallest_step = min(gains)
        assert best - smallest_step < found <= best


def test_bigger_targets_never_hold_less(model):
    whole = sum(p.numel() for p in model.parameters())
    held = [plan_at_size(model, LOW_RANK, whole * share / 100).plan.held_parameters for share in range(40, 96, 5)]
    assert held == sorted(held)


def test_its_own_size_is_left_as_written(model):
    written = kf.plan(model, "tqcompressor")
    sized = plan_at_size(model, "tqcompressor", written.held_parameters * 1.002)
    assert sized.note == "its own size"
    assert [row.spec for row in sized.plan.rows] == [row.spec for row in written.rows]


def test_notes_say_what_was_turned(model):
    whole = sum(p.numel() for p in model.parameters())
    assert "ranks changed" in plan_at_size(model, LOW_RANK, 0.8 * whole).note
    assert "left dense" in plan_at_size(model, HALVES, 0.97 * whole).note
    assert "at their smallest" in plan_at_size(model, HALVES, 0.2 * whole).note


def test_a_recipe_for_some_blocks_takes_in_others_when_it_must():
    model = pico.gpt2(n_layer=4)
    whole = sum(p.numel() for p in model.parameters())
    odd = recipe({"modules": ["role:mlp_in", "role:mlp_out"], "blocks": "odd", "block": [1, 2], "permute": "none"})
    own = kf.plan(model, odd)
    everywhere = kf.plan(model, recipe({**odd.stages[0].compress[0].model_dump(), "blocks": "all"}))
    middle = (own.held_parameters + everywhere.held_parameters) / 2
    sized = plan_at_size(model, odd, middle, tolerance=0.01)
    assert everywhere.held_parameters < sized.plan.held_parameters <= middle
    assert {row.name for row in own.rows} < {row.name for row in sized.plan.rows}  # its own first, then the others
    assert "taken to the other blocks too" in sized.note
    assert "left dense" in sized.note
    floor = plan_at_size(model, odd, 0.2 * whole)
    assert floor.plan.held_parameters == everywhere.held_parameters
    assert not floor.reached


def test_a_factor_that_is_factored_again_never_stays_dense(model):
    """tqcompressor halves the embedding twice: with the second halving gone, the first must still be there."""
    whole = sum(p.numel() for p in model.parameters())
    plan = plan_at_size(model, "tqcompressor", 0.97 * whole).plan
    assert "transformer.wte" in [row.name for row in plan.stages[0].rows]


@pytest.mark.parametrize("share", [0.3, 0.62, 0.8, 0.95])
def test_truncation_keeps_the_number_of_blocks_that_lands_nearest(share):
    model = pico.gpt2(n_layer=6)
    whole = sum(p.numel() for p in model.parameters())
    block = sum(p.numel() for p in model.transformer.h[0].parameters())
    sized = plan_at_size(model, "short-study-alt", share * whole)
    held = {count: whole - (6 - count) * block for count in range(1, 7)}
    nearest = min(held, key=lambda count: abs(held[count] - share * whole))
    assert len(sized.plan.layers.kept) == nearest
    assert sized.plan.held_parameters == held[nearest]
    assert f"{nearest} of 6 blocks kept" in sized.note
