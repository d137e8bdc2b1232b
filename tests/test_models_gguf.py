"""A .gguf file as MODEL: its weights, dequantised, in a plain model that trains and saves."""

from __future__ import annotations

import gguf
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kronfold.base.errors import InputError
from kronfold.models.cost import held_parameters
from kronfold.models.load import load_model

NAMES = {  # llama.cpp's name of each weight -> that of transformers
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "blk.0.attn_norm": "model.layers.0.input_layernorm",
    "blk.0.ffn_norm": "model.layers.0.post_attention_layernorm",
    "blk.0.attn_q": "model.layers.0.self_attn.q_proj",
    "blk.0.attn_k": "model.layers.0.self_attn.k_proj",
    "blk.0.attn_v": "model.layers.0.self_attn.v_proj",
    "blk.0.attn_output": "model.layers.0.self_attn.o_proj",
    "blk.0.ffn_gate": "model.layers.0.mlp.gate_proj",
    "blk.0.ffn_up": "model.layers.0.mlp.up_proj",
    "blk.0.ffn_down": "model.layers.0.mlp.down_proj",
}


@pytest.fixture
def written(tmp_path):
    """A one-layer Llama and the .gguf file of its weights; one head of width 2, so that rotary order is no matter."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=2, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, max_position_embeddings=16, tie_word_embeddings=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(16)
    writer.add_embedding_length(2)
    writer.add_block_count(1)
    writer.add_feed_forward_length(4)
    writer.add_rope_dimension_count(2)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(32)
    state = model.state_dict()
    for theirs, ours in NAMES.items():
        writer.add_tensor(f"{theirs}.weight", state[f"{ours}.weight"].numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model, path


def test_gguf_gives_a_plain_model_that_saves(written, tmp_path):
    model, path = written
    loaded = load_model(path)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits)
    assert held_parameters(loaded) == held_parameters(model)
    loaded(ids, labels=ids).loss.backward()
    loaded.save_pretrained(tmp_path / "saved")
    torch.testing.assert_close(load_model(tmp_path / "saved")(ids).logits, model(ids).logits)


def test_no_such_gguf(tmp_path):
    with pytest.raises(InputError, match="There is no file"):
        load_model(tmp_path / "none.gguf")
