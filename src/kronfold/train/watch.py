"""The stock Trainer, watched: it stops when losses, gradients or weights are no longer finite, and keeps what is good.

A checkpoint after step k is good when the loss of step k + 1, the first one its weights give, is sound. So when
something goes wrong at step s, the checkpoints up to step s - 2 are the good ones.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback

from kronfold.base import processes
from kronfold.base.errors import DivergedError, NotFiniteError
from kronfold.models.finite import listed, not_finite

logger = logging.getLogger(__name__)

_LOOKED_AT = 64  # tokens of a block; a damaged weight shows in all of them
_NO_LOSSES = ("loss", "grad_norm", "learning_rate", "epoch", "step")  # of a log entry


@dataclass(frozen=True)
class Seen:
    """What was found so far; steps count from 1, 0 stands for none.

    Attributes:
        bad: the first step whose loss or gradient norm was not finite. loss, norm: those of that step.
        teacher: the first step at which the teacher's outputs were not finite.
        high: since when, without a break, the loss is blown up.
    """

    bad: int
    loss: float
    norm: float
    teacher: int
    high: int


class LossWatch:
    """Looks at every step without waiting for the device: what was found stays there until it is read."""

    def __init__(self) -> None:
        self._first: dict[Hashable, Any] = {}  # by what the loss is made of
        self._loss: Tensor | None = None
        self._teacher: Tensor | None = None
        self._found: Tensor | None = None

    def begin(self, first: float, kind: Hashable) -> None:
        """The loss that a resumed training began with."""
        self._first.setdefault(kind, first)

    def add(self, loss: Tensor) -> None:
        """The loss of a micro-batch; a step's is their sum."""
        self._loss = loss if self._loss is None else self._loss + loss

    def add_teacher(self, sound: Tensor) -> None:
        """Whether the teacher's outputs for a micro-batch are finite."""
        self._teacher = sound if self._teacher is None else self._teacher & sound

    def end_step(self, step: int, norm: Any, kind: Hashable) -> None:
        """Step `step` (from 1) has this gradient norm and all its losses; `kind` tells losses that do not compare."""
        if self._loss is None:
            return
        loss, zero = self._loss.detach().float(), torch.zeros((), device=self._loss.device)
        norm = zero if norm is None else torch.as_tensor(norm, device=zero.device).detach().float()
        sound = zero == 0 if self._teacher is None else self._teacher
        first = torch.as_tensor(self._first.setdefault(kind, loss), device=zero.device)
        found = torch.stack([zero] * 5) if self._found is None else self._found
        bad, seen_loss, seen_norm, teacher, high = found
        new = (bad == 0) & ~(loss.isfinite() & norm.isfinite())
        calm = loss <= torch.maximum(3 * first, first + 1)  # a loss near 0 may well grow threefold
        self._found = torch.stack(
            [
                torch.where(new, step, bad),
                torch.where(new, loss, seen_loss),
                torch.where(new, norm, seen_norm),
                torch.where((teacher == 0) & ~sound, step, teacher),
                torch.where(calm, zero, torch.where(high > 0, high, step)),
            ]
        )
        self._loss = self._teacher = None

    def read(self) -> Seen:
        """Waits for the device."""
        if self._found is None:
            return Seen(0, 0.0, 0.0, 0, 0)
        bad, loss, norm, teacher, high = self._found.tolist()
        return Seen(int(bad), loss, norm, int(teacher), int(high))


