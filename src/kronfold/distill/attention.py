"""Attention maps of chosen layers, without giving up fused attention.

Inside `recording`, the kernel `sdpa` of transformers runs as always, and the queries, keys and values that each chosen
layer hands to it (rotated, normed, masked: whatever the family does before) are remembered. A map is recomputed from
them where it is needed, gradients flow through it, and no layer that nobody asked for costs anything. A model that
does not run on `sdpa` gives its maps the slow way, by eager attention.
"""

from __future__ import annotations

import contextlib
import math
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


# KL of attention maps that were recorded, with its gradient taken at once, a few maps at a time.
#
# Autograd would walk over every map about thirty times, forwards, again to remember nothing between, and backwards;
# from memory each pass costs as much as the product that made the map. Here the maps of one step fit the processor's
# cache, and the gradient by the scores has a closed form: probabilities of the student minus those of the teacher.


_CACHED_ELEMENTS = 1 << 19  # of one tensor of maps, as in `kronfold.distill.chunked`; elsewhere memory is the limit
_ELEMENTS = 1 << 25


def recorded_divergence(student: RecordedAttention, teacher: RecordedAttention, weights: Tensor) -> Tensor:
    """Σ weights · mean over heads of KL(teacher ‖ student) of the maps; differentiable by the student's query and key.

    Args:
        student, teacher: of one layer each, of as many heads of queries; their sizes may differ.
        weights: (batch, length), of each query; where it is 0 the maps may hold anything.
    """
    total: Tensor = _MapDivergence.apply(student.query, student.key, student, teacher, weights)
    return total


class _MapDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, student: RecordedAttention, teacher: RecordedAttention, weights: Tensor
    ) -> Tensor:
        wanted = any(ctx.needs_input_grad[:2])
        dtype = torch.promote_types(query.dtype, torch.float32)
        total = weights.new_zeros(())
        grad_query = torch.empty_like(query, dtype=dtype) if wanted else None
        grad_key = torch.empty_like(query, dtype=dtype) if wanted else None  # of the keys repeated for every head
        with torch.autocast(query.device.type, enabled=False):
            for rows, heads in _pieces(query):
                loss, by_scores = _of_maps(student, teacher, rows, heads, weights[rows], wanted)
                total += loss
                if grad_query is None or grad_key is None or by_scores is None:
                    continue
                mine = student.for_every_head(key[rows])[:, heads].to(dtype)
                grad_query[rows, heads] = by_scores @ mine * student.scale
                grad_key[rows, heads] = by_scores.transpose(-1, -2) @ query[rows, heads].to(dtype) * student.scale
        if grad_query is not None and grad_key is not None:
            ctx.save_for_backward(grad_query, grad_key.unflatten(1, (key.shape[1], -1)).sum(2))
        ctx.dtypes = query.dtype, key.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        by_query, by_key = (
            (saved * grad).to(dtype) for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return by_query, by_key, None, None, None


def _pieces(query: Tensor) -> list[tuple[slice, slice]]:
    """(rows of the batch, heads) that are worked on together."""
    batch, heads, length, _ = query.shape
    limit = _CACHED_ELEMENTS if query.device.type == "cpu" else _ELEMENTS
    maps = max(1, limit // length**2)
    row_step, head_step = max(1, maps // heads), min(heads, maps)
    return [
        (slice(row, row + row_step), slice(head, head + head_step))
        for row in range(0, batch, row_step)
        for head in range(0, heads, head_step)
    ]


def _of_maps(
    student: RecordedAttention, teacher: RecordedAttention, rows: slice, heads: slice, weights: Tensor, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """The share of these maps in the loss, and its gradient by the student's scores (rows, heads, length, length)."""
    mine, other = student.scores(rows, heads), teacher.scores(rows, heads)
    # What is never seen has probability 0 and a finite logarithm, so it adds 0 without being sought out.
    floor = math.log(torch.finfo(mine.dtype).tiny)
    likely = torch.softmax(other, -1)
    parts = torch.log_softmax(other, -1).sub_(torch.log_softmax(mine, -1).clamp_(min=floor)).mul_(likely)
    # Masked, not only multiplied: padding may hold anything, and 0 · inf is not 0.
    nothing = (weights == 0)[:, None]
    counts = weights[:, None] / student.query.shape[1]
    loss = (parts.sum(-1).masked_fill_(nothing, 0.0) * counts).sum()
    if not wanted:
        return loss, None
    by_scores = torch.softmax(mine, -1).sub_(likely).mul_(counts[..., None])
    if nothing.device.type == "cpu" and not nothing.any():  # elsewhere asking takes longer than filling
        return loss, by_scores
    return loss, by_scores.masked_fill_(nothing[..., None], 0.0)
