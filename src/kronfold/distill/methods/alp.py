"""ALP-KD: each student layer follows a mixture of all teacher layers, weighted by attention.

Passban et al. 2021, "ALP-KD: Attention-Based Layer Projection for Knowledge Distillation" (arXiv 2012.14022), as
described there: the weights of the teacher layers are the softmax of their products with the student's state, and the
student is drawn to the weighted sum by squared error. The paper does so with the [CLS] vector; a decoder has none, so
every position has weights of its own. Products are divided by the root of the width, as in attention: states of
hundreds of channels would otherwise always give a weight of 1 to one layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kronfold.base.errors import InputError
from kronfold.distill import method
from kronfold.distill.method import Method, Shape
from kronfold.distill.signals import Batch, Signals, at_least_float32, squared_error


@dataclass(frozen=True)
class ALPOptions(method.MethodOptions):
    """The projected term.

    Args:
        projected: its weight.
        sharpness: the products are multiplied by it; large values choose one layer, 0 takes the mean of all.
    """

    projected: float = 1.0
    sharpness: float = 1.0

    def faults(self) -> list[str]:
        return method.weight_faults(projected=self.projected, sharpness=self.sharpness)


class ALP(Method):
    """Squared error between the student's states and attention-weighted sums of the teacher's, mean over layers.

    The last states are left out on both sides: they are normed, and the losses of the logits see to them.
    """

    options_type: ClassVar = ALPOptions
    needs_teacher_always = True

    @property
    def term_weights(self) -> dict[str, float]:
        return {"projected": self.options.projected} if self.options.projected > 0 else {}

    def bind(self, student: Shape, teacher: Shape | None) -> None:
        assert teacher is not None
        if min(student.layers, teacher.layers) < 2:
            raise InputError(
                f"Method alp mixes blocks before the last; student and teacher have {student.layers} and "
                f"{teacher.layers}, and 2 are needed. Take intermediate instead."
            )
        self.hidden = True
        for index in range(1, student.layers):
            self.project(f"hidden_{index}", student.width, teacher.width)

    def layer_weights(self, state: Tensor, candidates: Tensor) -> Tensor:
        """(batch, length, candidates), summing to 1: of state (batch, length, width), candidates with one axis more."""
        products = (state.unsqueeze(-2) * candidates).sum(-1)
        return torch.softmax(self.options.sharpness * products / state.shape[-1] ** 0.5, dim=-1)

    def terms(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        candidates = at_least_float32(torch.stack(teacher.hidden_states[1:-1], dim=-2))
        parts = []
        for index, state in enumerate(student.hidden_states[1:-1], start=1):
            mine = at_least_float32(self.projected(f"hidden_{index}", state))
            mixture = (self.layer_weights(mine, candidates).unsqueeze(-1) * candidates).sum(-2)
            parts.append(squared_error(mine, mixture))
        return {"projected": batch.mean(sum(parts[1:], parts[0]) / len(parts))}
