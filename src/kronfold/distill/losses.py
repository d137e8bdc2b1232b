"""A teacher's distribution cut down to its k likeliest tokens and one bucket for all the others, and the KL towards it.

Putting outcomes together can only make a divergence smaller (the data-processing inequality): the KL over these k + 1
outcomes is a lower bound of the full one, and equal to it where student and teacher share out the rest alike. So
the order of the tokens in the bucket is not taught, its mass is.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from kronfold.base.registry import Registry

# Under these names a data set gives the rows of a stored teacher beside `input_ids` and `labels`.
IDS, LOG_PROBS = "teacher_ids", "teacher_log_probs"


@dataclass(frozen=True)
class TopK:
    """Attributes:
    ids: (..., k) integers, the likeliest tokens of each position.
    log_probs: (..., k + 1): of these tokens and, last, of all others together, softened by some temperature. Rounded
        ones (float16) may be given; what reads them scales them to sum 1.
    """

    ids: Tensor
    log_probs: Tensor

    def __getitem__(self, rows: slice) -> TopK:
        return TopK(self.ids[rows], self.log_probs[rows])

    def flat(self) -> TopK:
        """(batch, length, ...) as (tokens, ...)."""
        return TopK(self.ids.flatten(0, -2), self.log_probs.flatten(0, -2))

    @classmethod
    def taken_from(cls, batch: MutableMapping[str, Any]) -> TopK | None:
        """Remove the rows of a stored teacher from a batch, if it has any."""
        return cls(batch.pop(IDS), batch.pop(LOG_PROBS)) if IDS in batch else None


def top_k(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """Cut logits (tokens, vocabulary) down to their k largest, softened by `temperature`; at least float32.

    The mass of the rest is added up from the rest itself: as one minus the others it would be lost where it is small.
    """
    scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    whole = scaled.logsumexp(-1, keepdim=True)
    values, ids = scaled.topk(k, dim=-1)
    rest = scaled.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return TopK(ids, torch.cat([values, rest], -1) - whole)


def bucketed_kl(student_logits: Tensor, teacher: TopK, temperature: float = 1.0) -> Tensor:
    """KL(teacher ‖ student) over k + 1 outcomes, per token (tokens,), not multiplied by T².

    Args:
        student_logits: (tokens, vocabulary), at least float32; differentiable.
        teacher: of these tokens, at the same temperature.
    """
    log_probs = torch.log_softmax(teacher.log_probs.to(student_logits.dtype), -1)
    return _BucketedKL.apply(student_logits, teacher.ids.long(), log_probs, temperature)


class _BucketedKL(torch.autograd.Function):
    """One exponential per logit, and the gradient in the same memory: autograd would make six tensors of this size."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        tiny = torch.finfo(logits.dtype).tiny
        odds = logits - logits.amax(-1, keepdim=True)
        odds = (odds if temperature == 1 else odds.div_(temperature)).exp_()
        kept = odds.gather(-1, ids)
        odds.scatter_(-1, ids, 0.0)
        rest = odds.sum(-1, keepdim=True)
        total = rest + kept.sum(-1, keepdim=True)
        student = torch.cat([kept, rest], -1) / total
        likely = teacher.exp()
        parts = likely * (teacher - student.clamp(min=tiny).log())
        divergence = parts.masked_fill(likely == 0, 0.0).sum(-1)
        if ctx.needs_input_grad[0]:
            # Of a kept token: p - q. Of a token in the bucket: p (1 - q_rest / p_rest). All of it over T.
            odds *= (1 / total - likely[:, -1:] / rest.clamp(min=tiny)) / temperature
            odds.scatter_(-1, ids, (student - likely)[:, :-1] / temperature)
            ctx.save_for_backward(odds)
        return divergence

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.unsqueeze(-1), None, None, None


