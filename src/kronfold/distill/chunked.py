"""Head and losses in chunks of tokens: no (tokens, vocabulary) tensor of the whole batch ever lives.

Two loops. The outer one takes `chunk_tokens` tokens through the student's and the teacher's head, large
enough for efficient matrix products. The inner one walks over the logits of that chunk in blocks of rows that
fit the processor's cache, where the dozen elementwise passes of softmax and its gradient are three times
faster than from memory. The gradients are taken at once, chunk by chunk, so nothing is computed twice and
backward only scales.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from kronfold.base.errors import InputError
from kronfold.distill.losses import LOSSES, TopK

# Logit elements per inner block. On 2 cores with 2 MB of L2 each, 2^17 to 2^20 are equally good at a
# vocabulary of 50,257 and 3.5x faster than 2^26. Elsewhere the whole chunk is one block, for fewer kernel
# launches.
_CACHED_ELEMENTS = 1 << 19


def cached_rows(logits: Tensor) -> int:
    """How many rows of logits (tokens, vocabulary) to pass over at a time; at least 1, at most all."""
    tokens, vocabulary = logits.shape
    return min(tokens, max(1, _CACHED_ELEMENTS // vocabulary)) if logits.device.type == "cpu" else tokens


def head_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that the logits of `model` (or the head `model`) depend on directly.

    A tied head holds none of its own; it names them by a method `source_parameters()`.
    """
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else model
    source: Callable[[], Iterable[nn.Parameter]] = getattr(head, "source_parameters", head.parameters)
    return list(source())


@dataclass(frozen=True)
class _Run:
    """Everything that is not differentiated."""

    head: nn.Module
    teacher_hidden: Tensor | None
    teacher_head: nn.Module | None
    teacher_top: TopK | None
    labels: Tensor
    weights: Mapping[str, float]
    temperature: float
    chunk_tokens: int


def chunked_loss(
    hidden: Tensor,
    head: nn.Module,
    parameters: Sequence[Tensor],
    labels: Tensor,
    weights: Mapping[str, float],
    *,
    teacher_hidden: Tensor | None = None,
    teacher_head: nn.Module | None = None,
    teacher_top: TopK | None = None,
    temperature: float = 1.0,
    chunk_tokens: int = 1024,
) -> tuple[Tensor, Tensor]:
    """The weighted sum of named losses over all tokens, differentiable in `hidden` and `parameters`.

    Args:
        hidden: (tokens, width), what the student's head is applied to.
        head: maps (n, width) to logits (n, vocabulary); any module.
        parameters: the parameters that `head` uses and that shall receive gradients (`head_parameters`).
        labels: (tokens,), already shifted; IGNORE where nothing is to be predicted.
        weights: loss name to its weight.
        teacher_hidden, teacher_head: the same of the teacher, for losses that need it; never differentiated.
        teacher_top: instead of these two: the teacher's likeliest tokens, (tokens, ...), softened by `temperature`.
        chunk_tokens: at most this many tokens have their logits alive at a time.

    Returns:
        total: scalar, Σ weight · sum; backward only scales gradients that are known already.
        sums: (losses,), the unweighted sum of each loss in the order of `weights`, detached.
        Both in float32, or float64 for float64 logits.

    Raises:
        InputError: an unknown loss name, or a loss that needs a teacher and none is given, or too little of it.
    """
    needy = [name for name in weights if LOSSES.get(name).needs_teacher]
    if teacher_top is not None:
        all_logits = [name for name in needy if LOSSES.get(name).of_top_k is None]
        if all_logits:
            raise InputError(
                f"The loss {all_logits[0]!r} compares all logits, and only the likeliest are given. Give the teacher "
                "itself, or drop this loss."
            )
    elif needy and (teacher_hidden is None or teacher_head is None):
        raise InputError(f"The loss {needy[0]!r} compares with a teacher, but none was given; pass one or drop it.")
    run = _Run(head, teacher_hidden, teacher_head, teacher_top, labels, dict(weights), temperature, chunk_tokens)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (hidden, *parameters)):
        return _ChunkedLoss.apply(run, hidden, *parameters)
    return _accumulate(run, hidden, ())[0]


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: _Run, hidden: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        inputs = (hidden, *parameters)
        wanted = [t for t, needed in zip(inputs, ctx.needs_input_grad[1:], strict=True) if needed]
        (total, sums), gradients = _accumulate(run, hidden, wanted)
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(sums)
        return total, sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_total: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        return tuple(next(saved) * grad_total if needed else None for needed in ctx.needs_input_grad)


