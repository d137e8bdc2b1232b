"""The pipeline absorbs what the plan foretells."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

import kronfold as kf
import pico
from absorb_models import (
    assert_equal_logits,
    double,
    run,
)
from kronfold.fit.fit import absorb_gathers, fit_rows, gathers_of
from kronfold.models import absorb as ab
from kronfold.models.cost import cost
from kronfold.models.linear_view import sites
from kronfold.options import read
from kronfold.planner.plan import Plan
from kronfold.planner.planning import check_plan, skeleton_of
from kronfold.planner.recipe import Recipe

KRONECKER = {"structure": "kronecker", "block": [2, 2]}
LOW_RANK = {"structure": "low_rank", "ratio": 0.6}
LAYERS = ["role:attention_in", "role:attention_out", "role:mlp_in", "role:mlp_out"]
MIXES = {
    "kronecker": [{**KRONECKER, "modules": LAYERS, "blocks": [1]}],
    "low rank": [{**LOW_RANK, "modules": ["role:embedding", *LAYERS]}],
    "low rank into kronecker": [{**LOW_RANK, "modules": "role:mlp_in"}, {**KRONECKER, "modules": "role:mlp_out"}],
    "into dense": [{**KRONECKER, "modules": "role:mlp_in", "blocks": [1]}],
    "out of dense": [{**KRONECKER, "modules": ["role:mlp_out", "role:attention_out"], "blocks": [0]}],
    "one without": [{**KRONECKER, "modules": "role:mlp_in", "permute": "in"}, {**KRONECKER, "modules": "role:mlp_out"}],
}


def recipe_of(mix: str) -> Recipe:
    return read(Recipe, {"name": "x", "stages": [{"name": "x", "compress": MIXES[mix]}]}, "Recipe x")


EVERY_FAMILY = ("kronecker", "low rank")
CASES = [
    (name, mix) for name in pico.FAMILY_CONFIGS for mix in MIXES if mix in EVERY_FAMILY or name in ("gpt2", "llama")
]


@pytest.mark.parametrize(("name", "mix"), CASES)
def test_the_pipeline_keeps_logits_and_the_plan_foretells_what_is_held(name, mix):
    model = double(name)
    made = kf.plan(model, recipe_of(mix), errors=False)
    student = copy.deepcopy(model)
    fit_rows(student, made.stages[0].rows)
    expected, hidden = run(student)
    found = absorb_gathers(student)
    assert_equal_logits(student, expected)
    for before, after in zip(hidden, run(student)[1], strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=1e-10)
    assert found == made.gathers
    assert found["bytes"] == made.cost.index_bytes == cost(student).index_bytes
    assert made.cost == cost(student) == check_plan(made, model)
    assert absorb_gathers(student)["absorbed"] == 0  # nothing is left to do
    assert kf.plan(student, recipe_again(student), errors=False).teacher == cost(student)


def recipe_again(student) -> Recipe:
    """Any recipe that fits: the first linear site, at rank 1."""
    site = next(view.name for view in sites(student).values() if view.kind == "linear")
    entry = {"structure": "low_rank", "rank": 1, "modules": site}
    return read(Recipe, {"name": "y", "stages": [{"name": "y", "compress": [entry]}]}, "Recipe y")


def test_compress_absorbs():
    model = pico.gpt2(n_layer=2)
    made = kf.plan(model, recipe_of("low rank"), errors=False)
    assert made.gathers["absorbed"] == 2
    assert gathers_of(kf.compress(model, made)) == {**made.gathers, "absorbed": 0}


def test_a_single_head_of_keys_and_values_is_its_own_order():
    """Multi-query attention: no value channel can leave its head, so the gather of v always goes."""
    config = LlamaConfig(**{**pico._SHARED, "num_key_value_heads": 1})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    entry = {**LOW_RANK, "modules": "role:attention_in"}
    recipe = read(Recipe, {"name": "x", "stages": [{"name": "x", "compress": [entry]}]}, "Recipe x")
    made = kf.plan(model, recipe, errors=False)
    assert made.gathers["absorbed"] == 2
    assert not any("v_proj" in name for name in made.gathers["remaining"])
    assert gathers_of(kf.compress(model, recipe))["remaining"] == made.gathers["remaining"]


def test_an_unknown_family_keeps_its_gathers():
    config = GPTNeoXConfig(
        vocab_size=101, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    entry = {**KRONECKER, "modules": [v.name for v in sites(model).values() if "mlp" in v.name]}
    recipe = read(Recipe, {"name": "x", "stages": [{"name": "x", "compress": [entry]}]}, "Recipe x")
    made = kf.plan(model, recipe, errors=False)
    assert made.gathers == gathers_of(kf.compress(model, recipe))
    assert (made.gathers["absorbed"], len(made.gathers["remaining"])) == (0, 4)


def test_a_plan_of_an_older_version_loads(tmp_path):
    made = kf.plan(pico.config(), "tqcompressor")
    made.save(tmp_path / "new.json")
    assert Plan.load(tmp_path / "new.json") == made
    document = json.loads((tmp_path / "new.json").read_text())
    del document["gathers"]
    (tmp_path / "old.json").write_text(json.dumps(document))
    assert Plan.load(tmp_path / "old.json").gathers is None


def test_the_gathers_of_a_skeleton_are_named_without_numbers():
    student = kf.compress(pico.gpt2(n_layer=2), recipe_of("low rank into kronecker"))
    assert gathers_of(skeleton_of(student)) == gathers_of(student)
    assert ab.expected_gathers(skeleton_of(student)).absorbed == []
