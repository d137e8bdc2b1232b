"""Pico models and tokenizers, built on the spot."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

RECIPES = ("tqcompressor", "tqcompressor-untied", "tqcompressor-attention")
TEXT = "the quick brown fox jumps over the lazy dog and the other dog sleeps under the old brown tree . "


def config(**changes) -> GPT2Config:
    options = {"vocab_size": 101, "n_positions": 64, "n_embd": 32, "n_layer": 4, "n_head": 4}
    return GPT2Config(**{**options, "bos_token_id": 0, "eos_token_id": 0, **changes})


def gpt2(seed: int = 0, **changes) -> GPT2LMHeadModel:
    """A random GPT-2 in eval mode; every parameter, biases included, is away from zero."""
    torch.manual_seed(seed)
    model = GPT2LMHeadModel(config(**changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def ids(model, rows: int = 2, length: int = 20) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=generator)


def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words of TEXT, one id each; id 0 ends a text."""
    words = ["<|endoftext|>", *dict.fromkeys(TEXT.split())]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|endoftext|>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", bos_token="<|endoftext|>", unk_token="<|endoftext|>"
    )


def model_directory(place: Path, seed: int = 0, **changes) -> Path:
    """A complete model directory: config, weights, tokenizer."""
    gpt2(seed, **changes).save_pretrained(place)
    tokenizer().save_pretrained(place)
    return place


_SHARED = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
FAMILY_CONFIGS = {
    "gpt2": lambda: config(n_layer=2),
    "gpt_neo": lambda: GPTNeoConfig(
        vocab_size=101, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]],
        max_position_embeddings=64, window_size=8, bos_token_id=0, eos_token_id=0,
    ),
    "llama": lambda: LlamaConfig(**_SHARED, mlp_bias=True, tie_word_embeddings=False),
    "llama-tied": lambda: LlamaConfig(**_SHARED, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**_SHARED, sliding_window=8),
    "qwen2": lambda: Qwen2Config(**_SHARED, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**{**_SHARED, "head_dim": 6}),
}  # fmt: skip


def family(name: str, seed: int = 0):
    """A random pico model of a family, every parameter away from zero: 2 blocks of width 32, 4 heads (2 of keys and
    values where they can be grouped)."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILY_CONFIGS[name]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model
