"""What a method sees of student and teacher on one micro-batch, and how its terms are averaged."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from kronfold.distill.attention import Attention, RecordedAttention, recorded_divergence
from kronfold.distill.losses import IGNORE

# Elements of an attention map alive at a time and side: 16 rows of 1024 tokens and 2 heads, 128 MB in float32.
_MAP_ELEMENTS = 1 << 25


@dataclass(frozen=True)
class Moment:
    """Where the training stands: optimiser steps done, and in all."""

    step: int = 0
    steps: int = 1

    @property
    def progress(self) -> float:
        """In [0, 1]: 0 at the first step, 1 would be after the last."""
        return min(1.0, self.step / max(1, self.steps))


START = Moment()


@dataclass(frozen=True)
class Signals:
    """One model on one micro-batch.

    Attributes:
        hidden_states: layers + 1 tensors (batch, length, width), the embedding output first, the last after the final
            norm, as transformers gives them; empty when the method did not ask.
        attentions: block -> attention, for the blocks the method asked for.
    """

    hidden_states: tuple[Tensor, ...] = ()
    attentions: Mapping[int, Attention] = field(default_factory=dict)


@dataclass(frozen=True)
class Batch:
    """What is not of one model.

    Attributes:
        weights: (batch, length), how much each position counts. A term is Σ weights · value per position, so terms of
            micro-batches add up to exactly that of their batch.
            Causal language model: 1 / (predicted tokens of the whole batch) where a token is predicted, else 0, so
            every position counts as it does in `ce` and `kl`. Classification: each sequence counts alike, and in it
            each position that is not padding.
        moment: where the training stands.
    """

    weights: Tensor
    moment: Moment = START

    def mean(self, values: Tensor) -> Tensor:
        """Σ weights · values, of values (batch, length)."""
        # masked, not only multiplied: padding may hold anything, and 0 · inf is not 0
        return (self.weights * values.masked_fill(self.weights == 0, 0.0)).sum()

    @property
    def sequence_weights(self) -> Tensor:
        """(batch,): how much each sequence counts, the sum over its positions."""
        return self.weights.sum(1)

    def pool(self, states: Tensor) -> Tensor:
        """(batch, width): the mean of states (batch, length, width) over the positions that count."""
        counted = (self.weights > 0).unsqueeze(-1)
        number = counted.sum(1).clamp(min=1)
        return states.masked_fill(~counted, 0.0).sum(1) / number


def causal_weights(shifted_labels: Tensor, items: Tensor | int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Position weights of a causal language model; labels (batch, length), IGNORE where nothing is predicted."""
    return shifted_labels.ne(IGNORE).to(dtype) / items


def sequence_weights(attention_mask: Tensor, items: Tensor | int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Position weights of classification; attention_mask (batch, length), 0 on padding."""
    mask = attention_mask.to(dtype)
    return mask / mask.sum(1, keepdim=True).clamp(min=1) / items


def squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """(batch, length): mean over the width of the squared difference, at least float32."""
    return (at_least_float32(student) - at_least_float32(teacher)).square().mean(-1)


def cosine_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """(batch, length): 1 - cosine."""
    return 1 - F.cosine_similarity(at_least_float32(student), at_least_float32(teacher), dim=-1)


def attention_divergence(student: Attention, teacher: Attention, batch: Batch) -> Tensor:
    """KL(teacher ‖ student) of the attention maps, mean over heads, then as `Batch.mean` over queries."""
    if isinstance(student, RecordedAttention) and isinstance(teacher, RecordedAttention):
        learning = torch.is_grad_enabled() and (teacher.query.requires_grad or teacher.key.requires_grad)
        if not learning:
            return recorded_divergence(student, teacher, batch.weights)
    return _eager_divergence(student, teacher, batch)


def _eager_divergence(student: Attention, teacher: Attention, batch: Batch) -> Tensor:
    """The same from whatever gives maps, differentiable by both sides."""

    def per_query(rows: slice) -> Tensor:
        mine, other = student.log_map(rows), teacher.log_map(rows)
        # Masked keys have no probability in either map. Below the floor a number is 0 once the logarithm is undone.
        floor = math.log(torch.finfo(mine.dtype).tiny)
        parts = other.exp() * (other - mine.clamp(min=floor))
        return parts.masked_fill(other <= floor, 0.0).sum(-1).mean(1)

    count, length = batch.weights.shape
    return in_rows(per_query, count, length * length, batch)


def in_rows(values: Callable[[slice], Tensor], count: int, elements: int, batch: Batch) -> Tensor:
    """`Batch.mean` of values (rows, length), a few rows of the batch at a time, computed anew in backward.

    For values that come from tensors (rows, heads, length, length): those of the whole batch never live at once.
    """
    step = max(1, _MAP_ELEMENTS // elements)
    total = batch.weights.new_zeros(())
    for start in range(0, count, step):
        rows = slice(start, start + step)
        part = Batch(batch.weights[rows], batch.moment)
        total = total + checkpoint(lambda rows=rows, part=part: part.mean(values(rows)), use_reentrant=False)
    return total


def at_least_float32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or as it is in float64: sums of bfloat16 would lose the small terms."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
