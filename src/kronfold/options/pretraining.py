"""Training from scratch: pretrain."""

from __future__ import annotations

from kronfold.options import option
from kronfold.options.shared import Resumable, output


class PretrainOptions(Resumable):
    """A GPT-2 trained from scratch by a config: `kronfold pretrain`."""

    config: str = option(..., "A pretraining YAML file, or demo.", argument=True)
    output: str = output("Directory for the trained model.")
    seed: int | None = option(None, "Instead of the config's seed.", group="How", ge=0, lt=2**32)
