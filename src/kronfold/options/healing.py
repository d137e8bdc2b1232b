"""How a student heals: budget, optimiser, schedule, and what it is trained on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from kronfold.base.errors import suggest
from kronfold.options import Options

# Names of transformers.SchedulerType that need no arguments of their own and watch no evaluation (a test compares).
SCHEDULES = (
    "constant",
    "constant_with_warmup",
    "cosine",
    "cosine_warmup_with_min_lr",
    "cosine_with_min_lr",
    "cosine_with_restarts",
    "inverse_sqrt",
    "linear",
    "polynomial",
    "warmup_stable_decay",
)


class ObjectiveConfig(Options):
    """Method, weights of the losses of the logits, and the method's own options. A weight of 0 leaves a loss out.

    Options of the method may stand beside the other keys, as recipes write them (`hidden: 1`), or under `options`.
    Which there are is known to the method: `distill.Objective` refuses unknown ones before anything is trained.
    """

    kl: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="Weight of T² KL(teacher ‖ student), a mean over tokens."
    )
    ce: float = Field(0.1, ge=0, allow_inf_nan=False, description="Weight of the cross entropy with the text.")
    temperature: float = Field(1.0, gt=0, allow_inf_nan=False, description="T of the KL term; 1 to 4 is usual.")
    chunk_tokens: int = Field(
        1024, ge=1, description="Tokens whose logits are alive at a time; changes memory and speed, not the result."
    )
    method: str = Field("kd", description="Distillation method: kd, intermediate, rail, ...; see the docs on healing.")
    options: Mapping[str, Any] = Field(default_factory=dict, description="Options of the method, by name.")

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        own = {key: value for key, value in given.items() if key in cls.model_fields}
        beside = {key: value for key, value in given.items() if key not in cls.model_fields}
        return {**own, "options": {**own.get("options", {}), **beside}} if beside else own

    @field_validator("options")
    @classmethod
    def _plain_values(cls, given: Mapping[str, Any]) -> Mapping[str, Any]:
        for key, value in given.items():
            if not isinstance(value, bool | int | float | str | list | tuple | None):
                raise ValueError(f"{key} must be a number, a word, or a list of block numbers")
        return given

    @model_validator(mode="after")
    def _trains_on_something(self) -> ObjectiveConfig:
        if self.method != "kd":
            return self
        for key in self.options:
            raise ValueError(f"{key}: unknown key. {suggest(key, set(type(self).model_fields) - {'options'})}")
        if self.ce == 0 and self.kl == 0:
            raise ValueError("ce and kl are both 0: there is nothing to train on; give one a positive weight")
        return self

    @model_serializer(mode="wrap")
    def _flat(self, handler: Any) -> dict[str, Any]:
        """As recipes and result files write it: the method's options beside the other keys."""
        content = handler(self)
        options = content.pop("options")
        return {**content, **options}

    @property
    def weights(self) -> dict[str, float]:
        """Names and weights above 0 of the losses of the logits."""
        return {name: value for name in ("kl", "ce") if (value := getattr(self, name)) > 0}

    def from_labels_alone(self) -> ObjectiveConfig:
        """Cross entropy and nothing else, for controls without a teacher."""
        return ObjectiveConfig(ce=1.0, kl=0.0, temperature=self.temperature)


class HealConfig(Options):
    """Budget, optimiser and objective of a healing. In recipes, `--heal-tokens` rescales the budgets of all stages."""

    tokens: int | None = Field(
        None, ge=1, description="Training budget in tokens, rounded up to whole steps. Give this or steps."
    )
    steps: int | None = Field(None, ge=1, description="Training budget in optimiser steps.")
    batch_size: int = Field(
        16, ge=1, description="Blocks per optimiser step, in all, however many processes share them."
    )
    micro_batch: int | None = Field(
        None,
        ge=1,
        description="The most blocks a process takes through the models at once; changes speed and memory only. "
        "Default: its whole share of the step.",
    )
    learning_rate: float = Field(5e-4, gt=0, allow_inf_nan=False, description="Peak learning rate of AdamW.")
    warmup: float = Field(0.05, ge=0, lt=1, description="Share of the steps over which the learning rate rises.")
    schedule: str = Field("cosine", description="Schedule after the warm-up; cosine falls to 0 at the last step.")
    weight_decay: float = Field(
        0.0, ge=0, allow_inf_nan=False, description="Weight decay of AdamW; never on biases and norms."
    )
    max_grad_norm: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="Gradients are scaled down to this norm; 0 leaves them."
    )
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig, description="What the student is trained on.")
    dropout: bool = Field(
        False,
        description="Leave the student's dropout on. A compressed model on a short budget underfits, and attention "
        "without dropout has far faster kernels.",
    )
    seed: int = Field(0, ge=0, description="Order of the blocks and dropout. Same seed and machine, same result.")
    start_tokens: int = Field(
        0,
        ge=0,
        description="How far into the seeded order of the blocks to begin, so that the stages of one run, each with "
        "its share of the budget, read on where the one before stopped.",
    )
    bf16: bool | Literal["auto"] = Field(
        "auto", description="Compute in bfloat16; auto: where the machine does so natively."
    )
    save_steps: int | None = Field(
        None, ge=1, description="Steps between checkpoints, the two newest kept; default: a tenth of the run."
    )
    log_every: int = Field(10, ge=1, description="Steps per entry of the loss record.")

    @model_validator(mode="after")
    def _has_one_budget(self) -> HealConfig:
        faults = []
        if (self.tokens is None) == (self.steps is None):
            faults.append("give a budget either as tokens or as steps, and only one of them")
        if self.schedule not in SCHEDULES:
            faults.append(f"unknown schedule {self.schedule!r}. {suggest(self.schedule, SCHEDULES).rstrip('.')}")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    def steps_for(self, tokens_per_step: int) -> int:
        """Optimiser steps of the budget: `steps`, or ceil(tokens / tokens_per_step)."""
        return self.steps if self.steps is not None else math.ceil((self.tokens or 0) / tokens_per_step)
