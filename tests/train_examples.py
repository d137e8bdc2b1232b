"""Pico models and blocks for the tests of distill and train."""

from __future__ import annotations

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel, TrainerCallback

VOCABULARY = 61
POSITIONS = 32


def gpt2(
    seed: int = 0, layers: int = 2, vocabulary: int = VOCABULARY, dropout: float = 0.1, width: int = 16
) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=vocabulary, n_positions=POSITIONS, n_embd=width, n_layer=layers, n_head=2,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def llama(seed: int = 0, tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=POSITIONS, tie_word_embeddings=tied,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Blocks(Dataset):
    """`count` fixed blocks of a planted language: token i+1 is 3 token + 1 (mod vocabulary), now and then random."""

    def __init__(self, count: int = 12, length: int = 16, vocabulary: int = VOCABULARY, ignore: int = 0) -> None:
        generator = torch.Generator().manual_seed(7)
        rows = [torch.randint(vocabulary, (count,), generator=generator)]
        for _ in range(length - 1):
            noise = torch.randint(vocabulary, (count,), generator=generator)
            keep = torch.rand(count, generator=generator) < 0.8
            rows.append(torch.where(keep, (3 * rows[-1] + 1) % vocabulary, noise))
        self.ids = torch.stack(rows, dim=1)
        self.ignore = ignore

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        labels = self.ids[index].clone()
        labels[: (index % 4) * self.ignore] = -100  # a different number of predicted tokens in every block
        return {"input_ids": self.ids[index], "labels": labels}


class Stop(Exception):
    pass


class KillAfter(TrainerCallback):
    """A run that dies in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **_):
        if state.global_step == self.step:
            raise Stop
