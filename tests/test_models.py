"""Sites, canonical orientation, ties, cost and surgery on pico GPT-2."""

from __future__ import annotations

import pytest
import torch
from transformers import T5Config

import kronfold as kf
import pico
from kronfold.base.errors import CheckpointError, InputError
from kronfold.models.cost import cost, held_parameters
from kronfold.models.families import family_of
from kronfold.models.linear_view import sites
from kronfold.models.load import load_config, read_dtype
from kronfold.models.place import build_skeleton, check_specs, dense_part, read_specs
from kronfold.structures.levels import TiedHead


def test_sites_of_gpt2_are_found_once_and_named():
    views = sites(pico.gpt2(n_layer=2))
    per_block = ["attn.c_attn.q", "attn.c_attn.k", "attn.c_attn.v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
    expected = ["transformer.wte", *(f"transformer.h.{i}.{name}" for i in range(2) for name in per_block)]
    assert list(views) == expected
    assert views["transformer.h.1.mlp.c_fc"].block == 1
    assert views["transformer.wte"].block is None
    assert views["transformer.h.0.mlp.c_fc"].shape == (128, 32)


def test_views_are_canonical():
    """x W^T + b, part by part, is what the stock layers compute."""
    model = pico.gpt2()
    x = torch.randn(3, 32)
    block = model.transformer.h[1]
    for layer, names in ((block.mlp.c_fc, ["mlp.c_fc"]), (block.attn.c_attn, [f"attn.c_attn.{p}" for p in "qkv"])):
        views = [sites(model)[f"transformer.h.1.{name}"] for name in names]
        ours = torch.cat([x @ view.weight().T + view.bias() for view in views], dim=-1)
        torch.testing.assert_close(ours, layer(x))
        parts = torch.cat([dense_part(layer, view.rows)(x) for view in views], dim=-1)
        torch.testing.assert_close(parts, layer(x))


@pytest.mark.parametrize("recipe", pico.RECIPES)
def test_views_of_a_compressed_model_are_canonical_too(students, recipe):
    student = students[recipe]
    x = torch.randn(3, 32)
    for name, view in sites(student).items():
        if view.kind == "linear" and view.part is None:
            wide = x.repeat(1, view.shape[1] // 32)
            bias = 0 if view.bias() is None else view.bias()
            torch.testing.assert_close(wide @ view.weight().T + bias, view.module(wide), msg=name)
    dense = [view.is_dense for name, view in sites(student).items() if ".mlp." in name]
    assert dense == [True, True, False, False] * 2


def test_cost_by_hand():
    # 101 x 32 tokens, 64 x 32 positions, 4 blocks of 12·32² + 13·32, final norm 64; head tied.
    model = pico.gpt2()
    block = 12 * 32 * 32 + 13 * 32
    held = 101 * 32 + 64 * 32 + 4 * block + 64
    found = cost(model)
    assert found.held_parameters == held
    assert found.macs_per_token == 4 * 12 * 32 * 32 + 101 * 32
    assert (found.bytes_fp16, found.bytes_fp32, found.index_bytes) == (2 * held, 4 * held, 0)


@pytest.mark.parametrize("recipe", pico.RECIPES)
def test_the_plan_counts_what_the_model_holds(teacher, students, recipe):
    model, student = teacher, students[recipe]
    made = kf.plan(model, recipe, errors=False)
    assert made.cost == cost(student)
    distinct = {p.data_ptr(): p.numel() for p in student.parameters()}
    assert made.held_parameters == sum(distinct.values())
    assert made.held_parameters < held_parameters(model)


def test_specs_are_read_back_and_rebuild_the_same_skeleton(students):
    student = students["tqcompressor-attention"]
    specs = read_specs(student)
    assert specs["lm_head"] == {"structure": "tied_head"}
    assert [level["block"] for level in specs["transformer.wte"]["levels"]] == [2, 2]
    skeleton = pico.gpt2(seed=9)
    build_skeleton(skeleton, specs)
    assert isinstance(skeleton.lm_head, TiedHead)
    assert {k: v.shape for k, v in skeleton.state_dict().items()} == {
        k: v.shape for k, v in student.state_dict().items()
    }
    skeleton.load_state_dict(student.state_dict())
    ids = pico.ids(student)
    assert torch.equal(skeleton(ids).logits, student(ids).logits)


GOOD = {"structure": "kronecker", "a": [64, 16], "b": [2, 2], "rank": 1, "permute_in": False, "permute_out": False}


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ({"transformer.h.1.mlp.c_fcc": GOOD}, "no such module.*transformer.h.1.mlp.c_fc'"),
        ({"transformer.h.1.mlp.c_fc": {**GOOD, "structure": "kroneker"}}, "unknown structure 'kroneker'.*'kronecker'"),
        ({"transformer.h.1.mlp.c_fc": {**GOOD, "a": [64, 15]}}, r"describes a weight \(128, 30\).*\(128, 32\)"),
        ({"transformer.h.1.mlp.c_fc": {**GOOD, "rank": 99}}, "maximum 4"),
        ({"transformer.h.1.mlp.c_fc": {"structure": "kronecker"}}, "c_fc"),
        ({"transformer.wte": GOOD}, "needs a linear layer, found Embedding"),
        ({"transformer.h.1.mlp.c_fc": {"structure": "factorized_embedding", "levels": []}}, "needs an embedding"),
        ({"transformer.h.1.attn.c_attn": {"structure": "fused", "parts": {"q": GOOD}}}, r"parts \['q'\] do not match"),
        ({"lm_head": {"structure": "tied_head"}}, "needs a structured embedding"),
    ],
)
def test_specs_that_do_not_fit_are_refused_and_change_nothing(specs, message):
    model = pico.gpt2()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        build_skeleton(model, specs)
    assert {key: value.shape for key, value in model.state_dict().items()} == {k: v.shape for k, v in before.items()}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_all_faults_of_specs_come_at_once():
    specs = {"transformer.h.1.mlp.c_fc": {**GOOD, "rank": 99}, "nowhere": GOOD}
    assert len(check_specs(pico.gpt2(), specs)) == 2


def test_what_is_no_causal_language_model_is_named():
    with pytest.raises(InputError, match="'t5' are no causal language models.*gpt2"):
        family_of(T5Config())


def test_presets_and_dtypes():
    assert load_config("config:gpt2-xl").n_layer == 48
    with pytest.raises(InputError, match="Unknown model size 'gpt3'.*'gpt2'"):
        load_config("config:gpt3")
    assert read_dtype("bfloat16") is torch.bfloat16
    with pytest.raises(InputError, match="Allowed: float32"):
        read_dtype("int4")
