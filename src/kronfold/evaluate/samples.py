"""A short continuation of a prompt, greedy or seeded."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kronfold.base.errors import DataError, InputError

_TOP_K = 40
_TEMPERATURE = 0.7  # small models wander at 1


@torch.no_grad()
def sample(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 60, seed: int | None = None) -> str:
    """`prompt` and its continuation by `model`: greedy when `seed` is None, otherwise drawn from the 40 likeliest
    tokens at temperature 0.7.

    Stops at the end-of-text token. The caller's random state and the model's mode are left as they were. Raises
    DataError when prompt and continuation do not fit the context, or the prompt has no token.
    """
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
    context = getattr(model.config, "max_position_embeddings", None)
    if ids.shape[1] == 0:
        raise DataError("The prompt is empty. Give at least one word.")
    if context is not None and ids.shape[1] + max_new_tokens > context:
        raise DataError(
            f"A prompt of {ids.shape[1]} tokens and {max_new_tokens} new ones exceed the context of {context}. "
            "Shorten the prompt or ask for fewer tokens."
        )
    options: dict[str, Any] = {"do_sample": False}
    if seed is not None:
        options = {"do_sample": True, "top_k": _TOP_K, "temperature": _TEMPERATURE}
    training = model.training
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed or 0)
        model.eval()
        try:
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.eos_token_id,
                **options,
            )
        finally:
            model.train(training)
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


# Speed of generation, one model beside another: machines are noisy, ratios of one run are not.


@torch.no_grad()
def generation_speed(
    models: Mapping[str, Any], prompt: Tensor, *, new_tokens: int = 32, rounds: int = 5
) -> dict[str, float]:
    """Tokens per second of greedy decoding with a cache at batch 1: the median over interleaved rounds, by name.

    Args:
        models: causal language models by name, all in eval mode.
        prompt: (1, length) token ids. Every round decodes exactly `new_tokens` after it, with each model in turn.

    Raises InputError when prompt and continuation do not fit the context of a model.
    """
    for name, model in models.items():
        context = getattr(model.config, "max_position_embeddings", None)
        if context is not None and prompt.shape[1] + new_tokens > context:
            raise InputError(
                f"{prompt.shape[1]} + {new_tokens} tokens exceed the context of {context} of {name}; ask for fewer."
            )
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for round_ in range(rounds + 1):  # the first is warm-up
        for name, model in models.items():
            started = time.perf_counter()
            model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                min_new_tokens=new_tokens,
                max_new_tokens=new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
            if prompt.device.type == "cuda":
                torch.cuda.synchronize()
            if round_:
                seconds[name].append(time.perf_counter() - started)
    return {name: new_tokens / statistics.median(times) for name, times in seconds.items()}
