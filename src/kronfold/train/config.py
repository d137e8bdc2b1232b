"""The settings of a healing, checked all at once before anything is touched."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from transformers import SchedulerType

from kronfold.base.errors import InputError, suggest
from kronfold.distill import ObjectiveConfig

# These need arguments of their own, or watch an evaluation we do not run.
_UNUSABLE = {"reduce_lr_on_plateau", "greedy"}
SCHEDULES = sorted(s.value for s in SchedulerType if s.value not in _UNUSABLE)


@dataclass(frozen=True)
class HealConfig:
    """Budget, optimiser and objective of a healing.

    Args:
        tokens: budget in tokens, rounded up to whole steps. Give this or `steps`.
        steps: optimiser steps, each of batch_size x accumulate blocks per process.
        batch_size: blocks per micro-batch and process.
        accumulate: micro-batches per optimiser step; gradients are exactly those of the whole batch.
        learning_rate: the highest, of AdamW.
        warmup: share of the steps over which the learning rate rises; then `schedule` takes over.
        schedule: a schedule of transformers by name; "cosine" falls to 0 at the last step.
        weight_decay: AdamW's; never on biases and norms.
        max_grad_norm: gradients are scaled down to this norm; 0 leaves them.
        objective: method, losses, weights, temperature.
        dropout: whether the student's dropout stays on. A compressed model on a short budget underfits, and
            attention without dropout has far faster kernels, so it is off unless asked for.
        seed: order of the blocks and dropout. Same seed, same machine, same result.
        start_tokens: how far into the seeded order of the blocks to begin, so that the stages of one run, each with
            its share of the budget, read on where the one before stopped.
        bf16: autocast to bfloat16; "auto" where the machine computes in it natively.
        save_steps: a checkpoint every so many steps and at the end, the two newest kept. Only with an
            output_dir; None is a tenth of the run.
        log_every: steps per entry of the loss record.

    Raises:
        InputError: every value that cannot be used, in one message.
    """

    tokens: int | None = None
    steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 5e-4
    warmup: float = 0.05
    schedule: str = "cosine"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    dropout: bool = False
    seed: int = 0
    start_tokens: int = 0
    bf16: bool | Literal["auto"] = "auto"
    save_steps: int | None = None
    log_every: int = 10

    def __post_init__(self) -> None:
        faults = []
        if (self.tokens is None) == (self.steps is None):
            faults.append("give a budget either as tokens or as steps, and only one of them")
        for name in ("tokens", "steps", "batch_size", "accumulate", "save_steps", "log_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                faults.append(f"{name}={value} must be at least 1")
        if self.start_tokens < 0:
            faults.append(f"start_tokens={self.start_tokens} must be 0 or above")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            faults.append(f"learning_rate={self.learning_rate} must be above 0; 1e-4 to 2e-3 is usual")
        if not 0 <= self.warmup < 1:
            faults.append(f"warmup={self.warmup} must be a share of the steps, from 0 up to but not 1")
        for name in ("weight_decay", "max_grad_norm"):
            if not getattr(self, name) >= 0:
                faults.append(f"{name}={getattr(self, name)} must be 0 or above")
        if self.schedule not in SCHEDULES:
            near = suggest(self.schedule, SCHEDULES).rstrip(".")
            faults.append(f"unknown schedule {self.schedule!r}. {near}")
        if self.bf16 not in (True, False, "auto"):
            faults.append(f"bf16={self.bf16!r} must be True, False or 'auto'")
        if faults:
            raise InputError(f"Healing cannot start: {'; '.join(faults)}.")

    @classmethod
    def from_options(cls, **options: Any) -> HealConfig:
        """The config with these fields set. Raises InputError with the nearest names for an unknown one."""
        allowed = [f.name for f in fields(cls)]
        unknown = [name for name in options if name not in allowed]
        if unknown:
            raise InputError(f"Unknown healing option {unknown[0]!r}. {suggest(unknown[0], allowed)}")
        return cls(**options)

    def steps_for(self, tokens_per_step: int) -> int:
        """Optimiser steps of the budget: `steps`, or ceil(tokens / tokens_per_step)."""
        return self.steps if self.steps is not None else math.ceil((self.tokens or 0) / tokens_per_step)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)
