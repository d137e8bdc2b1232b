"""KL of attention maps that were recorded, with its gradient taken at once, a few maps at a time.

Autograd would walk over every map about thirty times, forwards, again to remember nothing between, and backwards; from
memory each pass costs as much as the product that made the map. Here the maps of one step fit the processor's cache,
and the gradient by the scores has a closed form: probabilities of the student minus those of the teacher.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kronfold.distill.attention import RecordedAttention

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
