"""Asked before any training: do student and teacher fit, and may a head be applied apart from its model?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from kronfold.base.errors import InputError
from kronfold.distill.signals import Batch, at_least_float32


def check_pair(student: PreTrainedModel, teacher: PreTrainedModel | None = None, block: int | None = None) -> None:
    """Raises InputError with every reason why `student` cannot learn from `teacher` on blocks of `block` tokens.

    Reasons: vocabularies of different size, a block longer than a model's positions, tensors shared by both; of
    classifiers also different tasks, and a student without a token for padding.
    """
    faults = _task_faults(student, teacher) if is_classifier(student) else []
    if teacher is not None:
        if is_classifier(teacher) != is_classifier(student):
            names = type(student).__name__, type(teacher).__name__
            faults.append(f"the student is a {names[0]} and the teacher a {names[1]}; both must do the same task")
        sizes = vocabulary(student), vocabulary(teacher)
        if sizes[0] != sizes[1]:
            faults.append(
                f"the student reads {sizes[0]:,} tokens and the teacher {sizes[1]:,}. Both get the same input, so take "
                "a teacher with the student's tokenizer"
                if is_classifier(student)
                else f"the student predicts {sizes[0]:,} tokens and the teacher {sizes[1]:,}. Distillation compares "
                "them token by token, so take a teacher with the student's tokenizer; if one "
                f"vocabulary is only padded, cut it first with model.resize_token_embeddings({min(sizes)})"
            )
        shared = {id(p) for p in student.parameters()} & {id(p) for p in teacher.parameters()}
        if shared:
            faults.append(
                f"they share {len(shared)} tensors, so training the student would change its teacher; "
                "pass copy.deepcopy(model) as the student"
            )
    for role, model in (("student", student), ("teacher", teacher)):
        if block is not None and model is not None:
            faults += position_faults(role, model, block)
    if faults:
        raise InputError("Student and teacher do not fit: " + "; ".join(faults) + ".")


def position_faults(role: str, model: PreTrainedModel, block: int) -> list[str]:
    """A sentence where blocks of `block` tokens are longer than the model's positions."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is None or block <= positions:
        return []
    return [
        f"blocks of {block:,} tokens are longer than the {positions:,} positions of the {role}; "
        f"pack the text into blocks of at most {positions:,}"
    ]


def is_classifier(model: nn.Module) -> bool:
    """Whether `model` classifies sequences (or predicts one number of each), as transformers names such models."""
    return type(model).__name__.endswith("ForSequenceClassification")


def _task_faults(student: PreTrainedModel, teacher: PreTrainedModel | None) -> list[str]:
    faults = []
    if getattr(student.config, "problem_type", None) == "multi_label_classification":
        faults.append("multi-label classification is not supported; one label or one number a sequence is")
    if teacher is not None and is_classifier(teacher) and student.config.num_labels != teacher.config.num_labels:
        labels = student.config.num_labels, teacher.config.num_labels
        faults.append(f"the student has {labels[0]} classes and the teacher {labels[1]}; fine-tune both on one task")
    for role, model in (("student", student), ("teacher", teacher)):
        if model is not None and model.config.pad_token_id is None:
            faults.append(
                f"the {role} has no padding token, so its last real token is unknown; set config.pad_token_id"
            )
    return faults


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Raises InputError unless the head applied to the last hidden state is all there is to the logits.

    Models that scale or cap their logits after the head would be trained on the wrong distribution. One
    forward pass over three tokens; the model is left in the mode it was in.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise InputError(
            f"{type(model).__name__} has no language-model head to heal; load it with AutoModelForCausalLM instead."
        )
    training = model.training
    model.eval()
    try:
        tokens = torch.zeros(1, 3, dtype=torch.long, device=model.device)
        out = model(input_ids=tokens, output_hidden_states=True, use_cache=False)
        apart = head(out.hidden_states[-1])
    finally:
        model.train(training)
    # The same numbers through the same head; only a different batching of the product may round differently.
    if not torch.allclose(apart.float(), out.logits.float(), rtol=1e-2, atol=1e-3, equal_nan=True):
        raise InputError(
            f"The logits of {type(model).__name__} are not its head applied to its last hidden state (the "
            "model scales or caps them afterwards), so its losses cannot be computed in chunks; this model "
            "family is not supported."
        )


def vocabulary(model: PreTrainedModel) -> int:
    """Width of the logits, from the head where it says so (padding counts), else from the config."""
    head = model.get_output_embeddings()
    return int(getattr(head, "out_features", None) or model.config.vocab_size)


# KL between two models on inputs that the data did not have, differentiable in everything, logits in chunks.


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
