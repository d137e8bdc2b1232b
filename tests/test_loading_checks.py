"""Every loading route refuses what would leave random numbers in a model, and takes the buffers of old versions."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTNeoConfig, LlamaConfig, MixtralConfig

import pico
from kronfold.base.errors import CheckpointError
from kronfold.models.families import empty_model
from kronfold.models.load import load_classifier, load_config, load_model
from kronfold.models.weight_files import WeightFiles

LLAMA = {
    "vocab_size": 32, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip


def write_gguf(path: Path, model, without: str = "", narrower: str = "") -> Path:
    """The weights of a pico Llama as llama.cpp names them, without one of them, or with one of another shape."""
    config, state = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(16)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in state.items():
        if name != without:
            tensor = tensor[..., :-2] if name == narrower else tensor
            writer.add_tensor(names.get_name(name.removesuffix(".weight")) + ".weight", tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA)).eval()


@pytest.mark.parametrize(
    "lost", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
def test_a_gguf_that_lacks_a_tensor_is_refused(llama, tmp_path, lost):
    whole = write_gguf(tmp_path / "whole.gguf", llama)
    assert load_model(whole).config.hidden_size == 8
    with pytest.raises(CheckpointError, match=f"missing: {re.escape(lost)}\\n.*random numbers") as refused:
        load_model(write_gguf(tmp_path / "part.gguf", llama, without=lost))
    assert "config.json" not in str(refused.value)


def test_a_gguf_with_a_tensor_of_another_shape_is_refused(llama, tmp_path):
    name = "model.layers.0.mlp.down_proj.weight"
    with pytest.raises(CheckpointError, match=f"wrong shape: {re.escape(name)}"):
        load_model(write_gguf(tmp_path / "part.gguf", llama, narrower=name))


def both_ways(place: Path) -> list[str]:
    """What the two routes say of a directory: the model as a whole, and its files tensor by tensor."""
    said = []
    for route in (load_model, lambda p: WeightFiles(p, empty_model(load_config(p)))):
        with pytest.raises(CheckpointError) as refused:
            route(place)
        said.append(str(refused.value))
    return said


def edited(place: Path, change) -> Path:
    weights = load_file(place / "model.safetensors")
    change(weights)
    save_file(weights, place / "model.safetensors", {"format": "pt"})
    return place


def test_missing_weights_are_named_eight_at_most_and_counted(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    lost = [name for name in llama.state_dict() if ".layers." in name][:11]
    edited(tmp_path, lambda w: [w.pop(name) for name in lost])
    for said in both_ways(tmp_path):
        assert said.count("missing: ") == 8
        assert "3 more (11 in all)" in said
        assert "same checkpoint" in said


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda w: w.update({"model.layers.7.mlp.up_proj.weight": torch.zeros(2)}), "not in the config: .*layers.7"),
        # A bias that the config denies would be dropped, and with it what the model computes.
        (lambda w: w.update({"model.layers.1.mlp.up_proj.bias": torch.ones(12)}), "not in the config: .*up_proj.bias"),
        (lambda w: w.update({"model.layers.1.mlp.up_proj.weight": torch.ones(3, 8)}), "wrong shape: .*up_proj"),
        (lambda w: w.update({"model.layers.1.self_attn.sinks": torch.ones(2)}), "not in the config: .*sinks"),
    ],
)
def test_what_would_be_dropped_or_drawn_is_refused(llama, tmp_path, change, fault):
    llama.save_pretrained(tmp_path)
    edited(tmp_path, change)
    assert all(re.search(fault, said) for said in both_ways(tmp_path))


def test_an_expert_that_is_missing_is_named(tmp_path):
    config = MixtralConfig(**{**LLAMA, "hidden_size": 16}, num_local_experts=3, num_experts_per_tok=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    edited(tmp_path, lambda w: w.pop("model.layers.1.block_sparse_moe.experts.2.w3.weight"))
    assert all("model.layers.1.mlp.experts.gate_up_proj" in said for said in both_ways(tmp_path))


OLD_BUFFERS = {
    "gpt2": ["transformer.h.1.attn.bias", "transformer.h.1.attn.masked_bias"],
    "gpt2 without prefix": ["h.0.attn.bias", "h.0.attn.masked_bias"],
    "gpt_neo": ["transformer.h.0.attn.attention.bias", "transformer.h.1.attn.attention.masked_bias"],
    "llama": ["model.layers.1.self_attn.rotary_emb.inv_freq", "model.layers.1.self_attn.rotary_emb.cos_cached"],
}


@pytest.mark.parametrize("kind", OLD_BUFFERS)
def test_buffers_of_old_versions_are_ignored_by_name(llama, tmp_path, kind):
    neo = GPTNeoConfig(
        vocab_size=101, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64, window_size=8, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = llama if kind == "llama" else AutoModelForCausalLM.from_config(neo) if kind == "gpt_neo" else pico.gpt2()
    model = model.eval()
    model.save_pretrained(tmp_path)
    edited(tmp_path, lambda w: w.update({name: torch.ones(1, 1, 4, 4) for name in OLD_BUFFERS[kind]}))
    ids = pico.ids(model) % 30
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = load_model(tmp_path)
        files = WeightFiles(tmp_path, empty_model(load_config(tmp_path)))
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert all(torch.equal(files.read([name])[name], tensor) for name, tensor in model.state_dict().items())
    told = [str(warning.message) for warning in said if "ignored" in str(warning.message)]
    if kind == "gpt_neo":
        assert len(told) == 2
    for line in told:  # those that transformers itself knows and drops are no news
        assert any(name in line for name in OLD_BUFFERS[kind])


def test_a_classifier_is_checked_like_a_language_model(checkpoints, tmp_path):
    source = checkpoints["tqcompressor"]
    assert load_classifier(source, 3, pad=0).config.num_labels == 3
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    edited(tmp_path, lambda w: w.pop("transformer.h.2.ln_2.bias"))
    with pytest.raises(CheckpointError, match="missing: transformer.h.2.ln_2.bias"):
        load_classifier(tmp_path, 3, pad=0)


def test_files_of_other_formats_beside_are_left_alone(llama, tmp_path):
    """A directory as pytorch projects leave them: pickles, an optimizer's state, notes."""
    llama.save_pretrained(tmp_path)
    torch.save({"model.norm.weight": torch.zeros(8)}, tmp_path / "pytorch_model.bin")
    torch.save({"state": {}}, tmp_path / "optimizer.pt")
    (tmp_path / "trainer_state.json").write_text(json.dumps({"step": 3}))
    ids = torch.arange(8)[None]
    assert torch.equal(load_model(tmp_path)(ids).logits, llama(ids).logits)