class WatchedTrainer(Trainer):
    """A Trainer that raises DivergedError at the step where the loss or the gradients are not finite.

    A single process on a CPU looks before every change of the weights. Elsewhere that would wait for the device in
    every step; there it looks after the first step, whenever it logs or saves, and at the end. Weights are looked at
    before every checkpoint and at the end, so none that is not finite is ever written. Nor is one of a training that
    has blown up: it would take the place of a good one. Many processes find the same, and raise alike.

    Args:
        activity: what this is called in messages.

    Attributes:
        checks_weights_in_logs: look at the weights at every log too.
    """

    checks_weights_in_logs = False

    def __init__(self, *args: Any, activity: str = "training", **options: Any) -> None:
        super().__init__(*args, **options)
        self.activity = activity
        self.watch = LossWatch()
        self._norm: Any = None
        self._warned = self._first_step_read = False
        self.add_callback(_AtEachStep(self))

    def loss_kind(self) -> Hashable:
        """What the loss is made of at this step; only alike ones are compared."""
        return frozenset()

    def training_step(self, *args: Any, **options: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **options)
        self.watch.add(loss.detach())
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        found = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._norm = found.full_tensor() if hasattr(found, "full_tensor") else found
        return found

    def end_step(self) -> None:
        """All of a step but the change of the weights is done."""
        step = self.state.global_step + 1
        self.watch.end_step(step, self._norm, self.loss_kind())
        if not self._first_step_read or (self.args.device.type == "cpu" and processes.count() == 1):
            self._first_step_read = True
            self.check_sound()

    def check_sound(self, with_weights: bool = False) -> Seen:
        """Raises DivergedError, NotFiniteError (a teacher) for what was found so far. All processes must call it."""
        seen = self.watch.read()
        faults = not_finite(self._trained()) if with_weights or seen.bad else []
        everyone = processes.gather((seen, faults))
        if at := [seen.teacher for seen, _ in everyone if seen.teacher]:
            raise NotFiniteError(_teacher_text(getattr(self, "teacher", None), f"on the batch of step {min(at)}"))
        wrong = min((seen for seen, _ in everyone if seen.bad), key=lambda seen: seen.bad, default=None)
        faults = next((faults for _, faults in everyone if faults), [])
        high = min((seen.high for seen, _ in everyone if seen.high), default=0)
        weights = f" Weights that are not finite:{listed(faults)}\n" if faults else " "
        advice = f"Lower the learning rate (now {self.args.learning_rate:g}) or raise the warm-up."
        if wrong is not None:
            name, value = ("loss", wrong.loss) if not math.isfinite(wrong.loss) else ("gradient norm", wrong.norm)
            raise DivergedError(
                f"The {name} is {value} at step {wrong.bad}: the {self.activity} has diverged.{weights}{advice}",
                since=min(high or wrong.bad, wrong.bad),
            )
        if faults:
            step = self.state.global_step
            raise DivergedError(
                f"The {self.activity} has diverged at step {step}.{weights}{advice}", since=high or step + 1
            )
        return Seen(0, 0.0, 0.0, 0, high)

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        """What a checkpoint would hold, of a split student this process's part."""
        names = {}
        for name, parameter in self._own_parameters():
            names[id(parameter)] = name
            yield name, _local(parameter)
        if self.is_deepspeed_enabled or self.optimizer is None:
            return
        for parameter, state in getattr(self.optimizer, "state", {}).items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    yield f"{key} of {names.get(id(parameter), 'a parameter')}", _local(value)

    def _own_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        return self.model.named_parameters()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self._warn(self.check_sound(with_weights=self.checks_weights_in_logs))
        super().log(logs, start_time)

    def _warn(self, seen: Seen) -> None:
        """In plain words, once, of a loss that is finite but blown up."""
        if not seen.high or self._warned:
            return
        self._warned = True
        if processes.is_main():
            logger.warning(
                "Since step %d the loss is more than three times what it was at the start: the %s makes the model "
                "worse. It goes on, but no checkpoint takes the place of an earlier one while this lasts. A lower "
                "learning rate (now %g) is likely to help.",
                seen.high, self.activity, self.args.learning_rate,
            )  # fmt: skip

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        seen = self.check_sound(with_weights=True)
        if seen.high and processes.from_main(any(Path(self.args.output_dir).glob("checkpoint-*"))):
            return  # it would push out a good one
        super()._save_checkpoint(model, trial)

    def train(self, *args: Any, **options: Any) -> Any:
        found = super().train(*args, **options)
        self._warn(self.check_sound(with_weights=True))
        return found

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As saved, but for the learning rate, which is that of this run's settings: after a divergence another one."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.use_own_learning_rate()

    def use_own_learning_rate(self) -> None:
        schedule: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # accelerate wraps it
        rates = getattr(schedule, "lr_lambdas", None)
        if rates is None:
            return
        schedule.base_lrs = [self.args.learning_rate] * len(schedule.base_lrs)
        now = [self.args.learning_rate * rate(schedule.last_epoch) for rate in rates]
        schedule._last_lr = now
        for group, rate in zip(self.optimizer.param_groups, now, strict=True):
            group["initial_lr"], group["lr"] = self.args.learning_rate, rate


class _AtEachStep(TrainerCallback):
    def __init__(self, trainer: WatchedTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        for logs in state.log_history:  # of a resumed training
            if "loss" in logs:
                self.trainer.watch.begin(logs["loss"], frozenset(logs) - frozenset(_NO_LOSSES))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.trainer.end_step()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def sound(logits: Tensor) -> Tensor:
    """Whether logits (..., vocabulary) are those of a distribution; one of -inf says "never", and is allowed."""
    return logits.detach().float().logsumexp(-1).isfinite().all()


@torch.no_grad()
def check_teacher_outputs(teacher: PreTrainedModel, tokens: Tensor) -> None:
    """Raise NotFiniteError unless a teacher's logits on the first of a block's `tokens` (length,) are finite.

    It is left as it was. Whether the text fits its vocabulary and its positions is asked elsewhere.
    """
    known = torch.as_tensor(tokens)
    known = known[known < teacher.get_input_embeddings().num_embeddings]
    some = known[: min(_LOOKED_AT, getattr(teacher.config, "max_position_embeddings", _LOOKED_AT))]
    training = teacher.training
    teacher.eval()
    try:
        logits = teacher(input_ids=some[None].to(teacher.device), use_cache=False).logits if len(some) else None
    finally:
        teacher.train(training)
    if logits is not None and not sound(logits):
        raise NotFiniteError(_teacher_text(teacher, "on the first block of the text"))


def _teacher_text(teacher: nn.Module | None, where: str) -> str:
    if teacher is None:
        return f"The offline teacher's outputs are not finite {where}. Store it again with `kronfold teach`."
    if faults := not_finite(teacher.named_parameters()):
        return (
            f"The teacher's outputs are not finite {where}, because its weights are not:{listed(faults)}\nGet the "
            "teacher again from a source where it is whole."
        )
    return (
        f"The teacher's outputs are not finite {where}, though its weights are: they overflow on the way. Load it in "
        "float32, and check that this checkpoint gives sensible text at all."
    )
