"""Patient knowledge distillation: normalised hidden states of the layers before the last.

Sun et al. 2019, "Patient Knowledge Distillation for BERT Model Compression" (arXiv 1908.09355), section 3.2: the
squared distance of hidden states divided by their norms, over the student's layers but the last, each following a
teacher layer (PKD-Skip: evenly spaced, our default). The paper takes the [CLS] vector; a decoder has none, so every
position counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from kronfold.base.errors import InputError
from kronfold.distill import method
from kronfold.distill.method import Method, Shape, layer_map
from kronfold.distill.signals import Batch, Signals, at_least_float32


@dataclass(frozen=True)
class PKDOptions(method.MethodOptions):
    """The patient term.

    Args:
        patient: its weight, the paper's β.
        teacher_layers: auto, kept, uniform, or a teacher block for each student block; that of the last is not used.
    """

    patient: float = 1.0
    teacher_layers: str | tuple[int, ...] = "auto"

    def faults(self) -> list[str]:
        return method.weight_faults(patient=self.patient) + method.layers_faults(teacher_layers=self.teacher_layers)


class PKD(Method):
    """Mean over layers of ‖s/‖s‖ - t/‖t‖‖² at every position."""

    options_type: ClassVar = PKDOptions
    needs_teacher_always = True

    @property
    def term_weights(self) -> dict[str, float]:
        return {"patient": self.options.patient} if self.options.patient > 0 else {}

    def bind(self, student: Shape, teacher: Shape | None) -> None:
        assert teacher is not None
        chosen = layer_map(self.options.teacher_layers, student, teacher)[:-1]
        # the last hidden states of a model are normed, all before are not
        self.pairs = [(s + 1, t + 1) for s, t in enumerate(chosen) if t + 1 < teacher.layers]
        if not self.pairs:
            raise InputError(
                f"Method pkd compares hidden states before the last block, and of {student.layers} student blocks on "
                f"{list(chosen)} of the teacher none is left. Take intermediate, which compares the last ones too."
            )
        self.hidden = True
        for index, _ in self.pairs:
            self.project(f"hidden_{index}", student.width, teacher.width)

    def terms(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        parts = []
        for s, t in self.pairs:
            mine = self.projected(f"hidden_{s}", student.hidden_states[s])
            parts.append(normalised_distance(mine, teacher.hidden_states[t]))
        return {"patient": batch.mean(sum(parts[1:], parts[0]) / len(parts))}


def normalised_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """‖s/‖s‖ - t/‖t‖‖² along the last axis."""
    difference = F.normalize(at_least_float32(student), dim=-1) - F.normalize(at_least_float32(teacher), dim=-1)
    return difference.square().sum(-1)
