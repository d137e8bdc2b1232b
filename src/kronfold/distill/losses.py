"""Named losses over the logits of a run of tokens.

Shapes, for every loss here: student_logits and teacher_logits (tokens, vocabulary), labels (tokens,) already
shifted. A loss returns the SUM over its tokens, in nats; tokens labelled `IGNORE` add nothing. The number of
tokens comes separately, from `count_tokens`: sums of parts add up whatever the split, means do not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

from kronfold.base.registry import Registry
from kronfold.distill.top_k import TopK, bucketed_kl

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
