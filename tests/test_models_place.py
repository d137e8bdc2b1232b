"""One way to put structures into a model: the plan's count, the skeleton's, the fitted model's and the loaded one's."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import kronfold as kf
import pico
from kronfold.base.errors import CheckpointError, RecipeError
from kronfold.models.cost import cost
from kronfold.models.linear_view import sites
from kronfold.models.place import build_skeleton, place, read_specs
from kronfold.options import read
from kronfold.planner.plan import PlanRow
from kronfold.planner.planning import check_rows, place_empty, skeleton_of
from kronfold.planner.recipe import Recipe
from kronfold.structures.low_rank import LowRankLinear, LowRankSpec

LEVEL = {"modules": "role:embedding", "block": [1, 2], "permute": "in"}
GROUP = {"modules": "role:embedding", "structure": "low_rank", "ratio": 0.6}
TRAIN = {"modules": "role:embedding", "structure": "tensor_train", "ratio": 0.5}
UNTIED = {"head": "untied"}
V, WIDTH = 101, 32

# name -> (family, entries of each stage, numbers of the head's own at the end, beside the embedding's)
CASES = {
    "a level, tied": ("gpt2", [[LEVEL]], 0),
    "groups, tied": ("llama-tied", [[GROUP]], 0),
    "tensor trains, tied": ("gpt2", [[TRAIN]], 0),
    "a level, the head keeps its own copy": ("gpt2", [[{**LEVEL, **UNTIED}]], V * WIDTH),
    "groups, the head keeps its own copy": ("llama-tied", [[{**GROUP, **UNTIED}]], V * WIDTH),
    "two levels, tied": ("llama-tied", [[LEVEL], [LEVEL]], 0),
    "two levels, parted at the second": ("gpt2", [[LEVEL], [{**LEVEL, **UNTIED}]], V * WIDTH),
    "parted at the first, compressed again": ("gpt2", [[{**LEVEL, **UNTIED}], [LEVEL]], V * WIDTH),
    "a level over groups, parted": ("gpt2", [[GROUP], [{**LEVEL, **UNTIED}]], V * WIDTH),
    "an untied model, embedding alone": ("llama", [[LEVEL]], V * WIDTH),
    "an untied model, head alone": ("llama", [[{"modules": "role:head", "structure": "low_rank", "rank": 9}]], 9 * 124),
    "an untied model, both": (
        "mistral",
        [[{"modules": ["role:head", "role:embedding"], "structure": "low_rank", "rank": 9}]],
        9 * 124,
    ),
    "one part of a fused layer": ("gpt2", [[{"modules": "*.c_attn.k", "structure": "low_rank", "rank": 5}]], 0),
    "parts of a fused layer, stage by stage": (
        "gpt2",
        [
            [{"modules": "*.c_attn.[qv]", "structure": "low_rank", "rank": 20}],
            [{"modules": "*.c_attn.[kv]", "block": [2, 2], "rank": 2}],
        ],
        0,
    ),
    "sums": (
        "gpt_neo",
        [[{"modules": "role:mlp_in", "structure": "sum", "terms": [
            {"structure": "low_rank", "rank": 3}, {"structure": "kronecker", "block": [2, 2]}]}]],
        0,
    ),
}  # fmt: skip


def recipe(stages) -> Recipe:
    content = {"name": "mine", "stages": [{"name": f"stage-{i}", "compress": own} for i, own in enumerate(stages)]}
    return read(Recipe, content, "Recipe mine")


@pytest.mark.parametrize("case", CASES)
def test_every_count_is_the_same(case, tmp_path):
    family, stages, own_head = CASES[case]
    model = pico.family(family)
    made = kf.plan(model, recipe(stages), errors=False)
    assert made.cost == kf.plan(model.config, recipe(stages)).cost
    skeleton = skeleton_of(model)
    for stage in made.stages:
        place_empty(skeleton, stage.rows)
    student = kf.compress(model, recipe(stages))
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert made.cost == cost(student) == cost(loaded) == cost(skeleton_of(loaded.config))
    assert made.held_parameters == cost(skeleton).held_parameters  # gathers may have been absorbed since
    assert {p.data_ptr() for p in loaded.parameters() if p.numel()} == {
        t.data_ptr() for t in loaded.state_dict().values() if t.is_floating_point() and t.numel()
    }
    assert {n: t.shape for n, t in skeleton.state_dict().items() if t.is_floating_point()} == {
        n: t.shape for n, t in student.state_dict().items() if t.is_floating_point()
    }
    head = loaded.get_output_embeddings()
    embedding = loaded.get_input_embeddings()
    shared = {id(p) for p in embedding.parameters()}
    assert sum(p.numel() for p in head.parameters() if id(p) not in shared) == own_head
    assert loaded.config.tie_word_embeddings == (own_head == 0)
    assert read_specs(loaded) == read_specs(student)
    ids = pico.ids(model)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, student(ids).logits)
        torch.testing.assert_close(kf.to_dense(student)(ids).logits, student(ids).logits, rtol=0, atol=1e-4)


def test_an_own_head_is_the_embedding_as_it_was():
    model = pico.gpt2(n_layer=2)
    student = kf.compress(model, recipe([[{**GROUP, **UNTIED}]]))
    assert torch.equal(student.lm_head.weight, model.transformer.wte.weight)
    levelled = kf.compress(model, recipe([[LEVEL]]))
    parted = kf.compress(levelled, recipe([[{**LEVEL, **UNTIED}]]))
    assert torch.equal(parted.lm_head.weight, levelled.transformer.wte.dense_weight())


def test_multiply_accumulates_by_hand():
    """What is inside a structured module is counted with it, once: terms of a sum, parts of a fused layer."""
    model = pico.gpt2(n_layer=1)
    terms = [{"structure": "low_rank", "rank": 3}, {"structure": "low_rank", "rank": 2}]
    before = cost(model).macs_per_token
    summed = kf.plan(model, recipe([[{"modules": "*.c_fc", "structure": "sum", "terms": terms}]]), errors=False)
    low_rank = 3 * (128 + 32 - 3) + 2 * (128 + 32 - 2)
    assert summed.cost.macs_per_token == before - 128 * 32 + low_rank
    fused = kf.plan(model, recipe([[{"modules": "*.c_attn.q", "structure": "low_rank", "rank": 3}]]), errors=False)
    assert fused.cost.macs_per_token == before - 32 * 32 + 3 * (32 + 32 - 3)


def test_a_layer_is_put_at_its_site_alone_and_keeps_the_mode():
    model = pico.gpt2(n_layer=2).train()
    views = sites(model)
    names = [f"transformer.h.1.attn.c_attn.{part}" for part in "qv"]
    for name in names:  # the second view was taken before the first layer was placed
        place(model, views[name], LowRankLinear(32, 32, 4))
    after = sites(model)
    assert [name for name in after if not after[name].is_dense] == names
    assert torch.equal(after["transformer.h.1.attn.c_attn.k"].weight(), views["transformer.h.1.attn.c_attn.k"].weight())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({"transformer.h.1.mlp.c_fc": {"structure": "tied_head"}}, "stands at the LM head"),
        ({"transformer.h.1.mlp": {"structure": "dense"}}, "no linear layer and no embedding"),
        ({"transformer.h.1.mlp.c_fc": {"structure": "fused", "parts": {}}}, "do not match this layer's parts"),
        ({"transformer.wte": {"structure": "low_rank", "out_features": 101, "in_features": 32, "rank": 2}}, "a linear"),
        ({"transformer.h.1.mlp.c_fc": {"structure": "grouped_embedding", "sizes": [128], "ranks": [2],
          "embedding_dim": 32}}, "needs an embedding"),
    ],
)  # fmt: skip
def test_specs_at_the_wrong_place_are_refused(specs, message):
    model = pico.gpt2(n_layer=2)
    with pytest.raises(CheckpointError, match=message):
        build_skeleton(model, specs)
    assert read_specs(model) == {}


@pytest.mark.parametrize("entry", [GROUP, TRAIN])
def test_what_replaces_an_embedding_cannot_go_inside_one_in_levels(entry):
    """0.3 put an embedding of the stored width there: the model neither ran nor loaded."""
    model = pico.gpt2(n_layer=1)
    with pytest.raises(RecipeError, match="held in levels.*cannot go inside one; use kronecker, or fold"):
        kf.plan(model, recipe([[LEVEL], [entry]]), errors=False)
    (edited,) = kf.plan(model, recipe([[entry]]), errors=False).stages
    with pytest.raises(RecipeError, match="held in levels"):
        check_rows(sites(kf.compress(model, recipe([[LEVEL]]))), edited.rows)
    kf.plan(kf.to_dense(kf.compress(model, recipe([[LEVEL]]))), recipe([[entry]]), errors=False)


def test_rows_hold_what_they_say():
    spec = LowRankSpec(128, 32, 5)
    with pytest.raises(RecipeError, match="w: storage 'int8' is not known.*model"):
        PlanRow("w", spec, 4096, storage="int8")
    with pytest.raises(RecipeError, match="w: head 'tide' is not known; give tied or untied"):
        PlanRow("w", spec, 4096, head="tide")
    with pytest.raises(RecipeError, match="w: init 'prunning' is not known"):
        PlanRow("w", spec, 4096, init="prunning")
    row = PlanRow("w", spec, 4096, head="tied")
    assert PlanRow.from_dict(row.to_dict()) == row
    edited = row.to_dict() | {"spec": {**row.to_dict()["spec"], "storage": "int4"}}
    with pytest.raises(RecipeError, match="storage 'int4'"):
        PlanRow.from_dict(edited)
    with pytest.raises(RecipeError, match="w: Rank 99"):
        PlanRow.from_dict({**row.to_dict(), "spec": {**row.to_dict()["spec"], "rank": 99}})
    with pytest.raises(RecipeError, match="w: unknown key.*'storage'"):
        PlanRow.from_dict({**row.to_dict(), "storge": "model"})
