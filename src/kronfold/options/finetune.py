"""How a model is fine-tuned on a GLUE task."""

from __future__ import annotations

from pydantic import Field

from kronfold.options import Options
from kronfold.options.healing import ObjectiveConfig

LABELS_ONLY = ObjectiveConfig(kl=0.0, ce=1.0)


class FineTuneConfig(Options):
    """Settings of one fine-tuning, as is usual for GPT-2 on GLUE."""

    epochs: int = Field(3, ge=1, description="Passes over the examples, each in an order of its own.")
    batch_size: int = Field(32, ge=1, description="Examples per step.")
    learning_rate: float = Field(
        5e-5,
        gt=0,
        lt=1,
        description="Peak learning rate of AdamW, falling linearly to 0. 5e-5 suits models of 100M parameters; one of "
        "7M wants about ten times that.",
    )
    warmup: float = Field(0.06, ge=0, lt=1, description="Share of the steps over which the learning rate rises.")
    weight_decay: float = Field(
        0.01, ge=0, allow_inf_nan=False, description="Weight decay of AdamW; never on biases and norms."
    )
    max_grad_norm: float = Field(1.0, ge=0, allow_inf_nan=False, description="Gradients are scaled down to this norm.")
    dropout: bool = Field(True, description="Whether the model's own dropout stays on.")
    objective: ObjectiveConfig = Field(LABELS_ONLY, description="What the model is trained on.")
    seed: int = Field(0, ge=0, description="Order of the examples and dropout.")
