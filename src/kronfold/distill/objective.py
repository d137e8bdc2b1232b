"""What the student is trained on: named losses, their weights, one temperature."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kronfold.base.errors import InputError
from kronfold.distill.chunked import chunked_loss, head_parameters
from kronfold.distill.losses import IGNORE, LOSSES, count_tokens


@dataclass(frozen=True)
class ObjectiveConfig:
    """Weights of the named losses; 0 leaves a loss out. A field named like a loss is its weight.

    Args:
        kl: weight of T² KL(teacher ‖ student), per-token mean. Above 0 a teacher is needed.
        ce: weight of next-token cross entropy, per-token mean.
        temperature: T of `kl`.
        chunk_tokens: logits alive at a time; changes memory and speed, not the result.

    Raises:
        InputError: a weight below 0 or infinite, all weights 0, a temperature or chunk_tokens not above 0.
    """

    kl: float = 1.0
    ce: float = 0.1
    temperature: float = 1.0
    chunk_tokens: int = 1024

    def __post_init__(self) -> None:
        named = {name: value for name, value in asdict(self).items() if name in LOSSES}
        bad = [f"{name}={value}" for name, value in named.items() if not 0 <= value < math.inf]
        if not math.isfinite(self.temperature) or self.temperature <= 0:
            bad.append(f"temperature={self.temperature} (must be above 0; 1 to 4 is usual)")
        if self.chunk_tokens < 1:
            bad.append(f"chunk_tokens={self.chunk_tokens} (must be at least 1; 1024 is usual)")
        if not any(named.values()):
            bad.append(f"every weight is 0; set at least one of {', '.join(named)}")
        if bad:
            raise InputError(f"Objective cannot be used: {'; '.join(bad)}. Weights are finite numbers from 0 up.")

    @property
    def weights(self) -> dict[str, float]:
        """Loss name to weight, only those above 0."""
        return {name: value for name, value in asdict(self).items() if name in LOSSES and value > 0}

    @property
    def needs_teacher(self) -> bool:
        return any(LOSSES.get(name).needs_teacher for name in self.weights)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class Objective:
    """A config made callable. It shifts the labels: position i predicts token i + 1."""

    def __init__(self, config: ObjectiveConfig | None = None) -> None:
        self.config = config or ObjectiveConfig()

    def __call__(
        self,
        student_hidden: Tensor,
        student_head: nn.Module,
        teacher_hidden: Tensor | None,
        teacher_head: nn.Module | None,
        labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to differentiate, and each named loss by itself (unweighted, detached).

        Args:
            student_hidden: (batch, length, width), after the final norm.
            teacher_hidden: (batch, length, teacher width); None when `needs_teacher` is False.
            labels: (batch, length), the input tokens themselves, IGNORE where nothing is to be learnt.
            num_items_in_batch: predicted tokens of the whole batch that this micro-batch is a part of.
                Everything is divided by it, so gradients of micro-batches add up to exactly those of the
                batch. Default: those of this micro-batch, which makes each value a per-token mean.

        Raises:
            InputError: the objective needs a teacher and none is given.
        """
        # The last position predicts nothing. Ignoring it keeps the hidden states in place; slicing would copy
        # them.
        shifted = torch.full_like(labels, IGNORE)
        shifted[:, :-1] = labels[:, 1:]
        total, sums = chunked_loss(
            student_hidden.flatten(0, 1),
            student_head,
            head_parameters(student_head),
            shifted.flatten(),
            self.config.weights,
            teacher_hidden=None if teacher_hidden is None else teacher_hidden.flatten(0, 1),
            teacher_head=teacher_head,
            temperature=self.config.temperature,
            chunk_tokens=self.config.chunk_tokens,
        )
        items = count_tokens(shifted).clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return total / items, dict(zip(self.config.weights, sums / items, strict=True))
