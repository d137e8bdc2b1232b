"""Truncation: the published choices of blocks, the same function as running those blocks, and clear refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

import kronfold as kf
import pico
from kronfold.base.errors import InputError
from kronfold.models.place import read_specs
from kronfold.models.truncate import STRATEGIES, depth_of, kept_layers, truncate
from kronfold.planner.planning import skeleton_of
from kronfold.planner.recipe import load_recipe

# The study's teacher has 12 blocks (RESEARCH A3; 3b3t is DistilGPT-2's choice).
PUBLISHED = {
    "alt": (0, 2, 4, 6, 8, 10),
    "6b": (0, 1, 2, 3, 4, 5),
    "6t": (6, 7, 8, 9, 10, 11),
    "3b3t": (0, 2, 4, 7, 9, 11),
    "3l": (0, 6, 11),
}


@pytest.mark.parametrize(("strategy", "kept"), PUBLISHED.items())
def test_published_choices(strategy, kept):
    assert kept_layers(strategy, 12) == kept
    assert kept_layers(list(kept[::-1]), 12) == kept


def test_every_strategy_is_published():
    assert set(STRATEGIES) == set(PUBLISHED)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_other_depths_and_counts(strategy):
    for depth in range(1, 33):
        for count in range(1, depth + 1):
            kept = kept_layers(strategy, depth, count)
            assert len(kept) == count
            assert list(kept) == sorted({i for i in kept if 0 <= i < depth})
        assert kept_layers(strategy, depth, depth) == tuple(range(depth))
        assert len(kept_layers(strategy, depth)) == max(1, depth // (4 if strategy == "3l" else 2))


def test_rules_by_hand():
    assert kept_layers("alt", 24) == tuple(range(0, 24, 2))
    assert kept_layers("alt", 12, 4) == (0, 3, 6, 9)
    assert kept_layers("3b3t", 24) == (0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23)
    assert kept_layers("3b3t", 12, 5) == (0, 2, 4, 9, 11)
    assert kept_layers("3l", 24, 3) == (0, 12, 23)
    assert kept_layers("6t", 5, 2) == (3, 4)


@pytest.mark.parametrize(
    ("strategy", "count", "message"),
    [
        ("3b3", None, "Unknown truncation strategy '3b3'.*'3b3t'.*0 to 11"),
        ("alt", 0, "cannot keep 0 of 12"),
        ("alt", 13, "cannot keep 13 of 12"),
        ([], None, "keeps no block"),
        ([0, 12], None, r"Blocks \[12\] are not.*0 to 11"),
        ([-1], None, r"Blocks \[-1\] are not"),
        ([3, 1, 3], None, r"Blocks \[3\] are named twice"),
        ([1, 2], 2, "leave the count out"),
    ],
)
def test_refusals(strategy, count, message):
    with pytest.raises(InputError, match=message):
        kept_layers(strategy, 12, count)


def blocks_alone(model, keep, ids):
    """The naive twin: the model itself, its dropped blocks replaced by nothing on the way of the hidden states."""
    twin = copy.deepcopy(model)
    from kronfold.models.families import family_of

    blocks = twin.get_submodule(family_of(model).blocks)
    for i, block in enumerate(blocks):
        if i not in keep:
            block.register_forward_hook(
                lambda _module, args, kwargs, out: (
                    (args[0] if args else kwargs["hidden_states"]) if torch.is_tensor(out) else (args[0], *out[1:])
                ),
                with_kwargs=True,
            )
    return twin(ids, use_cache=False).logits


@pytest.mark.parametrize("name", pico.FAMILY_CONFIGS)
@pytest.mark.parametrize("keep", [[0], [1]])
def test_the_same_function_as_those_blocks(name, keep, tmp_path):
    model = pico.family(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ids = pico.ids(model)
    student = truncate(model, keep)
    assert type(student) is type(model)
    assert depth_of(student) == 1 == student.config.num_hidden_layers
    assert student.config.kept_layers == keep
    torch.testing.assert_close(student(ids).logits, blocks_alone(model, keep, ids), rtol=0, atol=1e-5)
    # nothing shared, the original as it was, ties as they were
    assert not {p.data_ptr() for p in model.parameters()} & {p.data_ptr() for p in student.parameters()}
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert depth_of(model) == 2 == model.config.num_hidden_layers
    same = [m.get_output_embeddings().weight is m.get_input_embeddings().weight for m in (model, student)]
    assert same[0] == same[1]
    # the config says what is there: it saves and loads, and the cache finds its place
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, student(ids).logits)
    assert again.config.kept_layers == keep
    assert truncate(student, [0]).config.kept_layers == [0]
    mask = torch.ones_like(ids)
    cached, plain = (
        student.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=use, pad_token_id=0)
        for use in (True, False)
    )
    assert torch.equal(cached, plain)


def test_lists_with_one_entry_per_block_are_shortened():
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = Qwen2Config(
        vocab_size=31, hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=2, layer_types=kinds, sliding_window=4, use_sliding_window=True,
    )  # fmt: skip
    student = truncate(AutoModelForCausalLM.from_config(config), [1, 2])
    assert student.config.layer_types == ["full_attention", "sliding_attention"]
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1]
    assert [layer.self_attn.sliding_window for layer in student.model.layers] == [None, 4]


def test_structured_layers_are_kept(teacher, tmp_path):
    compressed = kf.compress(teacher, load_recipe("tqcompressor").without_permutations())
    student = truncate(compressed, [0, 3])
    specs = read_specs(student)
    assert {"transformer.h.1.mlp.c_fc", "transformer.wte", "lm_head"} <= set(specs)
    assert not any(".h.0." in name or ".h.3." in name for name in specs)
    ids = pico.ids(student)
    expected = blocks_alone(compressed, [0, 3], ids)
    torch.testing.assert_close(student(ids).logits, expected, rtol=0, atol=1e-5)
    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(again(ids).logits, student(ids).logits, rtol=0, atol=1e-6)
    assert read_specs(compressed).keys() >= {"transformer.h.3.mlp.c_fc"}


def test_an_empty_model_is_truncated_too():
    student = truncate(skeleton_of(GPT2Config()), PUBLISHED["alt"])
    assert sum(p.numel() for p in student.parameters()) == 81_912_576
    assert {p.device.type for p in student.parameters()} == {"meta"}


def test_scaling_by_the_place_of_a_block_is_refused():
    with pytest.raises(InputError, match="scale_attn_by_inverse_layer_idx"):
        truncate(pico.gpt2(scale_attn_by_inverse_layer_idx=True), [1])


def test_a_config_that_cannot_say_it_is_refused():
    """DeepSeek: which blocks are of which kind follows from another number of the config, not from a list."""
    from transformers import DeepseekV3Config

    config = DeepseekV3Config(
        vocab_size=31, hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, n_group=1, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
        qk_nope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    assert depth_of(truncate(model, [0, 1])) == 2
    with pytest.raises(InputError, match="cannot describe these blocks"):
        truncate(model, [0, 2])
