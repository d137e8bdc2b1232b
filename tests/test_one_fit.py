"""One recipe, one text, one seed: every way to fit gives the same weights, bit for bit.

The statistics are kept by the content they were made from, so a route that reads other windows takes its own.
"""

from __future__ import annotations

import pytest
import torch
import yaml
from torch import Tensor

import kronfold as kf
import pico
from kronfold.base.errors import RecipeError
from kronfold.fit.fit import calibrate_on, fit, settings_of
from kronfold.jobs import run_state
from kronfold.jobs.compare import CompareOptions, compare
from kronfold.jobs.compress import compress_to
from kronfold.jobs.run import RunOptions, run
from kronfold.models.linear_view import sites
from kronfold.models.load import load_model, load_tokenizer
from kronfold.planner.plan import Plan
from kronfold.planner.planning import plan_of_shapes

LOW_RANK = {"modules": ["role:attention_in", "role:mlp_in"], "structure": "low_rank", "ratio": 0.5}
KRONECKER = {"modules": "role:mlp_out", "block": [2, 4], "rank": 2, "permute": "none"}
EMBEDDING = {"modules": "role:embedding", "block": [1, 2], "permute": "in"}
RECIPES = {
    "one stage": [{"name": "all", "compress": [LOW_RANK, KRONECKER]}],
    "fewer blocks": [{"name": "all", "layers": [0, 2], "compress": [LOW_RANK]}],
    "two stages": [{"name": "embedding", "compress": [EMBEDDING]}, {"name": "rest", "compress": [LOW_RANK]}],
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("fit")
    pico.model_directory(place / "model", n_layer=3, n_embd=16, n_positions=48)
    (place / "text.txt").write_text(pico.TEXT * 360)
    (place / "eval.txt").write_text(pico.TEXT * 4)
    return place


@pytest.fixture(scope="module", params=RECIPES)
def recipe(request, place):
    name = request.param.replace(" ", "-")
    path = place / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"name": name, "stages": RECIPES[request.param]}))
    return str(path)


@pytest.fixture(scope="module", params=["with text", "blind"])
def calibration(request, place):
    return [str(place / "text.txt")] if request.param == "with text" else []


@pytest.fixture(scope="module")
def weights(place, recipe, calibration) -> dict[str, Tensor]:
    """By `kf.compress`, the first of the routes."""
    return state(kf.compress(load_model(place / "model"), recipe, calibration or None, cache=place / "cache"))


def state(model) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_text_makes_a_difference(place, recipe, weights, calibration):
    blind = state(kf.compress(load_model(place / "model"), recipe))
    assert any(not torch.equal(blind[name], weights[name]) for name in blind) == bool(calibration)


def test_compress(place, recipe, weights, calibration, tmp_path):
    document = compress_to(
        str(place / "model"), str(tmp_path / "out"), recipe, calibration=calibration, cache=place / "cache"
    )
    assert_same(state(load_model(tmp_path / "out")), weights)
    errors = [row["relative_error"] for stage in document["stages"] for row in stage["rows"]]
    assert all(error > 0 for error in errors)


def test_run(place, recipe, weights, calibration, tmp_path):
    options = RunOptions(
        model=str(place / "model"), recipe=recipe, train_text=str(place / "text.txt"),
        eval_text=str(place / "eval.txt"), calibration=calibration, controls=(),
        cache=str(place / "cache"),
    )  # fmt: skip
    document = run(options, tmp_path / "out")
    assert_same(state(load_model(tmp_path / "out")), weights)
    assert document["controls"]["compressed_unhealed"]["perplexity"] == pytest.approx(document["perplexity"], rel=1e-6)


def test_compare_before_healing(place, recipe, weights, calibration, tmp_path, monkeypatch):
    made = []

    def watched(*arguments, **named):
        fitted = fit(*arguments, **named)
        made.append(state(fitted.model))
        return fitted

    monkeypatch.setattr(run_state, "fit", watched)
    compare(
        CompareOptions(
            model=str(place / "model"), recipes=[recipe], train_text=str(place / "text.txt"),
            eval_texts={"eval": str(place / "eval.txt")}, heal_tokens=64, calibration=calibration,
            cache=str(place / "cache"),
        ),
        tmp_path / "out",
    )  # fmt: skip
    assert_same(made[0], weights)


def test_a_stage_at_a_time_is_all_at_once(place, recipe, weights, calibration):
    """As jobs do that heal in between; the argument stays what it was unless it may be used up."""
    teacher = load_model(place / "model")
    before, plan = state(teacher), plan_of_shapes(teacher, recipe)
    measured = None
    if calibration:
        tokenizer = load_tokenizer(str(place / "model"))
        subject = kf.compress(teacher, drops_alone(plan)) if plan.layers else teacher
        measured = calibrate_on(subject, tokenizer, calibration, settings_of(None), cache=place / "cache")
    student = teacher
    for stage in plan.stages:
        fitted = fit(student, stage, measured, last=stage is plan.stages[-1])
        assert (fitted.gathers is None) == (stage is not plan.stages[-1])
        student = fitted.model
    assert_same(state(student), weights)
    assert_same(state(teacher), before)


def drops_alone(plan: Plan) -> Plan:
    first = type(plan.stages[0])(plan.stages[0].name, [], layers=plan.layers)
    return Plan(plan.recipe, "", [first], plan.teacher, plan.teacher)


def test_a_plan_that_does_not_fit_changes_nothing_even_in_place(place):
    teacher = load_model(place / "model")
    plan = plan_of_shapes(teacher, "tqcompressor")
    plan.stages[-1].rows[0].name = "transformer.h.7.mlp.c_fc"
    before = state(teacher)
    with pytest.raises(RecipeError, match="no such weight"):
        fit(teacher, plan, in_place=True)
    assert_same(state(teacher), before)


def test_in_place_is_the_model_itself(place):
    teacher = load_model(place / "model")
    plan = plan_of_shapes(teacher, "tqcompressor")
    fitted = fit(teacher, plan, in_place=True)
    assert fitted.model is teacher
    assert fitted.gathers == plan.gathers
    assert [row.name for stage in fitted.stages for row in stage.rows] == [row.name for row in plan.rows]
    assert all(row.relative_error is None for row in plan.rows)  # the plan that was given stays as it was
    assert any(not view.is_dense for view in sites(teacher).values())


def test_the_dtype_that_is_asked_for_only_rounds(place, tmp_path):
    """`--dtype` rounds what all routes agree on, no more."""
    recipe = place / "low.yaml"
    recipe.write_text(yaml.safe_dump({"name": "low", "stages": RECIPES["one stage"]}))
    text = [str(place / "text.txt")]
    compress_to(
        str(place / "model"),
        str(tmp_path / "out"),
        str(recipe),
        calibration=text,
        cache=place / "cache",
        dtype="bfloat16",
    )
    expected = kf.compress(load_model(place / "model"), str(recipe), text, cache=place / "cache").to(torch.bfloat16)
    assert_same(state(load_model(tmp_path / "out", dtype="auto")), state(expected))
