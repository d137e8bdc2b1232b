"""KL between two models on inputs that the data did not have, differentiable in everything, logits in chunks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from kronfold.distill.signals import Batch, at_least_float32


@dataclass(frozen=True)
class Pair:
    """Student and teacher as a method may run them on inputs of its own.

    Attributes:
        student_head, teacher_head: of language models; None for classifiers, whose own logits are compared.
        temperature: of the softened distributions. chunk_tokens: logits alive at a time.
    """

    student: PreTrainedModel
    teacher: PreTrainedModel
    student_head: nn.Module | None
    teacher_head: nn.Module | None
    temperature: float
    chunk_tokens: int

    def divergence(
        self, student: Mapping[str, Any], teacher: Mapping[str, Any], batch: Batch, through_teacher: bool = False
    ) -> Tensor:
        """Σ `batch` weights · T² KL(teacher ‖ student) on these inputs; squared error where one number is predicted.

        `student`, `teacher`: what each model is called with (`input_ids` or `inputs_embeds`, `attention_mask`).
        Gradients flow into the student and its inputs; `through_teacher`: also into the teacher and its inputs.
        """
        if self.student_head is None or self.teacher_head is None:
            mine = self.student(**student, use_cache=False).logits
            with torch.set_grad_enabled(through_teacher and torch.is_grad_enabled()):
                other = self.teacher(**teacher, use_cache=False).logits
            return (batch.sequence_weights * _divergence(mine, other, self.temperature)).sum()
        hidden = self.student.base_model(**student, use_cache=False).last_hidden_state.flatten(0, 1)
        with torch.set_grad_enabled(through_teacher and torch.is_grad_enabled()):
            taught = self.teacher.base_model(**teacher, use_cache=False).last_hidden_state.flatten(0, 1)
        weights, total = batch.weights.flatten(), batch.weights.new_zeros(())
        for start in range(0, len(hidden), self.chunk_tokens):
            rows = slice(start, start + self.chunk_tokens)
            parts = hidden[rows], taught[rows], weights[rows], through_teacher
            total = total + checkpoint(self._chunk, *parts, use_reentrant=False)
        return total

    def _chunk(self, hidden: Tensor, taught: Tensor, weights: Tensor, through_teacher: bool) -> Tensor:
        assert self.student_head is not None
        assert self.teacher_head is not None
        with torch.set_grad_enabled(through_teacher and torch.is_grad_enabled()):
            other = self.teacher_head(taught)
        values = _divergence(self.student_head(hidden), other, self.temperature)
        return (weights * values.masked_fill(weights == 0, 0.0)).sum()


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Per row of logits (rows, classes)."""
    student, teacher = at_least_float32(student), at_least_float32(teacher)
    if student.shape[-1] == 1:
        return (student - teacher).square().squeeze(-1)
    mine, other = torch.log_softmax(student / temperature, -1), torch.log_softmax(teacher / temperature, -1)
    return temperature**2 * F.kl_div(mine, other, reduction="none", log_target=True).sum(-1)
