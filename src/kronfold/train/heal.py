"""heal(): continue training a compressed model towards the model it came from."""

from __future__ import annotations

import contextlib
import hashlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from kronfold.base.errors import DataError, InputError
from kronfold.distill import ObjectiveConfig, check_pair
from kronfold.train import checkpoints
from kronfold.train.order import ShuffledStream
from kronfold.train.precision import bf16_is_fast
from kronfold.train.trainer import DistillationTrainer

Progress = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class HealResult:
    """What a healing did.

    Args:
        tokens: tokens seen in all, resumed part included (steps x batch x accumulate x processes x block).
        steps: optimiser steps in all.
        seconds: wall time of this call's training loop; a resumed run counts only its own part.
        tokens_per_second: of this call; 0 when nothing was left to do.
        losses: one entry per log: step, tokens, loss, each named loss (nats per token, mean over the steps since the
            entry before), learning_rate.
        bf16: whether matrix products ran in bfloat16.
        resumed_from: the step this call continued from, or None.
    """

    tokens: int
    steps: int
    seconds: float
    tokens_per_second: float
    losses: list[dict[str, float]]
    learning_rate: float
    bf16: bool
    resumed_from: int | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def heal(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    data: Dataset,
    *,
    tokens: int | None = None,
    steps: int | None = None,
    batch_size: int = 8,
    accumulate: int = 1,
    learning_rate: float = 1e-3,
    warmup: float = 0.05,
    schedule: str = "cosine",
    weight_decay: float = 0.0,
    objective: ObjectiveConfig | None = None,
    seed: int = 0,
    bf16: bool | Literal["auto"] = "auto",
    device: str | torch.device | None = None,
    output_dir: str | Path | None = None,
    resume: bool = False,
    save_steps: int | None = None,
    log_every: int = 10,
    callbacks: Sequence[TrainerCallback] = (),
    progress: Progress | None = None,
) -> HealResult:
    """Train `student` in place towards `teacher` on blocks of text.

    The dense control (the teacher itself fine-tuned on the same text) is this function on `copy.deepcopy(teacher)`
    with `teacher=None` and `ObjectiveConfig(kl=0, ce=1)`.

    Args:
        student: trained in place, in float32; given back in float32, in the mode it was in.
        teacher: unchanged afterwards. None when the objective needs none.
        data: map-style dataset of {"input_ids", "labels"}, integer blocks of one length.
        tokens: budget; rounded up to whole steps. Give this or `steps`.
        steps: optimiser steps, each of batch_size x accumulate blocks (per process).
        warmup: share of the steps over which the learning rate rises to `learning_rate`; then `schedule` (any name of
            transformers' schedules) takes over.
        weight_decay: AdamW's; never on biases and norms.
        seed: order of the blocks and dropout. Same seed, same machine, same result.
        bf16: autocast to bfloat16; "auto" where the machine computes in it natively.
        device: where to train; default is the Trainer's choice (a GPU when there is one).
        output_dir: where checkpoints go; needed for `resume` and `save_steps`.
        resume: continue from the newest whole checkpoint in output_dir (bitwise the run that was never stopped, on CPU
            in float32), or start afresh when there is none.
        save_steps: a checkpoint every so many steps and at the end; the two newest are kept.
        log_every: steps per entry of `losses`.
        progress: called after every step with (step, steps, latest logs).

    Raises:
        InputError: budget, objective, pair or options that cannot be used; a loss that is no longer finite.
        DataError: no blocks, or blocks that are not integer tensors of one length.
        OutputError, CheckpointError: output_dir is taken, or its checkpoints are of another run.
    """
    objective = objective or ObjectiveConfig()
    block, fingerprint = _inspect_data(data)
    _check_options(tokens, steps, batch_size, accumulate, learning_rate, warmup, log_every, save_steps)
    if output_dir is None and (resume or save_steps):
        raise InputError("resume and save_steps need an output_dir for the checkpoints.")
    if objective.needs_teacher and teacher is None:
        raise InputError("This objective needs a teacher (weight of kl above 0); pass one, or set kl to 0.")
    check_pair(student, teacher if objective.needs_teacher else None, block)

    with contextlib.ExitStack() as stack:
        place = Path(output_dir) if output_dir else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        on_cpu = torch.device(device).type == "cpu" if device is not None else not torch.cuda.is_available()
        use_bf16 = bf16_is_fast("cpu" if on_cpu else "cuda") if bf16 == "auto" else bf16
        args = TrainingArguments(
            output_dir=str(place),
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulate,
            learning_rate=learning_rate,
            lr_scheduler_type=schedule,
            weight_decay=weight_decay,
            bf16=use_bf16,
            use_cpu=on_cpu,
            seed=seed,
            logging_steps=log_every,
            logging_first_step=True,
            logging_nan_inf_filter=False,  # it would hide a diverged run behind the average of earlier losses
            save_strategy="steps" if save_steps else "no",
            save_steps=save_steps or 1,
            save_total_limit=2,  # should the newest be damaged, there is one before it
            report_to=[],
            disable_tqdm=True,
            use_cache=bool(
                getattr(student.config, "use_cache", True)
            ),  # the Trainer writes this into the config
        )
        per_step = batch_size * accumulate * args.world_size
        total = steps if steps is not None else math.ceil((tokens or 0) / (per_step * block))
        args.max_steps = total
        args.warmup_steps = math.ceil(warmup * total)
        settings = {
            "steps": total,
            "blocks_per_step": per_step,
            "learning_rate": learning_rate,
            "warmup": warmup,
            "schedule": schedule,
            "weight_decay": weight_decay,
            "objective": objective.to_dict(),
            "seed": seed,
            "bf16": use_bf16,
            "student_parameters": sum(p.numel() for p in student.parameters()),
            **fingerprint,
        }
        checkpoint = checkpoints.prepare(place, settings, resume) if output_dir else None
        stack.enter_context(_left_as_found(student, teacher))
        student.float()
        watcher = _Watcher(progress, per_step * block)
        trainer = DistillationTrainer(
            student,
            teacher,
            objective,
            args=args,
            train_dataset=ShuffledStream(data, total * per_step, seed),
            callbacks=[watcher, *callbacks],
        )
        trainer.remove_callback(PrinterCallback)  # it prints to stdout
        start = time.perf_counter()
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        seconds = time.perf_counter() - start
        first = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        done = trainer.state.global_step
        return HealResult(
            tokens=done * per_step * block,
            steps=done,
            seconds=seconds,
            tokens_per_second=(done - first) * per_step * block / seconds,
            losses=watcher.entries(trainer.state),
            learning_rate=learning_rate,
            bf16=use_bf16,
            resumed_from=first if checkpoint else None,
        )
