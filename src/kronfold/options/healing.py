"""How a student heals: budget, optimiser, schedule, and what it is trained on; the jobs heal and teach."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, field_validator, model_serializer, model_validator

from kronfold.base.errors import suggest
from kronfold.options import Options, option
from kronfold.options.shared import (
    Measured,
    OfModel,
    OnBlocks,
    OnDevice,
    ReadsText,
    Resumable,
    SavedAs,
    Seeded,
    output,
    text,
)

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

    kl: float = option(
        1.0,
        "Weight of T² KL(teacher ‖ student), a mean over tokens.",
        group="Training",
        ge=0,
        allow_inf_nan=False,
    )
    ce: float = option(
        0.1, "Weight of the cross entropy with the text or the labels.", group="Training", ge=0, allow_inf_nan=False
    )
    temperature: float = option(1.0, "T of the KL term; 1 to 4 is usual.", group="Training", gt=0, allow_inf_nan=False)
    chunk_tokens: int = Field(
        1024, ge=1, description="Tokens whose logits are alive at a time; changes memory and speed, not the result."
    )
    method: str = option(
        "kd", "Distillation method: kd, intermediate, rail, ...; see docs/distillation.md.", group="Training"
    )
    options: Mapping[str, Any] = option(
        dict,
        "An option of the method; may be repeated.",
        group="Training",
        names=("--method-option",),
        metavar="NAME=VALUE",
        pairs=True,
    )

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

    tokens: int | None = option(
        None,
        "Training budget in tokens, rounded up to whole steps.",
        group="Training",
        names=("--heal-tokens",),
        ge=1,
    )
    steps: int | None = Field(None, ge=1, description="Training budget in optimiser steps; give this or tokens.")
    batch_size: int = option(
        16, "Blocks per optimiser step, in all, however many processes share them.", group="Training", ge=1
    )
    micro_batch: int | None = option(
        None,
        "The most blocks a process takes through the models at once; changes speed and memory only. Default: its "
        "whole share of the step.",
        group="Training",
        ge=1,
    )
    learning_rate: float = option(5e-4, "Peak learning rate of AdamW.", group="Training", gt=0, allow_inf_nan=False)
    warmup: float = option(0.05, "Share of the steps over which the learning rate rises.", group="Training", ge=0, lt=1)
    schedule: str = option(
        "cosine", "Schedule after the warm-up; cosine falls to 0 at the last step.", group="Training"
    )
    weight_decay: float = option(
        0.0, "Weight decay of AdamW; never on biases and norms.", group="Training", ge=0, allow_inf_nan=False
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


class HealOptions(Resumable, Measured, ReadsText, Seeded, OnDevice, SavedAs):
    """A compressed checkpoint healed by its original: `kronfold heal`."""

    model: str = option(..., "Directory of the compressed model.", argument=True, metavar="STUDENT")
    teacher: str = option(..., "The original model to learn from.")
    train_text: str = text()
    eval_text: str | None = option(None, "Text to measure on, before and after.")
    output: str = output("Directory for the healed checkpoint.")
    offline_teacher: str | None = option(
        None,
        "What `kronfold teach` stored of TEACHER on this text; the teacher is then not run.",
        group="How",
        metavar="DIR",
    )
    healing: HealConfig = Field(HealConfig(tokens=10_000_000), description="How it heals; give it a budget.")


class TeachOptions(Resumable, ReadsText, OnDevice, OnBlocks, OfModel):
    """A teacher run once over a text, its likeliest tokens stored: `kronfold teach`."""

    train_text: str = text()
    tokens: int = option(..., "How many tokens of the text; a healing may read them several times.", ge=1)
    output: str = output("Directory for what the teacher says.")
    top_k: int = option(64, "Tokens kept of each position; all others are one bucket.", group="How", ge=1)
    temperature: float = option(
        1.0, "Temperature of the KL term that will learn from it.", group="Training", gt=0, allow_inf_nan=False
    )
    batch_size: int = option(8, "Windows that go through the model at once.", group="How", ge=1)