def _accumulate(
    run: _Run, hidden: Tensor, wanted: Sequence[Tensor]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, ...]]:
    """((total, sums), gradients of total in the order of `wanted`, which may begin with `hidden` itself)."""
    accumulators = [torch.zeros_like(t, dtype=_at_least_float32(t.dtype)) for t in wanted]
    sums: Tensor | None = None
    for start in range(0, hidden.shape[0], run.chunk_tokens):
        rows = slice(start, start + run.chunk_tokens)
        chunk = hidden[rows].detach().requires_grad_(bool(wanted))
        with torch.set_grad_enabled(bool(wanted)):
            logits = run.head(chunk)
        chunk_sums, logit_gradient = _losses_of_logits(run, logits.detach(), rows, bool(wanted))
        sums = chunk_sums if sums is None else sums + chunk_sums
        if not wanted:
            continue
        inputs = [chunk if t is hidden else t for t in wanted]
        # Autocast is for forward; without this its state would leak into the backward operations.
        with torch.autocast(hidden.device.type, enabled=False):
            gradients = torch.autograd.grad(logits, inputs, logit_gradient, allow_unused=True)
        for tensor, accumulator, gradient in zip(wanted, accumulators, gradients, strict=True):
            if gradient is not None:
                (accumulator[rows] if tensor is hidden else accumulator).add_(gradient)
        del logits, logit_gradient, gradients, gradient  # or they would live beside those of the next chunk
    if sums is None:
        sums = hidden.new_zeros(len(run.weights), dtype=_at_least_float32(hidden.dtype))
    # Not a dot product: autocast would take that in bfloat16.
    total = (sums * torch.tensor(list(run.weights.values()), dtype=sums.dtype, device=sums.device)).sum()
    return (total, sums), tuple(a.to(t.dtype) for a, t in zip(accumulators, wanted, strict=True))


@torch.no_grad()
def _losses_of_logits(run: _Run, logits: Tensor, rows: slice, differentiate: bool) -> tuple[Tensor, Tensor | None]:
    """Sums (losses,) over the chunk `rows`, and d(weighted sum)/d(logits) in the dtype of `logits`."""
    losses = [LOSSES.get(name) for name in run.weights]
    teacher_logits = None
    if run.teacher_head is not None and run.teacher_hidden is not None:
        teacher_logits = run.teacher_head(run.teacher_hidden[rows])
    labels, top = run.labels[rows], None if run.teacher_top is None else run.teacher_top[rows]
    tokens = logits.shape[0]
    dtype = _at_least_float32(logits.dtype)
    gradient = torch.empty_like(logits) if differentiate else None
    weights = [torch.tensor(w, dtype=dtype, device=logits.device) for w in run.weights.values()]
    sums = torch.zeros(len(losses), dtype=dtype, device=logits.device)
    step = cached_rows(logits)
    for start in range(0, tokens, step):
        block = slice(start, start + step)
        student = logits[block].to(dtype).requires_grad_(differentiate)
        teacher = None if teacher_logits is None else teacher_logits[block].to(dtype)
        likeliest = None if top is None else top[block]
        with torch.set_grad_enabled(differentiate):
            parts = [loss.value(student, teacher, likeliest, labels[block], run.temperature) for loss in losses]
        sums += torch.stack([part.detach() for part in parts])
        if gradient is not None:
            gradient[block] = torch.autograd.grad(parts, student, weights)[0]
    return sums, gradient


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
