"""RAIL-KD: the student's intermediate layers follow teacher layers that are drawn anew all the time.

Haidar et al. 2021, "RAIL-KD: RAndom Intermediate Layer Mapping for Knowledge Distillation" (arXiv 2109.10164), as
described there: as many teacher layers as the student has intermediate ones are drawn at random and sorted; hidden
states are averaged over the positions; their normalised distance is taken layer by layer, or once for all layers put
side by side. The paper maps both sides into one smaller space by learned matrices. Such a map of the teacher's side
could lower the loss while the student learns nothing, so here only the student is mapped, where widths differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from kronfold.base.errors import InputError, suggest
from kronfold.distill import method
from kronfold.distill.method import Method, Shape
from kronfold.distill.methods.pkd import normalised_distance
from kronfold.distill.signals import Batch, Moment, Signals, at_least_float32

_FORMS = ("layerwise", "concatenated")


@dataclass(frozen=True)
class RAILOptions(method.MethodOptions):
    """The random map.

    Args:
        random_layers: weight of the term.
        form: layerwise, the mean of the layers' distances, or concatenated, the distance of all side by side.
        every: optimiser steps between two draws. The paper draws once an epoch; a healing has often only one.
    """

    random_layers: float = 1.0
    form: str = "layerwise"
    every: int = 1

    def faults(self) -> list[str]:
        faults = method.weight_faults(random_layers=self.random_layers) + method.whole_faults(1, every=self.every)
        if self.form not in _FORMS:
            faults.append(f"unknown form {self.form!r}. {suggest(str(self.form), _FORMS)}".rstrip("."))
        return faults


class RAIL(Method):
    """Normalised distance of averaged hidden states, on a sorted random map from the seed and the step alone."""

    options_type: ClassVar = RAILOptions
    needs_teacher_always = True

    @property
    def term_weights(self) -> dict[str, float]:
        return {"random_layers": self.options.random_layers} if self.options.random_layers > 0 else {}

    def bind(self, student: Shape, teacher: Shape | None) -> None:
        assert teacher is not None
        self.count, self.choice = student.layers - 1, teacher.layers - 1  # the last is no intermediate layer
        if not 1 <= self.count <= self.choice:
            raise InputError(
                f"Method rail draws a teacher block for each student block but the last: {self.count} of the teacher's "
                f"{self.choice}. It needs a student of 2 blocks or more and a teacher of at least its depth."
            )
        self.hidden = True
        for index in range(1, self.count + 1):
            self.project(f"hidden_{index}", student.width, teacher.width)

    def draw(self, moment: Moment) -> list[int]:
        """Teacher blocks, in order, of the student's blocks 0, 1, ...: every sorted choice is equally likely."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + moment.step // self.options.every)
        return sorted(torch.randperm(self.choice, generator=generator)[: self.count].tolist())

    def terms(self, student: Signals, teacher: Signals, batch: Batch) -> dict[str, Tensor]:
        pairs = [
            (
                batch.pool(at_least_float32(self.projected(f"hidden_{i + 1}", student.hidden_states[i + 1]))),
                batch.pool(at_least_float32(teacher.hidden_states[block + 1])),
            )
            for i, block in enumerate(self.draw(batch.moment))
        ]
        if self.options.form == "layerwise":
            distance = torch.stack([normalised_distance(s, t) for s, t in pairs]).mean(0)
        else:
            # one long vector a side; layers of large states do not drown the others, each is normalised before
            sides = [torch.cat([F.normalize(side, dim=-1) for side in one], dim=-1) for one in zip(*pairs, strict=True)]
            distance = normalised_distance(*sides)
        return {"random_layers": (batch.sequence_weights * distance).sum()}
