"""Attention maps of chosen layers, without giving up fused attention.

Inside `recording`, the kernel `sdpa` of transformers runs as always, and the queries, keys and values that each chosen
layer hands to it (rotated, normed, masked: whatever the family does before) are remembered. A map is recomputed from
them where it is needed, gradients flow through it, and no layer that nobody asked for costs anything. A model that
does not run on `sdpa` gives its maps the slow way, by eager attention.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kronfold.base.errors import InputError

# Arguments of an attention kernel that change the probabilities in ways we do not follow.
_UNKNOWN = ("softcap", "s_aux", "position_bias")


@dataclass(frozen=True)
class RecordedAttention:
    """What one layer handed to its attention kernel.

    Attributes:
        query: (batch, heads, length, size), rotated but not scaled. key, value: the same, perhaps of fewer heads, each
            then serving as many heads of queries.
        mask: None for plain causal attention; else True where a key may be seen, or numbers to add to the scores;
            broadcasts to (batch, heads, length, length).
        scale: the scores are query·keyᵀ times this.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float

    def log_map(self, rows: slice = slice(None)) -> Tensor:
        """Log-probabilities (rows, heads, length, length) of these rows of the batch, at least float32.

        A query that may see nothing (padding on the left) gets a uniform row, as in eager attention.
        """
        return torch.log_softmax(self.scores(rows), dim=-1)

    def scores(self, rows: slice = slice(None), heads: slice = slice(None)) -> Tensor:
        """What the softmax is taken of, for these rows and heads; the lowest finite number where nothing is seen."""
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        with torch.autocast(self.query.device.type, enabled=False):
            query = self.query[rows, heads].to(dtype) * self.scale
            key = self.for_every_head(self.key[rows])[:, heads].to(dtype)
            # Added, not filled in: a tenth of the time, and what is added to is far below the rounding of the lowest.
            return query @ key.transpose(-1, -2) + self._bias(rows, heads, dtype)

    def _bias(self, rows: slice, heads: slice, dtype: torch.dtype) -> Tensor:
        lowest, length = torch.finfo(dtype).min, self.query.shape[2]
        if self.mask is None:
            return torch.full((length, length), lowest, dtype=dtype, device=self.query.device).triu(1)
        mask = self.mask[rows] if self.mask.shape[0] > 1 else self.mask
        mask = mask[:, heads] if mask.shape[1] > 1 else mask
        if mask.dtype == torch.bool:
            return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, lowest)
        return mask.to(dtype).clamp(min=lowest)

    def for_every_head(self, tensor: Tensor) -> Tensor:
        """Keys or values (batch, heads, length, size) repeated for the heads of queries that they serve."""
        return tensor.repeat_interleave(self.query.shape[1] // tensor.shape[1], dim=1)


@dataclass(frozen=True)
class EagerAttention:
    """The same from a model that returned its probabilities (batch, heads, length, length)."""

    probabilities: Tensor

    def log_map(self, rows: slice = slice(None)) -> Tensor:
        dtype = torch.promote_types(self.probabilities.dtype, torch.float32)
        return self.probabilities[rows].to(dtype).clamp(min=torch.finfo(dtype).tiny).log()


Attention = RecordedAttention | EagerAttention


@contextlib.contextmanager
def recording(layers: Collection[int]) -> Iterator[dict[int, RecordedAttention]]:
    """While inside, `sdpa` attention of these layers is remembered in the dict that is given."""
    records: dict[int, RecordedAttention] = {}
    if not layers:
        yield records
        return
    kernel: Callable[..., Any] = ALL_ATTENTION_FUNCTIONS["sdpa"]
    override = ALL_ATTENTION_FUNCTIONS._local_mapping.get("sdpa")

    def remembering(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        index: Any = getattr(module, "layer_idx", None)
        if index in layers and not any(options.get(name) is not None for name in _UNKNOWN):
            scale = options.get("scaling")
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            records[index] = RecordedAttention(query, key, value, mask, scale)
        return kernel(module, query, key, value, mask, **options)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = remembering
    try:
        yield records
    finally:
        if override is None:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]
        else:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = override


@contextlib.contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    config = model.config
    before = config._attn_implementation_internal
    config._attn_implementation_internal = "eager"
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def run_with_attention(
    model: PreTrainedModel, call: Callable[..., Any], layers: Collection[int]
) -> tuple[Any, dict[int, Attention]]:
    """(output of `call`, attention of `layers`). `call` runs `model` and passes on keyword arguments.

    Raises InputError when the model gives neither way; ask `attention_fault` before training.
    """
    if not layers:
        return call(), {}
    if model.config._attn_implementation == "sdpa":
        with recording(layers) as records:
            out = call()
        if len(records) == len(layers):
            return out, dict(records)
    with _eager(model):
        out = call(output_attentions=True)
    maps = getattr(out, "attentions", None) or ()
    if len(maps) <= max(layers) or any(maps[index] is None for index in layers):
        raise InputError(
            f"{type(model).__name__} gives no attention maps, neither by sdpa nor by eager attention; leave attention "
            "out of the objective."
        )
    return out, {index: EagerAttention(maps[index]) for index in layers}


@torch.no_grad()
def attention_fault(model: PreTrainedModel, layers: Collection[int], values: bool = False) -> str | None:
    """Why `model` cannot give the attention of `layers` (with `values`, also its value vectors); None when it can.

    One forward pass over three tokens.
    """
    training = model.training
    model.eval()
    tokens = torch.zeros(1, 3, dtype=torch.long, device=model.device)
    try:
        found = run_with_attention(model, lambda **more: model.base_model(tokens, use_cache=False, **more), layers)[1]
    except InputError as error:
        return str(error)
    finally:
        model.train(training)
    if values and not all(isinstance(layer, RecordedAttention) for layer in found.values()):
        return f"{type(model).__name__} does not run on sdpa, so its value vectors stay unseen; choose another method."
    return None
