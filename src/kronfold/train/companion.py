"""Parameters of the distillation method (projections, ...): trained and saved beside the student, never inside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from kronfold.base.errors import CheckpointError
from kronfold.distill import Method

FILE = "method.pt"  # in a Trainer checkpoint, beside optimizer.pt


class MethodGradients(TrainerCallback):
    """What the Trainer does for the gradients of the student only: average over processes, clip, clear."""

    def __init__(self, method: Method, accelerator: Any) -> None:
        self.method = method
        self.accelerator = accelerator

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._average()
        parameters = [p for p in self.method.companions if p.grad is not None]
        if args.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)

    def _average(self) -> None:
        """The mean over processes; one without a gradient counts as zero, unless none has one."""
        if self.accelerator.num_processes == 1:
            return
        own = self.method.companions
        had = torch.tensor([float(p.grad is not None) for p in own], device=self.accelerator.device)
        for parameter, somewhere in zip(own, self.accelerator.reduce(had, "sum").tolist(), strict=True):
            if somewhere:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(gradient, "mean")

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.method.zero_grad()


def save(method: nn.Module, directory: str) -> None:
    """Write the state of `method` into a checkpoint, if it has any."""
    if method.state_dict():
        torch.save(method.state_dict(), Path(directory) / FILE)


def load(method: nn.Module, directory: str) -> None:
    """Read it back. Raises CheckpointError when it is missing or of another shape."""
    if not method.state_dict():
        return
    try:
        method.load_state_dict(torch.load(Path(directory) / FILE, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{directory} does not hold the parameters of this run's method in {FILE} ({error}). Resume from another "
            "checkpoint, or start again in another directory."
        ) from error
