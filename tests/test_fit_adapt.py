"""Fitting block by block: stages of a recipe, the metric behind an expansion, dense layers that make up for errors."""

from __future__ import annotations

import copy

import pytest
import torch

import pico
from kronfold.base.errors import RecipeError
from kronfold.fit.calibration import Calibration
from kronfold.fit.fit import fit_rows, settings_of
from kronfold.fit.sequential import compress_sequentially
from kronfold.models.calibrate import calibrate
from kronfold.models.linear_view import sites
from kronfold.models.place import overwrite
from kronfold.options.compressing import CompressOptions
from kronfold.planner import planning
from kronfold.planner.recipe import load_recipe
from kronfold.structures.registry import structure_of
from kronfold.structures.weighting import corrected_weight


@pytest.fixture(scope="module")
def windows(teacher):
    return pico.ids(teacher, rows=16, length=32)


@pytest.fixture(scope="module")
def statistics(teacher, windows):
    return calibrate(teacher, windows)


@pytest.fixture(scope="module")
def halved(teacher, windows, statistics):
    """The teacher with its embedding halved twice."""
    student, plan = copy.deepcopy(teacher), planning.plan_of_shapes(teacher, "tqcompressor")
    for stage in (plan.stages[0], plan.stages[2]):
        compress_sequentially(student, stage.rows, statistics, windows[:1])
    return student


@torch.no_grad()
def hidden(model, windows):
    return model.transformer(input_ids=windows, use_cache=False).last_hidden_state


def test_every_stage_of_a_kronecker_recipe(teacher, windows, statistics):
    student, plan = copy.deepcopy(teacher), planning.plan_of_shapes(teacher, "tqcompressor")
    for stage in plan.stages:
        rows = compress_sequentially(student, stage.rows, statistics, windows, reference=teacher)
        assert [row.name for row in rows] == [row.name for row in stage.rows]
        assert all(0 < row.relative_error < 1 for row in rows)
    assert sum(p.numel() for p in student.parameters()) == plan.held_parameters
    assert torch.isfinite(hidden(student, windows)).all()


def test_stored_columns_are_weighted_by_what_their_errors_become(halved, statistics):
    view = sites(halved)["transformer.wte"]
    weighting = statistics.weighting(view, damping=0.0).checked(view.shape)
    outer = statistics.weighting(sites(pico.gpt2())["transformer.wte"], damping=0.0).checked((101, 32))
    error = torch.randn(view.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    behind = error @ view.module.expansion().detach().double()
    assert weighting.squared_error(error) == pytest.approx(outer.squared_error(behind), rel=1e-5)


def test_nothing_to_adapt_to_changes_nothing(teacher, windows, statistics):
    student = copy.deepcopy(teacher)
    assert compress_sequentially(student, [], statistics, windows, adapt=True) == []
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter, teacher.get_parameter(name), atol=1e-4, rtol=1e-3)


def test_adapted_layers_make_up_for_the_embedding(teacher, halved, windows, statistics):
    before, found = hidden(teacher, windows), {}
    for adapt in (False, True):
        student = copy.deepcopy(halved)
        compress_sequentially(student, [], statistics, windows, reference=teacher, adapt=adapt)
        found[adapt] = float((hidden(student, windows) - before).norm())
    assert found[True] < 0.9 * found[False]


def test_a_target_with_drift_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    x, now, lost = (torch.randn(200, n, dtype=torch.float64, generator=generator) for n in (6, 6, 4))
    weight = torch.randn(4, 6, dtype=torch.float64, generator=generator)
    found = corrected_weight(weight, x.T @ now, now.T @ now, 1e-13, drift=lost.T @ now)
    expected = torch.linalg.lstsq(now, x @ weight.T + lost).solution.T
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)


def test_a_part_of_a_fused_layer_is_overwritten_alone(teacher):
    model = copy.deepcopy(teacher)
    view = sites(model)["transformer.h.1.attn.c_attn.k"]
    overwrite(view, torch.ones(32, 32), torch.full((32,), 2.0))
    after = sites(model)
    assert bool((after[view.name].weight() == 1).all())
    assert bool((after[view.name].bias() == 2).all())
    for part in ("q", "v"):
        name = f"transformer.h.1.attn.c_attn.{part}"
        assert torch.equal(after[name].weight(), sites(teacher)[name].weight())


def test_blocks_of_several_rows_take_no_full_output_moment(teacher, statistics):
    plan, views = planning.plan_of_shapes(teacher, "tqcompressor"), sites(teacher)
    ffn, embedding = plan.stages[1].rows[0], plan.stages[0].rows[0]
    wanted = [
        structure_of(row.spec).weighting(row.spec, statistics.weighting(views[row.name])) for row in (ffn, embedding)
    ]
    assert wanted[0].outputs is None
    assert wanted[1].outputs is not None


def test_the_option_of_the_recipe_is_the_argument_of_the_solver(teacher, windows, statistics):
    """`adapt` in a recipe's auto entry: the same model as the solver called with it, another one than without."""
    plain = load_recipe("tqcompressor").without_permutations()
    rows = [row for row in planning.plan_of_shapes(teacher, plain).rows if "mlp" in row.name]
    calibration = Calibration(windows, statistics)
    made = {}
    for adapt in (False, True):
        student = copy.deepcopy(teacher)
        fit_rows(student, rows, calibration, sequential=True, adapt=adapt)
        made[adapt] = student
    direct = copy.deepcopy(teacher)
    compress_sequentially(direct, rows, statistics, windows, adapt=True)
    target = hidden(teacher, windows)
    assert torch.equal(hidden(made[True], windows), hidden(direct, windows))
    assert (hidden(made[True], windows) - target).norm() < (hidden(made[False], windows) - target).norm()


def test_adapting_without_a_sequence_is_refused():
    with pytest.raises(RecipeError, match="set sequential too"):
        settings_of("auto", {"adapt": True})
    assert CompressOptions(model="m", output="o", adapt=True).changes() == {"sequential": True, "adapt": True}
