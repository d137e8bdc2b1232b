"""Speed of generation, one model beside another: machines are noisy, ratios of one run are not."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kronfold.base.errors import InputError


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
