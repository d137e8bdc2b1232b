"""fine_tune(): train a sequence classifier on labelled texts, with or without a teacher, best epoch by the dev set."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback, TrainingArguments

from kronfold.base.errors import InputError
from kronfold.options.finetune import FineTuneConfig
from kronfold.train.heal import bf16_is_fast, fused_gelu, left_as_found, without_dropout
from kronfold.train.trainer import DistillationTrainer, ShuffledStream

Measure = Callable[[PreTrainedModel], tuple[float, dict[str, Any]]]
_GROUP = 32  # batches that are sorted by length together


@dataclass(frozen=True)
class FineTuneResult:
    """What a fine-tuning did.

    Args:
        epochs: one entry per epoch: epoch (from 1), score, dev (what `measure` told), and the mean of each loss.
        best: index of the epoch of the highest score, the earliest of equals; its weights are in the model.
        seconds: wall time of training and measuring. steps: optimiser steps.
    """

    epochs: list[dict[str, Any]]
    best: int
    seconds: float
    steps: int


class LengthGroupedStream(ShuffledStream):
    """The stream of `ShuffledStream`, where sequences of like length stand together, so that little is padded.

    Each epoch is shuffled, sorted by length within pieces of 32 batches, and its batches are shuffled again. Where an
    epoch ends inside a batch, the next one fills it up.
    """

    def __init__(self, data: Sequence[Mapping[str, Any]], length: int, seed: int, batch_size: int) -> None:
        super().__init__(data, length, seed)  # type: ignore[arg-type]
        self.batch_size = batch_size
        self.lengths = [len(row["input_ids"]) for row in data]

    def _shuffled(self, epoch: int, size: int, generator: torch.Generator) -> list[int]:
        order = super()._shuffled(epoch, size, generator)
        filling = -epoch * size % self.batch_size  # places left in the last batch of the epoch before
        whole = (size - filling) // self.batch_size * self.batch_size
        batches = []
        for start in range(filling, filling + whole, _GROUP * self.batch_size):
            piece = order[start : min(start + _GROUP * self.batch_size, filling + whole)]
            piece.sort(key=lambda index: -self.lengths[index])
            batches += [piece[i : i + self.batch_size] for i in range(0, len(piece), self.batch_size)]
        middle = [index for one in torch.randperm(len(batches), generator=generator).tolist() for index in batches[one]]
        return [*order[:filling], *middle, *order[filling + whole :]] if whole > 0 else order


def fine_tune(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    rows: Sequence[Mapping[str, Any]],
    collate: Callable[[Sequence[Mapping[str, Any]]], dict[str, torch.Tensor]],
    measure: Measure,
    config: FineTuneConfig,
    *,
    device: str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> FineTuneResult:
    """Train the classifier `student` in place; afterwards it holds the weights of its best epoch, in eval mode.

    Args:
        teacher: a classifier of the same task, unchanged; None when the objective needs none.
        rows: {"input_ids", "labels"} each; `collate` makes batches of them.
        measure: called after every epoch; gives a score (higher is better) and what to note down.
        progress: called after every step with (step, steps).

    Raises:
        InputError: no rows, a pair or objective that does not fit. NotFiniteError: the teacher's outputs are not
            finite. DivergedError: loss, gradients or weights are no longer finite.
    """
    if not rows:
        raise InputError("There are no examples to fine-tune on.")
    steps = math.ceil(len(rows) * config.epochs / config.batch_size)
    ends = [math.ceil(len(rows) * epoch / config.batch_size) for epoch in range(1, config.epochs + 1)]
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(left_as_found(student, teacher))
        stack.enter_context(fused_gelu(student, teacher))
        if not config.dropout:
            stack.enter_context(without_dropout(student))
        student.float()
        watcher = _Epochs(measure, ends, progress)
        stream: Dataset = LengthGroupedStream(rows, len(rows) * config.epochs, config.seed, config.batch_size)
        trainer = DistillationTrainer(
            student,
            teacher,
            config.objective,
            args=_arguments(config, steps, place, device),
            train_dataset=stream,
            data_collator=collate,
            callbacks=[watcher],
            activity="fine-tuning",
        )
        trainer.checks_weights_in_logs = True  # after each epoch, before it is measured and its weights are kept
        trainer.remove_callback(PrinterCallback)  # it prints to stdout
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    student.load_state_dict(watcher.weights)
    student.eval()
    return FineTuneResult(watcher.epochs, watcher.best, seconds, steps)


def _arguments(config: FineTuneConfig, steps: int, place: str, device: str) -> TrainingArguments:
    on_cpu = torch.device(device).type == "cpu"
    return TrainingArguments(
        output_dir=place,
        per_device_train_batch_size=config.batch_size,
        max_steps=steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(config.warmup * steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        bf16=bf16_is_fast("cpu" if on_cpu else "cuda"),
        use_cpu=on_cpu,
        seed=config.seed,
        logging_strategy="no",
        logging_nan_inf_filter=False,  # it would hide a diverged run behind the average of earlier losses
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=not on_cpu,
    )


class _Epochs(TrainerCallback):
    """Measures after the steps that end an epoch, and keeps the weights of the best one."""

    def __init__(self, measure: Measure, ends: Sequence[int], progress: Callable[[int, int], None] | None) -> None:
        self.measure = measure
        self.ends = ends
        self.progress = progress
        self.epochs: list[dict[str, Any]] = []
        self.best = 0
        self.weights: dict[str, torch.Tensor] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.progress is not None:
            self.progress(state.global_step, state.max_steps)
        control.should_log = state.global_step in self.ends  # the losses since the last log are those of the epoch

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **_: Any) -> None:
        if not logs or "loss" not in logs:
            return
        losses = {name: value for name, value in logs.items() if name not in ("epoch", "learning_rate", "grad_norm")}
        score, dev = self.measure(model)
        # Where an epoch is shorter than a step, several end at once: they share what was measured.
        for _end in range(self.ends.count(state.global_step)):
            self.epochs.append({"epoch": len(self.epochs) + 1, "score": score, "dev": dev, "losses": losses})
            if len(self.epochs) == 1 or score > self.epochs[self.best]["score"]:
                self.best = len(self.epochs) - 1
                self.weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
