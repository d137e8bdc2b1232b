"""CTCD: student and teacher are trained together and each learns from the other.

Lee et al. 2023, "Co-training and Co-distillation for Quality Improvement and Compression of Language Models" (arXiv
2311.02849), as described there: both learn from the labels, and the distributions of each are a soft target of the
other, held fixed on that side. The teacher that is trained is a deep copy. The model that was given stays as it is; the
copy lives in `method.pt` of the checkpoints for as long as the run does.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import ClassVar

from transformers import PreTrainedModel

from kronfold.distill import method
from kronfold.distill.method import Method
from kronfold.distill.signals import Moment


@dataclass(frozen=True)
class CTCDOptions(method.MethodOptions):
    """What the teacher learns from; what the student learns from are `ce` and `kl` of the objective.

    Args:
        teacher_ce: weight of the labels. teacher_kl: weight of T² KL(student ‖ teacher).
    """

    teacher_ce: float = 1.0
    teacher_kl: float = 1.0

    def faults(self) -> list[str]:
        return method.weight_faults(teacher_ce=self.teacher_ce, teacher_kl=self.teacher_kl)


class CTCD(Method):
    """Two-way distillation. Costs the training of the teacher: its backward pass and three more copies of its size."""

    options_type: ClassVar = CTCDOptions
    needs_teacher_always = True
    trains_teacher = True

    def attach(self, student: PreTrainedModel, teacher: PreTrainedModel | None) -> None:
        assert teacher is not None
        self.partner = copy.deepcopy(teacher).float().requires_grad_(True)

    def acting_teacher(self, teacher: PreTrainedModel) -> PreTrainedModel:
        return self.partner

    def partner_weights(self, moment: Moment) -> dict[str, float]:
        given = {"ce": self.options.teacher_ce, "kl": self.options.teacher_kl}
        return {name: weight for name, weight in given.items() if weight > 0}
