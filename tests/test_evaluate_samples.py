"""Text samples: greedy is the argmax, a seed decides the rest, nothing else is touched."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from kronfold.base.errors import DataError
from kronfold.data.tokenizer import train_tokenizer
from kronfold.evaluate.samples import sample

PROMPT = "The file is"


@pytest.fixture(scope="module")
def parts():
    tokenizer = train_tokenizer(["The file is read once and its lines are returned as text."] * 3, 290)
    torch.manual_seed(1)
    config = GPT2Config(vocab_size=290, n_positions=32, n_embd=8, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.wte.weight.mul_(10)
    return model, tokenizer


def test_greedy_takes_the_likeliest_token(parts) -> None:
    model, tokenizer = parts
    ids = tokenizer.encode(PROMPT, add_special_tokens=False)
    model.eval()
    for _ in range(8):
        following = int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if following == tokenizer.eos_token_id:
            break
        ids.append(following)
    assert sample(model, tokenizer, PROMPT, 8) == tokenizer.decode(ids)


def test_a_seed_decides_and_nothing_else_changes(parts) -> None:
    model, tokenizer = parts
    model.train()
    state = torch.random.get_rng_state()
    first = sample(model, tokenizer, PROMPT, 12, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert first.startswith(PROMPT)
    assert first == sample(model, tokenizer, PROMPT, 12, seed=3)
    assert len({sample(model, tokenizer, PROMPT, 12, seed=seed) for seed in range(4)}) > 1


def test_refusals(parts) -> None:
    model, tokenizer = parts
    with pytest.raises(DataError, match="prompt is empty"):
        sample(model, tokenizer, "")
    with pytest.raises(DataError, match="exceed the context of 32"):
        sample(model, tokenizer, PROMPT, 32)
