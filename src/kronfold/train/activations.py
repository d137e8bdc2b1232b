"""GPT-2's activation in one kernel while a model trains: transformers writes it out in eight passes over memory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

from torch import nn
from torch.nn import functional as F
from transformers.activations import NewGELUActivation


@contextlib.contextmanager
def fused_gelu(*models: nn.Module | None) -> Iterator[None]:
    """Every `gelu_new` (the tanh approximation) of the models by torch's own kernel; the same function to rounding."""
    found = [
        module
        for model in models
        if model is not None
        for module in model.modules()
        if type(module) is NewGELUActivation and "forward" not in module.__dict__
    ]
    try:
        for module in found:
            module.forward = partial(F.gelu, approximate="tanh")
        yield
    finally:
        for module in found:
            module.__dict__.pop("forward", None)
