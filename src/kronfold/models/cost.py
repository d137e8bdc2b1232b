"""What a model costs: held parameters, multiply-accumulates per token, bytes. Works on the meta device."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from kronfold.structures.layer import structured_modules


@dataclass(frozen=True)
class Cost:
    """Attributes:
    held_parameters: every distinct stored number, each tied tensor once (floating-point tensors; what a model works
        out anew on loading, such as rotary frequencies, is not stored).
    index_bytes: bytes of integer buffers (permutations).
    macs_per_token: multiply-accumulates of all matrix products with weights, LM head included, attention scores
        not (they depend on the length of the text).
    bytes_fp16, bytes_fp32: held parameters at that width, plus `index_bytes`.
    """

    held_parameters: int
    index_bytes: int
    macs_per_token: int
    bytes_fp16: int
    bytes_fp32: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def cost(model: PreTrainedModel) -> Cost:
    """Count a model as it stands, whatever its family."""
    tensors = {id(t): t for t in model.state_dict(keep_vars=True).values()}.values()
    held = sum(t.numel() for t in tensors if t.is_floating_point())
    index_bytes = sum(
        t.numel() * t.element_size() for t in tensors if not t.is_floating_point() and t.dtype != torch.bool
    )
    structured = dict(structured_modules(model))
    inside = tuple(name + "." for name in structured)  # what is inside a structured module is in its own count
    dense = (
        module.get_parameter("weight").numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and not name.startswith(inside)
    )
    macs = sum(module.macs_per_token() for module in structured.values()) + sum(dense)
    return Cost(held, index_bytes, round(macs), 2 * held + index_bytes, 4 * held + index_bytes)


def held_parameters(model: PreTrainedModel) -> int:
    """Every distinct stored floating-point number of the model, each tied tensor once."""
    return cost(model).held_parameters
