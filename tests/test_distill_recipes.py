"""Objectives in recipes and on the command line: what they say reaches the training, what is wrong stops everything."""

from __future__ import annotations

import json

import pytest
import yaml

import kronfold as kf
import pico
from kronfold.base.errors import RecipeError
from kronfold.distill import ObjectiveConfig
from kronfold.fit.compress import check_objectives
from kronfold.options.healing import HealConfig
from kronfold.planner.recipe import load_recipe, shipped_recipes


def recipe(place, objective):
    stage = {
        "name": "one",
        "compress": [{"modules": "role:mlp_in", "structure": "low_rank", "ratio": 0.5}],
        "heal": {"tokens": 1000, "objective": objective},
    }
    path = place / "mine.yaml"
    path.write_text(yaml.safe_dump({"name": "mine", "stages": [stage]}))
    return path


def test_options_of_a_method_stand_beside_the_weights(tmp_path):
    written = {"method": "intermediate", "ce": 1, "kl": 0, "embedding": 1, "teacher_layers": [0, 1]}
    loaded = load_recipe(recipe(tmp_path, written))
    expected = ObjectiveConfig(ce=1, kl=0, method="intermediate", options={"embedding": 1, "teacher_layers": [0, 1]})
    assert loaded.stages[0].heal.objective == expected
    assert loaded.with_heal_tokens(10).stages[0].heal.objective == expected
    labels = loaded.stages[0].heal.objective.from_labels_alone().model_dump()
    assert labels == {"ce": 1.0, "kl": 0.0, "temperature": 1.0, "chunk_tokens": 1024, "method": "kd"}


def test_every_shipped_recipe_has_an_objective_that_trains():
    for name in shipped_recipes():
        check_objectives(load_recipe(name))
    assert HealConfig(tokens=1).objective == ObjectiveConfig()


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        ({"hidden": 1}, "hidden: unknown key"),
        ({"temprature": 1}, "temprature: unknown key. Did you mean 'temperature'"),
        ({"ce": 0, "kl": 0}, "nothing to train on"),
        ({"method": "intermediate", "hiden": 1}, "one.heal.objective: Unknown option 'hiden' .* Did you mean 'hidden'"),
        ({"method": "intermediat"}, "Unknown distillation method 'intermediat'. Did you mean 'intermediate'"),
        ({"method": "intermediate", "hidden": -2}, "hidden=-2 must be a finite number"),
        ({"method": "intermediate", "hidden": {"a": 1}}, "hidden must be a number"),
    ],
)
def test_objectives_that_cannot_be_used_stop_the_plan(tmp_path, objective, message):
    with pytest.raises(RecipeError, match=message):
        kf.plan(pico.config(), str(recipe(tmp_path, objective)))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    place = tmp_path_factory.mktemp("files")
    model = pico.model_directory(place / "model", n_layer=2)
    text = place / "text.txt"
    text.write_text(pico.TEXT * 30)
    return model, text


def heal(call, files, output, *arguments):
    model, text = files
    return call(
        "heal", model, "--teacher", model, "--train-text", text, "--heal-tokens", "500",
        "--batch-size", "4", "-o", output, "--device", "cpu", "--json", *arguments,
    )  # fmt: skip


def test_heal_with_a_method(call, files, tmp_path):
    code, out, _ = heal(call, files, tmp_path / "out", "--method", "intermediate", "--method-option", "hidden=0.5",
        "--method-option", "teacher_layers=[0, 1]", "--kl", "0",
    )  # fmt: skip
    assert code == 0
    document = json.loads(out)
    assert document["objective"] == {
        "ce": 0.1, "kl": 0.0, "temperature": 1.0, "chunk_tokens": 1024, "method": "intermediate",
        "hidden": 0.5, "teacher_layers": [0, 1]
    }  # fmt: skip
    assert {"ce", "hidden"} < set(document["stages"][0]["losses"][0])
    assert "kl" not in document["stages"][0]["losses"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "intermediat"], "Did you mean 'intermediate'"),
        (["--method", "intermediate", "--method-option", "hiden=1"], "Did you mean 'hidden'"),
        (["--method-option", "hidden=1"], "hidden: unknown key"),
        (["--method", "intermediate", "--method-option", "hidden"], "must be NAME=VALUE"),
        (["--method", "intermediate", "--method-option", "hidden=[1"], "cannot be read"),
        (["--method", "intermediate", "--method-option", "hidden=1", "--method-option", "hidden=2"], "twice"),
        (["--method", "intermediate", "--method-option", "teacher_layers=[0, 2]"], "Block 2 is out of range"),
    ],
)
def test_a_method_that_cannot_be_used_ends_with_code_2_and_no_output(call, files, tmp_path, arguments, message):
    code, out, err = heal(call, files, tmp_path / "out", *arguments)
    assert code == 2
    assert message in " ".join(err.split())
    assert out == ""
    assert not (tmp_path / "out").exists()