# Named losses over the logits of a run of tokens.
#
# Shapes, for every loss here: student_logits and teacher_logits (tokens, vocabulary), labels (tokens,) already
# shifted. A loss returns the SUM over its tokens, in nats; tokens labelled `IGNORE` add nothing. The number of
# tokens comes separately, from `count_tokens`: sums of parts add up whatever the split, means do not.


IGNORE = -100


class LossFunction(Protocol):
    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, temperature: float
    ) -> Tensor: ...


class TopKLossFunction(Protocol):
    def __call__(self, student_logits: Tensor, teacher: TopK, labels: Tensor, temperature: float) -> Tensor: ...


@dataclass(frozen=True)
class Loss:
    """A loss and what it must be given. With `needs_teacher` False, teacher_logits may be None.

    `of_top_k`: the same where only the likeliest tokens of the teacher are known; None where that says too little.
    """

    function: LossFunction
    needs_teacher: bool
    of_top_k: TopKLossFunction | None = None

    def value(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        teacher_top: TopK | None,
        labels: Tensor,
        temperature: float,
    ) -> Tensor:
        """By whichever of the two the teacher is known."""
        if teacher_top is not None and self.of_top_k is not None:
            return self.of_top_k(student_logits, teacher_top, labels, temperature)
        return self.function(student_logits, teacher_logits, labels, temperature)


def count_tokens(labels: Tensor) -> Tensor:
    """How many of the labels count, as a scalar tensor on their device."""
    return labels.ne(IGNORE).sum()


def ce(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, temperature: float) -> Tensor:
    """Next-token cross entropy, summed over tokens. Temperature and teacher are not used."""
    return F.cross_entropy(student_logits, labels, ignore_index=IGNORE, reduction="sum")


def kl(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, temperature: float) -> Tensor:
    """T² KL(teacher ‖ student) of the distributions softened by T, summed over tokens.

    Hinton, Vinyals and Dean 2015, section 2; T² keeps the size of the gradient the same for every T.
    """
    assert teacher_logits is not None  # the objective refuses to run without a teacher
    student = F.log_softmax(student_logits / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits / temperature, dim=-1)
    per_token = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    return temperature**2 * per_token.masked_fill(labels.eq(IGNORE), 0.0).sum()


def kl_of_top_k(student_logits: Tensor, teacher: TopK, labels: Tensor, temperature: float) -> Tensor:
    """The same over the k likeliest tokens of the teacher, softened by the same T, and one bucket of all others."""
    per_token = bucketed_kl(student_logits, teacher, temperature)
    return temperature**2 * per_token.masked_fill(labels.eq(IGNORE), 0.0).sum()


def logit_mse(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, temperature: float) -> Tensor:
    """Squared error to the teacher's logits divided by T, mean over the vocabulary, summed over tokens."""
    assert teacher_logits is not None
    per_token = (student_logits - teacher_logits / temperature).square().mean(-1)
    return per_token.masked_fill(labels.eq(IGNORE), 0.0).sum()


def label_mse(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, temperature: float) -> Tensor:
    """Squared error of the one number predicted, (sequences, 1), to the label; summed. For regression."""
    return (student_logits.squeeze(-1) - labels).square().sum()


def teacher_mse(student_logits: Tensor, teacher_logits: Tensor | None, labels: Tensor, temperature: float) -> Tensor:
    """The same to the teacher's prediction."""
    assert teacher_logits is not None
    return (student_logits - teacher_logits).square().sum()


LOSSES: Registry[Loss] = Registry("loss")
LOSSES.register("ce", Loss(ce, needs_teacher=False))
LOSSES.register("kl", Loss(kl, needs_teacher=True, of_top_k=kl_of_top_k))
LOSSES.register("logit_mse", Loss(logit_mse, needs_teacher=True))

# What takes the place of a loss, and its name, where one number is predicted and not a distribution.
REGRESSION_LOSSES: dict[str, tuple[str, Loss]] = {
    "ce": ("label_mse", Loss(label_mse, needs_teacher=False)),
    "kl": ("teacher_mse", Loss(teacher_mse, needs_teacher=True)),
}
