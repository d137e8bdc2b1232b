"""How a model is fine-tuned on a GLUE task, over several seeds, with or without a teacher: finetune."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator, model_validator

from kronfold.options import Options, option
from kronfold.options.healing import ObjectiveConfig
from kronfold.options.shared import OfModel, OnDevice, Resumable, SavedAs, output

LABELS_ONLY = ObjectiveConfig(kl=0.0, ce=1.0)
FROM_TEACHER = ObjectiveConfig(kl=1.0, ce=1.0, temperature=2.0)


class FineTuneConfig(Options):
    """Settings of one fine-tuning, as is usual for GPT-2 on GLUE."""

    epochs: int = option(3, "Passes over the examples, each in an order of its own.", group="Training", ge=1)
    batch_size: int = option(32, "Examples per step.", group="Training", ge=1)
    learning_rate: float = option(
        5e-5,
        "Peak learning rate of AdamW, falling linearly to 0. 5e-5 suits models of 100M parameters; one of 7M wants "
        "about ten times that.",
        group="Training",
        gt=0,
        lt=1,
    )
    warmup: float = Field(0.06, ge=0, lt=1, description="Share of the steps over which the learning rate rises.")
    weight_decay: float = Field(
        0.01, ge=0, allow_inf_nan=False, description="Weight decay of AdamW; never on biases and norms."
    )
    max_grad_norm: float = Field(1.0, ge=0, allow_inf_nan=False, description="Gradients are scaled down to this norm.")
    dropout: bool = option(
        True, "Keep the model's own dropout on.", group="Training", names=("--dropout/--no-dropout",)
    )
    objective: ObjectiveConfig = Field(LABELS_ONLY, description="What the model is trained on.")
    seed: int = Field(0, ge=0, description="Order of the examples and dropout.")


class FineTuneOptions(Resumable, OnDevice, SavedAs, OfModel):
    """A model fine-tuned on a task of GLUE, best seed saved: `kronfold finetune`.

    `settings.objective` counts only with a teacher; `settings.seed` never, as each of `seeds` is a fine-tuning.
    """

    task: str = option(..., "cola, sst2, mrpc, stsb, qqp, mnli, qnli, rte or wnli.")
    train_file: str | None = option(None, "Local .tsv with a header; default: --dataset.")
    dev_files: tuple[str, ...] = option((), "The same to measure on; twice for mnli.", names=("--dev-file",))
    columns: tuple[str, ...] = option(
        (), "Columns of the texts, then of the label, comma-separated; default: found by themselves.", commas=True
    )
    dataset: str = option("nyu-mll/glue", "A datasets id laid out as GLUE is.")
    output: str = output("Directory for the best model.")
    teacher: str | None = option(
        None,
        "A classifier fine-tuned on the task, to learn from; kl, ce, temperature and method count with it alone.",
        group="Training",
    )
    settings: FineTuneConfig = Field(FineTuneConfig(objective=FROM_TEACHER), description="How it is trained.")
    max_length: int = option(128, "Tokens per example, the rest is cut.", group="How", ge=2)
    seeds: tuple[int, ...] = option(
        (0,), "One fine-tuning each, comma-separated.", group="How", commas=True, min_length=1
    )

    @field_validator("seeds", mode="before")
    @classmethod
    def _whole_numbers(cls, given: Any) -> Any:
        try:
            seeds = [int(seed) for seed in given]
        except (TypeError, ValueError) as error:
            raise ValueError("give whole numbers, such as 0,1,2") from error
        if len(set(seeds)) != len(seeds) or any(seed < 0 for seed in seeds):
            raise ValueError(f"{seeds}: give one or more, from 0 on, each once, such as 0,1,2")
        return seeds

    @model_validator(mode="after")
    def _method_has_a_teacher(self) -> FineTuneOptions:
        objective = self.settings.objective
        if not self.teacher and (objective.method != "kd" or objective.options):
            raise ValueError("--method and --method-option say how to learn from a teacher; give --teacher too")
        return self

    @property
    def trained(self) -> FineTuneConfig:
        """`settings` with the objective that counts: without a teacher, that of the labels alone."""
        return self.settings if self.teacher else self.settings.model_copy(update={"objective": LABELS_ONLY})
