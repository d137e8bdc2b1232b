"""MiniLM: attention maps and value relations of the last layer.

Wang et al. 2020, "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers"
(arXiv 2002.10957), section 3: KL of the attention distributions, and KL of the value relations softmax(V Vᵀ / √d_head),
mean over heads and queries. Head sizes may differ, so widths may; numbers of heads may not. In a decoder a value is
related to the values its query may see.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from kronfold.base.errors import InputError
from kronfold.distill import method
from kronfold.distill.attention import Attention, RecordedAttention
from kronfold.distill.method import AttentionLayers, Method, Shape, check_layers
from kronfold.distill.signals import Batch, Signals, attention_divergence


@dataclass(frozen=True)
class MiniLMOptions(method.MethodOptions):
    """The two terms.

    Args:
        attention: weight of KL(teacher ‖ student) of the attention maps.
        values: weight of the same of the value relations.
        teacher_layer: teacher block to follow, from 0; -1 is the last.
    """

    attention: float = 1.0
    values: float = 1.0
    teacher_layer: int = -1

    def faults(self) -> list[str]:
        faults = method.weight_faults(attention=self.attention, values=self.values)
        return faults + method.whole_faults(-1, teacher_layer=self.teacher_layer)


class MiniLM(Method):
    """Compares one block, the student's last, with one of the teacher."""

    options_type: ClassVar = MiniLMOptions
    needs_teacher_always = True

    @property
    def term_weights(self) -> dict[str, float]:
        given = {"attention": self.options.attention, "values": self.options.values}
        return {name: weight for name, weight in given.items() if weight > 0}

    def bind(self, student: Shape, teacher: Shape | None) -> None:
        assert teacher is not None
        if student.heads != teacher.heads:
            raise InputError(
                f"Method minilm compares head by head; the student has {student.heads} heads and the teacher "
                f"{teacher.heads}. Take a method that compares hidden states: rail, alp, pkd."
            )
        block = self.options.teacher_layer % teacher.layers if self.options.teacher_layer == -1 else None
        block = self.options.teacher_layer if block is None else block
        check_layers([block], teacher.layers, "teacher")
        if self.term_weights:
            values = "values" in self.term_weights
            self.attention = AttentionLayers((student.layers - 1,), (block,), values)

    def terms(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        mine = student.attentions[self.attention.student[0]]
        other = teacher.attentions[self.attention.teacher[0]]
        found = {}
        if "attention" in self.term_weights:
            found["attention"] = attention_divergence(mine, other, batch)
        if "values" in self.term_weights:
            found["values"] = attention_divergence(value_relations(mine), value_relations(other), batch)
        return found


def value_relations(attention: Attention) -> RecordedAttention:
    """An attention whose map is softmax(V Vᵀ / √d_head) over what each query may see."""
    assert isinstance(attention, RecordedAttention)  # asked for when the method was bound
    value = attention.for_every_head(attention.value)
    return replace(attention, query=value, key=value, scale=value.shape[-1] ** -0.5)
